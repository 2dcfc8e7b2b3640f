"""The page and the table: what must stand there, what must never, and the same bytes every time."""

import base64
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_report import HOSTILE, job, names

from attr_batch import cli, figures, report

VOID = {"meta", "img", "br", "hr", "line", "rect", "circle", "polygon"}
SVG = "{http://www.w3.org/2000/svg}"


class Outline(HTMLParser):
    """Reads a page strictly: every tag closed in order; keeps tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def first(attribution):
    return report.headline(attribution)


@pytest.mark.parametrize("n", [2, 10, 41, 61, 258])
def test_page_is_well_formed_and_complete(n):
    page = report.page(*job(n, 3 * n))
    outline = Outline(page)
    text = " ".join(outline.text)
    for name in names(n):
        assert name in text
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for tag, a in outline.tags if tag == "a"]
    assert links
    assert {f"#{key}" for key in ids} == set(links)
    assert "Inception Score" in text
    assert "Cluster entropy" in text


def test_page_fetches_and_runs_nothing():
    page = report.page(*job(ids=list(HOSTILE)))
    outline = Outline(page)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {t for t, _ in outline.tags}
    for _, attributes in outline.tags:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/png;base64,"))
    assert "url(" not in page
    assert "@import" not in page


def test_same_input_gives_the_same_bytes():
    assert report.page(*job(ids=list(HOSTILE))) == report.page(*job(ids=list(HOSTILE)))


TEXT = st.text(st.characters(exclude_categories=()), max_size=40)  # lone surrogates too


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=6, unique=True))
def test_any_name_is_only_text(ids):
    page = report.page(*job(ids=ids, pairs=6))
    page.encode("utf-8")
    count = len(Outline(page).tags)
    assert count == len(Outline(report.page(*job(len(ids), 6))).tags)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)
    for line in report.table(first(job(ids=ids, pairs=6)[0])).split("\n"):
        assert all(c.isprintable() or c in " \u200d\u200b" or ord(c) > 127 for c in line)


def test_table_fits_a_terminal_and_cannot_steer_it():
    text = report.table(first(job(ids=list(HOSTILE), pairs=15)[0]))
    assert max(map(figures.cells, text.split("\n"))) <= 80
    assert "\x1b" not in text
    assert "\u202e" not in text
    lines = text.split("\n")
    dots = {figures.cells(line[: line.index(" … ")]) for line in lines if " … " in line}
    assert len(dots) == 1  # wide, combining and right-to-left names leave the columns aligned


def test_table_prints_the_numbers_and_the_check():
    attribution = first(job()[0])
    text = report.table(attribution)
    best = max(attribution["contributors"], key=lambda c: c["value"])
    line = next(line for line in text.split("\n") if best["id"] in line)
    assert line.split()[0] == "1"
    assert f"{best['value']:.2f}" in line
    assert f"{best['low']:.2f} … {best['high']:.2f}" in line
    assert f"{100 * best['share']:.1f} %" in line
    assert line.endswith(str(best["images"]))
    held = attribution["holdout"]["spearman"]
    said = " ".join(text.split())
    assert f"Spearman {held:.2f} over 8 coalitions, beyond their size 0.68" in said
    assert f"v(empty) {attribution['v_empty']:.2f}" in text


def test_table_of_utilities_from_elsewhere_knows_no_images():
    attribution = first(job()[0])
    attribution["coalitions"].update(planned=None, failed=None)
    for c in attribution["contributors"]:
        c["images"] = None
    text = report.table(attribution)
    assert "None" not in text
    assert "Coalitions missing" not in text


def test_table_shows_given_names():
    attribution = first(job()[0])
    identity = attribution["contributors"][0]["id"]
    text = report.table(attribution, {identity: "Zed"})
    assert "Zed" in text
    assert identity not in text


def sound():
    """An attribution that nothing can be said against."""
    attribution = first(job(10, 40)[0])
    attribution["coalitions"]["failed"] = 0
    assert report.marks(attribution) == []
    return attribution


def spoil(attribution, what):
    people = attribution["contributors"]
    match what:
        case "rough":
            attribution["interval"]["reliable"] = False
        case "Not enough evidence":
            for c in people:
                c["low"] = c["high"] = None
        case "Collapsed":
            attribution["collapsed"] = True
        case "No shares":
            for c in people:
                c["share"] = None
        case "missing":
            attribution["coalitions"]["failed"] = 3
        case "Not checked":
            attribution["holdout"] = None
        case "beat chance":
            attribution["holdout"]["spearman"] = attribution["holdout"]["chance95"]
        case "counting heads":
            attribution["holdout"]["rmse"] = attribution["holdout"]["size_rmse"]
        case "untrained model":
            attribution["v_empty"] = attribution["v_full"]


@pytest.mark.parametrize(
    "what",
    [
        "rough",
        "Not enough evidence",
        "Collapsed",
        "No shares",
        "missing",
        "Not checked",
        "beat chance",
        "counting heads",
        "untrained model",
    ],
)
def test_every_reservation_is_marked_and_printed(what):
    attribution = sound()
    spoil(attribution, what)
    found = report.marks(attribution)
    assert len(found) == 1
    assert what in found[0][0]
    assert found[0][0] in report.table(attribution)
    everything, evidence, cost = job(10, 40)
    everything["attributions"][0] = attribution
    evidence["properties"] = {attribution["property"]: evidence["properties"]["cluster_entropy"]}
    everything["attributions"] = [attribution]
    assert f"<b>{found[0][0]}:</b>" in report.page(everything, evidence, cost)


def test_provisional_is_on_top_and_in_the_title():
    page = report.page(*job(provisional=True))
    assert "<title>PROVISIONAL: " in page
    assert page.index('class="provisional"') < page.index("<h1>")
    assert "provisional" not in report.page(*job()).split("</style>", 1)[1].lower()


def test_both_v_full_and_all_evidence_are_shown():
    everything, evidence, cost = job()
    text = " ".join(Outline(report.page(everything, evidence, cost)).text)
    paper = evidence["properties"]["cluster_entropy"].get("paper")
    assert paper is not None
    assert paper["v_full"] is not None
    assert f"{paper['v_full']:.2f}" in text
    assert f"{first(everything)['v_full']:.2f}" in text
    for needed in (
        first(everything)["spec_digest"],
        evidence["base"],
        evidence["warnings"][0],
        evidence["failures"][0]["what"],
        "heldout_accuracy 0.989",
        "3.95× fewer",
        "2 min 51 s",
        "worker-1",
        "near-copies",
    ):
        assert needed in text, needed


def test_a_job_without_grids_paper_holdout_or_pruning():
    everything, evidence, cost = job(3, 3)
    for attribution in everything["attributions"]:
        attribution["holdout"] = None
        attribution["shrinkage_slope"] = None
    for facts in evidence["properties"].values():
        facts["paper"] = None
        facts["utilities"] = [u for u in facts["utilities"] if u["role"] != "holdout"]
    evidence.update(grids=[], pruning=None, failures=[], warnings=[], instruments=[])
    cost.update(wall_seconds=None, median_seconds_per_coalition=None, machines=[])
    text = " ".join(Outline(report.page(everything, evidence, cost)).text)
    assert "nothing shows that the values predict" in text
    assert "MACs" not in text
    assert "None" not in text


@pytest.mark.parametrize("n", [2, 40, 41, 258])
def test_intervals_are_drawn_where_the_numbers_are(n):
    attribution = first(job(n, 3 * n)[0])
    root = ET.fromstring(report.interval_svg(attribution))
    assert root.get("role") == "img"
    assert root.findtext(f"{SVG}title")
    assert root.findtext(f"{SVG}desc")
    dots = root.findall(f".//{SVG}circle[@class='value']")
    people = sorted(attribution["contributors"], key=lambda c: (-c["value"], c["id"]))
    assert len(dots) == n
    across = [float(d.attrib["cx" if n <= figures.MOST_ROWS else "cy"]) for d in dots]
    values = [c["value"] for c in people]
    assert abs(np.corrcoef(across, values)[0, 1]) > 0.99999
    assert all(0 <= float(d.attrib["cx"]) <= figures.WIDTH for d in dots)


def test_without_intervals_only_points_are_drawn():
    attribution = sound()
    assert report.interval_svg(attribution).count("whisker") > 30
    spoil(attribution, "Not enough evidence")
    assert 'class="whisker' not in report.interval_svg(attribution)


def test_utilities_and_holdout_draw_every_row():
    everything, evidence, _ = job(10, 30)
    facts = evidence["properties"]["cluster_entropy"]
    root = ET.fromstring(report.utility_svg(first(everything), facts))
    assert len(root.findall(f".//{SVG}circle")) == 68
    assert len(root.findall(f".//{SVG}line[@class='cross']")) == 6 + 2 * 2
    root = ET.fromstring(report.holdout_svg(first(everything), facts))
    assert len(root.findall(f".//{SVG}circle")) == 8
    facts["utilities"] = []
    assert "no held-out coalition" in report.holdout_svg(first(everything), facts)


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-9, 1e12])
def test_a_property_that_is_the_same_everywhere_can_be_drawn(value):
    everything, evidence, _ = job(4, 8)
    attribution, facts = first(everything), evidence["properties"]["cluster_entropy"]
    for c in attribution["contributors"]:
        c.update(value=value, ls_value=value, low=value, high=value)
    attribution.update(v_empty=value, v_full=value)
    facts["paper"] = None
    for u in facts["utilities"]:
        u.update(value=value, predicted=value, stderr=None)
    for svg in (
        report.interval_svg(attribution),
        report.utility_svg(attribution, facts),
        report.holdout_svg(attribution, facts),
        report.table(attribution),
    ):
        assert "nan" not in svg
        assert "inf" not in svg


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_ticks_are_few_round_and_inside(low, span):
    scale = figures._Scale.over((low, low + span), 0, 100)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 9
    assert all(-1e-3 <= scale(value) <= 100 + 1e-3 for value, _ in ticks)


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [
        (1.25, 1, "1.2"),
        (-0.5, 2, "−0.50"),
        (-0.001, 2, "0.00"),
        (None, 2, "–"),
        (3e-9, 10, "3e−09"),
    ],
)
def test_numbers(x, digits, text):
    assert figures.number(x, digits) == text


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_keeps_every_pixel(channels):
    images = np.random.default_rng(0).integers(0, 256, (5, channels, 3, 4), dtype=np.uint8)
    sheet = np.asarray(Image.open(io.BytesIO(report.grid_png(images, columns=2, scale=3))))
    sheet = sheet.reshape(*sheet.shape[:2], channels)[::3, ::3]
    assert sheet.shape == (3 * 4 - 1, 2 * 5 - 1, channels)
    for k, image in enumerate(images):
        y, x = k // 2 * 4, k % 2 * 5
        assert np.array_equal(sheet[y : y + 3, x : x + 4], image.transpose(1, 2, 0))
    for wrong in (images.astype(np.float32), images[:0], images.repeat(2, axis=1)):
        with pytest.raises(ValueError, match="uint8"):
            report.grid_png(wrong)


def test_grids_are_in_the_page_as_they_are():
    everything, evidence, cost = job()
    page = report.page(everything, evidence, cost)
    sheets = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert sheets == [grid["png_base64"] for grid in evidence["grids"]]
    width, height = Image.open(io.BytesIO(base64.b64decode(sheets[0]))).size
    assert (width, height) == (3 * (8 * 9 - 1), 3 * (2 * 9 - 1))


def test_the_page_names_no_command_that_does_not_exist():
    for command in re.findall("`attr-batch ([a-z]+)", report.page(*job())):
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main([command, "--help"])


def test_report_leaves_torch_out():
    code = "import sys, attr_batch.report; assert 'torch' not in sys.modules; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ok\n"
