"""counter_normal and solver_step on a GPU: against float64, and the bits of the CPU."""

import itertools
import math

import pytest
import torch
from on_device import CUDA, DEVICE, LAYOUTS, captured, draw, need_device, poison

from attr_batch import ops

pytestmark = pytest.mark.gpu
need_device()

IDS = [0, 1, 5, 2**32, 2**63 - 1, -1]
KEYS = [(0, 0), (2**63 - 1, 2**32 - 1), (0x123456789ABC, 7)]
cpu_is_native = pytest.mark.skipif(
    ops.backend("cpu") != "native", reason="the CPU library is not built"
)


def ids(values=IDS, device=DEVICE):
    return torch.tensor(values, dtype=torch.int64, device=device)


# counter_normal --------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [0, 1, 3, 4, 63, 64, 65, 130, 3072])
@pytest.mark.parametrize(("seed", "step"), KEYS)
def test_normals_match_float64(elements, seed, step):
    poison(4 * len(IDS) * elements)
    got = ops.counter_normal(ids(), elements, seed, step)
    want = ops.counter_normal_ref(ids(device="cpu"), elements, seed, step)
    assert got.device.type == torch.device(DEVICE).type
    assert got.is_contiguous()
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-6)


@cpu_is_native
@pytest.mark.parametrize(("seed", "step"), KEYS)
def test_normals_have_the_bits_of_the_cpu(seed, step):
    many = torch.arange(1000) * 1_000_003
    got = ops.counter_normal(many.to(DEVICE), 4097, seed, step)
    assert torch.equal(got.cpu(), ops.counter_normal(many, 4097, seed, step))


def test_normals_do_not_depend_on_the_split():
    each = torch.arange(9, device=DEVICE) * 1_000_003
    whole = ops.counter_normal(each, 130, 4, 2)
    for cut in range(10):
        parts = [ops.counter_normal(part, 130, 4, 2) for part in (each[:cut], each[cut:])]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(ops.counter_normal(each, 67, 4, 2), whole[:, :67])
    assert torch.equal(ops.counter_normal(each.repeat_interleave(2)[::2], 130, 4, 2), whole)


def test_no_sample_has_no_noise():
    assert ops.counter_normal(ids([]), 5, 0, 0).shape == (0, 5)


# solver_step -----------------------------------------------------------------------------------

SHAPES = [
    (3, 4, 8, 8),
    (2, 3, 5, 7),
    (1, 1, 1, 1),
    (2, 1, 4, 4),
    (2, 5, 1, 1),
    (0, 3, 4, 4),
    (2, 3, 37, 41),
    (64, 3, 32, 32),
]


def arguments(shape, layout="contiguous", dtype=torch.float32, H=2, noise=0.5, clip=1.0):
    return dict(
        sample=draw(shape, 0, layout),
        model_output=draw(shape, 1, layout, dtype),
        history=[draw(shape, 2 + h, layout) for h in range(H)],
        coefficients=torch.tensor(
            [1.1, -0.7, 0.9, 0.3, *[0.25, -0.2, 0.1][:H], noise], device=DEVICE
        ),
        sample_ids=torch.arange(shape[0], device=DEVICE) + 5,
        seed=77,
        step=3,
        clip=clip,
    )


def on_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return [v.cpu() for v in value] if isinstance(value, list) else value


def exact_step(sample, model_output, history, coefficients, sample_ids, seed, step, clip):
    """The formula in float64, and how far float32 may be from it."""
    k, x, answer = coefficients.double(), sample.double(), model_output.double()
    x0 = (k[0] * x + k[1] * answer).clamp(-clip, clip)
    noise = ops.counter_normal_ref(sample_ids, math.prod(sample.shape[1:]), seed, step)
    terms = [k[2] * x, k[3] * x0, k[-1] * noise.double().view(sample.shape)]
    terms += [k_j * h.double() for k_j, h in zip(k[4:], history, strict=False)]
    size = sum(t.abs() for t in terms) + (k[0] * x).abs() + (k[1] * answer).abs()
    return sum(terms), x0, 4e-7 * size + 1e-6


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "H"),
    [*itertools.product(SHAPES, LAYOUTS, [torch.float32, torch.bfloat16], [0, 1, 2, 3])],
    ids=str,
)
def test_step_matches_float64(shape, layout, dtype, H):
    a = arguments(shape, layout, dtype, H)
    poison(*[4 * math.prod(shape)] * 2)
    following, x0 = ops.solver_step(**a)
    wanted, wanted_x0, tolerance = exact_step(**{k: on_cpu(v) for k, v in a.items()})
    for got, want in [(following, wanted), (x0, wanted_x0)]:
        assert got.dtype == torch.float32
        assert ((got.cpu() - want).abs() <= tolerance).all()


