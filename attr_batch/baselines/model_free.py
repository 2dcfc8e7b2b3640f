"""Baselines that look at the contributors' data alone."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from attr_batch.baselines.material import Material, Scored


class EqualSplit(Scored):
    """The same for everyone: what a method has to beat where coalitions differ in size."""

    kind: Literal["equal_split"] = "equal_split"

    def scores(self, material: Material) -> np.ndarray:
        """Return 1/n, float64 (contributors,)."""
        n = len(material.dataset.roster)
        return np.full(n, 1 / n)


class ImageCount(Scored):
    """The number of images each contributed."""

    kind: Literal["image_count"] = "image_count"

    def scores(self, material: Material) -> np.ndarray:
        """Return the counts, float64 (contributors,)."""
        return np.bincount(material.dataset.contributor).astype(float)


class TrainingProperty(Scored):
    """The job's property, measured on each contributor's own images.

    The paper does so with the aesthetic score of ArtBench's paintings (mean or max over an artist's
    images). A property here is a functional of a set of images, so there is nothing to reduce.
    """

    kind: Literal["training_property"] = "training_property"

    def scores(self, material: Material) -> np.ndarray:
        """Return float64 (contributors,). Errors are those of the property's `measure`."""
        prop: Any = material.prop  # each kind takes its own kind of instrument
        dataset = material.dataset
        values = []
        for i in range(len(dataset.roster)):
            images = dataset.images[dataset.contributor == i]
            if len(images) == 1:  # twice: the same distribution, but one with a standard error
                images = np.repeat(images, 2, axis=0)
            values.append(prop.measure(images, material.instrument).value)
        return np.array(values)
