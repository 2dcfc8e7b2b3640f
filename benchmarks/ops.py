"""Time our ops beside what a program would call without them.

    python benchmarks/ops.py --json [--quick]

One thread; the sides take turns in every round; a row holds each side's median seconds and the
ratios to the op's. `ops` in the output says which kernels answered, native or reference.

- solver_step, counter_normal: one sampler step beside the diffusers scheduler's own `step`, and
  torch.randn. A round is a whole trajectory of 20 steps with a model output that is already there;
  the op is handed three earlier x0 whatever the solver, as `sampling` does. Its point is bits that
  do not depend on the batch split; time is second. `ratio_reference` compares with the definition.
- norm_act: forward, and forward with backward, beside the same formula run eagerly and compiled by
  inductor (not with --quick: compiling takes minutes), all in channels_last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from measure import envelope, medians, significant
from torch.nn import functional

from attr_batch import ops
from attr_batch.ops.winograd import pays

STEPS = 20
SHAPES = [(512, 1, 8, 8), (64, 3, 32, 32)]
SOLVERS: dict[str, tuple[Any, dict[str, float]]] = {  # scheduler, options of its step
    "ddim": (DDIMScheduler, {}),
    "ddim eta=1": (DDIMScheduler, {"eta": 1.0}),
    "dpmpp": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}

# Own channels, those of a skip connection, and height = width; images.
NORM_SHAPES = [(64, 0, 32), (128, 0, 16), (128, 0, 8), (128, 0, 4), (32, 0, 32), (64, 32, 32)]
NORM_BATCHES = [8, 64]
GROUPS = 8
CONV_SHAPES = [  # batch, inputs, outputs, side
    *((8, 64, 64, 32), (8, 128, 128, 16), (8, 256, 128, 16), (8, 128, 128, 8), (8, 128, 128, 4)),
    *((2, 128, 128, 8), (64, 128, 128, 4), (8, 32, 32, 32), (8, 48, 16, 32), (8, 16, 16, 32)),
    *((64, 24, 24, 8), (64, 12, 12, 8), (8, 3, 64, 32), (8, 64, 3, 32)),
]

Trajectory = Callable[[], object]


def with_op(step: Callable[..., tuple[torch.Tensor, torch.Tensor]], x, output, noise: float):
    ids = torch.arange(len(x))
    k = torch.tensor([1.01, -0.1, 0.9, 0.1, 0.02, -0.01, 0.0, noise])

    def run() -> None:
        sample, earlier = x, [x, x, x]
        for i in range(STEPS):
            sample, x0 = step(sample, output, earlier, k, ids, 1, i, 1.0)
            earlier = [x0, *earlier[:2]]

    return run


def with_scheduler(scheduler: Any, x, output, options: dict[str, float]) -> Trajectory:
    def run() -> None:
        scheduler.set_timesteps(STEPS)
        sample = x
        for t in scheduler.timesteps:
            sample = scheduler.step(output, t, sample, return_dict=False, **options)[0]

    return run


def row(name: str, shape: tuple[int, ...], found: dict[str, float], calls: int) -> dict[str, Any]:
    library = found["diffusers" if "diffusers" in found else "randn"]
    return {
        "name": f"{name} {'x'.join(map(str, shape))}",
        "shape": shape,
        **{f"{side}_seconds": significant(s / calls) for side, s in found.items()},
        "ratio": round(library / found["op"], 2),
        "ratio_reference": round(found["reference"] / found["op"], 2),
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        x, output = torch.randn(shape), torch.randn(shape)
        for name, (scheduler, options) in SOLVERS.items():
            noise = options.get("eta", 0.0)
            sides = {
                "op": with_op(ops.solver_step, x, output, noise),
                "reference": with_op(ops.solver_step_ref, x, output, noise),
                "diffusers": with_scheduler(scheduler(), x, output, options),
            }
            rows.append(row(f"solver_step {name}", shape, medians(sides, rounds), STEPS))
        ids, elements = torch.arange(shape[0]), x[0].numel()
        sides = {
            "op": lambda ids=ids, n=elements: ops.counter_normal(ids, n, 1, 1),
            "reference": lambda ids=ids, n=elements: ops.counter_normal_ref(ids, n, 1, 1),
            "randn": lambda shape=shape: torch.randn(shape),
        }
        rows.append(row("counter_normal", shape, medians(sides, 4 * rounds), 1))
    return rows


def norm_op(x, skip, weight, bias, add):
    return ops.norm_act(x, weight, bias, GROUPS, 1e-5, skip=skip, add=add)


def norm_torch(x, skip, weight, bias, add):
    h = x if skip is None else torch.cat((x, skip), dim=1)
    h = h + add[:, :, None, None]
    return functional.silu(functional.group_norm(h, GROUPS, weight, bias, 1e-5))


def norm_sides(compiled: bool) -> dict[str, Callable[..., torch.Tensor]]:
    sides = {"op": norm_op, "eager": norm_torch}
    if compiled:
        torch.compiler.reset()
        sides["inductor"] = torch.compile(norm_torch, dynamic=False)
    return sides


def norm_row(name: str, shape: tuple[int, ...], found: dict[str, float]) -> dict[str, Any]:
    others = {f"ratio_{side}": round(s / found["op"], 2) for side, s in found.items()}
    del others["ratio_op"]
    seconds = {f"{side}_seconds": significant(s) for side, s in found.items()}
    return {"name": name, "shape": shape, **seconds, **others}


def forward_backward(norm_act, leaves, grad):
    wanted = [t for t in leaves if t is not None]
    return torch.autograd.grad(norm_act(*leaves), wanted, grad)


def norm_inputs(shape: tuple[int, ...], own: int, dtype: torch.dtype) -> list[Any]:
    x, skip = torch.randn(shape).to(dtype).split((own, shape[1] - own), dim=1)
    return [
        x.contiguous(memory_format=torch.channels_last),
        skip.contiguous(memory_format=torch.channels_last) if skip.shape[1] else None,
        *torch.randn(2, shape[1]).to(dtype),
        torch.randn(shape[:2]).to(dtype),
    ]


def measure_norm(rounds: int, compiled: bool) -> list[dict[str, Any]]:
    rows = []
    sizes = itertools.product((torch.float32, torch.bfloat16), NORM_SHAPES, NORM_BATCHES)
    for dtype, (own, others, side), batch in sizes:
        shape = (batch, own + others, side, side)
        width = f"{own}+{others}" if others else str(own)
        name = f"norm_act {str(dtype).removeprefix('torch.')} {batch}x{width}x{side}x{side}"
        sides, inputs = norm_sides(compiled), norm_inputs(shape, own, dtype)
        with torch.inference_mode():
            runs = {k: partial(f, *inputs) for k, f in sides.items()}
            rows.append(norm_row(f"{name} forward", shape, medians(runs, rounds)))
        leaves = [t if t is None else t.requires_grad_() for t in inputs]
        grad = norm_inputs(shape, shape[1], dtype)[0]
        runs = {k: partial(forward_backward, f, leaves, grad) for k, f in sides.items()}
        rows.append(norm_row(f"{name} both", shape, medians(runs, rounds)))
    return rows


def measure_conv(rounds: int) -> list[dict[str, Any]]:
    """Winograd's 3x3 convolution beside oneDNN's, whether or not a job would ask for it."""
    rows = []
    for batch, inputs, outputs, side in CONV_SHAPES:
        x = torch.randn(batch, inputs, side, side).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5
        sides: dict[str, Callable[..., torch.Tensor]] = {
            "op": lambda x, w: ops.conv3x3(x, w[None]),
            "onednn": lambda x, w: functional.conv2d(x, w, padding=1),
        }
        name = f"conv3x3 {inputs} to {outputs}, {batch}x{side}x{side}"
        facts = {"used": pays(x, weight[None])}
        with torch.inference_mode():
            runs = {k: partial(f, x, weight) for k, f in sides.items()}
            found = norm_row(f"{name} forward", tuple(x.shape), medians(runs, rounds))
            rows.append({**found, **facts})
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        grad = torch.randn(batch, outputs, side, side).contiguous(memory_format=torch.channels_last)
        runs = {k: partial(forward_backward, f, leaves, grad) for k, f in sides.items()}
        rows.append({**norm_row(f"{name} both", tuple(x.shape), medians(runs, rounds)), **facts})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Time our ops")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a few seconds")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # diffusers makes numpy of tensors
        rows = measure(5 if arguments.quick else 51)
    rows += measure_conv(5 if arguments.quick else 51)
    rows += measure_norm(5 if arguments.quick else 51, compiled=not arguments.quick)
    found = envelope(rows, ops=ops.backend(), threads=1)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for r in rows:
        figures = "  ".join(
            f"{k} {v:g}" for k, v in r.items() if k not in {"name", "shape", "used"}
        )
        print(f"{r['name']:40} {figures}")


if __name__ == "__main__":
    main()
