"""The data surrogate as a control variate, intervals, and the bootstrap, against closed forms."""

import itertools
import json
from dataclasses import replace

import games
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from attr_batch.coalition import Coalition
from attr_batch.errors import DataError
from attr_batch.estimators import (
    Exact,
    Observation,
    PairedLS,
    Reference,
    Ridge,
    Surrogate,
    regression,
)
from attr_batch.estimators.bootstrap import bootstrap
from attr_batch.estimators.observations import gather
from attr_batch.estimators.ridge import FADING, fading_shapley, ridge
from attr_batch.estimators.surrogate import DataStatistics, control

READERS = (PairedLS, Ridge)


def observe(plan, value, sd=0.0, seed=0):
    """Measure a plan: utilities `value(Z)` with i.i.d. noise."""
    Z = games.indicators([entry.coalition.mask for entry in plan], plan[0].coalition.n)
    values = value(Z) + sd * np.random.default_rng(seed).normal(size=len(plan))
    return [
        Observation(e.coalition, float(v), e.role, e.pair, e.replicate)
        for e, v in zip(plan, values, strict=True)
    ]


def error(values, phi):
    return np.linalg.norm(np.asarray(values) - phi) / np.linalg.norm(phi)


def centred(phi):
    return phi - phi.mean()


# ------------------------------------------------------------------ the free game's own values


@pytest.mark.parametrize("family", games.FAMILIES)
def test_up_to_sixteen_contributors_the_values_are_the_definition(family):
    game = family(9, 2)
    found = control(Surrogate(game.value), 9).psi
    np.testing.assert_allclose(found, centred(games.enumerate_shapley(game.value, 9)), atol=1e-12)


@pytest.mark.parametrize(
    "family", [games.log_total, games.coverage, games.mean_quality, games.linear]
)
def test_above_the_values_are_nearly_exact(family):
    game = family(40, 1)
    phi = centred(game.shapley())
    assert error(control(Surrogate(game.value), 40).psi, phi) < 0.03


@pytest.mark.parametrize("n", [8, 20])
def test_the_free_game_s_values_do_not_depend_on_labels(n):
    game, order = games.coverage(n, 1), np.random.default_rng(0).permutation(n)
    one = control(Surrogate(game.value), n).psi
    two = control(Surrogate(lambda Z: game.value(Z[:, order])), n).psi
    np.testing.assert_allclose(two[order], one, atol=1e-12)


@pytest.mark.parametrize("n", [6, 20])
def test_a_curve_of_the_size_changes_no_value(n):
    game = games.mean_quality(n, 1)
    one = control(Surrogate(game.value), n).psi
    two = control(Surrogate(lambda Z: game.value(Z) + np.sqrt(Z.sum(1)) - 3), n).psi
    np.testing.assert_allclose(two, one, atol=1e-10)


def test_a_game_that_is_not_finite_is_refused():
    with pytest.raises(DataError, match="not finite"):
        control(Surrogate(lambda Z: np.where(Z[:, 0] > 0, 1.0, np.nan)), 4)


# ------------------------------------------------------------------ statistics of the images

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.integers(1, 5).flatmap(
        lambda d: st.lists(
            st.tuples(st.lists(finite, min_size=d, max_size=d), st.integers(1, 10**9)),
            min_size=2,
            max_size=6,
        )
    )
)
def test_statistics_come_back_bit_for_bit(rows):
    one = DataStatistics(np.array([r for r, _ in rows]), np.array([float(k) for _, k in rows]))
    two = DataStatistics.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False)))
    assert one.sums.tobytes() == two.sums.tobytes()
    assert one.images.tobytes() == two.images.tobytes()


def test_a_coalition_s_mean_is_over_images_not_over_contributors():
    parts = [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]] * 3), np.array([[2.0, 2.0]] * 2)]
    game = DataStatistics.of(parts).surrogate(lambda mean: mean[:, 0] - 10 * mean[:, 1])
    Z = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=float)
    np.testing.assert_allclose(game.values(Z), [1, 0.25 - 7.5, 5 / 6 - 70 / 6])


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"sums": [[1.0], [2.0]], "images": [1]},
        {"sums": [1.0, 2.0], "images": [1, 1]},
        {"sums": [[1.0], [2.0, 3.0]], "images": [1, 1]},
        {"sums": [[1.0], [float("nan")]], "images": [1, 1]},
        {"sums": [[1.0], [2.0]], "images": [1, 0]},
        {"sums": [["a"], [2.0]], "images": [1, 1]},
    ],
)
def test_what_are_no_statistics_is_refused(body):
    with pytest.raises(DataError, match="statistics"):
        DataStatistics.from_json(body)


