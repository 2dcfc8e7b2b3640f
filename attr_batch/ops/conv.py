"""pruned_conv2d: the convolutions of channel-pruned UNets, for one model or a cohort of K.

What cuDNN and oneDNN do well stays theirs: ATen's convolution, in channels_last. Ours is what they
have no call for, K models' weights at once on a GPU, and what they do with four times the
multiplications, float32 3x3 convolutions on a CPU (`conv3x3`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attr_batch.ops import winograd
from attr_batch.ops.native import Op, backend, call

if TYPE_CHECKING:
    from torch import Tensor

_PRUNED_CONV2D = (
    "pruned_conv2d(Tensor x, Tensor? skip, Tensor weight, Tensor? bias, Tensor? residual, "
    "SymInt stride, SymInt padding) -> Tensor"
)
_PRUNED_CONV2D_BACKWARD = (
    "pruned_conv2d_backward(Tensor grad, Tensor x, Tensor? skip, Tensor weight, SymInt stride, "
    "SymInt padding) -> (Tensor, Tensor, Tensor)"
)


def pruned_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Return conv2d([x, skip], weight) + bias + residual: (B, O, H', W'), of x's dtype.

    `x` (B, C1, H, W) and `skip` (B, C2, H, W) are read as if concatenated, I = C1 + C2. `weight` is
    (O, I, R, S), or (K, O, I, R, S) for K models with `bias` (K, O): rows kB/K to (k+1)B/K - 1 use
    the k-th. All have one dtype, float32, bfloat16 or float64. Sums in float32 at least; the order
    of summation is the library's, so bits may depend on the batch. Has first derivatives in all
    tensors.
    """
    if weight.dim() == 4:
        weight, bias = weight[None], None if bias is None else bias[None]
    if skip is None and (stride, padding) == (1, 1) and winograd.pays(x, weight):
        return winograd.conv3x3(x, weight, bias, residual)
    if _own_kernel(x, weight):
        return call("pruned_conv2d", x, skip, weight, bias, residual, stride, padding)
    return pruned_conv2d_ref(x, skip, weight, bias, residual, stride, padding)


def _own_kernel(x: Tensor, weight: Tensor) -> bool:
    """Say whether our own tensor-core kernel is used: on CUDA, in bfloat16, for a cohort.

    One model's convolution is left to cuDNN. Which is faster where is what `make gpu` measures.
    """
    import torch

    wanted = x.device.type == "cuda" and x.dtype == torch.bfloat16 and weight.shape[0] > 1
    return wanted and backend(str(x.device)) == "native"


