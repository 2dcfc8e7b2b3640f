"""The statement a reader gets: one HTML page, and the table that a terminal prints.

Pure functions from JSON to text, so a report can be made again from the store at any time, costs
nothing and has the same bytes. The page is self-contained (its own style and SVG, samples as data
URIs, no script; its content security policy forbids the rest) and every text that came from
outside is escaped: contributor names are hostile until proven otherwise.

The order follows the questions a contributor would ask: what is my share and how sure is it, does
the method predict anything (the held-out check), what was measured (v(S) by size, samples), what
did it cost, what exactly was computed, and what it does not say. A number without enough evidence
behind it is marked where it stands, not in a footnote.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from attr_batch.document import (
    bullets,
    document,
    duration,
    facts_table,
    items,
    plate,
    safe,
    upper,
)
from attr_batch.evidence import Cost, Evidence, Grid, PropertyEvidence
from attr_batch.figures import (
    MOST_ROWS,
    cells,
    decimals,
    fit,
    grid_png,
    holdout_svg,
    interval_svg,
    number,
    utility_svg,
    visible,
)

__all__ = ["grid_png", "holdout_svg", "interval_svg", "marks", "page", "table", "utility_svg"]

FOLD = 60  # contributors in the open table; the rest are in a fold below it
WIDTH = 80  # of the terminal's table

_SEMIVALUES = {
    "shapley": (
        "the average change in {title} when its images join those of a random group of the "
        "others, every group size being equally likely"
    ),
    "banzhaf": (
        "the average change in {title} when its images join those of a random subset of the "
        "others, every subset being equally likely"
    ),
    "leave_one_out": "the change in {title} when its images alone are taken away",
}
# By the beginning of `interval.method`.
_INTERVALS = {
    "paired-ls": "The intervals belong to the least-squares values, not to the estimator's where "
    "that is another: a ridge is steadier but biased towards an equal split.",
    "replicates": "Every coalition was measured: the intervals hold the noise of training alone.",
    "permutation": "The intervals come from how much the values differ between permutations.",
    "gp": "The intervals are the model's own opinion of itself (a Gaussian process's posterior): "
    "they rest on its assumptions, and tend to be too narrow.",
}
_COVERED = (
    " They cover the choice of coalitions and the noise of training; not the choice of property, "
    "model or starting noise."
)
_LIMITATIONS = (
    "A property is measured with an instrument of our own (a small classifier, clusters) fitted "
    "to this job's images. Its figures compare models of this job with each other; they are not "
    "comparable with published scores, which use ImageNet's network.",
    "Every model draws its samples from the same starting noise. That removes most of the noise "
    "between models, and it makes every value conditional on that one set of noise.",
    "A contributor who splits into two, or adds near-copies of the others' images, changes the "
    "values of all. The values are right for this list of contributors only.",
    "v(empty) is the score of a network without any training (or of the base without adapter). "
    "Its noise images can score oddly high or low, and the values add up to the difference to it.",
    "The counterfactual is a stand-in: instead of training a model from scratch for every "
    "coalition, the given procedure approximates it. This job does not measure how well.",
    "The number of coalitions is a budget. With few of them the ranks of neighbours are a toss-up "
    "even where the totals are sound; read the intervals, not the order.",
)


def headline(attribution: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headline property's object of an attribution.json."""
    return next(a for a in attribution["attributions"] if a["property"] == attribution["headline"])


