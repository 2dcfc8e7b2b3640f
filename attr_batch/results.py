"""From measured values to attribution, report and mirror: everything here is read from the ledger.

Nothing in this module measures or decides anything; `attribution.json` is a pure function of the
value files, in plan order, and what depends on when and where they were made goes to `cost.json`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import secrets
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attr_batch import __version__, report
from attr_batch.errors import (
    AttrBatchError,
    DataError,
    IncompleteDesign,
    LedgerConflict,
    SpecError,
    StoreError,
)
from attr_batch.evidence import Cost, Evidence, Failure, Grid, Instrument, PropertyEvidence, Utility
from attr_batch.facts import Agenda, Facts, one_thread
from attr_batch.job import Evaluation, Job, numerics_text
from attr_batch.ledger import REPAIR_HINT, Ledger
from attr_batch.log import say, warn
from attr_batch.properties import Property
from attr_batch.recipe import RECIPE_VERSION, canonical, digest
from attr_batch.shapes import Cost as CostShape
from attr_batch.shapes import fits
from attr_batch.spec import JobSpec

PAGE = "index.html"  # the last that is written of a report: when it is there, all of it is
SAME = 1e-9  # relative: results made on another processor differ in the last bits
SHOWN_COALITIONS = 4
MOST_DRAWS = 100_000
CAPTIONS = {
    "trained": "Trained on all data, unpruned",
    "pruned": "Pruned and recovered, before any coalition",
    "untrained": "Untrained network",
}
ROLES: Any = {
    "endpoint": "endpoint",
    "design": "design",
    "repeat": "design",
    "holdout": "holdout",
}


@dataclass(frozen=True)
class Session:
    """What a run took: wall seconds, and the run keys it found in the store."""

    seconds: float
    found: frozenset[str]


# -- attribution.json -----------------------------------------------------------------------------


def attributions(facts: Facts, provisional: bool = False) -> list[dict[str, Any]]:
    """Return one attribution a property, the headline first. IncompleteDesign if values lack."""
    job = facts.job
    missing = facts.missing()
    allowed = job.spec.estimator.max_failed
    if len(missing) > allowed and not provisional:
        hint = "run again: what failed is tried again; or --provisional, or estimator.max_failed"
        what = f"{len(missing)} of {facts.planned} evaluations have no value, {allowed} may lack"
        raise IncompleteDesign(what, _first_reason(job, missing), hint)
    return [_attribution(facts, prop, len(missing)) for prop in job.spec.properties]


def _first_reason(job: Job, missing: list[Evaluation]) -> str | None:
    for evaluation in missing:
        failure = job.ledger.failure(evaluation.key)
        if failure is not None:
            return f"{evaluation.title}: {failure.get('message')}"
    return None


def _attribution(facts: Facts, prop: Property, failed: int) -> dict[str, Any]:
    job, roster = facts.job, facts.job.card.roster
    body = facts.estimate(prop).to_json(
        roster.ids,
        [c.images for c in roster.contributors],
        [c.digest for c in roster.contributors],
        planned=facts.planned,
        failed=failed,
    )
    paper = {
        "v_full": facts.reference(prop, "trained"),
        "v_empty": facts.reference(prop, "untrained"),
    }
    recipe = {
        "recipe_version": RECIPE_VERSION,
        "trained": job.dense_id,
        "pruned": job.pruned_id,
        "counterfactual": job.spec.counterfactual.recipe(),
        "sampling": job.spec.sampling.recipe(),
        "property": prop.recipe(),
        "property_digest": job.property_digest(prop),
        "endpoints": job.spec.endpoints,
    }
    return {
        "property": prop.name,
        **body,
        "stopping": None if facts.stopping is None else facts.stopping.to_json(),
        "as_published": {**paper, "pruned": facts.reference(prop, "pruned")},
        "recipe": recipe,
        "spec_digest": job.spec_digest,
        "numerics": job.numerics,
        "version": __version__,
    }


def publish(job: Job, provisional: bool = False, session: Session | None = None) -> dict[str, Any]:
    """Write the report's folder and return attribution.json.

    A complete attribution is published once: made again it has the same bytes (on another
    processor, the same numbers to 1e-9), or else something was altered: LedgerConflict. `session`
    is what the run that just ended took.
    """
    facts = Facts(job)
    provisional = provisional and bool(facts.missing())
    attribution = {
        "headline": job.spec.properties[0].name,
        "attributions": attributions(facts, provisional),
    }
    folder = job.report_name + ("-provisional" if provisional else "")
    store = job.ledger.store
    text = json.dumps(attribution, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    data = text.encode() + b"\n"
    name = f"{folder}/attribution.json"
    if provisional:
        store.replace(name, data)
    elif not store.publish(name, data):
        attribution = _agree(job, name, attribution, data)
    cost = _cost(facts, store.read(f"{folder}/cost.json"), session)
    proof = evidence(facts, attribution)
    store.replace(f"{folder}/cost.json", canonical(cost))
    store.replace(f"{folder}/evidence.json", canonical(proof))
    store.replace(f"{folder}/{PAGE}", report.page(attribution, proof, cost).encode())
    return attribution


def _agree(job: Job, name: str, attribution: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Return the published attribution if ours is the same; a newer version replaces it."""
    place = job.ledger.store.place(name)
    old = job.ledger.store.read(name) or b""
    if old == data:
        return attribution
    published, gaps = _published(old, place)
    version = published["attributions"][0]["version"]
    if version != __version__ or gaps:
        why = "had gaps" if gaps else f"was made by version {version}"
        warn(f"{place} {why}: replaced")
        kept = kept_name(job.report_name, digest(old))  # a period may point to it
        job.ledger.store.publish(kept, old)
        job.ledger.store.replace(name, data)
        return attribution
    if _close(published, attribution):
        return published
    raise LedgerConflict("differs from what the value files say now", place, REPAIR_HINT)


