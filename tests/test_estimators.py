"""The estimators against games with known values, the axioms, and dense float64 references."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import games
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr
from scipy.stats import t as student

from attr_batch.coalition import Coalition
from attr_batch.errors import DataError, IncompleteDesign, SpecError
from attr_batch.estimators import (
    Estimator,
    Exact,
    GaussianProcess,
    Observation,
    PairedLS,
    Permutation,
    Reference,
    Ridge,
    design,
    regression,
)
from attr_batch.estimators.attribution import chance95, spearman
from attr_batch.estimators.observations import gather, indicators
from attr_batch.estimators.ridge import FADING, fading_shapley, ridge
from attr_batch.estimators.semivalue import exact

SAMPLED = (Reference, PairedLS, Ridge)
FAMILY = (*SAMPLED, GaussianProcess, Permutation)


def observe(plan, game, sd=0.0, seed=0):
    """Measure a plan: the game's utilities with i.i.d. noise."""
    noise = sd * np.random.default_rng(seed).normal(size=len(plan))
    values = game.v([entry.coalition.mask for entry in plan]) + noise
    return [
        Observation(e.coalition, float(v), e.role, e.pair, e.replicate)
        for e, v in zip(plan, values, strict=True)
    ]


def table(values, n):
    """Observations of all 2^n utilities; values[mask]."""
    roles = {0: "empty", (1 << n) - 1: "grand"}
    return [
        Observation(Coalition(mask, n), float(v), roles.get(mask, "design"))
        for mask, v in enumerate(values)
    ]


def error(values, phi):
    return np.linalg.norm(np.asarray(values) - phi) / np.linalg.norm(phi)


# ------------------------------------------------------------------ the games themselves

TEXTBOOK = (
    games.linear(6),
    games.unanimity(6, [1, 3]),
    games.airport([3, 1, 2, 5, 5, 0.5]),
    games.weighted_voting([4, 3, 2, 1, 1], 6),
)


@pytest.mark.parametrize(
    "game", [*TEXTBOOK, *(family(8, 3) for family in (*games.FAMILIES, *games.UNSEEN))]
)
def test_the_oracle_agrees_with_the_definition(game):
    np.testing.assert_allclose(
        game.shapley(), games.enumerate_shapley(game.value, game.n), atol=1e-11
    )


def test_glove_values_are_the_textbook_ones():
    np.testing.assert_allclose(games.glove(1, 2).shapley(), [2 / 3, 1 / 6, 1 / 6])


# ------------------------------------------------------------------ plans


@pytest.mark.parametrize("estimator", FAMILY)
@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 20, 64, 258])
def test_a_larger_budget_extends_a_smaller_one(estimator, n):
    fewest = 2 * n if estimator is Permutation else 0
    small = estimator(budget=20 + fewest, holdout=0, repeats=0, seed=3).plan(n)
    large = estimator(budget=60 + fewest, holdout=0, repeats=0, seed=3).plan(n)
    assert large[: len(small)] == small


