"""Coalitions fine-tuned several at once: the same values, whoever is in it, whatever fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY, work_through

from attr_batch import log, outlook, pilot, results, runner, training
from attr_batch.counterfactual import SparsifiedFinetune
from attr_batch.errors import AttrBatchError, DataError, Interrupted, NumericsError, SpecError
from attr_batch.job import Evaluation, Job, Study, first_cohort
from attr_batch.runner import Laboratory, Worker

KEPT = {**TINY["sampling"], "keep": "all"}
OF_3 = {**TINY["resources"], "cohort": 3}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Job:
    """A finished job of cohorts of 3, in a store where each was evaluated alone before."""
    from attr_batch.spec import validate

    tree = {**TINY, "store": str(tmp_path_factory.mktemp("done") / "store"), "sampling": KEPT}
    work_through(Job(validate(tree)))
    job = Job(validate({**tree, "resources": OF_3}))
    work_through(job)
    return job


@pytest.fixture
def together(tiny) -> Callable[..., Job]:
    """Open the tiny job with cohorts of 3, with whole sections replaced."""
    return lambda **sections: tiny(**{"sampling": KEPT, "resources": OF_3, **sections})


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """How many coalitions were trained at once, in order."""
    found, derive = [], SparsifiedFinetune.derive_cohort

    def noted(self, base, images, seeds, **run):
        coalitions = zip(map(np.ndarray.tobytes, images), seeds, strict=True)
        found.append(len(set(coalitions)))
        return derive(self, base, images, seeds, **run)

    monkeypatch.setattr(SparsifiedFinetune, "derive_cohort", noted)
    return found


def attribution(job: Job) -> bytes:
    results.publish(job)
    return job.ledger.store.read(f"{job.report_name}/attribution.json")


def in_cohorts(job: Job) -> list[Evaluation]:
    return [e for e in job.plan if e.cohort > 1]


def test_they_give_what_each_gives_alone(done):
    """Last bits may differ, hence a pixel's rounding; most are the same."""
    alone = done.in_cohorts(1)
    pairs = list(zip(alone.plan, done.plan, strict=True))
    assert {(b.subject, b.entry.coalition.size > 0) for a, b in pairs if a.key != b.key} == {
        ("derived", True)
    }
    for a, b in pairs:
        first, second = done.ledger.samples(a.key), done.ledger.samples(b.key)
        apart = np.abs(first.astype(int) - second)
        assert apart.max() <= 2
        assert np.mean(apart > 0) < 0.01
    assert alone.things == done.things


def test_places_are_filled_in_the_order_of_the_plan(together, sizes):
    """As many cohorts as the fullest place has evaluations, one of each place in each."""
    job = together()
    work_through(job)
    places = Counter(e.place for e in in_cohorts(job))
    assert set(places) == {0, 1, 2}
    assert sizes == [sum(n > at for n in places.values()) for at in range(max(places.values()))]
    assert not list(job.ledger.store.path("work/runs").iterdir())
    assert job.ledger.heartbeats() == []


def test_a_place_follows_from_the_key_alone(done, together):
    other = together(estimator={**TINY["estimator"], "budget": 12, "holdout": 6})
    places = {e.key: e.place for e in other.plan}
    assert all(places.get(e.key, e.place) == e.place for e in done.plan)
    assert all(e.place == 0 for e in done.plan if e.cohort == 1)
    first = in_cohorts(done)[0]
    assert not first.joins([first])
    assert first.joins([])


TELLING = {
    "counterfactual": {
        "kind": "sparsified_finetune",
        "steps": 60,
        "batch": 5,
        "learning_rate": 3e-3,
    },
    "model": {**TINY["model"], "block_out_channels": [20, 40]},
}


@pytest.mark.parametrize("sections", [{}, TELLING], ids=["tiny", "odd sizes"])
@pytest.mark.parametrize("size", [2, 5])
def test_neighbours_change_no_bit_of_a_model(together, sections, size):
    """A place does, with odd sizes: Adam and silu end a vector otherwise than they begin it."""
    job = together(resources={**OF_3, "cohort": size}, **sections)
    lab = Laboratory(job)
    Worker(lab, 0, 1, "s").prepare(prepares=True)
    evaluations = in_cohorts(job)
    first = max(evaluations, key=lambda e: e.place)
    others = [e for e in evaluations if e.joins([first])]

    def weights(cohort: list[Evaluation]) -> list[bytes]:
        model = lab.model(cohort, log.Upkeep())
        lab.forget(cohort)
        return [p.detach()[first.place].numpy().tobytes() for p in model.parameters()]

    alone = weights([first])
    assert weights([first, others[0]]) == alone
    full = first_cohort([first, *reversed(others)])
    assert len(full) == size
    assert weights(full[::-1]) == alone


