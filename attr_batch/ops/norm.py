"""norm_act: group norm with everything that stands around it in a UNet, in one pass over memory.

A residual block of a diffusion UNet spends as many passes over its activations on concatenating,
adding the time embedding, normalising, scaling and the activation as on its convolutions. Here they
are one op, for one model or for K models of a cohort at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attr_batch.ops.native import Op, call

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NORM_ACT = (
    "norm_act(Tensor x, Tensor? skip, Tensor weight, Tensor bias, Tensor? add, Tensor? scale, "
    "Tensor? shift, SymInt groups, float eps, bool silu) -> (Tensor, Tensor)"
)
_NORM_ACT_BACKWARD = (
    "norm_act_backward(Tensor grad, Tensor x, Tensor? skip, Tensor weight, Tensor bias, "
    "Tensor? add, Tensor? scale, Tensor? shift, Tensor stats, SymInt groups, bool silu) "
    "-> (Tensor, Tensor, Tensor)"
)


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    skip: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Return act(group_norm([x, skip] + add; weight, bias) (1 + scale) + shift), of x's dtype.

    `x` (B, C1, H, W) and `skip` (B, C2, H, W) are read as if concatenated, C = C1 + C2; `add`,
    `scale` and `shift` are (B, C), one number per sample and channel, such as a time embedding
    before (`add`) or after the norm. `weight` and `bias` are (C,), or (K, C) for K models: rows
    kB/K to (k+1)B/K - 1 use the k-th. `act` is SiLU, or nothing. x, skip: float32, bfloat16 or
    float64; everything is computed in float32 (float64), and rounded once. The result is
    channels_last.

    A sample's bits depend on nothing but that sample, so any split of the batch or cohort gives the
    same. Has first derivatives in all tensors.
    """
    weight, bias = (p[None] if p.dim() == 1 else p for p in (weight, bias))
    y, _ = call("norm_act", x, skip, weight, bias, add, scale, shift, groups, eps, silu)
    return y


