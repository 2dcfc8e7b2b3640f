"""pruned_conv2d and conv3x3 against ATen in float64."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import conv2d

from attr_batch import ops
from attr_batch.ops import winograd

SHAPES = [  # batch, inputs, outputs, height, width
    (6, 16, 32, 8, 8),
    (3, 64, 64, 16, 16),
    (3, 5, 7, 9, 6),
    (3, 1, 1, 1, 1),
    (6, 33, 40, 3, 5),
    (3, 24, 17, 4, 31),
    (0, 16, 16, 8, 8),
]
LAYOUTS = ["channels_last", "contiguous", "sliced"]


def draw(shape, seed, layout="channels_last", dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.cat((x, x), dim=3)[..., : x.shape[3]]
    return x


def operands(shape, models=1, layout="channels_last", bias=True, residual=True):
    batch, inputs, outputs, height, width = shape
    x = draw((batch, inputs, height, width), 0, layout)
    weight = draw((models * outputs, inputs, 3, 3), 1, "contiguous") / (9 * inputs) ** 0.5
    b = draw((models, outputs, 1, 1), 2, "contiguous")[..., 0, 0] if bias else None
    r = draw((batch, outputs, height, width), 3, layout) if residual else None
    return x, weight.view(models, outputs, inputs, 3, 3), b, r


def exact(x, weight, bias, residual, **options):
    """The definition in float64, written out model by model."""
    x, weight = x.double(), weight.double()
    y = torch.cat(
        [
            conv2d(rows, weight[k], None if bias is None else bias[k].double(), **options)
            for k, rows in enumerate(x.unflatten(0, (len(weight), -1)))
        ]
    )
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("extras", [*itertools.product([True, False], repeat=2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv3x3_matches_float64(shape, extras, models, layout):
    a = operands(shape, models, layout, *extras)
    got, want = ops.conv3x3(*a), exact(*a, padding=1)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv3x3_derivatives_match_float64(shape, models):
    single = [t.requires_grad_() for t in operands(shape, models)]
    double = [t.detach().double().requires_grad_() for t in single]
    y, want = ops.conv3x3(*single), exact(*double, padding=1)
    grad = draw(y.shape, 9)
    found = torch.autograd.grad(y, single, grad)
    wanted = torch.autograd.grad(want, double, grad.double())
    for got, exact_ in zip(found, wanted, strict=True):
        size = max(1.0, float(exact_.abs().max())) if exact_.numel() else 1.0
        torch.testing.assert_close(got.double(), exact_, rtol=0, atol=2e-5 * size)


def test_conv3x3_does_not_depend_on_the_split_of_batch_and_cohort():
    x, weight, bias, residual = operands((6, 33, 40, 9, 6), models=3)
    whole = ops.conv3x3(x, weight, bias, residual)
    assert torch.equal(whole, ops.conv3x3(x, weight, bias, residual))
    for b in range(6):
        k = b // 2
        one = ops.conv3x3(x[b : b + 1], weight[k : k + 1], bias[k : k + 1], residual[b : b + 1])
        if ops.backend() == "native":
            assert torch.equal(one, whole[b : b + 1])
        else:
            torch.testing.assert_close(one, whole[b : b + 1])


def test_conv3x3_does_not_depend_on_the_number_of_threads():
    a = [t.requires_grad_() for t in operands((12, 32, 32, 16, 16))]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            y = ops.conv3x3(*a)
            results.append((y, *torch.autograd.grad(y, a[:2], torch.ones_like(y))))
    finally:
        torch.set_num_threads(threads)
    if ops.backend() == "native":
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


EVERY_ISA = """
import sys, torch
from torch.nn.functional import conv2d
from attr_batch import ops
for outputs in (7, 16, 40):
    x = torch.randn(3, 17, 9, 6).requires_grad_()
    weight = (torch.randn(1, outputs, 17, 3, 3) / 12).requires_grad_()
    y, want = ops.conv3x3(x, weight), conv2d(x, weight[0], padding=1)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-4)
    grad = torch.randn_like(y)
    for got, exact in zip(*(torch.autograd.grad(z, (x, weight), grad) for z in (y, want))):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-3)
print("done")
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_conv3x3_with_every_instruction_set(isa):
    """A CPU without the named one takes the portable code."""
    env = {**os.environ, "ATTR_BATCH_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", EVERY_ISA], capture_output=True, text=True, env=env, timeout=120
    )
    assert result.stdout.split() == ["done"], result.stderr