def test_neither_shards_nor_neighbours_change_a_bit(done, together):
    job = together()
    Worker(Laboratory(job), 0, 1, "s").prepare(prepares=True)
    for shard in (2, 0, 1):
        work_through(together(), shard, 3)
    assert attribution(job) == attribution(done)
    for evaluation in in_cohorts(job):
        name = job.ledger.samples_name(evaluation.key)
        assert job.ledger.store.read(name) == done.ledger.store.read(name)


@pytest.mark.parametrize("phase", ["training", "sampling"])
def test_a_stopped_cohort_goes_on(done, together, monkeypatch, phase):
    job = together()
    lab = Laboratory(job)
    worker = Worker(lab, 0, 1, "s")
    job.write_down()
    worker.prepare(prepares=True)
    ticks, tick = [], log.Upkeep.tick

    def stopping(upkeep, at, total, **figures):
        ticks.append(at)
        worker.stopped = ticks.count(2 if phase == "training" else 48) == 3
        return tick(upkeep, at, total, **figures)

    with monkeypatch.context() as patch:
        patch.setattr(log.Upkeep, "tick", stopping)
        with pytest.raises(Interrupted):
            worker.work(prepares=True)
    (checkpoint,) = job.ledger.store.path("work/runs").iterdir() if phase == "training" else [None]
    assert job.ledger.heartbeats() == []
    assert job.ledger.unneeded([]) == []
    restored, restore = [], training._restore
    monkeypatch.setattr(training, "_restore", lambda *state: restored.append(1) or restore(*state))
    work_through(together())
    assert (len(restored) == 1) == (phase == "training")
    assert checkpoint is None or not checkpoint.exists()
    assert attribution(job) == attribution(done)


def test_a_study_of_other_seeds_is_evaluated_in_cohorts_too(together, sizes):
    """Its samples begin with noise of their own, and they are those of every cohort."""
    plan = together()
    entries = [replace(e.entry, replicate=1 + k) for k, e in enumerate(in_cohorts(plan))]
    study = Study("other", tuple(entries), plan.spec.counterfactual, streams="other")
    job = Job(plan.spec, [study])
    assert len({e.recipe["sampling_seed"] for e in job.studied}) == len(job.studied)
    cohort = first_cohort(job.studied)
    lab = Laboratory(job)
    Worker(lab, 0, 1, "s").prepare(prepares=True)
    first, second, _ = runner.draw_together(cohort, lab, log.Upkeep())
    (alone,) = runner.draw_together(cohort[1:2], lab, log.Upkeep())
    assert sizes == [3, 1]
    assert np.array_equal(second.samples, alone.samples)
    assert not np.array_equal(first.samples, alone.samples)


def test_a_checkpoint_of_a_finished_cohort_is_not_needed(done, tmp_path):
    first, second = in_cohorts(done)[:2]
    path = done.ledger.work(Laboratory(done).checkpoint_name([first, second]))
    path.write_bytes(b"left over")
    assert done.ledger.unneeded([]) == [(f"work/runs/{path.name}", 9)]
    path.unlink()


def test_a_model_that_diverges_leaves_the_others_their_values(done, together, monkeypatch):
    bad = in_cohorts(done)[1]
    derive, images = SparsifiedFinetune.derive_cohort, done.dataset.subset(bad.entry.coalition)

    def diverging(self, base, each, seeds, **run):
        own = zip(each, seeds, strict=True)
        if any(np.array_equal(i, images.images) and s == bad.recipe["seed"] for i, s in own):
            raise NumericsError("the training loss became nan")
        return derive(self, base, each, seeds, **run)

    monkeypatch.setattr(SparsifiedFinetune, "derive_cohort", diverging)
    job = together()
    work_through(job)
    replaced = [e for e in job.plan if job.settled(e).key != e.key]
    assert replaced == [job.plan[done.plan.index(bad)]]
    assert job.settled(replaced[0]).cohort == 3
    for evaluation in in_cohorts(job):
        if evaluation not in replaced:
            name = job.ledger.samples_name(evaluation.key)
            assert job.ledger.store.read(name) == done.ledger.store.read(name)
    assert outlook.status(job)["evaluations"]["failed"] == 0


def test_what_fails_for_one_is_recorded_for_it_alone(together, monkeypatch, capsys):
    bad = in_cohorts(together())[1]
    derive = SparsifiedFinetune.derive_cohort

    def failing(self, base, each, seeds, **run):
        if bad.recipe["seed"] in seeds and any(np.array_equal(i, images) for i in each):
            raise RuntimeError("the library met a shape it does not know")
        return derive(self, base, each, seeds, **run)

    monkeypatch.setattr(SparsifiedFinetune, "derive_cohort", failing)
    job = together()
    images = job.dataset.subset(bad.entry.coalition).images
    work_through(job)
    assert job.ledger.failed() == {bad.key}
    assert [e.key for e in job.plan if not job.done(e)] == [bad.key]
    assert "a shape it does not know" in capsys.readouterr().err


