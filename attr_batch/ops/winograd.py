"""conv3x3: float32 3x3 convolutions on the CPU by Winograd's minimal filtering.

Most of a UNet's time goes into 3x3 convolutions of stride 1. oneDNN multiplies directly; F(4x4,
3x3) (Lavin and Gray, 2016) needs a quarter of the multiplications, for the output, the input's
derivative and the weight's alike. Its error, some 1e-5 of a result's size, is a hundredth of
bfloat16's. `pruned_conv2d` asks for it where it pays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attr_batch.ops.native import Op, backend, call

if TYPE_CHECKING:
    from torch import Tensor

_CONV3X3 = "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor"
_WEIGHT_GRADIENT = "conv3x3_weight_gradient(Tensor grad, Tensor x, SymInt models) -> Tensor"
FEWEST_PAIRS, FEWEST_TILES = 512, 16  # of channels; of 4x4 outputs of one model


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return conv2d(x, weight, padding 1) + bias + residual, float32 (B, O, H, W), channels_last.

    `x` (B, I, H, W), `weight` (K, O, I, 3, 3), `bias` (K, O), `residual` (B, O, H, W), all float32:
    rows kB/K to (k+1)B/K - 1 use the k-th model's. The same bits under any split of the batch. What
    is not finite spoils all of the 4x4 tiles that it touches, in its own sample alone. Has first
    derivatives in all tensors.
    """
    return call("conv3x3", x, weight, bias, residual)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Say whether the native kernel takes this convolution and is faster than oneDNN's.

    Transforming the weights costs as much as a few images; `benchmarks/ops.py` measures where it
    has paid off. A function of shapes and build alone, for it decides bits.
    """
    import torch

    if x.device.type != "cpu" or x.dtype != torch.float32 or backend("cpu") != "native":
        return False
    models, outputs, inputs, *taps = weight.shape
    tiles = len(x) // models * (-(-x.shape[2] // 4)) * (-(-x.shape[3] // 4))
    wide = min(outputs, inputs) >= 8 and outputs * inputs >= FEWEST_PAIRS
    return taps == [3, 3] and wide and tiles >= FEWEST_TILES


def conv3x3_ref(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Define `conv3x3`: ATen's convolution, model by model."""
    import torch

    _check(x, weight, bias, residual)
    models = len(weight)
    y = [
        torch.nn.functional.conv2d(rows, weight[k], None if bias is None else bias[k], padding=1)
        for k, rows in enumerate(x.unflatten(0, (models, -1)))
    ]
    out = torch.cat(y) if residual is None else torch.cat(y) + residual
    return out.contiguous(memory_format=torch.channels_last)


def conv3x3_weight_gradient_ref(grad: Tensor, x: Tensor, models: int) -> Tensor:
    """Define the derivative in the weight, (K, O, I, 3, 3), given that in the result."""
    import torch
    from torch.nn.grad import conv2d_weight

    pairs = zip(grad.unflatten(0, (models, -1)), x.unflatten(0, (models, -1)), strict=True)
    shape = [grad.shape[1], x.shape[1], 3, 3]
    return torch.stack([conv2d_weight(i, shape, g, padding=1) for g, i in pairs])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    import torch

    tensors = [t for t in (x, weight, bias, residual) if t is not None]
    torch._check(
        all(t.dtype == torch.float32 and t.device == x.device for t in tensors),
        lambda: "all tensors must be float32 and on one device",
    )
    torch._check(
        x.dim() == 4 and weight.dim() == 5 and weight.shape[2:] == (x.shape[1], 3, 3),
        lambda: "x must be (B, I, H, W) and weight (K, O, I, 3, 3)",
    )
    torch._check(
        weight.shape[0] > 0 and x.shape[0] % weight.shape[0] == 0,
        lambda: "the batch must hold as many of every model",
    )
    torch._check(bias is None or bias.shape == weight.shape[:2], lambda: "bias must be (K, O)")
    shape = (x.shape[0], weight.shape[1], *x.shape[2:])
    torch._check(
        residual is None or residual.shape == shape, lambda: "residual must be (B, O, H, W)"
    )


def _conv3x3_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    import torch

    _check(x, weight, bias, residual)
    y = x.new_empty((x.shape[0], weight.shape[1], *x.shape[2:]))
    return y.to(memory_format=torch.channels_last)


def _weight_gradient_fake(grad: Tensor, x: Tensor, models: int) -> Tensor:
    return x.new_empty((models, grad.shape[1], x.shape[1], 3, 3))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, weight, bias, residual = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x, weight)


def _conv3x3_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the derivatives; the input's is a convolution with the weight turned around."""
    import torch

    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias, of_residual = ctx.needs_input_grad
    dx = dweight = dbias = None
    if of_x:
        turned = weight.transpose(1, 2).flip(3, 4).contiguous()
        dx = torch.ops.attr_batch.conv3x3(grad, turned, None, None)
    if of_weight:
        dweight = torch.ops.attr_batch.conv3x3_weight_gradient(grad, x, len(weight))
    if ctx.has_bias and of_bias:
        dbias = grad.unflatten(0, (len(weight), -1)).sum(dim=(1, 3, 4))
    return dx, dweight, dbias, grad if ctx.has_residual and of_residual else None


CONV3X3 = (
    Op(_CONV3X3, conv3x3_ref, _conv3x3_fake, _conv3x3_grads, _keep),
    Op(_WEIGHT_GRADIENT, conv3x3_weight_gradient_ref, _weight_gradient_fake),
)
