"""The validation's page, pictures and tables: what must stand there, and what never may."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sample_report import HOSTILE
from sample_validation import METHODS, validation
from test_report import SVG, TEXT, Outline

from attr_batch import figures, validation_report
from attr_batch.document import duration
from attr_batch.evidence import Estimate
from attr_batch.figures import Guide, Point, Row, Series
from attr_batch.validation_figures import short
from attr_batch.verdict import marks, verdict

NOTHING = Estimate(value=None, low=None, high=None)


def text_of(page: str) -> str:
    return " ".join(Outline(page).text)


@pytest.mark.parametrize("n", [2, 10, 258])
def test_page_is_well_formed_and_complete(n):
    given = validation(n)
    page = validation_report.page(given)
    outline = Outline(page)
    text = " ".join(outline.text)
    for name in [method[0] for method in METHODS] + given["contributors"]:
        assert name in text
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids)) == 9
    assert {f"#{key}" for key in ids} == {a["href"] for tag, a in outline.tags if tag == "a"}
    assert "nan" not in page.lower().replace("provenance", "")
    assert "None" not in text


def test_page_fetches_and_runs_nothing():
    outline = Outline(validation_report.page(validation(ids=list(HOSTILE))))
    assert not {"script", "link", "iframe", "object", "base", "form"} & {t for t, _ in outline.tags}
    for _, attributes in outline.tags:
        assert not [key for key in attributes if key.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")


def test_same_input_gives_the_same_bytes():
    for show in (validation_report.page, validation_report.table):
        assert show(validation(seed=3)) == show(validation(seed=3))


def named(names: list[str]):
    """A validation in which every text from outside is one of six given names."""
    given = validation(4, ids=names[:4])
    given["job"] = given["oracle"] = names[4]
    given["provenance"] = {names[4]: names[5]}
    given["seconds"] = dict.fromkeys(names[:2], 1.0)
    for prop in given["properties"]:
        prop["title"] = prop["unit"] = names[5]
        for method, name in zip(prop["methods"], names, strict=False):
            method["name"] = method["counterfactual"] = name
        for row in prop["removal"]:
            row["method"] = names[0]
        for row in prop["budget"]:
            row["estimator"] = names[1]
        for row in prop["fidelity"]:
            row["counterfactual"] = names[2]
        renamed = dict(zip([o["name"] for o in prop["oracle"]], names, strict=False))
        for oracle in prop["oracle"]:
            oracle["name"] = renamed[oracle["name"]]
        for method in prop["methods"]:
            method["lds"] = {renamed[key]: score for key, score in method["lds"].items()}
            method["lead"] = {renamed[key]: lead for key, lead in method["lead"].items()}
    return given


PLAIN = Outline(validation_report.page(named(["a", "b", "c", "d", "e", "f"])))


# No shrinking: an example takes a page, and a failure would take minutes to be told.
@settings(max_examples=12, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(st.lists(TEXT, min_size=6, max_size=6, unique=True))
def test_any_name_is_only_text(names):
    given = named(names)
    page = validation_report.page(given)
    page.encode("utf-8")
    kinds = [tag for tag, _ in Outline(page).tags if tag not in ("span", "text", "line", "tspan")]
    assert set(kinds) == {tag for tag, _ in PLAIN.tags} - {"span", "text", "line"}
    for svg in validation_report.figures(given).values():
        ET.fromstring(svg)
    for line in validation_report.table(given).split("\n"):
        assert figures.cells(line) <= 80
        assert all(c.isprintable() or c in " \u200d\u200b" or ord(c) > 127 for c in line)


def numbers_in(value) -> list[float]:
    match value:
        case dict():
            return [x for v in value.values() for x in numbers_in(v)]
        case list():
            return [x for v in value for x in numbers_in(v)]
        case bool() | None:
            return []
        case int() | float():
            return [float(value)]
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", value)]


NUMBER = r"[−-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"


def printed(x: float) -> set[str]:
    """Every way in which a figure of the JSON may be printed."""
    ways = {figures.number(x, digits) for digits in range(6)} | {f"{x:,.0f}"}
    ways |= {figures.number(100 * x, 1), f"{100 * x:g}"}
    return {number for way in [*ways, duration(x)] for number in re.findall(NUMBER, way)}


def test_every_number_printed_is_in_the_json():
    given = json.loads(json.dumps(validation(ids=list("abcdefghij"), seed=5)))
    allowed = {way for x in numbers_in(given) for way in printed(abs(x)) | printed(x)}
    allowed |= printed(sum(given["seconds"].values()))
    allowed |= {"95", "19", "20", "0", "1"}  # what the explanations name
    allowed |= {str(rank) for rank in range(1, len(METHODS) + 1)}
    page = validation_report.page(given)
    page = re.sub(r"<svg.*?</svg>|<style>.*?</style>|<ul>.*?</ul>", "", page, flags=re.DOTALL)
    for text in (text_of(page), validation_report.table(given)):
        found = re.findall(NUMBER, text.replace("5e" * 32, "").replace("b4" * 32, ""))
        assert len(found) > 100
        assert set(found) <= allowed


def test_comparison_prints_each_score_beside_its_method():
    given = validation()
    first = given["properties"][0]
    lines = validation_report.table(given).split("\n")
    page = validation_report.page(given)
    for method in first["methods"]:
        score = method["lds"]["alpha=0.5"]
        line = next(line for line in lines if line.startswith(short(method["name"])[:16]))
        shown = [figures.number(score[key], 2) for key in ("value", "low", "high")]
        assert re.findall(NUMBER, line.removeprefix(short(method["name"])))[:3] == shown
        row = page[page.index(f"<bdi>{method['name']}</bdi>") :]
        assert f'class="val">{shown[0]}<small>{shown[1]} … {shown[2]}</small>' in row[:300]


def test_baselines_stand_with_their_rank_among_all():
    given = validation()
    methods = given["properties"][0]["methods"]
    order = sorted(methods, key=lambda m: -m["lds"]["alpha=0.5"]["value"])
    page = validation_report.page(given)
    rows = re.findall(r'class="rank">(\d+)</td><th[^>]*><bdi>([^<]*)', page)[: len(methods)]
    assert {name: int(rank) for rank, name in rows} == {
        m["name"]: rank for rank, m in enumerate(order, 1)
    }
    families = [next(m["family"] for m in methods if m["name"] == name) for _, name in rows]
    assert families == sorted(families, key=["estimator", "counterfactual", "baseline"].index)


# -- what is said ---------------------------------------------------------------------------------


def judged(**changed):
    """A sound validation's headline property, changed."""
    prop = validation()["properties"][0]
    for method in prop["methods"]:
        method["collapsed"] = 0
        method["lead"] = {"alpha=0.5": Estimate(value=0.3, low=0.1, high=0.5)}
    prop["methods"][0]["lds"]["alpha=0.5"] = Estimate(value=0.8, low=0.7, high=0.9)
    for name, value in changed.items():
        prop["oracle"][0][name] = value
    return prop