def test_a_gpu_that_is_full_ends_the_run_and_says_what_to_do(together, monkeypatch):
    import torch

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(SparsifiedFinetune, "derive", full)
    job = together()
    with pytest.raises(AttrBatchError, match="memory does not hold") as caught:
        work_through(job)
    assert "resources.cohort" in str(caught.value)
    assert job.ledger.heartbeats() == []


@pytest.mark.parametrize("kind", ["lora", "retrain", "gradient_ascent"])
def test_what_is_not_fine_tuned_goes_one_by_one(together, kind):
    job = together(counterfactual={"kind": kind})
    alone = job.in_cohorts(1)
    assert [e.key for e in job.plan] == [e.key for e in alone.plan]
    assert job.numerics == alone.numerics
    job.check()
    job.check_numbers()


def test_a_network_with_dropout_is_refused(together):
    job = together(model={**TINY["model"], "dropout": 0.1})
    with pytest.raises(SpecError, match="without dropout"):
        job.check_numbers()


def test_a_network_that_only_diffusers_walks_is_refused(together, monkeypatch):
    from attr_batch import fused

    monkeypatch.setattr(fused, "supported", lambda _: False)
    job = together()
    with pytest.raises(SpecError, match="plain UNet2DModels"):
        job.check_numbers()
    with pytest.raises(SpecError, match="plain UNet2DModels"):
        _ = Laboratory(job).base


def test_the_plan_says_what_another_cohort_makes_new(done, together):
    other = done.in_cohorts(2)
    facts = outlook.plan(other)
    (difference,) = facts["new_because"]["differences"]
    assert difference["path"] == "numerics.cohort"
    assert difference["makes_new"] == [outlook.MODELS]
    assert facts["evaluations"]["new"] == len(in_cohorts(other))


def test_a_job_of_another_cohort_is_not_shown_as_empty(done):
    with pytest.raises(DataError, match=r"cohort [13], .*cohort 7"):
        results._check_numerics(done.in_cohorts(7))


def test_a_job_is_not_continued_in_other_cohorts(done, together):
    before = {"continues": done.spec_digest}
    job = Job(done.spec).in_cohorts(2)
    estimator = done.spec.estimator.model_copy(update=before)
    job = Job(job.spec.model_copy(update={"estimator": estimator}))
    with pytest.raises(SpecError, match=r"cohort [13], not 2") as caught:
        _ = job.predecessor
    assert "resources.cohort" in str(caught.value)


# -- how many -------------------------------------------------------------------------------------


@pytest.fixture
def taking(together, monkeypatch) -> Callable[[dict[int, float]], Job]:
    """Return a job of which a coalition takes so many seconds in a cohort of so many."""
    job = together()
    Worker(Laboratory(job), 0, 1, "s").prepare(prepares=True)

    def with_seconds(seconds: dict[int, float]) -> Job:
        def drawn(cohort, lab, upkeep):
            assert len(cohort) == cohort[0].cohort
            if len(cohort) not in seconds:
                raise AttrBatchError("the GPU's memory does not hold that many")
            lab.model(cohort, upkeep)
            spent = {"finetune": seconds[len(cohort)], "sample": 0.0}
            return [runner.Drawn(np.zeros(1), spent)] * len(cohort)

        monkeypatch.setattr(pilot, "draw_together", drawn)
        return job

    return with_seconds


def test_the_pilot_weighs_how_far_the_plan_fills_cohorts(taking):
    job = taking({2: 6.0, 4: 4.0})
    found = pilot.try_cohorts(job, 10.0)
    assert [row["cohort"] for row in found] == [1, 2, 4]
    for row in found[1:]:
        places = Counter(e.place for e in job.in_cohorts(row["cohort"]).plan if e.cohort > 1)
        rounds = max(places.values())
        wanted = {2: 6.0, 4: 4.0}[row["cohort"]] * row["cohort"] * rounds / places.total()
        assert row["seconds"] == pytest.approx(wanted)
    assert pilot._best(found) == 4
    assert not list(job.ledger.store.path("work/runs").iterdir())


def test_the_pilot_gives_up_on_what_is_much_slower(taking):
    found = pilot.try_cohorts(taking({2: 20.0, 4: 1.0}), 10.0)
    assert [row["cohort"] for row in found] == [1, 2]
    assert pilot._best(found) == 1


def test_the_pilot_prefers_the_smaller_of_two_that_are_as_good():
    found = [{"cohort": 1, "seconds": 9.0}, {"cohort": 2, "seconds": 5.1}]
    assert pilot._best([*found, {"cohort": 4, "seconds": 5.0}]) == 2


def test_the_pilot_keeps_to_what_the_memory_holds(taking, capsys):
    assert [row["cohort"] for row in pilot.try_cohorts(taking({2: 1.0}), 9.0)] == [1, 2]
    assert "does not hold" in capsys.readouterr().err
