"""The same job period after period: what is new, what a pin keeps, which report is a period's."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import tiny_tree, work_through
from PIL import Image
from sklearn.datasets import load_digits

from attr_batch import cli, outlook, results
from attr_batch.errors import AttrBatchError, LedgerConflict
from attr_batch.job import STATISTICS, Job
from attr_batch.ledger import Ledger, seal
from attr_batch.spec import load

IMAGES = 24  # of each contributor
PROPERTIES = [
    {"kind": "cluster_entropy", "clusters": 4},
    {"kind": "class_share", "label": "3", "classifier": {"epochs": 1, "width": 4}},
]


def folder_of_digits(path: Path, digits: str, negative: str = "") -> None:
    """Write each digit's first images as a contributor's; those of `negative` as negatives."""
    path.mkdir()
    rows = ["file_name,artist,style"]
    intensities, target = load_digits(return_X_y=True)
    for digit in digits:
        for i, image in enumerate(intensities[target == int(digit)][:IMAGES]):
            pixels = 15 * (16 - image if digit in negative else image).reshape(8, 8)
            Image.fromarray(pixels.astype(np.uint8)).save(path / f"{digit}-{i}.png")
            rows.append(f"{digit}-{i}.png,{digit},{digit}")
    (path / "metadata.csv").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """The first period, over: job.yaml, its images and its store; not to be written to."""
    folder = tmp_path_factory.mktemp("first")
    folder_of_digits(folder / "images", "01234")
    folder_of_digits(folder / "changed", "01234", negative="3")
    folder_of_digits(folder / "more", "012345")
    data = {"kind": "image_folder", "path": "images", "contributor": "artist", "label": "style"}
    data |= {"size": 8, "channels": 1}
    tree = tiny_tree(folder / "store", data=data, properties=PROPERTIES)
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))
    job = Job(load(folder / "job.yaml"))
    work_through(job)
    results.publish(job)
    return folder


class Period:
    """A copy of the first period's store, and the commands of the next one."""

    def __init__(self, first: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(first / "store", folder / "store")
        self.spec, self.capsys = first / "job.yaml", capsys
        self.place = f"store={folder / 'store'}"
        self.ledger = Ledger(folder / "store")
        self.past = self.job()

    def job(self, *overrides: str) -> Job:
        job = Job(load(self.spec, [self.place, *overrides]))
        job.check()
        return job

    def call(self, command: str, *arguments: str) -> tuple[int, str, str]:
        code = cli.main([command, str(self.spec), "--set", self.place, *arguments])
        return code, *self.capsys.readouterr()

    @property
    def pins(self) -> list[str]:
        """The first period's base and instruments, as overrides."""
        ids = [self.past.instrument_id(prop) for prop in self.past.spec.properties]
        fitted = [f"properties.{i}.fitted={thing_id}" for i, thing_id in enumerate(ids)]
        return [f"model.base={self.past.dense_id}", *fitted]

    def files(self) -> dict[str, bytes]:
        """Everything in the store but what may change at any time."""
        root = self.ledger.local_root
        files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
        return {name: p.read_bytes() for name, p in files.items() if not name.startswith("work/")}


@pytest.fixture
def period(first, tmp_path, capsys) -> Period:
    return Period(first, tmp_path, capsys)


def counts(job: Job) -> dict[str, int]:
    return outlook.plan(job)["evaluations"]


def held(job: Job, contributor: str) -> int:
    """Number of planned evaluations of coalitions that hold a contributor."""
    i = job.card.roster.ids.index(contributor)
    return sum(e.subject == "derived" and i in e.entry.coalition for e in job.plan)


def sums(job: Job) -> list[list[float]]:
    """Return the headline's statistics of the training images, contributor by contributor."""
    (thing_id,) = [i for i, prop in job.statistics.items() if prop.name == "cluster_entropy"]
    folder, _ = job.ledger.verified_thing("properties", thing_id)
    return json.loads((folder / STATISTICS).read_text())["sums"]


# -- what is new ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pinned", [False, True], ids=["as it was", "pinned"])
def test_with_nothing_changed_everything_is_reused(period, pinned):
    sets = [text for pin in period.pins for text in ("--set", pin)] if pinned else []
    before = period.files()
    code, out, err = period.call("run", "--json", "--period", "2026-11", *sets)
    assert code == 0, err
    old = before[f"{period.past.report_name}/attribution.json"]
    assert [a["contributors"] for a in json.loads(out)["attributions"]] == [
        a["contributors"] for a in json.loads(old)["attributions"]
    ]
    after = period.files()
    assert {name: after[name] for name in before} == before
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == ({"periods", "specs", "plans", "reports"} if pinned else {"periods"})


def test_a_pin_names_the_same_value_files(period):
    now = period.job(*period.pins)
    for prop, then in zip(now.spec.properties, period.past.spec.properties, strict=True):
        assert now.property_digest(prop) == period.past.property_digest(then)
    assert now.things == period.past.things
    assert [e.key for e in now.plan] == [e.key for e in period.past.plan]
    assert now.spec_digest != period.past.spec_digest


def test_with_pins_only_coalitions_that_hold_the_changed_contributor_are_new(period):
    job = period.job("data.path=" + str(period.spec.parent / "changed"), *period.pins)
    new = held(job, "3")
    found = outlook.plan(job)
    assert found["evaluations"] == {
        "planned": len(job.plan),
        "reused": len(job.plan) - new,
        "only measured": 0,
        "new": new,
    }
    assert 0 < new < len(job.plan) - 5
    assert all(found["things"].values())
    text = outlook.plan_text(found)
    assert "(the coalitions' models with these images, which coalitions)" in text
    assert "model.base: None -> " in text
    assert text.count("(keeps what is there)") == 3
    assert "--set" not in text
    before = {family: len(period.ledger.store.children(family)) for family in ("runs", "bases")}
    work_through(job)
    assert counts(job)["new"] == 0
    assert len(period.ledger.store.children("runs")) == before["runs"] + new
    assert len(period.ledger.store.children("bases")) == before["bases"]
    # the ruler is the same, what it reads are the images of now
    then, now = sums(period.past), sums(job)
    assert [a == b for a, b in zip(then, now, strict=True)] == [True, True, True, False, True]
    (attribution, _) = results.publish(job)["attributions"]
    assert attribution["coalitions"]["failed"] == 0


@pytest.mark.parametrize("base", [False, True], ids=["nothing pinned", "the base alone"])
def test_without_pins_everything_is_new_and_plan_says_what_would_have_helped(period, base):
    changed = "data.path=" + str(period.spec.parent / "changed")
    job = period.job(changed, *(period.pins[:1] if base else []))
    found = outlook.plan(job)
    assert found["evaluations"]["new"] == len(job.plan)
    helps = period.pins[1:] if base else period.pins
    assert [f"{path}={i}" for path, i in found["new_because"]["pins"]["set"].items()] == helps
    helped = counts(period.job(changed, *period.pins))
    assert found["new_because"]["pins"]["evaluations"] == helped
    text = outlook.plan_text(found)
    (line,) = [line for line in text.splitlines() if "data.contributors.3: " in line]
    assert "fitted instruments" in line
    assert ("the trained model" in line) is not base
    assert f"{helped['reused']} of {len(job.plan)} evaluations would be reused" in text
    assert all(f"--set {pin}" in text for pin in helps)


def test_with_a_newcomer_the_pins_and_the_continued_job_are_named_and_keep_what_was_measured(
    period,
):
    more = ["data.path=" + str(period.spec.parent / "more"), "estimator.seed=1"]
    found = outlook.plan(period.job(*more))["new_because"]["pins"]
    continues = f"estimator.continues={period.past.spec_digest}"
    assert [f"{path}={i}" for path, i in found["set"].items()] == [*period.pins, continues]
    job = period.job(*more, *period.pins, continues)
    assert counts(job) == found["evaluations"]

    def coalitions(job: Job) -> list[tuple[Any, ...]]:
        ids = job.card.roster.ids
        return [
            ({ids[i] for i in e.entry.coalition.members}, e.entry.replicate)
            if e.subject == "derived"
            else (e.subject,)
            for e in job.plan
        ]

    measured = coalitions(period.past)
    assert found["evaluations"]["reused"] == sum(c in measured for c in coalitions(job))
    apart = counts(period.job(*more, *period.pins))
    assert apart["reused"] < found["evaluations"]["reused"]


@pytest.mark.parametrize(
    "override", ["estimator.budget=10", "counterfactual.steps=4", "model.training.steps=13"]
)
def test_pins_are_named_only_where_other_data_are_the_reason(period, override):
    assert outlook.reasons(period.job(override))["pins"] is None


# -- pins that do not fit -------------------------------------------------------------------------


def clusters(job: Job) -> str:
    return job.instrument_id(job.spec.properties[0])


def statistics(job: Job) -> str:
    return next(iter(job.statistics))


@pytest.mark.parametrize(
    ("at", "pin", "more", "code", "message"),
    [
        ("properties.0.fitted", lambda _: "f" * 64, (), 65, "no instrument"),
        ("properties.1.fitted", clusters, (), 64, "of a pixel_clusters, wanted a label_classifier"),
        ("properties.0.fitted", clusters, ("properties.0.clusters=5",), 64, "clusters 4, not 5"),
        ("properties.0.fitted", clusters, ("data.size=16",), 64, "of shape [1, 8, 8]"),
        ("properties.0.fitted", statistics, (), 64, "than an instrument"),
        ("model.base", lambda job: job.pruned_id, (), 64, "wanted a trained one's"),
    ],
)
def test_a_pin_that_does_not_fit_is_refused_with_its_place(period, at, pin, more, code, message):
    with pytest.raises(AttrBatchError) as caught:
        period.job(f"{at}={pin(period.past)}", *more)
    assert caught.value.exit_code == code
    (problem,) = caught.value.problems
    assert problem.where == at
    assert message in problem.what
    assert problem.hint


@pytest.mark.parametrize(("family", "pin"), [("bases", 0), ("properties", 1)])
def test_a_pinned_thing_that_another_program_wrote_is_a_conflict(period, family, pin):
    name = f"{family}/{period.pins[pin].partition('=')[2]}/manifest.json"
    made = period.ledger.fact(name)
    period.ledger.store.replace(name, seal({**made, "inputs": {"stage": 3}}))
    with pytest.raises(LedgerConflict, match="not what its name says"):
        period.job(period.pins[pin])


def test_what_a_classifier_knows_is_decided_by_what_it_was_fitted_to(period):
    """A label that came later can be in the data, and cannot be measured; the report says so."""
    job = period.job("data.path=" + str(period.spec.parent / "more"), *period.pins)
    assert job.unseen_labels(job.spec.properties[1]) == ["5"]
    assert job.unseen_labels(job.spec.properties[0]) == []
    with pytest.raises(AttrBatchError, match="no image has the label '5'"):
        period.job(
            "data.path=" + str(period.spec.parent / "more"), *period.pins, "properties.1.label='5'"
        )


def test_status_prints_the_ids_to_pin(period):
    code, out, _ = period.call("status")
    assert code == 0
    for pin in period.pins:
        assert pin.partition("=")[2] in out


# -- which report is a period's -------------------------------------------------------------------


def test_a_period_points_to_its_report_and_says_what_to_pin(period):
    assert period.call("report", "--period", "2026-11")[0] == 0
    assert period.call("run", "--period", "2026-11")[0] == 0, "the same again"
    fact = period.ledger.periods()["2026-11"]
    past, prop = period.past, period.past.spec.properties
    data = period.ledger.store.read(f"{fact['report']}/attribution.json")
    assert fact == {
        "label": "2026-11",
        "name": "tiny",
        "spec": past.spec_digest,
        "report": past.report_name,
        "attribution_sha256": hashlib.sha256(data).hexdigest(),
        "numerics": past.numerics,
        "bases": {"trained": past.dense_id, "pruned": past.pruned_id},
        "fitted": {p.name: past.instrument_id(p) for p in prop},
    }
    code, out, _ = period.call("periods")
    assert code == 0
    assert out.startswith("2026-11  tiny  spec ")
    assert [line.strip() for line in out.splitlines()[2:]] == [f"--set {p}" for p in period.pins]
    (listed,) = json.loads(period.call("periods", "--json")[1])
    assert listed["intact"]
    period.ledger.store.replace(f"{fact['report']}/attribution.json", b"{}")
    assert "gone or replaced since" in period.call("periods")[1]


def test_a_label_stands_for_one_report_and_is_refused_before_work(period):
    assert period.call("run", "--period", "a")[0] == 0
    before = period.files()
    code, out, err = period.call("run", "--period", "a", "--set", "sampling.steps=4")
    assert (code, out) == (73, "")
    assert "periods/a.json" in err
    assert "--period a-2" in err
    assert period.files() == before
    period.ledger.store.replace(f"{period.past.report_name}/attribution.json", b"{}")
    with pytest.raises(LedgerConflict):
        results.publish_period(period.past, "a")


@pytest.mark.parametrize("shard", ["0/3", "2/3"])
def test_a_shard_that_finds_the_report_written_names_it_as_well(period, shard):
    code, out, err = period.call("run", "--shard", shard, "--period", "2026-11")
    assert (code, out) == (0, ""), err
    assert [*period.ledger.periods()] == ["2026-11"]


def test_another_shard_waits_for_the_report_of_whoever_writes_it(period):
    name = f"{period.past.report_name}/attribution.json"
    written = period.ledger.store.read(name)
    gaps = written.replace(b'"failed": 0', b'"failed": 1')
    assert gaps != written
    period.ledger.store.replace(name, gaps)
    results.publish_period(period.past, "x", ours=False)
    period.ledger.store.delete(name)
    results.publish_period(period.past, "x", ours=False)
    assert period.ledger.periods() == {}
    period.ledger.store.replace(name, written)
    results.publish_period(period.past, "x", ours=False)
    assert [*period.ledger.periods()] == ["x"]


def test_auto_is_the_month(period):
    months = {time.strftime("%Y-%m", time.gmtime())}
    assert period.call("report", "--period", "auto")[0] == 0
    months.add(time.strftime("%Y-%m", time.gmtime()))
    assert {*period.ledger.periods()} <= months


@pytest.mark.parametrize(
    "arguments",
    [["a/b"], [""], ["x" * 65], ["ü"], ["a", "--provisional"]],
)
@pytest.mark.parametrize("command", ["run", "report"])
def test_what_is_no_label_is_refused(period, command, arguments):
    before = period.files()
    code, out, err = period.call(command, "--period", *arguments)
    assert (code, out) == (64, "")
    assert err.startswith("error: --period: ")
    assert period.files() == before


def test_gc_keeps_what_a_period_refers_to(period):
    results.publish_period(period.past, "2026-11")
    forgotten = {name for name, _ in period.ledger.unneeded([period.past.spec_digest])}
    assert forgotten >= {f"runs/{e.key}" for e in period.past.plan}
    for name in forgotten:
        period.ledger.drop(name)
    fact = period.ledger.periods()["2026-11"]
    assert period.ledger.store.exists(f"{fact['report']}/index.html")
    period.job(*period.pins)  # checks that they are there


def test_a_damaged_period_is_found_and_said_anew(period):
    results.publish_period(period.past, "2026-11")
    path = period.ledger.store.path("periods/2026-11.json")
    path.write_bytes(path.read_bytes().replace(b"tiny", b"huge"))
    with pytest.raises(LedgerConflict):
        period.ledger.unneeded([])
    assert period.call("run", "--period", "2026-11")[0] == 73
    assert period.call("repair")[0] == 0
    assert period.call("run", "--period", "2026-11")[0] == 0
    assert period.ledger.periods()["2026-11"]["name"] == "tiny"


def test_a_bucket_keeps_periods_too(tiny: Callable[..., Job], bucket: str):
    job, other = (tiny(store=bucket, seed=seed) for seed in (0, 1))
    report = {"attributions": [{"version": "0", "coalitions": {"failed": 0}}]}
    for each in (job, other):
        name = f"{each.report_name}/attribution.json"
        each.ledger.store.publish(name, json.dumps(report).encode())
    results.publish_period(job, "2026-11")
    results.publish_period(job, "2026-11")
    results.publish_period(other, "2026-12")
    with pytest.raises(LedgerConflict):
        results.check_period(other, "2026-11")
    listed = results.periods(Ledger(bucket), job.spec)
    assert [(p["label"], p["intact"]) for p in listed] == [("2026-11", True), ("2026-12", True)]
    assert listed[0]["set"]["model.base"] == job.dense_id