@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[-1:], ids=str)
def test_opcheck_conv3x3(shape):
    ops.load()
    a = [t.requires_grad_() for t in operands(shape, 3)]
    torch.library.opcheck(torch.ops.attr_batch.conv3x3.default, tuple(a), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 4, 5, 5).double()), "float32"),
        (dict(x=torch.zeros(2, 4, 25)), "x must be"),
        (dict(weight=torch.zeros(1, 3, 4, 1, 1)), "weight"),
        (dict(weight=torch.zeros(3, 3, 4, 3, 3), bias=torch.zeros(3, 3)), "as many of every model"),
        (dict(bias=torch.zeros(3)), "bias"),
        (dict(residual=torch.zeros(2, 3, 5, 4)), "residual"),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(v),
)
def test_conv3x3_refuses_bad_arguments(change, message):
    good = dict(
        x=torch.zeros(2, 4, 5, 5),
        weight=torch.zeros(1, 3, 4, 3, 3),
        bias=torch.zeros(1, 3),
        residual=torch.zeros(2, 3, 5, 5),
    )
    with pytest.raises(RuntimeError, match=message):
        ops.conv3x3(**{**good, **change})


# pruned_conv2d ---------------------------------------------------------------------------------

CONVS = [  # taps, stride, padding
    (3, 1, 1),
    (1, 1, 0),
    (3, 2, 1),
    (3, 2, 0),
]


@pytest.mark.parametrize(("taps", "stride", "padding"), CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("skips", [0, 5])
@pytest.mark.parametrize("registered", [False, True])
def test_pruned_conv2d_matches_float64(taps, stride, padding, dtype, models, skips, registered):
    x = draw((6, 24, 9, 9), 0, dtype=dtype)
    skip = draw((6, skips, 9, 9), 1, dtype=dtype) if skips else None
    inputs = 24 + skips
    weight = draw((models * 26, inputs, taps, taps), 2, "contiguous", dtype) / inputs**0.5 / taps
    weight = weight.view(models, 26, inputs, taps, taps)
    bias = draw((models, 26, 1, 1), 3, "contiguous", dtype)[..., 0, 0]
    side = (9 + 2 * padding - taps) // stride + 1
    residual = draw((6, 26, side, side), 4, dtype=dtype)
    tensors = [t.requires_grad_() for t in (x, skip, weight, bias, residual) if t is not None]
    if registered:
        ops.load()
        op = torch.ops.attr_batch.pruned_conv2d
        got = op(x, skip, weight, bias, residual, stride, padding)
    else:
        one = models == 1
        got = ops.pruned_conv2d(
            x,
            weight[0] if one else weight,
            bias[0] if one else bias,
            skip=skip,
            residual=residual,
            stride=stride,
            padding=padding,
        )
    double = [t.detach().double().requires_grad_() for t in tensors]
    both = torch.cat(double[: len(double) - 3], dim=1)
    want = exact(both, *double[-3:], stride=stride, padding=padding)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float64: 1e-12}[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    grad = draw(got.shape, 7, dtype=dtype)
    found = torch.autograd.grad(got, tensors, grad)
    wanted = torch.autograd.grad(want, double, grad.double())
    for p, q in zip(found, wanted, strict=True):
        size = max(1.0, float(q.abs().max()))
        torch.testing.assert_close(p.double(), q, rtol=0, atol=tolerance * size)


def test_pruned_conv2d_has_the_right_derivative():
    ops.load()
    x, skip = draw((4, 3, 5, 4), 0, dtype=torch.double), draw((4, 2, 5, 4), 1, dtype=torch.double)
    weight = draw((8, 5, 3, 3), 2, "contiguous", torch.double).view(2, 4, 5, 3, 3)
    bias = draw((2, 4, 1, 1), 3, "contiguous", torch.double)[..., 0, 0]
    residual = draw((4, 4, 3, 2), 4, dtype=torch.double)
    tensors = tuple(t.requires_grad_() for t in (x, skip, weight, bias, residual))
    op = torch.ops.attr_batch.pruned_conv2d
    assert torch.autograd.gradcheck(lambda *t: op(*t, 2, 1), tensors)
    torch.library.opcheck(op.default, (*tensors, 2, 1))
    torch.library.opcheck(op.default, (x, None, weight[:, :, :3].detach(), None, None, 1, 1))


def test_which_convolutions_are_ours(monkeypatch):
    x, weight = torch.zeros(4, 64, 8, 8), torch.zeros(1, 64, 64, 3, 3)
    monkeypatch.setattr(winograd, "backend", lambda _: "native")
    assert winograd.pays(x, weight)
    assert not winograd.pays(x[:3], weight)  # too few tiles to pay for the weights' transform
    assert not winograd.pays(x[:, :7], weight[:, :, :7])  # too narrow
    assert not winograd.pays(x, weight[..., :1, :1])
    assert not winograd.pays(x.bfloat16(), weight)
    monkeypatch.setattr(winograd, "backend", lambda _: "reference")
    assert not winograd.pays(x, weight)


def test_second_derivatives_are_refused():
    x = draw((2, 8, 4, 4), 0).requires_grad_()
    weight = draw((8, 8, 3, 3), 1, "contiguous")[None].requires_grad_()
    (first,) = torch.autograd.grad(ops.conv3x3(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
