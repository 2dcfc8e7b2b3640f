"""Write the tables of README and docs from benchmarks/results: `python docs/tables.py [--check]`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function here. `--check`
changes nothing and fails where a table is not what its result file says.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from attr_batch.figures import number  # noqa: E402
from attr_batch.verdict import UNKNOWN, by_family, lead_of, score_of, with_interval  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
IN_README = (
    "ridge",
    "ridge, no surrogate",
    "reference",
    "reference, own draws",
    "finetune, 100 steps, ridge",
    "lora, 100 steps, ridge",
    "gradient ascent, 20 steps, ridge",
    "influence unlearning, ridge",
    "own images, shapley",
    "alone",
    "leave_one_out",
    "d trak",
    "own similarity",
)

LIMITS = {"*another retraining (ceiling)*": "ceiling", "*best additive model*": "additivity"}


@lru_cache
def result(name: str) -> dict[str, Any]:
    """Return a result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; columns but the first are aligned right."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def short(x: float | None) -> str:
    """Return a figure of two digits, `.85`; `–` where there is none."""
    if x is None:
        return "–"
    return re.sub(r"^(-?)0\.", r"\1.", f"{x:.2f}").replace("-", "−")


def most(x: float) -> str:
    """Return seconds with two significant digits."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.1f}"


# -- estimators ------------------------------------------------------------------------------------


def _cell(kind: str, n: int, evaluations: int, nu: float) -> dict[str, Any]:
    name = f"five games: {kind} n={n} M={evaluations / n:g}n nu={nu:g}"
    return next(row for row in result("estimators")["rows"] if row["name"] == name)


def estimators() -> str:
    """The closed form, least squares and the default, in short."""
    kinds = ("reference", "paired_ls", "ridge")
    rows = []
    for n, evaluations in ((10, 50), (20, 100), (20, 400), (50, 250)):
        errors = [short(_cell(kind, n, evaluations, 0.1)["error"]) for kind in kinds]
        rows.append([str(n), str(evaluations), *errors[:2], f"**{errors[2]}**"])
    heads = ["contributors", "evaluations", "the paper's closed form", "paired least squares"]
    return table([*heads, "ridge (default)"], rows)


def estimators_long() -> str:
    """Every estimator and the best of shapiq's, by budget and noise."""
    kinds = ("reference", "paired_ls", "ridge", "gp", "permutation")
    rows = []
    for n, evaluations in ((10, 50), (20, 40), (20, 100), (20, 400), (50, 250), (258, 1032)):
        for nu in (0.1, 0.25):
            if (n, evaluations, nu) in ((20, 40, 0.25), (20, 400, 0.25)):
                continue
            found = [_cell(kind, n, evaluations, nu) for kind in kinds]
            prefix = f"n={n} M={evaluations / n:g}n nu={nu:g}"
            peers = [
                row
                for row in result("estimators")["rows"]
                if row["name"].startswith("five games: shapiq") and row["name"].endswith(prefix)
            ]
            peer = min(peers, key=lambda row: row["error"], default=None)
            best = "–" if peer is None else short(peer["error"])
            ranks = [short(found[2]["spearman"]), short(found[3]["spearman"])]
            errors = [short(row["error"]) for row in found]
            rows.append([str(n), f"{evaluations:,}", short(nu), *errors, best, *ranks])
    heads = ["n", "evaluations", "noise", *(f"`{kind}`" for kind in kinds), "best of shapiq"]
    return table([*heads, "rank, `ridge`", "rank, `gp`"], rows)


def surrogate_jobs() -> str:
    """What the free game saves on the image jobs: error at held-out coalitions."""
    rows = []
    for row in result("surrogate")["rows"]:
        if row["name"].startswith("games") or row["evaluations"] not in (12, 20, 30, 60):
            continue
        name, m = row["name"].replace("_", " ").rsplit(" M=", 1)
        same = number(row["same_rmse_without"], 0)
        if row["same_rmse_without"] is None and row["ratio"] > 1:
            same = "more than 60"
        elif row["same_rmse_without"] == 12 and row["ratio"] < 1:
            same = "fewer than 12"
        rows.append([name, m, f"{row['rmse_without']:.3g}", f"{row['rmse']:.3g}", same])
    heads = ["job, property", "coalitions", "error without", "error with"]
    return table([*heads, "coalitions that do as well without"], rows)