def pruned_conv2d_ref(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
) -> Tensor:
    """Define `pruned_conv2d`, by ATen's convolution; differentiable as it stands."""
    import torch

    _check(x, skip, weight, bias, residual)
    if weight.shape[3:] == (1, 1) and (stride, padding) == (1, 0):
        out = _pointwise(x, skip, weight[..., 0, 0], bias)
        return out if residual is None else out + residual
    models = weight.shape[0]
    parts = [x] if skip is None else [x, skip]
    y = []
    for k in range(models):
        w = weight[k].split([p.shape[1] for p in parts], dim=1)
        b = None if bias is None else bias[k]
        rows = slice(k * len(x) // models, (k + 1) * len(x) // models)
        y_k = torch.nn.functional.conv2d(parts[0][rows], w[0], b, stride, padding)
        if skip is not None:
            y_k = y_k + torch.nn.functional.conv2d(skip[rows], w[1], None, stride, padding)
        y.append(y_k)
    out = y[0] if models == 1 else torch.cat(y)
    return out if residual is None else out + residual


def _pointwise(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a 1x1 convolution with `weight` (K, O, I) as matrix products over the pixels."""
    import torch

    models, outputs, _ = weight.shape
    batch, _, height, width = x.shape

    def rows(t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).reshape(models, -1, t.shape[1])

    own, others = weight.mT[:, : x.shape[1]], weight.mT[:, x.shape[1] :]
    y = rows(x) @ own if bias is None else torch.baddbmm(bias[:, None], rows(x), own)
    if skip is not None:
        y = torch.baddbmm(y, rows(skip), others)
    return y.view(batch, height, width, outputs).permute(0, 3, 1, 2)


def _kernel(*arguments: Any) -> Tensor:
    """Answer in channels_last, as the native kernel does."""
    return _dense(pruned_conv2d_ref(*arguments))


def _check(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> None:
    import torch

    torch._check(
        x.dim() == 4 and weight.dim() == 5, lambda: "x must be (B, C, H, W), weight (K, O, I, R, S)"
    )
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    torch._check(
        weight.shape[2] == channels, lambda: "weight's inputs must be x's and skip's channels"
    )
    torch._check(
        skip is None or (skip.shape[0] == x.shape[0] and skip.shape[2:] == x.shape[2:]),
        lambda: "skip must have x's batch, height and width",
    )
    torch._check(
        bias is None or bias.shape == weight.shape[:2], lambda: "bias must be (O,) or (K, O)"
    )
    torch._check(
        weight.shape[0] > 0 and x.shape[0] % weight.shape[0] == 0,
        lambda: "the batch must hold as many of every model",
    )
    torch._check(
        residual is None or residual.shape[:2] == (x.shape[0], weight.shape[1]),
        lambda: "residual must have the result's shape",
    )
    others = [t for t in (skip, weight, bias, residual) if t is not None]
    torch._check(
        all(t.dtype == x.dtype and t.device == x.device for t in others),
        lambda: "all tensors must have x's dtype and device",
    )


def _pruned_conv2d_fake(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
) -> Tensor:
    import torch

    _check(x, skip, weight, bias, residual)
    _, outputs, _, r, s = weight.shape
    height = (x.shape[2] + 2 * padding - r) // stride + 1
    width = (x.shape[3] + 2 * padding - s) // stride + 1
    y = x.new_empty((x.shape[0], outputs, height, width))
    return y.to(memory_format=torch.channels_last)


# The derivative --------------------------------------------------------------------------------


def pruned_conv2d_backward_ref(
    grad: Tensor, x: Tensor, skip: Tensor | None, weight: Tensor, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Define the derivative: (of x, of skip or an empty tensor, of weight)."""
    import torch

    models = weight.shape[0]
    both = x if skip is None else torch.cat((x, skip), dim=1)
    of_input, of_weight = [], []
    for k in range(models):
        rows = slice(k * len(x) // models, (k + 1) * len(x) // models)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad[rows], both[rows], weight[k], None,
            [stride, stride], [padding, padding], [1, 1], False, [0, 0], 1, [True, True, False],
        )  # fmt: skip
        of_input.append(dx)
        of_weight.append(dw)
    d = torch.cat(of_input)
    d_weight = torch.stack(of_weight)
    if skip is None:
        return _dense(d), x.new_empty(0), d_weight
    return _dense(d[:, : x.shape[1]]), _dense(d[:, x.shape[1] :]), d_weight


def _dense(t: Tensor) -> Tensor:
    import torch

    return t.contiguous(memory_format=torch.channels_last)


def _pruned_conv2d_backward_fake(
    grad: Tensor, x: Tensor, skip: Tensor | None, weight: Tensor, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    del grad, stride, padding
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dw = weight.new_empty(weight.shape)
    if skip is None:
        return dx, x.new_empty(0), dw
    return dx, torch.empty_like(skip, memory_format=torch.channels_last), dw


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, skip, weight, bias, residual, ctx.stride, ctx.padding = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x, skip, weight)


def _pruned_conv2d_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the derivatives in all arguments of `pruned_conv2d`."""
    import torch

    x, skip, weight = ctx.saved_tensors
    dx, dskip, dweight = torch.ops.attr_batch.pruned_conv2d_backward(
        grad, x, skip, weight, ctx.stride, ctx.padding
    )
    dbias = None
    if ctx.has_bias:
        dbias = grad.unflatten(0, (len(weight), -1)).sum(dim=(1, 3, 4))
    return (
        dx,
        None if skip is None else dskip,
        dweight,
        dbias,
        grad if ctx.has_residual else None,
        None,
        None,
    )


PRUNED_CONV2D = (
    Op(_PRUNED_CONV2D, _kernel, _pruned_conv2d_fake, _pruned_conv2d_grads, _keep),
    Op(_PRUNED_CONV2D_BACKWARD, pruned_conv2d_backward_ref, _pruned_conv2d_backward_fake),
)