def marks(attribution: Mapping[str, Any], provisional: bool = False) -> list[tuple[str, str]]:
    """Return what a reader must know before believing a number, as (what, explanation).

    `attribution` is one property's object. An empty list means: nothing to object.
    """
    people, interval = attribution["contributors"], attribution["interval"]
    counts, check = attribution["coalitions"], attribution["holdout"]
    n, found = len(people), []
    if provisional:
        found.append(
            (
                "Provisional",
                f"{counts['used']} of {counts['planned']} planned coalitions have a value. "
                "These figures will change",
            )
        )
    pairs = interval["pairs"]
    evidence = f"{pairs} complement {'pair' if pairs == 1 else 'pairs'} for {n} contributors"
    if interval["method"] == "replicates-t":
        if any(c["low"] is None for c in people):
            why = "every coalition was measured, none of them twice: nothing tells the noise"
            found.append(("No intervals", why))
        elif not interval["reliable"]:
            why = "every coalition was measured; only repeats between the endpoints tell the noise"
            found.append(("Intervals are rough", why))
    elif any(c["low"] is None for c in people):
        found.append(("Not enough evidence for intervals", f"{evidence}; more than {n} are needed"))
    elif not interval["reliable"]:
        wanted = math.ceil(2.5 * n)
        found.append(("Intervals are rough", f"{evidence}; {wanted} are needed to rely on them"))
    if attribution["collapsed"]:
        found.append(
            (
                "Collapsed to equal split",
                "the estimator could not tell the contributors apart from noise, so all values "
                "are the same. This is no finding that they are equal",
            )
        )
    if any(c["share"] is None for c in people):
        found.append(
            (
                "No shares",
                "the values differ in sign or add up to about zero, so a percentage of the total "
                "would mean nothing",
            )
        )
    if counts["failed"]:
        found.append(
            (
                "Coalitions missing",
                f"{counts['failed']} of {counts['planned']} planned have no value and are left out",
            )
        )
    if not check or check["spearman"] is None:
        found.append(("Not checked", "there are not enough held-out coalitions for a rank check"))
    elif check["spearman"] <= check["chance95"]:
        found.append(
            (
                "The check does not beat chance",
                "on held-out coalitions the values predict no better than luck would",
            )
        )
    elif check["size_rmse"] <= check["rmse"] or (check["beyond_size"] or 0) <= check["chance95"]:
        found.append(
            (
                "No better than counting heads",
                "an equal split, which knows only how many contribute, predicts held-out "
                "coalitions as well as the values do, as far as these can tell",
            )
        )
    if attribution["v_full"] <= attribution["v_empty"]:
        found.append(
            (
                "An untrained model scores higher",
                "v(empty) is not below v(full), so what is shared out is a loss, not a gain",
            )
        )
    return found


def table(attribution: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """Return one property's values as text for a terminal, at most 80 columns wide.

    `attribution` is one object of attribution.json, or what `attr-batch attribute` made of a CSV
    file, which knows of no images; `names` maps contributor ids to what is shown.
    """
    rows = _ranked(attribution)
    digits = decimals(rows)
    names = names or {}
    shown = [visible(names.get(r["id"]) or r["id"]) for r in rows]
    columns = [
        [str(k) for k in range(1, len(rows) + 1)],
        shown,
        [number(r["value"], digits) for r in rows],
        [_interval(r, digits) for r in rows],
        [_percent(r["share"]) for r in rows],
        ["–" if r["images"] is None else str(r["images"]) for r in rows],
    ]
    confidence = f"{100 * attribution['interval']['confidence']:g} % interval"
    heads = ["", "contributor", "value", confidence, "share", "images"]
    total = ["", "total", number(sum(r["value"] for r in rows), digits), "", "", ""]
    if all(r["images"] is not None for r in rows):
        total[5] = str(sum(r["images"] for r in rows))
    body = [[heads[k], *column, total[k]] for k, column in enumerate(columns)]
    widths = [max(map(cells, column)) for column in body]
    widths[1] = max(8, min(widths[1], WIDTH - sum(widths) + widths[1] - 2 * (len(widths) - 1)))
    lines = []
    for row in zip(*body, strict=True):
        name = fit(row[1], widths[1])
        name += " " * (widths[1] - cells(name))
        rest = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([row[0].rjust(widths[0]), name, *rest]).rstrip())
    lines.insert(1, "─" * max(map(cells, lines)))
    lines.insert(-1, lines[1])
    counts = attribution["coalitions"]
    return "\n".join(
        [
            f"{visible(attribution['property'])}: {attribution['semivalue']} values by "
            f"{attribution['estimator']}, {counts['used']} coalitions",
            "",
            *lines,
            "",
            textwrap.fill(f"held-out check: {_check(attribution)}", WIDTH, subsequent_indent="  "),
            f"v(empty) {number(attribution['v_empty'], digits)}   "
            f"v(full) {number(attribution['v_full'], digits)}",
            *(
                [textwrap.fill(upper(stopped), WIDTH)]
                if (stopped := _stopping(attribution))
                else []
            ),
            *(
                textwrap.fill(f"! {what}: {why}", WIDTH, subsequent_indent="  ")
                for what, why in marks(attribution)
            ),
        ]
    )


