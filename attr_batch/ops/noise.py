"""counter_normal: noise that is a function of its place, not of a generator's state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attr_batch.ops.native import Op, load

if TYPE_CHECKING:
    from torch import Tensor

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

    check_key(sample_ids, elements, seed, step)
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


def check_key(sample_ids: Tensor, elements: int, seed: int, step: int) -> None:
    """Raise RuntimeError unless the arguments can be put into Philox's counter and key."""
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

    check_key(sample_ids, elements, seed, step)
    return sample_ids.new_empty((sample_ids.shape[0], elements), dtype=torch.float32)


COUNTER_NORMAL = Op(_COUNTER_NORMAL, counter_normal_ref, _counter_normal_fake)
