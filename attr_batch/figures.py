"""The reports' pictures: charts as SVG text, sample sheets as PNG bytes.

Written by hand instead of by a plotting library: the same input gives the same bytes, nothing heavy
is imported, and one string serves the HTML page and MLflow alike. Every SVG stands alone: it has
its own style (light and dark), paper, `<title>` and `<desc>`. A difference is never told by colour
alone: the estimator's value is a filled dot, least squares a hollow diamond on its interval; series
differ in marker, dash and colour and carry their names.
"""

from __future__ import annotations

import html
import io
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from attr_batch.evidence import PropertyEvidence

if TYPE_CHECKING:
    import numpy as np

WIDTH = 440  # of every chart's view box: 13-unit letters are still 10 px on a 360 px screen
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44
MOST_ROWS = 40  # above this many contributors the interval chart drops the names

_STYLE = """
.chart{--paper:#fffdf8;--ink:#1c1b19;--soft:#6b675f;--rule:#ddd6c8;--value:#1f5c8a;--ls:#b04f12;
font:13px system-ui,sans-serif;font-variant-numeric:tabular-nums}
@media screen and (prefers-color-scheme:dark){.chart{--paper:#17181a;--ink:#e9e6df;--soft:#a09b91;
--rule:#37383b;--value:#86bfe8;--ls:#f0a66c}}
.chart .paper{fill:var(--paper)}.chart text{fill:var(--ink)}.chart .soft{fill:var(--soft)}
.chart .rule{stroke:var(--rule)}.chart .zero{stroke:var(--ink)}
.chart .guide{stroke:var(--soft);stroke-dasharray:2 4;fill:none}
.chart .value{fill:var(--value)}.chart .bar{stroke:var(--value);stroke-opacity:.55}
.chart .ls{fill:var(--paper);stroke:var(--ls);stroke-width:1.5}
.chart .whisker{stroke:var(--ls);stroke-width:1.5}
.chart .many{stroke-width:.8;stroke-opacity:.5}.chart .dim{fill-opacity:.5}
.chart .cross{stroke:var(--ink);stroke-width:1.6;fill:none}
"""

# Six inks that stay apart for colour-blind readers; with seven markers no two of 42 series agree.
_INKS = 6
_SERIES_STYLE = """
.chart{--s0:#1f5c8a;--s1:#b04f12;--s2:#00765a;--s3:#8d4a86;--s4:#7d6400;--s5:#1c1b19}
@media screen and (prefers-color-scheme:dark){.chart{--s0:#86bfe8;--s1:#f0a66c;--s2:#5fd0ac;
--s3:#dba0d2;--s4:#dcc15e;--s5:#e9e6df}}
.chart .series{stroke:var(--ink);stroke-width:1.5}
.chart .path{fill:none;stroke-linejoin:round}.chart .stem{stroke-width:1.2;stroke-opacity:.6}
.chart .hollow{fill:var(--paper)}.chart .stroke{fill:none}
.chart .d1{stroke-dasharray:7 3}.chart .d2{stroke-dasharray:2 3}.chart .d3{stroke-dasharray:9 3 2 3}
.chart .head{fill:var(--soft);font-style:italic}.chart .strong{font-weight:600}
""" + "".join(
    f".chart .s{i}{{stroke:var(--s{i})}}.chart .s{i}.full{{fill:var(--s{i})}}\n"
    for i in range(_INKS)
)
DIRECT = 16  # names up to this many columns stand beside their lines, longer ones in a legend
_LETTER = 7.0  # width of a letter, to keep labels apart

_HIDDEN = {"Cc", "Cs", "Co", "Cn", "Zl", "Zp"}
_BIDI = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(name: str) -> str:
    """Return a contributor's name as it may be shown anywhere, still to be escaped for HTML.

    Control characters (terminal escapes, what XML forbids) and direction overrides become U+FFFD;
    a name without a visible character says so.
    """
    shown = "".join(
        "\ufffd" if unicodedata.category(c) in _HIDDEN or c in _BIDI else c for c in name
    )
    blank = all(c.isspace() or unicodedata.category(c) in {"Cf", "Mn"} for c in shown)
    return "(blank name)" if blank else shown