def page(attribution: Mapping[str, Any], evidence: Evidence, cost: Cost) -> str:
    """Return the report as one self-contained HTML page; the same input gives the same bytes.

    `attribution` is the whole attribution.json; `evidence` and `cost` are described in
    `attr_batch.evidence`.
    """
    first = headline(attribution)
    others = [a for a in attribution["attributions"] if a is not first]
    facts = evidence["properties"]
    title = facts[first["property"]]["title"]
    state = "PROVISIONAL: " if evidence["provisional"] else ""
    sections = [
        ("values", "Values", _values(first, facts[first["property"]])),
        ("check", "Does it predict?", _check_section(first, facts[first["property"]])),
        ("utilities", "What was measured", _utilities(first, facts[first["property"]])),
        ("samples", "Samples", _samples(evidence["grids"])),
        ("others", "Other properties", "".join(_folded(a, facts[a["property"]]) for a in others)),
        ("cost", "What it took", _cost(evidence, cost)),
        ("provenance", "Provenance", _provenance(first, evidence)),
        ("limits", "What this does not say", bullets(_limitations(first))),
    ]
    header = (
        f'<p class="over">Attribution statement</p><h1>{safe(evidence["job"])}</h1>'
        f"{_lead(first, facts[first['property']])}"
        f"{_marks(first, evidence['provisional'])}"
    )
    return document(
        f"{state}{evidence['job']}: who contributed to {title}",
        header,
        sections,
        f"attr-batch {first['version']}, spec {first['spec_digest'][:12]}",
        banner="Provisional: the plan is not complete. Pay nobody by this page."
        if evidence["provisional"]
        else "",
    )


def _limitations(attribution: Mapping[str, Any]) -> list[str]:
    method = attribution["interval"]["method"]
    said = [text + _COVERED for name, text in _INTERVALS.items() if method.startswith(name)]
    return [*_LIMITATIONS[:2], *said, *_LIMITATIONS[2:]]


def _lead(attribution: Mapping[str, Any], facts: PropertyEvidence) -> str:
    digits = decimals(attribution["contributors"])
    full, empty = (number(attribution[k], digits) for k in ("v_full", "v_empty"))
    meaning = _SEMIVALUES.get(attribution["semivalue"], "its {semivalue} for {title}")
    meaning = meaning.format(title=facts["title"], semivalue=attribution["semivalue"])
    total = ""
    if attribution["semivalue"] == "shapley":
        gap = number(attribution["v_full"] - attribution["v_empty"], digits)
        total = (
            f" The values add up to {gap}: what the model made of everybody's images scores "
            f"({full}) less what an untrained one does ({empty})."
        )
    return (
        f'<p class="lead">What each of {len(attribution["contributors"])} contributors adds to '
        f"<b>{safe(facts['title'])}</b> (a higher value means {safe(facts['higher_means'])}).</p>"
        f"<p>A contributor's value is {safe(meaning)}.{total}</p>"
        + (f"<p>{safe(upper(stopped))}.</p>" if (stopped := _stopping(attribution)) else "")
    )


def _stopping(attribution: Mapping[str, Any]) -> str:
    """Say why a job with a target measured so many coalitions; '' without a target."""
    at = attribution.get("stopping")
    if not at:
        return ""
    digits = decimals(attribution["contributors"]) + 1
    target = f"the target of {number(at['target'], digits)}"
    if at["half_width"] is None:
        width = "there is no reliable interval yet"
    else:
        width = f"the mean half-width of the intervals is {number(at['half_width'], digits)}"
    if at["reached"]:
        return f"stopped after {at['batches']} of {at['planned']} batches: {width}, within {target}"
    if at["batches"] == at["planned"]:
        return f"the budget ended first: {width}, {target} was not reached"
    return f"at batch {at['batches']} of at most {at['planned']}: {target} is not reached"


def _marks(attribution: Mapping[str, Any], provisional: bool) -> str:
    found = marks(attribution, provisional)
    items = "".join(f"<li><b>{safe(what)}:</b> {safe(why)}.</li>" for what, why in found)
    return f'<ul class="marks" aria-label="Reservations">{items}</ul>' if items else ""


