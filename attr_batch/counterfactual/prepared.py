"""What all coalitions start from: the trained model and the pruned one, each in its folder."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from attr_batch import log
from attr_batch.errors import DataError
from attr_batch.models import (
    Model,
    Training,
    load_weights,
    read_safetensors,
    reinitialise,
    save_weights,
    write_safetensors,
)
from attr_batch.pruning import Pruning, PruningPlan, count_macs, count_parameters
from attr_batch.recipe import derive_seed
from attr_batch.training import Ema, train

if TYPE_CHECKING:
    import torch

    from attr_batch.models import NoiseSchedule

Start = Literal["pruned", "dense", "fresh"]
Subject = Literal["trained", "pruned", "untrained"]


@dataclass(frozen=True)
class Base:
    """The trained model and the pruned one, for coalitions to start from."""

    model: Model
    dense: Path
    pruned: Path
    plan: PruningPlan
    channels: int
    size: int
    device: str
    _read: dict[Start, torch.nn.Module] = field(  # on the CPU, for `module` to copy
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of every model of the job."""
        return self.model.schedule

    def module(self, start: Start) -> torch.nn.Module:
        """Return a module of its own with the trained weights of `dense` or `pruned`."""
        if start not in self._read:
            module = self._built(start, seed=0)
            if start != "fresh":
                load_weights(module, self._weights(start))
            self._read[start] = module
        return copy.deepcopy(self._read[start]).to(self.device)

    def fresh(self, start: Start, seed: int) -> torch.nn.Module:
        """Return the same architecture as `start`, freshly initialised: a function of `seed`."""
        return self._built(start, seed).to(self.device)

    def _built(self, start: Start, seed: int) -> torch.nn.Module:
        seed = derive_seed("initial weights", seed)
        module: Any = self.model.build(self.channels, self.size, seed)
        if start == "pruned" and self.plan.kept:
            reinitialise(self.plan.apply(module), seed)
        return module

    def long_ema(self, start: Start, module: torch.nn.Module) -> Ema:
        """Return the long-running average of the base's training, to be continued on `module`."""
        path = self._weights(start)
        means, metadata = read_safetensors(path.with_name(f"{path.stem}-ema.safetensors"))
        ema = Ema(module, "long", metadata["updates"])
        for name, mean in ema.weights.items():
            mean.copy_(means[name])
        return ema

    def reference(self, subject: Subject, seed: int | None = None) -> torch.nn.Module:
        """Return the trained or the pruned model, or the untrained one of `seed`.

        The first two are the last weights, not their average, from which the published system
        samples: the very weights that coalitions start from, so that the difference between the two
        is what pruning does.
        """
        if subject == "untrained":
            return self.fresh("dense", seed or 0)
        return self.module("pruned" if subject == "pruned" else "dense").eval()

    def _weights(self, start: Start) -> Path:
        return (self.pruned if start == "pruned" else self.dense) / f"{start}.safetensors"


# -- making it ----------------------------------------------------------------------------------


def prepare_dense(
    model: Model,
    images: np.ndarray,
    folder: Path,
    *,
    seed: int,
    upkeep: log.Upkeep | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train (or load) the model on all images and write it into `folder`; return its card.

    `folder` belongs to these inputs alone: what an interrupted call left there is taken up again.
    It holds dense.safetensors, dense-ema.safetensors and, once all is done, card.json.
    """
    channels, size = _shape(images)
    module = model.initial(channels, size, derive_seed("initial weights", seed))
    facts = {
        "macs": count_macs(module, channels, size),
        "parameters": count_parameters(module),
        "shape": [channels, size, size],
    }
    return _train_and_write(
        "dense", module, images, model, model.training, folder, facts, seed, upkeep, device
    )


def prepare_pruned(
    model: Model,
    pruning: Pruning,
    images: np.ndarray,
    dense: Path,
    folder: Path,
    *,
    seed: int,
    upkeep: log.Upkeep | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Prune the model in folder `dense`, train what is left on all images; return its card.

    As `prepare_dense`; also writes pruning.json, the plan.
    """
    channels, size = _shape(images)
    module = model.build(channels, size, 0)
    load_weights(module, dense / "dense.safetensors")
    plan = pruning.plan(module, channels, size)
    plan.apply(module)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "pruning.json", plan.to_json())
    facts = {"macs": list(plan.macs), "parameters": list(plan.parameters)}
    return _train_and_write(
        "pruned", module, images, model, pruning.recovery, folder, facts, seed, upkeep, device
    )


def load_base(
    model: Model, dense: Path, pruned: Path, channels: int, size: int, device: str = "cpu"
) -> Base:
    """Return the base whose two halves lie in these folders."""
    try:
        plan = json.loads((pruned / "pruning.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", str(pruned / "pruning.json")) from None
    return Base(model, dense, pruned, PruningPlan.from_json(plan), channels, size, device)


def _shape(images: np.ndarray) -> tuple[int, int]:
    _, channels, size, _ = images.shape
    return channels, size


def _train_and_write(
    name: Literal["dense", "pruned"],
    module: torch.nn.Module,
    images: np.ndarray,
    model: Model,
    training: Training | None,
    folder: Path,
    facts: dict[str, Any],
    seed: int,
    upkeep: log.Upkeep | None,
    device: str,
) -> dict[str, Any]:
    """Train `module` if it is said how, write its weights and, last of all, its card."""
    card_file, checkpoint = folder / "card.json", folder / "checkpoint.safetensors"
    card = {**facts, "steps": 0, "loss": None}
    ema = Ema(module.to(device), "long")
    if training is not None and not card_file.exists():
        result = train(
            module,
            images,
            model.schedule,
            training,
            seed=derive_seed(name, seed),
            ema=ema,
            checkpoint=checkpoint,
            upkeep=upkeep,
            device=device,
        )
        card |= {"steps": result.steps, "loss": result.loss}
    if not card_file.exists():
        save_weights(module, folder / f"{name}.safetensors")
        means = folder / f"{name}-ema.safetensors"
        write_safetensors(means, ema.weights, {"updates": ema.i})
        _write_json(card_file, card)
    checkpoint.unlink(missing_ok=True)
    return json.loads(card_file.read_text(encoding="utf-8"))


def _write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("x", encoding="utf-8") as file:  # never through a link under this name
        file.write(json.dumps(data, sort_keys=True))
    temporary.replace(path)
