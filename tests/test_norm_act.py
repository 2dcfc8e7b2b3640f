import math
import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import PACKAGE, lay_out, python
from torch.nn import functional as F

from attr_batch import ops
from attr_batch.ops.norm import norm_act_backward_ref

EPS = 1e-3  # of the norm: bounds how far a group of one value enlarges rounding errors
LAYOUTS = ["channels_last", "contiguous", "sliced", "transposed"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a call; `others` channels come from skip."""

    own: int
    others: int = 0
    height: int = 4
    width: int = 4
    groups: int = 1
    batch: int = 6


SHAPES = {
    "aligned": Shape(64, height=8, width=8, groups=8),
    "odd": Shape(35, height=5, width=7, groups=5),
    "one channel": Shape(1, height=6, width=5),
    "long sums": Shape(7, height=40, width=41, groups=7, batch=3),
    "wide": Shape(300, height=3, width=3, groups=4, batch=3),
    "two sources": Shape(32, 32, groups=8),
    "straddling groups": Shape(5, 7, height=5, width=3, groups=4),
    "one and one": Shape(1, 1, height=3, width=2),
    "one pixel": Shape(24, height=1, width=1, groups=4),
    "one pixel of two": Shape(5, 1, height=1, width=1, groups=2),
    "no sample": Shape(8, 4, groups=2, batch=0),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
cohorts = pytest.mark.parametrize("models", [1, 3])
extra = pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])


def arguments(
    shape, dtype=torch.float32, models=1, extras=True, silu=True, layout="channels_last",
    parameters=torch.float32, seed=0,
):  # fmt: skip
    """The op's arguments by name, in the order of its schema."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size, dtype=parameters):
        return torch.randn(size, generator=generator).to(dtype)

    def image(channels):
        values = randn(shape.batch, channels, shape.height, shape.width, dtype=dtype)
        return lay_out(values, layout)

    channels = shape.own + shape.others
    return dict(
        x=image(shape.own),
        skip=image(shape.others) if shape.others else None,
        weight=randn(models, channels),
        bias=randn(models, channels),
        add=randn(shape.batch, channels) if extras else None,
        scale=randn(shape.batch, channels) if extras else None,
        shift=randn(shape.batch, channels) if extras else None,
        groups=shape.groups,
        eps=EPS,
        silu=silu,
    )


def upstream(y, seed=1):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(y.shape, generator=generator).to(y.dtype)
    return grad.contiguous(memory_format=torch.channels_last)


def call(x, skip, weight, bias, add, scale, shift, groups, eps, silu):
    return ops.norm_act(
        x, weight, bias, groups, eps, skip=skip, add=add, scale=scale, shift=shift, silu=silu
    )


def raw(a):
    """The op as registered: output and statistics."""
    ops.load()
    return torch.ops.attr_batch.norm_act(*a.values())


def raw_backward(grad, a, stats):
    ops.load()
    tensors = [v for k, v in a.items() if k not in {"groups", "eps", "silu"}]
    return torch.ops.attr_batch.norm_act_backward(grad, *tensors, stats, a["groups"], a["silu"])


def differentiable(a):
    return {
        k: v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in a.items()
    }


def gradients(a, grad, norm_act=call):
    a = differentiable(a)
    inputs = {k: v for k, v in a.items() if isinstance(v, torch.Tensor)}
    return dict(
        zip(inputs, torch.autograd.grad(norm_act(**a), list(inputs.values()), grad), strict=True)
    )


def exact(x, skip, weight, bias, add, scale, shift, groups, eps, silu):
    """The formula by torch's own functions, in the dtype of the arguments."""
    h = x if skip is None else torch.cat((x, skip), dim=1)
    if add is not None:
        h = h + add[:, :, None, None]
    of_model = [p.repeat_interleave(len(x) // len(p), dim=0)[:, :, None, None]
                for p in (weight, bias)]  # fmt: skip
    if len(x) == 0:  # which group_norm does not differentiate
        z = h * of_model[0] + of_model[1]
    else:
        z = F.group_norm(h, groups, eps=eps) * of_model[0] + of_model[1]
    if scale is not None:
        z = z * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(z) if silu else z


def as_double(a):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in a.items()}


def size(a):
    """Bounds of |h|, 1 / deviation, |gain| and |z|, from which follow those of rounding errors."""
    a = as_double(a)
    h = a["x"] if a["skip"] is None else torch.cat((a["x"], a["skip"]), dim=1)
    h = h if a["add"] is None else h + a["add"][:, :, None, None]
    if h.numel() == 0:
        return 1.0, 1.0, 1.0, 1.0
    factor = 1 if a["scale"] is None else float((1 + a["scale"]).abs().max())
    gain = float(a["weight"].abs().max()) * factor
    shift = 0 if a["shift"] is None else float(a["shift"].abs().max())
    offset = float(a["bias"].abs().max()) * factor + shift
    spread = h.unflatten(1, (a["groups"], -1)).flatten(2).var(dim=2, correction=0)
    rstd = float((spread + a["eps"]).rsqrt().max())
    return float(h.abs().max()), rstd, gain, float(h.abs().max()) * rstd * gain + offset


def assert_close(got, want, error):
    """Within `error`, and half a unit in the last place of what is rounded to its dtype."""
    unit = torch.finfo(got.dtype).eps
    off = (got.double() - want).abs()
    allowed = error + 0.51 * unit * want.abs()
    assert (off <= allowed).all(), f"off by {float((off / allowed).max()):.3g} of what is allowed"


UNIT = torch.finfo(torch.float32).eps


# Values and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("norm_act", [raw, lambda a: ops.norm_act_ref(*a.values())])
@shapes
@dtypes
@cohorts
@extra
def test_output_matches_float64(norm_act, shape, dtype, models, extras):
    for silu in (True, False):
        a = arguments(shape, dtype, models, extras, silu)
        y, stats = norm_act(a)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert stats.shape == (shape.batch, shape.groups, 2)
        assert stats.dtype == torch.float32
        assert_close(y, exact(**as_double(a)), 4 * UNIT * size(a)[-1])


@shapes
@dtypes
@cohorts
@extra
def test_gradients_match_float64(shape, dtype, models, extras):
    for silu in (True, False):
        a = arguments(shape, dtype, models, extras, silu, parameters=dtype)
        grad = upstream(call(**a))
        got = gradients(a, grad)
        want = gradients(as_double(a), grad.double(), exact)
        h, rstd, gain, z = size(a)
        d = 8 * UNIT * (1 + z) * float(grad.double().abs().max() if grad.numel() else 1)
        pixels = shape.height * shape.width
        dh = d * rstd * gain * (1 + h * rstd)
        errors = dict(x=dh, skip=dh, add=dh * pixels, shift=d * pixels, scale=d * pixels * (1 + z))
        errors["bias"] = d * pixels * shape.batch / models * (1 + gain)
        errors["weight"] = errors["bias"] * h * rstd
        for name, tensor in got.items():
            assert tensor.dtype == a[name].dtype
            assert tensor.shape == a[name].shape
            assert_close(tensor, want[name], errors[name])
        for name in {"x", "skip"} & set(got):
            assert got[name].is_contiguous(memory_format=torch.channels_last)


@shapes
@pytest.mark.parametrize("silu", [True, False])
def test_sums_are_those_of_the_definition(shape, silu):
    a = {
        k: v.double() if isinstance(v, torch.Tensor) else v
        for k, v in arguments(shape, silu=silu).items()
    }
    y, stats = raw(a)
    tensors = [v for k, v in a.items() if k not in {"groups", "eps", "silu"}]
    want = norm_act_backward_ref(upstream(y), *tensors, stats, a["groups"], silu)
    for got, wanted in zip(raw_backward(upstream(y), a, stats), want, strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("others", [0, 3])
def test_gradcheck(others, extras, silu):
    shape = Shape(3, others, height=2, width=3, groups=3, batch=4)
    a = as_double(arguments(shape, models=2, extras=extras, silu=silu))
    assert torch.autograd.gradcheck(
        lambda *values: call(*values), tuple(differentiable(a).values()), atol=1e-7
    )


def test_each_tensor_may_have_its_own_dtype():
    a = arguments(SHAPES["straddling groups"], torch.bfloat16, models=3)
    a |= {"weight": a["weight"].half(), "bias": a["bias"].double(), "scale": a["scale"].bfloat16()}
    assert_close(call(**a), exact(**as_double(a)), 4 * UNIT * size(a)[-1])
    for name, tensor in gradients(a, upstream(call(**a))).items():
        assert tensor.dtype == a[name].dtype


def test_parameters_of_one_model_may_be_vectors():
    a = arguments(SHAPES["aligned"])
    vectors = {**a, "weight": a["weight"][0], "bias": a["bias"][0]}
    assert torch.equal(call(**a), call(**vectors))
    got = gradients(vectors, upstream(call(**a)))
    assert got["weight"].shape == got["bias"].shape == (64,)


# Numbers out of the ordinary -------------------------------------------------------------------


def test_the_mean_may_be_large():
    a = arguments(Shape(16, height=16, width=16, groups=4), extras=False)
    a["x"] = 1000 + a["x"]
    # The input's own last place: a thousand of them would fit a variance from E[x^2] - E[x]^2.
    assert_close(call(**a), exact(**as_double(a)), 1000 * UNIT * size(a)[2])


@dtypes
def test_nan_stays_in_its_group(dtype):
    a = arguments(Shape(8, groups=4, batch=3), dtype)
    clean = call(**a)
    a["x"][1, 3, 2, 2] = math.nan
    y = call(**a)
    assert y[1, 2:4].isnan().all()
    y[1, 2:4] = clean[1, 2:4]
    assert torch.equal(y, clean)


@dtypes
def test_outputs_far_out_are_not_spoilt(dtype):
    a = arguments(Shape(8, groups=4), dtype, extras=False)
    a["weight"] *= 1e4
    y = call(**a)
    assert_close(y, exact(**as_double(a)), 4 * UNIT * size(a)[-1])
    assert y.min() >= -0.28
    for tensor in gradients(a, upstream(y)).values():
        assert tensor.isfinite().all()


@pytest.mark.skipif(ops.backend() == "reference", reason="the native ops are not built or chosen")
def test_bfloat16_is_rounded_as_torch_rounds_it():
    """Without an activation the op is float32 arithmetic and one rounding."""
    a = arguments(Shape(32, height=8, width=8, groups=4), torch.bfloat16, silu=False)
    assert torch.equal(call(**a), call(**{**a, "x": a["x"].float()}).bfloat16())


# The same bits ---------------------------------------------------------------------------------


def everything(a, grad):
    y, stats = raw(a)
    return [y, stats, *raw_backward(grad, a, stats)]


def rows(a, index):
    def cut(k, v):
        return v[index] if k in {"x", "skip", "add", "scale", "shift"} and v is not None else v

    return {k: cut(k, v) for k, v in a.items()}


native_bits = pytest.mark.skipif(
    ops.backend() == "reference", reason="torch's sums may depend on the batch"
)


@native_bits
@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from([n for n in SHAPES if n != "no sample"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    order=st.permutations(range(6)),
    cut=st.integers(0, 6),
)
def test_bits_do_not_depend_on_the_split_or_order(name, dtype, order, cut):
    a = arguments(replace(SHAPES[name], batch=6), dtype)
    grad = upstream(raw(a)[0])
    whole = everything(a, grad)
    parts = [everything(rows(a, part), grad[part]) for part in (order[:cut], order[cut:])]
    has_skip = a["skip"] is not None
    for i, (all_rows, *pieces) in enumerate(zip(whole, *parts, strict=True)):
        if i != 3 or has_skip:
            assert torch.equal(all_rows[order], torch.cat(pieces))


@native_bits
@shapes
@dtypes
def test_a_cohort_has_the_bits_of_its_models(shape, dtype):
    a = arguments(shape, dtype, models=3)
    grad = upstream(raw(a)[0])
    whole, each = everything(a, grad), shape.batch // 3
    together = gradients(a, grad)
    for k in range(3):
        part = slice(k * each, (k + 1) * each)
        own = {**rows(a, part), "weight": a["weight"][k : k + 1], "bias": a["bias"][k : k + 1]}
        for of_all, of_one in zip(whole, everything(own, grad[part]), strict=True):
            assert torch.equal(of_all[part] if len(of_all) else of_all, of_one)
        alone = gradients(own, grad[part])
        for name in ("weight", "bias"):
            assert torch.allclose(together[name][k], alone[name][0], rtol=1e-5, atol=1e-5)


@dtypes
def test_bits_do_not_depend_on_threads_or_time(dtype):
    a = arguments(Shape(40, 24, height=16, width=16, groups=8, batch=24), dtype)
    grad = upstream(raw(a)[0])
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 3, 1):
            torch.set_num_threads(n)
            results.append(everything(a, grad))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@native_bits
@shapes
@dtypes
def test_every_layout_gives_the_same_bits(shape, dtype):
    a = arguments(shape, dtype)
    grad = upstream(raw(a)[0])
    want = everything(a, grad)
    for layout in LAYOUTS[1:]:
        b = arguments(shape, dtype, layout=layout)
        for got, wanted in zip(everything(b, lay_out(grad, layout)), want, strict=True):
            assert torch.equal(got, wanted)


def test_parameters_need_not_be_contiguous():
    a = arguments(SHAPES["straddling groups"], models=3)
    spread = {
        k: v.T.contiguous().T if isinstance(v, torch.Tensor) and v.dim() == 2 else v
        for k, v in a.items()
    }
    assert torch.equal(call(**spread), call(**a))


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm_act", [raw, lambda a: ops.norm_act_ref(*a.values())], ids=["registered", "reference"]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(6, 5, 15)), "x must be"),
        (dict(x=torch.zeros(6, 5, 5, 3, dtype=torch.float16)), "x must be"),
        (dict(skip=torch.zeros(6, 7, 5, 4)), "skip must have"),
        (dict(skip=torch.zeros(5, 7, 5, 3)), "skip must have"),
        (dict(skip=torch.zeros(6, 7, 15)), "skip must have"),
        (dict(skip=torch.zeros(6, 7, 5, 3).bfloat16()), "skip must have"),
        (dict(groups=5), "12 channels do not fall into 5 equal groups"),
        (dict(groups=0), "12 channels do not fall into 0 equal groups"),
        (dict(weight=torch.zeros(12)), "weight and bias must be"),
        (dict(weight=torch.zeros(1, 11)), "weight and bias must be"),
        (dict(bias=torch.zeros(3, 12)), "weight and bias must be"),
        (dict(weight=torch.zeros(4, 12), bias=torch.zeros(4, 12)), "as many of every model"),
        (dict(weight=torch.zeros(0, 12), bias=torch.zeros(0, 12)), "as many of every model"),
        (dict(add=torch.zeros(6, 11)), r"add must be \(B, C\)"),
        (dict(scale=torch.zeros(12)), r"scale must be \(B, C\)"),
        (dict(shift=torch.zeros(5, 12)), r"shift must be \(B, C\)"),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(v),
)
def test_bad_arguments_are_refused(norm_act, change, message):
    with pytest.raises(RuntimeError, match=message):
        norm_act({**arguments(SHAPES["straddling groups"]), **change})


@native_bits
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grad=torch.zeros(6, 12, 5, 2)), "grad must have"),
        (dict(grad=torch.zeros(6, 12, 5, 3).double()), "grad must have"),
        (dict(stats=torch.zeros(6, 4)), "stats must be"),
        (dict(stats=torch.zeros(6, 4, 2).double()), "stats must be"),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(v),
)
def test_bad_gradients_are_refused(change, message):
    a = arguments(SHAPES["straddling groups"])
    given_ = dict(grad=torch.zeros(6, 12, 5, 3), stats=torch.zeros(6, 4, 2)) | change
    with pytest.raises(RuntimeError, match=message):
        raw_backward(given_["grad"], a, given_["stats"])


