"""What all baselines see of a finished training, and how images' scores become contributors'."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from attr_batch.data import Dataset
from attr_batch.instruments import FittedClassifier, FittedClusters
from attr_batch.log import Upkeep
from attr_batch.models import NoiseSchedule
from attr_batch.properties import Property
from attr_batch.recipe import Part
from attr_batch.sampling import Sampling

if TYPE_CHECKING:
    from attr_batch.counterfactual import Base


@dataclass(frozen=True, eq=False)
class Material:
    """A trained model, the data it was trained on, and images it drew.

    generated: uint8 (images, channels, size, size), the first that `sampling` draws from the
    trained model with `seed`. Noise and projections derive from the same seed. `instrument` is what
    `prop` measures with, `classifier` the labels' classifier if the data have labels. The bits of
    the scores do not depend on what was asked before; they may on the number of CPU threads.
    """

    dataset: Dataset
    base: Base
    generated: np.ndarray
    sampling: Sampling
    prop: Property
    instrument: FittedClassifier | FittedClusters | None
    classifier: FittedClassifier | None
    seed: int
    device: str = "cpu"
    upkeep: Upkeep = field(default_factory=Upkeep)
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return `make()`, kept under `key` for the baselines that need the same."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Scored(Part):
    """A baseline: one score per contributor."""

    def check(self, schedule: NoiseSchedule, where: str) -> None:
        """Raise SpecError or DataError, about the spec's path `where`, if this cannot be done."""

    def scores(self, material: Material) -> np.ndarray:
        """Return float64 (contributors,); a greater score means more credit."""
        raise NotImplementedError


class ScoredByImage(Scored):
    """A baseline that scores training images; a contributor's score is their mean, max or sum.

    The paper's Table 1 shows mean and max for similarities.
    """

    reduce: Literal["mean", "max", "sum"] = Field(
        default="mean", description="How a contributor's images are put together."
    )

    def by_image(self, material: Material) -> np.ndarray:
        """Return float64 (training images,)."""
        raise NotImplementedError

    def scores(self, material: Material) -> np.ndarray:
        """Return float64 (contributors,); a greater score means more credit."""
        scores, contributor = self.by_image(material), material.dataset.contributor
        n = len(material.dataset.roster)
        if self.reduce == "max":
            largest = np.full(n, -np.inf)
            np.maximum.at(largest, contributor, scores)
            return largest
        total = np.bincount(contributor, scores, minlength=n)
        return total / np.bincount(contributor) if self.reduce == "mean" else total