# ------------------------------------------------------------------ dense references


@pytest.mark.parametrize(("budget", "fades"), [(18, False), (60, True)])
def test_ridge_shrinks_toward_what_the_surrogate_says(budget, fades):
    """Generalised least squares with w~ among the fixed effects, at the lambda that was found."""
    n, one = 10, Ridge(budget=budget, holdout=0, seed=1)
    game, w = games.mean_quality(n, 1), games.mean_quality(n, 1).value
    v = (lambda Z: w(Z) + 0.1 * Z[:, 0]) if fades else w
    seen = observe(one.plan(n), v, 0.2 * game.sd(500))
    rows = gather(seen, n, Surrogate(w)).rows
    fit = ridge(rows)
    assert fit.weight
    t, psi = rows.s / n, centred(game.shapley())
    X, y = rows.Z - t[:, None], rows.v - rows.v_empty - t * rows.delta
    full, empty = w(np.ones((1, n)))[0], w(np.eye(n)).mean()
    column = w(rows.Z) - empty - t * (full - empty)
    F = np.column_stack([regression.size_columns(rows.s, n, fit.columns), column])
    weights = regression.row_weights(rows)
    kinds = [(1 - fit.share, np.ones(len(y)), 1.0)]  # prior variance, f(s), worth to phi
    if fit.fading is not None:
        f = FADING[fit.fading]
        moved = weights * (X * X).sum(1)
        scale = moved.sum() / (moved * f(rows.s) ** 2).sum()
        kinds.append((fit.share * scale, f(rows.s), fading_shapley(f, n)))
    ratio = 0.0 if fit.lam is None else 1 / fit.lam
    V = np.diag(1 / weights) + ratio * sum(var * np.outer(f, f) * (X @ X.T) for var, f, _ in kinds)
    gamma = np.linalg.solve(F.T @ np.linalg.solve(V, F), F.T @ np.linalg.solve(V, y))
    dual = ratio * np.linalg.solve(V, y - F @ gamma)
    effects = sum(var * worth * (X.T @ (f * dual)) for var, f, worth in kinds)
    assert fit.weight == pytest.approx(gamma[-1], rel=1e-6)
    np.testing.assert_allclose(fit.phi, rows.delta / n + effects + gamma[-1] * psi, atol=1e-8)


@pytest.mark.parametrize("sandwich", ["hc2", "hc3"])
def test_the_interval_is_that_of_theta_plus_b_psi(sandwich):
    """The regression on effects, odd columns and w~; values and variance by the delta method."""
    n = 7
    one = PairedLS(budget=60, holdout=0, interval=sandwich)
    game, w = games.coverage(n, 3), games.class_entropy(n, 4).value
    observations = observe(one.plan(n), game.value, 0.1)
    found = one.estimate(observations, n, Surrogate(w))
    evidence = gather(observations, n)
    rows, noise = evidence.rows, evidence.noise
    first = [k for k in range(len(rows.v)) if rows.partner[k] > k]
    second = [int(rows.partner[k]) for k in first]
    x = (rows.Z[first] - rows.Z[second]) / 2
    G = regression.size_columns(rows.s, n, ("cubic", "jump"))
    full = w(np.ones((1, n)))[0]
    odd_w = (w(rows.Z)[first] - w(rows.Z)[second]) / 2 - x.sum(1) / n * full
    D = np.column_stack([x[:, :-1] - x[:, -1:], (G[first] - G[second]) / 2, odd_w])
    weights = regression.row_weights(rows)[first] * 2
    bread = np.linalg.inv(D.T @ (weights[:, None] * D)) @ (D * weights[:, None]).T
    r = (rows.v[first] - rows.v[second]) / 2 - x[:, -1] * rows.delta
    fitted = bread @ r
    excess = 1 - (D @ bread).diagonal()
    power = {"hc2": 1, "hc3": 2}[sandwich]
    cov = (bread * ((r - D @ fitted) ** 2 / excess**power)) @ bread.T
    take = np.zeros((n, D.shape[1]))
    take[: n - 1, : n - 1] = np.eye(n - 1)
    take[-1, : n - 1] = -1
    take[:, -1] = centred(games.enumerate_shapley(w, n))  # w(∅) drops out of the differences
    gain = np.append(np.zeros(n - 1), rows.delta)
    # With whole pairs, v(N) - v(∅) enters a value as 1/n of itself.
    assert noise.empty.sd is not None
    assert noise.full.sd is not None
    ends = (noise.empty.sd**2 + noise.full.sd**2) / 4 / n**2
    phi, se = take @ fitted + gain, np.sqrt((take @ cov @ take.T).diagonal() + ends)
    np.testing.assert_allclose(found.values, phi, atol=1e-9)
    np.testing.assert_allclose(found.se, se, rtol=1e-7)
    assert found.surrogate is not None
    assert found.surrogate.weight == pytest.approx(fitted[-1], rel=1e-7)
    assert found.interval.df == len(first) - n - 2
    assert found.interval.method == f"paired-ls-{sandwich}-t"
    assert found.low is not None
    reach = student.ppf(0.975, found.interval.df)
    np.testing.assert_allclose(found.low, phi - reach * se, atol=1e-8)


