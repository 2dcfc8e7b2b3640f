"""What an estimator says: values, how sure they are, how well they predict what was held out.

The interval belongs to paired least squares (`ls_values`, `low`, `high`), never to a shrunken
value: a ridge ranks better and understates the spread, so both are given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from attr_batch.coalition import Coalition
from attr_batch.errors import DataError
from attr_batch.estimators.design import Role, check_players
from attr_batch.estimators.regression import (
    Array,
    Rows,
    exact,
    paired_least_squares,
    predict,
)

PAIRS_PER_CONTRIBUTOR = 2.5  # below, the HC2-t interval was seen to cover too little
_FEWEST_HELD_OUT = 3


@dataclass(frozen=True)
class Observation:
    """One utility that was measured. `weight` is what it is worth beside a plain measurement."""

    coalition: Coalition
    value: float
    role: Role
    pair: int | None = None
    replicate: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Mean:
    """A mean over replicates: its value, their standard deviation (None for one), how many."""

    value: float
    sd: float | None
    replicates: int


@dataclass(frozen=True)
class Noise:
    """Spread between replicates of the same coalition: at both endpoints, and in the design."""

    empty: Mean
    full: Mean
    repeats_sd: float | None
    repeats_df: int
    repeated: int

    @property
    def pooled(self) -> tuple[float | None, int]:
        """Variance of one measurement over all replicates, and its degrees of freedom."""
        parts = [
            (self.empty.sd, self.empty.replicates - 1),
            (self.full.sd, self.full.replicates - 1),
            (self.repeats_sd, self.repeats_df),
        ]
        df = sum(k for sd, k in parts if sd is not None)
        return (sum(k * sd * sd for sd, k in parts if sd is not None) / df, df) if df else (None, 0)


@dataclass(frozen=True)
class Interval:
    """How the intervals were made. `reliable` is False below 2.5 n pairs."""

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
    size only.
    """

    spearman: float | None
    rmse: float
    coalitions: int
    chance95: float
    size_spearman: float | None
    size_rmse: float


