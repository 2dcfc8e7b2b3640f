"""Going on when contributors come or go: the design of a new job, with what is known in its places.

The oracle is the new design itself: on closed-form games what goes on must have its error, its
bias and its coverage. Old coalitions put in front of it do not (half again the error).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import games
import numpy as np
import pytest
from conftest import TINY, work_through
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attr_batch import outlook, results, runner
from attr_batch.coalition import Coalition
from attr_batch.errors import SpecError
from attr_batch.estimators import Entry, Observation, PairedLS
from attr_batch.estimators.continued import continued
from attr_batch.estimators.design import held_out
from attr_batch.job import Job
from attr_batch.predecessor import find


def earlier(n: int, place: list[int | None], seed: int) -> list[Coalition]:
    """Return what a job of 6 evaluations a contributor measured, as its successor sees it."""
    known = []
    for entry in PairedLS(holdout=0, seed=seed).plan(len(place)):
        members = [place[i] for i in entry.coalition.members]
        if entry.role in ("design", "grand") and None not in members:
            known.append(Coalition.of([i for i in members if i is not None], n))
    return [c for c in dict.fromkeys(known) if c.size < n]


def design(entries: list[Entry]) -> list[Coalition]:
    return [e.coalition for e in entries if e.sequence == "design"]


def sizes(coalitions: list[Coalition]) -> list[int]:
    return [min(c.size, c.n - c.size) for c in coalitions]


@settings(max_examples=40, deadline=None)
@example(n=6, left=1, came=0, budget=33, seed=193)
@given(
    n=st.integers(3, 12),
    left=st.integers(0, 3),
    came=st.integers(0, 3),
    budget=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_a_continued_plan_is_a_permutation_of_the_design_in_its_strata(n, left, came, budget, seed):
    came = min(came, n - 1)
    place: list[int | None] = [*range(n - came), *[None] * left]
    shared = Coalition.of(range(n - came), n)
    known = earlier(n, place, seed) if len(place) > 1 else []
    plan = PairedLS(budget=2 * budget, seed=seed + 1).plan(n)
    found = continued(plan, shared, known)
    new, fresh = design(found), design(plan)
    assert sizes(new) == sizes(fresh)
    assert all(b == a.complement() for a, b in list(pairwise(new))[::2])
    distinct = {(e.coalition, e.replicate) for e in found if e.sequence == "design"}
    assert len(distinct) == len(new)
    again = [e for e in found if e.sequence == "repeat"]
    assert all(e.coalition == new[e.index] for e in again)
    measured = [(e.coalition, e.replicate) for e in found if e.sequence in ("design", "repeat")]
    assert len(set(measured)) == len(measured)
    # a design that has drawn every pair repeats some itself, which are not repeated once more
    twice = {e.coalition for e in plan if e.sequence == "design" and e.replicate}
    repeats = [e for e in plan if e.sequence == "repeat"]
    assert len(again) == sum(new[e.index] not in twice for e in repeats)
    held = {e.coalition for e in found if e.role == "holdout"}
    assert held.isdisjoint(new)
    assert sum(map(held_out, new)) == sum(map(held_out, fresh))
    assert [e for e in found if e.role != "design"] == [e for e in plan if e.role != "design"]
    # the same side of a pair holds the newcomers, so that they are apart as often as by chance
    apart = [sum(not c.mask & ~shared.mask for c in coalitions) for coalitions in (new, fresh)]
    assert apart[0] == apart[1]


def test_a_smaller_budget_is_a_prefix():
    known = earlier(10, [*range(9)], 3)
    shared = Coalition.of(range(9), 10)
    small, large = (
        design(continued(PairedLS(budget=m, holdout=0).plan(10), shared, known)) for m in (30, 90)
    )
    assert large[:30] == small


def test_with_nobody_gone_or_come_the_known_coalitions_come_first():
    """The same game under another seed: the new design is the old one as far as sizes allow."""
    known = design(PairedLS(budget=60, holdout=0, seed=1).plan(10))
    found = continued(PairedLS(budget=60, holdout=0, seed=2).plan(10), Coalition.grand(10), known)
    assert sum(c in known for c in design(found)) >= 52


def simulate(n: int, place: list[int | None], *, goes_on: bool, budget: int, runs: int):
    """Return (error, bias) relative to the values' length, and the intervals' coverage."""
    game = games.synergy(n, 1)
    phi, sd = game.shapley(), 0.1 * game.sd(500)
    shared = Coalition.of((i for i in place if i is not None), n)
    values, covered = [], []
    for seed in range(runs):
        estimator = PairedLS(budget=budget, holdout=0, seed=10_000 + seed)
        plan = estimator.plan(n)
        if goes_on:
            plan = continued(plan, shared, earlier(n, place, seed))
        noise = sd * np.random.default_rng(seed).normal(size=len(plan))
        v = game.v([e.coalition.mask for e in plan]) + noise
        read = estimator.estimate(
            [Observation(e.coalition, x, e.role) for e, x in zip(plan, v, strict=True)], n
        )
        values.append(read.values)
        covered.append((np.array(read.low) <= phi) & (phi <= np.array(read.high)))
    off = np.array(values) - phi
    norm = np.linalg.norm(phi)
    error = np.sqrt((off**2).sum(1).mean()) / norm
    return error, np.linalg.norm(off.mean(0)) / norm, np.mean(covered)


@pytest.mark.parametrize(
    "place",
    [[*range(9)], [*range(8)], [None, *range(10)], [*range(9), None]],
    ids=["one came", "two came", "one left", "one sent other images"],
)
def test_going_on_has_the_error_the_bias_and_the_coverage_of_a_new_design(place):
    new = simulate(10, place, goes_on=False, budget=60, runs=120)
    on = simulate(10, place, goes_on=True, budget=60, runs=120)
    assert on[0] <= 1.1 * new[0]
    assert on[1] <= new[1] + 0.03
    assert 0.93 <= on[2] <= 0.99


def test_going_on_is_consistent():
    """Of what bias a small design has, little is left with ten times the coalitions."""
    _, bias, _ = simulate(10, [*range(9)], goes_on=True, budget=600, runs=40)
    assert bias < 0.02


# -- jobs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def past(tmp_path_factory) -> Job:
    """A finished tiny job of five contributors that keeps its samples; not to be written to."""
    from attr_batch.spec import validate

    job = Job(validate(_tree(tmp_path_factory.mktemp("past") / "store", "01234")))
    work_through(job)
    return job


def _tree(store, digits: str, **sections):
    return {
        **TINY,
        "store": str(store),
        "data": {"kind": "digits", "contributors": list(digits)},
        "sampling": {**TINY["sampling"], "keep": "all"},
        **sections,
        "estimator": {**TINY["estimator"], "holdout": 0, **sections.get("estimator", {})},
    }


@pytest.fixture
def going_on(past, tmp_path) -> Callable[..., Job]:
    """Open a job over a copy of the finished one's store that goes on with other digits."""
    import shutil

    from attr_batch.spec import validate

    shutil.copytree(past.ledger.store.root, tmp_path / "copy")

    def job(digits: str, base: str | None = past.dense_id, **sections) -> Job:
        sections.setdefault("estimator", {"continues": past.spec_digest[:12]})
        model = {**TINY["model"], "base": base}
        opened = Job(validate(_tree(tmp_path / "copy", digits, model=model, **sections)))
        opened.check()
        return opened

    return job