# PyTorch's own view ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["aligned", "straddling groups", "one and one", "one pixel", "no sample"]
)
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_opcheck(name, layout):
    ops.load()
    a = arguments(SHAPES[name], torch.bfloat16, models=3, layout=layout)
    y, stats = raw(a)
    torch.library.opcheck(
        torch.ops.attr_batch.norm_act.default,
        tuple(differentiable(a).values()),
        rtol=0.02,
        atol=0.02,
    )
    tensors = [v for k, v in a.items() if k not in {"groups", "eps", "silu"}]
    torch.library.opcheck(
        torch.ops.attr_batch.norm_act_backward.default,
        (upstream(y), *tensors, stats, a["groups"], True),
    )


@pytest.mark.parametrize("extras", [False, True])
def test_compiled_equals_eager(extras):
    def block(a):
        return call(**{**a, "x": torch.tanh(a["x"])}) * 2

    ops.load()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (6, 9):  # the second with dynamic shapes
        a = arguments(replace(SHAPES["straddling groups"], batch=batch), models=3, extras=extras)
        grad = upstream(call(**a))
        assert torch.equal(compiled(a), block(a))
        got = gradients(a, grad, lambda **b: compiled(b))
        want = gradients(a, grad, lambda **b: block(b))
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor)


def test_without_libraries_the_reference_answers(tmp_path):
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    copied = shutil.copytree(PACKAGE, tmp_path / "attr_batch", ignore=ignore)
    code = """
import torch
from attr_batch import ops
x = torch.randn(2, 4, 3, 3, requires_grad=True)
y = ops.norm_act(x, torch.ones(4), torch.zeros(4), 2, 1e-5)
want = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2))
torch.testing.assert_close(y, want)
g = torch.randn(2, 4, 3, 3)
torch.testing.assert_close(*(torch.autograd.grad(z, x, g)[0] for z in (y, want)))
empty = ops.norm_act(x[:0], torch.ones(4), torch.zeros(4), 2, 1e-5)
assert torch.autograd.grad(empty.sum(), x)[0].abs().max() == 0
print(ops.backend())
"""
    result = python(code, copied, ATTR_BATCH_OPS="reference")
    assert result.stdout.split() == ["reference"], result.stderr
    assert result.stderr == ""


