"""A free game that resembles the expensive one, as a control variate.

The property measured on a coalition's own training images is a game w that needs no model. Where
it correlates with the utility v, few evaluations of v tell how v differs from it:

    v(S) = a + b w(S) + residual,    phi = b psi + the residual's values,

with w's own Shapley values psi from thousands of free coalitions, b fitted without a penalty, and
only the residual regressed on the evaluations. (Control variates: Glasserman 2003, section 4.1; b
fitted on few evaluations is what makes a useless w harmless.)

In the letters of `regression` the column is w~(S) = w(S) - w(∅) - t (w(N) - w(∅)), t = s/n. w(∅)
is free: images of nobody have no property, and a game of the size alone changes no difference
between contributors. It is the mean of the single contributors' w, so that the curve of w begins
without a jump.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attr_batch.errors import DataError
from attr_batch.estimators.semivalue import factors
from attr_batch.recipe import derive_seed

Array = NDArray[np.float64]

_ENUMERATE = 16  # up to so many contributors psi is exact, from all 2^n coalitions
_TURNS = 8  # of each permutation from which it is estimated above


@dataclass(frozen=True)
class Surrogate:
    """A cheap game w: `values(Z)` gives w of memberships Z (m, n), none of them empty, as (m,)."""

    values: Callable[[Array], Array]


@dataclass(frozen=True)
class DataStatistics:
    """What a property's w needs of the training images: a functional of mean statistics.

    `sums` (n, d) are each contributor's sums of the statistics of its images, `images` (n,) how
    many images it has. w(S) is the property of the coalition's mean.
    """

    sums: Array
    images: Array

    @classmethod
    def of(cls, by_contributor: Sequence[Array]) -> DataStatistics:
        """Add up statistics (count, d) of each contributor's images."""
        sums = np.stack([statistics.sum(axis=0) for statistics in by_contributor])
        return cls(sums, np.array([float(len(statistics)) for statistics in by_contributor]))

    def surrogate(self, of_mean: Callable[[Array], Array]) -> Surrogate:
        """Return the game w(S) = of_mean(mean statistics of the members' images).

        `of_mean` maps (m, d) to (m,).
        """
        return Surrogate(lambda Z: of_mean((Z @ self.sums) / (Z @ self.images)[:, None]))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able form from which `from_json` restores every bit."""
        return {"images": [int(count) for count in self.images], "sums": self.sums.tolist()}

    @classmethod
    def from_json(cls, body: Any) -> DataStatistics:
        """Read what `to_json` returned. DataError where it is not that."""
        try:
            sums = np.array(body["sums"], dtype=np.float64)
            images = np.array(body["images"], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"no statistics of images: {error}") from None
        finite = np.isfinite(sums).all() and np.isfinite(images).all()
        if sums.ndim != 2 or images.shape != sums.shape[:1] or not finite or (images < 1).any():
            raise DataError(f"statistics {sums.shape} of images {images.shape} do not fit")
        return cls(sums, images)


@dataclass(frozen=True)
class Control:
    """A surrogate of n contributors as a column of the regressions.

    `psi` (n,) are w's Shapley values less their mean; `scale`, the largest of |w(N)| and |w| of the
    single contributors, tells what is rounding.
    """

    values: Callable[[Array], Array]
    empty: float
    full: float
    scale: float
    psi: Array

    def column(self, Z: Array) -> Array:
        """Return w~(S) of memberships Z (m, n), as (m,)."""
        return self.values(Z) - self.empty - Z.mean(axis=1) * (self.full - self.empty)

    def beyond(self, Z: Array) -> Array:
        """Return what w~ has beyond its own values: w~(S) - sum of the members' psi."""
        return self.column(Z) - Z @ self.psi


@lru_cache(maxsize=8)  # a bootstrap reads the same surrogate again and again
def control(surrogate: Surrogate, n: int) -> Control:
    """Return the surrogate's column and Shapley values. DataError where w is not finite.

    psi is exact up to 16 contributors. Above, it is a mean over permutations, always the same
    ones, of the contributors in the order of w({i}): so it does not depend on labels.
    """
    singles = surrogate.values(np.eye(n))
    full = float(surrogate.values(np.ones((1, n)))[0])
    empty = float(singles.mean())
    if n <= _ENUMERATE:
        psi = _enumerate(surrogate.values, n, empty)
    else:
        psi = _permute(surrogate.values, np.argsort(singles, kind="stable"), empty)
    if not np.isfinite(psi).all():
        raise DataError("the surrogate is not finite", hint="attribute without it")
    scale = max(abs(full), float(np.abs(singles).max())) or 1.0
    return Control(surrogate.values, empty, full, scale, psi - psi.mean())


def _enumerate(values: Callable[[Array], Array], n: int, empty: float) -> Array:
    """Return the Shapley values by the definition."""
    masks = np.arange(1 << n)
    Z = (masks[:, None] >> np.arange(n) & 1).astype(np.float64)
    w = np.concatenate([[empty], values(Z[1:])])
    return factors(Z, "shapley").T @ w


def _permute(values: Callable[[Array], Array], order: NDArray[np.int64], empty: float) -> Array:
    """Return the mean gain over permutations, each turned in equal steps, and each reversed.

    Turning lets everyone come early, midway and late. What is left of the chance of coming early
    is the mean gain at each place, which is a game of the size alone: it is taken out.
    """
    n = len(order)
    rng = np.random.default_rng(derive_seed("surrogate", n))
    places = np.arange(n)
    gains, curve, came = np.zeros(n), np.zeros(n), np.zeros((n, n))
    rounds = max(128, 8192 // n)  # errors of 1 to 5 %, a second for 258 contributors
    for _ in range(rounds):
        circle = order[rng.permutation(n)]
        turned = np.stack([np.roll(circle, turn * n // _TURNS) for turn in range(_TURNS)])
        place = np.argsort(np.concatenate([turned, turned[:, ::-1]]), axis=1)  # (path, contributor)
        Z = place[:, None, :] <= places[:, None]  # (path, step, contributor)
        w = values(Z.reshape(-1, n).astype(np.float64)).reshape(-1, n)
        gain = np.diff(w, axis=1, prepend=empty)
        gains += np.take_along_axis(gain, place, axis=1).sum(axis=0)
        curve += gain.sum(axis=0)
        np.add.at(came, (places, place), 1)
    paths = rounds * 2 * _TURNS
    return (gains - came @ curve / paths) / paths
