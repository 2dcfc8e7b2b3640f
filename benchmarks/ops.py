"""Time one sampler step: our op, its reference, and the diffusers scheduler's own `step`.

    python benchmarks/ops.py --json [--quick]

One thread; the sides take turns in every round, a round is a whole trajectory of 20 steps with a
model output that is already there. A row holds each side's median seconds of one step; `ratio` is
diffusers' (or torch.randn's) over the op's, `ratio_reference` the definition's over the op's. The
op is handed three earlier x0 whatever the solver, as `sampling` does. Its point is bits that do not
depend on the batch split; time is second. `ops` in the output says which kernels answered, native
or reference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from attr_batch import ops

STEPS = 20
SHAPES = [(512, 1, 8, 8), (64, 3, 32, 32)]
SOLVERS: dict[str, tuple[Any, dict[str, float]]] = {  # scheduler, options of its step
    "ddim": (DDIMScheduler, {}),
    "ddim eta=1": (DDIMScheduler, {"eta": 1.0}),
    "dpmpp": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}

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


def medians(sides: dict[str, Trajectory], rounds: int) -> dict[str, float]:
    """Return each side's median seconds, the sides taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(s) for name, s in seconds.items()}


def row(name: str, shape: tuple[int, ...], found: dict[str, float], calls: int) -> dict[str, Any]:
    library = found["diffusers" if "diffusers" in found else "randn"]
    return {
        "name": f"{name} {'x'.join(map(str, shape))}",
        "shape": shape,
        **{f"{side}_seconds": float(f"{s / calls:.3g}") for side, s in found.items()},
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


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one sampler step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a few seconds")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # diffusers makes numpy of tensors
        rows = measure(5 if arguments.quick else 51)
    found = {
        "machine": machine(),
        "torch": torch.__version__,
        "commit": commit(),
        "ops": ops.backend(),
        "threads": 1,
        "rows": rows,
    }
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for r in rows:
        figures = "  ".join(f"{k} {v:g}" for k, v in r.items() if k not in {"name", "shape"})
        print(f"{r['name']:32} {figures}")


if __name__ == "__main__":
    main()
