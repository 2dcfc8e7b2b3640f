"""Is the attribution right? What `attr-batch validate` shows: a page, pictures and tables.

Pure functions from `validation.json` (`evidence.Validation`) to text, in the look and by the rules
of `report`. The order is a sceptic's: does it predict what retrained models score, and what else
does; do the values agree with those of retraining; how close is one fine-tuned model to its
retrained twin; what would less money have bought; what happens when the contributors that were
ranked first are really taken away; what did all this cost, and what does it not show.

No figure is computed here: every one stands in `validation.json`.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from attr_batch.document import (
    bullets,
    document,
    duration,
    facts_table,
    plate,
    safe,
    upper,
)
from attr_batch.evidence import (
    Estimate,
    Method,
    OracleSet,
    PropertyValidation,
    Removal,
    Validation,
)
from attr_batch.figures import (
    MOST_ROWS,
    Guide,
    Point,
    Row,
    Series,
    cells,
    decimals,
    dots_svg,
    fit,
    line_svg,
    number,
    reference_svg,
    visible,
)

WIDTH = 80  # of the terminal's table

_FAMILIES = {
    "estimator": "Estimators, from the same coalitions",
    "counterfactual": "Other ways to the model of a coalition",
    "baseline": "Baselines",
}
# The paper's abbreviations, for the names of lines.
_SHORT = {
    "sparsified_finetune": "sFT",
    "finetune": "FT",
    "lora": "LoRA",
    "gradient_ascent": "GA",
    "influence_unlearning": "IU",
}
_MEANINGS = {
    "sFT": "sparsified fine-tuning",
    "FT": "fine-tuning of the unpruned model",
    "LoRA": "fine-tuning of low-rank adapters",
    "GA": "gradient ascent on the data left out",
    "IU": "influence unlearning",
}
_UNKNOWN = Estimate(value=None, low=None, high=None)
_LIMITATIONS = (
    "Retrained and fine-tuned models are measured with the same instrument, fitted to the images "
    "of all contributors. What it cannot see, or sees wrongly, is invisible here too.",
    "Where all coalitions have one size, the LDS does not change when a constant is added to "
    "every value: it judges the differences between contributors, not the sum. Mixed sizes judge "
    "that too.",
    "A retraining is one run of a random procedure. The ceiling says how well one predicts "
    "another; a method can lie above it, since its values are averages over many models and a "
    "single retraining is not.",
    "The property was chosen. One that depends on combinations of contributors cannot be "
    "predicted by any sum of values; the additivity ceiling says how far a sum can go.",
    "Of many methods compared on the same retrainings the best owes something to luck. Read the "
    "interval of the lead, not the order.",
    "The intervals are from a bootstrap over retrained coalitions, their seeds and the design "
    "seeds that were run. With few seeds they are too narrow rather than too wide.",
    "All models draw their samples from the same starting noise, and all of this is one data set "
    "and one architecture. It says nothing about others.",
)


# -- what is said ---------------------------------------------------------------------------------


def verdict(prop: PropertyValidation) -> str:
    """Return what the retrainings say about the headline method, in a few plain sentences."""
    first, head = _first(prop), _head(prop)
    if first is None or head is None:
        return "nothing was retrained or no method was judged, so there is no verdict"
    score = _score(prop, head)
    value = score["value"]
    if value is None:
        return f"too few retrainings to judge {head['name']}"
    sure = score["low"] is not None and score["low"] > first["chance95"]
    verb = (
        "predicts" if sure else "may predict" if value > first["chance95"] else "does not predict"
    )
    return ". ".join(
        [
            f"{head['name']} {verb} what retrained models score: LDS "
            f"{_with_interval(score)} at {first['name']}{_against(first)}",
            *_rivalry(prop),
        ]
    )


def _against(oracle: OracleSet) -> str:
    limits = [
        (oracle["ceiling"]["value"], "one retraining predicts another with"),
        (oracle["additivity"]["value"], "the best additive model reaches"),
        (oracle["floor"], "an equal split"),
        (oracle["chance95"], "unrelated numbers stay below"),
    ]
    known = [f"{what} {number(x, 2)}" for x, what in limits if x is not None]
    return f"; {', '.join(known)}"


def _rivalry(prop: PropertyValidation) -> Iterator[str]:
    """Yield what the headline method does not beat, and that it beats the rest where it does."""
    better, level = _rivals(prop)
    baselines = [m for m in prop["methods"] if m["family"] == "baseline"]
    for found, what in ((better, "Better than it"), (level, "As good, as far as one can tell")):
        if found:
            yield f"{what}: {'; '.join(map(_called, found))}"
    judged = [m for m in baselines if _lead(prop, m)["low"] is not None]
    if judged and not any(m["family"] == "baseline" for m in better + level):
        yield "It beats every baseline" + ("" if judged == baselines else " that could be judged")


def _called(method: Method) -> str:
    return f"{method['name']} (baseline)" if method["family"] == "baseline" else method["name"]


def _rivals(prop: PropertyValidation) -> tuple[list[Method], list[Method]]:
    """Return the methods ahead of the headline method, and those not told apart from it."""
    better, level = [], []
    for method in prop["methods"][1:]:
        lead = _lead(prop, method)
        if lead["high"] is not None and lead["high"] < 0:
            better.append(method)
        elif lead["low"] is not None and lead["low"] <= 0:
            level.append(method)
    return better, level


def marks(prop: PropertyValidation) -> list[tuple[str, str]]:
    """Return what a reader must know before believing the verdict, as (what, explanation)."""
    first, head, found = _first(prop), _head(prop), []
    if first is None or head is None:
        return found
    chance, additivity = first["chance95"], first["additivity"]["value"]
    score = _score(prop, head)
    if score["value"] is not None and score["value"] <= chance:
        found.append(
            ("No better than chance", f"unrelated numbers would score up to {number(chance, 2)}")
        )
    elif score["low"] is not None and score["low"] <= chance:
        found.append(("Not safely above chance", "the interval reaches down to what luck can do"))
    if additivity is not None and additivity <= chance:
        found.append(
            (
                "No attribution can be judged here",
                "even an additive model fitted to the retrainings themselves predicts them no "
                "better than chance. Contributors interact, or the retrainings are noise",
            )
        )
    better, level = _rivals(prop)
    simple = [m["name"] for m in better + level if m["family"] == "baseline"]
    if simple:
        found.append(("Baselines do as well", f"{'; '.join(simple)}, as far as one can tell"))
    collapsed = [
        f"{m['name']} in {m['collapsed']} of {m['designs']} designs"
        for m in prop["methods"]
        if m["collapsed"]
    ]
    if collapsed:
        found.append(
            (
                "Collapsed to equal split",
                f"{'; '.join(collapsed)}. There it gives everyone the same, which is no finding",
            )
        )
    if head["designs"] == 1:
        found.append(
            ("One design", "the intervals do not hold what another draw of coalitions would give")
        )
    if first["ceiling"]["value"] is None:
        found.append(
            ("No ceiling", "without a second seed nothing tells how well one can predict at all")
        )
    if first["subsets"] < first["planned"]:
        found.append(
            ("Not all retrained", f"{first['subsets']} of {first['planned']} at {first['name']}")
        )
    return found


# -- the page -------------------------------------------------------------------------------------


def page(validation: Validation) -> str:
    """Return the validation report as one self-contained HTML page, same bytes for same input."""
    properties = validation["properties"]
    verdicts = "".join(
        f"<li><b>{safe(upper(p['title']))}:</b> {safe(verdict(p))}.</li>" for p in properties
    )
    header = (
        f'<p class="over">Validation report</p><h1>{safe(validation["job"])}</h1>'
        f'<ul class="verdicts">{verdicts}</ul>{_marks(properties[0]) if properties else ""}'
    )
    done = f"{validation['done']:,} of {validation['planned']:,} evaluations are done"
    sections = _property(properties[0], validation["contributors"]) if properties else []
    others = "".join(_folded(p, validation["contributors"]) for p in properties[1:])
    return document(
        f"{'' if validation['complete'] else 'INCOMPLETE: '}{validation['job']}: is it right?",
        header,
        [
            *sections,
            ("others", "Other properties", others),
            ("cost", "What it took", _cost(validation)),
            ("provenance", "Provenance", _provenance(validation)),
            ("limits", "What this does not say", bullets(_LIMITATIONS)),
        ],
        f"attr-batch {validation['version']}, spec {validation['spec_digest'][:12]}",
        banner="" if validation["complete"] else f"Incomplete: {done}. These figures will change.",
        styles=("report.css", "validation_report.css"),
    )


def _marks(prop: PropertyValidation) -> str:
    found = [f"<li><b>{safe(what)}:</b> {safe(why)}.</li>" for what, why in marks(prop)]
    return f'<ul class="marks" aria-label="Reservations">{"".join(found)}</ul>' if found else ""


def _property(prop: PropertyValidation, contributors: list[str]) -> list[tuple[str, str, str]]:
    """Return one property's sections as (key, heading, body)."""
    charts = _charts(prop, contributors)
    return [
        ("comparison", "Does it predict, and what else does?", _comparison(prop, charts)),
        ("values", "Beside the values of retraining", _values(prop, contributors, charts)),
        ("fidelity", "How close is one model to its twin?", _fidelity(prop, charts)),
        ("budget", "What less would have bought", _budget(prop, charts)),
        ("removal", "Taking the first away", _removal(prop, charts)),
    ]