@dataclass(frozen=True)
class Attribution:
    """Shapley values of n contributors from `used` observations, by the estimator named.

    `se`, `low`, `high` are None where there is too little evidence (n pairs or fewer), `ls_values`
    where the pairs do not determine them. `delta_se` is the standard error of v(N) - v(∅).
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


@dataclass(frozen=True)
class Evidence:
    """Observations in order: averaged rows to fit, the noise, and the held-out coalitions."""

    rows: Rows
    noise: Noise
    held_members: Array
    held_v: Array
    used: int


def gather(observations: Sequence[Observation], n: int) -> Evidence:
    """Average the replicates, find the pairs, part the holdout; the order given does not matter.

    DataError where an endpoint or the whole design has no value, or a value is not finite.
    """
    check_players(n)
    grand = (1 << n) - 1
    fitted: dict[int, list[Observation]] = defaultdict(list)
    held: dict[int, list[Observation]] = defaultdict(list)
    for o in observations:
        if o.coalition.n != n:
            raise DataError(f"coalition {o.coalition} has {o.coalition.n} contributors, wanted {n}")
        if not np.isfinite(o.value) or not (np.isfinite(o.weight) and o.weight > 0):
            raise DataError(f"value {o.value} with weight {o.weight}", f"coalition {o.coalition}")
        end = o.coalition.mask in (0, grand)
        (held if o.role == "holdout" and not end else fitted)[o.coalition.mask].append(o)
    for mask, name in ((0, "empty"), (grand, "grand")):
        if mask not in fitted:
            raise DataError(
                f"no value of the {name} coalition {Coalition(mask, n)}",
                hint="Shapley values divide v(N) - v(∅): both endpoints must be measured",
            )
    masks = sorted(fitted.keys() - {0, grand})
    if not masks:
        raise DataError("no design coalition has a value", hint="measure some of the plan first")
    held_masks = sorted(held.keys() - fitted.keys())
    means = [_mean(fitted[mask]) for mask in masks]
    position = {mask: i for i, mask in enumerate(masks)}
    empty, full = _mean(fitted[0]), _mean(fitted[grand])
    rows = Rows(
        Z=indicators(masks, n),
        v=np.array([mean.value for mean in means]),
        count=np.array([sum(o.weight for o in fitted[mask]) for mask in masks]),
        replicates=np.array([mean.replicates for mean in means]),
        partner=np.array([position.get(mask ^ grand, -1) for mask in masks]),
        v_empty=empty.value,
        v_full=full.value,
    )
    spread = [(mean.sd, mean.replicates - 1) for mean in means]
    df = sum(k for sd, k in spread if sd is not None)
    total = sum(k * sd * sd for sd, k in spread if sd is not None)
    noise = Noise(
        empty=empty,
        full=full,
        repeats_sd=float(np.sqrt(total / df)) if df else None,
        repeats_df=df,
        repeated=sum(sd is not None for sd, _ in spread),
    )
    held_v = np.array([_mean(held[mask]).value for mask in held_masks])
    return Evidence(rows, noise, indicators(held_masks, n), held_v, len(observations))


def indicators(masks: Sequence[int], n: int) -> Array:
    """Return memberships (len(masks), n) of bit masks of any length."""
    width = -(-n // 8)
    packed = np.frombuffer(b"".join(mask.to_bytes(width, "little") for mask in masks), np.uint8)
    bits = np.unpackbits(packed.reshape(len(masks), width), axis=1, bitorder="little")
    return bits[:, :n].astype(np.float64)


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
    ls_values, se, interval = _interval(rows, noise, confidence)
    reach = _student((1 + confidence) / 2, interval.df) if se is not None else 0.0
    return Attribution(
        estimator=estimator,
        values=_floats(phi),
        v_empty=rows.v_empty,
        v_full=rows.v_full,
        delta_se=float(
            np.sqrt(sum((m.sd or 0.0) ** 2 / m.replicates for m in (noise.empty, noise.full)))
        ),
        ls_values=None if ls_values is None else _floats(ls_values),
        se=None if se is None else _floats(se),
        low=None if se is None or ls_values is None else _floats(ls_values - reach * se),
        high=None if se is None or ls_values is None else _floats(ls_values + reach * se),
        interval=interval,
        holdout=_check(rows, phi, evidence.held_members, evidence.held_v),
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
) -> tuple[Array | None, Array | None, Interval]:
    n = rows.n
    if rows.complete:
        # Nothing was sampled: what is left is the noise of the measurements themselves.
        values, unit = exact(rows)
        variance, df = noise.pooled
        interval = Interval("replicates-t", confidence, df, rows.pairs, df >= 3)
        if variance is None:
            return values, None, interval
        ends = sum(_end_variance(m, variance) for m in (noise.empty, noise.full)) / n**2
        return values, np.sqrt(unit * variance + ends), interval
    fit = paired_least_squares(rows)
    evidence = rows.pairs + (len(rows.v) - 2 * rows.pairs) / 2  # a single row is half a pair
    values = fit.phi if fit.determined else None
    enough = fit.determined and fit.variance is not None and evidence > n
    reliable = enough and evidence >= PAIRS_PER_CONTRIBUTOR * n
    interval = Interval("paired-ls-hc2-t", confidence, max(fit.df, 0), rows.pairs, reliable)
    if not enough or fit.variance is None:
        return values, None, interval
    # An endpoint measured once: a row's residual variance, interactions included, bounds its noise.
    unknown = fit.residual or 0.0
    variance = (
        fit.variance
        + fit.by_empty**2 * _end_variance(noise.empty, unknown)
        + fit.by_full**2 * _end_variance(noise.full, unknown)
    )
    return values, np.sqrt(variance), interval


def _end_variance(mean: Mean, unknown: float) -> float:
    return (unknown if mean.sd is None else mean.sd**2) / mean.replicates


def _check(rows: Rows, phi: Array, Z: Array, observed: Array) -> Holdout | None:
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


def _mean(group: Sequence[Observation]) -> Mean:
    # Sorted, so that the sum's rounding does not depend on the order of the observations.
    ordered = sorted(group, key=lambda o: (o.replicate, o.value, o.weight))
    w = np.array([o.weight for o in ordered])
    x = np.array([o.value for o in ordered])
    mean = float(w @ x / w.sum())
    if len(x) == 1:
        return Mean(mean, None, 1)
    # Reliability weights: with equal weights the usual n - 1.
    spread = float(w @ (x - mean) ** 2 / (w.sum() - (w @ w) / w.sum()))
    return Mean(mean, spread**0.5, len(x))


def _floats(values: Array) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
