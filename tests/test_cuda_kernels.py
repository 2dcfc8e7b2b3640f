"""The CUDA ops, run on a CPU by an emulation of CUDA (tests/cuda_on_cpu).

It compiles the very .cu files with a C++ compiler and runs every thread of every block. That shows
their logic: indices, edges, barriers, which tensor core's lane holds what, and the host's part. It
does not show the hardware's memory model, its speed, or the numerics of its tensor cores, and PTX
and launches are not part of it: those need a GPU.
"""

import ctypes
import functools
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from attr_batch import ops
from attr_batch.ops.conv import pruned_conv2d_backward_ref, pruned_conv2d_ref
from attr_batch.ops.norm import norm_act_backward_ref, norm_act_ref

HERE = Path(__file__).parent
NAMESPACE = "attr_batch_on_cpu"
LIBRARY = "ATTR_BATCH_CUDA_ON_CPU"  # where it is already built, sanitized: the last test's own
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}  # in which a block's threads run
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is missing")


def compile_emulation(library, *flags):
    torch_folder = Path(torch.__file__).parent
    command = [
        *("g++", "-O1", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden"),
        *("-Wall", "-Wextra", "-Werror", "-ffp-contract=off"),
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", f"-Dattr_batch={NAMESPACE}"),
        *("-isystem", str(torch_folder / "include"), *flags),
        *(str(HERE / "cuda_on_cpu" / "ops.cpp"), "-o", str(library)),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu"),
    ]
    subprocess.run(command, check=True)


@functools.cache
def registry():
    """The ops' schemas and shapes once more, under another name."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for op in ops.OPS:
        library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{op.name}", op.fake, lib=library)
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = os.environ.get(LIBRARY)
    if path is None:
        path = tmp_path_factory.mktemp("cuda_on_cpu") / "ops.so"
        compile_emulation(path)
    registry()
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    loaded.run_misuse.restype = ctypes.c_char_p
    loaded.run_misuse.argtypes = (ctypes.c_int, ctypes.c_void_p)
    return loaded


@pytest.fixture
def emulated(library):
    """The ops; memory that they allocate starts as NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield getattr(torch.ops, NAMESPACE)
    library.set_order(ORDERS["forward"])
    torch.use_deterministic_algorithms(deterministic)


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def images(batch, channels, height, width, dtype, seed=0):
    t = random(batch, channels, height, width, dtype=dtype, seed=seed)
    return t.contiguous(memory_format=torch.channels_last)


def double(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def assert_near(got, want, size, tolerance=2e-6):
    """Within float32's error on sums of `size`, and one rounding to the dtype of `got`."""
    assert got.shape == want.shape
    rounding = 2**-8 if got.dtype == torch.bfloat16 else 0.0
    assert ((got.double() - want).abs() <= rounding * want.abs() + tolerance * size + 1e-30).all()


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# The emulation itself ---------------------------------------------------------------------------

MISUSES = {  # kernels of ops.cpp, by number
    0: r"0 is at ops.cpp:\d+; 32 is at ops.cpp:\d+",
    1: "5 has ended",
    2: "16 has ended",
    3: "a misaligned row in thread 0",
    5: "written past the end of shared memory",
}
RACE, WELL_BEHAVED = 4, 6


@pytest.mark.parametrize("which", MISUSES)
def test_misuse_is_noticed(library, which):
    error = library.run_misuse(which, torch.zeros(64).data_ptr()).decode()
    assert re.search(MISUSES[which], error)


def test_a_race_shows_in_the_order_of_threads(emulated, library):
    results = {}
    for which in (RACE, WELL_BEHAVED):
        for order, number in ORDERS.items():
            library.set_order(number)
            out = torch.zeros(64)
            assert library.run_misuse(which, out.data_ptr()) == b""
            results[which, order] = out.nan_to_num(nan=-1)
    assert not torch.equal(results[RACE, "forward"], results[RACE, "backward"])
    for order in ORDERS:
        assert torch.equal(results[WELL_BEHAVED, order], (torch.arange(64) ^ 1).float())


# counter_normal and solver_step -----------------------------------------------------------------

native = pytest.mark.skipif(
    ops.backend() == "reference", reason="the native ops are not built or chosen"
)


@native
@pytest.mark.parametrize("elements", [0, 1, 5, 1030])
def test_normals_have_the_bits_of_the_cpu(emulated, elements):
    ids = torch.tensor([0, 1, 2**32, 2**63 - 1, -1])
    for seed, step in [(0, 0), (2**63 - 1, 2**32 - 1)]:
        arguments = (ids, elements, seed, step)
        assert torch.equal(emulated.counter_normal(*arguments), ops.counter_normal(*arguments))


@native
@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("H", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 4, 16, 16), (0, 3, 4, 4)], ids=str)
def test_steps_have_the_bits_of_the_cpu(emulated, shape, channels_last, dtype, H, noise):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    sample, output, *history = (
        random(*shape, seed=i).contiguous(memory_format=layout) for i in range(2 + H)
    )
    k = torch.tensor([1.1, -0.7, 0.9, 0.3, *[0.25, -0.2, 0.1][:H], noise])
    arguments = (sample, output.to(dtype), history, k, torch.arange(shape[0]) + 5, 77, 3, 1.0)
    got, want = emulated.solver_step(*arguments), ops.solver_step(*arguments)
    assert_same_bits(got, want)
    assert [t.stride() for t in got] == [t.stride() for t in want]


