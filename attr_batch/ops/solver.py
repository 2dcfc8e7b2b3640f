"""solver_step: one step of a linear multistep sampler, its noise drawn within."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attr_batch.ops.native import Op, load
from attr_batch.ops.noise import check_key, counter_normal_ref

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SOLVER_STEP = (
    "solver_step(Tensor sample, Tensor model_output, Tensor[] history, Tensor coefficients, "
    "Tensor sample_ids, SymInt seed, SymInt step, float clip) -> (Tensor, Tensor)"
)
_MAX_HISTORY = 3


def solver_step(
    sample: Tensor,
    model_output: Tensor,
    history: Sequence[Tensor],
    coefficients: Tensor,
    sample_ids: Tensor,
    seed: int,
    step: int,
    clip: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Take one step of a linear multistep sampler; return (next, x0), both float32 (B, C, H, W).

        x0   = clamp(k[0] sample + k[1] model_output, -clip, clip)
        next = k[2] sample + k[3] x0 + sum_j k[4+j] history[j] + k[4+H] noise

    summed from the left, every product and sum rounded to float32. DDIM, DPM-Solver++ (2M, 3M) and
    UniPC, whose corrector is linear too, are such steps; `sampling` makes the coefficients.

    `sample` is float32 (B, C, H, W); `model_output` has its shape, float32 or bfloat16; `history`
    holds H <= 3 earlier x0, newest first; `coefficients` k is float32 (5 + H,) on the same device,
    a row of a table made once; `clip=inf` clips nothing, NaN stays NaN. The noise of sample b is
    `counter_normal(sample_ids, C H W, seed, step)[b]` in logical (C, H, W) order, and is not drawn
    when k[4+H] is 0. The results are channels_last where `sample` is (and not contiguous as well),
    else contiguous. The same bits under any split of the batch; native and reference differ by the
    noise's last bits only.
    """
    load()
    import torch

    _refuse_gradients(sample, model_output, coefficients, *history)
    return torch.ops.attr_batch.solver_step(
        sample, model_output, list(history), coefficients, sample_ids, seed, step, clip
    )


def solver_step_ref(
    sample: Tensor,
    model_output: Tensor,
    history: Sequence[Tensor],
    coefficients: Tensor,
    sample_ids: Tensor,
    seed: int,
    step: int,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """Define `solver_step`, term by term in the order of its formula."""
    _check_step(sample, model_output, history, coefficients, sample_ids, seed, step, clip)
    k = coefficients.unbind()
    x0 = (k[0] * sample + k[1] * model_output.float()).clamp(-clip, clip)
    following = k[2] * sample + k[3] * x0
    for k_j, earlier in zip(k[4:], history, strict=False):
        following = following + k_j * earlier
    if bool(k[-1] != 0):
        noise = counter_normal_ref(sample_ids, sample[0:1].numel(), seed, step)
        following = following + k[-1] * noise.view(sample.shape)
    memory_format = _memory_format(sample)
    return (
        following.contiguous(memory_format=memory_format),
        x0.contiguous(memory_format=memory_format),
    )


def _memory_format(sample: Tensor) -> torch.memory_format:
    import torch

    if not sample.is_contiguous() and sample.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _check_step(
    sample: Tensor,
    model_output: Tensor,
    history: Sequence[Tensor],
    coefficients: Tensor,
    sample_ids: Tensor,
    seed: int,
    step: int,
    clip: float,
) -> None:
    import torch

    def same(t: Tensor, *dtypes: torch.dtype) -> bool:
        return t.shape == sample.shape and t.device == sample.device and t.dtype in dtypes

    check_key(sample_ids, math.prod(sample.shape[1:]), seed, step)
    torch._check(
        sample.dim() == 4 and sample.dtype == torch.float32,
        lambda: "sample must be float32 of shape (B, C, H, W)",
    )
    torch._check(
        same(model_output, torch.float32, torch.bfloat16),
        lambda: "model_output must be float32 or bfloat16, with sample's shape and device",
    )
    torch._check(
        len(history) <= _MAX_HISTORY and all(same(h, torch.float32) for h in history),
        lambda: "history must hold at most 3 float32 tensors with sample's shape and device",
    )
    torch._check(
        coefficients.shape == (5 + len(history),)
        and coefficients.dtype == torch.float32
        and coefficients.device == sample.device,
        lambda: "coefficients must be float32 of shape (5 + len(history),) on sample's device",
    )
    torch._check(
        sample_ids.shape[0] == sample.shape[0] and sample_ids.device == sample.device,
        lambda: "sample_ids must name every sample, on its device",
    )
    torch._check(clip >= 0, lambda: "clip must be >= 0 (inf: no clipping)")


def _solver_step_fake(
    sample: Tensor,
    model_output: Tensor,
    history: Sequence[Tensor],
    coefficients: Tensor,
    sample_ids: Tensor,
    seed: int,
    step: int,
    clip: float,
) -> tuple[Tensor, Tensor]:
    import torch

    _check_step(sample, model_output, history, coefficients, sample_ids, seed, step, clip)
    like = torch.empty_like(sample, memory_format=_memory_format(sample))
    return like, torch.empty_like(like)


def _refuse_gradients(*tensors: Tensor) -> None:
    import torch

    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("attr_batch ops have no derivative: call them under torch.no_grad()")


SOLVER_STEP = Op(_SOLVER_STEP, solver_step_ref, _solver_step_fake)