@pytest.mark.parametrize("n", [5, 6, 9, 20, 64, 258])
def test_holdout_does_not_depend_on_the_budget_and_is_disjoint(n):
    budgets = [m for m in (2 * n, 10 * n) if m < (1 << n) // 2] or [2 * n]
    held = []
    for estimator, budget in itertools.product((PairedLS, Ridge), budgets):
        plan = estimator(budget=budget, holdout=8).plan(n)
        pairs = {min(e.coalition, e.coalition.complement()) for e in plan if e.sequence == "design"}
        held.append([e.coalition for e in plan if e.role == "holdout"])
        assert all(min(c, c.complement()) not in pairs for c in held[-1])
        assert len(set(held[-1])) == len(held[-1])
        assert all(n <= 4 * c.size <= 3 * n for c in held[-1])
    assert all(other == held[0] for other in held)
    assert len(held[0]) == 8 or n == 5


@pytest.mark.parametrize("n", [5, 6, 9, 20])
def test_the_paper_s_holdout_leaves_out_what_was_drawn(n):
    def parts(budget, holdout):
        plan = Reference(budget=budget, holdout=holdout, seed=1).plan(n)
        return [[e.coalition for e in plan if e.role == role] for role in ("design", "holdout")]

    sequence = [e.coalition for e in design.prefix(design.holdout(n, 1), 500)]
    (some, few), (more, many) = parts(2 * n, 4), parts(10 * n, 8)
    assert few == [c for c in sequence if c not in some][:4]
    assert many == [c for c in sequence if c not in more][:8]
    assert parts(10 * n, 4)[1] == many[:4]
    assert {*some, *few} <= {*more, *parts(10 * n, 4)[1]}  # growing evaluates nothing in vain


def test_when_everything_is_measured_nothing_is_held_out():
    plan = Ridge(budget=30, holdout=8).plan(5)
    assert len({e.coalition for e in plan if e.sequence == "design"}) == 30
    assert not [e for e in plan if e.role == "holdout"]


@pytest.mark.parametrize("other", [PairedLS, GaussianProcess])
def test_readings_of_the_paired_design_share_every_entry(other):
    options = {"budget": 80, "seed": 5, "holdout": 7, "repeats": 0.05}
    assert Ridge(**options).plan(20) == other(**options).plan(20)


@pytest.mark.parametrize("n", [4, 20])
def test_repeats_are_the_first_pairs_once_more_and_grow_with_the_budget(n):
    def parts(budget, repeats=0.05):
        plan = Ridge(budget=budget, repeats=repeats, holdout=0).plan(n)
        return (
            [e for e in plan if e.sequence == "design"],
            [e for e in plan if e.sequence == "repeat"],
            [e for e in plan if e.sequence == "endpoint"],
        )

    chosen, again, ends = parts(14 if n == 4 else 120)
    assert len(again) == (2 if n == 4 else 6)
    assert [e.coalition for e in again] == [e.coalition for e in chosen[: len(again)]]
    assert {(e.role, e.replicate, e.probability) for e in again} == {("design", 1, None)}
    for budget in (2, 10, 14):
        fewer, some, same = parts(budget)
        assert chosen[: len(fewer)] == fewer
        assert again[: len(some)] == some
        assert same == ends
    assert not parts(14, 0.0)[1]


def test_a_batch_asks_for_its_own_repeats():
    n, batch = 20, 20
    whole = Ridge(budget=200, repeats=0.1, holdout=0).plan(n)
    for b in range(1, 11):
        upto = [e for e in whole if e.sequence in ("design", "repeat") and e.batch < b]
        plan = Ridge(budget=b * batch, repeats=0.1, holdout=0).plan(n)
        assert {*upto} == {e for e in plan if e.sequence != "endpoint"}


def test_what_the_design_repeats_itself_is_not_repeated_again():
    plan = Ridge(budget=28, repeats=0.5, holdout=0).plan(4)
    keys = [(e.coalition, e.replicate) for e in plan if e.role == "design"]
    assert len(set(keys)) == len(keys) == 28


def test_repeats_tell_the_noise():
    one = Ridge(budget=200, repeats=0.5)
    found = one.estimate(observe(one.plan(12), games.coverage(12), 0.3), 12)
    assert found.noise.repeats_df == found.noise.repeated == 100
    assert found.noise.repeats_sd == pytest.approx(0.3, rel=0.2)


@pytest.mark.parametrize(("sizes", "inside"), [("uniform", (1, 19)), ((0.2, 0.8), (4, 16))])
def test_sizes_of_the_paired_design(sizes, inside):
    n, low, high = 20, *inside
    entries = [
        e for e in Ridge(budget=600, sizes=sizes, holdout=0).plan(n) if e.sequence == "design"
    ]
    assert len({e.coalition for e in entries}) == len(entries) == 600
    count = np.bincount([e.coalition.size for e in entries], minlength=n + 1)
    assert count[:low].sum() == count[high + 1 :].sum() == 0
    p = np.ones(n + 1) if sizes == "uniform" else np.array(design.size_probability(n))
    p[:low] = p[high + 1 :] = 0
    first = np.bincount([e.coalition.size for e in entries[:100]], minlength=n + 1)
    assert np.abs(np.cumsum(first - 100 * p / p.sum())[: n // 2]).max() < 4


def test_uniform_sizes_are_weighted_back():
    game, n = games.class_entropy(8, 1), 8
    one = PairedLS(budget=230, sizes="uniform", holdout=0)
    found = one.estimate(observe(one.plan(n), game), n)
    rows = gather(observe(one.plan(n), game), n).rows
    w = regression.row_weights(rows)
    share = np.bincount(rows.s.astype(int), w, minlength=n + 1) / w.sum()
    np.testing.assert_allclose(share, design.size_probability(n), atol=1e-12)
    assert error(found.values, game.shapley()) < 0.02


@pytest.mark.parametrize("window", [(0.2, 0.7), (0.5, 0.5), (-0.1, 1.1), (0.8, 0.2)])
def test_a_window_without_complements_is_refused(window):
    with pytest.raises(ValidationError, match="a window is"):
        Ridge(sizes=window)
    with pytest.raises(SpecError, match="no coalition of 3 contributors"):
        Ridge(sizes=(0.4, 0.6)).plan(3)


@pytest.mark.parametrize("n", [5, 10, 20, 258])
def test_pairs_are_complements_and_never_repeat(n):
    entries = [e for e in Ridge(budget=min(400, 2**n - 2)).plan(n) if e.sequence == "design"]
    for k, (a, b) in enumerate(zip(entries[::2], entries[1::2], strict=True)):
        assert a.coalition.complement() == b.coalition
        assert a.pair == b.pair == k
        assert [a.index, b.index] == [2 * k, 2 * k + 1]
    assert len({e.coalition for e in entries}) == len(entries)


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_a_full_budget_enumerates_and_more_repeats_as_replicates(n):
    every = (1 << n) - 2
    entries = [e for e in Ridge(budget=2 * every).plan(n) if e.sequence == "design"]
    assert {e.coalition for e in entries[:every]} == {e.coalition for e in entries[every:]}
    assert [e.replicate for e in entries] == [0] * every + [1] * every


@pytest.mark.parametrize("n", [20, 50, 258])
def test_every_prefix_has_the_kernel_s_sizes(n):
    p = np.array(design.size_probability(n))
    batch = 2 * design.batch_pairs(n)
    entries = design.prefix(design.paired(n, 1), 6 * batch)
    for m in range(batch, 3 * batch, batch):  # before small strata are used up
        count = np.bincount([e.coalition.size for e in entries[:m]], minlength=n + 1)
        drift = np.abs(np.cumsum(count - m * p)[: n // 2])
        assert drift.max() < 4  # independent draws drift by sqrt(m)


def test_every_member_of_a_size_is_equally_likely():
    first = Counter(
        next(e.coalition for e in design.paired(4, seed) if e.coalition.size in (1, 3))
        for seed in range(2000)
    )
    assert len(first) == 8  # either member of the pair may come first
    assert max(first.values()) < 1.35 * 2000 / 8
    assert min(first.values()) > 0.65 * 2000 / 8


def test_draw_probability_is_conditional_on_what_was_drawn():
    n, p = 6, design.size_probability(6)
    first, second = list(design.prefix(design.paired(n, 0), 4))[::2]
    pairs = {1: 6, 2: 15, 3: 10}
    s1, s2 = (min(e.coalition.size, n - e.coalition.size) for e in (first, second))
    q = {1: 2 * p[1], 2: 2 * p[2], 3: p[3]}
    assert first.probability == pytest.approx(q[s1] / pairs[s1])
    assert second.probability == pytest.approx(q[s2] / (pairs[s2] - (s1 == s2)))


def test_batches_are_whole_pairs():
    entries = [e for e in Ridge(budget=100).plan(20) if e.sequence == "design"]
    assert Counter(e.batch for e in entries) == dict.fromkeys(range(5), 20)


def test_endpoints_come_first_with_their_replicates():
    plan = Ridge(budget=2, endpoint_replicates=3).plan(7)[:6]
    assert [e.role for e in plan] == ["empty", "grand"] * 3
    assert [e.replicate for e in plan] == [0, 0, 1, 1, 2, 2]
    assert [e.index for e in plan] == list(range(6))
    assert {e.sequence for e in plan} == {"endpoint"}


def test_the_paper_s_repeats_are_replicates():
    entries = [e for e in Reference(budget=200).plan(6) if e.sequence == "design"]
    seen = Counter()
    for e in entries:
        assert e.replicate == seen[e.coalition]
        seen[e.coalition] += 1
    assert max(seen.values()) > 1


def test_the_paper_s_sizes_follow_the_kernel():
    draws = 20_000
    sizes = [e.coalition.size for e in design.prefix(design.independent(20, 0), draws)]
    p = np.array(design.size_probability(20))[1:20]
    count = np.bincount(sizes, minlength=20)[1:]
    chi2 = float(((count - draws * p) ** 2 / (draws * p)).sum())
    assert chi2 < 45  # 18 degrees of freedom


def test_the_paper_s_draws_have_the_probability_they_say():
    draws = 20_000
    entries = design.prefix(design.independent(6, 0), draws)
    p = {e.coalition: e.probability for e in entries}
    assert len(p) == 62
    assert sum(p.values()) == pytest.approx(1)
    count = Counter(e.coalition for e in entries)
    chi2 = sum((count[c] - draws * p[c]) ** 2 / (draws * p[c]) for c in p)
    assert chi2 < 110  # 61 degrees of freedom


def test_the_closed_form_tends_to_the_shapley_value():
    game, one = games.class_entropy(6, 1), Reference(budget=40_000, holdout=0)
    found = one.estimate(observe(one.plan(6), game), 6)
    assert error(found.values, game.shapley()) < 0.02


def test_plans_of_seeds_differ():
    assert Ridge(budget=40, seed=0).plan(20) != Ridge(budget=40, seed=1).plan(20)


def test_exact_plans_everything_once():
    plan = Exact(endpoint_replicates=1).plan(5)
    assert sorted(e.coalition.mask for e in plan) == list(range(32))


@pytest.mark.parametrize(
    "given", [{"budget": 200_002}, {"holdout": 10_001}, {"endpoint_replicates": 101}]
)
@pytest.mark.parametrize("kind", [*SAMPLED, GaussianProcess, Permutation, Exact])
def test_plans_beyond_reason_are_refused(kind, given):
    if given.keys() <= kind.model_fields.keys():
        with pytest.raises(ValidationError, match="less than or equal"):
            kind(**given)


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValidationError, match="31 is odd"):
        Ridge(budget=31)
    with pytest.raises(ValidationError):
        Exact.model_validate({"kind": "exact", "budget": 60})
    with pytest.raises(SpecError, match=r"^1 contributor: ") as caught:
        Ridge(budget=10).plan(1)
    assert caught.value.problems[0].where is None  # a plan may have no job and no data
    with pytest.raises(SpecError, match=r"^5001 contributors, at most 5000"):
        Ridge().plan(5001)
    with pytest.raises(SpecError, match=r"2\^17"):
        Exact().plan(17)


def test_the_default_budget_is_six_a_contributor_or_everything():
    assert sum(e.sequence == "design" for e in Ridge().plan(20)) == 120
    assert sum(e.sequence == "design" for e in Ridge().plan(4)) == 14


def test_the_union_reads_every_kind():
    adapter = TypeAdapter(Estimator)
    for kind in ("reference", "paired_ls", "ridge", "gp", "permutation", "exact"):
        assert adapter.validate_python({"kind": kind}).kind == kind


# ------------------------------------------------------------------ axioms, by enumeration


utilities = st.integers(2, 5).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.floats(-10, 10), min_size=1 << n, max_size=1 << n),
        st.lists(st.floats(-10, 10), min_size=1 << n, max_size=1 << n),
    )
)


@given(utilities)
@settings(max_examples=40, deadline=None)
def test_with_all_coalitions_every_axiom_holds(case):
    n, u, v = case
    u, v = np.array(u), np.array(v)
    masks = np.arange(1 << n)

    def solve(values):
        return np.array(Exact().estimate(table(values, n), n).values)

    phi_u, phi_v = solve(u), solve(v)
    place = {(masks[:, None] >> np.arange(n) & 1)[m].tobytes(): m for m in masks}
    value = lambda Z: u[[place[row.astype(int).tobytes()] for row in Z]]  # noqa: E731
    np.testing.assert_allclose(phi_u, games.enumerate_shapley(value, n), atol=1e-9)
    assert abs(phi_u.sum() - (u[-1] - u[0])) < 1e-9
    np.testing.assert_allclose(solve(2 * u - 3 * v), 2 * phi_u - 3 * phi_v, atol=1e-8)
    without = masks & ~1  # player 0 changes nothing
    assert abs(solve(u[without])[0]) < 1e-9
    swapped = (masks & ~3) | (masks & 1) << 1 | (masks >> 1 & 1)  # players 0 and 1 are alike
    alike = solve(u + u[swapped])
    assert abs(alike[0] - alike[1]) < 1e-9
    for estimator in (PairedLS, Ridge):
        np.testing.assert_array_equal(estimator().estimate(table(u, n), n).values, phi_u)


@given(st.integers(2, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 2**32 - 1))))
@settings(max_examples=30, deadline=None)
def test_regression_with_all_coalitions_is_the_definition(case):
    n, seed = case
    rows = gather(table(np.random.default_rng(seed).normal(size=1 << n), n), n).rows
    measured = exact(rows, "shapley")
    assert measured is not None
    phi = measured[0]
    np.testing.assert_allclose(regression.paired_least_squares(rows).phi, phi, atol=1e-9)


