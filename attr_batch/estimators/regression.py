"""The readings: from utilities to Shapley values, by regression on who took part.

The Shapley value is the projection of v on the additive games with v(∅) and v(N) held, under the
kernel p(s) ∝ (n-1)/(s(n-s)) (the paper's Eq. 5). Below, t = s/n, the response is
r = v(S) - v(∅) - t (v(N) - v(∅)) and a row of X is 1_S - t, so that phi = (v(N) - v(∅))/n + theta
with sum theta = 0: efficiency holds by construction.

*Size columns.* Utility saturates with the amount of data whoever gave it. A game of the size alone
that is 0 at ∅ and N gives everyone the value 0, so columns g(s) with g(0) = g(n) = 0 leave the
estimand alone; but without them that curve leaks into the values wherever the sampled A differs
from its expectation. It is the chief error of the closed form. The columns of `jump` and `inverse`
absorb a v(∅) that is off the scale (an untrained network).

*Pairs.* (v(S) - v(N∖S))/2 is free of everything even under complement, and of v(∅).

*A surrogate's column* w~ (`surrogate`) is one more. Its coefficient b adds b psi to the values; so
X theta + b w~ is X phi + b (w~ - X psi): what w has beyond its own values is, like the size
columns, orthogonal to the additive games under the kernel, and leaves the estimand alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attr_batch.estimators.design import size_probability
from attr_batch.estimators.surrogate import Control

Array = NDArray[np.float64]

_COLUMNS: dict[str, Callable[[Array, int], Array]] = {
    "quadratic": lambda s, n: s / n * (1 - s / n),
    "cubic": lambda s, n: s / n * (1 - s / n) * (s / n - 0.5),
    "log": lambda s, n: np.log1p(s) / np.log1p(n) - s / n,
    "jump": lambda s, n: np.where(s > 0, 1 - s / n, 0.0),
    "inverse": lambda s, n: np.where(s > 0, 1 / np.maximum(s, 1) - 1 / n, 0.0),
}

# Bases among which the marginal likelihood chooses: no size effect, a smooth curve of two or three
# terms, a v(∅) off the scale, all of them.
BASES: tuple[tuple[str, ...], ...] = (
    (),
    ("quadratic", "cubic"),
    ("quadratic", "cubic", "log"),
    ("jump", "inverse"),
    ("quadratic", "cubic", "log", "jump", "inverse"),
)
Sandwich = Literal["hc2", "hc3"]
LS_COLUMNS = ("quadratic", "cubic", "jump")
_FEWEST_SPARE = 4  # degrees of freedom
ROWS_PER_COLUMN = 4  # a basis is a candidate only with so many rows for each of its columns


@dataclass(frozen=True)
class Rows:
    """Distinct coalitions with their mean utility: m rows, n contributors.

    `Z` (m, n) memberships, `v` (m,) means, `count` (m,) how many measurements (times weight) each
    is worth, `replicates` (m,) how many there were, `partner` (m,) the row of the complement or -1.
    `control` is the surrogate, if there is one.
    """

    Z: Array
    v: Array
    count: Array
    replicates: NDArray[np.int64]
    partner: NDArray[np.int64]
    v_empty: float
    v_full: float
    control: Control | None = None

    @property
    def n(self) -> int:
        """Number of contributors."""
        return self.Z.shape[1]

    @property
    def s(self) -> Array:
        """Sizes of the coalitions."""
        return self.Z.sum(1)

    @property
    def delta(self) -> float:
        """v(N) - v(∅)."""
        return self.v_full - self.v_empty

    @property
    def pairs(self) -> int:
        """Number of complete complement pairs."""
        return int((self.partner >= 0).sum()) // 2

    @property
    def complete(self) -> bool:
        """True when every coalition was measured: nothing is left to sampling."""
        return self.n <= 16 and len(self.v) == (1 << self.n) - 2


def size_columns(s: Array, n: int, names: tuple[str, ...]) -> Array:
    """Return the named columns g(s), (len(s), len(names)); each is 0 at s = 0 and s = n."""
    columns = [_COLUMNS[name](s, n) for name in names]
    return np.stack(columns, axis=1) if columns else np.zeros((len(s), 0))


def row_weights(rows: Rows) -> Array:
    """Return each row's weight: its count times Shapley kernel over the sizes' realised share.

    Sizes s and n - s are one class. Where small sizes are exhausted, or somebody else drew the
    sizes, this restores the kernel under which the projection is the Shapley value.
    """
    p = np.array(size_probability(rows.n))
    size = np.minimum(rows.s, rows.n - rows.s).astype(int)
    mass = np.bincount(size, rows.count, minlength=rows.n + 1)
    wanted = np.zeros(rows.n + 1)
    np.add.at(wanted, np.minimum(np.arange(rows.n + 1), rows.n - np.arange(rows.n + 1)), p)
    return rows.count * (wanted[size] / mass[size]) * rows.count.sum()


# ------------------------------------------------------------------ the paper's closed form


def closed_form(rows: Rows) -> Array:
    """Return beta = A^-1 (d - 1 [1ᵀA^-1 d - v(N) + v(∅)] / (1ᵀA^-1 1)), the paper's Eq. 5.

    A and d are means over the sampled coalitions, A^-1 the pseudo-inverse.
    """
    w = rows.count / rows.count.sum()
    A = rows.Z.T @ (w[:, None] * rows.Z)
    d = rows.Z.T @ (w * (rows.v - rows.v_empty))
    A_inv = np.linalg.pinv(A, hermitian=True)
    one = np.ones(rows.n)
    return A_inv @ (d - one * ((one @ A_inv @ d - rows.delta) / (one @ A_inv @ one)))


# ------------------------------------------------------------------ paired least squares


@dataclass(frozen=True)
class LeastSquares:
    """Values (n,) and what their interval needs.

    Where the rows do not determine the values, `determined` is False and phi is the smallest
    deviation from the equal split. `variance` is the HC2 or HC3 sandwich; `by_empty`, `by_full` are
    the derivatives of the values by the endpoints; `residual` is the residual variance of one row;
    `weight` is the surrogate's b, zero without one.
    """

    phi: Array
    determined: bool
    variance: Array | None
    by_empty: Array
    by_full: Array
    df: int
    residual: float | None
    weight: float = 0.0


def paired_least_squares(rows: Rows, sandwich: Sandwich = "hc2") -> LeastSquares:
    """Fit half the difference of each complete pair, and the single rows as they are.

    A surrogate is fitted where the rows leave four degrees of freedom: whether it helps is not
    asked, so that the interval stays honest.
    """
    n, w, t = rows.n, row_weights(rows), rows.s / rows.n
    first = np.flatnonzero(rows.partner > np.arange(len(rows.v)))
    second, single = rows.partner[first], np.flatnonzero(rows.partner < 0)
    half = 4 / (1 / w[first] + 1 / w[second])  # the weight of half a difference

    def stack(paired: Array, alone: Array) -> Array:
        return np.concatenate([paired, alone])

    def odd(x: Array) -> Array:
        return stack((x[first] - x[second]) / 2, x[single])

    c_full = odd(t)
    c_empty = stack(-c_full[: len(first)], 1 - t[single])
    r = odd(rows.v) - c_empty * rows.v_empty - c_full * rows.v_full
    root = np.sqrt(stack(half, w[single]))
    X = odd(rows.Z - t[:, None]) * root[:, None]
    F = odd(size_columns(rows.s, n, LS_COLUMNS)) * root[:, None]
    Q = orthonormal(F)
    control = rows.control
    if control is not None and len(r) - (n - 1) - Q.shape[1] > _FEWEST_SPARE:
        beyond = odd(control.beyond(rows.Z)) * root / control.scale
        F = np.column_stack([F, beyond])
        Q = orthonormal(F)
    else:
        control = None

    U, d, Vt = np.linalg.svd(X - Q @ (Q.T @ X), full_matrices=False)
    # Of X, not of what is left of it: where the columns explain all, what is left is rounding.
    keep = d > 1e-9 * max(float(np.linalg.norm(X)), 1e-300)
    U, d, Vt = U[:, keep], d[keep], Vt[keep]
    L = (Vt.T / d) @ U.T  # from a weighted response to theta
    theta = L @ (root * r)
    y = root * r - Q @ (Q.T @ (root * r))
    residual = y - U @ (U.T @ y)
    leverage = (U * U).sum(1) + (Q * Q).sum(1)
    excess = np.maximum(1 - leverage, 1e-9) ** (1 if sandwich == "hc2" else 2)
    df = len(r) - len(d) - Q.shape[1]
    share = np.full(n, 1 / n)
    weight = 0.0 if control is None else coefficients(F, root * r - X @ theta)[-1] / control.scale
    return LeastSquares(
        phi=rows.delta / n + theta - theta.mean(),
        determined=len(d) == n - 1,
        variance=(L * L) @ (residual**2 / excess) if df > 0 else None,
        by_empty=-share - L @ (root * c_empty),
        by_full=share - L @ (root * c_full),
        df=df,
        residual=float(residual @ residual / df) if df > 0 else None,
        weight=float(weight),
    )


# ------------------------------------------------------------------ what a coalition would give


def predict(rows: Rows, phi: Array, Z: Array, weight: float = 0.0) -> Array:
    """Return v(∅) + sum of the members' phi + a curve of the size, for memberships Z (k, n).

    The curve is fitted to what phi leaves of the rows, its basis chosen as the ridge's is. With a
    surrogate comes `weight` times what it has beyond its own values.
    """

    def beyond(Z: Array) -> Array | float:
        return weight * rows.control.beyond(Z) if rows.control and weight else 0.0

    root = np.sqrt(row_weights(rows))
    y = (rows.v - rows.v_empty - rows.Z @ phi - beyond(rows.Z)) * root
    m = len(y)
    best, curve = np.inf, np.zeros(len(Z))
    for names in BASES:
        if names and m < ROWS_PER_COLUMN * len(names):
            continue
        G = size_columns(rows.s, rows.n, names) * root[:, None]
        gamma = coefficients(G, y)
        rest = y - G @ gamma
        criterion = m * np.log(max(float(rest @ rest), 1e-300)) + len(names) * np.log(m)
        if criterion < best:
            best, curve = criterion, size_columns(Z.sum(1), rows.n, names) @ gamma
    return rows.v_empty + Z @ phi + curve + beyond(Z)


def coefficients(G: Array, y: Array) -> Array:
    """Return the shortest least-squares coefficients of y (m,) on the columns of G (m, k)."""
    return np.asarray(np.linalg.lstsq(G, y, rcond=1e-9)[0], dtype=np.float64)


def orthonormal(G: Array) -> Array:
    """Return an orthonormal basis of the columns' span; columns that vanish or repeat drop out."""
    scale = np.sqrt((G * G).sum(0))
    G = G[:, scale > 1e-9] / scale[scale > 1e-9]
    if not G.size:
        return np.zeros((len(G), 0))
    U, d, _ = np.linalg.svd(G, full_matrices=False)
    return U[:, d > 1e-9 * d[0]]
