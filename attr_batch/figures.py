"""The report's pictures: three charts as SVG text, sample sheets as PNG bytes.

Written by hand instead of by a plotting library: the same input gives the same bytes, nothing heavy
is imported, and one string serves the HTML page and MLflow alike. Every SVG stands alone: it has
its own style (light and dark), paper, `<title>` and `<desc>`. A difference is never told by colour
alone: the estimator's value is a filled dot, least squares a hollow diamond on its interval.
"""

from __future__ import annotations

import html
import io
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    rows = sorted(attribution["contributors"], key=lambda r: (-r["value"], r["id"]))
    title = title or f"{visible(attribution['property'])}: value and interval of each contributor"
    gap = attribution["v_full"] - attribution["v_empty"]
    described = (
        f"{len(rows)} contributors from {visible(rows[0]['id'])} ({rows[0]['value']:.4g}) "
        f"to {visible(rows[-1]['id'])} ({rows[-1]['value']:.4g})."
    )
    guide = gap / len(rows) if attribution["semivalue"] == "shapley" else None
    reach = [r[k] for r in rows for k in ("value", "ls_value", "low", "high") if r[k] is not None]
    domain = (min(0.0, *reach), max(0.0, *reach))
    draw = _interval_rows if len(rows) <= MOST_ROWS else _interval_ranks
    return draw(rows, domain, guide, title, described)


def _interval_rows(rows: Any, domain: Any, guide: float | None, title: str, described: str) -> str:
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
            hover += f", least squares {r['ls_value']:.4g} [{r['low']:.4g}, {r['high']:.4g}]"
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


def _svg(height: float, title: str, described: str, marks: Iterable[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {_n(height)}" width="{WIDTH}" height="{_n(height)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" {size}>'
        f"<title>{_safe(title)}</title><desc>{_safe(described)}</desc><style>{_STYLE}</style>"
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
    corners = f"{_n(x - r)},{_n(y)} {_n(x)},{_n(y - r)} {_n(x + r)},{_n(y)} {_n(x)},{_n(y + r)}"
    return f'<polygon class="ls" points="{corners}"/>'


def _cross(x: float, y: float) -> str:
    return _line(x - 5, y - 5, x + 5, y + 5, "cross") + _line(x - 5, y + 5, x + 5, y - 5, "cross")


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return (
        f'<text class="{style}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{_safe(text)}</text>'
    )
