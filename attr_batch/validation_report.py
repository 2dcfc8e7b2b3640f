"""Is the attribution right? What `attr-batch validate` shows: a page, pictures and tables.

Pure functions from `validation.json` (`evidence.Validation`) to text, in the look and by the rules
of `report`. The order is a sceptic's: does it predict what retrained models score, and what else
does; do the values agree with those of retraining; how well does a fine-tuned model stand in for a
retrained one; what would a smaller budget give; what happens when the contributors ranked first
are really taken away; what did all this cost, and what does it not show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from attr_batch.document import bullets, document, duration, facts_table, plate, safe, upper
from attr_batch.evidence import (
    Estimate,
    Fidelity,
    Method,
    OracleSet,
    PropertyValidation,
    Validation,
)
from attr_batch.figures import MOST_ROWS, cells, decimals, fit, number, visible
from attr_batch.validation_figures import abbreviations, charts, figures, short, value_rows
from attr_batch.verdict import (
    FAMILIES,
    UNKNOWN,
    by_family,
    first_set,
    headline,
    lead_of,
    marks,
    score_of,
    span,
    verdict,
    with_interval,
)

__all__ = ["figures", "page", "table"]

WIDTH = 80  # of the terminal's table

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
    "All of this is one data set and one architecture. It says nothing about others.",
)


def page(validation: Validation) -> str:
    """Return the validation report as one self-contained HTML page; same input, same bytes."""
    properties, contributors = validation["properties"], validation["contributors"]
    verdicts = "".join(
        f"<li><b>{safe(upper(p['title']))}:</b> {safe(verdict(p))}.</li>" for p in properties
    )
    header = (
        f'<p class="over">Validation report</p><h1>{safe(validation["job"])}</h1>'
        f'<ul class="verdicts">{verdicts}</ul>{_marks(properties[0]) if properties else ""}'
    )
    state, banner = "", ""
    if not validation["complete"]:
        state = "INCOMPLETE: "
        done = f"{validation['done']:,} of {validation['planned']:,}"
        banner = f"Incomplete: {done} evaluations are done. These figures will change."
    others = "".join(_folded(p, contributors) for p in properties[1:])
    sections = [
        *(_sections(properties[0], contributors) if properties else []),
        ("others", "Other properties", others),
        ("cost", "What it took", _cost(validation)),
        ("provenance", "Provenance", _provenance(validation)),
        ("limits", "What this does not say", bullets(_LIMITATIONS)),
    ]
    return document(
        f"{state}{validation['job']}: is the attribution right?",
        header,
        sections,
        f"attr-batch {validation['version']}, spec {validation['spec_digest'][:12]}",
        banner,
        styles=("report.css", "validation_report.css"),
    )


def _marks(prop: PropertyValidation) -> str:
    found = [f"<li><b>{safe(what)}:</b> {safe(why)}.</li>" for what, why in marks(prop)]
    return f'<ul class="marks" aria-label="Reservations">{"".join(found)}</ul>' if found else ""


def _sections(prop: PropertyValidation, contributors: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return one property's sections as (key, heading, HTML)."""
    drawn = charts(prop, contributors)
    return [
        ("comparison", "Does it predict, and what else does?", _comparison(prop, drawn)),
        ("values", "Do the values agree with retraining?", _values(prop, contributors, drawn)),
        ("fidelity", "Can fine-tuning stand in for retraining?", _fidelity(prop, drawn)),
        ("budget", "How much does it take?", _budget(prop, drawn)),
        ("removal", "What if the first are taken away?", _removal(prop, drawn)),
    ]


def _folded(prop: PropertyValidation, contributors: Sequence[str]) -> str:
    bodies = "".join(
        f"<h3>{heading}</h3>{body}" for _, heading, body in _sections(prop, contributors) if body
    )
    head = headline(prop)
    score = "" if head is None else f" <small>LDS {with_interval(score_of(prop, head))}</small>"
    return (
        f"<details><summary>{safe(upper(prop['title']))}{score}</summary>"
        f"{_marks(prop)}{bodies}</details>"
    )


def _comparison(prop: PropertyValidation, drawn: dict[str, str]) -> str:
    first, head = first_set(prop), headline(prop)
    if first is None or head is None:
        return "<p>Nothing was retrained or no method was judged yet.</p>"
    text = (
        "<p>Coalitions were retrained from scratch. The linear datamodeling score (LDS) is the "
        "rank correlation between the sum of a coalition's values and what its retrained model "
        "scores: 1 is perfect, unrelated numbers give 0. All methods are judged by the same "
        "retrainings.</p>"
    )
    keys = [
        "bars: 95 % intervals; each family has its own marker",
        "ceiling: one retraining predicted by another",
        "additive: the best additive model, cross-validated on the retrainings",
        "floor: an equal split, which knows the size alone",
        "chance: unrelated numbers stay below in 19 of 20 cases",
        *abbreviations(m["name"] for m in prop["methods"]),
    ]
    return text + _plate(drawn, ["lds"], keys) + _methods(prop, first, head) + _oracle(prop)


