"""The default reading: a ridge toward the equal split whose effects may fade with the size.

The model of a coalition of s members, in the letters of `regression`:

    r(S) = g(s)·gamma + sum over the members of (theta_i + f(s) alpha_i) + e,
    sum theta = sum alpha = 0,  theta ~ N(0, (1-omega) sigma²/lambda),  alpha likewise with omega.

alpha is there because utility saturates: one contributor more or less moves a small coalition a lot
and a large one hardly. A ridge with additive effects finds that the spread does not grow with the
size as it should, takes it for noise, and with many contributors gives everyone the same. The games
that alpha spans have Shapley values c_f alpha in closed form, so phi = Delta/n + theta + c_f alpha;
and as all additive games stay in the span, the answer is still consistent whatever the game.

A surrogate's column w~ (`surrogate`) is one more of g, its psi being added to the values: then the
ridge pulls toward Delta/n + b psi, with b fitted, and alone the residual is regressed.

lambda maximises the restricted likelihood. Restricted likelihoods of different fixed effects do not
compare, so the size columns, the surrogate, f and omega minimise -2 log full likelihood + q log m:
to Laplace's order the marginal likelihood under a unit-information prior of gamma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from attr_batch.estimators.regression import (
    BASES,
    ROWS_PER_COLUMN,
    Array,
    Rows,
    coefficients,
    orthonormal,
    row_weights,
    size_columns,
)

FADING: dict[str, Callable[[Array], Array]] = {
    "inverse": lambda s: 1 / s,
    "root": lambda s: 1 / np.sqrt(s),
}
# (f, omega): additive, or mostly to almost wholly fading; never wholly, to stay consistent.
EFFECTS: tuple[tuple[str | None, float], ...] = (
    (None, 0.0),
    *((name, omega) for name in FADING for omega in (0.3, 0.6, 0.9, 0.99)),
)
_ROWS_TO_FADE = 20  # fewer rows cannot tell: n = 10, M = 10 was worse than the equal split
_LOG_RATIO = np.linspace(-12, 30, 127)  # of var(effect)/var(e), beside one mean eigenvalue


@dataclass(frozen=True)
class Ridge:
    """Values (n,) shrunk toward the equal split.

    `slope` is the slope of estimate on truth that the fit expects of itself: 1 is no shrinkage.
    `lam` is None where lambda went to infinity: everyone gets the equal split, or what the
    surrogate says. `columns` are the size columns chosen, `fading` and `share` are f (None:
    additive) and omega, `weight` the surrogate's b, zero where the likelihood does without.
    """

    phi: Array
    lam: float | None
    slope: float
    columns: tuple[str, ...]
    fading: str | None
    share: float
    weight: float


def ridge(rows: Rows) -> Ridge:
    """Fit the model of this module."""
    root = np.sqrt(row_weights(rows))
    t = rows.s / rows.n
    X = (rows.Z - t[:, None]) * root[:, None]
    y = (rows.v - rows.v_empty - t * rows.delta) * root
    bases = _bases(rows, root)
    span = {name: orthonormal(F) for name, F in bases.items()}
    # First the fixed effects, with additive contributors; then, given those, how these fade.
    best = min(span, key=lambda name: _fit(X, (1.0,), y, span[name]).criterion)
    effects = EFFECTS if len(y) >= _ROWS_TO_FADE else EFFECTS[:1]
    fits = [(_fit(*_effects(X, rows.s, f, omega), y, span[best]), f, omega) for f, omega in effects]
    fit, fading, share = min(fits, key=lambda candidate: candidate[0].criterion)
    columns, with_surrogate = best
    phi, slope, weight = rows.delta / rows.n + fit.effect - fit.effect.mean(), fit.slope, 0.0
    if with_surrogate and rows.control is not None:
        B, _ = _effects(X, rows.s, fading, share)
        weight = float(coefficients(bases[best], y - B @ fit.beta)[-1]) / rows.control.scale
        known = weight * rows.control.psi  # not shrunken
        phi = phi + known
        slope = (known @ known + slope * fit.spread) / max(known @ known + fit.spread, 1e-300)
    return Ridge(
        phi=phi,
        lam=1 / fit.ratio if fit.ratio else None,
        slope=float(slope),
        columns=columns,
        fading=fading,
        share=share,
        weight=weight,
    )


def _bases(rows: Rows, root: Array) -> dict[tuple[tuple[str, ...], bool], Array]:
    """Return the weighted columns by candidate: names of size columns, and whether w~ is one."""
    m = len(root)
    bases = {
        (names, False): size_columns(rows.s, rows.n, names) * root[:, None]
        for names in BASES
        if m >= ROWS_PER_COLUMN * len(names)
    }
    if rows.control is None:
        return bases
    column = rows.control.column(rows.Z) / rows.control.scale * root
    for (names, _), G in list(bases.items()):
        F = np.column_stack([G, column])
        new = orthonormal(F).shape[1] > orthonormal(G).shape[1]  # not a curve of the size alone
        if new and m >= ROWS_PER_COLUMN * F.shape[1]:
            bases[names, True] = F
    return bases


def fading_shapley(f: Callable[[Array], Array], n: int) -> float:
    """Return c_f: the game f(|S|) alpha(S) with sum alpha = 0 has the values c_f alpha.

    i adds f(s+1) alpha_i + (f(s+1) - f(s)) alpha(S) to S of size s, and over the S without i
    alpha(S) is -alpha_i s/(n-1) on average.
    """
    s = np.arange(n)
    fs = np.concatenate([[0.0], f(np.arange(1.0, n + 1))])
    return float(np.mean(fs[1:] - s / (n - 1) * np.diff(fs)))


def _effects(
    X: Array, s: Array, fading: str | None, omega: float
) -> tuple[Array, tuple[float, ...]]:
    """Return the columns of theta and alpha in units of equal variance, and what each adds to phi.

    f is scaled so that both kinds of effect move the rows equally much on average.
    """
    if fading is None:
        return X, (1.0,)
    f = FADING[fading]
    faded = X * f(s)[:, None]
    scale = float(np.sqrt((X * X).sum() / (faded * faded).sum()))
    a, b = float(np.sqrt(1 - omega)), float(np.sqrt(omega)) * scale
    return np.hstack([a * X, b * faded]), (a, b * fading_shapley(f, X.shape[1]))


@dataclass(frozen=True)
class _Fit:
    beta: Array  # (k n,)
    effect: Array  # (n,) what beta adds to the equal split
    spread: float  # expected squared length of effect, before it is shrunken
    ratio: float  # 1/lambda = var(effect)/var(e); 0 where the likelihood wants no effects
    slope: float
    criterion: float


def _fit(B: Array, worth: tuple[float, ...], y: Array, Q: Array) -> _Fit:
    """Maximise the restricted likelihood of y = Q gamma + B beta + e over lambda.

    B is (m, k n) with k kinds of effect; a unit of kind j adds worth[j] to phi. Q is orthonormal.
    """
    m, q, n = len(y), Q.shape[1], B.shape[1] // len(worth)
    free = B - Q @ (Q.T @ B)
    a, V = np.linalg.eigh(free.T @ free)
    keep = a > 1e-10 * max(a[-1], 1e-300)
    a, V = a[keep], V[:, keep]
    y_free = y - Q @ (Q.T @ y)
    c = (V.T @ (free.T @ y_free)) / np.sqrt(a)
    rest = y_free - free @ (V @ (c / np.sqrt(a)))
    rss = max(float(rest @ rest), 1e-26 * float(y_free @ y_free), 1e-300)

    x = _log_ratio(a, c, rss, m - q)
    ratio = 0.0 if x is None else float(np.exp(x))
    k = 1 / (1 + a * ratio)
    to_phi = np.tensordot(worth, V.reshape(len(worth), n, -1), 1)  # of each direction
    prior = (n - 1) * sum(w * w for w in worth)
    # |V| of the full likelihood: Sylvester's identity, and Cholesky rather than a spectrum.
    C = np.linalg.cholesky(np.eye(B.shape[1]) + ratio * (B.T @ B))
    log_det = 2 * float(np.log(C.diagonal()).sum())
    along = (1 - k) * c / np.sqrt(a)
    return _Fit(
        beta=V @ along,
        effect=to_phi @ along,
        spread=float(rss + c * c @ k) / (m - q) * ratio * prior,
        ratio=ratio,
        slope=float((to_phi**2 @ (1 - k)).sum()) / prior,
        criterion=m * float(np.log(rss + c * c @ k)) + log_det + q * float(np.log(m)),
    )


def _log_ratio(a: Array, c: Array, rss: float, df: int) -> float | None:
    """Return the log of var(effect)/var(e) of greatest restricted likelihood, None for zero.

    `a` are the eigenvalues of the effects' Gram matrix, `c` the response along them, `rss` what is
    left of the response: -2 log L = df log(rss + sum c²/(1 + a e^x)) + sum log(1 + a e^x).
    """
    from scipy.optimize import brentq  # here, so that --help and status start fast

    def score(x: float) -> float:
        k = 1 / (1 + a * np.exp(x))
        return float((1 - k).sum() - df * ((c * c * k) @ (1 - k)) / (rss + c * c @ k))

    if not len(a):
        return None
    grid = _LOG_RATIO - np.log(a.mean())
    k = 1 / (1 + np.exp(grid)[:, None] * a)
    best = int(np.argmin(df * np.log(rss + k @ (c * c)) - np.log(k).sum(1)))
    if best == 0:
        return None
    if best + 1 < len(grid) and score(grid[best - 1]) < 0 < score(grid[best + 1]):
        # To the last digits, so that relabelled contributors get the same lambda.
        return cast(float, brentq(score, grid[best - 1], grid[best + 1], xtol=1e-13))
    return float(grid[best])
