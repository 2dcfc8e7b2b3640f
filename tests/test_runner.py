"""The runner in one process: what is evaluated, what is reused, what a failure leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, install, work_through

from attr_batch import outlook, results, runner
from attr_batch.errors import (
    DataError,
    IncompleteDesign,
    Interrupted,
    LedgerConflict,
    NumericsError,
    SpecError,
)
from attr_batch.job import Job
from attr_batch.runner import Laboratory, Worker
from attr_batch.sampling import Sampling


def attribution_bytes(job: Job) -> bytes:
    results.publish(job)
    return job.ledger.store.read(f"{job.report_name}/attribution.json")


def _attributions(job: Job) -> list[dict]:
    return results.attributions(results.Facts(job))


def trained(job: Job) -> int:
    """Number of models whose samples the store knows of."""
    return sum(
        "derivation.json" in job.ledger.store.children(f"runs/{key}")
        for key in job.ledger.store.children("runs")
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Job:
    """A finished tiny job that keeps its samples; not to be written to."""
    from attr_batch.spec import validate

    store = tmp_path_factory.mktemp("done") / "store"
    job = Job(
        validate({**TINY, "store": str(store), "sampling": {**TINY["sampling"], "keep": "all"}})
    )
    work_through(job)
    return job


@pytest.fixture
def again(done, tmp_path) -> Callable[..., Job]:
    """Open the finished job over a copy of its store, with whole sections replaced."""
    import shutil

    from attr_batch.spec import validate

    shutil.copytree(done.ledger.store.root, tmp_path / "copy")

    def job(**sections) -> Job:
        sampling = {**TINY["sampling"], "keep": "all"}
        return Job(
            validate({**TINY, "store": str(tmp_path / "copy"), "sampling": sampling, **sections})
        )

    return job


def test_values_sum_to_the_difference_of_the_endpoints(done):
    (found,) = _attributions(done)
    total = sum(c["value"] for c in found["contributors"])
    assert total == pytest.approx(found["v_full"] - found["v_empty"], abs=1e-9)
    assert found["coalitions"] == {"planned": 18, "used": 18, "failed": 0}


def test_a_finished_job_evaluates_nothing(again):
    job = again()
    before = sorted(job.ledger.store.root.rglob("*"))
    assert runner.complete(job)
    work_through(job)
    after = sorted(job.ledger.store.root.rglob("*"))
    assert [p for p in after if "work" not in p.parts] == [
        p for p in before if "work" not in p.parts
    ]


def test_a_larger_budget_reuses_every_finished_coalition(again, done):
    job = again(estimator={**TINY["estimator"], "budget": 12})
    facts = outlook.plan(job)
    evaluations, text = facts["evaluations"], outlook.plan_text(facts)
    assert (evaluations["reused"], evaluations["new"]) == (len(done.plan), 4)
    assert f"{len(done.plan)} reused" in text
    assert "estimator.budget: 8 -> 12  (which coalitions)" in text
    work_through(job)
    assert trained(job) == trained(done) + 4


@pytest.mark.parametrize(
    "estimator",
    [{"kind": "paired_ls"}, {"confidence": 0.8}, {"max_failed": 3}, {"budget": 6}, {"holdout": 2}],
)
def test_reading_the_same_evaluations_otherwise_evaluates_none(again, estimator):
    assert runner.complete(again(estimator={**TINY["estimator"], **estimator}))


def test_a_new_property_is_measured_on_kept_samples_and_trains_nothing(again, done):
    job = again(
        properties=[
            {"kind": "cluster_entropy"},
            {"kind": "cluster_entropy", "clusters": 5, "name": "few"},
        ]
    )
    facts = outlook.plan(job)["evaluations"]
    assert (facts["only measured"], facts["new"]) == (len(job.plan), 0)
    work_through(job)
    assert trained(job) == trained(done)
    assert [a["property"] for a in _attributions(job)] == ["cluster_entropy", "few"]


def test_pinning_the_base_that_a_job_trained_makes_nothing_new(again, done):
    pinned = again(model={**TINY["model"], "base": done.dense_id})
    pinned.check()
    assert runner.complete(pinned)


def test_a_pinned_base_made_otherwise_is_refused(again, done):
    model = {**TINY["model"], "base": done.dense_id, "schedule": {"prediction": "epsilon"}}
    other = again(model=model)
    with pytest.raises(SpecError, match="schedule"):
        other.check()
    assert not {e.key for e in other.plan} & {e.key for e in done.plan}


def test_changed_data_are_noticed_before_they_are_trained_on(again):
    from dataclasses import replace

    job = again()
    roster = job.card.roster
    job.card = replace(job.card, roster=replace(roster, contributors=roster.contributors[::-1]))
    with pytest.raises(DataError, match="not what they were"):
        _ = job.dataset


def test_an_added_property_reuses_samples_kept_since(again, done):
    """The first run kept a grid, a later one everything: what counts is that they are there."""
    job = again(sampling=TINY["sampling"])
    assert [e.key for e in job.plan] == [e.key for e in done.plan]
    key = job.plan[0].key
    kept = job.ledger.samples(key)
    assert kept.shape == (48, 1, 8, 8)


def test_another_order_of_properties_is_another_report(again):
    two = [{"kind": "cluster_entropy"}, {"kind": "cluster_entropy", "clusters": 5, "name": "few"}]
    third = {"kind": "cluster_entropy", "clusters": 7, "name": "more"}
    first, second = again(properties=[*two, third]), again(properties=[two[0], third, two[1]])
    assert first.report_name != second.report_name
    assert [e.key for e in first.plan] == [e.key for e in second.plan]


def test_another_recipe_in_the_same_store_mixes_nothing(again, done):
    before = attribution_bytes(again())
    job = again(counterfactual={**TINY["counterfactual"], "steps": 4})
    work_through(job)
    assert attribution_bytes(job) != before
    assert attribution_bytes(again()) == before


def test_two_shards_in_any_order_give_the_same_bytes(done, tiny):
    sampling = {**TINY["sampling"], "keep": "all"}
    job = tiny(sampling=sampling)
    for thing in Laboratory(job).things():
        folder = job.ledger.work(f"{thing.family}/{thing.id}")
        folder.mkdir()
        thing.make(folder, runner.Upkeep())
        job.ledger.publish_thing(thing.family, thing.id, folder, thing.inputs, 0.0)
    work_through(tiny(sampling=sampling), 1, 2)
    work_through(tiny(sampling=sampling), 0, 2)
    assert attribution_bytes(job) == attribution_bytes(done)


def test_a_shard_does_not_wait_for_the_base_for_ever(tiny):
    job = tiny(resources={"device": "cpu", "base_wait": 0.3})
    with pytest.raises(Interrupted, match="waited") as caught:
        Worker(Laboratory(job), 1, 2, "s").work(prepares=False)
    assert caught.value.exit_code == 75


def test_samples_do_not_depend_on_what_else_was_evaluated_before(done, tiny):
    """Every evaluation alone gives the bits that it gave in the whole job."""
    job = tiny(sampling={**TINY["sampling"], "keep": "all"})
    lab = Laboratory(job)
    Worker(lab, 0, 1, "s").prepare(prepares=True)
    for evaluation in job.plan[-5::2]:
        runner.run_one(evaluation, lab, runner.Upkeep())
        name = job.ledger.samples_name(evaluation.key)
        assert job.ledger.store.read(name) == done.ledger.store.read(name)


# -- failures -------------------------------------------------------------------------------------


@pytest.fixture
def diverging(monkeypatch) -> list[int]:
    """Make sampling diverge as often as the list's number says; the list counts down."""
    left, draw = [0], Sampling.draw

    def flaky(*args, **kwargs):
        if left[0] > 0:
            left[0] -= 1
            raise NumericsError("a sample is not finite")
        return draw(*args, **kwargs)

    monkeypatch.setattr(Sampling, "draw", flaky)
    return left


