"""The native seam: what is computed by our own kernels, each beside the definition it must meet.

Every op stands here in the same order: schema, public function, `<op>_ref` (plain torch: the
definition, and the kernel wherever there is no native one), limits, fake kernel (shapes only, for
`torch.compile`). The schemas are declared here for both back ends; the libraries in `csrc/` only
implement them, so there is one truth and one way to register.

Which back end answers is part of a run's key. So it is never chosen by trying: `backend` reads
`ATTR_BATCH_OPS` (`auto`, `native`, `reference`) and looks for the library file, and a file that is
there but does not load is an error. That question, and importing this module, leaves torch out,
because planning asks it; torch comes with the first op (`load`).

Noise is counter-based (Philox): common random numbers for every coalition, the paper's step 5,
whatever the batch. All ops are for inference and have no derivative.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attr_batch.errors import SpecError
from attr_batch.log import warn

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Backend = Literal["native", "reference"]

_FOLDER = Path(__file__).parent
_LIBRARIES = {"cpu": _FOLDER / "_native_cpu.so", "cuda": _FOLDER / "_native_cuda.so"}
_REBUILD = "build with: pip install --no-build-isolation -e . (needs a C++ compiler)"
_registry: torch.library.Library | None = None  # the declared ops live as long as this


# Which back end ------------------------------------------------------------------------------


def _mode() -> str:
    mode = os.environ.get("ATTR_BATCH_OPS", "auto")
    if mode not in {"auto", "native", "reference"}:
        raise SpecError(f"{mode!r} is not auto, native or reference", where="ATTR_BATCH_OPS")
    return mode


def backend(device: str = "cpu") -> Backend:
    """Return which kernels serve `device` (`cpu`, `cuda`, `cuda:1`, ...), without torch.

    SpecError if `ATTR_BATCH_OPS=native` and there is no library for it.
    """
    mode = _mode()
    library = _LIBRARIES.get(device.partition(":")[0])
    if mode != "reference" and library is not None and library.exists():
        return "native"
    if mode == "native":
        what = f"no native ops for {device}: {library.name if library else 'a library'} is missing"
        raise SpecError(what, where="ATTR_BATCH_OPS=native", hint=_REBUILD)
    return "reference"


def build_info() -> dict[str, Any]:
    """Return how the native ops were built and what this CPU offers, as far as it is known."""
    info: dict[str, Any] = {
        "ops": _mode(),
        "libraries": [path.name for path in _LIBRARIES.values() if path.exists()],
    }
    try:
        native = importlib.import_module("attr_batch._native_info")
    except ImportError as error:
        return {**info, "build": None, "why": str(error)}
    return {**info, "build": native.build(), "cpu_features": native.cpu_features()}


def load() -> None:
    """Declare the ops and load the native libraries; done once, by the first op.

    SpecError if a library is there but does not load, or is missing under `ATTR_BATCH_OPS=native`.
    """
    global _registry
    if _registry is not None:
        return
    import torch

    mode = _mode()
    if mode == "native":
        backend("cpu")  # raises where its library is missing
    devices = ["cpu", "cuda"] if torch.version.cuda else ["cpu"]
    native = [d for d in devices if mode != "reference" and _LIBRARIES[d].exists()]
    registry = torch.library.Library("attr_batch", "DEF")
    for schema, reference, fake in _OPS:
        name = schema.partition("(")[0]
        registry.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"attr_batch::{name}", fake, lib=registry)
        if mode != "native":
            registry.impl(name, reference, "CompositeExplicitAutograd")
    for device in devices:
        if device in native:
            _load_library(_LIBRARIES[device])
        elif mode == "auto" and (device == "cpu" or torch.cuda.is_available()):
            warn(f"no native ops for {device}: using the slower reference ops", hint=_REBUILD)
    _registry = registry


def _load_library(path: Path) -> None:
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        what = f"the native ops do not load: {error.__cause__ or error}"
        hint = f"re{_REBUILD}, or set ATTR_BATCH_OPS=reference (other run keys)"
        raise SpecError(what, where=str(path), hint=hint) from error


def _refuse_gradients(*tensors: Tensor) -> None:
    import torch

    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("attr_batch ops have no derivative: call them under torch.no_grad()")


# counter_normal ------------------------------------------------------------------------------

_COUNTER_NORMAL = (
    "counter_normal(Tensor sample_ids, SymInt elements, SymInt seed, SymInt step) -> Tensor"
)


def counter_normal(sample_ids: Tensor, elements: int, seed: int, step: int) -> Tensor:
    """Return standard normal noise, float32 (B, elements), for samples `sample_ids`, int64 (B,).

    A pure function of (seed, sample id, element, step), hence the same bits under any split of the
    batch. Elements 4q .. 4q+3 come from one block of Philox4x32-10 (Salmon et al. 2011) with

        counter = (q, step, id mod 2^32, id div 2^32)    key = (seed mod 2^32, seed div 2^32)

    whose words (w0, w1) and (w2, w3) make two normals each by Box-Muller, cosine first:
    sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v) with u = (w0 + 1/2) / 2^32, v = w1 / 2^32.
    `seed` in [0, 2^63), `step` in [0, 2^32); a use of its own takes a seed of its own.

    The native kernels and the reference draw the same integers; their normals differ by less than
    1e-6. Native bits depend neither on the CPU's vector width nor on the thread count.
    """
    load()
    import torch

    return torch.ops.attr_batch.counter_normal(sample_ids, elements, seed, step)


def counter_normal_ref(sample_ids: Tensor, elements: int, seed: int, step: int) -> Tensor:
    """Define `counter_normal`: Philox in int64, Box-Muller in float64, rounded to float32."""
    import torch

    _check_key(sample_ids, elements, seed, step)
    word = 0xFFFFFFFF
    block = torch.arange(-(-elements // 4), device=sample_ids.device)
    ids = sample_ids[:, None]
    counter = (block, torch.full_like(block, step), ids & word, ids >> 32 & word)
    w0, w1, w2, w3 = _philox4x32_10(counter, (seed & word, seed >> 32))
    u = (torch.stack((w0, w2), dim=-1).double() + 0.5) / 2**32
    angle = torch.stack((w1, w3), dim=-1).double() * (2 * math.pi / 2**32)
    radius = torch.sqrt(-2 * torch.log(u))
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return z.flatten(1)[:, :elements].float().contiguous()  # (B, blocks, pair, 2) -> (B, elements)


def _philox4x32_10(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four 32-bit words (held in int64) that Philox makes of counter and key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_32(0xD2511F53, c0)
        high1, low1 = _multiply_32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply_32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return high and low word of a 32 x 32 bit product, in halves that int64 can hold."""
    lower = a * (b & 0xFFFF)
    upper = a * (b >> 16) + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | lower & 0xFFFF


def _check_key(sample_ids: Tensor, elements: int, seed: int, step: int) -> None:
    import torch

    torch._check(
        sample_ids.dim() == 1 and sample_ids.dtype == torch.int64,
        lambda: "sample_ids must be int64 of shape (B,)",
    )
    torch._check(seed >= 0, lambda: "seed must be in [0, 2^63)")
    torch._check(0 <= step < 1 << 32, lambda: "step must be in [0, 2^32)")
    torch._check(0 <= elements < 1 << 31, lambda: "elements must be in [0, 2^31)")


def _counter_normal_fake(sample_ids: Tensor, elements: int, seed: int, step: int) -> Tensor:
    import torch

    _check_key(sample_ids, elements, seed, step)
    return sample_ids.new_empty((sample_ids.shape[0], elements), dtype=torch.float32)


# solver_step ---------------------------------------------------------------------------------

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

    _check_key(sample_ids, math.prod(sample.shape[1:]), seed, step)
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


_OPS = (
    (_COUNTER_NORMAL, counter_normal_ref, _counter_normal_fake),
    (_SOLVER_STEP, solver_step_ref, _solver_step_fake),
)