# ------------------------------------------------------------------ properties of every reading


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_that_do_not_determine_the_values_never_blow_up(data):
    n = data.draw(st.integers(3, 7))
    count = data.draw(st.integers(2, 2 * n + 2))
    masks = st.integers(1, (1 << n) - 2)
    chosen = data.draw(st.lists(masks, min_size=2, max_size=count, unique=True))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    seen = [
        Observation(Coalition(0, n), 0.0, "empty"),
        Observation(Coalition.grand(n), 1.0, "grand"),
    ]
    seen += [Observation(Coalition(mask, n), float(rng.random()), "design") for mask in chosen]
    found = regression.paired_least_squares(gather(seen, n).rows)
    assert np.abs(found.phi).max() < 1e4
    assert found.phi.sum() == pytest.approx(1, abs=1e-9)
    read = Ridge().estimate(seen, n)
    assert read.ls_values is None or np.abs(read.ls_values).max() < 1e4


@pytest.mark.parametrize("estimator", FAMILY)
@pytest.mark.parametrize("budget", [18, 30, 60, 200])
def test_values_sum_to_the_gain(estimator, budget):
    game = games.class_entropy(10, 1)
    one = estimator(budget=budget)
    found = one.estimate(observe(one.plan(10), game, 0.3), 10)
    assert abs(sum(found.values) - (found.v_full - found.v_empty)) < 1e-9
    assert abs(found.efficiency_gap) < 1e-9


