import functools
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attr_batch import ops
from attr_batch.errors import SpecError
from attr_batch.ops import native as native_seam
from attr_batch.ops import noise

PACKAGE = Path(ops.__file__).parent.parent
# The op as registered (native where it is built), and the definition.
normals = pytest.mark.parametrize("normal", [ops.counter_normal, ops.counter_normal_ref])
steps = pytest.mark.parametrize("solver_step", [ops.solver_step, ops.solver_step_ref])


@pytest.fixture(scope="module")
def native():
    """The information module, which includes the very headers of the kernels."""
    return pytest.importorskip("attr_batch._native_info")


WORD = 0xFFFFFFFF
# counter, key, result: the known answers of Random123 for philox4x32-10.
PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """Philox in Python's own integers, from the paper's description."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & WORD, p0 >> 32 ^ c[3] ^ k[1], p0 & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return tuple(c)


def box_muller(x, y):
    radius = math.sqrt(-2 * math.log((x + 0.5) / 2**32))
    return radius * math.cos(math.tau * y / 2**32), radius * math.sin(math.tau * y / 2**32)


@functools.cache
def exact_normals(ids, elements, seed, step):
    """counter_normal in float64 and Python integers."""
    rows = []
    for i in ids:
        row = []
        for block in range(-(-elements // 4)):
            counter = (block, step, i % 2**32, (i >> 32) % 2**32)
            w = philox(counter, (seed & WORD, seed >> 32))
            row += [*box_muller(*w[:2]), *box_muller(*w[2:])]
        rows.append(row[:elements])
    return np.array(rows).reshape(len(ids), elements)


# Philox and Box-Muller -------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX)
def test_philox_meets_its_known_answers(counter, key, words):
    got = noise._philox4x32_10([torch.tensor(c) for c in counter], key)
    assert tuple(int(w) for w in got) == words
    assert philox(counter, key) == words


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX)
def test_native_philox_meets_its_known_answers(native, counter, key, words):
    assert native.philox4x32_10(list(counter), list(key)) == words


words = st.integers(0, WORD) | st.sampled_from([0, 1, 2**31, 0xAAAAAAAA, 0xAAAAAAAB, WORD])


@settings(deadline=None, max_examples=500)
@given(words, words)
def test_box_muller_is_accurate_for_every_word(native, x, y):
    assert native.box_muller(x, y) == pytest.approx(box_muller(x, y), rel=5e-7, abs=3e-8)


def test_box_muller_is_accurate_at_both_ends(native):
    near_one, near_zero = native.box_muller(WORD, 0), native.box_muller(0, 0)
    assert near_one[0] == pytest.approx(math.sqrt(-2 * math.log1p(-(2.0**-33))), rel=1e-6)
    assert near_zero[0] == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
    quarter_turns = [native.box_muller(0, q << 30) for q in range(4)]
    r = near_zero[0]
    assert quarter_turns == [(r, 0), (0, r), (-r, 0), (0, -r)]


# counter_normal --------------------------------------------------------------------------------

IDS = [0, 1, 2**32, 2**63 - 1, -1]


@normals
@pytest.mark.parametrize("elements", [0, 1, 3, 4, 63, 64, 65, 130])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**63 - 1, 2**32 - 1), (0x123456789ABC, 7)])
def test_normals_match_float64(normal, elements, seed, step):
    got = normal(torch.tensor(IDS), elements, seed, step)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    np.testing.assert_allclose(
        got, exact_normals(tuple(IDS), elements, seed, step), rtol=0, atol=1e-6
    )


@normals
def test_normals_of_no_sample(normal):
    assert normal(torch.empty(0, dtype=torch.int64), 5, 0, 0).shape == (0, 5)


@pytest.mark.skipif(ops.backend() == "reference", reason="the native ops are not built or chosen")
def test_vectors_and_scalars_give_the_same_bits(native):
    """The information module is compiled for the oldest CPU, the kernel takes the widest."""
    seed, step, elements = 0x0123456789ABCDEF, 3, 1000
    got = ops.counter_normal(torch.tensor([9]), elements, seed, step)[0].tolist()
    for block in range(elements // 4):
        w = native.philox4x32_10([block, step, 9, 0], [seed & WORD, seed >> 32])
        pair = native.box_muller(*w[:2]) + native.box_muller(*w[2:])
        assert tuple(got[4 * block : 4 * block + 4]) == pair


def test_normals_are_standard_normal():
    z = ops.counter_normal(torch.arange(200), 1000, 20240407, 5).double().numpy()
    assert scipy.stats.kstest(z.ravel(), "norm").pvalue > 0.01
    n = z.size
    assert abs(z.mean()) < 4 / n**0.5
    assert abs((z**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    # The two normals of a pair, neighbouring pairs, and neighbouring samples are uncorrelated.
    for a, b in [(z[:, 0::2], z[:, 1::2]), (z[:, :-2], z[:, 2:]), (z[:-1], z[1:])]:
        assert abs((a * b).mean()) < 4 / a.size**0.5
        assert abs((a**2 * b**2).mean() - 1) < 4 * (8 / a.size) ** 0.5


def test_streams_differ_in_seed_step_and_id():
    base = dict(ids=3, seed=11, step=2)
    streams = [base, *({**base, k: v + d} for k, v in base.items() for d in (1, 2**31))]
    z = [
        ops.counter_normal(torch.tensor([s["ids"]]), 4000, s["seed"], s["step"])[0] for s in streams
    ]
    for a, b in itertools.combinations(z, 2):
        assert abs((a * b).mean()) < 5 / 4000**0.5


@normals
@settings(deadline=None, max_examples=20)
@given(cut=st.integers(0, 9), elements=st.integers(1, 70), fewer=st.integers(0, 69))
def test_normals_do_not_depend_on_the_split(normal, cut, elements, fewer):
    ids = torch.arange(9) * 1_000_003
    whole = normal(ids, elements, 4, 2)
    parts = [normal(part, elements, 4, 2) for part in (ids[:cut], ids[cut:])]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(normal(ids, min(fewer, elements), 4, 2), whole[:, : min(fewer, elements)])
    assert torch.equal(normal(ids.repeat_interleave(2)[::2], elements, 4, 2), whole)


# solver_step -----------------------------------------------------------------------------------

SHAPES = [
    (3, 4, 8, 8),
    (2, 3, 5, 7),
    (1, 1, 1, 1),
    (2, 1, 4, 4),
    (2, 5, 1, 1),
    (0, 3, 4, 4),
    (2, 3, 37, 41),
]
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "mixed"]


def lay_out(tensor, layout):
    """The same values in another memory layout."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        padded = torch.zeros(*tensor.shape[:3], tensor.shape[3] * 2, dtype=tensor.dtype)
        padded[..., ::2] = tensor
        return padded[..., ::2]
    if layout == "transposed":
        return tensor.transpose(0, 3).contiguous().transpose(0, 3)
    return tensor