# silu.h ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native():
    """The information module, which includes the very headers of the kernels."""
    return pytest.importorskip("attr_batch._native_info")


def exact_sigmoid(z):
    """With what is missing from 1, both without cancellation."""
    e = math.exp(-abs(z))
    return (1 / (1 + e), e / (1 + e)) if z > 0 else (e / (1 + e), 1 / (1 + e))


numbers = st.floats(-87, 2.0**100, width=32) | st.floats(-20, 20, width=32)


@settings(deadline=None, max_examples=1000)
@given(numbers)
def test_silu_is_accurate(native, z):
    s, rest = exact_sigmoid(z)
    assert native.sigmoid(z) == pytest.approx(s, rel=2e-7, abs=0)
    assert native.silu(z) == pytest.approx(z * s, rel=2e-7, abs=1e-44)
    assert native.silu_derivative(z) == pytest.approx(s * (1 + z * rest), rel=0, abs=3e-7)


@settings(deadline=None)
@given(st.floats(max_value=-87, width=32))
def test_silu_fades_to_zero(native, z):
    """Where float32 has no normal numbers left for it."""
    for function in (native.sigmoid, native.silu, native.silu_derivative):
        assert -2e-36 <= function(z) <= 2e-38


def test_silu_at_the_ends(native):
    assert [native.sigmoid(z) for z in (-math.inf, 0.0, math.inf)] == [0, 0.5, 1]
    assert [native.silu(z) for z in (-math.inf, 0.0, math.inf)] == [0, 0, math.inf]
    assert [native.silu_derivative(z) for z in (-math.inf, 0.0, math.inf)] == [0, 0.5, 1]
    for function in (native.sigmoid, native.silu, native.silu_derivative):
        assert math.isnan(function(math.nan))