# norm_act ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    first: int
    second: int
    groups: int
    height: int
    width: int


NORMS = [
    Norm(16, 16, 4, 4, 4),  # vectors throughout
    Norm(24, 8, 8, 3, 3),  # a vector holds several groups
    Norm(320, 0, 32, 5, 5),  # vectors lie across groups, the last block has fewer
    Norm(16, 0, 16, 2, 2),  # a group is one channel
    Norm(5, 7, 3, 3, 5),  # a group lies in both sources
    Norm(33, 0, 11, 4, 3),
    Norm(8, 4, 2, 3, 3),  # vectors in float32 only
    Norm(1, 0, 1, 3, 3),  # one channel
    Norm(48, 0, 4, 1, 1),  # one pixel
    Norm(7, 0, 7, 1, 1),  # both: no variance
    Norm(2600, 0, 1, 2, 1),  # more vectors than threads
    Norm(301, 0, 1, 2, 2),  # more channels than threads
    Norm(16, 32, 4, 40, 40),  # kept in shared memory only as narrow blocks
    Norm(32, 0, 4, 64, 64),  # too large to be kept
]


def norm_arguments(case, dtype, K, given, batch=None, seed=0):
    """Everything before `groups`. The mean is far from zero, which bad formulas do not survive."""
    channels = case.first + case.second
    B = batch or 2 * K if case.height < 40 else K
    x = images(B, case.first, case.height, case.width, dtype, seed) + 3
    skip = images(B, case.second, case.height, case.width, dtype, seed + 1) if case.second else None
    weight, bias = (random(K, channels, seed=seed + 2 + i) for i in range(2))
    rest = [random(B, channels, seed=seed + 4 + i) if given else None for i in range(3)]
    return [x, skip, weight, bias, *rest]


def gain_of(arguments):
    *_, weight, bias, _, scale, shift = arguments
    factor = 1 if scale is None else 1 + scale.abs().max()
    return factor * (weight.abs().max() + bias.abs().max()) + (0 if shift is None else shift.max())