def _values(attribution: Mapping[str, Any], facts: PropertyEvidence) -> str:
    confidence = f"{100 * attribution['interval']['confidence']:g} %"
    caption = (
        f"{safe(upper(facts['title']))}: values by {safe(attribution['estimator'])} from "
        f"{attribution['coalitions']['used']} coalitions, largest first."
    )
    ranked = list(enumerate(_ranked(attribution), 1))
    text = _table(attribution, ranked[:FOLD], caption, confidence, foot=len(ranked) <= FOLD)
    if len(ranked) > FOLD:
        rest = f"Ranks {FOLD + 1} to {len(ranked)}."
        folded = _table(attribution, ranked[FOLD:], rest, confidence, foot=True)
        text += f"<details><summary>{rest[:-1]}</summary>{folded}</details>"
    legend = (
        '<span class="key"><i class="k-value" aria-hidden="true">●</i> value by '
        f"{safe(attribution['estimator'])}</span>"
    )
    if any(c["ls_value"] is not None for c in attribution["contributors"]):
        shape = "◇" if len(ranked) <= MOST_ROWS else "│"
        its = attribution["interval"]["method"].startswith(("paired-ls", "replicates"))
        legend += (
            f'<span class="key"><i class="k-ls" aria-hidden="true">{shape}</i> value by paired '
            f"least squares{f', with its {confidence} interval' if its else ''}</span>"
        )
    slope = attribution["shrinkage_slope"]
    if slope is not None:
        legend += (
            f'<span class="key">The estimator shrinks towards an equal split: a true difference '
            f"of 1 shows as about {slope:.2f}.</span>"
        )
    legend += _surrogate(attribution)
    title = f"{facts['title']}: value and interval of each contributor"
    return text + plate(interval_svg(dict(attribution), title), legend)


def _surrogate(attribution: Mapping[str, Any]) -> str:
    """Say what the free game of training images was worth; '' where there was none."""
    use = attribution.get("surrogate")
    if not use:
        return ""
    said = "The same property of the coalitions' own training images "
    if not use["weight"]:
        said += "was tried as a guide and left out: it explained nothing more."
    else:
        said += (
            f"guides the values, with weight {use['weight']:.2g}: it explains "
            f"{100 * use['share']:.0f} % of what the size leaves of the utilities."
        )
    if use["alone"]:
        said += " The models add nothing to it but that weight."
    return f'<span class="key">{safe(said)}</span>'


def _table(
    attribution: Mapping[str, Any],
    ranked: Sequence[tuple[int, Mapping[str, Any]]],
    caption: str,
    confidence: str,
    foot: bool,
) -> str:
    """The table of contributors. Roles are explicit since a narrow screen lays it out as cards."""
    everyone = attribution["contributors"]
    digits = decimals(everyone)
    low = min(0.0, *(c["value"] for c in everyone))
    wide = max(0.0, *(c["value"] for c in everyone)) - low or 1.0
    heads = ("rank", "contributor", "value", f"{confidence} interval", "least squares", "share")
    head = "".join(
        f'<th scope="col" role="columnheader" class="{style}">{name}</th>'
        for name, style in zip(
            (*heads, "images", ""), ("rank", "name", "", "", "", "", "", "bar"), strict=True
        )
    )
    head = head.replace('class="bar"></th>', 'class="bar" aria-label="value as a bar"></th>')
    body = []
    for rank, c in ranked:
        value = c["value"]
        bar = (
            f'<span style="--from:{_pc((min(value, 0) - low) / wide)};'
            f'--wide:{_pc(abs(value) / wide)};--at:{_pc(-low / wide)}">'
            f"<i{' class=negative' if value < 0 else ''}></i><b></b></span>"
        )
        more = zip(
            (*heads[3:], "images"),
            (
                _interval(c, digits),
                number(c["ls_value"], digits),
                _percent(c["share"]),
                f"{c['images']:,}",
            ),
            strict=True,
        )
        body.append(
            f'<tr role="row"><td role="cell" class="rank">{rank}</td><th scope="row" '
            f'role="rowheader" class="name"><bdi>{safe(c["id"])}</bdi></th>'
            f'<td role="cell" class="val">{number(value, digits)}</td>'
            + "".join(
                f'<td role="cell" class="more" data-label="{name}">{text}</td>'
                for name, text in more
            )
            + f'<td role="cell" class="bar" aria-hidden="true">{bar}</td></tr>'
        )
    total = ""
    if foot:
        images = sum(c["images"] for c in everyone)
        shared = all(c["share"] is not None for c in everyone)
        total = (
            '<tfoot role="rowgroup"><tr role="row"><td role="cell" class="pad"></td>'
            '<th scope="row" role="rowheader" class="name">total</th>'
            f'<td role="cell" class="val">{number(sum(c["value"] for c in everyone), digits)}</td>'
            '<td role="cell" class="pad" colspan="2"></td>'
            f'<td role="cell" class="pad">{"100 %" if shared else "–"}</td>'
            f'<td role="cell" class="more" data-label="images">{images:,}</td>'
            '<td role="cell" class="pad"></td></tr></tfoot>'
        )
    return (
        f'<table class="values" role="table"><caption>{caption}</caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody>{total}</table>'
    )


