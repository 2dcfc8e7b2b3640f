"""A Gaussian process on coalitions, and the semivalues of its posterior in closed form.

The model of a coalition of s members, in the letters of `regression`:

    r(S) = g(S)·gamma + sum over k of h_k(S) + e,   h_k ~ GP(0, sigma² tau_k K_k),
                                                    e ~ N(0, sigma²/count),

with the fixed effects g that the ridge chooses (size columns, a surrogate), and kernels for

- *effects* of the members, K = X_S·X_T R(s, s'): constant (R = 1), fading (R = f(s) f(s') with
  1/s and 1/sqrt(s), as in `ridge`), and smooth in the log odds of s/n (R Gaussian);
- *interactions*, by the Hamming distance d: rho^d, conditioned on h(∅) = h(N) = 0. rho = e^(-2/n)
  lets coalitions drawn at random correlate by e^-1; where the likelihood chose rho it took noise
  for interactions, and was worse;
- the *size*: a Brownian bridge in log(1 + s).

A semivalue is a linear functional, so its posterior is known exactly whatever n: of rho^d it is a
product over the contributors (compare Chau et al. 2022, "RKHS-SHAP"), of the others a sum over the
sizes. Regression as in Rasmussen and Williams 2006, sections 2.7 and 5.4.1.

The tau maximise the restricted likelihood times a log-normal prior that a component is small. Six
variances from a few rows need one: without it the error was 2 % larger at 5n evaluations, and at n
evaluations larger than that of giving everyone the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attr_batch.estimators.regression import Array, Rows, size_columns
from attr_batch.estimators.ridge import FADING, ridge
from attr_batch.estimators.semivalue import Semivalue, mixture, size_weights

_DISTANCE = 2.0  # the interactions' decay over n contributors
_PRIOR_MEAN, _PRIOR_SD = -3.0, 2.0  # of log tau
_BOUNDS = (-12.0, 20.0)
_EVIDENCE = 10.0  # of -2 log likelihood for any effects, over the rows: below, there are none


@dataclass(frozen=True)
class Posterior:
    """Semivalues (n,) and their posterior variances (n,), those of the endpoints not counted.

    `by_empty`, `by_full` are the derivatives of the values by the endpoints; `residual` is the
    variance of one measurement, `df` its degrees of freedom; `slope` is the expected slope of
    estimate on truth; `tau` are the kernels' variances in units of the residual, effects
    (constant, fading by FADING, smooth), interactions, size; `columns` are the size columns,
    `weight` is the surrogate's b. `collapsed`: the likelihood hardly prefers the kernels to none,
    so there are none.
    """

    phi: Array
    variance: Array
    by_empty: Array
    by_full: Array
    residual: float
    df: int
    slope: float
    tau: Array
    columns: tuple[str, ...]
    weight: float
    collapsed: bool


def gaussian_process(rows: Rows, semivalue: Semivalue) -> Posterior:
    """Fit the model of this module and read a semivalue off its posterior."""
    # In an order that does not know the labels of the contributors, so they do not change a bit.
    order = np.lexsort((rows.s, rows.v))
    Z, n = rows.Z[order], rows.n
    s = Z.sum(1).astype(int)
    fixed = ridge(rows)
    columns, control = fixed.columns, rows.control if fixed.weight else None
    F = size_columns(s.astype(float), n, columns)
    sizes = size_columns(np.arange(n + 1.0), n, columns)
    worth = np.tile(_size_gain(semivalue, n) @ sizes, (n, 1))  # of a unit of gamma, (n, q)
    if control is not None:
        F = np.column_stack([F, control.column(Z) / control.scale])
        worth = np.column_stack([worth, control.psi / control.scale])
    basis, to_gamma = _orthonormal(F)
    kernels = _kernels(Z, s, semivalue)
    y = rows.v[order] - rows.v_empty - s / n * rows.delta
    unit = float(np.sqrt(np.mean(y * y))) or 1.0  # so that the search stops alike in every unit
    model = _Model([k.K for k in kernels], y / unit, 1 / rows.count[order], basis)
    tau = model.most_likely()
    fit, none = model.solve(tau), model.solve(np.zeros(len(kernels)))
    collapsed = none.criterion - fit.criterion < _EVIDENCE / len(y)
    if collapsed:
        tau, fit = np.zeros(len(kernels)), none

    worth = worth @ to_gamma
    cross = sum((a * k.cross for a, k in zip(tau, kernels, strict=True)), np.zeros((n, len(y))))
    prior = float(sum(a * k.variance for a, k in zip(tau, kernels, strict=True)))
    L = cross @ fit.P + worth @ fit.inner @ fit.VF.T  # from responses to values
    rest = worth - cross @ fit.VF
    df = max(len(y) - basis.shape[1], 1)
    residual = float(y @ fit.P @ y) / df
    left = prior - np.einsum("ij,jk,ik->i", cross, fit.Vi, cross, optimize=True)
    doubt = np.einsum("ij,jk,ik->i", rest, fit.inner, rest, optimize=True)
    gamma = to_gamma @ fit.inner @ fit.VF.T @ y
    return Posterior(
        phi=rows.delta / n + L @ y,
        variance=residual * np.maximum(left + doubt, 0),
        by_empty=-1 / n - L @ (1 - s / n),
        by_full=1 / n - L @ (s / n),
        residual=residual,
        df=df,
        slope=1 - float(left.mean()) / prior if prior else 0.0,
        tau=tau,
        columns=columns,
        weight=0.0 if control is None else float(gamma[-1]) / control.scale,
        collapsed=collapsed,
    )


# ------------------------------------------------------------------ kernels and their semivalues


@dataclass(frozen=True)
class _Kernel:
    """K (m, m) between rows, its values' covariance with the rows (n, m), a value's variance."""

    K: Array
    cross: Array
    variance: float


def _kernels(Z: Array, s: NDArray[np.int64], semivalue: Semivalue) -> list[_Kernel]:
    """Return the kernels, each with a mean diagonal of one."""
    n = Z.shape[1]
    sizes = np.arange(n + 1.0)
    odds = np.log((sizes + 0.5) / (n - sizes + 0.5))
    fading = [f(np.maximum(sizes, 1)) for f in FADING.values()]
    smooth = np.exp(-((odds[:, None] - odds) ** 2) / 2)
    effects = [np.ones((n + 1, n + 1)), *(np.outer(f, f) for f in fading), smooth]
    u = np.log1p(sizes) / np.log1p(n)
    found = [
        *(_effects(Z, s, R, semivalue) for R in effects),
        _interactions(Z, semivalue),
        _curve(s, np.minimum(u[:, None], u) - np.outer(u, u), semivalue),
    ]
    units = [max(float(k.K.diagonal().mean()), 1e-300) for k in found]
    return [
        _Kernel(k.K / unit, k.cross / unit, k.variance / unit)
        for k, unit in zip(found, units, strict=True)
    ]


def _effects(Z: Array, s: NDArray[np.int64], R: Array, semivalue: Semivalue) -> _Kernel:
    """Effects alpha_i(s) of the members less their mean, of covariance R (n+1, n+1) over sizes.

    As in `ridge.fading_shapley`, i adds alpha_i(k+1) - k/(n-1) (alpha_i(k+1) - alpha_i(k)) to k
    others on average, where alpha sums to zero.
    """
    n = Z.shape[1]
    X = Z - (s / n)[:, None]
    p, k = size_weights(semivalue, n), np.arange(n) / (n - 1)
    gain = np.append(0.0, p * (1 - k)) + np.append(p * k, 0.0)
    own = 1 - 1 / n
    return _Kernel((X @ X.T) * R[np.ix_(s, s)], X.T * (gain @ R)[s], own * float(gain @ R @ gain))


def _curve(s: NDArray[np.int64], R: Array, semivalue: Semivalue) -> _Kernel:
    """A game of the size alone, of covariance R over sizes: the same value for everyone."""
    n = len(R) - 1
    gain = _size_gain(semivalue, n)
    return _Kernel(R[np.ix_(s, s)], np.tile((gain @ R)[s], (n, 1)), float(gain @ R @ gain))


def _size_gain(semivalue: Semivalue, n: int) -> Array:
    """Return weights (n+1,) of g(0..n) that give a contributor's value in the game g(|S|)."""
    p = size_weights(semivalue, n)
    return np.append(0.0, p) - np.append(p, 0.0)