# ------------------------------------------------------------------ what it must and must not do


@pytest.mark.parametrize("estimator", READERS)
@pytest.mark.parametrize(("n", "budget"), [(10, 36), (20, 80)])
def test_a_utility_that_is_the_surrogate_needs_few_evaluations(estimator, n, budget):
    game, one = games.coverage(n, 1), estimator(budget=budget)
    surrogate = Surrogate(game.value)
    found = one.estimate(observe(one.plan(n), lambda Z: 3 * game.value(Z) - 2), n, surrogate)
    use = found.surrogate
    assert use is not None
    assert use.weight == pytest.approx(3)
    assert use.share == pytest.approx(1)
    assert use.correlation == pytest.approx(1)
    tolerance = 1e-6 if n <= 16 else 0.03  # psi itself
    assert error(centred(np.array(found.values)), 3 * centred(game.shapley())) < tolerance
    assert abs(found.efficiency_gap) < 1e-9
    assert found.holdout is not None
    assert found.holdout.rmse < 1e-9  # whatever psi is: what w has beyond it is predicted too


@pytest.mark.parametrize("estimator", READERS)
@pytest.mark.parametrize("sd", [0.0, 0.1])
def test_units_of_the_surrogate_do_not_matter(estimator, sd):
    n, one = 10, estimator(budget=60)
    game, w = games.log_total(n, 1), games.log_total(n, 2).value
    seen = observe(one.plan(n), game.value, sd)
    plain = one.estimate(seen, n, Surrogate(w))
    for a, c in ((1e7, 0.0), (-1e-7, 0.0), (2.0, 100.0)):
        other = one.estimate(seen, n, Surrogate(lambda Z, a=a, c=c: a * w(Z) + c))
        np.testing.assert_allclose(other.values, plain.values, atol=1e-8)
        np.testing.assert_allclose(other.se, plain.se, rtol=1e-5, atol=1e-9)
        assert other.surrogate is not None
        assert plain.surrogate is not None
        assert other.surrogate.weight * a == pytest.approx(plain.surrogate.weight, rel=1e-5)


@pytest.mark.parametrize("estimator", READERS)
@pytest.mark.parametrize("w", [lambda Z: np.full(len(Z), 5.0), lambda Z: 5 + Z.sum(1) ** 2])
def test_a_surrogate_of_the_size_alone_is_not_used(estimator, w):
    n, one = 10, estimator(budget=60)
    seen = observe(one.plan(n), games.coverage(n, 1).value, 0.05)
    off, on = one.estimate(seen, n), one.estimate(seen, n, Surrogate(w))
    assert on.columns == off.columns
    np.testing.assert_allclose(on.values, off.values, atol=1e-9)
    np.testing.assert_allclose(on.se, off.se, rtol=1e-9)
    assert on.surrogate is not None
    assert on.surrogate.share == 0
    np.testing.assert_allclose(on.surrogate.values, (on.v_full - on.v_empty) / n)


@pytest.mark.parametrize("estimator", [Reference, Exact])
def test_the_paper_s_form_and_the_definition_do_without(estimator):
    n, one = 5, estimator()
    seen = observe(one.plan(n), games.coverage(n, 1).value, 0.05)
    assert one.estimate(seen, n, Surrogate(games.log_total(n).value)) == one.estimate(seen, n)


@pytest.mark.parametrize("estimator", READERS)
def test_where_everything_was_measured_nothing_is_borrowed(estimator):
    n, one = 4, estimator()
    seen = observe(one.plan(n), games.coverage(n, 1).value, 0.05)
    off, on = one.estimate(seen, n), one.estimate(seen, n, Surrogate(games.log_total(n).value))
    assert on.values == off.values
    assert on.surrogate is not None
    assert on.surrogate.weight == 0