def _check_section(attribution: Mapping[str, Any], facts: PropertyEvidence) -> str:
    check = attribution["holdout"]
    if not check:
        return "<p>No coalition was held out, so nothing shows that the values predict.</p>"
    digits = decimals(attribution["contributors"])
    rows = [
        ("Spearman correlation", number(check["spearman"], 2)),
        ("a method that knows nothing stays below", number(check["chance95"], 2)),
        ("an equal split (coalition size only) reaches", number(check["size_spearman"], 2)),
        ("Spearman beyond the size", number(check["beyond_size"], 2)),
        ("root mean square error", number(check["rmse"], digits)),
        ("that of an equal split", number(check["size_rmse"], digits)),
        ("held-out coalitions", str(check["coalitions"])),
    ]
    text = (
        "<p>Some coalitions were measured but not used for the values. For them, the sum of the "
        "members' values and a curve of the size are a prediction that could have failed.</p>"
    )
    return text + plate(holdout_svg(dict(attribution), facts), facts_table(rows))


def _utilities(attribution: Mapping[str, Any], facts: PropertyEvidence) -> str:
    digits = decimals(attribution["contributors"])
    endpoints = [u for u in facts["utilities"] if u["role"] == "endpoint"]
    n = len(attribution["contributors"])
    rows = [
        ("v(empty), used for the values", number(attribution["v_empty"], digits)),
        ("v(full), used for the values", number(attribution["v_full"], digits)),
    ]
    paper = facts.get("paper")
    if paper:
        rows += [
            ("v(full) as the paper takes it: the unpruned model", number(paper["v_full"], digits)),
            ("v(empty) as the paper takes it: untrained", number(paper["v_empty"], digits)),
        ]
    for size, name in ((0, "empty"), (n, "full")):
        values = [number(u["value"], digits) for u in endpoints if u["size"] == size]
        if len(values) > 1:
            rows.append((f"replicates of v({name})", ", ".join(values)))
    rows.append(("left over by the values", f"{attribution['efficiency_gap']:.1e}"))
    legend = (
        '<span class="key"><i class="k-value" aria-hidden="true">●</i> a coalition the values are '
        'computed from</span><span class="key"><i class="k-ls" aria-hidden="true">○</i> a held-out '
        'coalition</span><span class="key"><span aria-hidden="true">━</span> a replicate of '
        "v(empty) or v(full)</span>"
    )
    if paper:
        legend += '<span class="key"><span aria-hidden="true">✕</span> as the paper takes it</span>'
    return plate(utility_svg(dict(attribution), facts), legend) + facts_table(rows)


