"""Cooperative games whose Shapley values are known: the oracle of the estimators.

Five families resemble what a property of a diffusion model does when data come and go (`FAMILIES`);
on four more nothing was tuned (`UNSEEN`); the textbook games test the axioms. `v(masks)` is
vectorised over bit masks, bit i being player i. `shapley()` is exact (closed form, quadrature of a
polynomial, or enumeration) unless `exact` is False: then it is the mean over antithetic
permutations, good to about a hundredth.

Games that are products over the players have a polynomial multilinear extension, so Gauss-Legendre
with n/2 + 1 nodes integrates Owen's formula without error; 1/x and log x are Laplace mixtures of
such products, integrated over their parameter by the trapezoidal rule on a logarithmic scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Game:
    """A game of n players: `value` maps (m, n) memberships to (m,) utilities."""

    name: str
    n: int
    value: Callable[[Array], Array]
    shapley: Callable[[], Array]
    exact: bool = True

    def v(self, masks: Sequence[int]) -> Array:
        return self.value(indicators(masks, self.n))

    def sd(self, draws: int = 2000) -> float:
        """Standard deviation of v over coalitions drawn as KernelSHAP draws them."""
        rng = np.random.default_rng(0)
        s = np.arange(1, self.n)
        p = 1 / (s * (self.n - s))
        sizes = rng.choice(s, draws, p=p / p.sum())
        ranks = rng.random((draws, self.n)).argsort(axis=1)
        return float(self.value((ranks < sizes[:, None]).astype(float)).std())


def indicators(masks: Iterable[int], n: int) -> Array:
    """Return the (len(masks), n) matrix of memberships."""
    return np.array([[mask >> i & 1 for i in range(n)] for mask in masks], dtype=float)


# ------------------------------------------------------------------ ways to the Shapley value


def enumerate_shapley(value: Callable[[Array], Array], n: int) -> Array:
    """By the definition, from all 2^n coalitions (n <= 20)."""
    masks = np.arange(1 << n, dtype=np.int64)
    chunks = np.array_split(masks, max(1, len(masks) >> 16))
    v = np.concatenate([value((c[:, None] >> np.arange(n) & 1).astype(float)) for c in chunks])
    weight = np.array([1 / (n * comb(n - 1, s)) for s in range(n)])
    phi = np.empty(n)
    for i in range(n):
        without = masks[(masks >> i & 1) == 0]
        phi[i] = weight[np.bitwise_count(without)] @ (v[without | 1 << i] - v[without])
    return phi


def permutation_shapley(value: Callable[[Array], Array], n: int, permutations: int) -> Array:
    """Mean marginal contribution over random permutations and their reversals: not exact."""
    rng = np.random.default_rng(0)
    phi = np.zeros(n)
    for _ in range(permutations // 2):
        order = rng.permutation(n)
        for path in (order, order[::-1]):
            Z = np.empty((n + 1, n))
            Z[:, path] = np.tri(n + 1, n, -1)
            phi[path] += np.diff(value(Z))
    return phi / (permutations // 2 * 2)


def _owen(n: int, marginal: Callable[[float], Array]) -> Array:
    """Integrate the multilinear extension's gradient along the diagonal (degree < n)."""
    nodes, weights = np.polynomial.legendre.leggauss(n // 2 + 1)
    return sum((w / 2 * marginal((x + 1) / 2) for x, w in zip(nodes, weights, strict=True)))  # type: ignore[return-value]


def product_shapley(a: Array) -> Array:
    """Shapley values of 1 - prod_{i in S} a_i; `a` is (..., n) with 0 < a <= 1."""

    def marginal(t: float) -> Array:
        each = 1 - t + t * a
        return (1 - a) * np.exp(np.log(each).sum(-1, keepdims=True) - np.log(each))

    return _owen(a.shape[-1], marginal)


_LOG_U = np.linspace(-40, 12, 1200)  # the parameter of the Laplace mixtures, on a log scale
_STEP = _LOG_U[1] - _LOG_U[0]


def log_total_shapley(w: Array) -> Array:
    """Shapley values of log(1 + w(S)) = int e^-u (1 - prod e^-uw) du/u."""
    u = np.exp(_LOG_U)[:, None]
    return (_STEP * np.exp(-u) * product_shapley(np.exp(-u * w))).sum(0)


def weighted_mean_shapley(b: Array, w: Array, c: float) -> Array:
    """Shapley values of sum_S b_i / (c + w(S)) = int e^-uc sum_S b_i prod e^-uw du."""
    u = np.exp(_LOG_U)[:, None]
    a = np.exp(-u * w)

    def marginal(t: float) -> Array:
        each = 1 - t + t * a
        others = np.exp(np.log(each).sum(-1, keepdims=True) - np.log(each))
        inside = t * b * a / each
        rest = inside.sum(-1, keepdims=True) - inside
        return others * (b * a + (a - 1) * rest)

    return (_STEP * u * np.exp(-u * c) * _owen(len(w), marginal)).sum(0)


# ------------------------------------------------------------------ five families of this problem


def log_total(n: int, seed: int = 0) -> Game:
    """More data, less and less gain: log(1 + total of lognormal sizes)."""
    w = np.random.default_rng([1, n, seed]).lognormal(0, 0.8, n)
    return Game("log_total", n, lambda Z: np.log1p(Z @ w), lambda: log_total_shapley(w))


def coverage(n: int, seed: int = 0) -> Game:
    """Classes are covered with probability p by whoever has them, redundantly."""
    rng = np.random.default_rng([2, n, seed])
    classes = 10
    p = rng.uniform(0.2, 0.9, (classes, n)) * (rng.random((classes, n)) < 0.2)
    q = rng.dirichlet(np.ones(classes) * 3)
    log_miss = np.log1p(-p)
    return Game(
        "coverage",
        n,
        lambda Z: (1 - np.exp(Z @ log_miss.T)) @ q,
        lambda: (q[:, None] * product_shapley(1 - p)).sum(0),
    )


def synergy(n: int, seed: int = 0) -> Game:
    """Groups of three to six pay only when half of them are there."""
    rng = np.random.default_rng([3, n, seed])
    groups = np.zeros((n, n))
    for group in groups:
        group[rng.choice(n, min(n, int(rng.integers(3, 7))), replace=False)] = 1
    pay = rng.lognormal(0, 1, n)
    need = np.ceil(groups.sum(1) / 2)
    return Game(
        "synergy",
        n,
        lambda Z: (need <= Z @ groups.T) @ pay,
        lambda: (pay / groups.sum(1)) @ groups,
    )


def class_entropy(n: int, seed: int = 0) -> Game:
    """Like an Inception Score: the exponential of the entropy of the pooled class histogram."""
    rng = np.random.default_rng([4, n, seed])
    classes = 10
    counts = rng.dirichlet(np.full(classes, 0.3), n) * rng.lognormal(0, 0.5, n)[:, None]

    def value(Z: Array) -> Array:
        pooled = Z @ counts + 1e-12
        share = pooled / pooled.sum(1, keepdims=True)
        entropy = np.exp(-(share * np.log(share)).sum(1))
        return np.where(Z.any(1), entropy, 1.0)

    if n <= 20:
        return Game("class_entropy", n, value, lambda: enumerate_shapley(value, n))
    number = 8000 if n <= 50 else 1500
    return Game(
        "class_entropy", n, value, lambda: permutation_shapley(value, n, number), exact=False
    )


def mean_quality(n: int, seed: int = 0) -> Game:
    """Average quality, weighted by size; who is worse than the others may have a negative value."""
    rng = np.random.default_rng([5, n, seed])
    w, quality = rng.lognormal(0, 0.5, n), rng.normal(0.6, 0.8, n)
    b = w * quality
    return Game(
        "mean_quality",
        n,
        lambda Z: (Z @ b) / (1.0 + Z @ w),
        lambda: weighted_mean_shapley(b, w, 1.0),
    )


FAMILIES: tuple[Callable[[int, int], Game], ...] = (
    log_total,
    coverage,
    synergy,
    class_entropy,
    mean_quality,
)

# ------------------------------------------------------------------ four on which nothing was tuned


def topics(n: int, seed: int = 0) -> Game:
    """Twenty topics, each there as soon as one of its few holders is."""
    rng = np.random.default_rng([11, n, seed])
    log_miss = np.where(rng.random((20, n)) < 0.15, -50.0, 0.0)
    q = rng.dirichlet(np.ones(20))
    return Game(
        "topics",
        n,
        lambda Z: (1 - np.exp(Z @ log_miss.T)) @ q,
        lambda: (q[:, None] * product_shapley(np.exp(log_miss))).sum(0),
    )


def pairwise(n: int, seed: int = 0) -> Game:
    """Values of either sign, and what two of them add or take when both are there."""
    rng = np.random.default_rng([12, n, seed])
    a, Q = rng.normal(0.1, 0.5, n), np.triu(rng.normal(0, 0.2, (n, n)), 1)
    return Game(
        "pairwise",
        n,
        lambda Z: Z @ a + ((Z @ Q) * Z).sum(1),
        lambda: a + (Q.sum(0) + Q.sum(1)) / 2,
    )


def threshold(n: int, seed: int = 0) -> Game:
    """Nothing works until about 40 % of the data are there, then nearly all does."""
    w = np.random.default_rng([13, n, seed]).lognormal(0, 0.6, n)
    w = w / w.sum()

    def value(Z: Array) -> Array:
        return 1 / (1 + np.exp(-10 * (Z @ w - 0.4)))

    return _valued("threshold", n, value)


def poor_beginning(n: int, seed: int = 0) -> Game:
    """Models of one or two contributors are noise, on another scale than all others."""
    w = np.random.default_rng([14, n, seed]).lognormal(0, 0.8, n)

    def value(Z: Array) -> Array:
        s = Z.sum(1)
        return np.where(s < 3, 0.2 * s - 1.5, np.log1p(Z @ w))

    return _valued("poor_beginning", n, value)


def _valued(name: str, n: int, value: Callable[[Array], Array]) -> Game:
    """A game whose values are enumerated up to 16 players, sampled above."""
    if n <= 16:
        return Game(name, n, value, lambda: enumerate_shapley(value, n))
    return Game(name, n, value, lambda: permutation_shapley(value, n, 4000), exact=False)


UNSEEN: tuple[Callable[[int, int], Game], ...] = (topics, pairwise, threshold, poor_beginning)

# ------------------------------------------------------------------ textbook games


def linear(n: int, seed: int = 0) -> Game:
    """Additive: v(S) = sum of a_i."""
    a = np.random.default_rng([6, n, seed]).normal(1, 1, n)
    return Game("linear", n, lambda Z: Z @ a, lambda: a.copy())


def unanimity(n: int, members: Sequence[int]) -> Game:
    """1 when everyone of `members` is there."""
    one = np.isin(np.arange(n), members).astype(float)
    return Game(
        "unanimity", n, lambda Z: (Z @ one == len(members)).astype(float), lambda: one / one.sum()
    )


def glove(left: int, right: int) -> Game:
    """Pairs of gloves; players 0..left-1 hold a left one."""
    n = left + right

    def value(Z: Array) -> Array:
        return np.minimum(Z[:, :left].sum(1), Z[:, left:].sum(1))

    return Game("glove", n, value, lambda: enumerate_shapley(value, n))


def airport(costs: Sequence[float]) -> Game:
    """The cost of the longest runway needed; each stretch is shared by those who need it."""
    c = np.asarray(costs, dtype=float)
    order = np.argsort(c)

    def shapley() -> Array:
        phi = np.empty(len(c))
        stretch = np.diff(c[order], prepend=0) / np.arange(len(c), 0, -1)
        phi[order] = np.cumsum(stretch)
        return phi

    return Game("airport", len(c), lambda Z: (Z * c).max(1), shapley)


def weighted_voting(weights: Sequence[int], quota: int) -> Game:
    """1 when the members' whole-number weights reach `quota`; counted by dynamic programming."""
    w = np.asarray(weights)
    n = len(w)

    def shapley() -> Array:
        phi = np.zeros(n)
        for i in range(n):
            ways = [[0] * quota for _ in range(n)]  # ways[s][t]: coalitions of s others, total t
            ways[0][0] = 1
            for j in (j for j in range(n) if j != i):
                for s in range(n - 2, -1, -1):
                    for t in range(quota - 1 - int(w[j]), -1, -1):
                        ways[s + 1][t + int(w[j])] += ways[s][t]
            pivotal = range(max(0, quota - int(w[i])), quota)
            phi[i] = sum(sum(ways[s][t] for t in pivotal) / (n * comb(n - 1, s)) for s in range(n))
        return phi

    return Game("weighted_voting", n, lambda Z: (Z @ w >= quota).astype(float), shapley)
