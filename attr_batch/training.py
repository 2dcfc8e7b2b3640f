"""The training loop: one loop for the base, the recovery and every coalition's fine-tuning.

The loss is the plain denoising loss of the paper's Eq. 1 (for another prediction, its equivalent).
What is random in step i is a function of (seed, i) alone: the order of the images, the noise, the
times, the dropout. So a resumed run ends with the same bits as an undisturbed one, and all
coalitions of a replicate see the same noise, which takes most of its variance out of their
differences.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict

import numpy as np

from attr_batch import log
from attr_batch.errors import DataError, Interrupted, NumericsError
from attr_batch.fused import cohort_size, fuse, to_bfloat16
from attr_batch.graphs import Replayed
from attr_batch.models import NoiseSchedule, Training, read_safetensors, write_safetensors
from attr_batch.recipe import derive_seed, digest

if TYPE_CHECKING:
    import torch

__all__ = [
    "Checkpoint",
    "Ema",
    "Run",
    "TrainResult",
    "Training",
    "batch_indices",
    "to_unit",
    "train",
]

LOSS_MEMORY = 0.98  # of the running loss that is shown: about the last 50 steps


@dataclass(frozen=True)
class TrainResult:
    """What a training came to: the running loss at its end (corrected for its start)."""

    loss: float
    steps: int


class Unseeded(TypedDict, total=False):
    """How a training is run, which changes nothing of what comes of it.

    `device` is where the model is.
    """

    checkpoint: Path | None
    upkeep: log.Upkeep | None
    device: str


class Run(Unseeded):
    """How a training is run: of these the seed alone changes what comes of it."""

    seed: Required[int]


class Ema:
    """An exponential moving average of a module's weights: m <- d_i m + (1 - d_i) w.

    `short`, restarted for each coalition: d_i = min(.95, (1 + i)/(3 + i)), so that the weights
    it started from are forgotten within some 20 steps but training noise is averaged out.
    `long`, the published one: d_i = min(.9999, (1 + i)/(10 + i)); its memory grows with the
    training, and of what it was after T steps (T/(T + k))^9 is left after k more.

    Weights that are not trained have no average.
    """

    def __init__(self, module: torch.nn.Module, kind: Literal["short", "long"], i: int = 0) -> None:
        self.kind, self.i = kind, i
        self.weights = {name: p.detach().clone() for name, p in _trained(module).items()}

    def decay(self, i: int) -> float:
        """Return d_i, the share of the old average that the i-th update keeps."""
        if self.kind == "short":
            return min(0.95, (1 + i) / (3 + i))
        return min(0.9999, (1 + i) / (10 + i))

    def update(self, parameters: Sequence[torch.Tensor]) -> None:
        """Take one step of training into the average."""
        import torch

        mean = list(self.weights.values())
        new = [p.detach() for p in parameters]
        torch._foreach_lerp_(mean, new, 1 - self.decay(self.i))  # pyright: ignore
        self.i += 1

    def copy_to(self, module: torch.nn.Module) -> None:
        """Give `module` the averaged weights."""
        import torch

        with torch.no_grad():
            for name, parameter in _trained(module).items():
                parameter.copy_(self.weights[name])


def _trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the weights that a training changes: all but the frozen ones, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def batch_indices(seed: int, count: int, start: int, batch: int) -> np.ndarray:
    """Return which of `count` images come at positions start, ..., start + batch - 1.

    Every epoch is a permutation of its own; where a batch ends does not matter.
    """
    parts = []
    position = start
    while position < start + batch:
        epoch, offset = divmod(position, count)
        stop = min(count, offset + start + batch - position)
        parts.append(_permutation(seed, count, epoch)[offset:stop])
        position += stop - offset
    return np.concatenate(parts)


@functools.lru_cache(maxsize=128)  # of each model the epoch at hand and perhaps the next
def _permutation(seed: int, count: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(derive_seed("order", seed, epoch)).permutation(count)


def stratified_times(seed: int, step: int, batch: int, timesteps: int) -> np.ndarray:
    """Return a time for each image of a batch: one uniform draw, spread evenly over all times.

    Each is uniform over 0..timesteps-1 as in DDPM, but a batch always covers small and large times,
    which lowers the variance of the loss (Kingma et al., 2021, appendix I.1). The images' order is
    random, so times and images remain independent.
    """
    u = random.Random(derive_seed("time", seed, step)).random()  # noqa: S311
    return ((u + np.arange(batch) / batch) % 1.0 * timesteps).astype(np.int64)


@contextlib.contextmanager
def _dropout_stream(seed: int, step: int, device: str) -> Iterator[None]:
    """Draw from streams of this step within, and leave the global ones as they were."""
    import torch

    devices = [] if device == "cpu" else [torch.device(device)]
    with torch.random.fork_rng(devices):
        torch.manual_seed(derive_seed("dropout", seed, step))
        yield


def drops(model: torch.nn.Module) -> bool:
    """Say whether the model drops anything in training."""
    from torch.nn.modules.dropout import _DropoutNd

    return any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in model.modules())


def _clip_each(parameters: Sequence[torch.nn.Parameter], models: int, longest: float) -> None:
    """Scale each model's gradient down to `longest`, as clip_grad_norm_ does one model's."""
    import torch

    grads = [p.grad for p in parameters if p.grad is not None]
    if models == 1:
        torch.nn.utils.clip_grad_norm_(parameters, longest)
        return
    squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in grads]).sum(dim=0)
    factor = (longest / (squares.sqrt() + 1e-6)).clamp(max=1.0)  # (K,)
    for g in grads:
        g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))


def train(
    model: torch.nn.Module,
    images: np.ndarray | Sequence[np.ndarray],
    schedule: NoiseSchedule,
    training: Training,
    *,
    seed: int | Sequence[int],
    ema: Ema | None = None,
    checkpoint: Path | None = None,
    upkeep: log.Upkeep | None = None,
    device: str = "cpu",
) -> TrainResult:
    """Train `model` in place on uint8 `images` (count, channels, size, size).

    A cohort of K models (`fused.stack`) takes K arrays of images and K seeds, or one for all: each
    model learns from its own as if it were alone, and the result's loss is their mean.

    Only weights that require a gradient are trained. Resumes from `checkpoint` where it exists; the
    caller deletes it when the result is safe.

    Raises:
        Interrupted: `upkeep` said to stop; the checkpoint is written.
        NumericsError: the loss is not finite.
        DataError: the checkpoint belongs to another training.
    """
    import torch

    from attr_batch import ops

    upkeep = upkeep or log.Upkeep()
    model.to(device).train()
    parameters = list(_trained(model).values())
    on_gpu = device.startswith("cuda")
    first_rate = training.rate(0)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=torch.tensor(first_rate, device=device) if on_gpu else first_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        maximize=training.ascends,
        fused=True,
        capturable=on_gpu,
    )
    parts = [images] if isinstance(images, np.ndarray) else list(images)
    seeds = [seed] * len(parts) if isinstance(seed, int) else list(seed)
    if not len(seeds) == len(parts) == cohort_size(model) or not all(map(len, parts)):
        counts = ", ".join(str(len(part)) for part in parts)
        what = f"{cohort_size(model)} models, and arrays of {counts} images for them"
        raise ValueError(f"{what}, {len(seeds)} seeds")
    data = [torch.tensor(part, device=device) for part in parts]  # copies: may be read-only views
    slots = torch.arange(training.batch, device=device)
    elements = parts[0][0].size

    # Resume.
    start, running = 0, torch.zeros((), device=device)
    saved = None
    if checkpoint is not None:
        how = {
            "ema": None if ema is None else [ema.kind, ema.i],
            "schedule": schedule.recipe(),
            "training": training.recipe(),
            "seed": seed if isinstance(seed, int) else seeds,
        }
        saved = Checkpoint(checkpoint, model, parts, how)
        state = saved.read()
        if state is not None:
            start = _restore(state, model, optimizer, ema)
            running = state[0]["running"].to(device)

    # bf16: forward and backward on a copy, so that weights are cast once a step.
    worker = model
    if training.precision == "bf16":
        worker = to_bfloat16(model)
    network = fuse(worker)
    worker_parameters = list(_trained(worker).values())
    dropping = drops(worker)
    if dropping and len(parts) > 1:
        raise ValueError("dropout would differ with a model's place in the cohort")

    def step_once(x_t: torch.Tensor, t: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Take one step of the optimizer; return the mean loss. On a GPU it becomes a graph."""
        if worker is not model:
            with torch.no_grad():
                torch._foreach_copy_(worker_parameters, parameters)  # pyright: ignore
        answer = network(x_t, t, return_dict=False)[0].float()
        loss = torch.nn.functional.mse_loss(answer, target)
        (loss * len(parts) if len(parts) > 1 else loss).backward()
        if worker is not model:
            for parameter, other in zip(parameters, worker_parameters, strict=True):
                if other.grad is not None:  # in the master's layout, as the fused optimizer needs
                    parameter.grad = torch.empty_like(parameter).copy_(other.grad)
            worker.zero_grad(set_to_none=True)
        if training.clip is not None:
            _clip_each(parameters, len(parts), training.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    take_step = step_once if dropping else Replayed(step_once, device)
    figures: dict[str, float] = {}  # as of the last tick: reading the loss waits for the GPU
    for step in range(start, training.steps):
        # Draw images, noise and times, and below dropout: functions of (seed, step).
        chosen = [
            batch_indices(own, len(part), step * training.batch, training.batch)
            for part, own in zip(parts, seeds, strict=True)
        ]
        x0 = torch.cat(
            [
                to_unit(part[torch.from_numpy(rows).to(device)])
                for part, rows in zip(data, chosen, strict=True)
            ]
        )
        noises = {
            own: ops.counter_normal(slots, elements, derive_seed("noise", own), step)
            for own in seeds
        }
        noise = torch.cat([noises[own] for own in seeds]).view(x0.shape)
        times = [stratified_times(s, step, training.batch, schedule.timesteps) for s in seeds]
        t = torch.from_numpy(np.concatenate(times)).to(device)

        # Denoising loss, its gradient, and the step.
        for group in optimizer.param_groups:
            if on_gpu:
                group["lr"].fill_(training.rate(step))
            else:
                group["lr"] = training.rate(step)
        x_t = schedule.add_noise(x0, noise, t).to(worker_parameters[0].dtype)
        with _dropout_stream(seeds[0], step, device) if dropping else contextlib.nullcontext():
            loss = take_step(x_t, t, schedule.target(x0, noise, t))
        if ema is not None:
            ema.update(parameters)
        running = LOSS_MEMORY * running + (1 - LOSS_MEMORY) * loss

        # Tick: show the loss, notice divergence, keep a checkpoint, stop if asked to.
        done = step + 1
        if upkeep.tick(done, training.steps, **figures):
            figures = {"loss": _running_loss(running, done)}
            stopping = upkeep.stopping()
            if saved is not None and (stopping or done < training.steps):
                saved.write(*_state(done, running, model, optimizer, ema))
            if stopping:
                hint = "run the same command again: it goes on from the checkpoint"
                raise Interrupted(f"stopped at step {done} of {training.steps}", None, hint)

    model.eval()
    return TrainResult(_running_loss(running, training.steps), training.steps)


def _running_loss(running: torch.Tensor, steps: int) -> float:
    """Return the running loss, corrected for its start at 0. NumericsError if it is not finite."""
    loss = float(running) / (1 - LOSS_MEMORY**steps)
    if not math.isfinite(loss):
        hint = "a smaller learning_rate, a longer warmup or precision: fp32 may help"
        raise NumericsError(f"the training loss became {loss} by step {steps}", None, hint)
    return loss


# -- checkpoints ----------------------------------------------------------------------------------


class Checkpoint:
    """The file of a work on the way, which knows all that decides the work's outcome.

    That is the model's weights as they are when this is made, the images, and the JSON-able `how`.
    The weights are digested only when there is something to read or to write: most works end before
    that.
    """

    def __init__(
        self,
        path: Path,
        model: torch.nn.Module,
        images: Sequence[np.ndarray],
        how: dict[str, Any],
    ) -> None:
        self.path, self._images, self._how = path, images, how
        self._start = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in model.state_dict().items()
        }

    @functools.cached_property
    def identity(self) -> str:
        """The digest by which the work knows its checkpoint."""
        start = hashlib.sha256()
        for name, tensor in self._start.items():
            start.update(f"{name} {tuple(tensor.shape)}".encode())
            start.update(tensor.numpy().tobytes())
        images = [[list(part.shape), digest(part.tobytes())] for part in self._images]
        return digest({"images": images, "start": start.hexdigest(), **self._how})

    def write(self, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        """Write how far the work is, whole or not at all."""
        write_safetensors(self.path, tensors, {"identity": self.identity, **metadata})

    def read(self) -> tuple[dict[str, torch.Tensor], Any] | None:
        """Return the tensors and metadata; None where there are none that can be read."""
        if not self.path.exists():
            return None
        try:
            tensors, metadata = read_safetensors(self.path)
        except DataError as error:
            log.warn(f"checkpoint ignored, it starts over: {error}")
            return None
        if not isinstance(metadata, dict) or metadata.get("identity") != self.identity:
            hint = "delete the file, or work in another folder"
            raise DataError("is the checkpoint of another training", str(self.path), hint)
        return tensors, metadata


def _state(
    step: int,
    running: torch.Tensor,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a training's tensors and metadata after `step` steps."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in state.items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.weights.items()}
    updates = None if ema is None else ema.i
    return {**tensors, "running": running}, {"step": step, "ema": updates}


def _restore(
    state: tuple[dict[str, torch.Tensor], Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
) -> int:
    """Put a checkpoint back and return the number of steps it has done."""
    import torch

    tensors, metadata = state
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensors[f"model.{name}"])
        if ema is not None:
            ema.i = metadata["ema"]
            for name, mean in ema.weights.items():
                mean.copy_(tensors[f"ema.{name}"])
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        if part == "optimizer":
            i, _, name = rest.partition(".")
            slots.setdefault(int(i), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    return metadata["step"]
