"""diffusers' UNet2DModel, walked in fewer passes over memory, for one model or a cohort of K.

The module stays diffusers' own: it holds the weights, is trained, saved and pruned as it is. Only
its forward pass is ours: all in channels_last, a block's concatenation, time embedding, group norm
and activation as one op (`ops.norm_act`), the skip connection read where it lies, the residual
added by the convolution (`ops.pruned_conv2d`), no division by an output scale of 1.

`stack` makes a cohort: a module whose every parameter holds those of K models, (K, ...). Its rows
kB/K to (k+1)B/K - 1 go through the k-th. diffusers' own forward cannot do that; this one can,
because it hands weights to ops and never asks a layer to act.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RESNET_BLOCKS = {
    "DownBlock2D", "AttnDownBlock2D", "UNetMidBlock2D", "UpBlock2D", "AttnUpBlock2D"
}  # fmt: skip


def fuse(module: Any) -> Any:
    """Return what answers as `module(x, t, return_dict=False)` does, but faster where we can.

    It reads the module's weights at every call, so training the module goes on as ever. A module
    that is no plain UNet2DModel (other blocks, adapters) is returned as it is.
    """
    return Fused(module) if supported(module) else module


def to_bfloat16(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy in bfloat16 whose convolutions lie in memory as they are used."""
    import torch

    halved = copy.deepcopy(module)
    torch.nn.Module.to(halved, torch.bfloat16)  # diffusers' own `to` warns
    if cohort_size(module) == 1:
        torch.nn.Module.to(halved, memory_format=torch.channels_last)  # pyright: ignore
    return halved


def stack(modules: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """Return a copy of the first module whose every parameter is those of all, (K, ...).

    Only `fuse`d it can be called; all modules must be of one architecture.
    """
    import torch

    cohort = copy.deepcopy(modules[0])
    for name, layer in cohort.named_modules():
        for key in list(layer._parameters):
            first = layer._parameters[key]
            if first is not None:
                each = [getattr(m.get_submodule(name), key).detach() for m in modules]
                stacked = torch.nn.Parameter(torch.stack(each), first.requires_grad)
                layer._parameters[key] = stacked
    return cohort


def unstack(cohort: torch.nn.Module, into: Sequence[torch.nn.Module]) -> None:
    """Give each of `into` its own weights of a stacked module."""
    import torch

    with torch.no_grad():
        for k, module in enumerate(into):
            for name, parameter in module.named_parameters():
                parameter.copy_(cohort.get_parameter(name)[k])


def cohort_size(module: Any) -> int:
    """Return how many models' weights a module holds: 1, or K of a stacked one."""
    first = getattr(getattr(module, "conv_in", None), "weight", None)
    return len(first) if first is not None and first.dim() == 5 else 1


def supported(module: Any) -> bool:
    """Say whether the walk below is this module's forward pass, to the last detail."""
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel

    kind: Any = type(module)
    if kind is not UNet2DModel or module.class_embedding is not None:
        return False
    blocks = [*module.down_blocks, *module.up_blocks]
    blocks += [module.mid_block] if module.mid_block is not None else []
    plain = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.GroupNorm)
    layers = [layer for layer in module.modules() if layer._parameters]
    changed = any(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or "forward" in vars(layer)
        or type(layer).__module__[:5] == "peft."
        for layer in module.modules()
    )
    return not changed and (
        all(type(block).__name__ in _RESNET_BLOCKS for block in blocks)
        and all(type(layer) in plain for layer in layers)
        and all(_plain_resnet(resnet) for block in blocks for resnet in block.resnets)
        and all(_plain_sampler(s) for block in blocks for s in _samplers(block))
        and all(_plain_attention(a) for block in blocks for a in _attentions(block))
        and all(_plain_conv(layer) for layer in _convs(module))
        and all(layer.affine for layer in module.modules() if isinstance(layer, torch.nn.GroupNorm))
        and all(_is_silu(f) for f in (module.conv_act, module.time_embedding.act))
        and module.time_embedding.post_act is None
        and module.config.time_embedding_type == "positional"
    )


def _plain_conv(conv: Any) -> bool:
    square = all(
        isinstance(pair, tuple) and pair[0] == pair[1] for pair in (conv.stride, conv.padding)
    )
    return square and conv.padding_mode == "zeros" and conv.groups == 1 and conv.dilation == (1, 1)


def _plain_resnet(resnet: Any) -> bool:
    return (
        type(resnet).__name__ == "ResnetBlock2D"
        and _is_silu(resnet.nonlinearity)
        and _are(resnet, "norm1 norm2", "GroupNorm")
        and _are(resnet, "conv1 conv2", "Conv2d")
        and resnet.time_embedding_norm in ("default", "scale_shift")
        and resnet.time_emb_proj is not None
        and not resnet.skip_time_act
        and resnet.upsample is None
        and resnet.downsample is None
    )


def _plain_sampler(sampler: Any) -> bool:
    kind = type(sampler).__name__
    if kind == "Upsample2D" and (sampler.use_conv_transpose or not sampler.interpolate):
        return False
    return kind in ("Upsample2D", "Downsample2D") and sampler.use_conv and sampler.norm is None


def _plain_attention(attention: Any) -> bool:
    return (
        type(attention.processor).__name__ in ("AttnProcessor2_0", "AttnProcessor")
        and _are(attention, "to_q to_k to_v", "Linear")
        and type(attention.to_out[0]).__name__ == "Linear"
        and attention.to_out[1].p == 0
        and attention.spatial_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
        and attention.residual_connection
        and not attention.norm_cross
    )