# -- validation ------------------------------------------------------------------------------------


def validation() -> str:
    """The main methods of the digits job at the first set, headline and second property."""
    properties = result("validation-digits")["properties"][:2]
    heads, rows = ["method", "evaluations"], []
    for prop in properties:
        heads += [f"LDS, {prop['title']}", "lead"]
    for method in by_family(properties[0]):
        if method["name"] not in IN_README:
            continue
        row = [method["name"], str(method["evaluations"])]
        for prop in properties:
            mine = next(m for m in prop["methods"] if m["name"] == method["name"])
            row += [with_interval(score_of(prop, mine)), with_interval(lead_of(prop, mine))]
        rows.append(row)
    for what, key in LIMITS.items():
        figures = [[with_interval(prop["oracle"][0][key]), ""] for prop in properties]
        rows.append([what, "", *(cell for figure in figures for cell in figure)])
    return table(heads, rows)


def _scores(prop: Any) -> str:
    """Every method of a property at every set, and its agreement with retraining's values."""
    first, *others = prop["oracle"]
    heads = ["method", "evaluations", f"LDS, {first['name']}", "lead"]
    rows = []
    for method in by_family(prop):
        score, lead = (with_interval(of(prop, method)) for of in (score_of, lead_of))
        scores = [short(method["lds"].get(other["name"], UNKNOWN)["value"]) for other in others]
        agreement = with_interval(method["agreement"])
        rows.append([method["name"], str(method["evaluations"]), score, lead, *scores, agreement])
    for what, key in LIMITS.items():
        scores = [short(other[key]["value"]) for other in others]
        rows.append([what, "", with_interval(first[key]), "", *scores, ""])
    for what, key in (("equal split (floor)", "floor"), ("chance stays below", "chance95")):
        score, *scores = (short(each[key]) for each in prop["oracle"])
        rows.append([f"*{what}*", "", score, "", *scores, ""])
    return table([*heads, *(other["name"] for other in others), "agreement"], rows)


def validation_headline() -> str:
    """The digits job's first property."""
    return _scores(result("validation-digits")["properties"][0])


def validation_second() -> str:
    """The digits job's second property."""
    return _scores(result("validation-digits")["properties"][1])


def validation_third() -> str:
    """The digits job's third property."""
    return _scores(result("validation-digits")["properties"][2])


def seconds_of(job: str) -> dict[str, dict[str, Any]]:
    """Return the side-by-side seconds of a job's counterfactuals, by label."""
    rows = result("counterfactuals")["rows"]
    return {row["counterfactual"]: row for row in rows if row["job"] == job}


def _ways(job: str, at: int) -> str:
    """v(S) itself against retraining, on the same coalitions, and CPU seconds side by side."""
    prop = result(f"validation-{job}")["properties"][at]
    rows, times = [], seconds_of(job)
    for f in prop["fidelity"]:
        label = f["counterfactual"].replace("_", " ")
        if f["steps"] is not None:
            label += f", {f['steps']:,} steps"
        if f["base"] == "pruned":
            label += ", pruned"
        timed = times.get(label) if f["ema"] in ("restarted", None) else None
        error = None if f["rmse"] is None else f"{f['rmse']:.3f}"
        bias = None if f["bias"] is None else f"{f['bias']:+.3f}".replace("-", "−")
        cells = [label, f["ema"] or "–", with_interval(f["pearson"]), error or "–", bias or "–"]
        pace = [most(timed["seconds"]), f"{timed['of_retrain']:.1f}"] if timed else ["–", "–"]
        rows.append([*cells, *pace])
    heads = ["way", "weights", "correlation with retraining", "error", "bias", "CPU seconds"]
    return table([*heads, "times faster than retraining"], rows)


