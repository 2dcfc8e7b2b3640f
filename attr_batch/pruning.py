"""Structural pruning by magnitude, once, before any coalition: the first half of the paper's sFT.

torch-pruning's dependency graph says which channels of which layers stand and fall together; which
of them stay is decided here and written down as a `PruningPlan`. A plan is data: with the dense
architecture it gives the pruned module, and with a safetensors file its weights, bit for bit. (A
pruned UNet cannot be had back from its config: diffusers knows one width per level.)

Widths are chosen here rather than by torch-pruning's own pruner, because that one rounds against
the group norms: asked for 0.3 of 128 channels in 32 groups it removes 0.5, asked for 0.75 of 24 in
8 groups it removes nothing. Ours rounds to the nearest width that every group norm and attention
head can hold, in multiples of 8 where the layer is wide enough for hardware to care, and a plan
whose multiplications did not fall about as asked is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from attr_batch.errors import DataError, SpecError
from attr_batch.models import Model, Training
from attr_batch.recipe import Part, digest

if TYPE_CHECKING:
    import torch

ALIGNED = 8  # tensor cores want channels in multiples of 8
WIDE = 64  # from this width on, alignment is worth more than the exact ratio
TOLERANCE = 1.3  # how far from (1 - ratio)^2 the multiplications may fall


@dataclass(frozen=True)
class PruningPlan:
    """Which channels each layer keeps, and what that saves.

    `kept[layer]` is (outputs, inputs): ascending indices into the dense layer, None for all.
    MACs are multiply-accumulates of one forward pass on one image; both pairs are (before, after).
    """

    architecture: str
    kept: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]]
    macs: tuple[int, int]
    parameters: tuple[int, int]

    def apply(self, module: torch.nn.Module) -> torch.nn.Module:
        """Take away, in place, what the plan does not keep; return `module`.

        DataError if `module` is not of the architecture the plan was made for.
        """
        if architecture_digest(module) != self.architecture:
            hint = "a plan fits one architecture: prune this model anew"
            raise DataError("the pruning plan is of another architecture", "pruning.json", hint)
        layers = dict(module.named_modules())
        for name, (outputs, inputs) in self.kept.items():
            _narrow(layers[name], outputs, inputs)
        if self.kept:
            _repair(module)
        return module

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PruningPlan:
        """Read what `to_json` gave. DataError if it is something else."""
        try:
            kept = {
                str(name): (_indices(outputs), _indices(inputs))
                for name, (outputs, inputs) in data["kept"].items()
            }
            macs, parameters = map(int, data["macs"]), map(int, data["parameters"])
            (m0, m1), (p0, p1) = macs, parameters
            return cls(str(data["architecture"]), kept, (m0, m1), (p0, p1))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"is not a pruning plan: {error!r}", "pruning.json") from None


def _indices(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(map(int, value))


class NoPruning(Part):
    """Leave the model as it is: what is fine-tuned is the dense model."""

    kind: Literal["none"] = "none"

    @property
    def recovery(self) -> None:
        """There is nothing to recover from."""
        return

    def check(self, model: Model, channels: int, size: int) -> None:
        """Raise SpecError if `model` cannot be pruned so: never."""

    def plan(self, module: torch.nn.Module, channels: int, size: int) -> PruningPlan:
        """Return the plan that keeps everything."""
        macs, parameters = count_macs(module, channels, size), count_parameters(module)
        pair = (macs, macs), (parameters, parameters)
        return PruningPlan(architecture_digest(module), {}, *pair)


class Magnitude(Part):
    """Remove the share `ratio` of channels with the smallest weights, then train on all data.

    A channel's magnitude is the mean L2 norm of what the coupled layers hold of it.
    """

    kind: Literal["magnitude"] = "magnitude"
    ratio: float = Field(default=0.5, gt=0, lt=1, description="Share of channels to remove.")
    recovery: Training = Training(steps=400, learning_rate=2e-3)

    def check(self, model: Model, channels: int, size: int) -> None:
        """Raise the SpecError that `plan` would: what is saved does not depend on the weights."""
        self.plan(model.build(channels, size, 0), channels, size)

    def plan(self, module: torch.nn.Module, channels: int, size: int) -> PruningPlan:
        """Decide what to keep of `module` for images of `channels` x `size` x `size`.

        SpecError if multiplications would not fall about as asked, to (1 - ratio)^2.
        """
        removed: dict[str, tuple[set[int], set[int]]] = {}
        for name, is_output, channel_indices in _removals(module, channels, size, self.ratio):
            removed.setdefault(name, (set(), set()))[0 if is_output else 1].update(channel_indices)
        layers = dict(module.named_modules())
        kept = {}
        for name, gone in sorted(removed.items()):
            widths = _widths(layers[name])
            kept[name] = tuple(
                tuple(i for i in range(width) if i not in indices) if indices else None
                for width, indices in zip(widths, gone, strict=True)
            )
        architecture = architecture_digest(module)
        before = count_macs(module, channels, size), count_parameters(module)
        draft = PruningPlan(architecture, kept, (before[0], 0), (before[1], 0))
        pruned = draft.apply(copy.deepcopy(module))
        after = count_macs(pruned, channels, size), count_parameters(pruned)
        self._check(before[0], after[0])
        return replace(draft, macs=(before[0], after[0]), parameters=(before[1], after[1]))

    def _check(self, before: int, after: int) -> None:
        wanted, got = (1 - self.ratio) ** 2, after / before
        if not wanted / TOLERANCE <= got <= wanted * TOLERANCE:
            raise SpecError(
                f"got {got:.3f} of the multiplications, wanted about {wanted:.3f}",
                "pruning.ratio",
                "group norms hold channels in equal groups: use 0.25, 0.5 or 0.75, or fewer "
                "groups (norm_num_groups) on these widths",
            )


def _removals(
    module: torch.nn.Module, channels: int, size: int, ratio: float
) -> Iterator[tuple[str, bool, list[int]]]:
    """Yield (layer, is it an output, channel indices) for everything that is to go."""
    import torch
    import torch_pruning as tp

    module = copy.deepcopy(module).eval()  # tracing must leave no hook behind on the caller's
    x = torch.zeros(1, channels, size, size, device=next(module.parameters()).device)
    t = torch.zeros(1, dtype=torch.long, device=x.device)
    graph = tp.DependencyGraph().build_dependency(module, example_inputs=(x, t))
    magnitude = tp.importance.GroupMagnitudeImportance(p=2)
    names = {layer: name for name, layer in module.named_modules()}
    blocks = _blocks(module)
    conv_out = module.get_submodule("conv_out")  # its outputs are the image's channels
    for group in graph.get_all_groups(ignored_layers=[conv_out]):
        layers = [dep.target.module for dep, _ in group]
        parts = math.lcm(*(blocks.get(layer, 1) for layer in layers))
        importance: Any = magnitude(group)
        importance = importance.view(parts, -1)
        keep = _width(importance.numel(), parts, ratio) // parts
        order = importance.argsort(dim=1, stable=True)[:, : importance.shape[1] - keep]
        offsets = torch.arange(parts, device=order.device)[:, None] * importance.shape[1]
        gone = (order + offsets).flatten().sort().values.tolist()
        root = group[0].dep
        for dep, indices in graph.get_pruning_group(root.target.module, root.handler, gone):
            if dep.target.module in names:
                is_output = graph.is_out_channel_pruning_fn(dep.handler)
                yield names[dep.target.module], is_output, indices


def _blocks(module: torch.nn.Module) -> dict[torch.nn.Module, int]:
    """Return into how many equal blocks of channels a layer's outputs fall, where more than one."""
    import torch
    from diffusers.models.attention_processor import Attention

    blocks = {}
    for layer in module.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            blocks[layer] = layer.num_groups
        elif isinstance(layer, Attention):
            blocks |= dict.fromkeys((layer.to_q, layer.to_k, layer.to_v), layer.heads)
    return blocks


