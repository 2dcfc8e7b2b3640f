"""pruned_conv2d on a GPU, forward and backward, against ATen in float64 on the CPU.

The registered op is called directly: it is ours on CUDA also where `ops.pruned_conv2d` would leave
the convolution to cuDNN.
"""

import itertools

import pytest
import torch
from on_device import (
    CUDA,
    DEVICE,
    LAYOUTS,
    assert_close,
    captured,
    double,
    draw,
    need_device,
    poison,
)
from torch.nn.functional import conv2d

from attr_batch import ops
from attr_batch.ops import conv

pytestmark = pytest.mark.gpu
need_device()

op = torch.ops.attr_batch.pruned_conv2d
SHAPES = {  # batch, own inputs, skip's inputs, outputs, height, width
    "aligned": (6, 64, 0, 64, 16, 16),
    "aligned, two": (6, 64, 32, 128, 8, 8),
    "odd": (6, 5, 0, 7, 9, 6),
    "odd, two": (3, 33, 11, 41, 7, 13),
    "narrow in": (6, 3, 0, 64, 17, 16),
    "narrow out": (6, 64, 0, 3, 16, 17),
    "one": (3, 1, 0, 1, 3, 3),
    "small": (6, 128, 0, 128, 4, 4),
    "empty": (0, 16, 0, 16, 8, 8),
}
CONVS = [(3, 1, 1), (1, 1, 0), (3, 2, 1), (3, 2, 0)]  # taps, stride, padding
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def operands(shape, kind, dtype, models=1, extras=True, layout="channels_last"):
    """Return the op's arguments (x, skip, weight, bias, residual, stride, padding)."""
    batch, own, others, outputs, height, width = SHAPES[shape]
    taps, stride, padding = kind
    inputs = own + others
    x = draw((batch, own, height, width), 0, layout, dtype)
    skip = draw((batch, others, height, width), 1, layout, dtype) if others else None
    weight = draw((models * outputs, inputs, taps, taps), 2, "contiguous") / taps / inputs**0.5
    weight = weight.to(dtype).view(models, outputs, inputs, taps, taps)
    sides = [(side + 2 * padding - taps) // stride + 1 for side in (height, width)]
    bias = draw((models, outputs), 3, dtype=dtype) if extras else None
    residual = draw((batch, outputs, *sides), 4, layout, dtype) if extras else None
    return x, skip, weight, bias, residual, stride, padding


def exact(x, skip, weight, bias, residual, stride, padding):
    """The definition in float64, model by model."""
    both = x if skip is None else torch.cat((x, skip), dim=1)
    y = [
        conv2d(rows, weight[k], None if bias is None else bias[k], stride, padding)
        for k, rows in enumerate(both.unflatten(0, (len(weight), -1)))
    ]
    return torch.cat(y) if residual is None else torch.cat(y) + residual


def cases():
    dtypes = (torch.float32, torch.bfloat16)
    for case in itertools.product(SHAPES, CONVS, dtypes, (1, 3), (True, False), LAYOUTS):
        usual = case[4] and case[5] == "channels_last"
        if usual or (case[1] == (3, 1, 1) and case[3] == 3):
            yield case


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "models", "extras", "layout"), [*cases()], ids=str
)
def test_it_matches_float64(shape, kind, dtype, models, extras, layout):
    a = operands(shape, kind, dtype, models, extras, layout)
    tensors = [None if t is None else t.detach().requires_grad_() for t in a[:5]]
    exactly = [None if t is None else double(t).requires_grad_() for t in a[:5]]
    want = exact(*exactly, *a[5:])
    poison(*[want.numel() * a[0].element_size()] * 3, *[a[2].numel() * 4] * 2)
    got = op(*tensors, *a[5:])
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_close(got, want.detach(), TOLERANCE[dtype])
    grad = draw(got.shape, 9, layout, dtype)
    found = torch.autograd.grad(got, [t for t in tensors if t is not None], grad)
    wanted = torch.autograd.grad(want, [t for t in exactly if t is not None], double(grad))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        assert_close(mine, theirs, 2 * TOLERANCE[dtype])


def backward(a, grad):
    x, skip, weight, _, _, stride, padding = a
    rest = torch.ops.attr_batch.pruned_conv2d_backward(grad, x, skip, weight, stride, padding)
    return op(*a), *rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["aligned", "aligned, two", "odd, two", "small"])
def test_every_run_has_the_same_bits(shape, dtype):
    """A race between threads shows as a moving result."""
    a = operands(shape, (3, 1, 1), dtype, 3)
    grad = draw(a[4].shape, 9, dtype=dtype)
    first = backward(a, grad)
    if not CUDA:
        return  # there the op is ATen's
    for _ in range(20):
        assert all(map(torch.equal, backward(a, grad), first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cohort_is_its_models(dtype):
    x, skip, weight, bias, residual, *rest = operands("aligned, two", (3, 1, 1), dtype, 3)
    whole = op(x, skip, weight, bias, residual, *rest)
    for k in range(3):
        two = slice(2 * k, 2 * k + 2)
        one = slice(k, k + 1)
        alone = op(x[two], skip[two], weight[one], bias[one], residual[two], *rest)
        assert_close(whole[two], double(alone), TOLERANCE[dtype])


def test_a_cohort_in_bfloat16_is_ours():
    x, _, weight, bias, *_ = operands("aligned", (3, 1, 1), torch.bfloat16, 3)
    assert conv._own_kernel(x, weight) == CUDA
    assert not conv._own_kernel(x, weight[:1])
    got = ops.pruned_conv2d(x, weight, bias, padding=1)
    want = exact(double(x), None, double(weight), double(bias), None, 1, 1)
    assert_close(got, want, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["aligned, two", "odd", "empty"])
def test_opcheck(shape, dtype):
    a = operands(shape, (3, 1, 1), dtype, 3)
    tensors = [None if t is None else t.requires_grad_() for t in a[:5]]
    torch.library.opcheck(op.default, (*tensors, *a[5:]), rtol=1e-2, atol=1e-2)


def test_compiled_equals_eager():
    a = operands("aligned, two", (3, 1, 1), torch.bfloat16, 3)
    tensors = [t.requires_grad_() for t in a[:5]]
    compiled = torch.compile(lambda *t: op(*t, 1, 1), fullgraph=True, backend="aot_eager")
    grad = draw(a[4].shape, 9, dtype=torch.bfloat16)
    results = []
    for function in (lambda *t: op(*t, 1, 1), compiled):
        y = function(*tensors)
        results.append((y, *torch.autograd.grad(y, tensors, grad)))
    assert all(map(torch.equal, *results))


def test_it_can_be_captured():
    a = operands("aligned, two", (3, 1, 1), torch.bfloat16, 3)
    grad = draw(a[4].shape, 9, dtype=torch.bfloat16)
    replay = captured(lambda: backward(a, grad))
    for _ in range(3):
        a[0].mul_(1.5)
        got = [t.clone() for t in replay()]
        assert all(map(torch.equal, got, backward(a, grad)))


def test_float64_is_left_to_aten():
    a = operands("odd", (3, 1, 1), torch.float32, 3)
    x, _, weight, bias = (None if t is None else t.double() for t in a[:4])
    got = ops.pruned_conv2d(x, weight, bias, padding=1)
    assert got.device.type == torch.device(DEVICE).type
    assert_close(got, exact(double(x), None, double(weight), double(bias), None, 1, 1), 1e-12)