def rows_fashion() -> str:
    """The fashion job's steps of about equal training seconds, and these."""
    times, rows = seconds_of("fashion"), []
    ways = ("sparsified finetune", "finetune", "lora")
    for steps in ((25, 10, 8), (50, 20, 16), (100, 40, 32)):
        labels = [f"{way}, {k} steps" for way, k in zip(ways, steps, strict=True)]
        cells = zip(steps, labels, strict=True)
        rows.append([f"{k} steps, {most(times[label]['model'])} s" for k, label in cells])
    return table(["sparsified fine-tuning", "fine-tuning", "LoRA"], rows)


def ways_digits() -> str:
    """The digits job's ways to v(S)."""
    return _ways("digits", 0)


def ways_fashion() -> str:
    """The fashion job's ways to v(S)."""
    return _ways("fashion", 0)


def ways_fashion_confidence() -> str:
    """The same for its second property."""
    return _ways("fashion", 1)


def budgets() -> str:
    """LDS by coalitions, of the digits job's headline."""
    rows = result("validation-digits")["properties"][0]["budget"]
    curves: dict[tuple[str, str], dict[int, float | None]] = {}
    for row in rows:
        key = (row["counterfactual"], row["estimator"])
        curves.setdefault(key, {})[row["evaluations"]] = row["lds"]
    columns = sorted({row["evaluations"] for row in rows})
    body = [
        [way, reader, *(short(curve.get(m)) for m in columns)]
        for (way, reader), curve in curves.items()
    ]
    return table(["v(S) by", "estimator", *map(str, columns)], body)


def removal() -> str:
    """What is left of the headline when those ranked first are left out, or alone kept."""
    prop = result("validation-digits")["properties"][0]
    kept: dict[tuple[bool, int], dict[str, float]] = {}
    for row in prop["removal"]:
        kept.setdefault((row["keeps"], row["contributors"]), {})[row["method"]] = row["value"]
    methods = list(dict.fromkeys(row["method"] for row in prop["removal"]))
    rows = [
        [f"{'only the first' if keeps else 'without the first'} {count}",
         *(number(values.get(m), 3) for m in methods)]
        for (keeps, count), values in sorted(kept.items())
    ]  # fmt: skip
    return table(["retrained", *methods], rows)


# -- in the pages ----------------------------------------------------------------------------------


def pipeline() -> str:
    """The published pipeline and ours, side by side."""
    others = ("bf16", "cohort")
    rows = [
        [
            row["name"] + (" (derived)" if row.get("derived") else ""),
            f"{row['published_seconds']:.3g}",
            f"{row['ours_seconds']:.3g}",
            f"{row['ratio']:.3g}x",
            *(f"{row[k]:.3g}" if (k := f"{side}_seconds") in row else "" for side in others),
        ]
        for row in result("pipeline")["rows"]
        if "ours_seconds" in row
    ]
    return table(["", "published, s", "ours, s", "ratio", "in bf16, s", "4 at once, s"], rows)


def memory() -> str:
    """What a coalition takes of memory at its worst, as published and ours."""
    rows = [
        [row["name"], str(row["published_mib"]), str(row["ours_mib"]), f"{row['ratio']:.2f}x"]
        for row in result("pipeline")["rows"]
        if "ours_mib" in row
    ]
    return table(["", "published, MiB", "ours, MiB", "ratio"], rows)


def levers() -> str:
    """What each lever does to the digits job's properties and values."""
    rows = []
    for row in result("levers")["rows"]:
        prop, _, lever = row["name"].partition(": ")
        if lever == "ddim 100":
            continue
        shift = f"{row['shift']:.2g} ± {row['shift_se']:.1g}".replace("-", "−")
        shares = [row["sd_of_difference"] / row["spread"], row["moved"]]
        rows.append([prop, lever, shift, *(short(x) for x in (*shares, row["rank"]))])
    heads = ["property", "lever", "shift", "sd of shift / spread", "largest move / half-width"]
    return table([*heads, "rank correlation"], rows)


