"""The Gaussian process against enumeration, a dense joint Gaussian, and games of known value."""

from dataclasses import replace

import games
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_estimators import error, observe, table
from test_semivalue import KINDS, by_definition

from attr_batch.coalition import Coalition
from attr_batch.estimators import GaussianProcess, Observation, Surrogate
from attr_batch.estimators.gp import _kernels, gaussian_process
from attr_batch.estimators.observations import gather
from attr_batch.estimators.regression import size_columns
from attr_batch.estimators.semivalue import mixture


def every(n):
    return (np.arange(1 << n)[:, None] >> np.arange(n) & 1).astype(float)


def functional(n, semivalue):
    """The (n, 2^n) matrix that maps a game's table to its values."""
    return np.stack([by_definition(row, n, semivalue) for row in np.eye(1 << n)], axis=1)


@pytest.mark.parametrize("semivalue", KINDS)
@pytest.mark.parametrize("n", [2, 3, 6])
def test_values_of_the_kernels_are_those_of_enumeration(n, semivalue):
    Z = every(n)[1:-1]  # the kernels vanish at both ends
    C = functional(n, semivalue)[:, 1:-1]
    for kernel in _kernels(Z, Z.sum(1).astype(int), semivalue):
        np.testing.assert_allclose(C @ kernel.K, kernel.cross, atol=1e-13)
        np.testing.assert_allclose((C @ kernel.K @ C.T).diagonal(), kernel.variance, atol=1e-13)
        assert np.linalg.eigvalsh(kernel.K).min() > -1e-10


@pytest.mark.parametrize("semivalue", KINDS)
def test_the_posterior_is_that_of_the_joint_gaussian(semivalue):
    """Condition all 2^n utilities at once, the fixed effects with a wide prior."""
    n, one = 6, GaussianProcess(budget=40, holdout=0, seed=2)
    game = games.coverage(n, 3)
    rows = gather(observe(one.plan(n), game, 0.1 * game.sd(500)), n).rows
    fit = gaussian_process(rows, semivalue)
    assert not fit.collapsed
    Z = every(n)
    inner, s = Z[1:-1], Z.sum(1)
    K = np.zeros((1 << n, 1 << n))
    seen = (rows.Z @ (1 << np.arange(n))).astype(int)
    at_rows = _kernels(rows.Z, rows.s.astype(int), semivalue)
    for tau, all_, some in zip(
        fit.tau, _kernels(inner, s[1:-1].astype(int), semivalue), at_rows, strict=True
    ):
        unit = all_.K[seen[0] - 1, seen[0] - 1] / some.K[0, 0]  # each set has its own scale
        K[1:-1, 1:-1] += tau * all_.K / unit
    G = size_columns(s, n, fit.columns)
    K += 1e7 * G @ G.T
    noise = np.diag(1 / rows.count)
    y = rows.v - rows.v_empty - rows.s / n * rows.delta
    gain = np.linalg.solve(K[np.ix_(seen, seen)] + noise, K[seen]).T
    mean = gain @ y + s / n * rows.delta
    left = K - gain @ K[seen]
    C = functional(n, semivalue)
    np.testing.assert_allclose(fit.phi, C @ mean, atol=1e-5)
    np.testing.assert_allclose(fit.variance, fit.residual * (C @ left @ C.T).diagonal(), rtol=1e-4)


def test_the_restricted_likelihood_is_at_its_maximum():
    n, one = 10, GaussianProcess(budget=60, holdout=0, seed=1)
    game = games.mean_quality(n, 1)
    rows = gather(observe(one.plan(n), game, 0.1 * game.sd(500)), n).rows
    fit = gaussian_process(rows, "shapley")
    kernels = [k.K for k in _kernels(rows.Z, rows.s.astype(int), "shapley")]
    G = size_columns(rows.s, n, fit.columns)
    y = rows.v - rows.v_empty - rows.s / n * rows.delta
    m, q = G.shape

    def criterion(x):
        V = np.diag(1 / rows.count) + sum(np.exp(a) * K for a, K in zip(x, kernels, strict=True))
        inner = G.T @ np.linalg.solve(V, G)
        r = y - G @ np.linalg.solve(inner, G.T @ np.linalg.solve(V, y))
        likelihood = (m - q) * np.log(r @ np.linalg.solve(V, r))
        likelihood += np.linalg.slogdet(V)[1] + np.linalg.slogdet(inner)[1]
        return likelihood + (((x + 3) / 2) ** 2).sum()

    x, at = np.log(fit.tau), criterion(np.log(fit.tau))
    for step in (0.3, -0.3):
        for k in range(len(x)):
            moved = x.copy()
            moved[k] += step
            assert criterion(moved) > at - 1e-4