def _folded(prop: PropertyValidation, contributors: list[str]) -> str:
    bodies = "".join(
        f"<h3>{heading}</h3>{body}" for _, heading, body in _property(prop, contributors) if body
    )
    score = _with_interval(_score(prop, prop["methods"][0]) if prop["methods"] else _UNKNOWN)
    return (
        f"<details><summary>{safe(upper(prop['title']))} <small>LDS {score}</small></summary>"
        f"{_marks(prop)}{bodies}</details>"
    )


def _comparison(prop: PropertyValidation, charts: dict[str, str]) -> str:
    first = _first(prop)
    if first is None or not prop["methods"]:
        return "<p>Nothing was retrained or no method was judged yet.</p>"
    text = (
        "<p>Coalitions that no method has seen were retrained from scratch. The linear "
        "datamodeling score (LDS) is the rank correlation between the sum of a coalition's values "
        "and what its retrained model scores: 1 is perfect, unrelated numbers give 0. Every "
        "method is judged on the same retrainings. The lead is that of "
        f"{safe(prop['methods'][0]['name'])} at {safe(first['name'])}; where its interval holds "
        "zero the two are not told apart.</p>"
    )
    key = (
        '<span class="key">Bars are 95 % intervals; each family has its own marker.</span>'
        '<span class="key">ceiling: one retraining predicted by another</span>'
        '<span class="key">additive: the best additive model, cross-validated on the '
        "retrainings</span>"
        '<span class="key">floor: an equal split, which knows the size alone</span>'
        '<span class="key">chance: unrelated numbers stay below in 19 of 20 cases</span>'
    )
    return f"{text}{_chart(charts, 'lds', key)}{_methods(prop)}{_oracle(prop)}"