def _published(data: bytes, place: str) -> tuple[dict[str, Any], bool]:
    """Return a published attribution, and whether it was made with values missing."""
    try:
        published = json.loads(data)
        _ = published["attributions"][0]["version"]
        failed = [a["coalitions"]["failed"] for a in published["attributions"]]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise LedgerConflict("torn or foreign file", place, REPAIR_HINT) from None
    return published, any(failed)


def damaged_report(job: Job) -> str | None:
    """Return the name of the job's report if it is not what the value files say, for `repair`."""
    name = f"{job.report_name}/attribution.json"
    published = job.ledger.store.read(name)
    try:
        if published is not None:
            publish(job)
    except LedgerConflict:
        return job.report_name
    except IncompleteDesign:
        return None
    return None


def _close(a: Any, b: Any) -> bool:
    """Return whether two JSON values are the same, numbers to SAME relative to their list."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=SAME, abs_tol=SAME)
    return a == b


# -- periods --------------------------------------------------------------------------------------


def check_period(job: Job, label: str) -> None:
    """Raise LedgerConflict, before any work, if `label` stands for the report of another spec."""
    told = job.ledger.fact(job.ledger.period_name(label))
    if told is not None and told.get("report") != job.report_name:
        raise _another_report(job, label)


def publish_period(job: Job, label: str, *, ours: bool = True) -> None:
    """Say in periods/<label>.json which report is this period's; the first that is said stays.

    The fact holds where the report lies, the sha256 of its attribution, and the ids that the next
    period may pin. LedgerConflict if the label stands for another report. `ours`: this process
    wrote the report. Else another shard may still be about to, unless it is there without gaps.
    """
    name = f"{job.report_name}/attribution.json"
    attribution = job.ledger.store.read(name)
    if attribution is None:
        return
    _, gaps = _published(attribution, job.ledger.store.place(name))
    if gaps and not ours:
        return
    fact = {
        "label": label,
        "name": job.spec.name,
        "spec": job.spec_digest,
        "report": job.report_name,
        "attribution_sha256": digest(attribution),
        "numerics": job.numerics,
        "bases": {"trained": job.dense_id, "pruned": job.pruned_id},
        "fitted": {p.name: i for p in job.spec.properties if (i := job.instrument_id(p))},
    }
    told = job.ledger.publish_fact(job.ledger.period_name(label), fact)
    if any(told.get(key) != fact[key] for key in ("label", "report")):
        raise _another_report(job, label)
    first = period_attribution(job.ledger, told)
    if first is None or not _same_numbers(first, attribution):
        raise _another_report(job, label)


def kept_name(report: str, sha256: str) -> str:
    """Return the name under which a report's replaced attribution is kept."""
    return f"{report}/attribution-{sha256[:12]}.json"