@pytest.mark.parametrize("estimator", READERS)
def test_efficiency_relabelling_and_order_hold_with_a_surrogate(estimator):
    n, one = 11, estimator(budget=66)
    game, w = games.coverage(n, 2), games.coverage(n, 5).value
    seen = observe(one.plan(n), lambda Z: game.value(Z) + w(Z), 0.05)
    order = np.random.default_rng(1).permutation(n)
    relabelled = [
        replace(o, coalition=Coalition.of((int(order[i]) for i in o.coalition.members), n))
        for o in seen
    ]
    a = one.estimate(seen, n, Surrogate(w))
    b = one.estimate(relabelled, n, Surrogate(lambda Z: w(Z[:, order])))
    assert a.surrogate is not None
    assert a.surrogate.weight
    assert abs(a.efficiency_gap) < 1e-9
    np.testing.assert_allclose(np.array(b.values)[order], a.values, atol=1e-8)
    np.testing.assert_allclose(np.array(b.se)[order], a.se, rtol=1e-6)
    assert one.estimate(seen[::-1], n, Surrogate(w)).values == a.values


def test_where_only_the_surrogate_speaks_the_result_says_so():
    """Pure noise around b w: often nothing is left to regress, and never an equal split."""
    n, alone, game = 10, 0, games.coverage(10, 1)
    surrogate, psi = Surrogate(game.value), centred(game.shapley())
    for seed in range(8):
        one = Ridge(budget=40, seed=seed)
        seen = observe(one.plan(n), game.value, 0.5 * game.sd(500), seed)
        found = one.estimate(seen, n, surrogate)
        use = found.surrogate
        assert use is not None
        assert not (found.collapsed and use.weight)
        assert use.alone == (found.lam is None and use.weight != 0)
        if use.alone:
            alone += 1
            equal = (found.v_full - found.v_empty) / n
            np.testing.assert_allclose(found.values, equal + use.weight * psi, atol=1e-12)
            assert found.shrinkage_slope == pytest.approx(1)
    assert alone >= 2


def test_what_is_written_down():
    n, one = 10, Ridge(budget=60)
    game = games.coverage(n, 1)
    seen = observe(one.plan(n), game.value, 0.02)
    ids = [f"c{i}" for i in range(n)]
    found = one.estimate(seen, n, Surrogate(game.value))
    body = found.to_json(ids, [1] * n, [""] * n)
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert list(body["surrogate"]) == ["weight", "share", "correlation", "values", "alone"]
    assert sum(body["surrogate"]["values"]) == pytest.approx(found.v_full - found.v_empty)
    assert one.estimate(seen, n).to_json(ids, [1] * n, [""] * n)["surrogate"] is None


@pytest.mark.parametrize(
    ("family", "narrower"),
    [(games.log_total, 0.8), (games.class_entropy, 0.6), (games.coverage, 1.0)],
)
def test_a_correlated_surrogate_halves_the_error(family, narrower):
    n, errors, widths = 12, {False: [], True: []}, {False: [], True: []}
    for seed in range(24):
        game, other = family(n, seed), family(n, seed + 10)
        surrogate = Surrogate(lambda Z, a=game, b=other: 0.85 * a.value(Z) + 0.15 * b.value(Z))
        one = Ridge(budget=4 * n, seed=seed, holdout=0)
        seen = observe(one.plan(n), game.value, 0.1 * game.sd(500), seed)
        for on, given_ in ((False, None), (True, surrogate)):
            found = one.estimate(seen, n, given_)
            errors[on].append(error(found.values, game.shapley()))
            widths[on].append(found.half_width)
    assert np.mean(errors[True]) < 0.7 * np.mean(errors[False])
    assert np.mean(widths[True]) < narrower * np.mean(widths[False])


@pytest.mark.parametrize("family", games.FAMILIES)
def test_an_unrelated_surrogate_does_little_harm(family):
    n, errors = 12, {False: [], True: []}
    for seed, multiple in itertools.product(range(5), (2, 5)):
        game, surrogate = family(n, seed), Surrogate(family(n, seed + 10).value)
        one = Ridge(budget=multiple * n, seed=seed, holdout=0)
        seen = observe(one.plan(n), game.value, 0.25 * game.sd(500), seed)
        for on, given_ in ((False, None), (True, surrogate)):
            errors[on].append(error(one.estimate(seen, n, given_).values, game.shapley()))
    assert np.mean(errors[True]) < 1.1 * np.mean(errors[False])