def _methods(prop: PropertyValidation, first: OracleSet, head: Method) -> str:
    """The comparison table: families, and what limits a score as the last group."""
    names = [o["name"] for o in prop["oracle"]]
    ranks = _ranks(prop)
    heads = ["method", *(f"LDS {name}" for name in names)]
    heads += ["lead", "agreement", "evaluations", "worker time"]
    groups = {heading: [] for heading in FAMILIES.values()}
    for m in by_family(prop):
        figures = [
            *(_cell(m["lds"].get(name, UNKNOWN)) for name in names),
            _cell(lead_of(prop, m)),
            _cell(m["agreement"]),
            f"{m['evaluations']:,}",
            _time(m["seconds"]),
        ]
        row = _Row(m["name"], figures, _note(m, head), ranks.get(m["name"], "–"), m is head)
        groups[FAMILIES[m["family"]]].append(row)
    limits = zip(*map(_limits, prop["oracle"]), strict=True)
    groups["What limits a score"] = [
        _Row(row[0][0], [_cell(figure) for _, figure in row] + [""] * 4) for row in limits
    ]
    caption = (
        f"Methods, each family by its LDS at {first['name']}; the rank is among all. Lead: by how "
        f"much {head['name']} is ahead there; where the interval holds 0 the two are not told "
        "apart. Agreement: Pearson correlation with the Shapley values of the retrainings. Small "
        "figures are 95 % intervals."
    )
    return _table(caption, heads, groups, ranked=True)


def _limits(oracle: OracleSet) -> list[tuple[str, Estimate]]:
    """Return what limits an LDS on these retrainings, by name."""
    return [
        ("another retraining (ceiling)", oracle["ceiling"]),
        ("best additive model", oracle["additivity"]),
        ("equal split (floor)", Estimate(value=oracle["floor"], low=None, high=None)),
        ("chance stays below", Estimate(value=oracle["chance95"], low=None, high=None)),
    ]


def _note(method: Method, head: Method) -> str:
    """Return what sets a method apart, but not what it has in common with the headline."""
    notes = []
    differs = method is head or method["counterfactual"] != head["counterfactual"]
    if method["counterfactual"] and differs:
        notes.append(method["counterfactual"])
    if method["collapsed"]:
        notes.append(f"equal split in {method['collapsed']} of {method['designs']} designs")
    return "; ".join(notes)


