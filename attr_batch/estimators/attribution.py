"""What an estimator says: values, how sure they are, how well they predict what was held out.

The interval belongs to paired least squares (`ls_values`, `low`, `high`), never to a shrunken
value: a ridge ranks better and understates the spread, so both are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from attr_batch.coalition import Coalition
from attr_batch.estimators.observations import Evidence, Mean, Noise
from attr_batch.estimators.regression import (
    Array,
    Rows,
    exact,
    paired_least_squares,
    predict,
)

PAIRS_PER_CONTRIBUTOR = 2.5  # with fewer, few degrees of freedom are left to judge the spread
_FEWEST_HELD_OUT = 3
_FEWEST_REPEATS = 3  # degrees of freedom


@dataclass(frozen=True)
class Interval:
    """How the intervals were made. `pairs` are complement pairs with both utilities.

    `reliable` is False below 2.5 n pairs. With every coalition measured pairs do not matter, as
    nothing was sampled: it is False where repeats between the endpoints have fewer than three
    degrees of freedom, since the endpoints' own noise may be quite another.
    """

    method: str
    confidence: float
    df: int
    pairs: int
    reliable: bool


@dataclass(frozen=True)
class Holdout:
    """Predicted against observed utilities on coalitions that were not fitted.

    `chance95`: |Spearman| stays below it with 95 % chance when prediction and observation are
    unrelated. `size_spearman`, `size_rmse`: the same check of the equal split, which knows the
    size only; `beyond_size`: Spearman of what both have beyond that, which is what the paper's LDS
    sees at a fixed size. `predicted` is by coalition, as a 0/1 string.
    """

    spearman: float | None
    rmse: float
    coalitions: int
    chance95: float
    size_spearman: float | None
    size_rmse: float
    beyond_size: float | None
    predicted: dict[str, float]


@dataclass(frozen=True)
class Attribution:
    """Shapley values of n contributors from `used` observations, by the estimator named.

    `se`, `low`, `high` are None where there is too little evidence (n pairs or fewer), `ls_values`
    where the rows do not determine them. `delta_se` is the standard error of v(N) - v(∅), zero
    where nothing tells it.
    """

    estimator: str
    values: tuple[float, ...]
    v_empty: float
    v_full: float
    delta_se: float
    ls_values: tuple[float, ...] | None
    se: tuple[float, ...] | None
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    interval: Interval
    holdout: Holdout | None
    noise: Noise
    used: int
    shrinkage_slope: float | None = None
    lam: float | None = None
    columns: tuple[str, ...] = ()
    fading: str | None = None
    fading_share: float = 0.0
    collapsed: bool = False

    @property
    def n(self) -> int:
        """Number of contributors."""
        return len(self.values)

    @property
    def efficiency_gap(self) -> float:
        """Sum of the values less v(N) - v(∅): zero but for rounding."""
        return float(np.sum(self.values)) - (self.v_full - self.v_empty)

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Value / sum; None where the sum may be zero (two standard errors) or signs differ."""
        total = float(np.sum(self.values))
        signs = {value > 0 for value in self.values if value}
        if abs(total) <= 2 * self.delta_se or len(signs) != 1:
            return None
        return tuple(value / total for value in self.values)

    def to_json(
        self,
        ids: Sequence[str],
        images: Sequence[int | None],
        digests: Sequence[str | None],
        *,
        planned: int | None = None,
        failed: int | None = None,
    ) -> dict[str, Any]:
        """Return the estimator's part of attribution.json (JSON-able, no NaN).

        `ids`, `images`, `digests` are in the order of the contributors; `planned` and `failed`
        (plan entries, and those without a value) are the caller's to know.
        """
        columns = zip(
            ids,
            self.values,
            self.ls_values or [None] * self.n,
            self.se or [None] * self.n,
            self.low or [None] * self.n,
            self.high or [None] * self.n,
            self.shares or [None] * self.n,
            images,
            digests,
            strict=True,
        )
        names = ("id", "value", "ls_value", "se", "low", "high", "share", "images", "digest")
        noise, check = self.noise, self.holdout
        return {
            "semivalue": "shapley",
            "estimator": self.estimator,
            "v_empty": self.v_empty,
            "v_full": self.v_full,
            "efficiency_gap": self.efficiency_gap,
            "contributors": [dict(zip(names, row, strict=True)) for row in columns],
            "interval": dict(vars(self.interval)),
            "coalitions": {"planned": planned, "used": self.used, "failed": failed},
            "holdout": None if check is None else dict(vars(check)),
            "noise": {
                "empty": {"sd": noise.empty.sd, "replicates": noise.empty.replicates},
                "grand": {"sd": noise.full.sd, "replicates": noise.full.replicates},
                "repeats": {
                    "sd": noise.repeats_sd,
                    "df": noise.repeats_df,
                    "coalitions": noise.repeated,
                },
            },
            "shrinkage_slope": self.shrinkage_slope,
            "lambda": self.lam,
            "columns": list(self.columns),
            "fading": {"kind": self.fading, "share": self.fading_share},
            "collapsed": self.collapsed,
        }