@cpu_is_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("H", [0, 3])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_step_has_the_bits_of_the_cpu(noise, H, layout, dtype):
    a = arguments((7, 3, 37, 41), layout, dtype, H, noise)
    there = ops.solver_step(**a)
    here = ops.solver_step(**{k: on_cpu(v) for k, v in a.items()})
    for got, want in zip(there, here, strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_does_not_depend_on_the_split_or_order(layout):
    a = arguments((6, 3, 5, 7), layout)

    def rows(index):
        part = {k: a[k][index] for k in ("sample", "model_output", "sample_ids")}
        return ops.solver_step(**{**a, **part, "history": [h[index] for h in a["history"]]})

    order = [3, 0, 5, 1, 4, 2]
    whole = ops.solver_step(**a)
    for cut in range(7):
        for all_, pieces in zip(
            whole, zip(rows(order[:cut]), rows(order[cut:]), strict=True), strict=True
        ):
            assert torch.equal(all_[order], torch.cat(pieces))


def test_clip_bounds_x0_and_lets_nan_through():
    a = arguments((1, 1, 2, 2), H=0, noise=0.0)
    a["sample"] = torch.tensor([[[[10.0, -10.0], [math.nan, 0.25]]]], device=DEVICE)
    a["model_output"] = torch.zeros(1, 1, 2, 2, device=DEVICE)
    a["coefficients"] = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], device=DEVICE)
    for clip, large in ((1.5, 1.5), (math.inf, 10.0)):
        got = ops.solver_step(**{**a, "clip": clip})[1].flatten().cpu()
        want = torch.tensor([large, -large, math.nan, 0.25])
        torch.testing.assert_close(got, want, equal_nan=True)


def test_every_run_has_the_same_bits():
    a = arguments((64, 3, 32, 32), "channels_last", torch.bfloat16, H=3)
    first = ops.solver_step(**a)
    for _ in range(20):
        assert all(map(torch.equal, ops.solver_step(**a), first))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (0, 3, 4, 4)], ids=str)
def test_opcheck(shape, layout):
    a = arguments(shape, layout, torch.bfloat16)
    torch.library.opcheck(torch.ops.attr_batch.solver_step.default, tuple(a.values()))
    torch.library.opcheck(torch.ops.attr_batch.counter_normal.default, (ids(), 10, 1, 2))


def trajectory(a, steps):
    x, history = ops.counter_normal(a["sample_ids"], 256, 1, 0).view(-1, 4, 8, 8), []
    for step in steps:
        k = torch.cat((a["coefficients"][: 4 + len(history)], a["coefficients"][-1:]))
        x, x0 = ops.solver_step(x, torch.tanh(x), history, k, a["sample_ids"], 1, step)
        history = [x0, *history[:1]]
    return x


def test_compiled_equals_eager():
    a = arguments((3, 4, 8, 8))
    # aot_eager: inductor's own tanh would differ in the last bits.
    compiled = torch.compile(trajectory, fullgraph=True, backend="aot_eager")
    for steps in ([1, 2, 3], [4, 5, 6]):
        assert torch.equal(compiled(a, steps), trajectory(a, steps))


@pytest.mark.skipif(not CUDA, reason="compiling for the CPU takes long and is no rehearsal")
def test_inductor_calls_the_ops():
    a = arguments((3, 4, 8, 8))
    compiled = torch.compile(trajectory, fullgraph=True)
    torch.testing.assert_close(compiled(a, [1, 2, 3]), trajectory(a, [1, 2, 3]))


def test_a_replayed_step_reads_what_its_tensors_hold_now():
    a = arguments((3, 4, 8, 8))
    replay = captured(lambda: ops.solver_step(**a))
    for change in (1.0, 2.0, -0.5):
        a["coefficients"].mul_(change)
        a["sample"].add_(change)
        a["sample_ids"].add_(1)
        got = [t.clone() for t in replay()]
        assert all(map(torch.equal, got, ops.solver_step(**a)))