def test_a_passing_nan_leaves_no_trace(tiny, done, diverging):
    diverging[0] = 1
    job = tiny(sampling={**TINY["sampling"], "keep": "all"})
    work_through(job)
    assert diverging == [0]
    assert attribution_bytes(job) == attribution_bytes(done)


def test_a_lasting_nan_takes_the_next_replicate_and_is_recorded(tiny, diverging):
    diverging[0] = 4  # twice, and twice on the first substitute
    job = tiny()
    work_through(job)
    replaced = [(e, job.settled(e)) for e in job.plan if job.settled(e).key != e.key]
    assert [(e.entry.index, run.entry.replicate) for e, run in replaced] == [(0, 2000)]
    attribution = results.publish(job)
    proof = json.loads(job.ledger.store.read(f"{job.report_name}/evidence.json"))
    assert any("another training seed" in warning for warning in proof["warnings"])
    assert attribution["attributions"][0]["coalitions"]["failed"] == 0
    assert job.ledger.unneeded([]) == []


def test_an_unending_nan_is_a_failure_and_the_others_go_on(tiny, diverging):
    diverging[0] = 6
    job = tiny()
    work_through(job)
    assert len([e for e in job.plan if not job.done(e)]) == 1
    assert outlook.status(job)["evaluations"]["failed"] == 1
    with pytest.raises(IncompleteDesign, match="1 of 18") as caught:
        results.publish(job)
    assert caught.value.exit_code == 70
    provisional = results.publish(job, provisional=True)
    assert provisional["attributions"][0]["coalitions"]["failed"] == 1
    assert job.ledger.store.exists(f"{job.report_name}-provisional/index.html")
    assert not job.ledger.store.exists(f"{job.report_name}/attribution.json")


def test_a_report_with_an_allowed_gap_gives_way_to_one_without(tiny, diverging, capsys):
    diverging[0] = 6
    job = tiny(estimator={**TINY["estimator"], "max_failed": 1})
    work_through(job)
    assert results.publish(job)["attributions"][0]["coalitions"]["failed"] == 1
    work_through(job, session="again")
    assert results.publish(job)["attributions"][0]["coalitions"]["failed"] == 0
    assert "had gaps" in capsys.readouterr().err