cases = st.tuples(st.integers(3, 8), st.integers(3, 60), st.integers(0, 2**32 - 1))


@given(cases)
@settings(max_examples=15, deadline=None)
def test_values_sum_to_the_gain_whatever_was_measured(case):
    n, m, seed = case
    rng = np.random.default_rng(seed)
    masks = rng.choice(np.arange(1, (1 << n) - 1), min(m, (1 << n) - 2), replace=False)
    ends = [(0, "empty"), ((1 << n) - 1, "grand")]
    observations = [
        Observation(Coalition(int(mask), n), float(rng.normal()), role)
        for mask, role in [*ends, *((mask, "design") for mask in masks)]
    ]
    found = GaussianProcess().estimate(observations, n)
    assert abs(found.efficiency_gap) < 1e-9
    assert np.isfinite(found.values).all()


def test_contributors_that_are_alike_get_the_same():
    n = 6
    rng = np.random.default_rng(0)
    worth = rng.normal(size=n)
    worth[1] = worth[0]
    rows = [o for o in table(np.sqrt(np.abs(every(n) @ worth)), n) if o.coalition.size != 3]
    found = GaussianProcess().estimate(rows, n)
    assert found.values[0] == pytest.approx(found.values[1], abs=1e-7)
    assert found.values[0] != pytest.approx(found.values[2], abs=1e-2)


def test_scale_and_shift_of_the_utility_do_not_matter():
    one = GaussianProcess(budget=60)
    observations = observe(one.plan(10), games.class_entropy(10), 0.1)
    scaled = [replace(o, value=1e6 * o.value - 5e6) for o in observations]
    a, b = one.estimate(observations, 10), one.estimate(scaled, 10)
    np.testing.assert_allclose(b.values, 1e6 * np.array(a.values), rtol=1e-5)


def test_with_all_coalitions_it_is_the_definition():
    v = np.random.default_rng(0).normal(size=32)
    for semivalue in KINDS:
        found = GaussianProcess(semivalue=semivalue).estimate(table(v, 5), 5)
        np.testing.assert_allclose(found.values, by_definition(v, 5, semivalue), atol=1e-12)


def test_it_tends_to_the_definition():
    n, game = 8, games.synergy(8, 2)
    errors = []
    for budget in (40, 120, 220):
        one = GaussianProcess(budget=budget, holdout=0)
        errors.append(error(one.estimate(observe(one.plan(n), game), n).values, game.shapley()))
    assert errors[2] < 0.5 * errors[0]
    assert errors[2] < 0.03


def test_noise_alone_collapses_to_the_equal_split():
    collapsed = 0
    for seed in range(10):
        one = GaussianProcess(budget=60, seed=seed, holdout=0)
        nothing = games.Game("nothing", 20, lambda Z: Z.sum(1) / 20, lambda: np.full(20, 0.05))
        found = one.estimate(observe(one.plan(20), nothing, 1.0, seed), 20)
        if found.collapsed:
            collapsed += 1
            assert found.se is None
            assert not found.interval.reliable
            assert found.shrinkage_slope == 0
            np.testing.assert_allclose(found.values, (found.v_full - found.v_empty) / 20)
    assert collapsed >= 5


@pytest.mark.parametrize("semivalue", ["banzhaf", "leave_one_out"])
def test_other_semivalues_are_read_off_the_same_rows(semivalue):
    n, game = 10, games.coverage(10, 1)
    one = GaussianProcess(budget=100, semivalue=semivalue, holdout=0)
    found = one.estimate(observe(one.plan(n), game, 0.02 * game.sd(500)), n)
    q, _ = mixture(semivalue, n)
    truth = by_definition(game.value(every(n)), n, semivalue)
    assert len(q) == 1
    assert error(found.values, truth) < 0.35
    assert error(found.values, truth) < error(game.shapley(), truth)


def test_a_surrogate_that_is_the_game_is_believed():
    n, game = 12, games.class_entropy(12, 2)
    one = GaussianProcess(budget=24, holdout=0)
    observations = observe(one.plan(n), game, 0.05 * game.sd(500))
    alone = one.estimate(observations, n)
    helped = one.estimate(observations, n, Surrogate(game.value))
    assert helped.surrogate is not None
    assert helped.surrogate.weight == pytest.approx(1, abs=0.3)
    assert error(helped.values, game.shapley()) < 0.6 * error(alone.values, game.shapley())
    banzhaf = GaussianProcess(budget=24, holdout=0, semivalue="banzhaf")
    assert banzhaf.estimate(observations, n, Surrogate(game.value)).surrogate is None