def convolutions() -> str:
    """Winograd's convolutions beside oneDNN's."""
    rows = defaultdict(list)
    for row in result("ops")["rows"]:
        if row["name"].startswith("conv3x3"):
            name, _, _ = row["name"].removeprefix("conv3x3 ").rpartition(" ")
            rows[name, "yes" if row["used"] else "no"].append(f"{row['ratio_onednn']:.2f}x")
    body = [[name, *ratios, used] for (name, used), ratios in rows.items()]
    return table(["channels, batch x side", "forward", "forward and backward", "used"], body)


def norms() -> str:
    """norm_act beside eager PyTorch and inductor: each shape's ratios."""
    rows = []
    for row in result("ops")["rows"]:
        if row["name"].startswith("norm_act"):
            name = row["name"].removeprefix("norm_act ").replace("both", "forward and backward")
            rows.append([name, f"{row['ratio_eager']:.2f}x", f"{row['ratio_inductor']:.2f}x"])
    return table(["type, batch x channels x side x side", "eager", "inductor"], rows)


# -- operations ------------------------------------------------------------------------------------


def faults() -> str:
    """Each fault of tests/faults: how often it came where, how the runs ended, what was left."""
    rows = []
    for row in result("faults")["rows"]:
        met = row["hits"]
        hits = ", ".join(f"{phase} {count}" for phase, count in met.items())
        hits = hits if len(met) < 20 else f"{sum(met.values())}, of {len(met)} kinds"
        codes = ", ".join(f"{_ended(k)} × {count}" for k, count in row["exit_codes"].items())
        came = "as promised" if row["same_bytes"] is None else "same bytes"
        came = "not here" if row["not_here"] else "**missed**" if row["missed"] else came
        what = f"{row['what']} (short form)" if row["quick"] else row["what"]
        rows.append([what, hits, codes, came])
    heads = ["fault", "came while, times", "the runs ended with, times", "after it"]
    return table(heads, rows).replace("--:", "---")


def _ended(code: str) -> str:
    return signal.Signals(-int(code)).name if code.startswith("-") else code


def scale() -> str:
    """What shards ask of the store, by where it is and how large the job is."""
    rows = [
        [
            f"{row['name']}, {row['coalitions']:,} coalitions, {row['shards']:,} shards",
            f"{row['killed']}",
            f"{row['lost']} / {row['double_or_not_planned']}",
            f"{row['files']:,}",
            f"{row['asked_per_coalition']:.0f}",
            f"{1000 * row['cpu_seconds_per_coalition']:.1f}",
            most(row["wall_seconds"]),
        ]
        for row in result("scale")["rows"]
    ]
    heads = ["store", "killed", "lost / double", "files", "asked per coalition"]
    return table([*heads, "CPU ms per coalition", "seconds in all"], rows)


def large_store() -> str:
    """What a large store costs to read."""
    rows = [
        [row["name"], most(row["folder"]), most(row["bucket"])] for row in result("store")["rows"]
    ]
    return table(["", "folder, s", "bucket, s"], rows)


def mirror() -> str:
    """What the MLflow mirror costs on a real server."""
    rows = [
        [row["name"], f"{row['sent']:,}", f"{row['requests']:,}", most(row["seconds"])]
        for row in result("mirror")["rows"]
    ]
    return table(["sync", "children sent", "requests", "seconds"], rows)


def pages() -> list[Path]:
    """Return the pages that may hold tables."""
    return [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]


def filled(page: str) -> str:
    """Return a page with its tables as the result files say."""
    return BLOCK.sub(lambda m: f"{m[1]}{globals()[m[2]]()}{m[3]}", page)


def main() -> None:
    """Write the tables, or say which are old."""
    old = []
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            old.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    if old and "--check" in sys.argv:
        sys.exit(f"not what benchmarks/results says: {', '.join(old)}; python docs/tables.py")


if __name__ == "__main__":
    main()