def _interactions(Z: Array, semivalue: Semivalue) -> _Kernel:
    """rho^|S xor T|, given that it is 0 at ∅ and N."""
    n = Z.shape[1]
    rho = np.exp(-_DISTANCE / n)
    ends = np.array([[0.0] * n, [1.0] * n])
    between = np.array([[1.0, rho**n], [rho**n, 1.0]])
    q, w = mixture(semivalue, n)

    def distance(A: Array, B: Array) -> Array:
        return A.sum(1)[:, None] + B.sum(1) - 2 * A @ B.T

    def values(T: Array) -> Array:
        """Return the values (n, k) of the games S -> rho^|S xor T_k|."""
        inside = np.arange(n)[:, None]  # how many of T are among the others
        alike = (rho + (1 - rho) * q) ** inside * (1 - (1 - rho) * q) ** (n - 1 - inside) @ w
        size = T.sum(1).astype(int)
        member, other = alike[np.maximum(size - 1, 0)], alike[np.minimum(size, n - 1)]
        return (1 - rho) * np.where(T.T > 0, member, -other)

    to_ends = rho ** distance(Z, ends)
    given = np.linalg.solve(between, to_ends.T)  # (2, m)
    at_ends = values(ends)
    apart = q[:, None] + q - 2 * np.outer(q, q)  # the chance that another is in one of S, T only
    own = 2 * (1 - rho) * float(w @ (1 - (1 - rho) * apart) ** (n - 1) @ w)
    return _Kernel(
        K=rho ** distance(Z, Z) - to_ends @ given,
        cross=values(Z) - at_ends @ given,
        variance=own - float(at_ends[0] @ np.linalg.solve(between, at_ends[0])),
    )