def arguments(
    shape=(3, 4, 8, 8), layout="contiguous", dtype=torch.float32, H=2, noise=0.5, clip=1.0
):
    generator = torch.Generator().manual_seed(0)
    sample, output, *history = (torch.randn(shape, generator=generator) for _ in range(2 + H))
    others = "channels_last" if layout == "mixed" else layout
    return dict(
        sample=lay_out(sample, layout),
        model_output=lay_out(output.to(dtype), others),
        history=[lay_out(h, others) for h in history],
        coefficients=torch.tensor([1.1, -0.7, 0.9, 0.3, *[0.25, -0.2, 0.1][:H], noise]),
        sample_ids=torch.arange(shape[0]) + 5,
        seed=77,
        step=3,
        clip=clip,
    )


def exact_step(sample, model_output, history, coefficients, sample_ids, seed, step, clip):
    """The formula in float64, and how far float32 may be from it."""
    k, x = coefficients.double(), sample.double()
    x0 = (k[0] * x + k[1] * model_output.double()).clamp(-clip, clip)
    z = exact_normals(tuple(sample_ids.tolist()), math.prod(sample.shape[1:]), seed, step)
    terms = [k[2] * x, k[3] * x0]
    terms += [k_j * h.double() for k_j, h in zip(k[4:], history, strict=False)]
    terms += [k[-1] * torch.from_numpy(z).view(sample.shape)]
    size = sum(t.abs() for t in terms) + (k[0] * x).abs() + (k[1] * model_output.double()).abs()
    return sum(terms), x0, 4e-7 * size + 1e-6


@steps
@pytest.mark.parametrize("H", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_matches_float64(solver_step, shape, layout, dtype, H):
    a = arguments(shape, layout, dtype, H)
    following, x0 = solver_step(**a)
    wanted, wanted_x0, tolerance = exact_step(**a)
    channels_last = layout == "channels_last" and not a["sample"].is_contiguous()
    for got, want in [(following, wanted), (x0, wanted_x0)]:
        assert got.dtype == torch.float32
        assert got.shape == shape
        memory = torch.channels_last if channels_last else torch.contiguous_format
        assert got.is_contiguous(memory_format=memory)
        assert ((got - want).abs() <= tolerance).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("H", [0, 1, 2, 3])
def test_step_without_noise_has_the_bits_of_its_definition(layout, H):
    a = arguments((3, 3, 37, 41), layout, H=H, noise=0.0)
    got, want = ops.solver_step(**a), ops.solver_step_ref(**a)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@steps
@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(6)), cut=st.integers(0, 6), layout=st.sampled_from(LAYOUTS))
def test_step_does_not_depend_on_the_split_or_order(solver_step, order, cut, layout):
    a = arguments((6, 3, 5, 7), layout)

    def rows(index):
        part = {k: a[k][index] for k in ("sample", "model_output", "sample_ids")}
        return solver_step(**{**a, **part, "history": [h[index] for h in a["history"]]})

    parts = [rows(order[:cut]), rows(order[cut:])]
    for whole, pieces in zip(solver_step(**a), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole[order], torch.cat(pieces))


