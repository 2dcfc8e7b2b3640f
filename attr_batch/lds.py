"""How well values predict retrained models: the linear datamodeling score and what limits it.

LDS (Ilyas et al., 2022; the paper's Section 5.2) is Spearman's correlation, over coalitions that
were really retrained, between the sum of the members' values and the property of the retrained
model. It is computed against one retraining a coalition and averaged over the seeds of these.

A figure alone says little. The *ceiling* is what one retraining scores at predicting another, the
*additivity* ceiling what the best additive model scores, cross-validated on the retrainings; where
contributors interact much, no attribution does well. At mixed sizes the equal split predicts
something (more data, better model): the *floor*. At a fixed size it predicts nothing, and a fixed
size cannot see a constant added to every value.

Intervals are from a bootstrap over coalitions, oracle seeds and design seeds at once; where a
coalition was retrained with its complement, over pairs. All methods share its draws, so the
difference of two methods has an interval of its own, narrower than theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attr_batch.estimators.attribution import chance95, spearman
from attr_batch.estimators.regression import Array
from attr_batch.evidence import Estimate
from attr_batch.recipe import derive_seed

DRAWS = 1000
FOLDS = 10
ROWS_PER_CONTRIBUTOR = 4  # with fewer retrainings an additive fit shows its own error, no limit
_ALMOST = 1 - 1e-9  # of a correlation, where Fisher's transformation ends
FEWEST = 5  # coalitions of which a correlation says anything
_FEWEST_VALUES = 4  # contributors likewise: two always agree


@dataclass(frozen=True)
class Oracle:
    """Retrained coalitions: memberships `Z` (m, n), property `v` (seeds, m), NaN where it lacks.

    Coalitions of one `unit` (m,) were chosen together, a coalition and its complement, and are
    resampled together; by default each is its own.
    """

    name: str
    alpha: float | None
    Z: Array
    v: Array
    unit: np.ndarray | None = None

    @cached_property
    def whole(self) -> Oracle:
        """The same without the seeds of which less than half is there, and what those lack."""
        begun = np.isfinite(self.v).mean(axis=1) > 0.5
        v = self.v[begun] if begun.any() else self.v[:1]
        known = np.isfinite(v).all(axis=0)
        unit = None if self.unit is None else self.unit[known]
        return Oracle(self.name, self.alpha, self.Z[known], v[:, known], unit)

    @property
    def enough(self) -> bool:
        """Whether there are coalitions enough to correlate."""
        return self.whole.v.shape[1] >= FEWEST


@dataclass(frozen=True)
class Draws:
    """What a bootstrap draws: how often each coalition, each seed and each design comes up."""

    coalitions: Array  # (draws, m)
    seeds: Array  # (draws, seeds), rows sum to one
    seed: int

    @classmethod
    def of(cls, oracle: Oracle, seed: int, draws: int = DRAWS) -> Draws:
        """Return draws that depend on the numbers of seeds and coalitions and on `unit` alone."""
        R, m = oracle.v.shape
        units = np.arange(m) if oracle.unit is None else oracle.unit
        which, at = np.unique(units, return_inverse=True)
        rng = np.random.default_rng(derive_seed("lds", seed, R, m))
        return cls(_counts(rng, len(which), draws)[:, at], _counts(rng, R, draws) / R, seed)

    def designs(self, D: int) -> Array:
        """Return how much each of D designs counts, (draws, D), rows sum to one."""
        rng = np.random.default_rng(derive_seed("designs", self.seed, D))
        return _counts(rng, D, len(self.coalitions)) / D


def _counts(rng: np.random.Generator, of: int, draws: int) -> Array:
    return rng.multinomial(of, np.full(of, 1 / of), size=draws).astype(np.float64)


def lds(predictions: Array, oracle: Oracle, draws: Draws | None = None) -> tuple[float, Array]:
    """Return the score of predictions (designs, m), and one score a draw.

    A prediction that tells no two coalitions apart scores 0.
    """
    every = Draws(
        np.ones((1, oracle.v.shape[1])), np.full((1, len(oracle.v)), 1 / len(oracle.v)), 0
    )
    point = _scores(
        predictions, oracle, every, np.full((1, len(predictions)), 1 / len(predictions))
    )
    if draws is None:
        return float(point[0]), np.zeros(0)
    return float(point[0]), _scores(predictions, oracle, draws, draws.designs(len(predictions)))


def _scores(predictions: Array, oracle: Oracle, draws: Draws, designs: Array) -> Array:
    total = np.zeros(len(draws.coalitions))
    ranked = [_Ranked.of(row, draws.coalitions) for row in oracle.v]
    for d, prediction in enumerate(predictions):
        mine = _Ranked.of(prediction, draws.coalitions)
        for r, theirs in enumerate(ranked):
            total += designs[:, d] * draws.seeds[:, r] * mine.correlation(theirs, draws.coalitions)
    return total


@dataclass(frozen=True)
class _Ranked:
    """Ranks (draws, m) of one row in every bootstrap sample, centred, and their norm."""

    ranks: Array
    norm: Array

    @classmethod
    def of(cls, x: Array, counts: Array) -> _Ranked:
        """Rank x where item j comes up counts[b, j] times: ties, copies too, share their mean."""
        top = float(np.abs(x).max(initial=0))
        digits = 12 - int(np.floor(np.log10(top))) if top > 0 else 0
        levels, group = np.unique(np.round(x, digits), return_inverse=True)
        mass = counts @ np.eye(len(levels))[group]
        ranks = np.take(np.cumsum(mass, axis=1) - (mass - 1) / 2, group, axis=1)
        ranks -= (counts * ranks).sum(1, keepdims=True) / counts.sum(1, keepdims=True)
        return cls(ranks, np.sqrt((counts * ranks * ranks).sum(1)))

    def correlation(self, other: _Ranked, counts: Array) -> Array:
        """Return Spearman's correlation in every sample, 0 where a side is constant."""
        norm = self.norm * other.norm
        inner = (counts * self.ranks * other.ranks).sum(1)
        return np.divide(inner, norm, out=np.zeros_like(inner), where=norm > 1e-9)