def reused(job: Job, past: Job) -> int:
    """Number of evaluations whose samples the earlier job has drawn, by their keys."""
    keys = {e.key for e in past.plan}
    return sum(e.key in keys for e in job.plan)


@pytest.mark.parametrize(("digits", "least"), [("012345", 3), ("0123", 2)])
def test_a_job_goes_on_when_contributors_come_or_go(going_on, past, digits, least):
    job = going_on(digits)
    found = outlook.plan(job)
    standing = found["continues"]["coalitions"]["in this design"]
    assert standing >= least
    # the empty coalition's replicates and the models without coalition are as they were
    assert reused(job, past) >= standing + 2 + 3
    assert found["evaluations"]["only measured"] == reused(job, past)
    assert found["things"]["trained model"]
    assert found["things"]["pruned model"]
    text = outlook.plan_text(found)
    assert f"{standing} stand in this design" in text
    assert "with these images" in text
    assert "trained model)" not in text
    runs = len(job.ledger.store.children("runs"))
    work_through(job)
    assert runner.complete(job)
    assert len(job.ledger.store.children("runs")) == runs + len(job.plan) - reused(job, past)
    (attribution,) = results.publish(job)["attributions"]
    assert [c["id"] for c in attribution["contributors"]] == list(digits)
    assert attribution["coalitions"]["failed"] == 0


