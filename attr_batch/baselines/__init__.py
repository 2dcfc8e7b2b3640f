"""Baselines: cheaper ways to a score per contributor, all those of the paper's Table 1 and more.

None of them fine-tunes a model. `scores(material)` gives one number per contributor, a greater one
meaning more credit; only their order and ratios mean anything, so they are compared by rank
correlation. The utility of each contributor alone, v({i}), and leave-one-out are not here: they are
read off measured utilities.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from attr_batch.baselines.influence import (
    DTrak,
    GradientSimilarity,
    JourneyTrak,
    RelativeInfluence,
    RenormalisedInfluence,
    Trak,
)
from attr_batch.baselines.material import Material
from attr_batch.baselines.model_free import EqualSplit, ImageCount, TrainingProperty
from attr_batch.baselines.similarity import (
    ClipSimilarity,
    EmbeddingDistance,
    OwnSimilarity,
    PixelSimilarity,
)

__all__ = [
    "Baseline",
    "ClipSimilarity",
    "DTrak",
    "EmbeddingDistance",
    "EqualSplit",
    "GradientSimilarity",
    "ImageCount",
    "JourneyTrak",
    "Material",
    "OwnSimilarity",
    "PixelSimilarity",
    "RelativeInfluence",
    "RenormalisedInfluence",
    "TrainingProperty",
    "Trak",
]

Baseline = Annotated[
    EqualSplit
    | ImageCount
    | TrainingProperty
    | PixelSimilarity
    | OwnSimilarity
    | ClipSimilarity
    | EmbeddingDistance
    | GradientSimilarity
    | RelativeInfluence
    | RenormalisedInfluence
    | Trak
    | JourneyTrak
    | DTrak,
    Field(discriminator="kind"),
]