def test_a_sound_validation_is_marked_nowhere():
    prop = judged()
    assert marks(prop) == []
    assert verdict(prop).startswith(
        "ridge predicts what retrained models score: LDS 0.80 (0.70 … 0.90) at alpha=0.5; "
    )
    assert verdict(prop).endswith("It beats every baseline")


@pytest.mark.parametrize(
    ("value", "low", "verb", "mark"),
    [
        (0.6, 0.3, "predicts", None),
        (0.6, 0.1, "may predict", "Not safely above chance"),
        (0.15, 0.1, "does not predict", "No better than chance"),
        (0.6, None, "may predict", None),
    ],
)
def test_the_verdict_compares_with_chance(value, low, verb, mark):
    prop = judged(chance95=0.2)
    prop["methods"][0]["lds"]["alpha=0.5"] = Estimate(value=value, low=low, high=0.9)
    assert verdict(prop).startswith(f"ridge {verb} what")
    assert [what for what, _ in marks(prop)] == ([mark] if mark else [])


@pytest.mark.parametrize(
    ("lead", "said"),
    [
        (Estimate(value=-0.2, low=-0.3, high=-0.1), "Better than it: trak mean (baseline)"),
        (Estimate(value=0.1, low=-0.1, high=0.3), "As good, as far as one can tell: trak mean"),
        (Estimate(value=0.0, low=0.0, high=0.0), "As good, as far as one can tell: trak mean"),
        (Estimate(value=-0.1, low=None, high=None), "As good, as far as one can tell: trak mean"),
        (Estimate(value=0.1, low=0.01, high=0.3), "It beats every baseline"),
        (NOTHING, "It beats every baseline that could be judged"),
    ],
)
def test_baselines_as_good_are_named(lead, said):
    prop = judged()
    rival = next(m for m in prop["methods"] if m["name"] == "trak mean")
    rival["lead"] = {"alpha=0.5": lead}
    assert said in verdict(prop)
    named = [why for what, why in marks(prop) if what == "Baselines do as well"]
    assert named == ([] if "beats" in said else ["trak mean, as far as one can tell"])
    assert ("beats every" in verdict(prop)) == ("beats" in said)