def _width(channels: int, blocks: int, ratio: float) -> int:
    """Return how many of `channels` to keep: a multiple of `blocks`, aligned where it is wide."""
    aligned = math.lcm(blocks, ALIGNED)
    unit = aligned if channels >= WIDE and channels % aligned == 0 else blocks
    return max(unit, math.floor(channels * (1 - ratio) / unit + 0.5) * unit)


# -- narrowing a module --------------------------------------------------------------------------


def _widths(layer: Any) -> tuple[int, int]:
    """Return a layer's (outputs, inputs)."""
    match type(layer).__name__:
        case "Conv2d":
            return layer.out_channels, layer.in_channels
        case "Linear":
            return layer.out_features, layer.in_features
        case "GroupNorm":
            return layer.num_channels, layer.num_channels
        case other:
            raise NotImplementedError(f"pruning does not know how to narrow a {other}")


def _narrow(layer: Any, outputs: tuple[int, ...] | None, inputs: tuple[int, ...] | None) -> None:
    """Keep these outputs and inputs of a layer, in place."""
    import torch

    weight, bias = layer.weight.detach(), layer.bias
    if inputs is not None:
        weight = weight[:, list(inputs)]
    if outputs is not None:
        weight = weight[list(outputs)]
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.detach()[list(outputs)].clone())
    layer.weight = torch.nn.Parameter(weight.clone())
    match layer:
        case torch.nn.Conv2d():
            layer.out_channels, layer.in_channels = weight.shape[:2]
        case torch.nn.Linear():
            layer.out_features, layer.in_features = weight.shape
        case torch.nn.GroupNorm():
            layer.num_channels = weight.shape[0]