@pytest.mark.parametrize("estimator", [PairedLS, Ridge])
def test_a_linear_game_is_read_exactly_without_noise(estimator):
    game = games.linear(20, 1)
    one = estimator(budget=100)
    found = one.estimate(observe(one.plan(20), game), 20)
    np.testing.assert_allclose(found.values, game.shapley(), atol=1e-6)
    assert found.holdout is not None
    assert found.holdout.rmse < 1e-5
    assert found.holdout.spearman == pytest.approx(1)


@pytest.mark.parametrize("estimator", [*SAMPLED, GaussianProcess])
@pytest.mark.parametrize("budget", [16, 60, 100])
def test_relabelling_contributors_permutes_the_answer(estimator, budget):
    n, one = 12, estimator(budget=budget)
    order = np.random.default_rng(1).permutation(n)
    observations = observe(one.plan(n), games.coverage(n, 2), 0.05)
    relabelled = [
        replace(o, coalition=Coalition.of((int(order[i]) for i in o.coalition.members), n))
        for o in observations
    ]
    a, b = one.estimate(observations, n), one.estimate(relabelled, n)
    np.testing.assert_allclose(np.array(b.values)[order], a.values, atol=1e-8)
    if a.se is not None and b.se is not None:
        np.testing.assert_allclose(np.array(b.se)[order], a.se, rtol=1e-7)


@pytest.mark.parametrize("estimator", FAMILY)
def test_the_order_of_observations_does_not_change_a_bit(estimator):
    one = estimator(budget=60)
    observations = observe(one.plan(8), games.log_total(8), 0.1)
    again = list(reversed(observations))
    assert one.estimate(observations, 8) == one.estimate(again, 8)