def test_models_without_a_seed_have_no_substitute(tiny):
    job = tiny()
    for evaluation in job.plan:
        instead = job.substitute(evaluation, 1)
        assert (instead.key == evaluation.key) == (evaluation.subject in ("trained", "pruned"))


@pytest.mark.parametrize("answer", ["float('nan'), 0.0", "1e101, 0.0", "1.0, float('nan')"])
def test_a_property_that_is_not_finite_fails_alone(again, done, tmp_path, monkeypatch, answer):
    """The run itself is sound: other properties and other jobs keep their values."""
    (tmp_path / "nan_property.py").write_text(f"def nan(images):\n    return {answer}\n")
    install(tmp_path, "nan_property.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = attribution_bytes(again())
    job = again(
        properties=[{"kind": "cluster_entropy"}, {"kind": "call", "target": "nan_property:nan"}]
    )
    work_through(job)
    assert outlook.status(job)["evaluations"]["failed"] == len(job.plan)
    assert trained(job) == trained(done)
    assert attribution_bytes(again()) == before


def test_shards_do_not_retry_each_others_failures_for_ever(tiny, monkeypatch, capsys):
    tries = []

    def out_of_memory(*_):
        tries.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Laboratory, "draw", out_of_memory)
    job = tiny()
    job.write_down()
    workers = [Worker(Laboratory(tiny()), shard, 2, f"session {shard}") for shard in (0, 1)]
    for worker in workers:
        worker.work(prepares=True)
    assert len(tries) == len(job.plan)
    assert "out of memory" in capsys.readouterr().err


def test_a_failed_evaluation_is_tried_again_by_the_next_run_only(tiny, monkeypatch, capsys):
    def out_of_memory(*_):
        raise RuntimeError("out of memory")

    job = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(Laboratory, "draw", out_of_memory)
        work_through(job, session="one")
    assert "out of memory" in capsys.readouterr().err
    assert outlook.status(job)["evaluations"]["failed"] == len(job.plan)
    work_through(job, session="one")
    assert outlook.status(job)["evaluations"]["failed"] == len(job.plan)
    work_through(job, session="two")
    assert runner.complete(job)
    assert job.ledger.store.children("failures") == []


# -- an altered store -----------------------------------------------------------------------------


def _some_value(job: Job) -> Path:
    (prop,) = job.spec.properties
    evaluation = next(e for e in job.plan if e.entry.role == "design")
    name = job.ledger.value_name(evaluation.key, prop.name, job.property_digest(prop))
    return job.ledger.store.path(name)


def test_an_altered_value_is_refused_repaired_and_made_again(again):
    job = again()
    before = attribution_bytes(job)
    path = _some_value(job)
    path.write_text(path.read_text().replace('"value": ', '"value": 1'))
    with pytest.raises(LedgerConflict, match="altered") as caught:
        results.publish(job)
    assert str(path) in str(caught.value)
    ((name, _),) = job.ledger.bad_files()
    job.ledger.quarantine(name)
    assert not runner.complete(job)
    work_through(job)
    assert attribution_bytes(job) == before


def test_altered_samples_are_not_measured(again):
    job = again(properties=[{"kind": "cluster_entropy", "clusters": 7}])
    for path in job.ledger.store.root.glob("runs/*/samples.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    with pytest.raises(LedgerConflict, match=r"samples\.safetensors"):
        work_through(job)


def test_an_altered_report_is_noticed_and_repaired(again):
    job = again()
    results.publish(job)
    path = job.ledger.store.path(f"{job.report_name}/attribution.json")
    found = json.loads(path.read_text())
    found["attributions"][0]["contributors"][0]["value"] += 1e-6
    path.write_text(json.dumps(found))
    with pytest.raises(LedgerConflict, match="differs"):
        results.publish(job)
    assert results.damaged_report(job) == job.report_name
    job.ledger.quarantine(job.report_name)
    assert results.damaged_report(job) is None
    results.publish(job)


def test_last_bits_of_another_processor_do_not_make_a_conflict(again):
    job = again()
    results.publish(job)
    path = job.ledger.store.path(f"{job.report_name}/attribution.json")
    found = json.loads(path.read_text())
    contributor = found["attributions"][0]["contributors"][0]
    contributor["value"] = float(np.nextafter(contributor["value"], 9))
    path.write_text(json.dumps(found))
    assert results.publish(job) == found


def test_endpoints_as_published_read_the_unpruned_models(again):
    derived, paper = (
        _attributions(again())[0],
        _attributions(again(endpoints="paper"))[0],
    )
    assert paper["v_full"] == paper["as_published"]["v_full"] == derived["as_published"]["v_full"]
    assert paper["v_empty"] == derived["as_published"]["v_empty"]
    assert derived["v_full"] != paper["v_full"]
