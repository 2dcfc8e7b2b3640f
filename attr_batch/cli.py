"""The command line: data on stdout, everything else on stderr, the exit codes of `errors.py`.

Imports are inside the commands: `--help` and the commands that only read answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from attr_batch import __version__
from attr_batch.errors import AttrBatchError, SpecError
from attr_batch.log import plain, say


class _Parser(argparse.ArgumentParser):
    """argparse with our exit code and a hint."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(message, self.prog, f"`{self.prog} --help` shows an example")


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run listens itself, later on
    try:
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments) or 0
    except AttrBatchError as error:
        for problem in error.problems:
            say(f"error: {problem}")
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        say("error: stopped by a signal")
        return 75


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="attr-batch",
        description="Credit the data contributors of a diffusion model: Shapley values with "
        "intervals of a property of the model.",
        epilog="Start with: attr-batch run examples/digits/job.yaml",
    )
    parser.add_argument("--version", action="version", version=f"attr-batch {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(
        name: str, command: Callable[[argparse.Namespace], int | None], text: str, example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    def add_job(
        name: str, command: Callable[[argparse.Namespace], int | None], text: str, json_too: bool
    ) -> argparse.ArgumentParser:
        sub = add(name, command, text, f"attr-batch {name} examples/digits/job.yaml")
        sub.add_argument("job", metavar="JOB.yaml", help="the job spec")
        sub.add_argument(
            "--set",
            metavar="PATH=VALUE",
            action="append",
            default=[],
            dest="overrides",
            help="override a value of the spec, read as YAML; may be given several times",
        )
        if json_too:
            sub.add_argument("--json", action="store_true", help="print JSON on stdout")
        return sub

    run = add_job("run", _run, "do whatever is missing, then report", True)
    run.add_argument("--shard", metavar="I/N", help="do the I-th of N parts (from 0)")
    run.add_argument(
        "--provisional", action="store_true", help="report although evaluations are missing"
    )
    run.add_argument("--prepare", action="store_true", help="only make what all coalitions share")
    add_job("check", _check, "check spec, data, model and properties before any work", True)
    add_job("plan", _plan, "show what a run would do, what it can reuse, and why not", True)
    add_job(
        "pilot", _pilot, "measure how many images a coalition, and coalitions at once, pay", True
    )
    add_job("status", _status, "show what is done, running, failed and waiting", True)
    report = add_job("report", _report, "write attribution and report from the ledger", True)
    report.add_argument("--provisional", action="store_true", help="although some are missing")
    for sub in (run, report):
        sub.add_argument(
            "--period",
            metavar="LABEL",
            help="note in the store that this is the period's report; auto: this month, 2026-11",
        )
    add_job("periods", _periods, "list the periods of a store: their reports, what to pin", True)
    validate = add_job(
        "validate", _validate, "judge the attribution by models that are really retrained", True
    )
    validate.add_argument("--shard", metavar="I/N", help="do the I-th of N parts (from 0)")
    validate.add_argument(
        "--provisional", action="store_true", help="evaluate nothing, report what there is"
    )
    add_job("sync", _sync, "make or complete the MLflow mirror", False)
    repair = add_job(
        "repair", _repair, "put damaged files aside so that a run can remake them", True
    )
    repair.add_argument("--dry-run", action="store_true", help="only show them")

    gc = add("gc", _gc, "drop what no spec in a store needs", "attr-batch gc attr-batch-store")
    gc.add_argument("store", metavar="STORE", help="the store's folder or URL")
    gc.add_argument("--apply", action="store_true", help="do it; without: only show")
    gc.add_argument(
        "--forget",
        metavar="SPEC",
        action="append",
        default=[],
        help="also drop this spec (digest or its beginning) and what only it needs",
    )
    gc.add_argument("--json", action="store_true", help="print JSON on stdout")

    example = "attr-batch design --players 20 --budget 100 > design.csv"
    design = add("design", _design, "print coalitions to evaluate anywhere, as CSV", example)
    design.add_argument("--players", type=int, required=True, metavar="N", help="contributors")
    design.add_argument("--budget", type=int, metavar="M", help="number of design evaluations")
    design.add_argument("--estimator", default="ridge", metavar="KIND")
    design.add_argument("--semivalue", metavar="KIND", help="leave_one_out takes n with exact")
    design.add_argument("--seed", type=int, metavar="S")
    design.add_argument("--json", action="store_true", help="print JSON instead of CSV")

    example = "attr-batch attribute values.csv --estimator ridge --json"
    attribute = add("attribute", _attribute, "solve from utilities computed anywhere", example)
    attribute.add_argument("values", metavar="VALUES.csv", help="columns coalition, value, ...")
    attribute.add_argument("--players", type=int, metavar="N", help="needed for 0x coalitions")
    attribute.add_argument("--estimator", default="ridge", metavar="KIND")
    attribute.add_argument(
        "--semivalue",
        metavar="KIND",
        help="shapley (default); banzhaf and leave_one_out with gp and exact",
    )
    attribute.add_argument("--confidence", type=float, default=0.95, metavar="C")
    attribute.add_argument(
        "--draws",
        type=int,
        metavar="N",
        help="with --json: also the values from N resamples of the pairs (ridge, paired_ls, gp)",
    )
    attribute.add_argument("--seed", type=int, metavar="S")
    attribute.add_argument("--json", action="store_true", help="print JSON on stdout")

    doctor = add("doctor", _doctor, "show devices, native ops and versions", "attr-batch doctor")
    doctor.add_argument("--json", action="store_true", help="print JSON on stdout")
    add(
        "schema",
        _schema,
        "print the JSON Schema of the spec",
        "attr-batch schema > job.schema.json",
    )
    return parser


def _print_json(value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    print(text.encode("utf-8", "backslashreplace").decode())  # a file's name may be no Unicode


def _open(arguments: argparse.Namespace) -> Any:
    """Return the checked Job of a command line."""
    from attr_batch.job import Job
    from attr_batch.spec import load

    job = Job(load(arguments.job, arguments.overrides))
    job.check()
    return job


def _shard(text: str | None) -> tuple[int, int]:
    """Return (i, n) of `--shard i/n`, or of the variables that an Indexed Job sets."""
    place = "--shard"
    if text is None:
        index, count = os.environ.get("JOB_COMPLETION_INDEX"), os.environ.get("ATTR_BATCH_SHARDS")
        if index is None or count is None:
            return 0, 1
        text, place = f"{index}/{count}", "JOB_COMPLETION_INDEX/ATTR_BATCH_SHARDS"
    i, slash, n = text.partition("/")
    if not (slash and text.isascii() and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise SpecError(
            f"got {text!r}, wanted I/N with 0 <= I < N", place, "for example --shard 0/4"
        )
    return int(i), int(n)


def _period(arguments: argparse.Namespace) -> str | None:
    """Return the label of `--period`; `auto` is the UTC month in which the command began."""
    label = arguments.period
    if label is None:
        return None
    if arguments.provisional:
        raise SpecError("a period's report is complete", "--period", "leave out --provisional")
    if not re.fullmatch("[A-Za-z0-9._-]{1,64}", label):
        what = f"got {label[:80]!r}, wanted 1 to 64 letters, digits, dots, dashes and underscores"
        raise SpecError(what, "--period", "for example --period 2026-11, or auto")
    return time.strftime("%Y-%m", time.gmtime()) if label == "auto" else label


# -- jobs -----------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> None:
    from attr_batch.results import check_period, publish_period
    from attr_batch.runner import prepare, run

    shard, shards = _shard(arguments.shard)
    period = _period(arguments)
    job = _open(arguments)
    if arguments.prepare:
        if arguments.shard or period:
            raise SpecError("takes neither --shard nor --period", "--prepare", "leave them out")
        prepare(job)
        return
    if period is not None:
        check_period(job, period)
    attribution = run(job, shard, shards, arguments.provisional)
    if period is not None:
        publish_period(job, period, ours=attribution is not None)
    if attribution is not None:
        _show_results(job, attribution, arguments)


def _report(arguments: argparse.Namespace) -> None:
    from attr_batch.results import check_period, publish, publish_period

    period = _period(arguments)
    job = _open(arguments)
    if period is not None:
        check_period(job, period)
    attribution = publish(job, arguments.provisional)
    if period is not None:
        publish_period(job, period)
    _show_results(job, attribution, arguments)


def _periods(arguments: argparse.Namespace) -> None:
    from attr_batch.ledger import Ledger
    from attr_batch.results import PAGE, periods
    from attr_batch.spec import load

    spec = load(arguments.job, arguments.overrides)
    ledger = Ledger(spec.store)
    found = periods(ledger, spec)
    if arguments.json:
        _print_json(found)
        return
    for period in found:
        changed = "" if period["intact"] else "  (gone or replaced since)"
        print(plain(f"{period['label']}  {period['name']}  spec {period['spec'][:12]}{changed}"))
        page = f"{period['report']}/{PAGE}"
        print(f"  {ledger.store.place(page)}")
        for path, thing_id in period["set"].items():
            print(f"  --set {path}={thing_id}")


def _show_results(job: Any, attribution: dict[str, Any], arguments: argparse.Namespace) -> None:
    from attr_batch.results import summary

    if arguments.json:
        _print_json(attribution)
    else:
        print(summary(job, attribution, arguments.provisional))


def _validate(arguments: argparse.Namespace) -> None:
    from attr_batch.validate import validate
    from attr_batch.validation_report import table

    shard, shards = _shard(arguments.shard)
    job = _open(arguments)
    found = validate(job, shard, shards, arguments.provisional)
    if found is None:
        return
    if arguments.json:
        _print_json(found)
    else:
        print(table(found))
        print(f"report: {job.ledger.store.place(f'{job.report_name}/validation.html')}")


def _check(arguments: argparse.Namespace) -> None:
    job = _open(arguments)
    _ = job.dataset  # decodes every image: all that can be wrong with them is known before work
    job.check_numbers()
    facts = {
        "contributors": len(job.card.roster),
        "images": sum(c.images for c in job.card.roster.contributors),
        "shape": job.card.recipe()["shape"],
        "evaluations": len(job.plan),
        "spec_digest": job.spec_digest,
        "numerics": job.numerics,
    }
    if arguments.json:
        _print_json(facts)
    else:
        print(f"{arguments.job}: sound")
        for name, value in facts.items():
            print(f"  {name:<13}{value}")


def _plan(arguments: argparse.Namespace) -> None:
    from attr_batch.outlook import plan, plan_text

    facts = plan(_open(arguments))
    _print_json(facts) if arguments.json else print(plain(plan_text(facts)))


def _pilot(arguments: argparse.Namespace) -> None:
    from attr_batch.pilot import pilot, pilot_text

    facts = pilot(_open(arguments))
    _print_json(facts) if arguments.json else print(pilot_text(facts))


def _status(arguments: argparse.Namespace) -> None:
    from attr_batch.outlook import status, status_text

    facts = status(_open(arguments))
    _print_json(facts) if arguments.json else print(plain(status_text(facts)))


def _sync(arguments: argparse.Namespace) -> None:
    from attr_batch.results import sync

    sync(_open(arguments))


def _repair(arguments: argparse.Namespace) -> None:
    from attr_batch.ledger import Ledger
    from attr_batch.results import damaged_report
    from attr_batch.spec import load

    ledger = Ledger(load(arguments.job, arguments.overrides).store)
    found = []
    for name, reason in ledger.bad_files():
        moved = None if arguments.dry_run else ledger.quarantine(name)
        found.append({"file": name, "reason": reason, "moved_to": moved})
    with contextlib.suppress(
        AttrBatchError
    ):  # where data are away, the facts are mended all the same
        name = damaged_report(_open(arguments))
        if name is not None:
            moved = None if arguments.dry_run else ledger.quarantine(name)
            reason = "is not what the value files say"
            found.append({"file": name, "reason": reason, "moved_to": moved})
    if arguments.json:
        _print_json(found)
        return
    for item in found:
        moved = f" -> {item['moved_to']}" if item["moved_to"] else ""
        print(plain(f"{item['file']}: {item['reason']}{moved}"))
    say(
        f"{len(found)} damaged or foreign files" + (" (nothing moved)" if arguments.dry_run else "")
    )


def _gc(arguments: argparse.Namespace) -> None:
    from attr_batch.bucket import is_url
    from attr_batch.ledger import Ledger

    if not is_url(arguments.store) and not Path(arguments.store).is_dir():
        raise SpecError("no such folder", arguments.store, "wanted the `store` of a job spec")
    ledger = Ledger(arguments.store)
    if not ledger.marked:
        hint = f"a store holds {Ledger.MARKER}, which `attr-batch run` writes"
        raise SpecError("is not a store of attr-batch", arguments.store, hint)
    dropped = ledger.unneeded(arguments.forget)
    if arguments.apply:
        for name, _ in dropped:
            ledger.drop(name)
    if arguments.json:
        _print_json([{"name": name, "bytes": size} for name, size in dropped])
        return
    for name, size in dropped:
        print(plain(f"{size:>12,}  {name}"))
    total = sum(size for _, size in dropped)
    say(
        f"{len(dropped)} things, {total:,} bytes"
        + ("" if arguments.apply else "; --apply drops them")
    )


# -- without a job --------------------------------------------------------------------------------


def _estimator(kind: str, **options: Any) -> Any:
    """Return an estimator by its kind and the options that were given."""
    from pydantic import TypeAdapter, ValidationError

    from attr_batch.estimators import Estimator

    adapter = TypeAdapter(Estimator)
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return adapter.validate_python({"kind": kind, **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "union_tag_invalid":
            wanted = first.get("ctx", {}).get("expected_tags")
            raise SpecError(f"got {kind!r}, wanted one of {wanted}", "--estimator") from None
        option = f"--{first['loc'][-1]}"
        if first["type"] == "extra_forbidden":
            raise SpecError(f"{kind} takes no such option", option, "leave it out") from None
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "wanted")
        raise SpecError(f"got {first['input']}: {message}", option) from None


def _design(arguments: argparse.Namespace) -> None:
    from attr_batch.table import write_design

    given = {name: getattr(arguments, name) for name in ("seed", "budget", "semivalue")}
    estimator = _estimator(arguments.estimator, **given)
    entries = estimator.plan(arguments.players)
    if arguments.json:
        _print_json([{**vars(e), "coalition": str(e.coalition)} for e in entries])
    else:
        write_design(entries, sys.stdout)


def _attribute(arguments: argparse.Namespace) -> None:
    from attr_batch.report import table
    from attr_batch.results import attribute

    if arguments.draws is not None and not arguments.json:
        raise SpecError("draws are printed as JSON only", "--draws", "add --json")
    given = {name: getattr(arguments, name) for name in ("confidence", "seed", "semivalue")}
    estimator = _estimator(arguments.estimator, **given)
    found = attribute(arguments.values, estimator, arguments.players, arguments.draws)
    _print_json(found) if arguments.json else print(table(found))


def _doctor(arguments: argparse.Namespace) -> None:
    from attr_batch.doctor import facts

    found = facts()
    if arguments.json:
        _print_json(found)
        return
    for title, section in found.items():
        print(title)
        for name, value in section.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"  {name:<21}{text}")


def _schema(_: argparse.Namespace) -> None:
    from attr_batch.spec import schema

    _print_json(schema())


if __name__ == "__main__":
    sys.exit(main())