@pytest.mark.parametrize("estimator", FAMILY)
def test_holdout_rows_are_not_fitted(estimator):
    one = estimator(budget=60, holdout=10)
    observations = observe(one.plan(10), games.log_total(10), 0.1)
    spoilt = [replace(o, value=9.0) if o.role == "holdout" else o for o in observations]
    a, b = one.estimate(observations, 10), one.estimate(spoilt, 10)
    assert (a.values, a.se) == (b.values, b.se)
    assert a.holdout != b.holdout


@pytest.mark.parametrize("estimator", SAMPLED)
def test_missing_rows_are_done_without(estimator):
    game = games.coverage(10, 1)
    one = estimator(budget=120)
    observations = observe(one.plan(10), game, 0.02)
    kept = [o for k, o in enumerate(observations) if o.role in ("empty", "grand") or k % 7]
    found = one.estimate(kept, 10)
    assert found.used == len(kept)
    assert abs(found.efficiency_gap) < 1e-9
    whole = error(one.estimate(observations, 10).values, game.shapley())
    assert error(found.values, game.shapley()) < 1.6 * whole + 0.05


@pytest.mark.parametrize("estimator", [PairedLS, Ridge])
def test_rows_without_pairs_are_read(estimator):
    game = games.linear(8, 2)
    plan = Reference(budget=80, holdout=0).plan(8)
    found = estimator().estimate(observe(plan, game), 8)
    np.testing.assert_allclose(found.values, game.shapley(), atol=1e-6)


def test_relative_scale_of_the_utility_does_not_matter():
    one = Ridge(budget=60)
    observations = observe(one.plan(10), games.class_entropy(10), 0.1)
    scaled = [replace(o, value=1e6 * o.value - 5e6) for o in observations]
    a, b = one.estimate(observations, 10), one.estimate(scaled, 10)
    np.testing.assert_allclose(np.array(b.values), 1e6 * np.array(a.values), rtol=1e-6)


def test_an_empty_coalition_off_the_scale_does_not_leak_into_differences():
    one = PairedLS(budget=100)
    observations = observe(one.plan(20), games.log_total(20), 0.1)
    moved = [replace(o, value=o.value - 50) if o.role == "empty" else o for o in observations]
    a, b = (np.array(one.estimate(x, 20).values) for x in (observations, moved))
    np.testing.assert_allclose(b - b.mean(), a - a.mean(), atol=1e-9)
    ridge = Ridge(budget=100)
    a, b = (np.array(ridge.estimate(x, 20).values) for x in (observations, moved))
    assert np.linalg.norm((b - b.mean()) - (a - a.mean())) < 0.35 * np.linalg.norm(a - a.mean())


def test_observations_that_cannot_be_read_are_refused():
    one = Exact()
    good = table(np.arange(8.0), 3)
    with pytest.raises(DataError, match="empty coalition 000"):
        one.estimate(good[1:], 3)
    with pytest.raises(DataError, match="grand coalition 111"):
        one.estimate(good[:-1], 3)
    with pytest.raises(DataError, match="no design coalition"):
        Ridge().estimate([good[0], good[-1]], 3)
    with pytest.raises(DataError, match="wanted 4"):
        one.estimate(good, 4)
    with pytest.raises(DataError, match="nan"):
        one.estimate([replace(good[0], value=math.nan), *good[1:]], 3)
    with pytest.raises(IncompleteDesign, match="5 of the 6"):
        one.estimate([*good[:3], *good[4:]], 3)


# ------------------------------------------------------------------ dense references


@pytest.mark.parametrize("n", [5, 12, 20])
def test_reference_is_equation_5(n):
    one = Reference(budget=6 * n, holdout=0, seed=2)
    observations = observe(one.plan(n), games.mean_quality(n, 1), 0.1)
    fitted = [o for o in observations if o.role == "design"]
    v0 = np.mean([o.value for o in observations if o.role == "empty"])
    v1 = np.mean([o.value for o in observations if o.role == "grand"])
    A = sum(np.outer(z, z) for z in games.indicators((o.coalition.mask for o in fitted), n))
    A = A / len(fitted)
    d = sum(
        games.indicators([o.coalition.mask], n)[0] * (o.value - v0) / len(fitted) for o in fitted
    )
    A_inv, ones = np.linalg.pinv(A), np.ones(n)
    beta = A_inv @ (d - ones * (ones @ A_inv @ d - v1 + v0) / (ones @ A_inv @ ones))
    np.testing.assert_allclose(one.estimate(observations, n).values, beta, atol=1e-8)


