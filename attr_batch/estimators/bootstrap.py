"""Draws of the values: the same estimator on resampled evidence (Efron 1979).

The unit is the complement pair, since its two utilities were planned together and the designs owe
their precision to that; a coalition whose complement was not measured is a unit of its own. Within
each endpoint the replicates are resampled. A unit that comes up k times gets k times the weight: as
k further rows it would look like replicates without noise.

A resample holds about two thirds of the pairs, and an estimator does worse on these than on all: at
budgets of a few n the draws spread too much rather than too little.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from attr_batch.estimators.attribution import Attribution
from attr_batch.estimators.observations import Observation
from attr_batch.estimators.regression import Array
from attr_batch.recipe import derive_seed


def bootstrap(
    observations: Sequence[Observation],
    n: int,
    draws: int,
    seed: int,
    estimate: Callable[[Sequence[Observation], int], Attribution],
) -> Array:
    """Return the values (draws, n) that `estimate` finds on resampled pairs.

    The same for the same seed, whatever the order of the observations. What is held out is not
    drawn. An endpoint measured once does not vary: its noise is missing in the draws.
    """
    rng = np.random.default_rng(derive_seed("bootstrap", seed))
    strata = _strata(observations, n)
    return np.array(
        [
            estimate([o for units in strata for o in _resample(units, rng)], n).values
            for _ in range(draws)
        ]
    )


def _strata(observations: Sequence[Observation], n: int) -> list[list[list[Observation]]]:
    """Return the units of the empty, the grand coalition and the design."""
    grand = (1 << n) - 1
    ends: dict[int, list[list[Observation]]] = {0: [], grand: []}
    pairs: dict[int, list[Observation]] = defaultdict(list)
    for o in sorted(observations, key=lambda o: (o.coalition, o.replicate, o.value, o.weight)):
        mask = o.coalition.mask
        if mask in ends:
            ends[mask].append([o])
        elif o.role != "holdout":
            pairs[min(mask, mask ^ grand)].append(o)
    return [*ends.values(), list(pairs.values())]


def _resample(units: list[list[Observation]], rng: np.random.Generator) -> Iterator[Observation]:
    """Yield the observations of as many units, drawn with replacement, by their weights."""
    times = np.bincount(rng.integers(len(units), size=len(units)), minlength=len(units))
    for unit, k in zip(units, times, strict=True):
        if k:
            yield from (replace(o, weight=o.weight * float(k)) for o in unit)
