"""Projected gradients of single images: the features phi of TRAK and what derives from it.

An image's feature is the gradient, with respect to all weights of the trained model, of some f of
the image, averaged over times of the forward process and projected at random (Park et al. 2023; for
diffusion models Zheng et al. 2024). The average over times is one backward pass over the image's
noised copies: gradients of single images need no per-example machinery, and any module will do.

All images meet the same noise. Published code draws it anew for each batch; shared noise takes what
it adds out of the comparison of two images, as everywhere in this package, and makes an image's
feature a function of that image alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from attr_batch.baselines.material import Material
from attr_batch.errors import Interrupted, NumericsError
from attr_batch.models import NoiseSchedule
from attr_batch.recipe import derive_seed
from attr_batch.training import to_unit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COPIES = 128  # noised copies of an image that go through the network at once

# What is differentiated: the denoising loss, or the mean squared answer of the network.
Behaviour = Literal["loss", "output"]
Side = Literal["training", "generated"]


@dataclass(frozen=True)
class Query:
    """Noised copies of one image, their times, and what the network should answer."""

    x_t: Tensor  # (copies, channels, size, size)
    t: Tensor  # int64 (copies,)
    target: Tensor  # as x_t


@dataclass(frozen=True)
class Projection:
    """A random linear map that keeps inner products in expectation: CountSketch.

    Every weight gets a random sign and one of `dimension` places (Charikar et al. 2002; as feature
    hashing Weinberger et al. 2009). The variance of a projected inner product, at most
    (|x|^2 |y|^2 + <x, y>^2) / dimension, is that of a dense Gaussian matrix, but a projection costs
    one pass over the gradient and there is no matrix. Places are dealt out evenly, which makes it a
    gather and a sum, deterministic on every device; from `dimension` = number of weights on it is a
    signed permutation and loses nothing.
    """

    order: Tensor  # int64 (weights,)
    sign: Tensor  # float32 (weights,)
    dimension: int

    @classmethod
    def draw(cls, weights: int, dimension: int, seed: int, device: str = "cpu") -> Projection:
        """Return a projection from `weights` to at most `dimension` numbers."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(weights, generator=generator)
        sign = torch.randint(0, 2, (weights,), generator=generator).float() * 2 - 1
        return cls(order.to(device), sign.to(device), min(dimension, weights))

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return (dimension,) of (weights,)."""
        import torch

        signed = gradient[self.order] * self.sign
        padding = -len(signed) % self.dimension
        return torch.nn.functional.pad(signed, (0, padding)).view(-1, self.dimension).sum(dim=0)


def image_features(
    material: Material, side: Side, behaviour: Behaviour, timesteps: int, dimension: int
) -> np.ndarray:
    """Return phi of the training or the generated images, float64 (images, dimension)."""

    def make() -> np.ndarray:
        images = material.dataset.images if side == "training" else material.generated
        queries = noised(material, images, behaviour, timesteps)
        return _features(material, queries, len(images), dimension)

    return material.once((side, behaviour, timesteps, dimension), make)


def journey_features(material: Material, dimension: int) -> np.ndarray:
    """Return phi of the generated images on their sampling paths, float64 (images, dimension)."""
    return material.once(
        ("journey", dimension),
        lambda: _features(material, journey(material), len(material.generated), dimension),
    )


def _features(
    material: Material, queries: Iterable[Query], count: int, dimension: int
) -> np.ndarray:
    """Return the projected gradients of `count` queries, float64 (count, dimension)."""
    model = material.base.reference("trained").to(material.device).eval()
    weights = sum(p.numel() for p in model.parameters())
    seed = derive_seed("projection", material.seed)
    project = Projection.draw(weights, dimension, seed, material.device)
    found = np.empty((count, project.dimension))
    for i, query in enumerate(queries):
        found[i] = project(gradient(model, query)).cpu().numpy()
        if material.upkeep.tick(i + 1, count) and material.upkeep.stopping():
            raise Interrupted("stopped among gradients", None, "run again: they start anew")
    if not np.isfinite(found).all():
        raise NumericsError("a gradient is not finite", None, "the model may have diverged")
    return found


def gradient(model: torch.nn.Module, query: Query, copies: int = COPIES) -> Tensor:
    """Return the gradient (weights,) of the mean over copies and pixels of (answer - target)^2."""
    import torch

    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), device=query.x_t.device)
    parts = (tensor.split(copies) for tensor in (query.x_t, query.t, query.target))
    for x_t, t, target in zip(*parts, strict=True):
        error = (model(x_t, t, return_dict=False)[0] - target).square().sum()
        found = torch.autograd.grad(error, parameters, materialize_grads=True)
        total += torch.cat([g.flatten() for g in found])
    return total / query.x_t.numel()


def noised(
    material: Material, images: np.ndarray, behaviour: Behaviour, timesteps: int
) -> Iterator[Query]:
    """Yield for each image its copies at evenly spread times.

    The mean squared answer is the loss with 0 for its target.
    """
    import torch

    schedule = material.base.schedule
    t = torch.from_numpy(spread(schedule, timesteps)).to(material.device)
    noise = _noise(material, timesteps)
    for image in images:
        x0 = to_unit(torch.tensor(image, device=material.device)).expand_as(noise)
        target = schedule.target(x0, noise, t) if behaviour == "loss" else torch.zeros_like(noise)
        yield Query(schedule.add_noise(x0, noise, t), t, target)


def spread(schedule: NoiseSchedule, count: int) -> np.ndarray:
    """Return the middles of `count` equal stretches of the schedule's times, int64."""
    return (2 * np.arange(count) + 1) * schedule.timesteps // (2 * count)


