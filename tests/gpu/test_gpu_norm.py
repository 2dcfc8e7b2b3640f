"""norm_act on a GPU, forward and backward, against its definition in float64 on the CPU."""

import itertools

import pytest
import torch
from on_device import DEVICE, LAYOUTS, assert_close, captured, double, draw, need_device, poison

from attr_batch import ops

pytestmark = pytest.mark.gpu
need_device()

EPS = 1e-5
SHAPES = {  # batch, channels, height, width, groups
    "aligned": (6, 64, 16, 16, 32),
    "odd": (6, 33, 5, 7, 3),
    "one": (3, 1, 1, 1, 1),
    "one pixel": (6, 24, 1, 1, 3),
    "empty": (0, 16, 8, 8, 4),
    "narrow": (3, 40, 3, 5, 20),
    "wide": (3, 256, 20, 20, 2),  # a group is more than a block can keep
    "large": (3, 48, 41, 37, 4),
}
EXTRAS = {"plain": (), "add": ("add",), "scale shift": ("scale", "shift")}
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 8e-3}


def operands(shape, dtype, own=None, models=1, extras=(), layout="channels_last"):
    """Return norm_act's keyword arguments; `own` of the channels are x's, the others skip's."""
    batch, channels, height, width, groups = SHAPES[shape]
    own = channels if own is None else own
    skip = (
        draw((batch, channels - own, height, width), 1, layout, dtype) if own < channels else None
    )
    return dict(
        x=draw((batch, own, height, width), 0, layout, dtype) * 2 + 0.5,
        skip=skip,
        weight=draw((models, channels), 2, dtype=dtype) * 0.3 + 1,
        bias=draw((models, channels), 3, dtype=dtype),
        **{name: draw((batch, channels), 4 + i, dtype=dtype) for i, name in enumerate(extras)},
        groups=groups,
        eps=EPS,
    )


def exact(a, silu):
    """The definition in float64."""
    tensors = (a.get(n) for n in ("x", "skip", "weight", "bias", "add", "scale", "shift"))
    return ops.norm_act_ref(*tensors, a["groups"], a["eps"], silu)[0]