def cells(text: str) -> int:
    """Return how many columns `text` takes in a terminal: wide characters 2, combining ones 0."""
    return sum(_cells(c) for c in text)


def _cells(c: str) -> int:
    if unicodedata.category(c) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(c) in {"W", "F"} else 1


def fit(text: str, width: int) -> str:
    """Return `text` cut to `width` terminal columns, with an ellipsis where something was cut."""
    if cells(text) <= width:
        return text
    kept, used = [], 0
    for c in text:
        used += _cells(c)
        if used > width - 1:
            break
        kept.append(c)
    return "".join(kept).rstrip() + "…"


def decimals(rows: Sequence[dict[str, Any]]) -> int:
    """Return the decimals that show two digits of the median half-width, or three of the values."""
    widths = sorted((r["high"] - r["low"]) / 2 for r in rows if r["low"] is not None)
    width = widths[len(widths) // 2] if widths else 0.0
    scale = width or max((abs(r["value"]) for r in rows), default=0.0) / 10
    return 3 if scale <= 0 else 1 - math.floor(math.log10(scale))


def number(x: float | None, digits: int) -> str:
    """Return `x` with `digits` decimals and a true minus sign; a dash where there is no number."""
    if x is None:
        return "–"
    extreme = digits > 6 or digits < -4
    text = f"{x:.3g}" if extreme else f"{x:.{max(digits, 0)}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def interval_svg(attribution: dict[str, Any], title: str | None = None) -> str:
    """Draw every contributor's value and 95 % interval, sorted, with the zero line.

    `attribution` is one object of attribution.json. The interval is that of the least-squares
    value, so the whisker carries the diamond; where it is null only the points are drawn. Up to
    `MOST_ROWS` contributors have a named row each, more stand side by side by rank.
    """
    rows = attribution["contributors"]
    title = title or f"{visible(attribution['property'])}: value and interval of each contributor"
    gap = attribution["v_full"] - attribution["v_empty"]
    guide = gap / len(rows) if attribution["semivalue"] == "shapley" else None
    return _intervals(rows, guide, title, "least squares")


def reference_svg(rows: Sequence[dict[str, Any]], title: str, reference: str) -> str:
    """Draw values beside those of a reference, which carry the interval, sorted, with zero.

    A row holds `id`, `value` and, or None, `ls_value`, `low`, `high` of the reference. The guide
    is the equal split of the values' sum.
    """
    return _intervals(rows, sum(r["value"] for r in rows) / len(rows), title, reference)


def _intervals(
    rows: Sequence[dict[str, Any]], guide: float | None, title: str, reference: str
) -> str:
    rows = sorted(rows, key=lambda r: (-r["value"], r["id"]))
    described = (
        f"{len(rows)} contributors from {visible(rows[0]['id'])} ({rows[0]['value']:.4g}) "
        f"to {visible(rows[-1]['id'])} ({rows[-1]['value']:.4g})."
    )
    reach = [r[k] for r in rows for k in ("value", "ls_value", "low", "high") if r[k] is not None]
    domain = (min(0.0, *reach), max(0.0, *reach))
    if len(rows) > MOST_ROWS:
        return _interval_ranks(rows, domain, guide, title, described)
    return _interval_rows(rows, domain, guide, title, described, reference)


def _interval_rows(
    rows: Any, domain: Any, guide: float | None, title: str, described: str, reference: str
) -> str:
    step, left = 24, 132
    foot = TOP + 20 + step * len(rows)
    x = _Scale.over(domain, left, WIDTH - RIGHT)
    marks = [_axis_x(x, TOP + 20, foot)]
    if guide is not None:
        at = x(guide)
        marks.append(_line(at, TOP + 14, at, foot, "guide"))
        inside = min(max(at, left), WIDTH - RIGHT - 30)  # half the label's width from the edge
        marks.append(_text(inside, TOP + 8, "equal split", "soft", anchor="middle"))
    for i, r in enumerate(rows):
        y = TOP + 20 + step * (i + 0.5)
        hover = f"{visible(r['id'])}: {r['value']:.4g}"
        points = []
        if r["low"] is not None:
            hover += f", {reference} {r['ls_value']:.4g} [{r['low']:.4g}, {r['high']:.4g}]"
            low, high = x(r["low"]), x(r["high"])
            points.append(_line(low, y, high, y, "whisker"))
            points += [_line(end, y - 4, end, y + 4, "whisker") for end in (low, high)]
        if r["ls_value"] is not None:
            points.append(_diamond(x(r["ls_value"]), y, 5))
        points.append(_dot(x(r["value"]), y, 4, "value"))
        name = _text(left - 10, y + 4.5, fit(visible(r["id"]), 17), "", anchor="end")
        marks.append(f"<g><title>{_safe(hover)}</title>{name}{''.join(points)}</g>")
    return _svg(foot + BOTTOM - 14, title, described, marks)


def _interval_ranks(rows: Any, domain: Any, guide: float | None, title: str, described: str) -> str:
    foot = 300 - BOTTOM
    x = _Scale.over((0.5, len(rows) + 0.5), LEFT, WIDTH - RIGHT, whole=True)
    y = _Scale.over(domain, foot, TOP)
    marks = [_axis_x(x, TOP, foot, "rank by value"), _axis_y(y, LEFT, WIDTH - RIGHT)]
    if guide is not None:
        marks.append(_line(LEFT, y(guide), WIDTH - RIGHT, y(guide), "guide"))
    for rank, r in enumerate(rows, 1):
        at = x(rank)
        hover = f"{rank}. {visible(r['id'])}: {r['value']:.4g}"
        whisker = ""
        if r["low"] is not None:
            hover += f" [{r['low']:.4g}, {r['high']:.4g}]"
            whisker = _line(at, y(r["low"]), at, y(r["high"]), "whisker many")
        dot = _dot(at, y(r["value"]), 1.5, "value")
        marks.append(f"<g><title>{_safe(hover)}</title>{whisker}{dot}</g>")
    return _svg(300, title, described, marks)


def utility_svg(
    attribution: dict[str, Any], evidence: PropertyEvidence, title: str | None = None
) -> str:
    """Draw v(S) against the size of S: design filled, holdout hollow, endpoints as bars.

    Each replicate of an endpoint is a short bar; the endpoints as the paper publishes them (the
    unpruned trained model, the untrained network) are crosses.
    """
    n = len(attribution["contributors"])
    title = title or f"{evidence['title']}: v(S) against the number of contributors in S"
    paper = evidence.get("paper") or {"v_full": None, "v_empty": None}
    crosses = [(0, paper["v_empty"]), (n, paper["v_full"])]
    crosses = [(size, value) for size, value in crosses if value is not None]
    utilities = evidence["utilities"]
    reach = [u["value"] for u in utilities] + [value for _, value in crosses]
    reach += [attribution["v_empty"], attribution["v_full"]]
    foot = 300 - BOTTOM
    x = _Scale.over((-0.4 - n / 50, n + 0.4 + n / 50), LEFT, WIDTH - RIGHT, whole=True)
    y = _Scale.over((min(reach), max(reach)), foot, TOP, pad=0.05)
    marks = [
        _axis_x(x, TOP, foot, "contributors in the coalition"),
        _axis_y(y, LEFT, WIDTH - RIGHT),
    ]
    # Holdout last: there are few of them, and they must not be covered.
    for role in ("design", "holdout", "endpoint"):
        for u in (u for u in utilities if u["role"] == role):
            at, up = x(u["size"]), y(u["value"])
            if role == "design":
                mark = _dot(at, up, 3.2, "value dim")
            elif role == "holdout":
                mark = _dot(at, up, 4, "ls")
            else:
                mark = _line(at - 9, up, at + 9, up, "cross")
            members = ", ".join(visible(m) for m in u["members"][:12]) or "nobody"
            more = f" and {u['size'] - 12} more" if u["size"] > 12 else ""
            hover = _safe(f"{u['value']:.4g}: {members}{more}")
            marks.append(f"<g><title>{hover}</title>{mark}</g>")
    marks += [_cross(x(size), y(value)) for size, value in crosses]
    counts = {role: sum(u["role"] == role for u in utilities) for role in ("design", "holdout")}
    described = (
        f"{counts['design']} design and {counts['holdout']} held-out coalitions; "
        f"v(empty) {attribution['v_empty']:.4g}, v(full) {attribution['v_full']:.4g}."
    )
    return _svg(300, title, described, marks)


def holdout_svg(
    attribution: dict[str, Any], evidence: PropertyEvidence, title: str | None = None
) -> str:
    """Draw observed against predicted v(S) of the held-out coalitions, with the line of equality.

    A bar is one standard error of the measurement either way. Rows without a prediction are left
    out; with none left the chart says so.
    """
    title = title or f"{evidence['title']}: predicted and observed v(S), held-out coalitions"
    points = [
        (p, u["value"], u["stderr"] or 0.0, u["members"])
        for u in evidence["utilities"]
        if u["role"] == "holdout" and (p := u.get("predicted")) is not None
    ]
    if not points:
        nothing = _text(WIDTH / 2, 40, "no held-out coalition was predicted", "soft", "middle")
        return _svg(70, title, "Nothing to show.", [nothing])
    reach = [q for p, v, e, _ in points for q in (p, v - e, v + e)]
    domain, top, foot, end = (min(reach), max(reach)), TOP + 16, 360 - BOTTOM, WIDTH - RIGHT
    x = _Scale.over(domain, LEFT, end, pad=0.04)
    y = _Scale.over(domain, foot, top, pad=0.04)
    marks = [_axis_x(x, top, foot, "predicted from the values"), _axis_y(y, LEFT, end)]
    marks.append(_line(LEFT, foot, end, top, "guide"))
    marks.append(_text(4, TOP, "observed", "soft"))
    for predicted, value, stderr, members in points:
        who = ", ".join(visible(m) for m in members[:12])
        bar = _line(x(predicted), y(value - stderr), x(predicted), y(value + stderr), "bar")
        dot = _dot(x(predicted), y(value), 4, "value")
        hover = _safe(f"predicted {predicted:.4g}, observed {value:.4g}: {who}")
        marks.append(f"<g><title>{hover}</title>{bar}{dot}</g>")
    check = attribution["holdout"]
    rho = check["spearman"] if check else None
    described = f"{len(points)} coalitions" + (f", Spearman {rho:.2f}." if rho is not None else ".")
    return _svg(360, title, described, marks)


class Point(NamedTuple):
    """A place on a chart, with the ends of its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """Points that belong together, from left to right."""

    name: str
    points: Sequence[Point]


class Guide(NamedTuple):
    """A value to compare with: a dotted line across the chart."""

    name: str
    at: float


def line_svg(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    guides: Sequence[Guide] = (),
    *,
    log_x: bool = False,
) -> str:
    """Draw series as lines with markers, with interval bars and guides where there are any.

    Series differ in marker, dash and colour. Short names stand beside the right ends, longer ones
    in a legend below. With `log_x` points at or below zero are left out; with no point left the
    chart says so.
    """
    series = [Series(s.name, [p for p in s.points if p.x > 0 or not log_x]) for s in series]
    points = [p for s in series for p in s.points]
    if not points:
        return _nothing(title)
    direct = all(cells(s.name) <= DIRECT for s in series)
    beside = [g.name for g in guides] + ([s.name for s in series] if direct else [])
    margin = 26 + _LETTER * max(map(cells, beside)) if beside else RIGHT
    top, foot, end = TOP + 18, TOP + 238, WIDTH - margin
    reach = [q for p in points for q in (p.y, p.low, p.high) if q is not None]
    reach += [g.at for g in guides]
    x = _across([p.x for p in points], LEFT, end, log_x)
    y = _Scale.over((min(reach), max(reach)), foot, top, pad=0.05)
    marks = [_axis_x(x, top, foot, x_label), _axis_y(y, LEFT, end), _text(4, TOP, y_label, "soft")]
    marks += [_line(LEFT, y(g.at), end, y(g.at), "guide") for g in guides]
    dodge = 3.0 if any(p.low is not None for p in points) else 0.0
    # The first series last: it is the one the page is about, and must not be covered.
    for i in reversed(range(len(series))):
        marks.append(_series(i, series[i], x, y, dodge * (i - (len(series) - 1) / 2)))
    labels = [(y(g.at), g.name, None) for g in guides]
    if direct:
        labels += [(y(s.points[-1].y), s.name, i) for i, s in enumerate(series) if s.points]
    marks += _labels(labels, end + 12, top, foot)
    height = foot + BOTTOM
    if not direct:
        marks += [_legend(i, s.name, height + 10 + 20 * i) for i, s in enumerate(series)]
        height += 10 + 20 * len(series)
    return _svg(height, title, _described(series, guides), marks, _STYLE + _SERIES_STYLE)


def _series(i: int, series: Series, x: _Scale, y: _Scale, shift: float) -> str:
    places = [(x(p.x) + shift, y(p.y)) for p in series.points]
    ink, path = f"series s{i % _INKS}", " ".join(f"{_n(a)},{_n(b)}" for a, b in places)
    marks = [f'<polyline class="{ink} path d{i % 4}" points="{path}"/>'] if len(places) > 1 else []
    for (across, up), p in zip(places, series.points, strict=True):
        hover = f"{visible(series.name)}: {p.y:.4g} at {p.x:.4g}"
        stem = ""
        if p.low is not None and p.high is not None:
            hover += f" [{p.low:.4g}, {p.high:.4g}]"
            stem = _line(across, y(p.low), across, y(p.high), f"{ink} stem")
        mark = _marker(i, across, up)
        marks.append(f"<g><title>{_safe(hover)}</title>{stem}{mark}</g>")
    return "".join(marks)


def _marker(i: int, x: float, y: float) -> str:
    """Return the i-th series' marker: dot, square, triangle, diamond, circle, cross, triangle."""
    ink = f"series s{i % _INKS}"
    match i % 7:
        case 0:
            return _dot(x, y, 4, f"{ink} full")
        case 1:
            return _polygon(
                [(x - 4, y - 4), (x + 4, y - 4), (x + 4, y + 4), (x - 4, y + 4)], f"{ink} hollow"
            )
        case 2:
            return _polygon([(x, y - 5), (x + 5, y + 4), (x - 5, y + 4)], f"{ink} full")
        case 3:
            return _polygon([(x - 5, y), (x, y - 5), (x + 5, y), (x, y + 5)], f"{ink} hollow")
        case 4:
            return _dot(x, y, 4.5, f"{ink} hollow")
        case 5:
            cross = (x - 4, y - 4, x + 4, y + 4), (x - 4, y + 4, x + 4, y - 4)
            return "".join(_line(*ends, f"{ink} stroke") for ends in cross)
        case _:
            return _polygon([(x, y + 5), (x + 5, y - 4), (x - 5, y - 4)], f"{ink} hollow")


def _labels(
    labels: Sequence[tuple[float, str, int | None]], left: float, top: float, foot: float
) -> list[str]:
    """Write (height, name, series or none) in the right margin, moved apart where close."""
    gap, marks = 15.0, []
    labels = sorted(labels, key=lambda label: label[0])
    lowest = foot - gap * (len(labels) - 1)
    at = top - gap
    for height, name, i in labels:
        at = max(at + gap, min(height, lowest))
        lowest += gap
        if i is not None:
            marks.append(_marker(i, left, at))
        name = fit(visible(name), DIRECT + 2)
        marks.append(_text(left + 10, at + 4.5, name, "soft" if i is None else ""))
    return marks


def _legend(i: int, name: str, y: float) -> str:
    rule = _line(10, y, 38, y, f"series s{i % _INKS} path d{i % 4}")
    return f"{rule}{_marker(i, 24, y)}{_text(48, y + 4.5, fit(visible(name), 54), '')}"


def _described(series: Sequence[Series], guides: Sequence[Guide]) -> str:
    lines = [
        f"{visible(s.name)}: " + ", ".join(f"{p.y:.4g} at {p.x:.4g}" for p in s.points) + "."
        for s in series
    ]
    return " ".join([*lines, *(f"{visible(g.name)} {g.at:.4g}." for g in guides)])


class Row(NamedTuple):
    """One row of a dot chart; `strong` sets its name in bold."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    strong: bool = False


def dots_svg(
    groups: Sequence[tuple[str, Sequence[Row]]],
    title: str,
    x_label: str,
    guides: Sequence[Guide] = (),
) -> str:
    """Draw a value and its interval for every row, in named groups, each with a marker of its own.

    Guides run from top to bottom; with no row the chart says so.
    """
    groups = [(name, rows) for name, rows in groups if rows]
    rows = [row for _, members in groups for row in members]
    if not rows:
        return _nothing(title)
    reach = [q for r in rows for q in (r.value, r.low, r.high) if q is not None]
    reach += [0.0, *(g.at for g in guides)]
    step, left = 22, 158
    x = _Scale.over((min(reach), max(reach)), left, WIDTH - RIGHT, pad=0.02)
    over, top = _stacked(guides, x, left)
    foot = top + step * (len(rows) + len(groups)) + 6
    marks = [_axis_x(x, top, foot, x_label), *over]
    marks += [_line(x(g.at), top - 6, x(g.at), foot, "guide") for g in guides]
    y = top + step / 2 + 4
    for i, (heading, members) in enumerate(groups):
        marks.append(_text(4, y + 4.5, visible(heading), "head"))
        for row in members:
            y += step
            marks.append(_row(i, row, x, y, left))
        y += step
    listed = "; ".join(f"{visible(r.name)} {r.value:.4g}" for r in rows)
    named = "; ".join(f"{visible(g.name)} {g.at:.4g}" for g in guides)
    return _svg(foot + BOTTOM, title, f"{listed}. {named}", marks, _STYLE + _SERIES_STYLE)


def _row(i: int, row: Row, x: _Scale, y: float, left: float) -> str:
    hover, stem = f"{visible(row.name)}: {row.value:.4g}", ""
    if row.low is not None and row.high is not None:
        hover += f" [{row.low:.4g}, {row.high:.4g}]"
        low, high = x(row.low), x(row.high)
        ends = (low, y, high, y), (low, y - 3, low, y + 3), (high, y - 3, high, y + 3)
        stem = "".join(_line(*end, f"series s{i % _INKS} stem") for end in ends)
    name = _text(left - 10, y + 4.5, fit(visible(row.name), 21), "strong" * row.strong, "end")
    return f"<g><title>{_safe(hover)}</title>{name}{stem}{_marker(i, x(row.value), y)}</g>"


def _stacked(guides: Sequence[Guide], x: _Scale, left: float) -> tuple[list[str], float]:
    """Write the guides' names above the chart, on as many lines as they need; return its top."""
    lines: list[float] = []  # where the last name of each line ends
    marks = []
    for g in sorted(guides, key=lambda g: g.at):
        half = _LETTER * cells(g.name) / 2
        at = min(max(x(g.at), left + half), WIDTH - 2 - half)
        line = next((k for k, end in enumerate(lines) if at - half > end + 8), len(lines))
        lines[line : line + 1] = [at + half]
        marks.append(_text(at, TOP + 15 * line, visible(g.name), "soft", "middle"))
    return marks, TOP + 15 * len(lines)


def _nothing(title: str) -> str:
    nothing = _text(WIDTH / 2, 40, "nothing was measured yet", "soft", "middle")
    return _svg(70, title, "Nothing to show.", [nothing])


def grid_png(images: np.ndarray, columns: int = 8, scale: int = 3) -> bytes:
    """Return uint8 `images` (count, channels 1 or 3, height, width) as one PNG sheet.

    Pixels are repeated `scale` times, never interpolated; a sheet keeps one pixel between images.
    """
    import numpy as np
    from PIL import Image

    count, channels, height, width = images.shape
    if images.dtype != np.uint8 or channels not in (1, 3) or not count:
        raise ValueError(f"wanted uint8 (count, 1 or 3, h, w), got {images.dtype} {images.shape}")
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 128, np.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * (height + 1), k % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    file = io.BytesIO()
    Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet).save(file, "PNG", optimize=True)
    return file.getvalue()


