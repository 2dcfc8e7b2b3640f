"""What `make gpu` measures, part by part; `gpu.py` runs each part in a process of its own.

    python benchmarks/gpu_parts.py PART --rows FILE [--seconds N] [--rehearse]

check: one op (`--op`), once, against its definition in float64.
ops: what the card can do (copying, a bfloat16 matrix product), then each op against what PyTorch
would do instead: eagerly, through inductor, through cuDNN.
pipeline: a training step and an image, as published and as ours with one lever more at a time.
job: a cohort of coalitions of a job of the size of the paper's CIFAR-20.

A row is written to FILE as soon as it is known. Sides take turns, a figure is the median of the
rounds, and when the seconds are up no further round begins.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from measure import significant
from torch.nn.functional import conv2d, group_norm, silu

from attr_batch import graphs, ops
from attr_batch.ops import conv as conv_module

ROUNDS = 7
COMPILING = 45  # with fewer seconds left in a part, nothing is compiled any more
WARM = 5  # steps of a training that are not timed: a graph is captured in the fourth
EPS = 1e-5


@dataclass
class Bench:
    """Where a part runs, for how long, and where its rows go."""

    device: str
    rehearsal: bool
    rows: Path
    until: float
    without: tuple[str, ...] = ()
    ceilings: dict[str, float] = field(default_factory=dict)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.until - time.monotonic()

    def add(self, name: str, **facts: Any) -> None:
        """Write a row down and say it."""
        row = {"name": name, **facts, **({"rehearsal": True} if self.rehearsal else {})}
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)

    def pick(self, real: Any, tiny: Any) -> Any:
        """Return the size for a GPU, or the one for a rehearsal."""
        return tiny if self.rehearsal else real

    def wait(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        """Return how long `run` keeps the device busy."""
        if self.device == "cpu":
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000

    def medians(self, sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        """Return each side's median seconds, the sides taking turns; a first round warms up."""
        found: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(1 + self.pick(rounds, 1)):
            if i > 1 and self.left() < 0:
                break
            for name, run in sides.items():
                seconds = self.seconds(run)
                if i > 0:
                    found[name].append(seconds)
        return {name: statistics.median(s) for name, s in found.items()}


def captured(bench: Bench, run: Callable[[], object]) -> Callable[[], object]:
    """Return what replays `run` as a CUDA graph: what is compared is kernels, not Python."""
    if bench.device == "cpu":
        return run
    return graphs.captured(run)  # each set's results have memory of their own


def compare(
    bench: Bench, sides: Mapping[str, tuple[Callable[..., object], Sequence[tuple[Any, ...]]]]
) -> dict[str, float]:
    """Return each side's median seconds per call, its calls going through several argument sets.

    A side that cannot be captured or compiled is left out, with a word about it.
    """
    runs, calls = {}, {}
    for name, (function, sets) in sides.items():

        def run(function=function, sets=sets) -> object:
            return [function(*arguments) for arguments in sets]

        try:
            runs[name], calls[name] = captured(bench, run), len(sets)
        except Exception as error:  # a compiler's errors are of many kinds
            bench.wait()
            print(f"  {name} left out: {type(error).__name__}: {str(error)[:300]}", flush=True)
    found = bench.medians(runs, ROUNDS)
    return {name: seconds / calls[name] for name, seconds in found.items()}