@pytest.mark.parametrize(("given", "silu"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norm_act_matches_float64(emulated, case, dtype, K, given, silu):
    arguments = norm_arguments(case, dtype, K, given)
    y, stats = emulated.norm_act(*arguments, case.groups, 1e-5, silu)
    wanted, wanted_stats = norm_act_ref(*double(*arguments), case.groups, 1e-5, silu)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    # Where a group has no variance to speak of, 1 / sqrt(eps) magnifies what float32 lost.
    magnified = 1 + wanted_stats[..., 1].max() * 3e-1
    assert_near(y, wanted, gain_of(arguments) * magnified)
    assert_near(stats, wanted_stats, wanted_stats.abs() * magnified + 1)

    grad = images(*y.shape, dtype, seed=9)
    got = emulated.norm_act_backward(grad, *arguments, stats, case.groups, silu)
    want = norm_act_backward_ref(*double(grad, *arguments, stats), case.groups, silu)
    size = gain_of(arguments) * stats[..., 1].max().double() * 10
    pixels = case.height * case.width
    assert_near(got[0], want[0], size)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    if case.second:
        assert_near(got[1], want[1], size)
    else:
        assert got[1].shape == (0,)
    assert got[2].dtype == torch.float32
    assert_near(got[2], want[2], (size + 10) * math.sqrt(pixels), tolerance=4e-6)


@pytest.mark.parametrize("order", ["backward", "shuffled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NORMS[:-2], ids=str)
def test_norm_act_does_not_depend_on_split_or_thread_order(emulated, library, case, dtype, order):
    arguments = norm_arguments(case, dtype, K=3, given=True, batch=3)
    grad = images(3, case.first + case.second, case.height, case.width, dtype, seed=9)

    def both(arguments, grad):
        y, stats = emulated.norm_act(*arguments, case.groups, 1e-5, True)
        *of, sums = emulated.norm_act_backward(grad, *arguments, stats, case.groups, True)
        return y, stats, *of[: 1 + (case.second > 0)], sums

    whole = both(arguments, grad)
    library.set_order(ORDERS[order])
    alone = [
        both([None if t is None else t[i : i + 1] for t in arguments], grad[i : i + 1])
        for i in range(3)
    ]
    assert_same_bits(whole, [torch.cat(parts) for parts in zip(*alone, strict=True)])


def test_norm_act_of_any_layout_and_alignment_has_the_same_bits(emulated):
    x, *rest = norm_arguments(Norm(16, 0, 4, 3, 3), torch.bfloat16, 1, True)
    want = emulated.norm_act(x, *rest, 4, 1e-5, True)
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)
    shifted[1:] = x.permute(0, 2, 3, 1).flatten()
    views = [x.contiguous(), shifted[1:].view(2, 3, 3, 16).permute(0, 3, 1, 2)]
    for view in views:
        assert torch.equal(view, x)
        assert_same_bits(emulated.norm_act(view, *rest, 4, 1e-5, True), want)


def test_norm_act_takes_parameters_of_another_dtype(emulated):
    x, skip, *rest = norm_arguments(NORMS[0], torch.bfloat16, 1, True)
    halved = [t.bfloat16() for t in rest]
    assert_same_bits(
        emulated.norm_act(x, skip, *halved, 4, 1e-5, True),
        emulated.norm_act(x, skip, *[t.float() for t in halved], 4, 1e-5, True),
    )


def test_a_nan_stays_in_its_group(emulated):
    x = images(2, 16, 3, 3, torch.float32)
    x[1, 5, 2, 2] = math.nan
    y, _ = emulated.norm_act(x, None, *[torch.ones(1, 16)] * 2, None, None, None, 4, 1e-5, True)
    lost = torch.zeros(2, 16, dtype=torch.bool)
    lost[1, 4:8] = True
    assert torch.equal(y.isnan().flatten(2).all(2), lost)
    assert torch.equal(y.isnan().flatten(2).any(2), lost)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3), (2, 0, 3, 3)], ids=str)