def _repair(module: torch.nn.Module) -> None:
    """Bring up to date what diffusers' blocks remember of their layers' widths.

    Down- and upsampling assert the number of channels; attention divides by a remembered scale and
    splits a remembered width into heads under some of its processors.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    blocks: list[Any] = list(module.modules())
    for block in blocks:
        kind = type(block)
        if issubclass(kind, ResnetBlock2D):
            block.in_channels, block.out_channels = (
                block.conv1.in_channels,
                block.conv2.out_channels,
            )
            for resample in (block.upsample, block.downsample):
                if isinstance(resample, Upsample2D | Downsample2D):
                    resample.channels = resample.out_channels = block.in_channels
        elif issubclass(kind, Upsample2D | Downsample2D) and block.use_conv:
            conv = getattr(block, "conv", None) or block.Conv2d_0
            block.channels, block.out_channels = conv.in_channels, conv.out_channels
        elif issubclass(kind, Attention):
            block.inner_dim, block.query_dim = block.to_q.out_features, block.to_q.in_features
            block.inner_kv_dim = block.to_k.out_features
            block.cross_attention_dim = block.to_k.in_features
            block.out_dim = block.out_context_dim = block.to_out[0].out_features
            if block.scale_qk:
                block.scale = (block.inner_dim // block.heads) ** -0.5


# -- what a module is and costs --------------------------------------------------------------------


def architecture_digest(module: torch.nn.Module) -> str:
    """Return a digest of the names and shapes of all weights."""
    return digest([[name, list(tensor.shape)] for name, tensor in module.state_dict().items()])


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: torch.nn.Module, channels: int, size: int) -> int:
    """Return the multiply-accumulates of one forward pass on one image (nothing is computed)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    shadow = copy.deepcopy(module).to("meta").eval()
    x = torch.empty(1, channels, size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(x, torch.empty(1, dtype=torch.long, device="meta"), return_dict=False)
    return counter.get_total_flops() // 2


Pruning = Annotated[Magnitude | NoPruning, Field(discriminator="kind")]
