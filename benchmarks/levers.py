"""What each lever of speed does to the number: the property, and the Shapley values.

    python benchmarks/levers.py --json [--quick]

The digits job (examples/digits), its coalitions evaluated anew with one lever changed at a time:
solver and steps, bfloat16 in sampling and in training, our fused forward pass against diffusers'
own modules, that in cohorts of four. All share seeds, so a lever's effect is a difference of pairs.
`shift` is the mean over the coalitions of (property with the lever - property of the reference: 100
steps of DDIM, fp32, diffusers' modules), `shift_se` its standard error, `noise` the property's own
standard error, `spread` its standard deviation over the coalitions. `rank` and `moved` compare the
Shapley values: rank correlation, and the largest |difference| over the half-width of the
reference's interval.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import envelope, significant  # noqa: E402

from attr_batch import ops  # noqa: E402
from attr_batch.estimators import Observation, PairedLS  # noqa: E402
from attr_batch.estimators.attribution import spearman  # noqa: E402
from attr_batch.facts import one_thread  # noqa: E402
from attr_batch.job import Job, first_cohort  # noqa: E402
from attr_batch.log import Upkeep  # noqa: E402
from attr_batch.runner import Laboratory, Worker, draw_together  # noqa: E402
from attr_batch.sampling import Sampling  # noqa: E402
from attr_batch.spec import load  # noqa: E402

REFERENCE = "ddim 100"
COHORT = 4
SAMPLINGS: dict[str, dict[str, Any]] = {
    REFERENCE: dict(solver="ddim", steps=100),
    "ddim 20": dict(solver="ddim", steps=20),
    "dpmpp 20": dict(solver="dpmpp", steps=20),
    "dpmpp 12": dict(solver="dpmpp", steps=12),
    "dpmpp 10": dict(solver="dpmpp", steps=10),
    "unipc 10": dict(solver="unipc", steps=10),
    "dpmpp 12, bf16": dict(solver="dpmpp", steps=12, precision="bf16"),
}
TRAININGS: dict[str, dict[str, Any]] = {
    "fused": {},
    "bf16 training": dict(precision="bf16"),
}


@contextlib.contextmanager
def diffusers_modules() -> Iterator[None]:
    """Let diffusers' own modules run, as before there was `fused`."""
    with mock.patch("attr_batch.fused.supported", return_value=False):
        yield


def evaluate(job: Job) -> dict[str, list[dict[str, Any]]]:
    """Return for each lever a record a coalition: its entry, properties, their errors."""
    lab = Laboratory(job)
    Worker(lab, 0, 1, "levers").prepare(prepares=True)
    derived = [e for e in job.plan if e.subject == "derived"]
    found: dict[str, list[dict[str, Any]]] = {}
    own = job.spec.sampling.recipe()

    def record(lever: str, evaluation: Any, model: Any, sampling: Sampling) -> None:
        started = time.perf_counter()
        shape = (job.card.channels, job.card.size, job.card.size)
        seed = evaluation.recipe["sampling_seed"]
        samples = sampling.draw(model, lab.base.schedule, shape, seed)
        seconds = time.perf_counter() - started
        measured = {p.name: p.measure(samples, lab.instrument(p)) for p in job.spec.properties}
        entry = {"entry": evaluation.entry, "measured": measured, "seconds": seconds}
        found.setdefault(lever, []).append(entry)

    for done, evaluation in enumerate(derived, start=1):
        with diffusers_modules():
            model = lab.model([evaluation], Upkeep())
            for lever, changed in SAMPLINGS.items():
                record(lever, evaluation, model, Sampling(**{**own, **changed}))
        plan = evaluation.study.counterfactual
        for lever, changed in TRAININGS.items():
            with mock.patch.object(type(plan), "derive", _with(plan, changed)):
                model = lab.model([evaluation], Upkeep())
            record(lever, evaluation, model, Sampling(**{**own, **SAMPLINGS["dpmpp 12"]}))
        print(f"{done}/{len(derived)} coalitions", file=sys.stderr, flush=True)

    # Four at once: as `fused`, but for what is trained beside.
    lab = Laboratory(job.in_cohorts(COHORT))
    derived = [e for e in lab.job.plan if e.subject == "derived"]
    joining = [e for e in derived if e.cohort > 1]
    drawn = {}
    while joining:
        cohort = first_cohort(joining)
        joining = [e for e in joining if e not in cohort]
        drawn |= zip((e.key for e in cohort), draw_together(cohort, lab, Upkeep()), strict=True)
    for evaluation in derived:
        own = drawn.get(evaluation.key) or draw_together([evaluation], lab, Upkeep())[0]
        measured = {p.name: p.measure(own.samples, lab.instrument(p)) for p in job.spec.properties}
        entry = {"entry": evaluation.entry, "measured": measured, "seconds": own.seconds["sample"]}
        found.setdefault(f"{COHORT} at once", []).append(entry)
    return found