@dataclass(frozen=True)
class _Scale:
    """A linear map from [low, high] to [start, end], with round ticks."""

    low: float
    high: float
    start: float
    end: float
    whole: bool = False

    @classmethod
    def over(
        cls, domain: tuple[float, float], start: float, end: float, *, pad: float = 0.0, whole=False
    ) -> _Scale:
        low, high = domain
        if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        margin = pad * (high - low)
        return cls(low - margin, high + margin, start, end, whole)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return about six (value, label) at multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        if self.whole:
            step = max(1.0, step)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        digits = -math.floor(math.log10(step) + 1e-9)
        return [(k * step, number(k * step, digits)) for k in range(first, last + 1)]


@dataclass(frozen=True)
class _LogScale(_Scale):
    """A logarithmic map; `low` and `high` are decimal logarithms."""

    def __call__(self, value: float) -> float:
        return super().__call__(math.log10(value))

    def ticks(self) -> list[tuple[float, str]]:
        """Return (value, label) at round numbers whose labels do not touch."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for mantissas in ((1,), (1, 2, 5), range(1, 10)):
            values = [m * 10.0**k for k in powers for m in mantissas]
            inside = [v for v in values if self.low <= math.log10(v) + 1e-9 <= self.high + 2e-9]
            if len(inside) >= 3:
                break
        else:  # less than a factor of two or so: as on a linear axis
            linear = _Scale.over((10**self.low, 10**self.high), self.start, self.end)
            return linear.ticks()
        kept: list[tuple[float, str]] = []
        for v in inside:
            if not kept or self(v) - self(kept[-1][0]) >= 34:
                kept.append((v, number(v, -math.floor(math.log10(v) + 1e-9))))
        return kept


def _across(values: Sequence[float], start: float, end: float, log: bool) -> _Scale:
    """Return a horizontal scale that keeps markers off the frame."""
    if not log:
        return _Scale.over((min(values), max(values)), start, end, pad=0.05)
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low < 1e-9:
        low, high = low - 0.3, high + 0.3
    return _LogScale.over((low, high), start, end, pad=0.05)


def _axis_x(x: _Scale, top: float, foot: float, label: str = "") -> str:
    marks = []
    for value, name in x.ticks():
        style = "zero" if value == 0 and not x.whole else "rule"
        marks.append(_line(x(value), top, x(value), foot, style))
        marks.append(_text(x(value), foot + 16, name, "soft", "middle"))
    if label:
        marks.append(_text((x.start + x.end) / 2, foot + 36, label, "soft", "middle"))
    return "".join(marks)


def _axis_y(y: _Scale, left: float, right: float) -> str:
    marks = []
    for value, name in y.ticks():
        marks.append(_line(left, y(value), right, y(value), "zero" if value == 0 else "rule"))
        marks.append(_text(left - 8, y(value) + 4.5, name, "soft", "end"))
    return "".join(marks)


def _svg(
    height: float, title: str, described: str, marks: Iterable[str], style: str = _STYLE
) -> str:
    size = f'viewBox="0 0 {WIDTH} {_n(height)}" width="{WIDTH}" height="{_n(height)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" {size}>'
        f"<title>{_safe(visible(title))}</title><desc>{_safe(described)}</desc><style>{style}</style>"
        f'<rect class="paper" width="100%" height="100%"/>{"".join(marks)}</svg>'
    )


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def _n(x: float) -> str:
    return f"{x:.2f}".rstrip("0").rstrip(".")


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _dot(x: float, y: float, r: float, style: str) -> str:
    return f'<circle class="{style}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}"/>'


def _diamond(x: float, y: float, r: float) -> str:
    return _polygon([(x - r, y), (x, y - r), (x + r, y), (x, y + r)], "ls")


def _polygon(corners: Sequence[tuple[float, float]], style: str) -> str:
    points = " ".join(f"{_n(x)},{_n(y)}" for x, y in corners)
    return f'<polygon class="{style}" points="{points}"/>'


def _cross(x: float, y: float) -> str:
    return _line(x - 5, y - 5, x + 5, y + 5, "cross") + _line(x - 5, y + 5, x + 5, y - 5, "cross")


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return (
        f'<text class="{style}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{_safe(text)}</text>'
    )