def _methods(prop: PropertyValidation) -> str:
    """The comparison table, by family, with the overall rank and the limits as a last group."""
    names = [o["name"] for o in prop["oracle"]]
    ranks = _ranks(prop)
    heads = [
        *(f"LDS {name}" for name in names), "lead", "agreement", "evaluations", "worker time"
    ]  # fmt: skip
    groups: list[tuple[str, list[_Record]]] = []
    for family, heading in _FAMILIES.items():
        rows = [
            _Record(
                m["name"],
                [
                    *(_cell(m["lds"].get(name, _UNKNOWN)) for name in names),
                    "–" if m is prop["methods"][0] else _cell(_lead(prop, m)),
                    _cell(m["agreement"]),
                    f"{m['evaluations']:,}",
                    "–" if m["seconds"] is None else duration(m["seconds"]),
                ],
                _note(m),
                ranks.get(m["name"], "–"),
                m is prop["methods"][0],
            )
            for m in _sorted(prop)
            if m["family"] == family
        ]
        groups.append((heading, rows))
    limits: list[tuple[str, Callable[[OracleSet], str]]] = [
        ("ceiling: another retraining", lambda o: _cell(o["ceiling"])),
        ("best additive model", lambda o: _cell(o["additivity"])),
        ("equal split (floor)", lambda o: number(o["floor"], 2)),
        ("chance stays below", lambda o: number(o["chance95"], 2)),
    ]
    blank = [""] * (len(heads) - len(names))
    groups.append(
        (
            "What limits a score",
            [_Record(name, [*map(of, prop["oracle"]), *blank]) for name, of in limits],
        )
    )
    caption = (
        "Methods by their LDS, with the rank among all. Agreement: Pearson correlation with the "
        "Shapley values of the retrainings. Small figures: 95 % intervals."
    )
    return _records(caption, ["method", *heads], groups, ranked=True)


def _note(method: Method) -> str:
    notes = [method["counterfactual"] or ""]
    if method["collapsed"]:
        notes.append(f"equal split in {method['collapsed']} of {method['designs']} designs")
    return "; ".join(filter(None, notes))