@pytest.mark.parametrize(
    ("spoil", "mark", "why"),
    [
        (lambda p: p["methods"][3].update(collapsed=2), "Collapsed", "reference in 2 of 3 designs"),
        (lambda p: p["methods"][0].update(designs=1), "One design", "another draw"),
        (lambda p: p["oracle"][0].update(ceiling=NOTHING), "No ceiling", "second seed"),
        (lambda p: p["oracle"][0].update(subsets=60), "Not all retrained", "60 of 100"),
        (
            lambda p: p["oracle"][0].update(additivity=Estimate(value=0.1, low=0.0, high=0.2)),
            "No attribution can be judged",
            "additive model",
        ),
    ],
)
def test_every_reservation_is_marked_and_printed(spoil, mark, why):
    given = validation()
    given["properties"] = [judged()]
    spoil(given["properties"][0])
    ((what, explained),) = marks(given["properties"][0])
    assert mark in what
    assert why in explained
    assert f"! {what}" in validation_report.table(given)
    assert f"<b>{what}:</b>" in validation_report.page(given)


def test_incomplete_is_on_top_and_in_the_title():
    page = validation_report.page(validation(complete=False))
    assert "<title>INCOMPLETE: " in page
    assert "137 of 412 evaluations are done" in page[: page.index("<h1>")]
    assert "137 of 412 evaluations, incomplete" in validation_report.table(
        validation(complete=False)
    )
    assert "incomplete" not in validation_report.page(validation()).lower()


# -- what is missing ------------------------------------------------------------------------------


def holes():
    """Yield validations that lack one thing each, by what they lack."""
    whole = validation(4)

    def without(name, change):
        given = copy.deepcopy(whole)
        for prop in given["properties"]:
            change(prop)
        return pytest.param(given, id=name)

    for name in ("oracle", "methods", "fidelity", "budget", "removal"):
        yield without(name, lambda p, name=name: p.update({name: []}))
    for name in ("reference", "reference_low", "reference_reliability", "v_full"):
        yield without(name, lambda p, name=name: p.update({name: None}))

    def unscored(p):
        for m in p["methods"]:
            m.update(lds={}, lead={}, agreement=NOTHING, seconds=None, values=[])
        for f in p["fidelity"]:
            f.update(pearson=NOTHING, spearman=None, rmse=None, bias=None, seconds=None)
        for b in p["budget"]:
            b.update(lds=None, agreement=None)
        for o in p["oracle"]:
            o.update(ceiling=NOTHING, additivity=NOTHING, floor=None, subsets=0)

    yield without("scores", unscored)
    for name, value in (("properties", []), ("seconds", {}), ("provenance", {})):
        given = copy.deepcopy(whole)
        given.update({name: value})
        yield pytest.param(given, id=name)


def test_a_size_with_hardly_any_coalitions_is_named():
    given = validation()
    for prop in given["properties"]:
        prop["oracle"][0].update(planned=2, subsets=2)
    assert "there are only 2 coalitions of this size" in validation_report.table(given)


@pytest.mark.parametrize("given", list(holes()))
def test_every_part_may_be_missing(given):
    page = validation_report.page(given)
    Outline(page)
    for text in (
        text_of(page),
        validation_report.table(given),
        *validation_report.figures(given).values(),
    ):
        assert "None" not in text
        assert not re.search(r"\bnan\b|\binf\b", text)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)


