"""The pictures of a validation, as SVG: scores, values, fidelity, budgets, removals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from attr_batch.document import upper
from attr_batch.evidence import OracleSet, PropertyValidation, Validation
from attr_batch.figures import Guide, Point, Row, Series, dots_svg, line_svg, reference_svg
from attr_batch.verdict import FAMILIES, by_family, first_set, headline, score_of

_SHORT = {  # as published, for the names of lines
    "sparsified finetune": ("sFT", "sparsified fine-tuning"),
    "finetune": ("FT", "fine-tuning of the unpruned model"),
    "lora": ("LoRA", "fine-tuning of low-rank adapters"),
    "gradient ascent": ("GA", "gradient ascent on the data left out"),
    "influence unlearning": ("IU", "influence unlearning"),
    "retrain": ("retrain", "training from scratch"),
}


def figures(validation: Validation) -> dict[str, str]:
    """Return all charts as SVG, by "<property>-<chart>"; charts without a point are left out."""
    return {
        f"{prop['name']}-{name}": svg
        for prop in validation["properties"]
        for name, svg in charts(prop, validation["contributors"]).items()
    }


def charts(prop: PropertyValidation, contributors: Sequence[str]) -> dict[str, str]:
    """Return one property's charts, by name."""
    first, title = first_set(prop), upper(prop["title"])
    guides = {} if first is None else {guide.name: guide for guide in _guides(first)}
    again = prop["fidelity_ceiling"]["value"]
    ceiling = [] if again is None else [Guide("ceiling", again)]
    limits = [guides[name] for name in ("ceiling", "chance") if name in guides]
    drawn = {}
    groups = _dots(prop)
    if first is not None and any(rows for _, rows in groups):
        said = f"{title}: LDS of each method at {first['name']}"
        drawn["lds"] = dots_svg(groups, said, "LDS", list(guides.values()))
    rows = value_rows(prop, contributors)
    if rows:
        said = f"{title}: values beside those of retraining"
        drawn["values"] = reference_svg(rows, said, "retrained")
    lines = [
        ("fidelity-steps", "fidelity of v(S) by training steps", _fidelity(prop, "steps"),
         "steps", "correlation", ceiling, True),
        ("fidelity-seconds", "fidelity of v(S) by seconds", _fidelity(prop, "seconds"),
         "worker seconds of one coalition", "correlation", ceiling, True),
        ("budget-evaluations", "LDS by coalitions", _budget(prop, "evaluations"),
         "coalitions evaluated", "LDS", limits, False),
        ("budget-seconds", "LDS by seconds", _budget(prop, "seconds"),
         "worker seconds", "LDS", limits, True),
        ("removal", "retrained without the first", _removal(prop, keeps=False),
         "top contributors removed, %", "change, %", [], False),
        ("keep", "retrained on the first alone", _removal(prop, keeps=True),
         "top contributors kept, %", "change, %", [], False),
    ]  # fmt: skip
    for name, what, series, x_label, y_label, beside, log_x in lines:
        if series:
            said = f"{title}: {what}"
            drawn[name] = line_svg(series, said, x_label, y_label, beside, log_x=log_x)
    return drawn


def value_rows(prop: PropertyValidation, contributors: Sequence[str]) -> list[dict[str, Any]]:
    """Return id, headline value, and `ls_value`, `low`, `high` of retraining for everyone."""
    head = headline(prop)
    if head is None or not head["values"]:
        return []
    retrained = [[None] * len(contributors)] * 3
    if prop["reference"] is not None:
        given = (prop["reference"], prop["reference_low"], prop["reference_high"])
        retrained = [column or empty for column, empty in zip(given, retrained, strict=True)]
    columns = (contributors, head["values"], *retrained)
    keys = ("id", "value", "ls_value", "low", "high")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def short(name: str) -> str:
    """Return "sFT 100 ridge" for "sparsified finetune, 100 steps, ridge"; other names as they are.

    A name that begins with a counterfactual is that of the counterfactual or of a method that
    uses it.
    """
    kind, *rest = name.split(", ")
    if kind.replace("_", " ") not in _SHORT:
        return name
    brief, _ = _SHORT[kind.replace("_", " ")]
    return " ".join([brief, *(text.removesuffix(" steps") for text in rest)])


def abbreviations(counterfactuals: Iterable[str]) -> list[str]:
    """Return "sFT: sparsified fine-tuning" and the like for the kinds among counterfactuals."""
    kinds = {text.split(", ")[0].replace("_", " ") for text in counterfactuals}
    return [f"{brief}: {meaning}" for kind, (brief, meaning) in _SHORT.items() if kind in kinds]


def _dots(prop: PropertyValidation) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {family: [] for family in FAMILIES}
    for m in by_family(prop):
        score = score_of(prop, m)
        if score["value"] is not None:
            figures = score["value"], score["low"], score["high"]
            groups[m["family"]].append(Row(short(m["name"]), *figures, m is headline(prop)))
    return [(f"{family}s", rows) for family, rows in groups.items()]


def _guides(oracle: OracleSet) -> list[Guide]:
    limits = {
        "ceiling": oracle["ceiling"]["value"],
        "additive": oracle["additivity"]["value"],
        "floor": oracle["floor"],
        "chance": oracle["chance95"],
    }
    return [Guide(name, at) for name, at in limits.items() if at is not None]


def _fidelity(prop: PropertyValidation, x: Literal["steps", "seconds"]) -> list[Series]:
    points = []
    for f in prop["fidelity"]:
        across, pearson = f[x], f["pearson"]
        if across and pearson["value"] is not None:
            name = " ".join(filter(None, (short(f["counterfactual"]), f["ema"], f["base"])))
            points.append((name, Point(across, pearson["value"], pearson["low"], pearson["high"])))
    return _series(points)


def _budget(prop: PropertyValidation, x: Literal["evaluations", "seconds"]) -> list[Series]:
    return _series(
        (f"{short(b['counterfactual'])}, {b['estimator']}", Point(b[x], b["lds"]))
        for b in prop["budget"]
        if b["lds"] is not None and b[x] > 0
    )


def _removal(prop: PropertyValidation, keeps: bool) -> list[Series]:
    return _series(
        (short(r["method"]), Point(100 * r["share"], 100 * r["change"]))
        for r in prop["removal"]
        if r["keeps"] == keeps
    )


def _series(points: Iterable[tuple[str, Point]]) -> list[Series]:
    """Gather points by the name of their line, in the order the names come first."""
    lines: dict[str, list[Point]] = {}
    for name, point in points:
        lines.setdefault(name, []).append(point)
    return [Series(name, sorted(line, key=lambda p: p.x)) for name, line in lines.items()]