def _with(counterfactual: Any, changed: dict[str, Any]) -> Any:
    """Return `derive` of the same counterfactual with other settings."""
    other = counterfactual.model_copy(update=changed)
    plain = type(counterfactual).derive
    return lambda _self, *arguments, **run: plain(other, *arguments, **run)


def rows(job: Job, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each property and lever."""
    out = []
    n = len(job.card.roster)
    for prop in job.spec.properties:
        values = {
            lever: np.array([r["measured"][prop.name].value for r in records])
            for lever, records in found.items()
        }
        stderr = [r["measured"][prop.name].stderr for r in found[REFERENCE]]
        phi = {lever: attribution(found[lever], prop.name, n) for lever in found}
        half = (np.array(phi[REFERENCE].high) - np.array(phi[REFERENCE].low)) / 2
        for lever, mine in values.items():
            difference = mine - values[REFERENCE]
            moved = np.abs(np.array(phi[lever].values) - np.array(phi[REFERENCE].values))
            out.append(
                {
                    "name": f"{prop.name}: {lever}",
                    "coalitions": len(mine),
                    "mean": significant(float(mine.mean()), 4),
                    "shift": significant(float(difference.mean())),
                    "shift_se": significant(float(difference.std(ddof=1) / len(mine) ** 0.5)),
                    "sd_of_difference": significant(float(difference.std(ddof=1))),
                    "noise": significant(float(np.mean(stderr))),
                    "spread": significant(float(values[REFERENCE].std(ddof=1))),
                    "rank": round(spearman(phi[lever].values, phi[REFERENCE].values), 3),
                    "moved": significant(float((moved / half).max())),
                    "seconds": significant(float(np.median([r["seconds"] for r in found[lever]]))),
                }
            )
    return out


def attribution(records: list[dict[str, Any]], prop: str, n: int) -> Any:
    """Return the Shapley values by paired least squares."""
    seen = [
        Observation(
            r["entry"].coalition,
            r["measured"][prop].value,
            r["entry"].role,
            r["entry"].pair,
            r["entry"].replicate,
        )
        for r in records
    ]
    return PairedLS().estimate(seen, n)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each lever does to the number")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a shortened job: that it runs")
    arguments = parser.parse_args()
    settings = ["estimator.budget=30", "estimator.holdout=0", "tracking.enabled=false"]
    settings += ["resources.cohort=1"]
    if arguments.quick:
        settings += ["model.training.steps=20", "pruning.recovery.steps=10"]
        settings += ["counterfactual.steps=3", "sampling.images=32"]
    with tempfile.TemporaryDirectory() as store, one_thread():
        import torch

        torch.set_num_threads(1)
        job = Job(load(ROOT / "examples/digits/job.yaml", [*settings, f"store={store}"]))
        job.write_down()
        found = rows(job, evaluate(job))
    body = envelope(found, ops=ops.backend(), job="examples/digits", settings=settings)
    if arguments.json:
        print(json.dumps(body, indent=1))
        return
    for r in found:
        print("  ".join(f"{k} {v}" for k, v in r.items()))


if __name__ == "__main__":
    main()