# ------------------------------------------------------------------ widths ahead of time


def test_the_half_width_of_today_is_predicted_exactly():
    n, one = 10, PairedLS(budget=80, holdout=0)
    found = one.estimate(observe(one.plan(n), games.coverage(n, 1).value, 0.1), n)
    assert found.low is not None
    assert found.high is not None
    assert found.half_width == pytest.approx(np.mean(np.subtract(found.high, found.low)) / 2)
    assert found.half_width_at(40) == pytest.approx(found.half_width)


def test_the_half_width_of_a_larger_budget_is_foreseen():
    n, ratios, game = 20, [], games.mean_quality(20, 1)
    for seed in range(8):
        small, large = (PairedLS(budget=m, holdout=0, seed=seed) for m in (100, 300))
        seen = observe(large.plan(n), game.value, 0.3 * game.sd(500), seed)
        pilot = small.estimate(seen[: 8 + 100], n)
        whole = large.estimate(seen, n)
        ratios.append(pilot.half_width_at(150) / whole.half_width)
    assert np.mean(ratios) == pytest.approx(1, abs=0.12)


def test_pairs_for_a_half_width():
    n, one = 10, PairedLS(budget=60, holdout=0)
    found = one.estimate(observe(one.plan(n), games.coverage(n, 1).value, 0.1), n)
    wanted = 0.7 * found.half_width
    pairs = found.pairs_for(wanted)
    assert pairs > 30
    assert found.half_width_at(pairs) <= wanted < found.half_width_at(pairs - 1)
    assert found.pairs_for(2 * found.half_width) < 30
    floor = 1.96 * found.delta_se / n  # the endpoints' noise stays
    assert found.pairs_for(0.99 * floor) is None
    assert found.pairs_for(1.05 * floor) is not None


def test_without_an_interval_no_width_is_predicted():
    n, one = 10, PairedLS(budget=16, holdout=0)
    found = one.estimate(observe(one.plan(n), games.coverage(n, 1).value, 0.1), n)
    assert found.half_width is found.half_width_at(100) is found.pairs_for(1.0) is None
    every = Exact().estimate(observe(Exact().plan(3), games.linear(3).value, 0.1), 3)
    assert every.half_width is not None
    assert every.half_width_at(100) is every.pairs_for(1.0) is None


# ------------------------------------------------------------------ bootstrap


def test_whole_pairs_and_replicates_are_drawn():
    n, one = 6, PairedLS(budget=40, holdout=5)
    seen = observe(one.plan(n), games.coverage(n, 1).value, 0.1)
    drawn = []

    def spy(observations, n):
        drawn.append(observations)
        return one.estimate(observations, n)

    bootstrap(seen, n, 30, 0, spy)
    grand = (1 << n) - 1
    for resample in drawn:
        weight = {o.coalition.mask: o.weight for o in resample if o.role == "design"}
        assert all(weight[mask ^ grand] == w for mask, w in weight.items())
        assert sum(weight.values()) == 40
        assert len(weight) < 40
        for role in ("empty", "grand"):
            assert sum(o.weight for o in resample if o.role == role) == 4
    assert {o.role for resample in drawn for o in resample} == {"empty", "grand", "design"}
    assert len({len(resample) for resample in drawn}) > 5


def test_draws_are_the_seed_s_and_not_the_order_s():
    n, one = 6, Ridge(budget=30, holdout=0)
    seen = observe(one.plan(n), games.coverage(n, 1).value, 0.1)
    draws = bootstrap(seen, n, 5, 3, one.estimate)
    assert draws.shape == (5, n)
    np.testing.assert_array_equal(draws, bootstrap(seen[::-1], n, 5, 3, one.estimate))
    assert not np.array_equal(draws, bootstrap(seen, n, 5, 4, one.estimate))
    assert len(np.unique(draws[:, 0])) == 5


def test_the_spread_of_the_draws_is_the_standard_error():
    n, one = 8, PairedLS(budget=240, holdout=0)
    seen = observe(one.plan(n), games.linear(n, 1).value, 1.0)
    se = one.estimate(seen, n).se
    spread = bootstrap(seen, n, 150, 0, one.estimate).std(axis=0, ddof=1)
    assert np.mean(spread / np.array(se)) == pytest.approx(1, abs=0.12)