def _are(block: Any, names: str, kind: str) -> bool:
    return all(type(getattr(block, name)).__name__ == kind for name in names.split())


def _is_silu(activation: Any) -> bool:
    return type(activation).__name__ == "SiLU"


def _convs(module: Any) -> list[Any]:
    return [layer for layer in module.modules() if type(layer).__name__ == "Conv2d"]


def _samplers(block: Any) -> list[Any]:
    found = getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None)
    return list(found or [])


def _attentions(block: Any) -> list[Any]:
    return [a for a in getattr(block, "attentions", None) or [] if a is not None]


class Fused:
    """The forward pass of a UNet2DModel, or of a stacked cohort of them."""

    def __init__(self, module: Any) -> None:
        self.module, self.models = module, cohort_size(module)

    def __call__(self, x: Tensor, t: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Return (what the network predicts at `x` (B, c, h, w) and times `t` (B,),)."""
        import torch
        from torch.nn.functional import silu

        if return_dict or t.shape != x.shape[:1]:
            raise ValueError("wanted return_dict=False and a time for every row of x")
        net = self.module
        h = x.contiguous(memory_format=torch.channels_last)
        if net.config.center_input_sample:
            h = 2 * h - 1

        # The time, activated once for all blocks.
        time = net.time_proj(t).to(net.conv_in.weight.dtype)
        time = self._linear(net.time_embedding.linear_1, time)
        time = silu(self._linear(net.time_embedding.linear_2, silu(time)))

        # Down.
        h = _conv(net.conv_in, h)
        skips = [h]
        for block in net.down_blocks:
            attentions = _attentions(block)
            for i, resnet in enumerate(block.resnets):
                h = self._resnet(resnet, h, time)
                h = self._attention(attentions[i], h) if attentions else h
                skips.append(h)
            for down in _samplers(block):
                if down.padding == 0:
                    h = torch.nn.functional.pad(h, (0, 1, 0, 1))
                h = _conv(down.conv, h)
                skips.append(h)

        # Across.
        if net.mid_block is not None:
            first, *others = net.mid_block.resnets
            h = self._resnet(first, h, time)
            for attention, resnet in zip(net.mid_block.attentions, others, strict=True):
                h = h if attention is None else self._attention(attention, h)
                h = self._resnet(resnet, h, time)

        # Up.
        for block in net.up_blocks:
            attentions = _attentions(block)
            for i, resnet in enumerate(block.resnets):
                h = self._resnet(resnet, h, time, skips.pop())
                h = self._attention(attentions[i], h) if attentions else h
            for up in _samplers(block):
                h = torch.nn.functional.interpolate(h, scale_factor=2.0, mode="nearest")
                h = _conv(up.conv if up.name == "conv" else up.Conv2d_0, h)

        h = _conv(net.conv_out, _norm(net.conv_norm_out, h))
        return (h,)

    def _resnet(self, resnet: Any, x: Tensor, time: Tensor, skip: Tensor | None = None) -> Tensor:
        time = self._linear(resnet.time_emb_proj, time)
        h = _conv(resnet.conv1, _norm(resnet.norm1, x, skip=skip))
        if resnet.time_embedding_norm == "default":
            h = _norm(resnet.norm2, h, add=time)
        else:
            scale, shift = time.chunk(2, dim=1)
            h = _norm(resnet.norm2, h, scale=scale, shift=shift)
        if resnet.dropout.p > 0:
            h = resnet.dropout(h)
        if resnet.conv_shortcut is not None:
            x = _conv(resnet.conv_shortcut, x, skip=skip)
        h = _conv(resnet.conv2, h, residual=x)
        return h if resnet.output_scale_factor == 1 else h / resnet.output_scale_factor

    def _attention(self, attention: Any, x: Tensor) -> Tensor:
        from torch.nn.functional import scaled_dot_product_attention

        batch, channels, height, width = x.shape
        norm = attention.group_norm
        h = x if norm is None else _norm(norm, x, silu=False)
        h = h.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        q, k, v = (
            self._linear(layer, h).unflatten(2, (attention.heads, -1)).transpose(1, 2)
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = self._linear(attention.to_out[0], h)
        h = h.view(batch, height, width, channels).permute(0, 3, 1, 2) + x
        factor = attention.rescale_output_factor
        return h if factor == 1 else h / factor

    def _linear(self, layer: Any, x: Tensor) -> Tensor:
        """Apply a layer to the last dimension of `x` (B, ..., I), to each model's rows its own."""
        import torch

        if layer.weight.dim() == 2:
            return torch.nn.functional.linear(x, layer.weight, layer.bias)
        rows = x.reshape(self.models, -1, x.shape[-1])
        y = rows @ layer.weight.mT
        if layer.bias is not None:
            y = y + layer.bias[:, None]
        return y.view(*x.shape[:-1], -1)


def _conv(
    layer: Any, x: Tensor, skip: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    from attr_batch import ops

    return ops.pruned_conv2d(
        x,
        layer.weight,
        layer.bias,
        skip=skip,
        residual=residual,
        stride=layer.stride[0],
        padding=layer.padding[0],
    )


def _norm(layer: Any, x: Tensor, **options: Any) -> Tensor:
    from attr_batch import ops

    return ops.norm_act(x, layer.weight, layer.bias, layer.num_groups, layer.eps, **options)