def _oracle(prop: PropertyValidation) -> str:
    digits = _digits(x for o in prop["oracle"] for x in (o["sd"],))
    rows = [
        _Record(
            o["name"],
            [
                f"{o['subsets']:,} of {o['planned']:,}",
                str(o["seeds"]),
                "mixed" if o["size"] is None else str(o["size"]),
                number(o["mean"], digits),
                number(o["sd"], digits),
            ],
        )
        for o in prop["oracle"]
    ]
    heads = ["retrained", "coalitions", "seeds", "contributors in each", "mean", "sd"]
    return _records(f"The retrainings, {_measured(prop)}.", heads, [("", rows)])


def _values(prop: PropertyValidation, contributors: list[str], charts: dict[str, str]) -> str:
    if not prop["methods"]:
        return ""
    head, reference = prop["methods"][0], prop["reference"]
    rows = _value_rows(prop, contributors)
    digits = decimals(rows)
    key = f'<span class="key"><i class="k-value" aria-hidden="true">●</i> {safe(head["name"])}'
    key += "</span>"
    if reference is None:
        text = "<p>There are no Shapley values of retrained models to compare with.</p>"
    else:
        shape = "◇" if len(rows) <= MOST_ROWS else "│"
        key += (
            f'<span class="key"><i class="k-ls" aria-hidden="true">{shape}</i> Shapley value of '
            "the retrained models, with its 95 % interval</span>"
        )
        text = (
            "<p>Shapley values of the retrained models themselves, from coalitions of all sizes. "
            f"The correlation with them is {_with_interval(head['agreement'])}"
        )
        if prop["reference_reliability"] is not None:
            reliability = number(prop["reference_reliability"], 2)
            text += f"; of their own spread a share of {reliability} is not noise"
        text += ".</p>"
    listed = _records(
        "",
        ["contributor", head["name"], "retraining", "95 % interval"],
        [
            (
                "",
                [
                    _Record(
                        r["id"],
                        [
                            number(r["value"], digits),
                            number(r["ls_value"], digits),
                            _range(r["low"], r["high"], digits),
                        ],
                    )
                    for r in sorted(rows, key=lambda r: (-r["value"], r["id"]))
                ],
            )
        ],
    )
    return f"{text}{_chart(charts, 'values', key)}{_details('The values', listed)}"


def _fidelity(prop: PropertyValidation, charts: dict[str, str]) -> str:
    rows = prop["fidelity"]
    if not rows:
        return ""
    digits = _digits(x for f in rows for x in (f["rmse"], f["bias"]))
    first = _first(prop)
    guide = "" if first is None else f" at {safe(first['name'])}"
    text = (
        "<p>A coalition's model is a stand-in for the model that would have been trained on its "
        "images alone. Here both were made for the same coalitions, and v(S) of one is compared "
        "with v(S) of the other.</p>"
    )
    key = (
        '<span class="key">Pearson correlation of v(S) with retraining, with 95 % intervals over '
        f'coalitions.</span><span class="key">ceiling: rank correlation of one retraining with '
        f"another{guide}</span>{_abbreviations(f['counterfactual'] for f in rows)}"
    )
    figures = _chart(charts, "fidelity-steps", key) + _chart(charts, "fidelity-seconds", "")
    records = [
        _Record(
            _kind(f["counterfactual"]),
            [
                _cell(f["pearson"]),
                number(f["spearman"], 2),
                number(f["rmse"], digits),
                number(f["bias"], digits),
                f"{f['coalitions']:,}",
                "–" if f["seconds"] is None else duration(f["seconds"]),
            ],
            ", ".join(
                [
                    *([] if f["steps"] is None else [f"{f['steps']:,} steps"]),
                    *([] if f["ema"] is None else [f"{f['ema']} average"]),
                ]
            ),
        )
        for f in rows
    ]
    heads = ["v(S) under", "Pearson", "Spearman", "rmse", "bias", "coalitions", "time of one"]
    caption = f"Fidelity of v(S). Rmse and bias are {_measured(prop)}."
    return text + figures + _records(caption, heads, [("", records)])