@pytest.mark.parametrize(
    ("family", "budget", "fades"), [(games.linear, 18, False), (games.mean_quality, 60, True)]
)
def test_ridge_maximises_the_restricted_likelihood(family, budget, fades):
    n, one = 10, Ridge(budget=budget, holdout=0, seed=1)
    game = family(n, 1)
    rows = gather(observe(one.plan(n), game, 0.3 * game.sd(500)), n).rows
    fit = ridge(rows)
    assert fit.lam is not None
    assert (fit.fading is not None) is fades
    W = np.diag(1 / regression.row_weights(rows))
    t = rows.s / n
    X, y = rows.Z - t[:, None], rows.v - rows.v_empty - t * rows.delta
    kinds = [(1 - fit.share, np.ones(len(y)), 1.0)]  # prior variance, f(s), worth to phi
    if fit.fading is not None:
        f = FADING[fit.fading]
        size = np.diag(W) ** -1 * (X * X).sum(1)
        scale = size.sum() / (size * f(rows.s) ** 2).sum()
        kinds.append((fit.share * scale, f(rows.s), fading_shapley(f, n)))
    K = sum(var * np.outer(f, f) * (X @ X.T) for var, f, _ in kinds)
    G = regression.size_columns(rows.s, n, fit.columns)
    m, q = G.shape

    def minus_two_log_reml(log_lam):
        V = W + K / np.exp(log_lam)
        inner = G.T @ np.linalg.solve(V, G)
        gamma = np.linalg.solve(inner, G.T @ np.linalg.solve(V, y))
        scatter = (y - G @ gamma) @ np.linalg.solve(V, y - G @ gamma)
        return (m - q) * np.log(scatter) + np.linalg.slogdet(V)[1] + np.linalg.slogdet(inner)[1]

    best = minimize_scalar(minus_two_log_reml, (-3, 3), options={"xtol": 1e-10})
    assert np.log(fit.lam) == pytest.approx(best.x, abs=1e-4)
    V = W + K / fit.lam
    gamma = np.linalg.solve(G.T @ np.linalg.solve(V, G), G.T @ np.linalg.solve(V, y))
    dual = np.linalg.solve(V, y - G @ gamma) / fit.lam
    phi = rows.delta / n + sum(var * worth * (X.T @ (f * dual)) for var, f, worth in kinds)
    np.testing.assert_allclose(fit.phi, phi, atol=1e-8)


@pytest.mark.parametrize("name", FADING)
@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_values_of_a_fading_game(name, n):
    f = FADING[name]
    alpha = np.random.default_rng(n).normal(size=n)
    alpha -= alpha.mean()

    def value(Z):
        return np.where(Z.any(1), (Z @ alpha) * f(np.maximum(Z.sum(1), 1)), 0.0)

    np.testing.assert_allclose(
        games.enumerate_shapley(value, n), fading_shapley(f, n) * alpha, atol=1e-12
    )


def test_many_contributors_do_not_collapse_where_there_is_a_signal():
    game = games.mean_quality(100)
    one = Ridge(budget=400, holdout=0)
    found = one.estimate(observe(one.plan(100), game, 0.1 * game.sd(300)), 100)
    assert not found.collapsed
    assert spearmanr(found.values, game.shapley()).statistic > 0.85


def test_variance_is_the_hc2_sandwich_plus_the_endpoints():
    n, one = 6, PairedLS(budget=40, holdout=0)
    observations = observe(one.plan(n), games.class_entropy(n, 3), 0.3)
    evidence = gather(observations, n)
    rows, noise = evidence.rows, evidence.noise
    found = one.estimate(observations, n)
    first = [k for k in range(len(rows.v)) if rows.partner[k] > k]
    second = [int(rows.partner[k]) for k in first]
    assert 2 * len(first) == len(rows.v)
    # Free parameters: n - 1 values (the last is what is left of the gain) and two odd columns.
    x = (rows.Z[first] - rows.Z[second]) / 2
    G = regression.size_columns(rows.s, n, ("cubic", "jump"))
    D = np.hstack([x[:, :-1] - x[:, -1:], (G[first] - G[second]) / 2])
    w = regression.row_weights(rows)[first] * 2
    bread = np.linalg.inv(D.T @ (w[:, None] * D)) @ (D * w[:, None]).T
    r = (rows.v[first] - rows.v[second]) / 2 - x[:, -1] * rows.delta
    fitted = bread @ r
    hat = (D @ bread).diagonal()
    cov = (bread * ((r - D @ fitted) ** 2 / (1 - hat))) @ bread.T
    by_delta = np.append(-(bread @ x[:, -1])[: n - 1], 0)
    by_delta[-1] = 1 - by_delta[:-1].sum()
    assert noise.empty.sd is not None
    assert noise.full.sd is not None
    ends = (noise.empty.sd**2 + noise.full.sd**2) / 4 * by_delta**2
    take = np.zeros((n, D.shape[1]))
    take[: n - 1, : n - 1] = np.eye(n - 1)
    take[-1, : n - 1] = -1
    se = np.sqrt((take @ cov @ take.T).diagonal() + ends)
    phi = take @ fitted + np.append(np.zeros(n - 1), rows.delta)
    np.testing.assert_allclose(found.values, phi, atol=1e-9)
    np.testing.assert_allclose(found.se, se, rtol=1e-7)
    assert found.low is not None
    reach = student.ppf(0.975, len(first) - (n - 1) - 2)
    np.testing.assert_allclose(found.low, phi - reach * se, atol=1e-8)


# ------------------------------------------------------------------ intervals, noise, checks


