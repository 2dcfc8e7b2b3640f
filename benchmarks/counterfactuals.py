"""Seconds of a coalition's model and of its samples, for every way a validation compares.

    python benchmarks/counterfactuals.py --json [--quick] [JOB.yaml ...]

The ways are those of the job's `validation` section (default: the digits job's), and
the coalition is half of the contributors. They take turns on one thread in one process, and CPU
seconds are counted: waiting for a busy machine is not in them, and what is left of its slowness
concerns all. `seconds` is the median turn, `model` the derivation alone, `of_retrain` how many
times faster model and samples are than retraining's. The bases are untrained: what a step costs
does not depend on the weights. Retraining takes a tenth of its steps, and its model's seconds are
ten times that.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from estimators import machine  # noqa: E402
from measure import commit  # noqa: E402

from attr_batch.counterfactual import load_base, prepare_dense, prepare_pruned  # noqa: E402
from attr_batch.job import Job  # noqa: E402
from attr_batch.spec import load  # noqa: E402
from attr_batch.studies import Studies  # noqa: E402

JOBS = ["examples/digits/job.yaml"]
SHARE = 10  # retraining's steps are divided by this


def ways(studies: Studies) -> dict[str, tuple[Any, int]]:
    """Return each counterfactual by its label, and by how much its steps were divided."""
    oracle = studies.spec.validation.oracle
    training = oracle.training or studies.spec.model.training
    short = training.model_copy(update={"steps": max(1, training.steps // SHARE)})
    found = {
        studies.label(oracle): (
            oracle.model_copy(update={"training": short}),
            training.steps / short.steps,
        )
    }
    for study in (*studies.steps, *studies.rivals):
        if getattr(study.counterfactual, "ema", "restarted") == "restarted":
            found[studies.label(study.counterfactual)] = (study.counterfactual, 1)
    return found


def untrained(job: Job, folder: Path) -> Any:
    """Return the job's base after one step of training; it reads its weights from `folder`."""
    spec, card, few = job.spec, job.card, {"steps": 1, "warmup": 0}
    training = spec.model.training.model_copy(update=few)
    recovery = spec.pruning.recovery.model_copy(update=few)
    model = spec.model.model_copy(update={"training": training})
    pruning = spec.pruning.model_copy(update={"recovery": recovery})
    images, dense, pruned = job.dataset.images, folder / "dense", folder / "pruned"
    prepare_dense(model, images, dense, seed=0)
    prepare_pruned(model, pruning, images, dense, pruned, seed=0)
    return load_base(spec.model, dense, pruned, card.channels, card.size)


def measure(path: str, turns: int, quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Let every way of one job derive and sample a model in turn; return a row each."""
    job = Job(load(path, [f"store={folder}/store"]))
    spec, studies, data = job.spec, Studies.of(job), job.dataset
    base = untrained(job, folder)
    coalition = studies.compared[0]
    kept = data.subset(coalition).images
    removed = data.subset(coalition.complement()).images
    sampling = spec.sampling.model_copy(update={"images": 8} if quick else {})
    shape = (job.card.channels, job.card.size, job.card.size)
    seconds: dict[str, list[tuple[float, float]]] = {}
    found = ways(studies)
    for turn in range(turns):
        for name, (counterfactual, times) in found.items():
            if quick and "steps" in type(counterfactual).model_fields:
                counterfactual = counterfactual.model_copy(update={"steps": 1})
            gone = removed if counterfactual.unlearns else None
            derived, model = timed(counterfactual.derive, base, kept, gone, seed=turn)
            sampled, _ = timed(sampling.draw, model, base.schedule, shape, 0)
            seconds.setdefault(name, []).append((times * derived, sampled))
    totals = {name: median(a + b for a, b in runs) for name, runs in seconds.items()}
    retrained = totals[studies.label(spec.validation.oracle)]
    return [
        {
            "name": f"{spec.name}: {name}",
            "job": spec.name,
            "counterfactual": name,
            "seconds": round(totals[name], 3),
            "model": round(median(a for a, _ in runs), 3),
            "samples": round(median(b for _, b in runs), 3),
            "of_retrain": round(retrained / totals[name], 2),
            "derived": found[name][1] > 1,
            "turns": turns,
        }
        for name, runs in seconds.items()
    ]


def timed(call: Callable[..., Any], *given: Any, **named: Any) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and what it returned."""
    started = time.process_time()
    result = call(*given, **named)
    return time.process_time() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="one turn of one step")
    parser.add_argument("jobs", nargs="*", default=JOBS, metavar="JOB.yaml")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for job in arguments.jobs:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(job, 1 if arguments.quick else 3, arguments.quick, Path(folder))
    body = {
        "machine": {**machine(), "threads": 1},
        "torch": torch.__version__,
        "commit": commit(),
        "rows": rows,
    }
    if arguments.json:
        print(json.dumps(body, indent=1))
        return
    for row in rows:
        print(
            f"{row['name']:58} model {row['model']:8.2f} s, samples {row['samples']:6.2f} s, "
            f"{row['of_retrain']:6.1f} times retraining"
        )


if __name__ == "__main__":
    main()