def interval(value: float | None, draws: Array) -> Estimate:
    """Return a figure with the 2.5 and 97.5 % quantiles of its draws."""
    if value is None or not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    known = draws[np.isfinite(draws)]
    if not len(known):
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(known, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}


# -- what limits the score ------------------------------------------------------------------------


def ceiling(oracle: Oracle, draws: Draws) -> Estimate:
    """Return what one retraining scores at predicting another, over all pairs of seeds.

    The interval is over coalitions alone: a seed drawn twice would predict itself.
    """
    R = len(oracle.v)
    if R < 2:
        return interval(None, np.zeros(0))
    found = [
        lds(oracle.v[r : r + 1], Oracle(oracle.name, oracle.alpha, oracle.Z, oracle.v[q : q + 1]),
            Draws(draws.coalitions, np.ones((len(draws.coalitions), 1)), draws.seed))
        for r in range(R)
        for q in range(r + 1, R)
    ]  # fmt: skip
    value = float(np.mean([score for score, _ in found]))
    return interval(value, np.mean([sample for _, sample in found], axis=0))


def additivity(oracle: Oracle, draws: Draws) -> Estimate:
    """Return what the best additive model scores: fitted to the retrainings, cross-validated.

    A lower bound of what additive values can reach, as the fit has an error of its own. None below
    `ROWS_PER_CONTRIBUTOR` retrained coalitions for each contributor.
    """
    m, n = oracle.Z.shape
    if m < ROWS_PER_CONTRIBUTOR * n:
        return interval(None, np.zeros(0))
    target, predicted = oracle.v.mean(axis=0), np.zeros(m)
    fold = np.random.default_rng(derive_seed("folds", m)).permutation(m) % FOLDS
    for k in range(FOLDS):
        fit = fold != k
        predicted[~fit] = _additive(oracle.Z[fit], target[fit], oracle.Z[~fit])
    return interval(*lds(predicted[None], oracle, draws))