def _budget(prop: PropertyValidation, charts: dict[str, str]) -> str:
    rows = prop["budget"]
    if not rows:
        return ""
    first = _first(prop)
    where = "" if first is None else f" at {safe(first['name'])}"
    key = (
        f'<span class="key">LDS{where}, mean over designs, by what was spent.</span>'
        f"{_abbreviations(b['counterfactual'] for b in rows)}"
    )
    records = [
        _Record(
            b["estimator"],
            [
                number(b["lds"], 2),
                number(b["agreement"], 2),
                f"{b['evaluations']:,}",
                duration(b["seconds"]),
            ],
            b["counterfactual"],
        )
        for b in rows
    ]
    heads = ["estimator", "LDS", "agreement", "coalitions", "worker time"]
    return (
        _chart(charts, "budget-evaluations", key)
        + _chart(charts, "budget-seconds", "")
        + _details("The figures", _records("", heads, [("", records)]))
    )


def _removal(prop: PropertyValidation, charts: dict[str, str]) -> str:
    rows = prop["removal"]
    if not rows:
        return ""
    digits = _digits([prop["v_full"], *(r["value"] for r in rows)])
    everything = ""
    if prop["v_full"] is not None:
        everything = f", {number(prop['v_full'], digits)}"
    text = (
        "<p>The contributors a method ranks first are taken away and the model is retrained: the "
        "better the ranking, the further the property falls. Or only they are kept, and it "
        "should fall little. Changes are relative to retraining on everything"
        f"{everything}.</p>"
    )
    records = [
        _Record(
            r["method"],
            [
                _percent(r["change"]),
                number(r["value"], digits),
                f"{'keep' if r['keeps'] else 'remove'} {100 * r['share']:g} %",
                str(r["contributors"]),
            ],
        )
        for r in rows
    ]
    heads = ["ranked by", "change", "retrained", "top share", "contributors"]
    return (
        text
        + _chart(charts, "removal", '<span class="key">Lower is better.</span>')
        + _chart(charts, "keep", '<span class="key">Higher is better.</span>')
        + _details("The figures", _records("", heads, [("", records)]))
    )


def _cost(validation: Validation) -> str:
    seconds = validation["seconds"]
    rows = [(name, duration(s)) for name, s in seconds.items()]
    if len(seconds) > 1:
        rows.append(("all studies, worker time", duration(sum(seconds.values()))))
    rows.append(("evaluations", f"{validation['done']:,} of {validation['planned']:,}"))
    return facts_table(rows)


def _provenance(validation: Validation) -> str:
    rows = {
        "spec digest": validation["spec_digest"],
        "retraining": validation["oracle"],
        "bootstrap draws": f"{validation['bootstrap']:,}",
        "attr-batch": validation["version"],
        **validation["provenance"],
    }
    return facts_table(rows.items(), "long")


class _Record(NamedTuple):
    """A row of a table: its name, its cells as HTML, a note under the name."""

    name: str
    cells: Sequence[str]
    note: str = ""
    rank: str = ""
    strong: bool = False


def _records(
    caption: str,
    heads: Sequence[str],
    groups: Iterable[tuple[str, Sequence[_Record]]],
    ranked: bool = False,
) -> str:
    """Return a table that a narrow screen lays out as cards, so roles are explicit.

    Empty cells have no place in a card.
    """
    styles = ["name", *[""] * (len(heads) - 1)]
    if ranked:
        heads, styles = ["rank", *heads], ["rank", *styles]
    head = "".join(
        f'<th scope="col" role="columnheader" class="{style}">{safe(name)}</th>'
        for name, style in zip(heads, styles, strict=True)
    )
    body = ""
    for heading, rows in groups:
        if heading and rows:
            body += (
                f'<tr role="row" class="group"><th scope="rowgroup" role="rowheader" '
                f'colspan="{len(heads)}">{safe(heading)}</th></tr>'
            )
        body += "".join(_record(row, heads[1 + ranked :], ranked) for row in rows)
    return (
        f'<table class="values{"" if ranked else " records"}" role="table">'
        f"<caption>{safe(caption) if caption else ''}</caption>"
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table>'
    )


def _record(row: _Record, heads: Sequence[str], ranked: bool) -> str:
    rank = f'<td role="cell" class="rank">{row.rank}</td>' if ranked else ""
    note = f"<small>{safe(row.note)}</small>" if row.note else ""
    more = "".join(
        f'<td role="cell" class="{"more" if text else "pad"}" data-label="{safe(head)}">{text}</td>'
        for head, text in zip(heads[1:], row.cells[1:], strict=True)
    )
    return (
        f'<tr role="row"{" class=strong" if row.strong else ""}>{rank}'
        f'<th scope="row" role="rowheader" class="name"><bdi>{safe(row.name)}</bdi>{note}</th>'
        f'<td role="cell" class="val">{row.cells[0]}</td>{more}</tr>'
    )


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def _chart(charts: dict[str, str], name: str, caption: str) -> str:
    return plate(charts[name], caption) if name in charts else ""


