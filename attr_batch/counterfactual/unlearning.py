"""Counterfactuals that take the others' images out of the trained model.

Both need the trained model alone, and what is removed (`removed`: None or none, nobody is). With
everyone in the coalition there is nothing to remove and the base is returned as it is; with nobody
they remove all images by their own rule, which does not give the untrained network. The paper found
both to predict retraining badly, dense or sparsified.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Unpack

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from attr_batch import log
from attr_batch.counterfactual.influence import Influence, NoisyImages
from attr_batch.counterfactual.learning import Brief
from attr_batch.counterfactual.prepared import Base, Start
from attr_batch.errors import Interrupted
from attr_batch.models import Model
from attr_batch.recipe import Part
from attr_batch.training import Checkpoint, Run, train

if TYPE_CHECKING:
    import torch


class GradientAscent(Brief):
    """Climb the denoising loss of the removed images for k steps (GA of Jia et al., 2023).

    The loss has no upper bound. AdamW moves a weight by about the learning rate a step, whatever
    the loss, so that `steps` and `learning_rate` bound how far the model goes. Where that is far,
    it loses all images, not the removed ones alone.
    """

    unlearns: ClassVar[bool] = True
    ascends: ClassVar[bool] = True

    kind: Literal["gradient_ascent"] = "gradient_ascent"
    base: Literal["dense", "pruned"] = Field(default="dense", description="What unlearns.")
    steps: PositiveInt = Field(default=20, le=10_000)
    learning_rate: PositiveFloat = Field(default=1e-5, le=1e-2)
    weight_decay: float = Field(default=0.0, ge=0)

    @property
    def start(self) -> Start:
        """The model that unlearns."""
        return self.base

    def derive(
        self,
        base: Base,
        images: np.ndarray,  # noqa: ARG002
        removed: np.ndarray | None = None,
        **run: Unpack[Run],
    ) -> torch.nn.Module:
        """Return the base after ascent on the uint8 images `removed`, ready to sample from.

        Errors are those of `training.train`.
        """
        module = base.module(self.start)
        if removed is not None and len(removed):
            train(module, removed, base.schedule, self, **run)
        return module


class InfluenceUnlearning(Part):
    """Take the influence of the removed images off the weights by one Newton-type step.

    To first order, training without the images R of all n moves the weights by

        H^-1 (1/n) sum over R of grad loss,    H = the mean loss's Hessian

    (Koh and Liang, 2017; the paper's influence unlearning is Jia et al.'s, 2023). H is replaced by
    its Gauss-Newton diagonal, read off the empirical Fisher information (`Influence`), plus
    `damping` times the diagonal's mean. It is estimated on all images, and image and seed alone
    decide the noise an image gets, so that it is the same for all coalitions.

    A diagonal misses that weights share their effect, and its whole step is far too long where many
    do: `scale` is the part that is taken.
    """

    unlearns: ClassVar[bool] = True

    kind: Literal["influence_unlearning"] = "influence_unlearning"
    base: Literal["dense", "pruned"] = Field(default="dense", description="What unlearns.")
    draws: PositiveInt = Field(default=1, le=1000, description="Noises and times for each image.")
    batch: PositiveInt = Field(default=64, le=65_536)
    damping: PositiveFloat = Field(
        default=0.1, description="Added to the diagonal, as a multiple of its mean."
    )
    scale: PositiveFloat = Field(default=0.01, le=1, description="Share of the step to take.")

    @property
    def start(self) -> Start:
        """The model that unlearns."""
        return self.base

    def check(self, model: Model, where: str = "counterfactual") -> None:
        """Raise SpecError, about the spec's path `where`, if this cannot be done: never."""

    def derive(
        self,
        base: Base,
        images: np.ndarray,
        removed: np.ndarray | None = None,
        *,
        seed: int,
        checkpoint: Path | None = None,
        upkeep: log.Upkeep | None = None,
        device: str = "cpu",
    ) -> torch.nn.Module:
        """Return the base after a step away from the uint8 images `removed`, ready to sample from.

        Raises:
            Interrupted: `upkeep` said to stop; the checkpoint is written.
            NumericsError: the base's loss is not finite.
            DataError: the checkpoint belongs to another work.
        """
        import torch

        module = base.module(self.start).to(device)
        if removed is None or not len(removed):
            return module
        upkeep = upkeep or log.Upkeep()
        noisy = NoisyImages(images, removed, seed)
        influence = Influence(list(module.parameters()))
        gone = torch.from_numpy(noisy.removed).to(device)

        # Resume.
        start, saved = 0, None
        if checkpoint is not None:
            how = {"how": self.recipe(), "schedule": base.schedule.recipe(), "seed": seed}
            how["removed"] = noisy.removed.tolist()
            saved = Checkpoint(checkpoint, module, [noisy.images], how)
            state = saved.read()
            if state is not None:
                start = state[1]["step"]
                for name, tensor in influence.sums().items():
                    tensor.copy_(state[0][name])

        parts = [slice(i, i + self.batch) for i in range(0, len(noisy.images), self.batch)]
        work = list(itertools.product(range(self.draws), parts))
        for done, (draw, part) in enumerate(work[start:], start + 1):
            losses, signs = noisy.losses(module, base.schedule, part, draw, self.draws)
            influence.add(losses, gone[part], signs)
            if upkeep.tick(done, len(work)):
                stopping = upkeep.stopping()
                if saved is not None and (stopping or done < len(work)):
                    saved.write(influence.sums(), {"step": done})
                if stopping:
                    hint = "run the same command again: it goes on from the checkpoint"
                    raise Interrupted(f"stopped at step {done} of {len(work)}", None, hint)

        moves = influence.step(self.draws * len(noisy.images), removed[0].size, self.damping)
        with torch.no_grad():
            for weights, move in zip(module.parameters(), moves, strict=True):
                weights += self.scale * move
        return module
