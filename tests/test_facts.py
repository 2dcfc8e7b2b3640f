"""Sequential stopping: which batches count is decided by the values, whoever made them and when.

Utilities are those of a closed-form game, put where the runner would have put them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable

import games
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from played import prepare
from played import publish as put

from attr_batch import ledger, outlook, results, runner
from attr_batch.errors import DataError, IncompleteDesign, NumericsError
from attr_batch.estimators import Observation, PairedLS
from attr_batch.facts import Agenda, Facts
from attr_batch.job import Evaluation, Job
from attr_batch.runner import Laboratory, Worker

N = 6
GAME = games.coverage(N, 1)
NOISE = 0.05
SPEC = {"kind": "paired_ls", "budget": 56, "holdout": 4, "endpoint_replicates": 3, "seed": 4}
BATCHES = 7  # of four pairs
FIRST_RELIABLE = 4  # 16 pairs are more than 2.5 n
SIX = {
    "data": {"kind": "digits", "contributors": [str(d) for d in range(N)]},
    # never called
    "properties": [{"kind": "call", "target": "attr_batch.recipe:digest", "name": "game"}],
}
TARGET, REACHED = 0.0345, 5  # the fourth batch leaves .039, the fifth .030


def utility(evaluation: Evaluation) -> float:
    """Return v(S) with the noise of this run key."""
    noise = np.random.default_rng(int(evaluation.key[:12], 16)).normal(0, NOISE)
    return float(GAME.v([evaluation.entry.coalition.mask])[0] + noise)


def publish(job: Job, evaluations: Iterable[Evaluation]) -> None:
    """Put utilities into the ledger."""
    put(job, evaluations, utility)


@pytest.fixture
def opened(tiny, tmp_path) -> Callable[..., Job]:
    """Open the job of six contributors with a target, its shared things made."""

    def job(store: str = "store", **estimator) -> Job:
        given = {**SPEC, "target_half_width": TARGET, **estimator}
        job = tiny(**SIX, estimator=given, store=str(tmp_path / store))
        if not runner.prepared(job):
            prepare(job)
        return job

    return job


def half_widths(job: Job) -> list[float | None]:
    """Return the mean half-width after each batch, None if unreliable: by the definition."""
    entries = [e.entry for e in job.plan if e.subject == "derived"]
    values = [utility(e) for e in job.plan if e.subject == "derived"]
    found = []
    for batch in range(BATCHES):
        seen = [
            Observation(e.coalition, v, e.role)
            for e, v in zip(entries, values, strict=True)
            if e.role != "design" or e.batch <= batch
        ]
        read = PairedLS().estimate(seen, N)
        width = None
        if read.low is not None and read.high is not None and read.interval.reliable:
            width = float(np.mean(np.subtract(read.high, read.low)) / 2)
        found.append(width)
    return found


def test_the_first_batch_with_narrow_reliable_intervals_is_the_last(opened):
    job = opened()
    widths = half_widths(job)
    assert [w is None for w in widths] == [True] * (FIRST_RELIABLE - 1) + [False] * 4
    publish(job, job.plan)
    assert Facts(job).stopping.batches == REACHED
    for target in [w * f for w in widths if w is not None for f in (0.99, 1.01)]:
        stopping = Facts(opened(target_half_width=target)).stopping
        narrow = [k for k, w in enumerate(widths, 1) if w is not None and w <= target]
        assert stopping.batches == (narrow[0] if narrow else BATCHES)
        assert stopping.reached == bool(narrow)
        assert stopping.half_width == pytest.approx(widths[stopping.batches - 1], rel=1e-12)


def test_an_unreliable_interval_does_not_stop(opened):
    job = opened(target_half_width=1e9)
    publish(job, job.plan)
    assert Facts(job).stopping.batches == FIRST_RELIABLE


def test_stopping_on_the_width_keeps_the_coverage():
    """Of 95 % intervals at whatever batch is the first narrow one, as many hold the value."""
    n = batch = 12
    game = games.mean_quality(n, 1)
    phi, sd = game.shapley(), 0.1 * game.sd(500)
    inside, ended = [], []
    for seed in range(80):
        plan = PairedLS(budget=14 * batch, holdout=0, seed=seed).plan(n)
        noise = sd * np.random.default_rng(seed).normal(size=len(plan))
        v = game.v([e.coalition.mask for e in plan]) + noise
        seen = [Observation(e.coalition, x, e.role) for e, x in zip(plan, v, strict=True)]
        for whole in range(5, 15):
            read = PairedLS().estimate(seen[: 8 + whole * batch], n)  # eight are endpoints
            if read.half_width <= 0.042:
                break
        ended.append(whole)
        inside.append((np.array(read.low) <= phi) & (phi <= np.array(read.high)))
    assert len(set(ended)) > 4
    assert np.mean(inside) >= 0.93


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
def test_no_batch_is_begun_before_the_last_is_whole_and_the_bytes_are_the_same(
    opened, tmp_path_factory, seed
):
    """Whatever is open is evaluated in random order, until nothing is."""
    rng = np.random.default_rng(seed)
    expected = Facts(_whole(opened)).stopping
    job = opened(store=tmp_path_factory.mktemp("random").name)
    agenda, finished = Agenda(job), set()
    while True:
        left = [e for e in agenda.work if e.key not in finished]
        if not left:
            if not agenda.refresh():
                break
            continue
        chosen = left[int(rng.integers(len(left)))]
        publish(job, [chosen])
        finished.add(chosen.key)
        before = agenda.work
        if agenda.refresh():
            assert {e.key for e in before if e.entry.sequence != "reference"} <= finished
    assert Facts(job).stopping == expected
    assert not expected.reached or len(finished) < len(job.plan)
    assert _bytes(job) == _bytes(_whole(opened))


def _whole(opened: Callable[..., Job], **estimator) -> Job:
    """Return a job all of whose budget has values, far more than the target needs."""
    job = opened("whole", **estimator)
    publish(job, job.plan)
    return job


def _bytes(job: Job) -> bytes:
    results.publish(job)
    return job.ledger.store.read(f"{job.report_name}/attribution.json")


def test_the_report_says_why_it_stopped(opened):
    for target, phrase in ((TARGET, "topped after 5 of 7"), (0.001, "he budget ended first")):
        job = _whole(opened, target_half_width=target)
        found = results.publish(job)
        (attribution,) = found["attributions"]
        stopping = attribution["stopping"]
        assert stopping["reached"] == (target == TARGET)
        assert stopping["target"] == target
        design = {5: 40 + 2, 7: 56 + 4}[stopping["batches"]]  # a pair of repeats at first and in 6
        assert attribution["coalitions"]["planned"] == design + 4 + 2 * 3
        assert attribution["coalitions"]["used"] == attribution["coalitions"]["planned"]
        page = job.ledger.store.read(f"{job.report_name}/index.html").decode()
        assert phrase in page
        assert phrase in results.summary(job, found, False)


# -- what plan and status say ---------------------------------------------------------------------


def test_plan_predicts_the_width_for_the_budget_and_the_budget_for_the_target(opened):
    job = opened(target_half_width=0.015)
    assert outlook.plan(job)["half_width"] is None
    assert "unknown before" in outlook.plan_text(outlook.plan(job))
    publish(job, [e for batch in job.batches[:REACHED] for e in batch])
    found = outlook.plan(job)
    expected = half_widths(job)
    width = found["half_width"]
    assert width["now"] == pytest.approx(expected[REACHED - 1])
    assert width["at_budget"] == pytest.approx(expected[-1], rel=0.2)
    assert found["evaluations"]["planned"] == len(job.plan)
    assert 56 < width["budget_for_target"] <= 62  # 62 is every coalition
    assert f"a budget of about {width['budget_for_target']}" in outlook.plan_text(found)
    assert "batch 6 of at most 7" in outlook.status_text(outlook.status(job))


def test_a_reached_target_plans_nothing_more(opened):
    job = opened()
    publish(job, [e for batch in job.batches[:REACHED] for e in batch])
    found = outlook.plan(job)
    assert found["evaluations"]["new"] == 0
    assert found["evaluations"]["planned"] == sum(map(len, job.batches[:REACHED]))
    assert "reached after 5 of 7 batches" in outlook.plan_text(found)
    assert outlook.status(job)["evaluations"]["waiting"] == 0


# -- failures -------------------------------------------------------------------------------------


def _fail(job: Job, evaluation: Evaluation, session: str = "earlier") -> None:
    job.ledger.record_failure(evaluation.key, NumericsError("nan"), session, evaluation.title)


@pytest.mark.parametrize("max_failed", [0, 1])
def test_a_failed_coalition_ends_its_batch_only_where_it_may_be_missing(opened, max_failed):
    job = opened(max_failed=max_failed)
    bad = job.batches[1][3]
    publish(job, [e for e in job.plan if e.key != bad.key])
    assert Facts(job).stopping.batches == 2  # nobody has tried it yet
    _fail(job, bad)
    facts = Facts(job)
    assert facts.stopping.batches > 2 if max_failed else facts.stopping.batches == 2
    assert facts.missing() == [bad]
    if max_failed:
        assert results.attributions(facts)[0]["coalitions"]["failed"] == 1
    else:
        with pytest.raises(IncompleteDesign):
            results.attributions(facts)
    publish(job, [bad])
    job.ledger.forgive(bad.key)
    facts.refresh()
    assert facts.stopping == Facts(_whole(opened, max_failed=max_failed)).stopping


def test_without_an_endpoint_there_is_no_interval_to_stop_at(opened):
    job = opened(max_failed=1, endpoint_replicates=1)
    lost = next(e for e in job.plan if e.entry.role == "grand")
    publish(job, [e for e in job.plan if e.key != lost.key])
    _fail(job, lost)
    stopping = Facts(job).stopping
    assert (stopping.batches, stopping.reached, stopping.half_width) == (BATCHES, False, None)


# -- workers --------------------------------------------------------------------------------------


@pytest.fixture
def played(monkeypatch) -> list[tuple[int, set[str]]]:
    """Let the game be the model: (batch, keys still missing in earlier ones) at every beginning."""
    begun: list[tuple[int, set[str]]] = []

    def play(evaluation: Evaluation, lab: Laboratory, _: object) -> None:
        entry = evaluation.entry
        at = entry.batch if entry.sequence == "design" else 0
        earlier = [e for batch in lab.job.batches[:at] for e in batch]
        begun.append((at, {e.key for e in earlier if not lab.job.done(e)}))
        if lab.job.ledger.store.exists("out-of-memory") and entry == lab.job.batches[1][3].entry:
            raise RuntimeError("out of memory")
        publish(lab.job, [evaluation])

    monkeypatch.setattr(runner, "run_one", play)
    return begun


def test_workers_go_from_batch_to_batch_together(opened, played):
    workers = [Worker(Laboratory(opened()), i, 3, "s") for i in range(3)]
    threads = [threading.Thread(target=worker.work, args=(True,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    job = opened()
    assert [missing for _, missing in played if missing] == []
    assert max(batch for batch, _ in played) == REACHED - 1
    assert runner.complete(job)
    assert _bytes(job) == _bytes(_whole(opened))


def test_a_worker_takes_over_from_a_dead_one(opened, played):
    job = opened()
    victim = job.batches[1][0]
    job.ledger.beat(victim.key, "fine-tuning")
    name = f"work/heartbeats/{victim.key}.json"
    beat = json.loads(job.ledger.store.read(name))
    job.ledger.store.replace(name, json.dumps({**beat, "process_start": "0"}).encode())
    Worker(Laboratory(job), 0, 2, "s").work(prepares=True)
    assert runner.complete(job)


@pytest.fixture
def plain(tiny, monkeypatch) -> Job:
    """Return a job without a target whose evaluations are played."""
    job = tiny(**SIX, estimator={**SPEC, "surrogate": "none"})
    prepare(job)
    monkeypatch.setattr(runner, "run_one", lambda e, lab, _: publish(lab.job, [e]))
    return job


def test_a_shard_stays_until_its_own_part_is_done(plain, monkeypatch):
    """A pod died at the last evaluation; on another host its heartbeat seems alive for a while."""
    monkeypatch.setattr(ledger, "ALIVE_SECONDS", 2.0)
    last = plain.work[0]
    publish(plain, plain.work[1:])
    plain.ledger.beat(last.key, "fine-tuning")
    name = f"work/heartbeats/{last.key}.json"
    beat = json.loads(plain.ledger.store.read(name))
    plain.ledger.store.replace(name, json.dumps({**beat, "host": "gone", "token": "x"}).encode())
    Worker(Laboratory(plain), 1, 2, "other").work(prepares=True)
    assert not runner.complete(plain), "to another shard it is nothing"
    Worker(Laboratory(plain), 0, 2, "own").work(prepares=True)
    assert runner.complete(plain)


def test_results_of_another_numerics_class_are_not_shown_as_none(plain, tiny, tmp_path):
    publish(plain, plain.work)
    tracking = {"uri": f"sqlite:///{tmp_path}/never.db"}
    elsewhere = tiny(**SIX, estimator={**SPEC, "surrogate": "none"}, tracking=tracking)
    elsewhere.numerics = {**plain.numerics, "ops": "others"}
    with pytest.raises(DataError, match="numerics class"):
        results.sync(elsewhere)
    assert not (tmp_path / "never.db").exists()
    found = outlook.status(elsewhere)
    assert found["evaluations"]["done"] == 0
    assert found["other_numerics"] == [plain.numerics]
    assert "not counted" in outlook.status_text(found)
    assert outlook.status(plain)["other_numerics"] == []
    (plan,) = plain.ledger.store.walk("plans")
    plain.ledger.store.replace(plan, b"{")
    assert outlook.status(plain)["evaluations"]["done"] > 0  # a damaged plan is for `repair`


def test_what_is_tried_again_now_has_not_failed(plain):
    """A failure of an earlier run is no reason to report while a shard is at it again."""
    again = plain.work[0]
    publish(plain, plain.work[1:])
    plain.ledger.record_failure(again.key, RuntimeError("out of memory"), "before", "x")
    assert not runner._others_at_work(plain)
    plain.ledger.beat(again.key, "fine-tuning")
    assert runner._others_at_work(plain)


def test_a_failing_coalition_ends_the_run_and_the_next_goes_on(opened, played, capsys):
    job = opened()
    job.ledger.store.publish("out-of-memory", b"")
    Worker(Laboratory(job), 0, 1, "one").work(prepares=True)
    assert "out of memory" in capsys.readouterr().err
    assert max(batch for batch, _ in played) == 1
    assert outlook.status(job)["evaluations"]["failed"] == 1
    job.ledger.store.delete("out-of-memory")
    Worker(Laboratory(opened()), 0, 1, "two").work(prepares=True)
    assert runner.complete(opened())
    assert _bytes(opened()) == _bytes(_whole(opened))