# ------------------------------------------------------------------ variance components


@dataclass(frozen=True)
class _Solution:
    """V^-1, V^-1 F, (Fᵀ V^-1 F)^-1, P = V^-1 - V^-1 F (Fᵀ V^-1 F)^-1 Fᵀ V^-1, -2 log REML."""

    Vi: Array
    VF: Array
    inner: Array
    P: Array
    criterion: float


@dataclass(frozen=True)
class _Model:
    """y = F gamma + h + e with var(h) = sigma² sum of tau_k K_k and var(e) = sigma² noise."""

    kernels: Sequence[Array]
    y: Array
    noise: Array
    F: Array

    def solve(self, tau: Array) -> _Solution:
        """Return what the posterior and the restricted likelihood at `tau` need."""
        from scipy.linalg import get_lapack_funcs  # here, so that --help and status start fast

        V = np.diag(self.noise)
        for a, K in zip(tau, self.kernels, strict=True):
            V += a * K
        C = np.linalg.cholesky(V)
        (inverse,) = get_lapack_funcs(("potri",), (C,))
        lower = np.tril(inverse(C, lower=True)[0])  # a quarter of the work of inv(V)
        Vi = lower + np.tril(lower, -1).T
        VF = Vi @ self.F
        information = self.F.T @ VF
        inner = np.asarray(np.linalg.inv(information), dtype=np.float64)
        P = Vi - VF @ inner @ VF.T
        df = max(len(self.y) - self.F.shape[1], 1)
        scatter = max(float(self.y @ P @ self.y), 1e-300)
        log_det = 2 * float(np.log(C.diagonal()).sum()) + float(np.linalg.slogdet(information)[1])
        return _Solution(Vi, VF, inner, P, df * float(np.log(scatter)) + log_det)

    def most_likely(self) -> Array:
        """Return the tau of greatest restricted likelihood times prior."""
        from scipy.optimize import minimize  # here, so that --help and status start fast

        df = max(len(self.y) - self.F.shape[1], 1)

        def objective(x: Array) -> tuple[float, Array]:
            tau = np.exp(x)
            at = self.solve(tau)
            Py = at.P @ self.y
            scatter = max(float(self.y @ Py), 1e-300)
            slope = np.array(
                [np.vdot(at.P, K) - df * float(Py @ K @ Py) / scatter for K in self.kernels]
            )
            z = (x - _PRIOR_MEAN) / _PRIOR_SD
            return at.criterion + float(z @ z), tau * slope + 2 * z / _PRIOR_SD

        start = np.zeros(len(self.kernels))
        bounds = [_BOUNDS] * len(self.kernels)
        found = minimize(
            objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-7}
        )
        return np.exp(found.x)


def _orthonormal(F: Array) -> tuple[Array, Array]:
    """Return an orthonormal basis (m, r) of F's columns, and what makes coefficients of its own."""
    scale = np.sqrt((F * F).sum(0))
    scale = np.where(scale > 1e-9, scale, np.inf)
    U, d, Vt = np.linalg.svd(F / scale, full_matrices=False)
    keep = d > 1e-9 * d.max(initial=0)
    return U[:, keep], (Vt[keep].T / d[keep]) / scale[:, None]