def _samples(grids: Sequence[Grid]) -> str:
    sheets = []
    for grid in grids:
        members = grid["members"]
        who = "" if members is None else f": {_members(members)}"
        caption = f"{safe(grid['caption'])}{who}"
        sheets.append(
            f'<figure><img alt="Samples: {safe(grid["caption"])}" '
            f'src="data:image/png;base64,{safe(grid["png_base64"])}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    note = "<p>Drawn from the same starting noise, image by image.</p>"
    return f'{note}<div class="sheets">{"".join(sheets)}</div>' if sheets else ""


def _folded(attribution: Mapping[str, Any], facts: PropertyEvidence) -> str:
    digits = decimals(attribution["contributors"])
    full, empty = (number(attribution[k], digits) for k in ("v_full", "v_empty"))
    return (
        f"<details><summary>{safe(upper(facts['title']))} <small>v(full) {full}, v(empty) "
        f"{empty}; held-out check: {safe(_check(attribution))}</small></summary>"
        f"<p>A higher value means {safe(facts['higher_means'])}.</p>{_marks(attribution, False)}"
        f"{_values(attribution, facts)}<h3>Held-out check</h3>{_check_section(attribution, facts)}"
        f"<h3>What was measured</h3>{_utilities(attribution, facts)}</details>"
    )


def _cost(evidence: Evidence, cost: Cost) -> str:
    rows = [(name, duration(s)) for name, s in cost["seconds"].items()]
    rows.append(("all phases", duration(sum(cost["seconds"].values()))))
    if cost["wall_seconds"] is not None:
        rows.append(("from start to end", duration(cost["wall_seconds"])))
    if cost["median_seconds_per_coalition"] is not None:
        rows.append(("one coalition (median)", duration(cost["median_seconds_per_coalition"])))
    rows.append(("coalitions computed", f"{cost['evaluated']:,}"))
    rows.append(("coalitions found in the store", f"{cost['reused']:,}"))
    pruning = evidence["pruning"]
    if pruning:
        for name, key in (("operations (MACs) per image", "macs"), ("parameters", "parameters")):
            before, after = pruning[f"{key}_before"], pruning[f"{key}_after"]
            fewer = f"{before / after:.2f}× fewer" if after else ""
            rows.append((f"{name}, pruned", f"{before:,} → {after:,} ({fewer})"))
    rows.append(("machines", ", ".join(cost["machines"]) or "–"))
    return facts_table(rows)


def _provenance(attribution: Mapping[str, Any], evidence: Evidence) -> str:
    interval = attribution["interval"]
    rows = {
        "spec digest": attribution["spec_digest"],
        "base": evidence["base"],
        "counterfactual": evidence["counterfactual"],
        "recipe": _flat(attribution["recipe"]),
        "numerics class": _flat(attribution["numerics"]),
        "interval": f"{interval['method']}, {interval['df']} degrees of freedom",
        "attr-batch": attribution["version"],
        **evidence["provenance"],
    }
    cards = [(card["kind"], _flat(card["card"])) for card in evidence["instruments"]]
    text = facts_table([*rows.items(), *cards], "long")
    if evidence["warnings"]:
        text = f'<ul class="marks">{items(evidence["warnings"])}</ul>' + text
    if evidence["failures"]:
        failures = [
            f"{f['coalition']}, replicate {f['replicate']}: {f['what']}"
            for f in evidence["failures"]
        ]
        text += f"<h3>Coalitions without a value</h3>{bullets(failures)}"
    return text


def _ranked(attribution: Mapping[str, Any]) -> list[dict[str, Any]]:
    return sorted(attribution["contributors"], key=lambda c: (-c["value"], c["id"]))


def _check(attribution: Mapping[str, Any]) -> str:
    check = attribution["holdout"]
    if not check or check["spearman"] is None:
        return "none, too few held-out coalitions"
    chance = number(check["chance95"], 2)
    return (
        f"Spearman {number(check['spearman'], 2)} over {check['coalitions']} coalitions, beyond "
        f"their size {number(check['beyond_size'], 2)} (chance stays below {chance})"
    )


def _interval(row: Mapping[str, Any], digits: int) -> str:
    if row["low"] is None:
        return "–"
    return f"{number(row['low'], digits)} … {number(row['high'], digits)}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %".replace("-", "−")


def _pc(part: float) -> str:
    return f"{100 * part:.2f}%"


def _members(members: Sequence[str]) -> str:
    if not members:
        return "nobody"
    shown = ", ".join(f"<bdi>{safe(m)}</bdi>" for m in members[:12])
    return shown + (f" and {len(members) - 12} more" if len(members) > 12 else "")


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(v)}" for key, v in value.items())
    if isinstance(value, list):
        return " ".join(map(_flat, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
