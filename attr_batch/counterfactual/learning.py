"""Counterfactuals that train on the coalition's images; without images all give the null model.

The published system samples from a long-running average of the weights, much of which still
predates the coalition's data after k steps. Here an average that forgets within some 20 steps is
restarted for each coalition; `ema: continued` is the published one, kept to show its lag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import numpy as np
from pydantic import Field, PositiveInt

from attr_batch.counterfactual.prepared import Base, Start
from attr_batch.errors import SpecError
from attr_batch.fused import stack
from attr_batch.models import Model, NoiseSchedule, Training
from attr_batch.recipe import Part, derive_seed
from attr_batch.training import Ema, Run, Unseeded, train

if TYPE_CHECKING:
    import torch


class Brief(Training):
    """k = `steps` of training, from trained weights."""

    steps: PositiveInt = Field(default=100, description="The paper's k.")
    warmup: int = Field(default=0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "constant"

    def check(self, model: Model, where: str = "counterfactual") -> None:
        """Raise SpecError, about the spec's path `where`, if this cannot be done: never."""


class Finetuning(Brief):
    """k = `steps` of training on the coalition's images, from trained weights."""

    start: ClassVar[Start]
    unlearns: ClassVar[bool] = False

    ema: Literal["restarted", "raw", "continued"] = Field(
        default="restarted",
        description="Weights to sample from: an average restarted for the coalition, the last "
        "ones, or the published average that continues the base's.",
    )

    def derive(
        self,
        base: Base,
        images: np.ndarray,
        removed: np.ndarray | None = None,  # noqa: ARG002
        **run: Unpack[Run],
    ) -> torch.nn.Module:
        """Return the model of the coalition whose uint8 images these are, ready to sample from.

        Without images it is the untrained network. Errors are those of `training.train`.
        """
        if len(images) == 0:
            return base.fresh(self.start, run["seed"])
        module = base.module(self.start)
        return _learn(module, images, base.schedule, self, self._average(base, module), **run)

    def derive_cohort(
        self,
        base: Base,
        images: Sequence[np.ndarray],
        seeds: Sequence[int],
        **run: Unpack[Unseeded],
    ) -> torch.nn.Module:
        """Return the models of K coalitions as one (`fused.stack`); each has images and a seed."""
        cohort = stack([base.module(self.start)] * len(images))
        ema = self._average(base, cohort)
        return _learn(cohort, images, base.schedule, self, ema, seed=seeds, **run)

    def _average(self, base: Base, module: torch.nn.Module) -> Ema | None:
        if self.ema == "continued":
            return base.long_ema(self.start, module)
        return _short_ema(self.ema, module)


class SparsifiedFinetune(Finetuning):
    """Fine-tune the pruned model on the coalition's images: the paper's method."""

    start = "pruned"
    kind: Literal["sparsified_finetune"] = "sparsified_finetune"


class Finetune(Finetuning):
    """Fine-tune the dense model on the coalition's images."""

    start = "dense"
    kind: Literal["finetune"] = "finetune"


class Lora(Brief):
    """Train low-rank adapters on the coalition's images; all other weights stay the base's.

    Every convolution and linear layer's W becomes W + (`alpha` / `rank`) B A, with A drawn at
    random and B zero (Hu et al., 2022). For sampling the product is added to W, so that a sample
    costs what it costs without adapters.

    Without images it is the untrained network, as for every other kind here. The paper's null is
    the pre-trained model without an adapter: there its pre-training had seen none of the
    contributors' images. Here the base was trained on all of them, and without an adapter would be
    the model of everybody, not of nobody.
    """

    unlearns: ClassVar[bool] = False

    kind: Literal["lora"] = "lora"
    base: Literal["dense", "pruned"] = Field(default="dense", description="What gets adapters.")
    rank: PositiveInt = Field(default=8, le=65_536, description="Width of the adapters.")
    alpha: PositiveInt = Field(default=8, description="Adapters count alpha / rank times.")
    ema: Literal["restarted", "raw"] = Field(
        default="restarted",
        description="Adapters to sample from: an average restarted for the coalition, or the last.",
    )

    @property
    def start(self) -> Start:
        """The model that gets adapters."""
        return self.base

    def derive(
        self,
        base: Base,
        images: np.ndarray,
        removed: np.ndarray | None = None,  # noqa: ARG002
        **run: Unpack[Run],
    ) -> torch.nn.Module:
        """Return the model of the coalition whose uint8 images these are, ready to sample from.

        Without images it is the untrained network. Errors are those of `training.train`.
        """
        if len(images) == 0:
            return base.fresh(self.start, run["seed"])
        module = self._adapted(base.module(self.start), run["seed"])
        ema = _short_ema(self.ema, module)
        return _learn(module, images, base.schedule, self, ema, **run).merge_and_unload()

    def _adapted(self, module: torch.nn.Module, seed: int) -> Any:
        """Return `module` with adapters, which alone are trained: a function of `seed`."""
        import torch
        from peft import LoraConfig, LoraModel

        kinds = (torch.nn.Conv2d, torch.nn.Linear)
        layers = [name for name, layer in module.named_modules() if isinstance(layer, kinds)]
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=layers)
        with torch.random.fork_rng(devices=[]):  # they are born on the CPU
            torch.manual_seed(derive_seed("adapters", seed))
            return LoraModel(module, config, "coalition")


class Retrain(Part):
    """Train the dense architecture from nothing on the coalition's images: the definition itself.

    As the model itself was trained, unless `training` says otherwise.
    """

    start: ClassVar[Start] = "fresh"
    unlearns: ClassVar[bool] = False

    kind: Literal["retrain"] = "retrain"
    training: Training | None = None
    ema: Literal["restarted", "raw"] = Field(
        default="raw",
        description="Weights to sample from: the last ones, or an average of late ones.",
    )

    def check(self, model: Model, where: str = "counterfactual") -> None:
        """Raise SpecError, about the spec's path `where`, if it is not said how to train."""
        self._training(model, where)

    def derive(
        self,
        base: Base,
        images: np.ndarray,
        removed: np.ndarray | None = None,  # noqa: ARG002
        **run: Unpack[Run],
    ) -> torch.nn.Module:
        """Return the model of the coalition whose uint8 images these are, ready to sample from.

        Without images it is the untrained network. Errors are those of `training.train`.
        """
        module = base.fresh(self.start, run["seed"])
        if len(images) == 0:
            return module
        ema = _short_ema(self.ema, module)
        return _learn(module, images, base.schedule, self._training(base.model), ema, **run)

    def _training(self, model: Model, where: str = "counterfactual") -> Training:
        training = self.training or model.training
        if training is None:
            hint = "say how to train: {kind: retrain, training: {steps: ...}}"
            raise SpecError("retraining a model used as it is", f"{where}.training", hint)
        return training


def _short_ema(ema: str, module: torch.nn.Module) -> Ema | None:
    return Ema(module, "short") if ema == "restarted" else None


def _learn(
    module: Any,
    images: np.ndarray | Sequence[np.ndarray],
    schedule: NoiseSchedule,
    training: Training,
    ema: Ema | None,
    seed: int | Sequence[int],
    **run: Unpack[Unseeded],
) -> Any:
    """Train `module` in place and return it, with the weights of `ema` where there is one."""
    train(module, images, schedule, training, seed=seed, ema=ema, **run)
    if ema is not None:
        ema.copy_to(module)
    return module