def _additive(Z: Array, y: Array, new: Array) -> Array:
    """Predict, but for a constant, by an additive ridge; lambda by generalised cross-validation.

    Without the mean of y: over folds it runs against what is left out of it.
    """
    centre = Z.mean(axis=0)
    U, d, Vt = np.linalg.svd(Z - centre, full_matrices=False)
    c = U.T @ (y - y.mean())
    rest = float(((y - y.mean()) ** 2).sum() - c @ c)
    best, coefficients = np.inf, np.zeros(Z.shape[1])
    for lam in np.logspace(-4, 4, 33):
        keep = d * d / (d * d + lam)
        left = rest + float((((1 - keep) * c) ** 2).sum())
        criterion = left / (len(y) - 1 - keep.sum()) ** 2
        if criterion < best:
            best = criterion
            coefficients = Vt.T @ (c * d / (d * d + lam))
    return (new - centre) @ coefficients


def floor(oracle: Oracle) -> float:
    """Return what the equal split scores: 0 where all coalitions have one size."""
    return lds(oracle.Z.sum(axis=1)[None], oracle)[0]


# -- agreement of values with values --------------------------------------------------------------


def pearson(a: Array, b: Array) -> float | None:
    """Return the correlation of a and b; None where one side is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 1e-300 else None


def agreement(
    values: Array, reference: Array, reference_draws: Array, seed: int, draws: int = DRAWS
) -> Estimate:
    """Return the correlation of values (designs, n), averaged, with reference (n,).

    None below four contributors. The interval is over designs and over draws (k, n) of the
    reference with its noise added anew. These correlate less than the reference itself does, which
    has that noise once: so only their spread is used, around the figure, on Fisher's scale.
    """
    if len(reference) < _FEWEST_VALUES:
        return interval(None, np.zeros(0))
    value = pearson(values.mean(axis=0), reference)
    if value is None or not len(reference_draws):
        return interval(value, np.zeros(0))
    rng = np.random.default_rng(derive_seed("agreement", seed, len(values)))
    weights = _counts(rng, len(values), draws) / len(values)
    picks = rng.integers(len(reference_draws), size=draws)
    found = [
        pearson(weights[b] @ values, reference_draws[pick]) or 0.0 for b, pick in enumerate(picks)
    ]
    z = np.arctanh(np.clip(found, -_ALMOST, _ALMOST))
    return interval(value, np.tanh(np.arctanh(np.clip(value, -_ALMOST, _ALMOST)) + z - z.mean()))


def correlation(x: Array, Y: Array, seed: int, draws: int = DRAWS) -> Estimate:
    """Return Pearson's correlation of x (m,) with the rows of Y (seeds, m), averaged.

    The bootstrap interval is over the m coalitions.
    """
    if len(x) < FEWEST or not len(Y):
        return interval(None, np.zeros(0))
    rng = np.random.default_rng(derive_seed("correlation", seed, len(x)))
    rows = rng.integers(len(x), size=(draws, len(x)))
    return interval(_mean_pearson(x, Y), np.array([_mean_pearson(x[r], Y[:, r]) for r in rows]))


def _mean_pearson(x: Array, Y: Array) -> float:
    return float(np.mean([pearson(x, y) or 0.0 for y in Y]))


def subset_sums(values: Sequence[Array], oracle: Oracle) -> Array:
    """Return the predictions (designs, m) that additive values make of the oracle's coalitions."""
    return np.stack([oracle.Z @ value for value in values])


__all__ = [
    "DRAWS",
    "FEWEST",
    "Draws",
    "Oracle",
    "additivity",
    "agreement",
    "ceiling",
    "chance95",
    "correlation",
    "floor",
    "interval",
    "lds",
    "pearson",
    "spearman",
    "subset_sums",
]