# -- the pictures ---------------------------------------------------------------------------------


def figures(validation: Validation) -> dict[str, str]:
    """Return all charts as SVG, by "<property>-<chart>"; charts without a point are left out."""
    return {
        f"{prop['name']}-{name}": svg
        for prop in validation["properties"]
        for name, svg in _charts(prop, validation["contributors"]).items()
    }


def _charts(prop: PropertyValidation, contributors: list[str]) -> dict[str, str]:
    title, first = upper(prop["title"]), _first(prop)
    charts = {}
    groups = _dots(prop)
    if any(rows for _, rows in groups) and first is not None:
        said = f"{title}: LDS of each method at {first['name']}"
        charts["lds"] = dots_svg(groups, said, "LDS", _guides(first))
    if prop["methods"]:
        said = f"{title}: values beside those of retraining"
        charts["values"] = reference_svg(_value_rows(prop, contributors), said, "retrained")
    ceiling = [g for g in _guides(first) if g.name == "ceiling"]
    limits = [g for g in _guides(first) if g.name in ("ceiling", "chance")]
    drawn = [
        ("fidelity-steps", "fidelity of v(S) by training steps", _fidelity_series(prop, "steps"),
         "steps", "correlation", ceiling, True),
        ("fidelity-seconds", "fidelity of v(S) by seconds", _fidelity_series(prop, "seconds"),
         "worker seconds of one coalition", "correlation", ceiling, True),
        ("budget-evaluations", "LDS by coalitions", _budget_series(prop, "evaluations"),
         "coalitions evaluated", "LDS", limits, False),
        ("budget-seconds", "LDS by seconds", _budget_series(prop, "seconds"),
         "worker seconds", "LDS", limits, True),
        ("removal", "retrained without the first", _removal_series(prop["removal"], keeps=False),
         "top contributors removed, %", "change, %", [], False),
        ("keep", "retrained on the first alone", _removal_series(prop["removal"], keeps=True),
         "top contributors kept, %", "change, %", [], False),
    ]  # fmt: skip
    for name, what, series, x_label, y_label, guides, log_x in drawn:
        if any(s.points for s in series):
            charts[name] = line_svg(
                series, f"{title}: {what}", x_label, y_label, guides, log_x=log_x
            )
    return charts


def _dots(prop: PropertyValidation) -> list[tuple[str, list[Row]]]:
    first = _first(prop)
    groups = []
    for family in _FAMILIES:
        rows = []
        for m in _sorted(prop):
            score = _UNKNOWN if first is None else m["lds"].get(first["name"], _UNKNOWN)
            if m["family"] == family and score["value"] is not None:
                strong = m is prop["methods"][0]
                rows.append(Row(m["name"], score["value"], score["low"], score["high"], strong))
        groups.append((f"{family}s", rows))
    return groups


def _guides(oracle: OracleSet | None) -> list[Guide]:
    if oracle is None:
        return []
    limits = {
        "ceiling": oracle["ceiling"]["value"],
        "additive": oracle["additivity"]["value"],
        "floor": oracle["floor"],
        "chance": oracle["chance95"],
    }
    return [Guide(name, at) for name, at in limits.items() if at is not None]


def _value_rows(prop: PropertyValidation, contributors: list[str]) -> list[dict[str, Any]]:
    nothing = [None] * len(contributors)
    columns = (
        contributors,
        prop["methods"][0]["values"],
        prop["reference"] or nothing,
        prop["reference_low"] or nothing,
        prop["reference_high"] or nothing,
    )
    keys = ("id", "value", "ls_value", "low", "high")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def _fidelity_series(prop: PropertyValidation, x: Literal["steps", "seconds"]) -> list[Series]:
    lines: dict[str, list[Point]] = {}
    for f in prop["fidelity"]:
        across, pearson = f[x], f["pearson"]
        if across is not None and pearson["value"] is not None:
            name = " ".join(filter(None, (_short(f["counterfactual"]), f["ema"])))
            point = Point(across, pearson["value"], pearson["low"], pearson["high"])
            lines.setdefault(name, []).append(point)
    return _lines(lines)