def journey(material: Material) -> Iterator[Query]:
    """Yield for each generated image what the model took it for at the steps of its sampling.

    At a step from x_t the model guesses the final image x_0; what Georgiev et al. (2023) attribute
    is the denoising loss of that guess, noised anew to the same t. The code behind the paper's
    Table 1 puts in x_t itself, against noise that it was not made of.
    """
    import torch

    schedule, sampling = material.base.schedule, material.sampling
    noise = _noise(material, sampling.steps)
    bound = math.inf if sampling.clip is None else sampling.clip
    for t, path, answers in _paths(material):
        k = torch.tensor([schedule.to_x0(time) for time in t.tolist()], device=t.device)
        k_x, k_out = k.T.view(2, -1, 1, 1, 1)
        for x_t, answer in zip(path, answers, strict=True):
            x0 = (k_x * x_t + k_out * answer).clamp(-bound, bound)
            yield Query(schedule.add_noise(x0, noise, t), t, schedule.target(x0, noise, t))


def _noise(material: Material, copies: int) -> Tensor:
    """Return the noise of an image's copies, the same for all images: (copies, c, h, w)."""
    import torch

    from attr_batch import ops

    shape = material.dataset.shape
    ids = torch.arange(copies, device=material.device)
    seed = derive_seed("gradient noise", material.seed)
    return ops.counter_normal(ids, math.prod(shape), seed, 0).view(-1, *shape)


def _paths(material: Material) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draw the generated images once more; yield for each batch of them how they came about.

    Times int64 (steps,), x_t and the network's answers (batch, steps, channels, size, size).
    """
    import torch

    model = material.base.reference("trained")
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    model.register_forward_hook(lambda _, asked, out: calls.append((*asked, out[0])))
    changes = {"images": len(material.generated), "precision": "fp32"}
    material.sampling.model_copy(update=changes).draw(
        model,
        material.base.schedule,
        material.dataset.shape,
        material.seed,
        upkeep=material.upkeep,
        device=material.device,
    )
    steps = material.sampling.steps
    for start in range(0, len(calls), steps):  # a batch takes all its steps, then comes the next
        x, t, answer = zip(*calls[start : start + steps], strict=True)
        yield torch.stack(t)[:, 0], torch.stack(x, dim=1), torch.stack(answer, dim=1)