def sets_of(bench: Bench, size: int, make: Callable[[int], tuple[Any, ...]]) -> list[Any]:
    """Return argument sets that together are several times a cache, given one set's bytes."""
    count = bench.pick(max(2, min(24, (256 << 20) // size)), 1)
    return [make(i) for i in range(count)]


def add_row(
    bench: Bench,
    name: str,
    found: dict[str, float],
    *,
    moved: int = 0,
    operations: int = 0,
    **facts: Any,
) -> None:
    """Write the row of an op: seconds, how many times slower the others are, share of a ceiling."""
    if "ours" not in found:
        bench.add(name, failed="our op could not be run", **facts)
        return
    ours = found["ours"]
    row: dict[str, Any] = {f"{side}_seconds": significant(s) for side, s in found.items()}
    others = {side: round(s / ours, 3) for side, s in found.items() if side != "ours"}
    row |= {f"ratio_{side}": ratio for side, ratio in others.items()}
    if moved:
        row["bytes"] = moved
        if "copy" in bench.ceilings:
            row["share_of_copy"] = round(moved / ours / bench.ceilings["copy"], 3)
    if operations:
        row["operations"] = operations
        if "gemm" in bench.ceilings:
            row["share_of_gemm"] = round(operations / ours / bench.ceilings["gemm"], 3)
    if ops.backend(bench.device) == "reference":
        row["kernels"] = "reference"  # no library: "ours" is the definition
    bench.add(name, **row, **facts)


def normal(bench: Bench, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.randn(*shape, device=bench.device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


# -- check -----------------------------------------------------------------------------------------


def check(bench: Bench, op: str) -> None:
    """Run an op once, forward and backward, against its definition in float64."""
    device = bench.device
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    def exact(t: torch.Tensor) -> torch.Tensor:
        return t.detach().cpu().double()

    def sampler() -> float:
        ids = torch.arange(4, device=device)
        x, k = draw(4, 3, 16, 16).float(), torch.tensor([1.1, -0.7, 0.9, 0.3, 0.5], device=device)
        got = ops.solver_step(x, x.bfloat16(), [], k, ids, 7, 3, 1.0)[0]
        want = ops.solver_step_ref(x.cpu(), x.bfloat16().cpu(), [], k.cpu(), ids.cpu(), 7, 3, 1.0)
        return far(got, want[0].double())

    def norm() -> float:
        x, skip = draw(4, 32, 16, 16), draw(4, 32, 16, 16)
        weight, bias, add = draw(2, 64), draw(2, 64), draw(4, 64)
        tensors: Any = [t.requires_grad_() for t in (x, skip, weight, bias, add)]
        doubles: Any = [exact(t).requires_grad_() for t in tensors]
        got = torch.ops.attr_batch.norm_act(*tensors, None, None, 8, EPS, True)[0]
        definition: Any = ops.norm_act_ref
        want = definition(*doubles, None, None, 8, EPS, True)[0]
        return far_with_gradients(got, want, tensors, doubles)

    def conv() -> float:
        x, skip, residual = draw(4, 64, 16, 16), draw(4, 32, 16, 16), draw(4, 64, 16, 16)
        weight, bias = draw(2, 64, 96, 3, 3) / 30, draw(2, 64)
        tensors: Any = [t.detach().requires_grad_() for t in (x, skip, weight, bias, residual)]
        doubles: Any = [exact(t).requires_grad_() for t in tensors]
        got = torch.ops.attr_batch.pruned_conv2d(*tensors, 1, 1)
        definition: Any = ops.pruned_conv2d_ref
        want = definition(*doubles, 1, 1)
        return far_with_gradients(got, want, tensors, doubles)

    def far(got: torch.Tensor, want: torch.Tensor) -> float:
        error = float((exact(got) - want.detach()).norm() / want.detach().norm())
        return error if math.isfinite(error) else math.inf

    def far_with_gradients(got: Any, want: Any, tensors: Any, doubles: Any) -> float:
        grad = draw(*got.shape)
        mine = torch.autograd.grad(got, tensors, grad)
        theirs = torch.autograd.grad(want, doubles, exact(grad))
        pairs = zip((got, *mine), (want, *theirs), strict=True)
        return max(far(g, w) for g, w in pairs)

    ops.load()
    run, most = {
        "solver_step": (sampler, 1e-5),
        "norm_act": (norm, 1e-2),
        "pruned_conv2d": (conv, 1e-2),
    }[op]
    error = run()
    bench.wait()
    facts = dict(error=significant(error), most=most, kernels=ops.backend(device))
    bench.add(f"check {op}", ok=error <= most, **facts)
    if error > most:
        raise SystemExit(
            f"{op} is wrong: {error:.2g} from its definition, at most {most:g} is right"
        )


# -- ops -------------------------------------------------------------------------------------------


def run_ops(bench: Bench) -> None:
    """Measure the ceilings and the ops, those that are not broken."""
    torch.backends.cudnn.benchmark = True  # the best that cuDNN has
    ops.load()
    ceilings(bench)
    for name, run in {
        "norm_act": norms,
        "solver_step": solver_steps,
        "pruned_conv2d": convolutions,
    }.items():
        if name in bench.without:
            bench.add(name, failed="left out: it did not pass its check")
        else:
            run(bench)


def ceilings(bench: Bench) -> None:
    """Measure what the card can do at most: bytes copied and operations multiplied, per second."""
    size = bench.pick(1 << 30, 1 << 20)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    n = bench.pick(8192, 128)
    a, b = normal(bench, n, n), normal(bench, n, n)
    sides = {"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}
    found = bench.medians(sides, 15)
    bench.ceilings = {"copy": 2 * size / found["copy"], "gemm": 2 * n**3 / found["gemm"]}
    per_second = significant(bench.ceilings["copy"])
    bench.add("ceiling copy", bytes_per_second=per_second, bytes=2 * size)
    per_second = significant(bench.ceilings["gemm"])
    bench.add("ceiling gemm bfloat16", operations_per_second=per_second, size=n)


def compiled(bench: Bench, function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return `function` through inductor, while there is time for its compiler and the rest."""
    if bench.device == "cpu" or bench.left() < COMPILING:
        return None
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


# What a block's norm sees in the pruned CIFAR UNet, batch 128 times a cohort of 4.
NORM_SHAPES = [(512, 64, 32), (512, 128, 16), (512, 128, 8), (512, 128, 4)]


def norms(bench: Bench) -> None:
    cases = [(shape, torch.bfloat16, "add") for shape in NORM_SHAPES]
    cases += [(NORM_SHAPES[0], torch.bfloat16, "skip"), (NORM_SHAPES[0], torch.float32, "add")]
    cases = bench.pick(
        cases, [((2, 16, 4), torch.bfloat16, "add"), ((2, 16, 4), torch.float32, "skip")]
    )
    for shape, dtype, kind in cases:
        one_norm(bench, shape, dtype, kind)


def one_norm(bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype, kind: str) -> None:
    """Forward, backward, and both through autograd, of group norm and SiLU after `kind`."""
    batch, own, pixels = shape
    two = kind == "skip"
    channels, groups = own * (1 + two), bench.pick(32, 4)
    size = batch * channels * pixels**2 * dtype.itemsize

    def make(_: int) -> tuple[torch.Tensor | None, ...]:
        x = normal(bench, batch, own, pixels, pixels, dtype=dtype)
        skip = normal(bench, batch, own, pixels, pixels, dtype=dtype) if two else None
        weight, bias = (normal(bench, channels, dtype=dtype) for _ in range(2))
        add = None if two else normal(bench, batch, channels, dtype=dtype)
        return x, skip, weight, bias, add

    def ours(x: Any, skip: Any, weight: Any, bias: Any, add: Any) -> torch.Tensor:
        return ops.norm_act(x, weight, bias, groups, EPS, skip=skip, add=add)

    def eager(x: Any, skip: Any, weight: Any, bias: Any, add: Any) -> torch.Tensor:
        h = x if skip is None else torch.cat((x, skip), dim=1)
        h = h if add is None else h + add[:, :, None, None]
        return silu(group_norm(h, groups, weight, bias, EPS))

    def trained(function: Callable[..., torch.Tensor]) -> Callable[..., object]:
        def both(grad: torch.Tensor, *arguments: Any) -> object:
            leaves = [t for t in arguments if t is not None]
            return torch.autograd.grad(function(*arguments), leaves, grad)

        return both

    name = f"{batch}x{channels}x{pixels}x{pixels} {str(dtype)[6:]}{' two sources' if two else ''}"
    sets = sets_of(bench, 2 * size, make)
    functions = {"ours": ours, "eager": eager}
    if inductor := compiled(bench, eager):
        functions["inductor"] = inductor
    with torch.no_grad():
        found = compare(bench, {side: (f, sets) for side, f in functions.items()})
    add_row(bench, f"norm_act forward {name}", found, moved=2 * size)

    def keep(i: int) -> tuple[Any, ...]:
        x, skip, weight, bias, add = sets[i % len(sets)]
        affine = (weight[None], bias[None], add, None, None)
        stats = torch.ops.attr_batch.norm_act(x, skip, *affine, groups, EPS, True)[1]
        grad = normal(bench, batch, channels, pixels, pixels, dtype=dtype)
        return grad, x, skip, *affine, stats, groups, True

    with torch.no_grad():
        backward_sets = sets_of(bench, 3 * size, keep)
        backward = {"ours": (torch.ops.attr_batch.norm_act_backward, backward_sets)}
        found = compare(bench, backward)
    add_row(bench, f"norm_act backward {name}", found, moved=3 * size)

    del backward, backward_sets
    training_sets = [
        (
            normal(bench, batch, channels, pixels, pixels, dtype=dtype),
            *(None if t is None else t.detach().requires_grad_() for t in arguments),
        )
        for arguments in sets
    ]
    if inductor := compiled(bench, eager):
        functions["inductor"] = inductor
    else:
        functions.pop("inductor", None)
    sides = {side: (trained(f), training_sets) for side, f in functions.items()}
    add_row(bench, f"norm_act forward and backward {name}", compare(bench, sides), moved=5 * size)


def solver_steps(bench: Bench) -> None:
    """One step of a third-order solver, without noise and with, and the noise alone."""
    batch, pixels = bench.pick((1024, 32), (2, 4))
    elements = 3 * pixels**2
    k = torch.tensor([1.01, -0.1, 0.9, 0.1, 0.02, -0.01, 0.005, 0.0], device=bench.device)
    ids = torch.arange(batch, device=bench.device)

    def make(_: int) -> tuple[Any, ...]:
        shape = (batch, 3, pixels, pixels)
        x, *earlier = (normal(bench, *shape, dtype=torch.float32) for _ in range(4))
        return x, normal(bench, *shape), earlier

    def formula(x: Any, answer: Any, earlier: Any, k: Any, noisy: bool) -> tuple[Any, Any]:
        x0 = (k[0] * x + k[1] * answer.float()).clamp(-1, 1)
        following = k[2] * x + k[3] * x0
        for k_j, m in zip(k[4:7], earlier, strict=True):
            following = following + k_j * m
        return (following + k[7] * torch.randn_like(x) if noisy else following), x0

    size = 4 * batch * elements
    sets = sets_of(bench, 7 * size, make)
    for noisy in (False, True):
        k[7] = 0.1 * noisy
        sides: dict[str, Any] = {
            "ours": lambda x, answer, earlier: ops.solver_step(
                x, answer, earlier, k, ids, 1, 2, 1.0
            ),
            "eager": lambda x, answer, earlier, noisy=noisy: formula(x, answer, earlier, k, noisy),
        }
        if (inductor := compiled(bench, formula)) is not None:
            sides["inductor"] = lambda x, a, e, noisy=noisy, f=inductor: f(x, a, e, k, noisy)
        with torch.no_grad():
            found = compare(bench, {side: (f, sets) for side, f in sides.items()})
        name = f"solver_step {batch}x3x{pixels}x{pixels}{' with noise' if noisy else ''}"
        add_row(bench, name, found, moved=int(6.5 * size))
    found = compare(
        bench,
        {
            "ours": (lambda: ops.counter_normal(ids, elements, 1, 1), [()] * 8),
            "randn": (lambda: torch.randn(batch, elements, device=bench.device), [()] * 8),
        },
    )
    add_row(bench, f"counter_normal {batch}x{elements}", found, moved=size)


# Side in pixels, inputs, outputs, taps: the pruned CIFAR UNet's.
CONVOLUTIONS = [
    (32, 64, 64, 3),
    (16, 128, 128, 3),
    (8, 128, 128, 3),
    (4, 128, 128, 3),
    (8, 256, 128, 1),
]


def convolutions(bench: Bench) -> None:
    for pixels, inputs, outputs, taps in bench.pick(CONVOLUTIONS, [(4, 8, 8, 3), (4, 8, 8, 1)]):
        for models in bench.pick((1, 2, 4, 8), (1, 2)):
            if bench.left() < 0:
                bench.add(f"pruned_conv2d {pixels} px, {models} models", failed="no time was left")
                continue
            one_convolution(bench, pixels, inputs, outputs, taps, models)


def one_convolution(
    bench: Bench, pixels: int, inputs: int, outputs: int, taps: int, models: int
) -> None:
    """K models' convolution, each on its own batch, against as many of cuDNN's."""
    each = bench.pick(128, 2)
    batch, padding = each * models, taps // 2
    op, backward_op = (
        torch.ops.attr_batch.pruned_conv2d,
        torch.ops.attr_batch.pruned_conv2d_backward,
    )

    def make(_: int) -> tuple[Any, ...]:
        x = normal(bench, batch, inputs, pixels, pixels)
        grad = normal(bench, batch, outputs, pixels, pixels)
        weight = normal(bench, models * outputs, inputs, taps, taps) / (taps * inputs**0.5)
        weight = weight.contiguous().view(models, outputs, inputs, taps, taps)
        bias = normal(bench, models, outputs)
        last = torch.channels_last  # each model's weight as cuDNN wants it, made beforehand
        own = [w.contiguous(memory_format=last) for w in weight]
        return x, grad, weight, bias, own

    def cudnn(x: Any, _: Any, __: Any, bias: Any, own: Any) -> object:
        rows = x.chunk(models)
        return [conv2d(r, w, b, 1, padding) for r, w, b in zip(rows, own, bias, strict=True)]

    def cudnn_backward(x: Any, grad: Any, _: Any, __: Any, own: Any) -> object:
        options = (None, [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, [True, True, False])
        return [
            torch.ops.aten.convolution_backward(g, r, w, *options)
            for r, g, w in zip(x.chunk(models), grad.chunk(models), own, strict=True)
        ]

    def definition(x: Any, _: Any, weight: Any, bias: Any, __: Any) -> object:
        return ops.pruned_conv2d_ref(x, None, weight, bias, None, 1, padding)

    size = batch * (inputs + outputs) * pixels**2 * 2
    sets = sets_of(bench, size, make)
    operations = 2 * batch * pixels**2 * inputs * outputs * taps**2
    name = f"{taps}x{taps} {inputs}-{outputs} at {pixels} px, {models} models"
    facts = dict(models=models, pixels=pixels, taps=taps, batch=batch)
    with torch.no_grad():
        forward: dict[str, Any] = {
            "ours": (lambda x, _, w, b, __: op(x, None, w, b, None, 1, padding), sets),
            "cudnn": (cudnn, sets),
            "eager": (definition, sets),
        }
        found = compare(bench, forward)
        add_row(bench, f"pruned_conv2d forward {name}", found, operations=operations, **facts)
        backward: dict[str, Any] = {
            "ours": (lambda x, g, w, _, __: backward_op(g, x, None, w, 1, padding), sets),
            "cudnn": (cudnn_backward, sets),
        }
        found = compare(bench, backward)
        add_row(bench, f"pruned_conv2d backward {name}", found, operations=2 * operations, **facts)


# -- pipeline --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """Ours with these levers; without a lever, what the program would do without it."""

    bf16: bool = True
    fused: bool = True
    graph: bool = True
    models: int = 1
    own_conv: bool = True

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """As a job spells it."""
        return "bf16" if self.bf16 else "fp32"


VARIANTS = {  # one lever more at a time
    "loop": Variant(bf16=False, fused=False, graph=False),
    "bf16": Variant(fused=False, graph=False),
    "fused": Variant(graph=False),
    "graph": Variant(),
    "cohort 2": Variant(models=2),
    "cohort 4": Variant(models=4),
    "cohort 8": Variant(models=8),
    "cohort 4, cuDNN": Variant(models=4, own_conv=False),
}


@contextlib.contextmanager
def levers(variant: Variant) -> Iterator[None]:
    """Take levers away from the program itself, so that what is timed is the program."""
    from attr_batch import sampling, training

    def plain(function: Any, *_: Any) -> Any:
        return function

    without = ["fuse"] * (not variant.fused) + ["Replayed"] * (not variant.graph)
    with contextlib.ExitStack() as stack:
        for module in (training, sampling):
            for name in without:
                stack.enter_context(mock.patch.object(module, name, plain))
        if not variant.own_conv:
            patch = mock.patch.object(conv_module, "_own_kernel", return_value=False)
            stack.enter_context(patch)
        yield


class Subject:
    """A pruned model and its images, in the hands of the published pipeline or of ours."""

    def __init__(self, bench: Bench, shape: str, batch: int, drawn: int, images: int) -> None:
        import numpy as np
        import pipeline

        from attr_batch.models import UNet
        from attr_batch.pruning import Magnitude

        if bench.rehearsal:
            pipeline.SIZE = 8
        tiny = UNet(block_out_channels=(8, 16), norm_num_groups=4)
        unet = bench.pick(pipeline.SHAPES[shape], tiny)
        self.bench, self.batch, self.drawn = bench, batch, drawn
        self.channels, self.size, self.schedule = (
            pipeline.CHANNELS,
            pipeline.SIZE,
            pipeline.SCHEDULE,
        )
        self.module = unet.build(self.channels, self.size, 0)
        self.plan = Magnitude(ratio=0.5).plan(self.module, self.channels, self.size)
        self.plan.apply(self.module)
        random = np.random.default_rng(0)
        shape_ = (images, self.channels, self.size, self.size)
        self.images = random.integers(0, 256, shape_, np.uint8)

    def published(self) -> Any:
        """Return the published pipeline with this model."""
        import pipeline

        return pipeline.Published(self.module, self.images[:1024], self.bench.device, self.batch)

    def cohort(self, models: int) -> torch.nn.Module:
        """Return the model, or a cohort of as many, on the device."""
        from attr_batch.fused import stack

        module = copy.deepcopy(self.module) if models == 1 else stack([self.module] * models)
        return module.to(self.bench.device)

    def train(self, module: torch.nn.Module, variant: Variant, steps: int) -> float:
        """Train, each model on its own images; return the seconds of a step of all."""
        from attr_batch.counterfactual import SparsifiedFinetune
        from attr_batch.training import Ema, train

        half = len(self.images) // 2
        starts = [k * half // variant.models for k in range(variant.models)]
        parts = [self.images[start : start + half] for start in starts]
        watch = watching(self.bench, WARM, WARM + steps)
        training = SparsifiedFinetune(
            steps=WARM + steps,
            batch=self.batch,
            learning_rate=1e-4,
            precision=variant.precision,
        )
        ema = Ema(module, "short")
        images = parts[0] if variant.models == 1 else parts
        train(
            module, images, self.schedule, training,
            seed=1, ema=ema, upkeep=watch, device=self.bench.device,
        )  # fmt: skip
        ema.copy_to(module)
        return watch.between() / steps

    def draw(self, module: torch.nn.Module, variant: Variant, batches: int) -> float:
        """Draw `batches` + 1 batches of every model; return the seconds of an image of all."""
        from attr_batch.sampling import Sampling

        images = (1 + batches) * self.drawn
        watch = watching(self.bench, self.drawn, images)
        sampling = Sampling(
            steps=12,
            images=images,
            batch=self.drawn,
            precision=variant.precision,
        )
        shape = (self.channels, self.size, self.size)
        sampling.draw(module, self.schedule, shape, 1, upkeep=watch, device=self.bench.device)
        return watch.between() / (batches * self.drawn)


def watching(bench: Bench, first: int, last: int) -> Any:
    """Return upkeep that notices when a loop has done `first` and `last`, the device included."""
    from attr_batch import log

    class Watch(log.Upkeep):
        seen: dict[int, float]

        def tick(self, done: int, total: int, **figures: float) -> bool:  # noqa: ARG002
            if done in (first, last) and done not in self.seen:
                bench.wait()
                self.seen[done] = time.perf_counter()
            return False

        def between(self) -> float:
            return self.seen[last] - self.seen[first]

    watch = Watch()
    watch.seen = {}
    return watch


def with_peak(bench: Bench, run: Callable[[], float]) -> tuple[float, int | None]:
    """Return what `run` returns, and the MiB it adds at its worst to what was there before."""
    if bench.device == "cpu":
        return run(), None
    gc.collect()
    bench.wait()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = run()
    bench.wait()
    return found, (torch.cuda.max_memory_allocated() - before) >> 20


K, IMAGES, COALITIONS = 1000, 10_240, 100  # the paper's CIFAR-20, and a full answer


def run_pipeline(bench: Bench) -> None:
    """Measure both shapes, the large one for most of the time."""
    for shape, share in bench.pick({"cifar": 0.65, "small": 1.0}, {"small": 1.0}).items():
        inner = copy.copy(bench)
        inner.until = time.monotonic() + share * bench.left()
        one_pipeline(inner, shape)


def variants(bench: Bench) -> dict[str, Variant]:
    found = VARIANTS
    if "pruned_conv2d" in bench.without:
        found = {
            name: Variant(v.bf16, v.fused, v.graph, v.models, own_conv=False)
            for name, v in found.items()
            if name != "cohort 4, cuDNN"
        }
    return bench.pick(found, {k: v for k, v in found.items() if k in ("bf16", "graph", "cohort 2")})


def one_pipeline(bench: Bench, shape: str) -> None:
    """Let the sides take turns; memory is looked at in the first round, one side at a time."""
    subject = Subject(bench, shape, *bench.pick((128, 256, 4096), (2, 2, 16)))
    steps, batches = bench.pick((10, 2), (2, 1))
    chosen = variants(bench)

    def step_once(name: str) -> float:
        if name == "published":
            return published_step(bench, subject, steps)
        variant = chosen[name]
        with levers(variant):
            return subject.train(subject.cohort(variant.models), variant, steps) / variant.models

    def draw_once(name: str) -> float:
        if name == "published":
            return published_image(bench, subject)
        variant = chosen[name]
        with levers(variant):
            return subject.draw(subject.cohort(variant.models), variant, batches) / variant.models

    found: dict[str, dict[str, list[float]]] = {"step": {}, "image": {}}
    memory: dict[tuple[str, str], int | None] = {}
    names = ["published", *chosen]
    for i in range(bench.pick(5, 1)):
        began = time.monotonic()
        for name in list(names):
            try:
                if bench.left() < 0:
                    raise TimeoutError("no time was left")
                for what, once in {"step": step_once, "image": draw_once}.items():
                    seconds, most = with_peak(bench, functools.partial(once, name))
                    memory.setdefault((what, name), most)
                    found[what].setdefault(name, []).append(seconds)
            except Exception as error:  # out of memory, a graph that cannot be made
                if i == 0:
                    names.remove(name)
                    found["step"].pop(name, None)
                    what = f"{type(error).__name__}: {str(error)[:300]}"
                    bench.add(f"{shape}/step", variant=name, failed=what)
                gc.collect()
        if bench.left() < time.monotonic() - began:
            break
    report(bench, shape, subject, found, memory)


def published_step(bench: Bench, subject: Subject, count: int) -> float:
    """Return the seconds of one of `count` steps, after two that warm up."""
    it = subject.published()
    for _ in range(2):
        it.step()
    bench.wait()
    started = time.perf_counter()
    for _ in range(count):
        it.step()
    bench.wait()
    return (time.perf_counter() - started) / count


def published_image(bench: Bench, subject: Subject) -> float:
    """Return the seconds of an image, drawn by the batch that ours are drawn by."""
    it = subject.published()
    it.batch = subject.drawn
    bench.wait()
    started = time.perf_counter()
    it.sample()
    bench.wait()
    return (time.perf_counter() - started) / subject.drawn


def report(
    bench: Bench,
    shape: str,
    subject: Subject,
    found: dict[str, dict[str, list[float]]],
    memory: dict[tuple[str, str], int | None],
) -> None:
    """Write the rows: a step, an image, a coalition, by variant, per model."""
    median = {
        what: {name: statistics.median(s) for name, s in sides.items()}
        for what, sides in found.items()
    }
    median["coalition"] = {
        name: K * s + IMAGES * median["image"][name] for name, s in median["step"].items()
    }
    for what, sides in median.items():
        published = sides.get("published")
        for name, seconds in sides.items():
            facts: dict[str, Any] = {"ratio": published and round(published / seconds, 2)}
            if what == "coalition":
                peaks = [memory["step", name], memory["image", name]]
                facts |= {"derived": True, "k": K, "images": IMAGES}
                facts["peak_mib"] = None if None in peaks else max(filter(None, peaks), default=0)
            else:
                facts["rounds"] = len(found[what][name])
                facts["batch"] = subject.batch if what == "step" else subject.drawn
                facts["peak_mib"] = memory[what, name]
            bench.add(f"{shape}/{what}", variant=name, seconds=significant(seconds), **facts)


# -- job -------------------------------------------------------------------------------------------


def run_job(bench: Bench, models: int) -> None:
    """A cohort of coalitions from weights to images, in part, beside the published pipeline.

    What does not grow with k or N (stacking, capturing two graphs) is measured too and added once.
    """
    drawn = bench.pick(256, 2)
    subject = Subject(bench, "cifar", *bench.pick((128, drawn, 50_000), (2, drawn, 32)))
    variant = Variant(models=models, own_conv="pruned_conv2d" not in bench.without)
    steps, batches = bench.pick((60, 3), (2, 1))

    def ours() -> dict[str, float]:
        bench.wait()
        started = time.perf_counter()
        with levers(variant):
            module = subject.cohort(models)
            step = subject.train(module, variant, steps)
            image = subject.draw(module, variant, batches)
        bench.wait()
        whole = time.perf_counter() - started
        fixed = max(0.0, whole - steps * step - batches * drawn * image)
        return {"step": step / models, "image": image / models, "fixed": fixed / models}

    def published() -> dict[str, float]:
        step = published_step(bench, subject, bench.pick(15, 1))
        return {"step": step, "image": published_image(bench, subject), "fixed": 0.0}

    found: dict[str, list[dict[str, float]]] = {"published": [], "ours": []}
    for _ in range(bench.pick(6, 1)):
        began = time.monotonic()
        for name, side in {"published": published, "ours": ours}.items():
            found[name].append(side())
        if bench.left() < time.monotonic() - began:
            break
    median = {
        name: {what: statistics.median(a[what] for a in answers) for what in answers[0]}
        for name, answers in found.items()
    }
    facts = dict(models=models, rounds=len(found["ours"]), macs=subject.plan.macs)
    facts |= {"parameters": subject.plan.parameters}
    for what in ("step", "image", "fixed"):
        job_row(bench, f"job/{what}", {n: m[what] for n, m in median.items()}, **facts)
    coalition = {n: m["fixed"] + K * m["step"] + IMAGES * m["image"] for n, m in median.items()}
    facts = dict(derived=True, k=K, images=IMAGES, models=models)
    job_row(bench, "job/coalition", coalition, **facts)
    answer = {name: COALITIONS * seconds for name, seconds in coalition.items()}
    job_row(bench, "job/answer", answer, **facts, coalitions=COALITIONS)


def job_row(bench: Bench, name: str, seconds: dict[str, float], **facts: Any) -> None:
    row: dict[str, Any] = {f"{side}_seconds": significant(s) for side, s in seconds.items()}
    if seconds["ours"] and seconds["published"]:
        row["ratio"] = round(seconds["published"] / seconds["ours"], 2)
    bench.add(name, **row, **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one part of `make gpu`")
    parser.add_argument("part", choices=["check", "ops", "pipeline", "job"])
    parser.add_argument("--rows", type=Path, required=True, help="the file that gets the rows")
    parser.add_argument("--seconds", type=float, default=100, help="begin no round after these")
    parser.add_argument("--models", type=int, default=4, help="the job's cohort")
    parser.add_argument("--op", default="norm_act", help="the op to check")
    parser.add_argument("--without", action="append", default=[], help="an op that is broken")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    arguments = parser.parse_args()
    device = "cpu" if arguments.rehearse else "cuda"
    until = time.monotonic() + arguments.seconds
    bench = Bench(device, arguments.rehearse, arguments.rows, until, tuple(arguments.without))
    torch.manual_seed(0)
    if arguments.rehearse:
        torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers deprecates parts of its own
        match arguments.part:
            case "check":
                check(bench, arguments.op)
            case "ops":
                run_ops(bench)
            case "pipeline":
                run_pipeline(bench)
            case "job":
                run_job(bench, arguments.models)


if __name__ == "__main__":
    main()
