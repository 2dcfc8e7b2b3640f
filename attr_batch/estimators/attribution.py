"""What an estimator says: values, how sure they are, how well they predict what was held out.

The interval belongs to paired least squares (`ls_values`, `low`, `high`), never to a shrunken
value: a ridge ranks better and understates the spread, so both are given.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np

from attr_batch.estimators.observations import Evidence, Mean, Noise
from attr_batch.estimators.regression import (
    LS_COLUMNS,
    Array,
    Rows,
    Sandwich,
    orthonormal,
    paired_least_squares,
    predict,
    row_weights,
    size_columns,
)
from attr_batch.estimators.semivalue import Semivalue, exact, size_weights

PAIRS_PER_CONTRIBUTOR = 2.5  # with fewer, few degrees of freedom are left to judge the spread
_FEWEST_HELD_OUT = 3
_FEWEST_REPEATS = 3  # degrees of freedom
_MOST_PAIRS = 1 << 20
_REPLICATES, _LEAST_SQUARES = "replicates-t", "paired-ls"


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
class SurrogateUse:
    """What a surrogate game w contributed.

    `weight` is b, in units of v per unit of w, zero where w was not used. `share`: how much of the
    variance that the coalitions of the design have beyond their size w explains; `correlation` is
    that of v and w over them. `values` are w's own Shapley values, shifted to sum to v(N) - v(∅):
    an attribution that needed no model, the baseline to beat. `alone`: the evaluations add nothing
    to it but `weight`, the values are (v(N) - v(∅))/n + b psi.
    """

    weight: float
    share: float
    correlation: float | None
    values: tuple[float, ...]
    alone: bool


@dataclass(frozen=True)
class Attribution:
    """Values of n contributors by a semivalue from `used` observations, by the estimator named.

    `se`, `low`, `high` are None where there is too little evidence (n pairs or fewer), `ls_values`
    where the rows do not determine them. `delta_se` is the standard error of v(N) - v(∅), zero
    where nothing tells it. `collapsed`: everyone got the equal split, for want of evidence.
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
    surrogate: SurrogateUse | None = None
    semivalue: Semivalue = "shapley"

    @property
    def n(self) -> int:
        """Number of contributors."""
        return len(self.values)

    @property
    def efficiency_gap(self) -> float:
        """Sum of the values less v(N) - v(∅): rounding, but for semivalues that do not share it."""
        return float(np.sum(self.values)) - (self.v_full - self.v_empty)

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Value / sum; None where the sum may be zero (two standard errors) or signs differ.

        None but for Shapley values: the others do not share v(N) - v(∅) out.
        """
        total = float(np.sum(self.values))
        signs = {value > 0 for value in self.values if value}
        unclear = abs(total) <= 2 * self.delta_se or len(signs) != 1
        if unclear or self.semivalue != "shapley":
            return None
        return tuple(value / total for value in self.values)

    @property
    def half_width(self) -> float | None:
        """Mean of (high - low)/2 over the contributors; None without intervals."""
        if self.low is None or self.high is None:
            return None
        return float(np.mean(np.subtract(self.high, self.low))) / 2

    def half_width_at(self, pairs: int) -> float | None:
        """Predict `half_width` with so many complement pairs.

        The variance of the design shrinks with its degrees of freedom, one for each further pair;
        what the endpoints' noise adds, delta_se²/n² for everyone, stays. None without intervals,
        for fewer pairs than columns, where every coalition was measured (no pair is left), and for
        intervals that are not of paired least squares.
        """
        df = self.interval.df + pairs - self.interval.pairs
        if self.se is None or not self.interval.method.startswith(_LEAST_SQUARES) or df < 1:
            return None
        ends = self.delta_se**2 / self.n**2
        design = np.maximum(np.square(self.se) - ends, 0) * (self.interval.df / df)
        return _reach(self.interval.confidence, df) * float(np.sqrt(design + ends).mean())

    def pairs_for(self, half_width: float) -> int | None:
        """Return how many complement pairs should bring the mean half-width down to this.

        None where nothing can be predicted (`half_width_at`), and where the noise of the endpoints
        alone is wider: then these need more replicates.
        """

        def reached(pairs: int) -> bool:
            predicted = self.half_width_at(pairs)
            return predicted is not None and predicted <= half_width

        if not reached(_MOST_PAIRS):
            return None
        return bisect_left(range(_MOST_PAIRS), True, key=reached)

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
        noise, check, use = self.noise, self.holdout, self.surrogate
        return {
            "semivalue": self.semivalue,
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
            "surrogate": use and {**vars(use), "values": list(use.values)},
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
    weight: float = 0.0,
    sandwich: Sandwich = "hc2",
    semivalue: Semivalue = "shapley",
) -> Attribution:
    """Add to the values phi (n,) the interval of paired least squares and the holdout check.

    `weight` is the surrogate's b in phi; `collapsed` says that no effects were found beyond it.
    """
    rows, noise = evidence.rows, evidence.noise
    ls_values, se, delta_se, interval = _interval(rows, noise, confidence, sandwich, semivalue)
    reach = _reach(confidence, interval.df) if se is not None else 0.0
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
        holdout=_check(evidence, phi, weight),
        noise=noise,
        used=evidence.used,
        shrinkage_slope=shrinkage_slope,
        lam=lam,
        columns=columns,
        fading=fading,
        fading_share=fading_share,
        collapsed=collapsed and not weight,
        surrogate=_use(rows, weight, collapsed),
        semivalue=semivalue,
    )


def with_interval(
    found: Attribution,
    method: str,
    variance: Array | None,
    df: int,
    reliable: bool,
    *,
    by_empty: Array,
    by_full: Array,
    residual: float | None,
) -> Attribution:
    """Return `found` with an interval around the estimator's own values instead.

    `variance` (n,) is that of the values, None where there is too little evidence; `by_empty`,
    `by_full` (n,) are their derivatives by the endpoints, `residual` stands in for the variance of
    an endpoint that was measured once.
    """
    interval = replace(found.interval, method=method, df=df, reliable=reliable)
    if variance is None:
        return replace(found, se=None, low=None, high=None, interval=interval)
    empty, full = _end_variances(found.noise, residual)
    se = np.sqrt(variance + by_empty**2 * empty + by_full**2 * full)
    values, reach = np.array(found.values), _reach(interval.confidence, df)
    low, high = _floats(values - reach * se), _floats(values + reach * se)
    return replace(found, se=_floats(se), low=low, high=high, interval=interval)


def _use(rows: Rows, weight: float, collapsed: bool) -> SurrogateUse | None:
    control = rows.control
    if control is None:
        return None
    root = np.sqrt(row_weights(rows))
    Q = orthonormal(size_columns(rows.s, rows.n, LS_COLUMNS) * root[:, None])

    def beyond_size(x: Array) -> Array:
        return x * root - Q @ (Q.T @ (x * root))

    v = beyond_size(rows.v - rows.v_empty - rows.s / rows.n * rows.delta)
    w = beyond_size(control.column(rows.Z) / control.scale)
    is_curve = float(w @ w) <= 1e-18 * float(root @ root)  # of the size alone, but for rounding
    centred = (x - x.mean() for x in (rows.v, control.values(rows.Z)))
    return SurrogateUse(
        weight=weight,
        share=0.0 if is_curve else (_cosine(v, w) or 0.0) ** 2,
        correlation=_cosine(*centred),
        values=_floats(rows.delta / rows.n + control.psi),
        alone=collapsed and weight != 0,
    )


def _interval(
    rows: Rows, noise: Noise, confidence: float, sandwich: Sandwich, semivalue: Semivalue
) -> tuple[Array | None, Array | None, float, Interval]:
    """Return the least-squares values, their standard errors, that of v(N) - v(∅), and how."""
    n = rows.n
    measured = exact(rows, semivalue)
    if measured is not None:
        # Nothing was sampled: what is left is the noise of the measurements themselves.
        values, unit = measured
        reliable = noise.repeats_df >= _FEWEST_REPEATS
        variance, df = noise.repeats if reliable else noise.pooled
        interval = Interval(_REPLICATES, confidence, df, rows.pairs, reliable)
        empty, full = _end_variances(noise, variance)
        p = size_weights(semivalue, n)
        ends = p[0] ** 2 * empty + p[-1] ** 2 * full
        se = None if variance is None else np.sqrt(unit * variance + ends)
        return values, se, (empty + full) ** 0.5, interval
    if semivalue != "shapley":  # what least squares estimates is the Shapley value
        delta_se = sum(_end_variances(noise, noise.pooled[0])) ** 0.5
        return None, None, delta_se, Interval("none", confidence, 0, rows.pairs, False)
    fit = paired_least_squares(rows, sandwich)
    values = fit.phi if fit.determined else None
    enough = fit.determined and fit.variance is not None and rows.pairs > n
    reliable = enough and rows.pairs >= PAIRS_PER_CONTRIBUTOR * n
    method = f"{_LEAST_SQUARES}-{sandwich}-t"
    interval = Interval(method, confidence, max(fit.df, 0), rows.pairs, reliable)
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


def _check(evidence: Evidence, phi: Array, weight: float) -> Holdout | None:
    rows, Z, observed = evidence.rows, evidence.held_members, evidence.held_v
    if len(observed) < _FEWEST_HELD_OUT:
        return None
    predicted = predict(rows, phi, Z, weight)
    by_size = predict(rows, np.full(rows.n, rows.delta / rows.n), Z)
    return Holdout(
        spearman=spearman(predicted, observed),
        rmse=float(np.sqrt(np.mean((predicted - observed) ** 2))),
        coalitions=len(observed),
        chance95=chance95(len(observed)),
        size_spearman=spearman(by_size, observed),
        size_rmse=float(np.sqrt(np.mean((by_size - observed) ** 2))),
        beyond_size=spearman(predicted - by_size, observed - by_size),
        predicted={str(c): float(p) for c, p in zip(evidence.held, predicted, strict=True)},
    )


def spearman(a: Array, b: Array) -> float | None:
    """Return Spearman's correlation, ties averaged; None where one side is constant."""
    # Differences of rounding are ties: predictions of one size must not be ranked by their bits.
    x, y = (_ranks(np.round(v, 12 - _magnitude(v))) for v in (a, b))
    return _cosine(x - x.mean(), y - y.mean())


def _cosine(x: Array, y: Array) -> float | None:
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else None


def _ranks(v: Array) -> Array:
    _, place, count = np.unique(v, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _reach(confidence: float, df: int) -> float:
    """Return how many standard errors an interval goes either way."""
    return _student((1 + confidence) / 2, df)


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
