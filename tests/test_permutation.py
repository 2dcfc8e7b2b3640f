"""Permutation sampling against orders that are listed, and the definition."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from math import comb

import games
import numpy as np
import pytest
from test_estimators import observe, table

from attr_batch.errors import DataError, SpecError
from attr_batch.estimators import Permutation, design
from attr_batch.estimators.observations import gather
from attr_batch.estimators.permutation import permutation_means


def listed(plan, game):
    """Gains along the orders of each batch of the plan, read off its nested coalitions."""
    n, batches = game.n, defaultdict(list)
    for entry in plan:
        if entry.sequence == "design":
            batches[entry.batch].append(entry.coalition.mask)
    units = []
    for masks in batches.values():
        gains = np.zeros((2, n))
        for row, path in enumerate((masks[::2], masks[1::2][::-1])):
            path = [0, *path, (1 << n) - 1]
            for before, after in pairwise(path):
                i = (before ^ after).bit_length() - 1
                assert after == before | 1 << i
                gains[row, i] = np.diff(game.v([before, after]))[0]
        units.append(gains.mean(0))
    return np.array(units)


@pytest.mark.parametrize("n", [30, 50])
def test_the_mean_and_its_variance_over_listed_orders(n):
    # Few permutations of many contributors share no coalition but by chance: here none.
    game, one = games.coverage(n, 2), Permutation(budget=2 * (n - 1) * 3, seed=4, holdout=0)
    plan = one.plan(n)
    units = listed(plan, game)
    assert len(units) == 3
    found = permutation_means(gather(observe(plan, game), n).rows, design.orders(n, 4))
    np.testing.assert_allclose(found.phi, units.mean(0), atol=1e-12)
    assert found.variance is not None
    assert found.drawn == 3
    # The orders are the population of the sample's variance: var(ddof=0) / (3 - 1).
    np.testing.assert_allclose(found.variance, units.var(0, ddof=1) / 3, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_with_every_coalition_it_is_the_shapley_value(n):
    v = np.random.default_rng(n).normal(size=1 << n)
    found = permutation_means(gather(table(v, n), n).rows, [])
    place = lambda Z: v[(Z @ (1 << np.arange(n))).astype(int)]  # noqa: E731
    np.testing.assert_allclose(found.phi, games.enumerate_shapley(place, n), atol=1e-12)


def test_orders_of_another_plan_are_found_by_inclusion():
    n, game = 30, games.coverage(30, 2)
    plan = Permutation(budget=58, seed=4, holdout=0).plan(n)
    observations = observe(plan, game)
    found = Permutation(seed=5).estimate(observations, n)
    assert found.values == pytest.approx(Permutation(seed=4).estimate(observations, n).values)
    assert found.values == pytest.approx(listed(plan, game).mean(0))


def test_a_permutation_that_is_cut_waits():
    n, game = 12, games.class_entropy(12, 1)
    whole = Permutation(budget=44, holdout=0).plan(n)
    cut = Permutation(budget=60, holdout=0).plan(n)
    a, b = (Permutation().estimate(observe(plan, game), n) for plan in (whole, cut))
    assert a.values == pytest.approx(b.values, abs=1e-12)
    assert b.used == a.used + 16


def test_of_a_failed_coalition_s_permutation_the_reverse_is_read():
    n, game = 12, games.class_entropy(12, 1)
    plan = Permutation(budget=22, holdout=0).plan(n)
    lost = next(e for e in plan if e.coalition.size == 5)
    kept = [e for e in plan if e is not lost]
    found = permutation_means(gather(observe(kept, game), n).rows, design.orders(n, 0))
    masks = [e.coalition.mask for e in plan if e.sequence == "design"]
    path = masks[::2] if lost.coalition.mask in masks[1::2] else masks[1::2][::-1]
    path = [0, *path, (1 << n) - 1]
    gains = np.zeros(n)
    for before, after in pairwise(path):
        gains[(before ^ after).bit_length() - 1] = np.diff(game.v([before, after]))[0]
    np.testing.assert_allclose(found.phi, gains, atol=1e-12)


def test_without_a_whole_order_nothing_is_said():
    n, game = 12, games.coverage(12)
    plan = Permutation(budget=22, holdout=0).plan(n)
    kept = [e for e in plan if e.coalition.size not in (4, 8)]
    with pytest.raises(DataError, match="none of the 12! orders"):
        Permutation().estimate(observe(kept, game), n)
    with pytest.raises(SpecError, match=r"a budget of 20 holds no permutation of 12"):
        Permutation(budget=20).plan(n)


def test_its_intervals_cover():
    inside, n = [], 8
    for seed in range(40):
        game = games.mean_quality(n, seed % 4)
        one = Permutation(budget=14 * 7, seed=seed, holdout=0)
        found = one.estimate(observe(one.plan(n), game, 0.2 * game.sd(300), seed), n)
        assert found.low is not None
        assert found.high is not None
        inside += [a < x < b for a, x, b in zip(found.low, game.shapley(), found.high, strict=True)]
    assert 0.88 < np.mean(inside) < 0.995


def test_endpoint_noise_is_in_the_interval():
    one = Permutation(budget=22 * 3, holdout=0)
    calm = observe(one.plan(12), games.linear(12), 0.0)
    loud = [
        replace(o, value=o.value + (-1) ** o.replicate) if o.role == "grand" else o for o in calm
    ]
    found = one.estimate(loud, 12)
    last = permutation_means(gather(calm, 12).rows, design.orders(12, 0)).by_full
    assert found.se is not None
    np.testing.assert_allclose(found.se, np.sqrt(4 / 3) / 2 * last, atol=1e-7)
    assert last.sum() == pytest.approx(1)


# ------------------------------------------------------------------ the design


@pytest.mark.parametrize("n", [2, 3, 5, 20, 64])
def test_the_design_is_nested_and_measures_nothing_twice(n):
    entries = design.prefix(design.permutations(n, 3), min(400, 2**n - 2))
    assert len({e.coalition for e in entries}) == len(entries)
    for a, b in zip(entries[::2], entries[1::2], strict=True):
        assert a.coalition.complement() == b.coalition
        assert a.pair == b.pair
    first = [e.coalition for e in entries[: 2 * (n - 1) : 2]]
    assert [c.size for c in first] == list(range(1, n))
    assert all(a.mask & b.mask == a.mask for a, b in pairwise(first))


def test_when_all_are_measured_the_next_replicate_begins():
    entries = design.prefix(design.permutations(4, 0), 28)
    assert {e.coalition for e in entries[:14]} == {e.coalition for e in entries[14:]}
    assert [e.replicate for e in entries] == [0] * 14 + [1] * 14
    batches = [e.batch for e in entries]
    assert sorted(set(batches)) == list(range(max(batches) + 1))


def test_every_order_is_equally_likely():
    count = defaultdict(int)
    for seed in range(2400):
        a, b = (e.coalition for e in design.prefix(design.permutations(4, seed), 3)[::2])
        count[a, b] += 1
    assert len(count) == 4 * 3
    chi2 = sum((c - 200) ** 2 / 200 for c in count.values())
    assert chi2 < 31  # 11 degrees of freedom


def test_the_default_budget_is_whole_permutations():
    assert sum(e.sequence == "design" for e in Permutation().plan(20)) == 6 * 19
    assert sum(e.sequence == "design" for e in Permutation().plan(4)) == 14
    assert comb(20, 1) == sum(
        e.coalition.size == 1 for e in design.prefix(design.permutations(20, 0), 4000)
    )