# -- pictures -------------------------------------------------------------------------------------


def test_figures_stand_alone_and_are_those_of_the_page():
    given = validation()
    drawn = validation_report.figures(given)
    assert len(drawn) == 16
    page = validation_report.page(given)
    for name, svg in drawn.items():
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        assert root.findtext(f"{SVG}title")
        assert root.findtext(f"{SVG}desc")
        assert svg in page, name


def test_scores_are_drawn_where_the_numbers_are():
    rows = [Row(f"m{i}", x, x - 0.1, x + 0.05) for i, x in enumerate((0.9, 0.4, -0.3, 0.0))]
    root = ET.fromstring(figures.dots_svg([("all", rows)], "t", "LDS", [Guide("ceiling", 0.95)]))
    dots = [float(dot.attrib["cx"]) for dot in root.iter(f"{SVG}circle")]
    assert np.corrcoef(dots, [row.value for row in rows])[0, 1] > 0.99999
    guide = next(x for x in root.iter(f"{SVG}line") if x.get("class") == "guide")
    per_unit = (dots[0] - dots[3]) / 0.9
    assert float(guide.attrib["x1"]) == pytest.approx(dots[3] + 0.95 * per_unit, abs=0.02)


@pytest.mark.parametrize("log_x", [False, True])
def test_lines_are_drawn_where_the_numbers_are(log_x):
    points = [Point(x, 0.1 * x) for x in (1, 2, 4, 8)]
    series = [Series("one", points), Series("two", [Point(4, 0.4)])]
    svg = figures.line_svg(series, "t", "steps", "v", [Guide("top", 0.8)], log_x=log_x)
    path = next(ET.fromstring(svg).iter(f"{SVG}polyline")).attrib["points"]
    across, up = np.array([pair.split(",") for pair in path.split()], dtype=float).T
    x = [math.log(p.x) if log_x else p.x for p in points]
    assert np.corrcoef(across, x)[0, 1] > 0.99999
    assert np.corrcoef(up, [-p.y for p in points])[0, 1] > 0.99999
    assert "0.8 at 8" in svg


def test_nothing_to_draw_says_so():
    empty = [Series("s", [Point(0.0, 1.0)])]
    assert "nothing was measured" in figures.line_svg(empty, "t", "x", "y", log_x=True)
    assert "nothing was measured" in figures.dots_svg([("none", [])], "t", "x")


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-9, 1e12])
@pytest.mark.parametrize("log_x", [False, True])
def test_a_single_point_can_be_drawn(value, log_x):
    point = Point(abs(value) or 1.0, value, value, value)
    svg = figures.line_svg([Series("s", [point])], "t", "x", "y", log_x=log_x)
    svg += figures.dots_svg([("g", [Row("r", value, value, value)])], "t", "x")
    assert not re.search(r"\bnan\b|\binf\b", svg)


def test_no_two_of_many_series_look_alike():
    assert len({figures._marker(i, 0, 0) for i in range(42)}) == 42


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(30, 250), min_size=1, max_size=14))
def test_labels_keep_apart_in_order_and_inside(heights):
    written = figures._labels([(y, f"n{k}", None) for k, y in enumerate(heights)], 300, 32, 252)
    places = [float(re.findall(r' y="([\d.]+)"', text)[0]) - 4.5 for text in written]
    names = [int(re.findall(r">n(\d+)<", text)[0]) for text in written]
    assert [heights[k] for k in names] == sorted(heights)
    assert all(b - a >= 15 - 0.02 for a, b in pairwise(places))
    assert places[0] >= 32 - 0.02
    assert places[-1] <= 252 + 0.02


@settings(max_examples=200, deadline=None)
@given(st.floats(-6, 6), st.floats(0, 6))
def test_log_ticks_are_few_inside_and_apart(low, decades):
    scale = figures._across([10**low, 10 ** (low + decades)], 60, 320, log=True)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 9
    places = [scale(value) for value, _ in ticks]
    assert places == sorted(places)
    assert all(60 - 0.1 <= place <= 320 + 0.1 for place in places)


def test_the_page_leaves_torch_out():
    code = (
        "import sys, attr_batch.validation_report\n"
        "assert not {'torch', 'scipy', 'mlflow', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