@pytest.mark.parametrize(
    ("pairs", "given", "reliable"), [(20, False, False), (30, True, False), (50, True, True)]
)
def test_intervals_need_evidence(pairs, given, reliable):
    one = PairedLS(budget=2 * pairs, holdout=0)
    found = one.estimate(observe(one.plan(20), games.coverage(20), 0.05), 20)
    assert found.interval.pairs == pairs
    assert found.interval.reliable is reliable
    assert all((column is not None) is given for column in (found.se, found.low, found.high))


@pytest.mark.parametrize(("pairs", "given"), [(8, False), (20, False), (21, True), (49, True)])
def test_single_rows_are_no_evidence_for_intervals(pairs, given):
    observations = observe(PairedLS(budget=200, holdout=0).plan(20), games.coverage(20), 0.05)
    ends, rows = observations[:8], observations[8:]
    found = PairedLS().estimate([*ends, *rows[: 2 * pairs], *rows[2 * pairs :: 2]], 20)
    assert found.ls_values is not None
    assert found.interval.pairs == pairs
    assert not found.interval.reliable
    assert all((column is not None) is given for column in (found.se, found.low, found.high))


def test_an_endpoint_measured_once_is_as_noisy_as_a_row():
    one = PairedLS(budget=60, holdout=0, endpoint_replicates=1)
    observations = observe(one.plan(10), games.linear(10), 0.5)
    found = one.estimate(observations, 10)
    residual = regression.paired_least_squares(gather(observations, 10).rows).residual
    assert residual is not None
    assert found.delta_se == pytest.approx(math.sqrt(2 * residual))
    again = [
        replace(o, value=o.value + d, replicate=1)
        for o, d in zip(observations[:2], (0.2, -0.2), strict=True)
    ]
    assert one.estimate([*observations, *again], 10).delta_se == pytest.approx(0.1 * math.sqrt(2))


def test_where_all_is_noise_there_are_no_shares():
    one = PairedLS(budget=60, holdout=0, endpoint_replicates=1)
    nothing = games.Game("nothing", 10, lambda Z: Z.sum(1) / 100, lambda: np.full(10, 0.01))
    observations = observe(one.plan(10), nothing, 1.0)
    ends = [replace(o, value=v) for o, v in zip(observations[:2], (0.0, 1.0), strict=True)]
    found = one.estimate([*ends, *observations[2:]], 10)
    assert replace(found, values=(0.1,) * 10).shares is None


def test_the_interval_is_that_of_paired_least_squares_for_ridge_too():
    ls, ridge = PairedLS(budget=120), Ridge(budget=120)
    observations = observe(ls.plan(20), games.coverage(20), 0.05)
    a, b = ls.estimate(observations, 20), ridge.estimate(observations, 20)
    assert (a.low, a.high, a.se, a.ls_values) == (b.low, b.high, b.se, b.ls_values)
    assert a.values == a.ls_values != b.values
    assert b.shrinkage_slope is not None
    assert 0 < b.shrinkage_slope < 1


def test_endpoint_noise_widens_the_interval():
    one = PairedLS(budget=120, holdout=0)
    calm = observe(one.plan(12), games.linear(12), 0.0)
    loud = [
        replace(o, value=o.value + (-1) ** o.replicate) if o.role == "grand" else o for o in calm
    ]
    a, b = one.estimate(calm, 12), one.estimate(loud, 12)
    assert a.se is not None
    assert b.se is not None
    sd = math.sqrt(4 / 3)  # of +1, -1, +1, -1
    np.testing.assert_allclose(b.se, sd / 2 / 12, rtol=1e-6)
    assert max(a.se) < 1e-9


def test_noise_is_measured_apart():
    one = Ridge(budget=4 * 14, endpoint_replicates=60)
    found = one.estimate(observe(one.plan(4), games.linear(4), 0.5), 4)
    noise = found.to_json("abcd", [1] * 4, [""] * 4)["noise"]
    assert noise["empty"]["replicates"] == noise["grand"]["replicates"] == 60
    assert noise["empty"]["sd"] == pytest.approx(0.5, rel=0.3)
    assert noise["repeats"] == {
        "sd": pytest.approx(0.5, rel=0.3),
        "df": 3 * 14,
        "coalitions": 14,
    }


def test_repeats_are_averaged_by_weight():
    good = table([0.0, 1.0, 1.0, 4.0], 2)
    more = [*good, replace(good[1], value=5.0, replicate=1, weight=3.0)]
    rows = gather(more, 2).rows
    np.testing.assert_allclose(rows.v, [4.0, 1.0])
    np.testing.assert_allclose(rows.count, [4, 1])


def test_without_repeats_exact_has_no_interval():
    found = Exact().estimate(table(np.arange(8.0), 3), 3)
    assert found.se is found.low is None
    assert not found.interval.reliable


def test_the_endpoints_noise_does_not_make_an_exact_interval_reliable():
    n, once = 4, 14
    plan = Ridge(budget=2 * once, endpoint_replicates=6).plan(n)
    calm = [
        replace(o, value=0.0) if o.role == "empty" else o
        for o in observe(plan, games.linear(n), 0.3)
    ]
    for repeats in (0, 2, 3, once):
        found = Exact().estimate(calm[: 12 + once + repeats], n)
        assert found.interval.reliable is (repeats >= 3)
        assert found.interval.df == (repeats if repeats >= 3 else 10 + repeats)
    rows = gather(calm, n)
    measured = exact(rows.rows, "shapley")
    assert measured is not None
    unit = measured[1]
    assert rows.noise.full.sd is not None
    assert rows.noise.repeats_sd is not None
    variance = unit * rows.noise.repeats_sd**2 + rows.noise.full.sd**2 / 6 / n**2
    np.testing.assert_allclose(found.se, np.sqrt(variance))
    assert found.delta_se == pytest.approx(rows.noise.full.sd / math.sqrt(6))