def period_attribution(ledger: Ledger, period: dict[str, Any]) -> bytes | None:
    """Return the bytes that a period points to, None if they are gone."""
    report, sha256 = period["report"], period["attribution_sha256"]
    for name in (f"{report}/attribution.json", kept_name(report, sha256)):
        data = ledger.store.read(name)
        if data is not None and digest(data) == sha256:
            return data
    return None


def _same_numbers(first: bytes, second: bytes) -> bool:
    """Return whether two attributions say the same, whatever version wrote them."""
    both = [json.loads(data) for data in (first, second)]
    for attribution in both:
        for one in attribution["attributions"]:
            one.pop("version", None)
    return _close(*both)


def _another_report(job: Job, label: str) -> LedgerConflict:
    place = job.ledger.store.place(job.ledger.period_name(label))
    hint = f"a period's report stays: take another label, for example --period {label[:60]}-2"
    return LedgerConflict(f"period {label} has another report already", place, hint)


def periods(ledger: Ledger, spec: JobSpec) -> list[dict[str, Any]]:
    """Return every period of a store: its fact, whether its report is still that one, its pins.

    `set` are the pins for this spec's next run as {path: id}.
    """
    found: list[dict[str, Any]] = []
    for period in ledger.periods().values():
        pins = {"model.base": period["bases"]["trained"]}
        for i, prop in enumerate(spec.properties):
            if prop.name in period["fitted"]:
                pins[f"properties.{i}.fitted"] = period["fitted"][prop.name]
        intact = period_attribution(ledger, period) is not None
        found.append({**period, "intact": intact, "set": pins})
    return found


# -- evidence and cost ----------------------------------------------------------------------------


def evidence(facts: Facts, attribution: dict[str, Any]) -> Evidence:
    """Return what a reader needs to judge the values."""
    job = facts.job
    spec = job.spec
    steps = getattr(spec.counterfactual, "steps", None)
    return {
        "job": spec.name,
        "provisional": len(facts.missing()) > spec.estimator.max_failed,
        "counterfactual": spec.counterfactual.kind + (f", {steps} steps" if steps else ""),
        "base": job.dense_id,
        "properties": {
            prop.name: _property_evidence(facts, prop, found)
            for prop, found in zip(spec.properties, attribution["attributions"], strict=True)
        },
        "grids": list(_grids(facts)),
        "pruning": _pruning(job),
        "instruments": list(_instruments(job)),
        "failures": _failures(facts),
        "warnings": list(_warnings(facts)),
        "provenance": _provenance(facts),
    }


def _property_evidence(facts: Facts, prop: Property, found: dict[str, Any]) -> PropertyEvidence:
    return {
        "title": prop.title,
        "higher_means": prop.higher_means,
        "utilities": list(_utilities(facts, prop, found)),
        "paper": {
            "v_full": found["as_published"]["v_full"],
            "v_empty": found["as_published"]["v_empty"],
        },
    }


def _utilities(facts: Facts, prop: Property, found: dict[str, Any]) -> Iterator[Utility]:
    roster = facts.job.card.roster
    predicted = (found["holdout"] or {}).get("predicted", {})
    for planned, run in facts.rows:
        fact = facts.values.get((run.key, prop.name))
        entry = run.entry
        if planned.subject != "derived" or fact is None:
            continue
        yield {
            "coalition": str(entry.coalition),
            "members": [c.id for c in roster.members(entry.coalition)],
            "size": entry.coalition.size,
            "role": ROLES[entry.sequence],
            "pair": entry.pair,
            "replicate": entry.replicate,
            "value": fact["value"],
            "stderr": fact["stderr"],
            "predicted": predicted.get(str(entry.coalition)),
        }