def _budget_series(prop: PropertyValidation, x: Literal["evaluations", "seconds"]) -> list[Series]:
    lines: dict[str, list[Point]] = {}
    for b in prop["budget"]:
        if b["lds"] is not None:
            name = f"{_short(b['counterfactual'])}, {b['estimator']}"
            lines.setdefault(name, []).append(Point(b[x], b["lds"]))
    return _lines(lines)


def _removal_series(rows: Sequence[Removal], keeps: bool) -> list[Series]:
    lines: dict[str, list[Point]] = {}
    for r in rows:
        if r["keeps"] == keeps:
            point = Point(100 * r["share"], 100 * r["change"])
            lines.setdefault(r["method"], []).append(point)
    return _lines(lines)


def _lines(lines: dict[str, list[Point]]) -> list[Series]:
    return [Series(name, sorted(points, key=lambda p: p.x)) for name, points in lines.items()]


def _kind(counterfactual: str) -> str:
    """Return "sparsified finetune" for a kind."""
    return counterfactual.replace("_", " ")


def _short(counterfactual: str) -> str:
    """Return "sFT 100" for "sparsified_finetune, 100 steps", the kind abbreviated as published."""
    kind, *rest = counterfactual.split(", ")
    return " ".join([_SHORT.get(kind, _kind(kind)), *(r.removesuffix(" steps") for r in rest)])


def _abbreviations(counterfactuals: Iterable[str]) -> str:
    kinds = {text.split(", ")[0] for text in counterfactuals}
    used = [short for kind, short in _SHORT.items() if kind in kinds]
    return "".join(f'<span class="key">{short}: {_MEANINGS[short]}</span>' for short in used)


# -- the tables -----------------------------------------------------------------------------------


def table(validation: Validation) -> str:
    """Return the headline property's comparison and verdict for a terminal, 80 columns wide."""
    head = f"{visible(validation['job'])}: {validation['done']} of {validation['planned']} "
    head += "evaluations" + ("" if validation["complete"] else ", incomplete")
    properties = validation["properties"]
    if not properties:
        return head
    prop, lines = properties[0], []
    first = _first(prop)
    if first is not None and prop["methods"]:
        lines = _comparison_lines(prop, first)
    said = [f"{upper(p['title'])}: {verdict(p)}" for p in properties]
    said += [f"! {what}: {why}" for what, why in marks(prop)]
    return "\n".join(
        [textwrap.fill(head, WIDTH), "", *lines]
        + [textwrap.fill(visible(text), WIDTH, subsequent_indent="  ") for text in said]
    )


def _comparison_lines(prop: PropertyValidation, first: OracleSet) -> list[str]:
    """Return the table as lines, a rule between the families; long names are cut."""
    heads = ("", "LDS", "interval", "lead", "agree", "evals", "seconds")
    families = [
        [_line(m, first, _lead(prop, m)) for m in _sorted(prop) if m["family"] == family]
        for family in _FAMILIES
    ]
    rows = [heads, *(row for rows in families for row in rows)]
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:]))

    def aligned(row: Sequence[str]) -> str:
        name = fit(row[0], widths[0])
        rest = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([name + " " * (widths[0] - cells(name)), *rest]).rstrip()

    rule = "─" * (sum(widths) + 2 * len(widths[1:]))
    said = (
        f"{upper(prop['title'])}: LDS at {first['name']}; intervals of 95 %; lead of "
        f"{prop['methods'][0]['name']}, as an interval"
    )
    lines = [*textwrap.wrap(visible(said), WIDTH), "", aligned(heads)]
    for rows in filter(None, families):
        lines += [rule, *map(aligned, rows)]
    return [*lines, rule, ""]


def _line(method: Method, first: OracleSet, lead: Estimate) -> tuple[str, ...]:
    score, seconds = method["lds"].get(first["name"], _UNKNOWN), method["seconds"]
    return (
        visible(method["name"]),
        number(score["value"], 2),
        _range(score["low"], score["high"], 2),
        _range(lead["low"], lead["high"], 2),
        number(method["agreement"]["value"], 2),
        str(method["evaluations"]),
        number(seconds, 1 if seconds is not None and seconds < 10 else 0),
    )


