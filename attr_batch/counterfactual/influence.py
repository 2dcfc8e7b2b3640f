"""How far the weights would move without some of the images: the step of influence unlearning."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from attr_batch.errors import NumericsError
from attr_batch.models import NoiseSchedule
from attr_batch.recipe import derive_seed
from attr_batch.training import to_unit

if TYPE_CHECKING:
    import torch


class Influence:
    """Sums over noisy images from which the step follows, each shaped like the weights.

    `gradient` is that of the removed images' losses. `squares` is the sum over all images of the
    squared gradient of an image's loss, the empirical Fisher information's diagonal. It is
    estimated without bias by one backward pass a batch: where signs are drawn at random, the mixed
    terms of (sum of sign_i grad_i)^2 vanish on average.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        import torch

        self.weights = weights
        self.gradient = [torch.zeros_like(w) for w in weights]
        self.squares = [torch.zeros_like(w) for w in weights]
        self.loss = torch.zeros((), device=weights[0].device)

    def add(self, losses: torch.Tensor, removed: torch.Tensor, signs: torch.Tensor) -> None:
        """Take in a batch: losses, whether an image is removed, and random signs, each (B,)."""
        import torch

        some = bool(removed.any())
        signed = torch.autograd.grad(losses @ signs, self.weights, retain_graph=some)
        torch._foreach_addcmul_(self.squares, signed, signed)  # pyright: ignore
        if some:
            gradient = torch.autograd.grad(losses[removed].sum(), self.weights)
            torch._foreach_add_(self.gradient, gradient)  # pyright: ignore
        self.loss += losses.detach().sum()

    def step(self, images: int, values: int, damping: float) -> list[torch.Tensor]:
        """Return by how much removal moves each of the weights.

        `images` were added, of `values` values each. The denoising loss is a mean of squared
        residuals. If these are independent normals of variance L, the mean loss, its Gauss-Newton
        matrix is d/(2 L) times the empirical Fisher information, d = `values`. `damping` is
        relative to the mean of the diagonal. NumericsError if the loss is not finite.
        """
        loss = float(self.loss)
        if not math.isfinite(loss):
            raise NumericsError(f"the loss of the model that is to unlearn is {loss}")
        mean = sum(float(s.sum()) for s in self.squares) / sum(s.numel() for s in self.squares)
        curvature = values / (2 * loss / images)
        return [
            gradient / (curvature * (squares + damping * mean))
            for gradient, squares in zip(self.gradient, self.squares, strict=True)
        ]

    def sums(self) -> dict[str, torch.Tensor]:
        """Return all sums by name."""
        named = {f"gradient.{i}": tensor for i, tensor in enumerate(self.gradient)}
        named |= {f"squares.{i}": tensor for i, tensor in enumerate(self.squares)}
        return {**named, "loss": self.loss}


class NoisyImages:
    """Images with noise that depends on the image and the seed alone, not on who else is there.

    They stand in an order of their own, so that all coalitions see the same batches.
    """

    def __init__(self, kept: np.ndarray, removed: np.ndarray, seed: int) -> None:
        images = np.concatenate([kept, removed])
        names = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        order = sorted(range(len(images)), key=lambda i: (names[i], i))
        self.images, self.removed = images[order], np.array(order) >= len(kept)
        self._ids = np.array([int(names[i][:15], 16) for i in order])
        self._places = np.array([derive_seed("time", seed, names[i]) for i in order]) / 2.0**63
        self._seed = seed

    def losses(
        self, module: torch.nn.Module, schedule: NoiseSchedule, part: slice, draw: int, draws: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the denoising losses of some images under their `draw`-th noise, and signs."""
        import torch

        from attr_batch import ops

        device = next(module.parameters()).device
        ids = torch.from_numpy(self._ids[part]).to(device)
        x0 = to_unit(torch.from_numpy(self.images[part]).to(device))
        noise = ops.counter_normal(ids, x0[0].numel(), derive_seed("noise", self._seed), draw)
        signs = ops.counter_normal(ids, 1, derive_seed("sign", self._seed), draw).sign()
        places = (self._places[part] + draw / draws) % 1.0  # an image's draws cover all times
        t = torch.from_numpy((places * schedule.timesteps).astype(np.int64)).to(device)
        noise = noise.view_as(x0)
        answer = module(schedule.add_noise(x0, noise, t), t, return_dict=False)[0]
        losses = (answer - schedule.target(x0, noise, t)).square().flatten(1).mean(1)
        return losses, signs.flatten()
