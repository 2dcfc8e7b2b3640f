"""Semivalues: mean gains of a contributor, by how many others are there when it comes.

A semivalue weighs v(S + i) - v(S) by the size of S alone (Dubey, Neyman and Weber, 1981). The three
here are mixtures over q of one experiment, in which every other contributor takes part with
probability q, independently: q is uniform for the Shapley value (Owen's multilinear extension,
1972), 1/2 for Banzhaf, 1 for leave-one-out.
"""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from attr_batch.estimators.regression import Rows

Array = NDArray[np.float64]
Semivalue = Literal["shapley", "banzhaf", "leave_one_out"]


def mixture(semivalue: Semivalue, n: int) -> tuple[Array, Array]:
    """Return nodes q and their weights, exact for every game of n contributors.

    A gain's mean is a polynomial in q of degree n - 1, which Gauss-Legendre integrates.
    """
    if semivalue == "shapley":
        x, w = np.polynomial.legendre.leggauss(n // 2 + 1)
        return (x + 1) / 2, w / 2
    return np.array([0.5 if semivalue == "banzhaf" else 1.0]), np.ones(1)


def size_weights(semivalue: Semivalue, n: int) -> Array:
    """Return the probability (n,) that 0 .. n - 1 others are there."""
    if semivalue == "shapley":
        return np.full(n, 1 / n)
    if semivalue == "banzhaf":
        return np.array([comb(n - 1, s) / 2 ** (n - 1) for s in range(n)])
    return np.eye(n)[-1]


def factors(Z: Array, semivalue: Semivalue) -> Array:
    """Return the factor (m, n) of v(S) in each value, by the definition, for memberships Z (m, n).

    Over all coalitions, both endpoints among them, the factors times v(S) add up to the values.
    """
    n, s = Z.shape[1], Z.sum(1).astype(int)
    p = size_weights(semivalue, n)
    each = np.array([p[k] / comb(n - 1, k) if p[k] else 0.0 for k in range(n)])
    return np.where(Z > 0, np.append(0.0, each)[s][:, None], -np.append(each, 0.0)[s][:, None])


def exact(rows: Rows, semivalue: Semivalue) -> tuple[Array, Array] | None:
    """Return the values (n,) by the definition, and their variance (n,) for unit noise of a row.

    None where not every coalition that the definition asks for was measured: all, or for
    leave-one-out those that lack one. The endpoints' part of the variance is left to the caller:
    a value changes with v(N) and v(∅) by the last and minus the first of `size_weights`.
    """
    n, s = rows.n, rows.s.astype(int)
    asked = s == n - 1 if semivalue == "leave_one_out" else np.full(len(s), rows.complete)
    if not asked.any() or (semivalue == "leave_one_out" and asked.sum() < n):
        return None
    p = size_weights(semivalue, n)
    C = factors(rows.Z, semivalue)
    ends = p[-1] * rows.v_full - p[0] * rows.v_empty
    return ends + C.T @ rows.v, (C * C).T @ (1 / rows.replicates)