def test_bits_do_not_depend_on_the_number_of_threads():
    a = arguments((40, 3, 32, 32))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append((*ops.solver_step(**a), ops.counter_normal(a["sample_ids"], 3072, 1, 1)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_noise_follows_logical_order_in_every_layout():
    steps = [ops.solver_step(**arguments((2, 3, 6, 7), layout)) for layout in LAYOUTS]
    for following, x0 in steps[1:]:
        assert torch.equal(following, steps[0][0])
        assert torch.equal(x0, steps[0][1])
    plain = arguments((2, 3, 6, 7), H=0)
    plain["coefficients"] = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    noise = ops.counter_normal(plain["sample_ids"], 126, plain["seed"], plain["step"])
    assert torch.equal(ops.solver_step(**plain)[0], noise.view(2, 3, 6, 7))


@steps
def test_clip_bounds_x0_and_lets_nan_through(solver_step):
    a = arguments((1, 1, 2, 2), H=0, noise=0.0)
    a["sample"] = torch.tensor([[[[10.0, -10.0], [math.nan, 0.25]]]])
    a["model_output"] = torch.zeros(1, 1, 2, 2)
    a["coefficients"] = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    bounded = solver_step(**{**a, "clip": 1.5})[1].flatten()
    torch.testing.assert_close(bounded, torch.tensor([1.5, -1.5, math.nan, 0.25]), equal_nan=True)
    free = solver_step(**{**a, "clip": math.inf})[1].flatten()
    torch.testing.assert_close(free, torch.tensor([10.0, -10.0, math.nan, 0.25]), equal_nan=True)


@steps
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sample=torch.zeros(3, 4, 8, 8).double()), "sample must be float32"),
        (dict(sample=torch.zeros(3, 4, 64)), "shape"),
        (dict(model_output=torch.zeros(3, 4, 8, 7)), "model_output"),
        (dict(model_output=torch.zeros(3, 4, 8, 8).half()), "model_output"),
        (dict(history=[torch.zeros(3, 4, 8, 8)]), "coefficients must be float32 of shape"),
        (dict(history=[torch.zeros(3, 4, 8, 8)] * 4, coefficients=torch.zeros(9)), "at most 3"),
        (dict(history=[torch.zeros(3, 4, 8, 8), torch.zeros(1)]), "history"),
        (dict(coefficients=torch.zeros(7).double()), "coefficients"),
        (dict(sample_ids=torch.arange(2)), "name every sample"),
        (dict(sample_ids=torch.arange(3).int()), "int64"),
        (dict(seed=-1), "seed"),
        (dict(step=2**32), "step"),
        (dict(clip=-1.0), "clip"),
        (dict(clip=math.nan), "clip"),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(v),
)
def test_bad_arguments_are_refused(solver_step, change, message):
    with pytest.raises(RuntimeError, match=message):
        solver_step(**{**arguments(), **change})


@normals
@pytest.mark.parametrize(("elements", "seed", "step"), [(-1, 0, 0), (4, -1, 0), (4, 0, -1)])
def test_bad_keys_are_refused(normal, elements, seed, step):
    with pytest.raises(RuntimeError, match="must be in"):
        normal(torch.arange(2), elements, seed, step)


def test_gradients_are_refused_and_not_dropped():
    a = arguments()
    a["model_output"].requires_grad_()
    with pytest.raises(RuntimeError, match="no derivative"):
        ops.solver_step(**a)
    with torch.no_grad():
        ops.solver_step(**a)


# PyTorch's own view ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 1, 4, 4), (0, 3, 4, 4)], ids=str)
def test_opcheck_step(shape, layout):
    ops.load()
    a = arguments(shape, layout, torch.bfloat16)
    torch.library.opcheck(torch.ops.attr_batch.solver_step.default, tuple(a.values()))


def test_opcheck_normal():
    ops.load()
    torch.library.opcheck(torch.ops.attr_batch.counter_normal.default, (torch.arange(3), 10, 1, 2))