def norm_act_ref(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Define `norm_act`; return also (mean, 1 / standard deviation) as (B, groups, 2)."""
    import torch

    _check(x, skip, weight, bias, add, scale, shift, groups)
    h = _hidden(x, skip, add)
    grouped = h.unflatten(1, (groups, -1)).flatten(2)
    mean = grouped.mean(dim=2)
    rstd = ((grouped - mean[:, :, None]).square().mean(dim=2) + eps).rsqrt()
    gain, offset = _affine(weight, bias, scale, shift, h)
    z = _normalised(h, mean, rstd) * gain + offset
    y = torch.nn.functional.silu(z) if silu else z
    y = y.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return y, torch.stack((mean, rstd), dim=2)


def _hidden(x: Tensor, skip: Tensor | None, add: Tensor | None) -> Tensor:
    """Return what is normalised: (B, C, H, W) in the dtype of the arithmetic."""
    import torch

    h = x if skip is None else torch.cat((x, skip), dim=1)
    h = h.to(_arithmetic(x))
    return h if add is None else h + add.to(h.dtype)[:, :, None, None]


def _normalised(h: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    groups = mean.shape[1]
    centred = h.unflatten(1, (groups, -1)) - mean[:, :, None, None, None]
    return (centred * rstd[:, :, None, None, None]).flatten(1, 2)


def _affine(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Return gain and offset (B, C, 1, 1) such that z = gain * normalised + offset."""
    gain, offset = (_rows(p, len(h)).to(h.dtype) for p in (weight, bias))
    if scale is not None:
        factor = 1 + scale.to(h.dtype)
        gain, offset = gain * factor, offset * factor
    if shift is not None:
        offset = offset + shift.to(h.dtype)
    return gain[:, :, None, None], offset[:, :, None, None]


def _rows(parameter: Tensor, batch: int) -> Tensor:
    """Return (K, C) as (B, C): each sample's own."""
    models, channels = parameter.shape
    return parameter[:, None].expand(models, batch // models, channels).reshape(batch, channels)


def _arithmetic(x: Tensor) -> torch.dtype:
    import torch

    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
) -> None:
    import torch

    torch._check(
        x.dim() == 4 and x.dtype in (torch.float32, torch.bfloat16, torch.float64),
        lambda: "x must be float32, bfloat16 or float64 of shape (B, C, H, W)",
    )
    batch, channels = x.shape[0], x.shape[1]
    if skip is not None:
        torch._check(
            skip.dim() == 4
            and skip.shape[0] == batch
            and skip.shape[2:] == x.shape[2:]
            and skip.dtype == x.dtype
            and skip.device == x.device,
            lambda: "skip must have x's batch, height, width, dtype and device",
        )
        channels = channels + skip.shape[1]
    torch._check(
        groups > 0 and channels % groups == 0,
        lambda: f"{channels} channels do not fall into {groups} equal groups",
    )
    torch._check(
        weight.dim() == 2 and weight.shape[1] == channels and weight.shape == bias.shape,
        lambda: "weight and bias must be (C,) or (K, C)",
    )
    models = weight.shape[0]
    torch._check(
        models > 0 and batch % models == 0, lambda: "the batch must hold as many of every model"
    )
    for name, value in (("add", add), ("scale", scale), ("shift", shift)):
        torch._check(
            value is None or value.shape == (batch, channels),
            lambda name=name: f"{name} must be (B, C)",
        )


def _norm_act_fake(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    import torch

    del eps, silu
    _check(x, skip, weight, bias, add, scale, shift, groups)
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    y = x.new_empty((x.shape[0], channels, *x.shape[2:])).to(memory_format=torch.channels_last)
    return y, x.new_empty((x.shape[0], groups, 2), dtype=_arithmetic(x))


# The derivative --------------------------------------------------------------------------------


def norm_act_backward_ref(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    stats: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Define the derivative: (of x, of skip or an empty tensor, sums (B, 3, C)).

    With n the normalised input, z = gain n + offset and d = dL/dz, the sums run over the pixels:
    d, d n, and dL/dn times dn/dh, h being what is normalised. From them follow all derivatives in
    parameters (`_norm_act_grads`). With <.> the mean over a group,

        dL/dh = rstd (gain d - <gain d> - n <gain d n>)
    """
    import torch

    h = _hidden(x, skip, add)
    mean, rstd = stats.unbind(dim=2)
    n = _normalised(h, mean, rstd)
    gain, offset = _affine(weight, bias, scale, shift, h)
    d = grad.to(h.dtype)
    if silu:
        z = gain * n + offset
        s = torch.sigmoid(z)
        d = d * (s * (1 + z * (1 - s)))

    def per_group(t: Tensor) -> Tensor:
        means = t.unflatten(1, (groups, -1)).mean(dim=(2, 3, 4))
        return means.repeat_interleave(h.shape[1] // groups, dim=1)[:, :, None, None]

    inverse = rstd.repeat_interleave(h.shape[1] // groups, dim=1)[:, :, None, None]
    g = gain * d
    dh = inverse * (g - per_group(g) - n * per_group(g * n))
    sums = torch.stack([t.sum(dim=(2, 3)) for t in (d, d * n, dh)], dim=1)
    dx, dskip = dh[:, : x.shape[1]], dh[:, x.shape[1] :]
    dx = dx.to(x.dtype).contiguous(memory_format=torch.channels_last)
    if skip is None:
        return dx, x.new_empty(0), sums
    return dx, dskip.to(x.dtype).contiguous(memory_format=torch.channels_last), sums


def _norm_act_backward_fake(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    stats: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    del weight, bias, add, scale, shift, groups, silu
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    sums = stats.new_empty((x.shape[0], 3, grad.shape[1]))
    if skip is None:
        return dx, x.new_empty(0), sums
    return dx, torch.empty_like(skip, memory_format=torch.channels_last), sums


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.groups, _, ctx.silu = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _norm_act_grads(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the derivatives in all arguments of `norm_act`."""
    import torch

    x, skip, weight, bias, add, scale, shift, stats = ctx.saved_tensors
    dx, dskip, sums = torch.ops.attr_batch.norm_act_backward(
        grad, x, skip, weight, bias, add, scale, shift, stats, ctx.groups, ctx.silu
    )
    of_z, of_z_n, of_h = sums.unbind(dim=1)  # (B, C)
    of_affine, dscale = sums[:, :2], None
    if scale is not None:
        gain, offset = (_rows(p, len(x)).to(sums.dtype) for p in (weight, bias))
        dscale = (gain * of_z_n + offset * of_z).to(scale.dtype)
        of_affine = of_affine * (1 + scale.to(sums.dtype))[:, None]
    models, channels = weight.shape
    per_model = of_affine.reshape(models, len(x) // models, 2, channels)
    dbias, dweight = per_model.sum(dim=1).unbind(dim=1)
    return (
        dx,
        None if skip is None else dskip,
        dweight.to(weight.dtype),
        dbias.to(bias.dtype),
        None if add is None else of_h.to(add.dtype),
        dscale,
        None if shift is None else of_z.to(shift.dtype),
        None,
        None,
        None,
    )


NORM_ACT = Op(_NORM_ACT, norm_act_ref, _norm_act_fake, _norm_act_grads, _keep)
NORM_ACT_BACKWARD = Op(_NORM_ACT_BACKWARD, norm_act_backward_ref, _norm_act_backward_fake)