def test_what_was_planned_counts_before_it_is_measured_and_plan_says_how_much_is(going_on):
    whole = going_on("01235")
    lines = outlook.plan(whole)["continues"]["coalitions"]
    assert lines["measured"] == lines["planned"] == 9 > lines["valid"]  # the design and everybody
    assert "9 of the 9 are measured so far" in outlook.plan_text(outlook.plan(whole))
    for key in list(whole.predecessor.planned.values())[:4]:
        whole.ledger.store.path(whole.ledger.derivation_name(key)).unlink()
    less = going_on("01235")
    assert outlook.plan(less)["continues"]["coalitions"] == {**lines, "measured": 5}
    assert [e.key for e in less.plan] == [e.key for e in whole.plan]


def test_without_the_pinned_base_everything_is_new_and_plan_says_why(going_on, past):
    job = going_on("012345", base=None)
    found = outlook.plan(job)
    assert reused(job, past) == 1  # the untrained model
    assert found["evaluations"]["new"] == len(job.plan) - 1
    text = outlook.plan_text(found)
    assert f"all of them are new because of model.base, which would have to be {past.dense_id}" in (
        text
    )


def test_without_kept_samples_a_refitted_instrument_makes_all_new(going_on, past):
    job = going_on("012345")
    for path in job.ledger.store.root.glob("runs/*/samples.safetensors"):
        path.unlink()
    found = outlook.plan(job)["evaluations"]
    assert (found["only measured"], found["new"]) == (0, len(job.plan))


def test_whoever_sent_other_images_is_a_newcomer(going_on, past):
    job = going_on("01234")
    roster = job.card.roster
    changed = (replace(roster.contributors[0], digest="0" * 64), *roster.contributors[1:])
    other = find(job.ledger, past.spec_digest, replace(roster, contributors=changed), job.numerics)
    assert job.predecessor.shared == Coalition.grand(5)
    assert other.shared == Coalition.of([1, 2, 3, 4], 5)
    assert all(0 not in c for c in other.known)
    assert 0 < len(other.known) < len(job.predecessor.known)


@pytest.mark.parametrize(
    ("continues", "message"),
    [("0123456789abcdef", "0 jobs"), (None, "complement pairs")],
)
def test_what_cannot_be_continued_is_refused(going_on, past, continues, message):
    kind = {} if continues else {"kind": "reference"}
    continues = continues or past.spec_digest
    with pytest.raises(SpecError, match=message) as caught:
        going_on("012345", estimator={"continues": continues, **kind})
    assert "estimator.continues" in str(caught.value)
    assert caught.value.exit_code == 64


def test_a_digest_and_its_beginning_name_the_same_job(going_on, past):
    short = going_on("012345")
    whole = going_on("012345", estimator={"continues": past.spec_digest})
    assert short.spec_digest == whole.spec_digest