def test_compiled_steps_equal_eager_ones():
    def sample(a, steps):
        x, history = ops.counter_normal(a["sample_ids"], 256, 1, 0).view(-1, 4, 8, 8), []
        for step in steps:
            k = torch.cat((a["coefficients"][: 4 + len(history)], a["coefficients"][-1:]))
            x, x0 = ops.solver_step(x, torch.tanh(x), history, k, a["sample_ids"], 1, step)
            history = [x0, *history[:1]]
        return x

    ops.load()
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    for steps in ([1, 2, 3], [4, 5, 6]):
        assert torch.equal(compiled(arguments(), steps), sample(arguments(), steps))


# Which back end --------------------------------------------------------------------------------


def python(code, package=PACKAGE, **environment):
    """Run code in a fresh interpreter that sees the package at `package`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code]  # looks in the working folder first
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=package.parent, timeout=120
    )


@pytest.fixture
def copied(tmp_path):
    """The package without its native libraries."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "attr_batch", ignore=ignore))


def test_asking_for_the_backend_leaves_torch_out():
    code = "import sys; from attr_batch import ops; ops.backend('cuda:0'); ops.build_info()"
    result = python(f"{code}; print(ops.backend(), 'torch' in sys.modules)", ATTR_BATCH_OPS="auto")
    built = (PACKAGE / "_native_cpu.so").exists()
    assert result.stdout.split() == ["native" if built else "reference", "False"], result.stderr


def test_backend_is_the_file_and_the_environment(tmp_path, monkeypatch):
    library = tmp_path / "_native_cpu.so"
    monkeypatch.setattr(native_seam, "_LIBRARIES", {"cpu": library, "cuda": tmp_path / "absent.so"})
    monkeypatch.delenv("ATTR_BATCH_OPS", raising=False)
    assert ops.backend() == "reference"
    library.touch()
    assert [ops.backend(d) for d in ("cpu", "cuda:1", "mps")] == [
        "native",
        "reference",
        "reference",
    ]
    monkeypatch.setenv("ATTR_BATCH_OPS", "reference")
    assert ops.backend() == "reference"
    monkeypatch.setenv("ATTR_BATCH_OPS", "native")
    assert ops.backend() == "native"
    with pytest.raises(SpecError, match="no native ops for cuda"):
        ops.backend("cuda")
    monkeypatch.setenv("ATTR_BATCH_OPS", "fastest")
    with pytest.raises(SpecError, match="'fastest' is not auto, native or reference"):
        ops.backend()


RUN = """
import torch
from attr_batch import ops
from attr_batch.ops import native as native_seam
from attr_batch.ops import noise
for _ in range(2):
    z = ops.counter_normal(torch.arange(2), 5, 1, 2)
assert torch.equal(z, ops.counter_normal_ref(torch.arange(2), 5, 1, 2))
print(ops.backend(), ops.build_info()["libraries"])
"""

OPCHECK = """
op = torch.ops.attr_batch.counter_normal.default
torch.library.opcheck(op, (torch.arange(2), 5, 1, 2))
"""


def test_without_libraries_the_reference_answers_with_one_warning(copied):
    result = python(RUN + OPCHECK, copied, ATTR_BATCH_OPS="auto")
    assert result.stdout.split() == ["reference", "[]"], result.stderr
    assert result.stderr.count("no native ops for cpu") == 1


def test_the_reference_can_be_chosen_without_a_warning(copied):
    (copied / "_native_cpu.so").write_text("never opened")
    result = python(RUN, copied, ATTR_BATCH_OPS="reference")
    assert result.stdout.split() == ["reference", "['_native_cpu.so']"], result.stderr
    assert result.stderr == ""


def test_native_without_a_library_is_an_error(copied):
    result = python(RUN, copied, ATTR_BATCH_OPS="native")
    assert result.returncode != 0
    assert "_native_cpu.so is missing" in result.stderr
    assert "hint: build with" in result.stderr


@pytest.mark.parametrize("mode", ["auto", "native"])
def test_a_library_that_does_not_load_is_an_error(copied, mode):
    (copied / "_native_cpu.so").write_text("not a library")
    result = python(RUN, copied, ATTR_BATCH_OPS=mode)
    assert result.returncode != 0
    assert "the native ops do not load" in result.stderr
    assert "ATTR_BATCH_OPS=reference" in result.stderr


@pytest.mark.usefixtures("native")
def test_build_information_names_compiler_and_sources():
    build = ops.build_info()["build"]
    assert build["torch_target_version"] == "0x020b000000000000"
    assert "-ffp-contract=off" in build["flags"]
    assert len(build["source_digest"]) == 12
