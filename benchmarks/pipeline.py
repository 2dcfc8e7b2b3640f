"""The published pipeline and ours, side by side: a step, an image, a coalition, an answer.

    python benchmarks/pipeline.py --json [--quick]

Published: diffusers' UNet2DModel as it comes, eager fp32, Adam, the loss as in its training
scripts, a long-running average of the weights, DDIM with 100 steps of its own scheduler. Ours:
`training.train` and `sampling.Sampling` as a job runs them. Both on the same pruned UNet, in one
process on one thread, taking turns. `step` is one training step, `image` one sample, each the
median of at least 5 repetitions at a batch of 8; `forward` is one pass of such a batch, also as
inductor compiles it (the ratio is eager's); `coalition` is k steps and N images of the paper's
CIFAR-20 (k 1,000, N 10,240) on those medians; `answer` multiplies by what our estimator saves for
an equal error, as benchmarks/results/estimators.json has it. `bf16` is ours with `precision: bf16`
in training and sampling, `cohort` four coalitions at once, a coalition's share. `memory` is what a
coalition takes at its worst beyond the base model, in a process of its own a side. `--quick`
measures the small shape.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.training_utils import EMAModel
from measure import envelope, interleaved, medians, significant

from attr_batch import log, ops
from attr_batch.counterfactual import SparsifiedFinetune
from attr_batch.fused import fuse, stack
from attr_batch.models import NoiseSchedule, UNet
from attr_batch.pruning import Magnitude
from attr_batch.sampling import Sampling
from attr_batch.training import Ema, train

CHANNELS, SIZE, BATCH, RATIO = 3, 32, 8, 0.5
COHORT = 4
K, IMAGES = 1000, 10_240  # the paper's CIFAR-20
SHAPES = {
    "small": UNet(block_out_channels=(32, 64, 64), norm_num_groups=8),
    "cifar": UNet(
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        attention=(1, "mid"),
        norm_num_groups=32,
    ),
}
SCHEDULE = NoiseSchedule(prediction="epsilon", beta_schedule="linear")
SAMPLING = Sampling(steps=12, images=BATCH, batch=BATCH)
ESTIMATORS = Path(__file__).parent / "results" / "estimators.json"


class Published:
    """A coalition as the paper's scripts compute it."""

    def __init__(
        self, module: torch.nn.Module, images: np.ndarray, device: str = "cpu", batch: int = BATCH
    ) -> None:
        self.device, self.batch = device, batch
        self.module = copy.deepcopy(module).to(device)
        self.images = torch.tensor(images).float().to(device) / 127.5 - 1
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-4)
        self.ema = EMAModel(self.module.parameters(), decay=0.9999, use_ema_warmup=True)
        self.noise: Any = DDIMScheduler(**SCHEDULE.diffusers_config())

    def step(self) -> None:
        """One training step."""
        self.module.train()
        chosen = torch.randint(len(self.images), (self.batch,), device=self.device)
        x0 = self.images[chosen]
        noise = torch.randn_like(x0)
        t = torch.randint(SCHEDULE.timesteps, (self.batch,), device=self.device)
        answer = self.module(self.noise.add_noise(x0, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(answer, noise)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.module.parameters())

    @torch.no_grad()
    def sample(self, steps: int = 100) -> torch.Tensor:
        """One batch of samples by steps of DDIM."""
        self.module.eval()
        self.noise.set_timesteps(steps)
        x = torch.randn(self.batch, CHANNELS, SIZE, SIZE, device=self.device)
        for t in self.noise.timesteps:
            x = self.noise.step(self.module(x, t).sample, t, x).prev_sample
        return x


class Watch(log.Upkeep):
    """Notes when each step ends."""

    def __init__(self, ticks: list[float]) -> None:
        super().__init__()
        self.ticks = ticks

    def tick(self, done: int, total: int, **figures: float) -> bool:  # noqa: ARG002
        """Note the time; never ask for a checkpoint."""
        self.ticks.append(time.perf_counter())
        return False


class Ours:
    """A coalition as a job computes it, by the same functions."""

    def __init__(
        self,
        module: torch.nn.Module,
        images: np.ndarray,
        precision: Literal["fp32", "bf16"] = "fp32",
        models: int = 1,
    ) -> None:
        self.models = models
        self.module = copy.deepcopy(module) if models == 1 else stack([module] * models)
        self.images = images if models == 1 else [images] * models
        self.training = SparsifiedFinetune(
            steps=1_000_000, batch=BATCH, learning_rate=1e-4, precision=precision
        )
        self.sampling = SAMPLING.model_copy(update={"precision": precision})

    def steps(self, count: int) -> list[float]:
        """Take steps and return the seconds of each but the first, a model's share."""
        ticks: list[float] = []

        training = self.training.model_copy(update={"steps": 1 + count})
        ema = Ema(self.module, "short")
        train(self.module, self.images, SCHEDULE, training, seed=1, ema=ema, upkeep=Watch(ticks))
        return list(np.diff(ticks) / self.models)

    def sample(self) -> np.ndarray:
        """Draw one batch of samples."""
        return self.sampling.draw(self.module, SCHEDULE, (CHANNELS, SIZE, SIZE), seed=1)


def subject(name: str) -> tuple[torch.nn.Module, np.ndarray, tuple[int, int]]:
    """Return a shape's pruned module, images to train on, and its multiplications before, after."""
    module = SHAPES[name].build(CHANNELS, SIZE, 0)
    plan = Magnitude(ratio=RATIO).plan(module, CHANNELS, SIZE)
    plan.apply(module)
    images = np.random.default_rng(0).integers(0, 256, (64, CHANNELS, SIZE, SIZE), np.uint8)
    return module, images, plan.macs


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of one shape."""
    module, images, macs = subject(name)
    published = Published(module, images)
    ours = {
        "ours": Ours(module, images),
        "bf16": Ours(module, images, "bf16"),
        "cohort": Ours(module, images, models=COHORT),
    }

    # A step: ours is taken from inside the training loop, which several steps share.
    published.step()
    steps: dict[str, list[float]] = {"published": [], **{side: [] for side in ours}}
    for _ in range(rounds):
        for _ in range(2):
            started = time.perf_counter()
            published.step()
            steps["published"].append(time.perf_counter() - started)
        for side, it in ours.items():
            steps[side] += it.steps(2)
    step = {side: statistics.median(s) for side, s in steps.items()}

    # An image.
    sides: dict[str, Callable[[], object]] = {"published": published.sample}
    sides |= {side: it.sample for side, it in ours.items()}
    drawn = {"published": BATCH, **{side: BATCH * it.models for side, it in ours.items()}}
    image = {
        side: statistics.median(seconds) / drawn[side]
        for side, seconds in interleaved(sides, rounds).items()
    }

    # A forward pass, beside what inductor makes of diffusers' modules.
    forward = forward_seconds(module, rounds, compiled=name != "small")

    coalition = {side: K * step[side] + IMAGES * image[side] for side in step}
    saving = estimator_saving()
    answer = {"published": coalition["published"] * saving, "ours": coalition["ours"]}
    memory = {side: peak_mib(name, side) for side in ("published", "ours")}
    return [
        row(f"{name}/step", step, macs=macs),
        row(f"{name}/image", image),
        row(f"{name}/forward", forward),
        row(f"{name}/coalition", coalition, derived=True, k=K, images=IMAGES),
        row(f"{name}/answer", answer, derived=True, estimator_saving=saving),
        {
            "name": f"{name}/memory",
            **{f"{side}_mib": round(mib) for side, mib in memory.items()},
            "ratio": round(memory["ours"] / memory["published"], 2),
        },
    ]


def peak_mib(name: str, side: str) -> float:
    """Return the memory that a coalition takes on one side, measured in another process."""
    command = [sys.executable, __file__, "--peak", name, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, side: str) -> None:
    """Take a few steps and draw a batch; print by how many MiB memory grew at its worst."""
    module, images, _ = subject(name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status_mib("VmRSS")
    if side == "published":
        published = Published(module, images)
        for _ in range(3):
            published.step()
        published.sample(4)
    else:
        ours = Ours(module, images)
        ours.steps(2)
        ours.sample()
    print(_status_mib("VmHWM") - before)


def _status_mib(field: str) -> float:
    """Return a figure of this process's memory as Linux has it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


@torch.no_grad()
def forward_seconds(module: Any, rounds: int, compiled: bool) -> dict[str, float]:
    """Return each side's median seconds of one forward pass of a batch."""
    x, t = torch.randn(BATCH, CHANNELS, SIZE, SIZE), torch.arange(BATCH)
    network = fuse(module.eval())
    sides = {
        "published": lambda: module(x, t, return_dict=False),
        "ours": lambda: network(x, t),
    }
    if compiled:  # half a minute
        other = copy.deepcopy(module).to(memory_format=torch.channels_last)
        inductor = torch.compile(other)
        x_last = x.contiguous(memory_format=torch.channels_last)
        sides["inductor"] = lambda: inductor(x_last, t, return_dict=False)
    return medians(sides, 3 * rounds)


def row(name: str, seconds: dict[str, float], **facts: Any) -> dict[str, Any]:
    ratio = round(seconds["published"] / seconds["ours"], 2)
    found = {f"{side}_seconds": significant(s) for side, s in seconds.items()}
    if "inductor" in seconds:
        facts["ratio_inductor"] = round(seconds["inductor"] / seconds["ours"], 2)
    return {"name": name, **found, "ratio": ratio, **facts}


def estimator_saving() -> float:
    """Return how many times fewer coalitions an answer of equal error takes (n 20, noise .1).

    The published estimator's 20 n evaluations over the fewest with which ours errs no more.
    """
    rows = json.loads(ESTIMATORS.read_text())["rows"]
    found = {
        (r["estimator"], r["evaluations"]): r["error"]
        for r in rows
        if r["name"].startswith("five games") and r["n"] == 20 and r["nu"] == 0.1
    }
    enough = [
        m for (e, m), error in found.items() if e == "ridge" and error <= found["reference", 400]
    ]
    return 400 / min(enough)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the published pipeline against ours")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="the small shape only")
    parser.add_argument("--peak", nargs=2, metavar=("SHAPE", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if arguments.peak:
        print_peak(*arguments.peak)
        return
    names = ["small"] if arguments.quick else list(SHAPES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers deprecates parts of its own
        rows = [r for name in names for r in measure(name, 5)]
    found = envelope(rows, ops=ops.backend(), threads=1, batch=BATCH, solver=SAMPLING.recipe())
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for r in rows:
        figures = [value for key, value in r.items() if key.endswith(("_seconds", "_mib"))]
        print(f"{r['name']:18} {''.join(f'{v:>10}' for v in figures)} {r['ratio']:>7}x")


if __name__ == "__main__":
    main()
