"""Baselines of gradients: TRAK and its kin.

With phi_i the projected gradient of training image i, phi that of a generated image and
K = (sum_i phi_i phi_i^T + damping I)^-1, TRAK's score of i is phi^T K phi_i (Park et al. 2023,
without the factor of the residual, which for f = loss is in the gradient). To first order it says
by how much more of i lowers the loss of the generated image: a greater score means more credit.

A global property has no single image to attribute. The paper averages an image's scores over the
generated images and sums over a contributor's images; what the property is does not enter. Here the
gradients are those of one trained model, as in the paper's retraining-free baselines.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from attr_batch.baselines.gradients import (
    Behaviour,
    Side,
    image_features,
    journey_features,
)
from attr_batch.baselines.material import Material, ScoredByImage
from attr_batch.baselines.similarity import divided, unit
from attr_batch.errors import SpecError
from attr_batch.models import NoiseSchedule


class _OfGradients(ScoredByImage):
    """Scores from projected gradients. Baselines with the same options share them."""

    behaviour: ClassVar[Behaviour] = "loss"

    timesteps: PositiveInt = Field(
        default=100, description="Times an image is noised to; the cost grows with them."
    )
    dimension: PositiveInt = Field(default=2048, description="Of the projected gradients.")

    def check(self, schedule: NoiseSchedule, where: str) -> None:
        """Raise SpecError if the schedule has fewer times."""
        super().check(schedule, where)
        if self.timesteps > schedule.timesteps:
            what = f"{self.timesteps} of {schedule.timesteps} times"
            raise SpecError(what, f"{where}.timesteps", f"set {schedule.timesteps} or fewer")

    def training(self, material: Material) -> np.ndarray:
        """Return phi of the training images, float64 (images, dimension)."""
        return self._features(material, "training")

    def generated(self, material: Material) -> np.ndarray:
        """Return phi of the generated images, float64 (images, dimension)."""
        return self._features(material, "generated")

    def _features(self, material: Material, side: Side) -> np.ndarray:
        return image_features(material, side, self.behaviour, self.timesteps, self.dimension)


class GradientSimilarity(_OfGradients):
    """Mean cosine similarity to the generated images' gradients of the loss."""

    kind: Literal["gradient_similarity"] = "gradient_similarity"

    def by_image(self, material: Material) -> np.ndarray:
        """Return float64 (training images,)."""
        return unit(self.training(material)) @ unit(self.generated(material)).mean(axis=0)


class _Influence(_OfGradients):
    """phi^T K phi_i, averaged over the generated images."""

    reduce: Literal["mean", "max", "sum"] = Field(
        default="sum", description="How a contributor's images are put together."
    )
    damping: PositiveFloat = Field(default=0.5, description="Added to the diagonal of K^-1.")

    def by_image(self, material: Material) -> np.ndarray:
        """Return float64 (training images,)."""
        return self.moves(self.training(material)) @ self.generated(material).mean(axis=0)

    def moves(self, phi: np.ndarray) -> np.ndarray:
        """Return K phi_i, how an image moves the weights, in rows: float64 (images, dimension)."""
        return preconditioned(phi, self.damping)


class Trak(_Influence):
    """TRAK with f = loss (Park et al. 2023)."""

    kind: Literal["trak"] = "trak"


class RelativeInfluence(_Influence):
    """TRAK / ||K phi_i||: what an image does relative to how far it moves the weights.

    Barshan et al. 2020, with TRAK's approximation of the influence, as in the paper.
    """

    kind: Literal["relative_influence"] = "relative_influence"

    def moves(self, phi: np.ndarray) -> np.ndarray:
        """Return K phi_i / ||K phi_i||."""
        return unit(super().moves(phi))


class RenormalisedInfluence(_Influence):
    """TRAK / ||phi_i||: images of large gradients do not come first for that alone.

    Hammoudeh and Lowd 2022, with TRAK's approximation of the influence, as in the paper.
    """

    kind: Literal["renormalised_influence"] = "renormalised_influence"

    def moves(self, phi: np.ndarray) -> np.ndarray:
        """Return K phi_i / ||phi_i||."""
        return divided(super().moves(phi), np.linalg.norm(phi, axis=1))


class DTrak(_Influence):
    """D-TRAK: f = mean squared L2 norm of the network's output, on both sides (Zheng et al. 2024).

    The output is what the network predicts, noise or v. Unlike TRAK's the scores say nothing about
    a loss; why they rank well is an open question, as their authors say.
    """

    behaviour = "output"
    kind: Literal["d_trak"] = "d_trak"


class JourneyTrak(_Influence):
    """Journey-TRAK: the generated image's gradients are taken along its sampling path.

    Georgiev et al. 2023 score each step; as in the paper the steps' gradients are averaged. They
    are the steps of the job's own sampler. The training images' side is TRAK's.
    """

    kind: Literal["journey_trak"] = "journey_trak"

    def generated(self, material: Material) -> np.ndarray:
        """Return phi of the generated images, float64 (images, dimension)."""
        return journey_features(material, self.dimension)


def preconditioned(phi: np.ndarray, damping: float) -> np.ndarray:
    """Return K phi_i in rows, K = (phi^T phi + damping I)^-1: float64 (images, dimension).

    By (phi^T phi + d I)^-1 phi^T = phi^T (phi phi^T + d I)^-1 the smaller system is solved.
    """
    images, dimension = phi.shape
    if images < dimension:
        return np.linalg.solve(phi @ phi.T + damping * np.eye(images), phi)
    return np.linalg.solve(phi.T @ phi + damping * np.eye(dimension), phi.T).T
