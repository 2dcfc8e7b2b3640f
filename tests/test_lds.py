"""The linear datamodeling score, its bootstrap and its limits, against scipy and known games."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from attr_batch import lds
from attr_batch.lds import Draws, Oracle


def oracle(m=40, n=8, seeds=2, noise=0.0, seed=0, size=4, game=None):
    rng = np.random.default_rng(seed)
    Z = np.zeros((m, n))
    for row in Z:
        row[rng.choice(n, size or rng.integers(1, n), replace=False)] = 1
    phi = np.arange(n) - 2.0
    value = Z @ phi if game is None else game(Z)
    v = value + noise * rng.normal(size=(seeds, m))
    return Oracle("alpha", 0.5, Z, v), phi


def test_the_score_is_the_mean_of_spearmans_over_seeds_and_designs():
    truth, phi = oracle(noise=3.0)
    rng = np.random.default_rng(1)
    designs = [phi + rng.normal(size=len(phi)) for _ in range(3)]
    predictions = lds.subset_sums(designs, truth)
    expected = np.mean([[spearmanr(p, v).statistic for v in truth.v] for p in predictions])
    assert lds.lds(predictions, truth)[0] == pytest.approx(expected, abs=1e-12)


def test_every_draw_is_the_score_of_the_resampled_coalitions():
    truth, phi = oracle(m=15, seeds=1, noise=3.0)  # of 15 there are ties between and by copies
    draws = Draws.of(truth, seed=3, draws=50)
    predictions = lds.subset_sums([np.round(phi)], truth)
    _, sample = lds.lds(predictions, truth, draws)
    for counts, found in zip(draws.coalitions.astype(int), sample, strict=True):
        rows = np.repeat(np.arange(15), counts)
        assert found == pytest.approx(
            spearmanr(predictions[0][rows], truth.v[0][rows]).statistic, abs=1e-9
        )


def test_draws_share_out_seeds_and_designs():
    truth, _ = oracle()
    draws = Draws.of(truth, seed=0)
    assert draws.coalitions.sum(axis=1).tolist() == [40.0] * lds.DRAWS
    assert np.allclose(draws.seeds.sum(axis=1), 1)
    assert set(np.unique(draws.designs(3) * 3)) == {0, 1, 2, 3}


def test_a_pair_is_drawn_as_one():
    truth, _ = oracle(m=6, seeds=1)
    unit = np.array([7, 3, 7, 3, 5, 5])
    lacking = truth.v.copy()
    lacking[0, 4] = np.nan
    draws = Draws.of(Oracle("mixed", None, truth.Z, truth.v, unit), seed=0, draws=300)
    counts = draws.coalitions
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, 1] == counts[:, 3]).all()
    assert (counts.sum(axis=1) == 6).all()
    assert (counts[:, 0] != counts[:, 1]).any()
    whole = Oracle("mixed", None, truth.Z, lacking, unit).whole
    assert whole.unit is not None
    assert whole.unit.tolist() == [7, 3, 7, 3, 5]


def test_a_perfect_prediction_scores_one_and_a_constant_nothing():
    truth, phi = oracle()
    assert lds.lds(lds.subset_sums([phi], truth), truth)[0] == pytest.approx(1)
    assert lds.lds(np.ones((1, 40)), truth)[0] == 0
    assert lds.lds(lds.subset_sums([-phi], truth), truth)[0] == pytest.approx(-1)


def test_an_interval_holds_the_figure_and_narrows_with_the_coalitions():
    widths = []
    for m in (20, 200):
        truth, phi = oracle(m=m, noise=4.0)
        found = lds.interval(
            *lds.lds(lds.subset_sums([phi], truth), truth, Draws.of(truth, seed=0))
        )
        assert found["low"] < found["value"] < found["high"]
        widths.append(found["high"] - found["low"])
    assert widths[1] < 0.6 * widths[0]


def test_bootstrap_intervals_cover_the_score_of_many_coalitions():
    exact, phi = oracle(m=20_000, noise=4.0, seed=99, seeds=1)
    target = lds.lds(lds.subset_sums([phi], exact), exact)[0]
    inside = 0
    for seed in range(60):
        truth, _ = oracle(m=60, noise=4.0, seed=seed, seeds=1)
        found = lds.interval(
            *lds.lds(lds.subset_sums([phi], truth), truth, Draws.of(truth, seed=0, draws=300))
        )
        inside += found["low"] <= target <= found["high"]
    assert inside >= 51  # 57 expected; percentile intervals of a correlation are a little narrow


def test_the_ceiling_is_what_one_seed_says_of_the_other():
    truth, _ = oracle(noise=3.0)
    found = lds.ceiling(truth, Draws.of(truth, seed=0))
    assert found["value"] == pytest.approx(spearmanr(*truth.v).statistic)
    assert found["low"] < found["value"] < found["high"]
    one = Oracle("one", 0.5, truth.Z, truth.v[:1])
    assert lds.ceiling(one, Draws.of(one, seed=0))["value"] is None


def test_additivity_is_high_for_additive_games_and_low_where_only_pairs_matter():
    truth, _ = oracle(m=100, noise=0.01)
    assert lds.additivity(truth, Draws.of(truth, seed=0))["value"] > 0.97
    few, _ = oracle(m=31)  # of 8 contributors: a fit would show its own error
    assert lds.additivity(few, Draws.of(few, seed=0))["value"] is None
    parity = lambda Z: Z[:, 0] * Z[:, 1] + (1 - Z[:, 0]) * (1 - Z[:, 1])  # noqa: E731
    truth, _ = oracle(m=200, noise=0.2, game=parity)
    assert lds.additivity(truth, Draws.of(truth, seed=0))["value"] < 0.3


def test_the_equal_split_scores_at_mixed_sizes_only():
    assert lds.floor(oracle()[0]) == 0
    saturating = lambda Z: np.sqrt(Z.sum(axis=1))  # noqa: E731
    truth, _ = oracle(size=None, game=saturating)
    assert lds.floor(truth) == pytest.approx(1)


def test_coalitions_that_are_not_retrained_yet_are_left_out():
    truth, phi = oracle(m=30, seeds=3)
    v = truth.v.copy()
    v[0, 4] = np.nan
    v[2, 10:] = np.nan  # a seed that has only begun
    whole = Oracle("alpha", 0.5, truth.Z, v).whole
    assert whole.v.shape == (2, 29)
    assert np.isfinite(whole.v).all()
    assert lds.lds(lds.subset_sums([phi], whole), whole)[0] == pytest.approx(1)
    assert not Oracle("alpha", 0.5, truth.Z, np.full((2, 30), np.nan)).enough


def test_agreement_has_the_references_noise_in_its_interval():
    rng = np.random.default_rng(0)
    reference, values = np.arange(6.0), np.arange(6.0) + rng.normal(size=(1, 6))
    sure = lds.agreement(values, reference, reference + 0.01 * rng.normal(size=(500, 6)), 0)
    vague = lds.agreement(values, reference, reference + 2.0 * rng.normal(size=(500, 6)), 0)
    assert (
        sure["value"]
        == vague["value"]
        == pytest.approx(np.corrcoef(values.mean(axis=0), reference)[0, 1])
    )
    assert vague["high"] - vague["low"] > 2 * (sure["high"] - sure["low"])


def test_where_there_is_nothing_to_fit_additivity_says_so():
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise, _ = oracle(m=40, seed=seed)
        noise = Oracle("alpha", 0.5, noise.Z, rng.normal(size=(1, 40)))
        found.append(lds.additivity(noise, Draws.of(noise, seed=0, draws=10))["value"])
    assert abs(np.mean(found)) < 0.2


def test_the_interval_of_the_agreement_covers_the_agreement():
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=12)
        values = truth + 0.5 * rng.normal(size=(1, 12))
        reference = truth + 0.4 * rng.normal(size=12)
        again = reference + 0.4 * rng.normal(size=(400, 12))
        found = lds.agreement(values, reference, again, seed, draws=400)
        exact = np.corrcoef(values[0], truth)[0, 1] / np.sqrt(1 + 0.16)  # as noise attenuates
        inside += found["low"] <= exact <= found["high"]
        assert found["low"] <= found["value"] <= found["high"]
    assert inside >= 84


def test_figures_that_are_not_there_are_none():
    assert lds.interval(None, np.zeros(0)) == {"value": None, "low": None, "high": None}
    assert lds.interval(0.5, np.zeros(0)) == {"value": 0.5, "low": None, "high": None}
    assert lds.pearson(np.ones(4), np.arange(4.0)) is None
    assert lds.correlation(np.arange(3.0), np.ones((1, 3)), 0)["value"] is None


def test_correlation_is_the_mean_over_retrainings():
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    Y = x + rng.normal(size=(2, 30))
    found = lds.correlation(x, Y, seed=0)
    assert found["value"] == pytest.approx(np.mean([np.corrcoef(x, y)[0, 1] for y in Y]))
    assert found["low"] < found["value"] < found["high"]


def test_two_or_three_values_do_not_agree_with_anything():
    for n in (2, 3):
        assert lds.agreement(np.ones((1, n)) * np.arange(n), np.arange(n), np.zeros((0, n)), 0) == {
            "value": None,
            "low": None,
            "high": None,
        }
