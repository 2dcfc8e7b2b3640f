"""A free game that resembles the expensive one: a property of a coalition's training images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attr_batch.estimators.regression import Array


@dataclass(frozen=True)
class Surrogate:
    """A cheap game w: `values(Z)` gives w of memberships Z (m, n), none of them empty, as (m,)."""

    values: Callable[[Array], Array]