def _oracle(prop: PropertyValidation) -> str:
    digits = _digits(o["sd"] for o in prop["oracle"])
    rows = [
        _Row(
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
    heads = ["", "retrained", "seeds", "contributors in each", "mean", "sd"]
    return _table(f"The retrained coalitions{_measured(prop)}.", heads, {"": rows})


def _values(prop: PropertyValidation, contributors: Sequence[str], drawn: dict[str, str]) -> str:
    head, rows = headline(prop), value_rows(prop, contributors)
    if head is None or not rows:
        return ""
    keys = [f'<i class="k-value" aria-hidden="true">●</i> value by {safe(head["name"])}']
    if prop["reference"] is None:
        text = "There are no Shapley values of retrained models to compare with."
    else:
        shape = "◇" if len(rows) <= MOST_ROWS else "│"
        keys.append(
            f'<i class="k-ls" aria-hidden="true">{shape}</i> Shapley value of the retrained '
            "models, with its 95 % interval"
        )
        text = (
            "The Shapley values of the retrained models themselves, from coalitions of all sizes. "
            f"Pearson's correlation of {safe(head['name'])} with them is "
            f"{with_interval(head['agreement'])}."
        )
        if prop["reference_reliability"] is not None:
            share = number(prop["reference_reliability"], 2)
            text += f" They are noisy too: {share} of their spread is not noise."
    digits = decimals(rows)
    listed = [
        _Row(
            r["id"],
            [
                number(r["value"], digits),
                number(r["ls_value"], digits),
                span(r["low"], r["high"], digits),
            ],
        )
        for r in sorted(rows, key=lambda r: (-r["value"], r["id"]))
    ]
    heads = ["contributor", head["name"], "retraining", "95 % interval"]
    return (
        f"<p>{text}</p>{_plate(drawn, ['values'], keys)}"
        f"{_fold('The values', _table('', heads, {'': listed}))}"
    )


def _fidelity(prop: PropertyValidation, drawn: dict[str, str]) -> str:
    rows = prop["fidelity"]
    if not rows:
        return ""
    text = (
        "<p>The values come from models that stand in for retraining. For these coalitions both "
        "were made; v(S) of the one is compared with v(S) of the other.</p>"
    )
    keys = ["Pearson correlation of v(S) with retraining; bars: 95 % intervals over coalitions"]
    if prop["fidelity_ceiling"]["value"] is not None:
        keys.append("ceiling: one retraining with another")
    keys += abbreviations(f["counterfactual"] for f in rows)
    digits = _digits(f["rmse"] for f in rows)
    records = [
        _Row(
            f["counterfactual"].replace("_", " "),
            [
                _cell(f["pearson"]),
                number(f["spearman"], 2),
                number(f["rmse"], digits),
                number(f["bias"], digits),
                f"{f['coalitions']:,}",
                _time(f["seconds"]),
            ],
            ", ".join(_settings(f)),
        )
        for f in rows
    ]
    heads = ["v(S) under", "Pearson", "Spearman", "rmse", "bias", "coalitions", "time of one"]
    caption = f"v(S) against retraining{_measured(prop)}. Bias: mean difference."
    pictures = _plate(drawn, ["fidelity-steps", "fidelity-seconds"], keys)
    return text + pictures + _fold("The figures", _table(caption, heads, {"": records}))


def _settings(f: Fidelity) -> list[str]:
    steps = [] if f["steps"] is None else [f"{f['steps']:,} steps"]
    return [*steps, *(f"{name} {f[name]}" for name in ("ema", "base") if f[name] is not None)]


def _budget(prop: PropertyValidation, drawn: dict[str, str]) -> str:
    rows, first = prop["budget"], first_set(prop)
    if not rows:
        return ""
    where = "" if first is None else f" at {safe(first['name'])}"
    keys = [f"LDS{where}, mean over designs", *abbreviations(b["counterfactual"] for b in rows)]
    records = [
        _Row(
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
    return _plate(drawn, ["budget-evaluations", "budget-seconds"], keys) + _fold(
        "The figures", _table("", heads, {"": records})
    )


def _removal(prop: PropertyValidation, drawn: dict[str, str]) -> str:
    rows = prop["removal"]
    if not rows:
        return ""
    digits = _digits([prop["v_full"], *(r["value"] for r in rows)])
    full = "" if prop["v_full"] is None else f", {number(prop['v_full'], digits)}"
    text = (
        "<p>The contributors that a method ranks first are left out and the model is retrained: "
        "the better the ranking, the further the property falls. Or they alone are kept: the "
        "better the ranking, the higher it stays. Changes are relative to retraining on "
        f"everything{full}.</p>"
    )
    keys = ["removed: lower is better", "kept: higher is better"]
    keys += abbreviations(r["method"] for r in rows)
    records = [
        _Row(
            r["method"],
            [
                f"{number(100 * r['change'], 1)} %",
                number(r["value"], digits),
                f"{'kept' if r['keeps'] else 'removed'}, {100 * r['share']:g} %",
                str(r["contributors"]),
            ],
        )
        for r in rows
    ]
    heads = ["ranked by", "change", "retrained", "the first", "contributors"]
    figures = _fold("The figures", _table("", heads, {"": records}))
    return text + _plate(drawn, ["removal", "keep"], keys) + figures


def _cost(validation: Validation) -> str:
    rows = [(f"{study}, worker time", duration(s)) for study, s in validation["seconds"].items()]
    if len(rows) > 1:
        rows.append(("all studies", duration(sum(validation["seconds"].values()))))
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


class _Row(NamedTuple):
    """A row of a table: its name, figures as HTML, a note under the name, its rank."""

    name: str
    figures: Sequence[str]
    note: str = ""
    rank: str = ""
    strong: bool = False


def _table(
    caption: str, heads: Sequence[str], groups: dict[str, list[_Row]], ranked: bool = False
) -> str:
    """Return a table of named groups. Roles are explicit: a narrow screen shows rows as cards."""
    titles = [("rank", "rank")] * ranked + [(heads[0], "name"), *((h, "") for h in heads[1:])]
    head = "".join(
        f'<th scope="col" role="columnheader" class="{style}">{safe(title) if title else ""}</th>'
        for title, style in titles
    )
    body = ""
    for name, rows in groups.items():
        if name and rows:
            body += (
                '<tr role="row" class="group"><th scope="rowgroup" role="rowheader" '
                f'colspan="{len(titles)}">{safe(name)}</th></tr>'
            )
        body += "".join(_row(row, heads, ranked) for row in rows)
    return (
        f'<table class="values {"ranked" if ranked else "plain"}" role="table">'
        + (f"<caption>{safe(caption)}</caption>" if caption else "")
        + f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table>'
    )


def _row(row: _Row, heads: Sequence[str], ranked: bool) -> str:
    rank = f'<td role="cell" class="rank">{row.rank}</td>' if ranked else ""
    note = f"<small>{safe(row.note)}</small>" if row.note else ""
    more = "".join(
        f'<td role="cell" class="{"more" if text else "pad"}" data-label="{safe(head)}">{text}</td>'
        for head, text in zip(heads[2:], row.figures[1:], strict=True)
    )
    return (
        f'<tr role="row"{" class=strong" if row.strong else ""}>{rank}'
        f'<th scope="row" role="rowheader" class="name"><bdi>{safe(row.name)}</bdi>{note}</th>'
        f'<td role="cell" class="val">{row.figures[0]}</td>{more}</tr>'
    )


def _plate(drawn: dict[str, str], names: Sequence[str], keys: Sequence[str]) -> str:
    """Return charts over one caption, side by side where there is room; keys are HTML."""
    svgs = [drawn[name] for name in names if name in drawn]
    caption = "".join(f'<span class="key">{key}</span>' for key in keys)
    if len(svgs) < 2:
        return plate(svgs[0], caption) if svgs else ""
    return f'<figure class="pair">{"".join(svgs)}<figcaption>{caption}</figcaption></figure>'


def _fold(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def _ranks(prop: PropertyValidation) -> dict[str, str]:
    """Return the ranks of all methods that have a score, by name, whatever their family."""
    scores = [(score_of(prop, m)["value"], m["name"]) for m in prop["methods"]]
    best = sorted((-value, name) for value, name in scores if value is not None)
    return {name: str(rank) for rank, (_, name) in enumerate(best, 1)}


def _cell(figure: Estimate) -> str:
    """Return a figure with its interval in small print, as HTML."""
    if figure["value"] is None or figure["low"] is None:
        return number(figure["value"], 2)
    small = span(figure["low"], figure["high"], 2)
    return f"{number(figure['value'], 2)}<small>{small}</small>"


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def _digits(figures: Iterable[float | None]) -> int:
    """Return the decimals that show the middle one of the figures to three digits."""
    sizes = sorted(abs(x) for x in figures if x)
    return 2 - math.floor(math.log10(sizes[len(sizes) // 2])) if sizes else 3


def _measured(prop: PropertyValidation) -> str:
    return f", in {prop['unit']}" if prop["unit"] else ""


def table(validation: Validation) -> str:
    """Return the headline property's comparison and verdict for a terminal, 80 columns wide."""
    head = f"{visible(validation['job'])}: {validation['done']} of {validation['planned']} "
    head += "evaluations" + ("" if validation["complete"] else ", incomplete")
    properties = validation["properties"]
    if not properties:
        return "\n".join(_wrapped(head))
    prop, lines = properties[0], []
    first = first_set(prop)
    if first is not None and prop["methods"]:
        lines = _comparison_lines(prop, first)
    said = [f"{upper(p['title'])}: {verdict(p)}" for p in properties]
    said += [f"! {what}: {why}" for what, why in marks(prop)]
    return "\n".join([*_wrapped(head), "", *lines, *(line for s in said for line in _wrapped(s))])


def _wrapped(text: str) -> list[str]:
    """Break text into lines by the terminal's columns; those after the first are indented."""
    lines = [""]
    for word in visible(text).split():
        word = fit(word, WIDTH - 2)
        if cells(lines[-1]) + 1 + cells(word) > WIDTH:
            lines.append(" ")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _comparison_lines(prop: PropertyValidation, first: OracleSet) -> list[str]:
    """Return the table as lines, a rule between the families; long names are cut."""
    heads = ("", "LDS", "interval", "lead", "agree", "evals", "seconds")
    families = [
        [_line(m, first, lead_of(prop, m)) for m in by_family(prop) if m["family"] == family]
        for family in FAMILIES
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
    lines = [*_wrapped(said), "", aligned(heads)]
    for rows in filter(None, families):
        lines += [rule, *map(aligned, rows)]
    return [*lines, rule, *abbreviations(m["name"] for m in prop["methods"]), ""]


def _line(method: Method, first: OracleSet, lead: Estimate) -> tuple[str, ...]:
    score, seconds = method["lds"].get(first["name"], UNKNOWN), method["seconds"]
    return (
        visible(short(method["name"])),
        number(score["value"], 2),
        span(score["low"], score["high"], 2),
        span(lead["low"], lead["high"], 2),
        number(method["agreement"]["value"], 2),
        str(method["evaluations"]),
        number(seconds, 1 if seconds is not None and seconds < 10 else 0),
    )