def _grids(facts: Facts) -> Iterator[Grid]:
    """Yield sheets of samples: references, the empty coalition, a few from small to large."""
    shown = [row for row in facts.rows if row[0].subject != "derived"]
    shown += [
        r for r in facts.rows if r[0].entry.sequence == "endpoint" and not r[0].entry.replicate
    ]
    design = [row for row in facts.rows if row[0].entry.role == "design"]
    design.sort(key=lambda row: row[0].entry.coalition.size)
    picks = min(SHOWN_COALITIONS, len(design))
    shown += [design[(2 * k + 1) * len(design) // (2 * picks)] for k in range(picks)]
    roster = facts.job.card.roster
    for planned, run in shown:
        data = facts.job.ledger.store.read(facts.job.ledger.grid_name(run.key))
        if data is not None:
            derived = planned.subject == "derived"
            members = [c.id for c in roster.members(run.entry.coalition)]
            yield {
                "caption": _caption(planned),
                "members": members if derived else None,
                "png_base64": base64.b64encode(data).decode(),
            }


def _caption(evaluation: Evaluation) -> str:
    if evaluation.subject != "derived":
        return CAPTIONS[evaluation.subject]
    size, n = evaluation.entry.coalition.size, evaluation.entry.coalition.n
    if size == 0:
        return "Empty coalition"
    return f"Coalition of {size}" if size < n else "All contributors, by the same procedure"


def _pruning(job: Job) -> Any:
    if job.spec.counterfactual.start != "pruned":
        return None
    card = job.ledger.card("bases", job.pruned_id)
    return {
        "ratio": getattr(job.spec.pruning, "ratio", 0.0),
        "macs_before": card["macs"][0],
        "macs_after": card["macs"][1],
        "parameters_before": card["parameters"][0],
        "parameters_after": card["parameters"][1],
    }


def _instruments(job: Job) -> Iterator[Instrument]:
    for thing_id, instrument in job.instruments.items():
        card = job.ledger.card("properties", thing_id)
        yield {"kind": type(instrument).__name__, "card": card}


def _failures(facts: Facts) -> list[Failure]:
    return [
        {
            "coalition": str(e.entry.coalition),
            "members": [c.id for c in facts.job.card.roster.members(e.entry.coalition)],
            "replicate": e.entry.replicate,
            "what": (facts.job.ledger.failure(e.key) or {}).get("message", "no value yet"),
        }
        for e in facts.missing()
    ]


def _warnings(facts: Facts) -> Iterator[str]:
    for field, what in (("processor", "processors"), ("torch", "versions of torch")):
        found = sorted({str(d["provenance"][field]) for d in facts.derivations.values()})
        if len(found) > 1:
            yield f"The values were made on several {what}: {', '.join(found)}."
    for prop in facts.job.spec.properties:
        if unseen := facts.job.unseen_labels(prop):
            labels = ", ".join(unseen)
            yield f"The classifier of {prop.name} was fitted before these labels came: {labels}."
    replaced = [planned.title for planned, run in facts.rows if planned.key != run.key]
    if replaced:
        yield f"Diverged and was done with another training seed: {', '.join(replaced)}."


def _provenance(facts: Facts) -> dict[str, str]:
    job = facts.job
    made = next(iter(facts.derivations.values()), {}).get("provenance", {})
    return {
        "spec digest": job.spec_digest,
        "recipe version": str(RECIPE_VERSION),
        "numerics class": numerics_text(job.numerics),
        "trained model": job.dense_id,
        "pruned model": job.pruned_id,
        "attr-batch": __version__,
        "torch": str(made.get("torch", "")),
        "processor": str(made.get("processor", "")),
        "data": digest(job.card.recipe()),
    }


def _cost(facts: Facts, before: bytes | None, session: Session | None = None) -> Cost:
    """Return what all the work cost, and of the last run that did some, its wall seconds."""
    try:
        old = json.loads(before or b"null")
    except (ValueError, RecursionError):
        old = None
    if old is None or not fits(CostShape, old):  # made again, but for the wall seconds
        old = {"wall_seconds": None, "reused": len(facts.rows)}
    wall_seconds, reused = old["wall_seconds"], old["reused"]
    if session is not None:
        wall_seconds = session.seconds
        reused = sum(planned.key in session.found for planned, _ in facts.rows)
    spent = facts.seconds_spent()
    return {
        "seconds": {phase: round(seconds, 3) for phase, seconds in spent.items()},
        "evaluated": len(facts.rows) - reused,
        "reused": reused,
        "median_seconds_per_coalition": facts.seconds_per_evaluation,
        "wall_seconds": wall_seconds,
        "machines": sorted({d["provenance"]["processor"] for d in facts.derivations.values()}),
    }


def summary(job: Job, attribution: dict[str, Any], provisional: bool) -> str:
    """Return what the terminal shows at the end: the table, the seconds, where to look."""
    name = job.report_name
    if provisional and not job.ledger.store.exists(f"{name}/attribution.json"):
        name += "-provisional"
    cost = json.loads(job.ledger.store.read(f"{name}/cost.json") or b"{}")
    phases = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in cost["seconds"].items())
    headline, *others = attribution["attributions"]
    lines = [
        report.table(headline),
        *(
            textwrap.fill(
                f"also            {other['property']}: {_in_brief(other)}",
                report.WIDTH,
                subsequent_indent=" " * 16,
            )
            for other in others
        ),
        f"worker seconds  {phases}",
        f"report          {job.ledger.store.place(f'{name}/{PAGE}')}",
    ]
    if job.spec.tracking.enabled and (uri := _tracking_uri(job)):
        from attr_batch.tracking import where_to_look

        where = where_to_look(uri)
        if where.startswith("mlflow ") and not shutil.which("mlflow"):
            where = f"{Path(sys.executable).parent}/{where}"  # the environment is not active
        lines.append(f"MLflow          {where}")
    return "\n".join(lines)


def _in_brief(attribution: dict[str, Any]) -> str:
    """Say in one line who comes first in a property, and how well its values predict."""
    ranked = sorted(attribution["contributors"], key=lambda c: -c["value"])
    first = ", ".join(
        f"{report.visible(c['id'])[:20]} {c['value']:.3g}"
        + ("" if c["share"] is None else f" ({100 * c['share']:.0f} %)")
        for c in ranked[:3]
    )
    check = attribution["holdout"] or {}
    held = "".join(
        f", {what} {check[key]:.2f}"
        for what, key in (("held-out Spearman", "spearman"), ("beyond size", "beyond_size"))
        if check.get(key) is not None
    )
    return f"first {first}{held}"


# -- values computed elsewhere --------------------------------------------------------------------


def attribute(
    path: str | Path, estimator: Any, players: int | None, draws: int | None = None
) -> dict[str, Any]:
    """Return the attribution of utilities in a CSV file.

    `draws` is that many lists of values, in the order of the contributors, each from resampled
    pairs; None where none were asked for. SpecError below one draw, for an estimator that does not
    read pairs, and where every coalition was measured, since then nothing was sampled.
    """
    from attr_batch.estimators.bootstrap import bootstrap
    from attr_batch.estimators.observations import gather
    from attr_batch.table import read_values

    if draws is not None:
        _check_draws(draws, estimator)
    observations, n = read_values(path, players)
    if draws is not None and gather(observations, n).rows.complete:
        what = "every coalition was measured: there is no sample to draw again"
        raise SpecError(what, "--draws", "`noise` and the interval say what repeats vary")
    with one_thread():
        try:
            found, drawn = estimator.estimate(observations, n), None
        except (DataError, IncompleteDesign) as error:  # too few rows for this estimator
            hint = "add lines for these coalitions, or take another --estimator"
            raise DataError(error.problems[0].what, str(path), hint) from None
        if draws is not None:
            drawn = bootstrap(observations, n, draws, estimator.seed, estimator.estimate).tolist()
    body = found.to_json([str(i) for i in range(n)], [None] * n, [None] * n)
    of_a_job = {"recipe": None, "spec_digest": None, "numerics": None}
    return {
        "property": Path(path).stem,
        **body,
        "draws": drawn,
        **of_a_job,
        "version": __version__,
    }


def _check_draws(draws: int, estimator: Any) -> None:
    from attr_batch.estimators import GaussianProcess, PairedLS, Ridge

    if not 1 <= draws <= MOST_DRAWS:
        what = f"got {draws}, wanted 1 to {MOST_DRAWS:,}"
        raise SpecError(what, "--draws", "for example --draws 200")
    if not isinstance(estimator, Ridge | PairedLS | GaussianProcess):
        what = f"{estimator.kind} does not read complement pairs, which are what is resampled"
        raise SpecError(what, "--draws", "--estimator ridge, paired_ls or gp")


# -- the MLflow mirror ----------------------------------------------------------------------------


MIRROR_SECONDS = 15.0  # between two looks at the ledger while work goes on
LEAVE_SECONDS = 30.0  # for the requests that are on their way when the work ends


class Mirror:
    """Keeps MLflow up with the ledger; whatever goes wrong there never stops the work.

    While work goes on it is written by a thread of its own: a server that is slow, or hangs, delays
    neither the workers nor what a signal asks of them.
    """

    def __init__(self, job: Job) -> None:
        from attr_batch import tracking

        self.job = job
        self._facts: Facts | None = None
        given = job.spec.tracking
        keyed = given.enabled and given.contributors == "pseudonyms" and given.key_env is None
        if job.ledger.local_root is None and keyed and _tracking_uri(job):
            # One key for all pods: the first one published stays.
            job.ledger.store.publish("work/pseudonym.key", secrets.token_bytes(32))
        work = job.ledger.work("pseudonym.key").parent
        self._mirror = tracking.mirror(job.spec.tracking, job.identity, work, _tracking_uri(job))
        self._thread: threading.Thread | None = None
        self._last = -math.inf

    def follow(self) -> None:
        """Begin to bring the mirror up to date, if that was some time ago."""
        busy = self._thread is not None and self._thread.is_alive()
        if self._mirror is None or busy or time.monotonic() - self._last <= MIRROR_SECONDS:
            return
        self._last = time.monotonic()
        with contextlib.suppress(AttrBatchError):  # a damaged ledger is reported by the workers
            shown = self._snapshot(None)
            self._thread = threading.Thread(target=self._mirror.follow, args=[shown], daemon=True)
            self._thread.start()

    def sync(self, attribution: dict[str, Any] | None) -> bool:
        """Bring the mirror up to date, with the parent run RUNNING; False if it was not."""
        if self._mirror is None or not self._alone():
            return False
        return self._mirror.sync(self._snapshot(attribution))

    def end(
        self, status: Any, attribution: dict[str, Any] | None = None, *, brief: bool = False
    ) -> bool:
        """Bring the mirror up to date and give the parent run its final status; False if not.

        `brief`: the status alone, for a process that was told to go and has little time.
        """
        if self._mirror is None or not self._alone():
            return False
        last = None
        if not brief:
            with contextlib.suppress(AttrBatchError):  # a damaged ledger is reported by the caller
                last = self._snapshot(attribution)
        return self._mirror.end(status, last)

    def _alone(self) -> bool:
        """Let the thread end after the requests it has sent; False if these hang."""
        if self._mirror is not None and self._thread is not None:
            self._mirror.leaving.set()
            self._thread.join(LEAVE_SECONDS)
            if self._thread.is_alive():
                warn("MLflow hangs and is left as it is", "`attr-batch sync` catches up")
                return False
            self._mirror.leaving.clear()
        return True

    def _snapshot(self, attribution: dict[str, Any] | None) -> Any:
        if self._facts is None:
            self._facts = Facts(self.job)
        else:
            self._facts.refresh()
        return snapshot(self._facts, attribution)


def sync(job: Job) -> None:
    """Make or complete the mirror from the ledger alone.

    Raises:
        SpecError: there is nowhere to write it.
        DataError: the store's results are of another numerics class.
        StoreError: MLflow is away.
    """
    if not job.spec.tracking.enabled:
        say("tracking.enabled is false: nothing to do")
        return
    if _tracking_uri(job) is None:
        hint = "set it, or MLFLOW_TRACKING_URI: a bucket holds no SQLite mirror"
        raise SpecError("names no MLflow server", "tracking.uri", hint)
    _check_numerics(job)
    name = f"{job.report_name}/attribution.json"
    published = job.ledger.store.read(name)
    if published is not None and damaged_report(job):
        raise LedgerConflict(
            "is not what the value files say", job.ledger.store.place(name), REPAIR_HINT
        )
    attribution = None if published is None else json.loads(published)
    mirror = Mirror(job)
    names = {thing_id for _, thing_id in job.things} | {e.key for e in Agenda(job).work}
    if any(job.ledger.heartbeat(name) for name in names.intersection(job.ledger.heartbeats())):
        say("the job is at work: its run stays RUNNING")
        reached = mirror.sync(attribution)
    else:
        whole = attribution is not None and not Facts(job).missing()
        reached = mirror.end("FINISHED" if whole else "KILLED", attribution)
    if not reached:
        raise StoreError("MLflow was not reached", "tracking.uri", "see the warning; sync again")


def _check_numerics(job: Job) -> None:
    """Refuse to show a job as empty whose results another kind of machine has made."""
    others = job.other_numerics()
    if not others:
        return
    facts = Facts(job)
    design = {run.key for _, run in facts.rows if run.entry.role == "design"}
    if not any(key in design for key, _ in facts.values):
        theirs, ours = numerics_text(others[0]), numerics_text(job.numerics)
        what = f"its results are of the numerics class {theirs}; here it is {ours}"
        hint = "set resources.cohort as there, or run it where device and ops are those"
        raise DataError(what, job.ledger.store.location, hint)


def snapshot(facts: Facts, attribution: dict[str, Any] | None = None) -> Any:
    """Return what is to be seen of the job in MLflow now."""
    from attr_batch.tracking import Child, Snapshot

    job = facts.job
    children = {}
    for planned, run in facts.rows:
        metrics = {
            prop.name: (fact["value"], fact["stderr"])
            for prop in job.spec.properties
            if (fact := facts.values.get((run.key, prop.name))) is not None
        }
        if len(metrics) == len(job.spec.properties):
            derivation = facts.derivations.get(run.key)
            children[run.key] = Child(
                key=run.key,
                coalition=str(run.entry.coalition),
                role=planned.entry.role if planned.subject == "derived" else planned.subject,
                pair=run.entry.pair,
                replicate=run.entry.replicate,
                metrics=metrics,
                seconds=None if derivation is None else sum(derivation["seconds"].values()),
            )
    cost = job.ledger.store.read(f"{job.report_name}/cost.json")
    validation = job.ledger.store.read(f"{job.report_name}/validation.json")
    return Snapshot(
        spec={"name": job.spec.name, **job.content},
        spec_digest=job.spec_digest,
        numerics=job.numerics,
        version=__version__,
        roster=job.card.roster.ids,
        digests={job.spec.data.kind: digest(job.card.recipe())},
        children=list(children.values()),
        progress={
            "done": len(children),
            "planned": len(facts.rows),
            "failed": len(job.ledger.failed().intersection(e.key for e in facts.missing())),
        },
        attribution=attribution,
        evidence=None if attribution is None else evidence(facts, attribution),
        cost=None if attribution is None else _cost(facts, cost),
        validation=None if validation is None else json.loads(validation),
    )


def _tracking_uri(job: Job) -> str | None:
    """Return where MLflow is: the spec's URI, the environment's, a file in the store; or None."""
    given = job.spec.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    root = job.ledger.local_root
    return given or (None if root is None else f"sqlite:///{(root / 'mlflow.db').absolute()}")