def test_norm_act_of_nothing(emulated, shape):
    x, parameter = torch.empty(shape), torch.ones(1, shape[1])
    y, stats = emulated.norm_act(x, None, parameter, parameter, None, None, None, 4, 1e-5, True)
    assert (y.shape, stats.shape) == (shape, (shape[0], 4, 2))
    dx, _, sums = emulated.norm_act_backward(
        y, x, None, parameter, parameter, None, None, None, stats, 4, True
    )
    assert (dx.shape, sums.shape) == (shape, (shape[0], 3, shape[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 8, 3, 3).double()), "not float64"),
        (dict(x=torch.zeros(2, 8, 3, 3).half()), "x must be float32, bfloat16"),
        (dict(groups=3), "do not fall into 3"),
        (dict(weight=torch.ones(3, 8), bias=torch.ones(3, 8)), "as many of every model"),
        (dict(add=torch.ones(1, 8)), "add must be"),
        (dict(skip=torch.zeros(2, 8, 3, 4)), "skip must have"),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(v),
)
def test_norm_act_refuses(emulated, change, message):
    arguments = dict(
        x=torch.zeros(2, 8, 3, 3), skip=None, weight=torch.ones(1, 8), bias=torch.ones(1, 8),
        add=None, scale=None, shift=None, groups=4, eps=1e-5, silu=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        emulated.norm_act(**{**arguments, **change})


# pruned_conv2d ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    first: int
    second: int
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1


CONVS = [
    Conv(8, 8, 16, (5, 5)),
    Conv(5, 7, 33, (4, 4)),  # scalars throughout
    Conv(12, 4, 8, (5, 4)),  # vectors in float32 only
    Conv(16, 0, 72, (9, 8), stride=2),  # two tiles of outputs, the second ragged
    Conv(72, 8, 8, (3, 3)),  # two tiles of inputs
    Conv(64, 8, 8, (4, 4), kernel=(1, 1), padding=0),
    Conv(33, 0, 5, (6, 5), kernel=(1, 1), stride=2, padding=0),  # pixels that nothing reaches
    Conv(1, 0, 1, (1, 1)),
    Conv(3, 0, 8, (7, 7), stride=2, padding=0),
    Conv(8, 0, 8, (6, 5), kernel=(2, 3), padding=2),
    Conv(8, 0, 8, (5, 7), kernel=(4, 2), stride=3, padding=3),
    Conv(16, 0, 8, (13, 13)),  # several tiles of pixels; the weight's sum in two parts
]


def conv_arguments(case, dtype, K, given):
    """x, skip, weight, bias, residual."""
    B = 2 * K
    x = images(B, case.first, *case.size, dtype)
    skip = images(B, case.second, *case.size, dtype, seed=1) if case.second else None
    weight = random(K, case.outputs, case.first + case.second, *case.kernel, dtype=dtype, seed=2)
    bias = random(K, case.outputs, dtype=dtype, seed=3) if given else None
    height, width = (
        (n + 2 * case.padding - k) // case.stride + 1
        for n, k in zip(case.size, case.kernel, strict=True)
    )
    residual = images(B, case.outputs, height, width, dtype, seed=4) if given else None
    return x, skip, weight, bias, residual


def sizes(arguments):
    return [None if t is None else t.double().abs() for t in arguments]


@pytest.mark.parametrize(("K", "given"), [(1, True), (3, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_convolution_matches_float64(emulated, case, dtype, K, given):
    arguments, how = conv_arguments(case, dtype, K, given), (case.stride, case.padding)
    y = emulated.pruned_conv2d(*arguments, *how)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_near(
        y, pruned_conv2d_ref(*double(*arguments), *how), pruned_conv2d_ref(*sizes(arguments), *how)
    )

    x, skip, weight, *_ = arguments
    of = (images(*y.shape, dtype, seed=9), x, skip, weight)
    got = emulated.pruned_conv2d_backward(*of, *how)
    want = pruned_conv2d_backward_ref(*double(*of), *how)
    size = pruned_conv2d_backward_ref(*sizes(of), *how)
    for name, g, w, s in zip(("dx", "dskip", "dweight"), got, want, size, strict=True):
        assert g.dtype == dtype, name
        assert_near(g, w, s)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[2].is_contiguous()


@pytest.mark.parametrize("order", ["backward", "shuffled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CONVS[1], CONVS[3], CONVS[-1]], ids=str)
def test_convolution_does_not_depend_on_thread_order(emulated, library, case, dtype, order):
    x, skip, weight, bias, residual = conv_arguments(case, dtype, 1, True)
    how = (case.stride, case.padding)

    def both():
        y = emulated.pruned_conv2d(x, skip, weight, bias, residual, *how)
        return y, *emulated.pruned_conv2d_backward(residual, x, skip, weight, *how)

    forward = both()
    library.set_order(ORDERS[order])
    used = [0, 1, 3] if skip is None else [0, 1, 2, 3]
    again = both()
    assert_same_bits([forward[i] for i in used], [again[i] for i in used])


def test_convolution_of_any_layout_and_alignment_is_the_same(emulated):
    case = CONVS[0]
    x, skip, weight, bias, residual = conv_arguments(case, torch.bfloat16, 2, True)
    want = emulated.pruned_conv2d(x, skip, weight, bias, residual, 1, 1)
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)
    shifted[1:] = x.permute(0, 2, 3, 1).flatten()
    view = shifted[1:].view(4, 5, 5, 8).permute(0, 3, 1, 2)
    turned = weight.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)
    assert torch.equal(turned, weight)
    got = emulated.pruned_conv2d(view, skip.contiguous(), turned, bias, residual.contiguous(), 1, 1)
    assert torch.equal(got, want)


def test_convolution_of_nothing(emulated):
    x, weight = torch.empty(0, 8, 3, 3), torch.ones(2, 4, 8, 3, 3)
    y = emulated.pruned_conv2d(x, None, weight, None, None, 1, 1)
    assert y.shape == (0, 4, 3, 3)
    dx, _, dweight = emulated.pruned_conv2d_backward(y, x, None, weight, 1, 1)
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    x, none = torch.ones(2, 0, 3, 3), torch.ones(1, 4, 0, 3, 3)
    bias = random(1, 4)
    y = emulated.pruned_conv2d(x, None, none, bias, None, 1, 1)
    assert torch.equal(y, bias[:, :, None, None].expand(2, 4, 3, 3))
    x, none = torch.ones(2, 8, 3, 3), torch.ones(1, 0, 8, 3, 3)
    y = emulated.pruned_conv2d(x, None, none, None, None, 1, 1)
    assert y.shape == (2, 0, 3, 3)
    dx, _, dweight = emulated.pruned_conv2d_backward(y, x, None, none, 1, 1)
    assert torch.equal(dx, torch.zeros_like(x))
    assert dweight.shape == none.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 8, 3, 3).double()), "must have x's dtype"),
        (dict(x=torch.zeros(2, 8, 3, 3).half(), weight=torch.zeros(1, 4, 8, 3, 3).half()), "takes"),
        (dict(x=torch.zeros(2, 7, 3, 3)), "weight's inputs"),
        (dict(weight=torch.zeros(3, 4, 8, 3, 3)), "as many of every model"),
        (dict(weight=torch.zeros(1, 4, 8, 9, 3)), "fit into"),
        (dict(skip=torch.zeros(2, 8, 3, 4)), "skip must have"),
        (dict(bias=torch.zeros(4)), "bias must be"),
        (dict(residual=torch.zeros(2, 4, 3, 4)), "residual must have"),
        (dict(stride=0), "stride must be"),
        (dict(padding=-1), "padding not"),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(v),
)
def test_convolution_refuses(emulated, change, message):
    arguments = dict(
        x=torch.zeros(2, 8, 3, 3), skip=None, weight=torch.zeros(1, 4, 8, 3, 3), bias=None,
        residual=None, stride=1, padding=1,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        emulated.pruned_conv2d(**{**arguments, **change})


# PyTorch's own view, and the sanitizers' --------------------------------------------------------


@pytest.mark.parametrize("case", [NORMS[0], NORMS[4]], ids=str)
def test_opcheck_norm_act(emulated, case):
    arguments = norm_arguments(case, torch.bfloat16, 1, True)
    checks = ("test_schema", "test_faketensor")
    tail = (case.groups, 1e-5, True)
    torch.library.opcheck(emulated.norm_act.default, (*arguments, *tail), test_utils=checks)
    y, stats = emulated.norm_act(*arguments, *tail)
    backward = (y, *arguments, stats, case.groups, True)
    torch.library.opcheck(emulated.norm_act_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("case", [CONVS[0], CONVS[6]], ids=str)
def test_opcheck_convolution(emulated, case):
    arguments, how = conv_arguments(case, torch.bfloat16, 2, True), (case.stride, case.padding)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(emulated.pruned_conv2d.default, (*arguments, *how), test_utils=checks)
    backward = (arguments[-1], *arguments[:3], *how)
    torch.library.opcheck(emulated.pruned_conv2d_backward.default, backward, test_utils=checks)


@pytest.mark.skipif(LIBRARY in os.environ, reason="this is the run it starts")
def test_no_access_leaves_its_memory(tmp_path):
    """A part of the above once more, where every access to memory is checked."""
    path = tmp_path / "sanitized.so"
    compile_emulation(path, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("g++ has no address sanitizer")
    chosen = "nothing or alignment or (float64 and 1-True and not True-False)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        [*command, "-k", chosen],
        env={
            **os.environ,
            LIBRARY: str(path),
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