def test_exact_interval_holds_the_noise_of_the_measurements():
    game, inside = games.mean_quality(4), []
    for seed in range(100):
        one = Exact(endpoint_replicates=6)
        found = one.estimate(observe(one.plan(4), game, 0.2, seed), 4)
        assert found.low is not None
        assert found.high is not None
        inside.append(
            [a < x < b for a, x, b in zip(found.low, game.shapley(), found.high, strict=True)]
        )
    assert 0.9 < np.mean(inside) < 0.99


def test_pure_noise_collapses_to_the_equal_split():
    collapsed = 0
    for seed in range(10):
        one = Ridge(budget=60, seed=seed)
        nothing = games.Game("nothing", 20, lambda Z: Z.sum(1) / 20, lambda: np.full(20, 0.05))
        found = one.estimate(observe(one.plan(20), nothing, 1.0, seed), 20)
        if found.collapsed:
            collapsed += 1
            assert found.lam is None
            assert found.shrinkage_slope == 0
            np.testing.assert_allclose(found.values, (found.v_full - found.v_empty) / 20)
            assert len(set(found.values)) == 1
    assert collapsed >= 3


@pytest.mark.parametrize("k", [3, 4, 5, 7, 12, 24])
def test_chance_level_of_spearman(k):
    rng = np.random.default_rng(0)
    x = np.arange(k) - (k - 1) / 2
    rho = np.abs([rng.permutation(k) @ x for _ in range(20_000)]) / (x @ x)
    assert np.mean(rho <= chance95(k) + 1e-9) >= 0.945
    assert np.mean(rho < chance95(k) - 1e-9) <= 0.955


def test_spearman_agrees_with_scipy_and_knows_constants():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 30).astype(float), rng.normal(size=30)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(np.ones(5), np.arange(5.0)) is None


def test_fewer_than_three_held_out_say_nothing():
    one = Ridge(budget=60, holdout=2)
    assert one.estimate(observe(one.plan(10), games.coverage(10)), 10).holdout is None


def test_to_json_has_every_key_and_no_share_where_signs_differ():
    one = Ridge(budget=60, repeats=0)
    ids = [f"c{i}" for i in range(10)]
    body = one.estimate(observe(one.plan(10), games.mean_quality(10, 1)), 10).to_json(
        ids, [5] * 10, ["d"] * 10, planned=80, failed=1
    )
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert list(body["contributors"][0]) == [
        "id", "value", "ls_value", "se", "low", "high", "share", "images", "digest",
    ]  # fmt: skip
    assert body["coalitions"] == {"planned": 80, "used": 80, "failed": 1}
    assert {c["share"] for c in body["contributors"]} == {None}
    found = one.estimate(observe(one.plan(10), games.log_total(10, 1)), 10)
    assert found.shares is not None
    assert sum(found.shares) == pytest.approx(1)
    loud = replace(found, delta_se=found.v_full)
    assert loud.shares is None


@pytest.mark.parametrize("n", [3, 8, 9, 64, 258])
def test_indicators_of_masks_of_any_length(n):
    masks = [e.coalition.mask for e in Ridge(budget=20).plan(n)]
    np.testing.assert_array_equal(indicators(masks, n), games.indicators(masks, n))


def test_torch_is_not_imported():
    code = "import sys, attr_batch.estimators, attr_batch.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------ worth


@pytest.mark.parametrize("sd", [0.1, 0.25])
@pytest.mark.parametrize("family", [games.log_total, games.coverage, games.class_entropy])
def test_the_default_halves_the_error_of_the_reference(family, sd):
    errors = {Reference: [], Ridge: []}
    for seed, kind in itertools.product(range(3), errors):
        game = family(20, seed) if family is not games.class_entropy else family(12, seed)
        one = kind(budget=5 * game.n, seed=seed, holdout=0)
        found = one.estimate(observe(one.plan(game.n), game, sd * game.sd(300), seed), game.n)
        errors[kind].append(error(found.values, game.shapley()))
    assert np.mean(errors[Ridge]) < 0.5 * np.mean(errors[Reference])


@pytest.mark.slow
@pytest.mark.parametrize("family", games.FAMILIES)
def test_intervals_cover(family):
    inside = []
    for seed in range(60):
        game = family(20 if family is not games.class_entropy else 12, seed % 3)
        one = PairedLS(budget=5 * game.n, seed=seed, holdout=0)
        found = one.estimate(observe(one.plan(game.n), game, 0.25 * game.sd(300), seed), game.n)
        assert found.low is not None
        assert found.high is not None
        inside += [a < x < b for a, x, b in zip(found.low, game.shapley(), found.high, strict=True)]
    assert 0.9 < np.mean(inside) < 0.985