def split_of(sources, channels):
    return {"one": None, "two": channels // 2, "two, odd": channels - channels // 3}[sources]


def cases():
    sources = ("one", "two", "two, odd")
    dtypes = (torch.float32, torch.bfloat16)
    for case in itertools.product(SHAPES, dtypes, sources, (1, 3), EXTRAS, LAYOUTS):
        channels = SHAPES[case[0]][1]
        if split_of(case[2], channels) in (None, *range(1, channels)):
            yield case


@pytest.mark.parametrize(
    ("shape", "dtype", "sources", "models", "extras", "layout"), [*cases()], ids=str
)
def test_it_matches_float64(shape, dtype, sources, models, extras, layout):
    own = split_of(sources, SHAPES[shape][1])
    a = operands(shape, dtype, own, models, EXTRAS[extras], layout)
    silu = extras != "plain"
    names = [name for name, value in a.items() if isinstance(value, torch.Tensor)]
    exactly = {**a, **{name: double(a[name]).requires_grad_() for name in names}}
    for name in names:
        a[name] = a[name].detach().requires_grad_()
    want = exact(exactly, silu)
    poison(*[want.numel() * a["x"].element_size()] * 3)
    got = ops.norm_act(**a, silu=silu)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_close(got, want.detach(), TOLERANCE[dtype])
    grad = draw(got.shape, 9, layout, dtype)
    found = torch.autograd.grad(got, [a[name] for name in names], grad)
    wanted = torch.autograd.grad(want, [exactly[name] for name in names], double(grad))
    for name, mine, theirs in zip(names, found, wanted, strict=True):
        assert mine.dtype == dtype, name
        if SHAPES[shape][1:4] != (1, 1, 1):  # there the derivative is 0 but for rounding
            assert_close(mine, theirs, 3 * TOLERANCE[dtype])


def backward(a, grad):
    tensors = {n: a.get(n) for n in ("x", "skip", "weight", "bias", "add", "scale", "shift")}
    y, stats = torch.ops.attr_batch.norm_act(*tensors.values(), a["groups"], a["eps"], True)
    rest = torch.ops.attr_batch.norm_act_backward(grad, *tensors.values(), stats, a["groups"], True)
    return y, stats, *rest


def rows(a, part, models):
    batched = ("x", "skip", "add", "scale", "shift")
    cut = {n: a[n][part] for n in batched if a.get(n) is not None}
    return {**a, **cut, "weight": a["weight"][models], "bias": a["bias"][models]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["aligned", "odd", "one pixel"])
def test_it_does_not_depend_on_the_split_of_batch_and_cohort(shape, dtype):
    channels = SHAPES[shape][1]
    a = operands(shape, dtype, channels // 2, 3, ("add", "scale", "shift"))
    grad = draw((6, *SHAPES[shape][1:4]), 9, dtype=dtype)
    whole = backward(a, grad)
    for size in (1, 2):
        parts = [
            backward(rows(a, slice(b, b + size), slice(b // 2, b // 2 + 1)), grad[b : b + size])
            for b in range(0, 6, size)
        ]
        for all_, *pieces in zip(whole, *parts, strict=True):
            assert torch.equal(torch.cat(pieces), all_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["aligned", "odd", "wide"])
def test_layouts_have_the_same_bits(shape, dtype):
    channels = SHAPES[shape][1]
    found = []
    for layout in LAYOUTS:
        a = operands(shape, dtype, channels // 2, 1, ("add",), layout)
        grad = draw((SHAPES[shape][0], *SHAPES[shape][1:4]), 9, layout, dtype)
        found.append(backward(a, grad))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("shape", ["aligned", "wide", "large"])
def test_every_run_has_the_same_bits(shape):
    """A race between threads shows as a moving result."""
    a = operands(shape, torch.bfloat16, None, 3, ("add",))
    a["x"] = a["x"].repeat(32, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    a["add"] = a["add"].repeat(32, 1)
    grad = draw(a["x"].shape, 9, dtype=torch.bfloat16)
    first = backward(a, grad)
    for _ in range(20):
        assert all(map(torch.equal, backward(a, grad), first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["aligned", "odd", "empty"])
def test_opcheck(shape, dtype):
    a = operands(shape, dtype, SHAPES[shape][1] // 2, 3, ("add", "scale", "shift"))
    tensors = [a[n].requires_grad_() for n in ("x", "skip", "weight", "bias")]
    tensors += [a[n].requires_grad_() for n in ("add", "scale", "shift")]
    op = torch.ops.attr_batch.norm_act.default
    torch.library.opcheck(op, (*tensors, a["groups"], EPS, True), rtol=1e-2, atol=1e-2)


def test_compiled_equals_eager():
    a = operands("aligned", torch.bfloat16, 32, 3, ("add",))
    for name in ("x", "skip", "weight", "bias", "add"):
        a[name] = a[name].requires_grad_()
    leaves = [a[name] for name in ("x", "skip", "weight", "bias", "add")]
    compiled = torch.compile(ops.norm_act, fullgraph=True, backend="aot_eager")
    grad = draw((6, 64, 16, 16), 9, dtype=torch.bfloat16)
    results = []
    for function in (ops.norm_act, compiled):
        y = function(**a)
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    assert all(map(torch.equal, *results))


def test_it_can_be_captured():
    a = operands("aligned", torch.bfloat16, 32, 3, ("add",))
    grad = draw((6, 64, 16, 16), 9, dtype=torch.bfloat16)
    replay = captured(lambda: backward(a, grad))
    for _ in range(3):
        a["x"].mul_(1.5)
        got = [t.clone() for t in replay()]
        assert all(map(torch.equal, got, backward(a, grad)))


def test_on_the_device_of_its_tensors():
    assert ops.norm_act(**operands("odd", torch.float32)).device.type == torch.device(DEVICE).type