def attribute(
    estimator: str,
    evidence: Evidence,
    confidence: float,
    phi: Array,
    *,
    shrinkage_slope: float | None = None,
    lam: float | None = None,
    columns: tuple[str, ...] = (),
    fading: str | None = None,
    fading_share: float = 0.0,
    collapsed: bool = False,
) -> Attribution:
    """Add to the values phi (n,) the interval of paired least squares and the holdout check."""
    rows, noise = evidence.rows, evidence.noise
    ls_values, se, delta_se, interval = _interval(rows, noise, confidence)
    reach = _student((1 + confidence) / 2, interval.df) if se is not None else 0.0
    return Attribution(
        estimator=estimator,
        values=_floats(phi),
        v_empty=rows.v_empty,
        v_full=rows.v_full,
        delta_se=delta_se,
        ls_values=None if ls_values is None else _floats(ls_values),
        se=None if se is None else _floats(se),
        low=None if se is None or ls_values is None else _floats(ls_values - reach * se),
        high=None if se is None or ls_values is None else _floats(ls_values + reach * se),
        interval=interval,
        holdout=_check(rows, phi, evidence.held, evidence.held_members, evidence.held_v),
        noise=noise,
        used=evidence.used,
        shrinkage_slope=shrinkage_slope,
        lam=lam,
        columns=columns,
        fading=fading,
        fading_share=fading_share,
        collapsed=collapsed,
    )


def _interval(
    rows: Rows, noise: Noise, confidence: float
) -> tuple[Array | None, Array | None, float, Interval]:
    """Return the least-squares values, their standard errors, that of v(N) - v(∅), and how."""
    n = rows.n
    if rows.complete:
        # Nothing was sampled: what is left is the noise of the measurements themselves.
        values, unit = exact(rows)
        reliable = noise.repeats_df >= _FEWEST_REPEATS
        variance, df = noise.repeats if reliable else noise.pooled
        interval = Interval("replicates-t", confidence, df, rows.pairs, reliable)
        ends = sum(_end_variances(noise, variance))
        se = None if variance is None else np.sqrt(unit * variance + ends / n**2)
        return values, se, ends**0.5, interval
    fit = paired_least_squares(rows)
    values = fit.phi if fit.determined else None
    enough = fit.determined and fit.variance is not None and rows.pairs > n
    reliable = enough and rows.pairs >= PAIRS_PER_CONTRIBUTOR * n
    interval = Interval("paired-ls-hc2-t", confidence, max(fit.df, 0), rows.pairs, reliable)
    # An endpoint measured once: a row's residual variance, interactions included, bounds its noise.
    empty, full = _end_variances(noise, fit.residual)
    delta_se = (empty + full) ** 0.5
    if not enough or fit.variance is None:
        return values, None, delta_se, interval
    variance = fit.variance + fit.by_empty**2 * empty + fit.by_full**2 * full
    return values, np.sqrt(variance), delta_se, interval


def _end_variances(noise: Noise, unknown: float | None) -> tuple[float, float]:
    """Return the variances of v(∅) and v(N); `unknown` stands in where one was measured once."""

    def variance(mean: Mean) -> float:
        return ((unknown or 0.0) if mean.sd is None else mean.sd**2) / mean.replicates

    return variance(noise.empty), variance(noise.full)


def _check(
    rows: Rows, phi: Array, held: Sequence[Coalition], Z: Array, observed: Array
) -> Holdout | None:
    if len(observed) < _FEWEST_HELD_OUT:
        return None
    predicted = predict(rows, phi, Z)
    by_size = predict(rows, np.full(rows.n, rows.delta / rows.n), Z)
    return Holdout(
        spearman=spearman(predicted, observed),
        rmse=float(np.sqrt(np.mean((predicted - observed) ** 2))),
        coalitions=len(observed),
        chance95=chance95(len(observed)),
        size_spearman=spearman(by_size, observed),
        size_rmse=float(np.sqrt(np.mean((by_size - observed) ** 2))),
        beyond_size=spearman(predicted - by_size, observed - by_size),
        predicted={str(c): float(p) for c, p in zip(held, predicted, strict=True)},
    )


def spearman(a: Array, b: Array) -> float | None:
    """Return Spearman's correlation, ties averaged; None where one side is constant."""
    # Differences of rounding are ties: predictions of one size must not be ranked by their bits.
    x, y = (_ranks(np.round(v, 12 - _magnitude(v))) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else None


def _ranks(v: Array) -> Array:
    _, place, count = np.unique(v, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _student(probability: float, df: int) -> float:
    """Return a quantile of Student's t."""
    from scipy.special import stdtrit  # here, so that --help and status start fast

    return float(stdtrit(df, probability))


def _magnitude(v: Array) -> int:
    top = float(np.abs(v).max(initial=0))
    return int(np.floor(np.log10(top))) if top > 0 else 0


def chance95(k: int) -> float:
    """Return the 95 % quantile of |Spearman| of k unrelated pairs.

    Exact over all permutations up to 7; above, rho sqrt((k-2)/(1-rho²)) is close to Student's t.
    """
    if k <= 7:
        x = np.arange(k) - (k - 1) / 2
        rho = np.array([x[list(order)] @ x for order in permutations(range(k))]) / (x @ x)
        return float(np.quantile(np.abs(rho), 0.95, method="higher"))
    quantile = _student(0.975, k - 2)
    return quantile / float(np.sqrt(quantile**2 + k - 2))


def _floats(values: Array) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