def markdown(validation: Validation) -> str:
    """Return the comparison table for README: the first two properties at their first set.

    Rows are the headline property's methods and what limits a score; evaluations and seconds are
    the same for all properties.
    """
    properties = [p for p in validation["properties"] if p["oracle"]][:2]
    if not properties:
        return ""
    heads = ["method"]
    for prop in properties:
        heads += [f"LDS {prop['title']}, {prop['oracle'][0]['name']}", "lead"]
    rows = [[*heads, "evaluations", "worker seconds"], ["---"] * (len(heads) + 2)]
    for method in _sorted(properties[0]):
        row = [method["name"]]
        for prop in properties:
            mine = next((m for m in prop["methods"] if m["name"] == method["name"]), None)
            score = _UNKNOWN if mine is None else _score(prop, mine)
            lead = _UNKNOWN if mine is None else _lead(prop, mine)
            row += [_with_interval(score), _with_interval(lead)]
        rows.append([*row, str(method["evaluations"]), number(method["seconds"], 0)])
    limits: list[tuple[str, Callable[[OracleSet], str]]] = [
        ("*another retraining (ceiling)*", lambda o: _with_interval(o["ceiling"])),
        ("*best additive model*", lambda o: _with_interval(o["additivity"])),
        ("*equal split (floor)*", lambda o: number(o["floor"], 2)),
        ("*chance stays below*", lambda o: number(o["chance95"], 2)),
    ]
    for name, of in limits:
        figures = [cell for prop in properties for cell in (of(prop["oracle"][0]), "")]
        rows.append([name, *figures, "", ""])
    return "".join(f"| {' | '.join(map(_escaped, row))} |\n" for row in rows)


def _escaped(text: str) -> str:
    """Return text that Markdown shows in a table cell as it is."""
    shown = html.escape(visible(text), quote=False) if text else ""
    return shown.replace("|", "\\|").replace("`", "\\`")


# -- what both read -------------------------------------------------------------------------------


def _first(prop: PropertyValidation) -> OracleSet | None:
    return prop["oracle"][0] if prop["oracle"] else None


def _head(prop: PropertyValidation) -> Method | None:
    return prop["methods"][0] if prop["methods"] else None


def _score(prop: PropertyValidation, method: Method) -> Estimate:
    """Return a method's LDS on the first oracle set."""
    first = _first(prop)
    return _UNKNOWN if first is None else method["lds"].get(first["name"], _UNKNOWN)


def _lead(prop: PropertyValidation, method: Method) -> Estimate:
    """Return by how much the headline method's LDS is ahead on the first oracle set."""
    first = _first(prop)
    if first is None or method is prop["methods"][0]:
        return _UNKNOWN
    return method["lead"].get(first["name"], _UNKNOWN)


def _sorted(prop: PropertyValidation) -> list[Method]:
    """Return the methods family by family, the best first, those without a score last."""

    def key(m: Method) -> tuple[int, bool, float, str]:
        value = _score(prop, m)["value"]
        return list(_FAMILIES).index(m["family"]), value is None, -(value or 0.0), m["name"]

    return sorted(prop["methods"], key=key)


def _ranks(prop: PropertyValidation) -> dict[str, str]:
    """Return the ranks of all methods that have a score, by name, whatever their family."""
    scores = [(_score(prop, m)["value"], m["name"]) for m in prop["methods"]]
    best = sorted(((-value, name) for value, name in scores if value is not None))
    return {name: str(rank) for rank, (_, name) in enumerate(best, 1)}


def _range(low: float | None, high: float | None, digits: int) -> str:
    return "–" if low is None else f"{number(low, digits)} … {number(high, digits)}"


def _with_interval(figure: Estimate) -> str:
    """Return "0.86 (0.78 … 0.91)", for text."""
    if figure["value"] is None or figure["low"] is None:
        return number(figure["value"], 2)
    return f"{number(figure['value'], 2)} ({_range(figure['low'], figure['high'], 2)})"


def _cell(figure: Estimate) -> str:
    """Return a figure with its interval in small print, as HTML."""
    if figure["value"] is None or figure["low"] is None:
        return number(figure["value"], 2)
    small = _range(figure["low"], figure["high"], 2)
    return f"{number(figure['value'], 2)}<small>{small}</small>"


def _percent(part: float) -> str:
    return f"{number(100 * part, 1)} %"


def _digits(figures: Iterable[float | None]) -> int:
    """Return the decimals that show the middle one of the figures to three digits."""
    sizes = sorted(abs(x) for x in figures if x)
    return 2 - math.floor(math.log10(sizes[len(sizes) // 2])) if sizes else 3


def _measured(prop: PropertyValidation) -> str:
    return f"measured in {prop['unit']}" if prop["unit"] else "measured as the property is"
