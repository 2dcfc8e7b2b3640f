"""How many images a coalition, and how many at once: `attr-batch pilot`, before a job is fixed.

An evaluation's noise has two sources: training (another seed gives another model) with variance a,
and sampling (other images give another value) with variance b / N. Coalitions share their initial
noise, which takes part of b out of the *differences* that Shapley values are made of; so b is
measured on differences. With t seconds to make a model and u to draw an image, the error for a
given time is proportional to (a + b / N)(t + N u), least at

    N* = sqrt(b t / (a u))

(two-stage sampling: Cochran, Sampling Techniques, 1977, section 10.6). The number of images is part
of the recipe, because entropy and inception score depend on it: choose it once.

One pruned model neither fills a GPU nor outweighs, if it is small, the Python around it. So cohorts
are tried too, each on whole coalitions: of 2, 4, ... while the memory holds them and they are not
much slower.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np

from attr_batch.counterfactual import Finetuning
from attr_batch.errors import AttrBatchError, SpecError
from attr_batch.job import Evaluation, Job, first_cohort
from attr_batch.log import Upkeep, say
from attr_batch.runner import Laboratory, Worker, draw_together

COALITIONS = 6  # each with two training seeds
BLOCKS = 8  # of samples, to see what other samples would give
FEWEST_IMAGES = 8 * BLOCKS
ROUND_TO = 16
COHORTS = (2, 4, 8, 16)
TIMES = 2  # that each is timed: the least counts
HOPELESS = 1.25  # times as slow as the best so far: larger ones are not tried
AS_GOOD = 1.05  # times as slow as the best, but smaller


def pilot(job: Job) -> dict[str, Any]:
    """Evaluate a few coalitions of the plan twice; return what more or fewer images would do.

    Everything shared is made where it is missing (and kept for the job); the evaluations are not
    kept. SpecError if the job draws fewer than `FEWEST_IMAGES` images or has too few coalitions.
    """
    images = job.spec.sampling.images
    if images < FEWEST_IMAGES:
        hint = f"--set sampling.images={FEWEST_IMAGES} or more: a pilot looks at parts of them"
        raise SpecError(f"{images} images are too few for a pilot", "sampling.images", hint)
    written_down, job = job, job.in_cohorts(1)
    chosen = [e for e in job.plan if e.subject == "derived" and e.entry.role == "design"]
    if len(chosen) < COALITIONS:
        hint = f"a pilot evaluates {COALITIONS} coalitions: raise estimator.budget"
        raise SpecError(f"the plan has {len(chosen)} coalitions", "estimator.budget", hint)
    if job.numerics["device"] == "cpu":
        import torch

        torch.set_num_threads(1)  # as in a worker process
    written_down.write_down()
    lab = Laboratory(job)
    Worker(lab, 0, 1, "pilot").prepare(prepares=True)
    runs = []
    for done, evaluation in enumerate(chosen[:COALITIONS], start=1):
        runs.append([_run(lab, e) for e in (evaluation, job.substitute(evaluation, 1))])
        say(f"pilot: {done}/{COALITIONS} coalitions")
    flat = [run for pair in runs for run in pair]
    t = float(np.median([run["finetune"] for run in flat]))
    u = float(np.median([run["sample"] for run in flat])) / images
    properties = [_advise(p.name, runs, images, t, u) for p in job.spec.properties]
    cohorts = try_cohorts(job, t + u * images)
    return {
        "images": images,
        "coalitions": COALITIONS,
        "seconds": {"finetune": t, "per_image": u},
        "properties": properties,
        "recommended": properties[0]["recommended"],
        "cohorts": cohorts,
        "recommended_cohort": _best(cohorts),
    }


def try_cohorts(job: Job, alone: float) -> list[dict[str, Any]]:
    """Return cohorts by size and the seconds that a coalition of the plan takes in each.

    Cohorts that cannot be filled count: `filled` is the share of all places that the plan fills.
    `alone`: what a coalition takes by itself.
    """
    found: list[dict[str, Any]] = [{"cohort": 1, "seconds": alone, "filled": 1.0}]
    for size in COHORTS if isinstance(job.spec.counterfactual, Finetuning) else ():
        larger = job.in_cohorts(size)
        places = Counter(e.place for e in larger.plan if e.cohort > 1)
        filled = places.total() / (size * max(places.values()))
        cohort = first_cohort(e for e in larger.plan if e.cohort > 1)
        if len(cohort) < size:
            break
        lab = Laboratory(larger)
        try:
            times = [_seconds_together(cohort, lab) for _ in range(TIMES)]
        except AttrBatchError as error:
            say(f"pilot: no cohort of {size}: {error}")
            break
        seconds, best = min(times) / filled, min(row["seconds"] for row in found)
        found.append({"cohort": size, "seconds": seconds, "filled": round(filled, 2)})
        say(f"pilot: {seconds:.3g} s a coalition in cohorts of {size}, {100 * filled:.0f} % filled")
        if seconds > HOPELESS * best:
            break
    return found


def _seconds_together(cohort: list[Evaluation], lab: Laboratory) -> float:
    _ = lab.base
    drawn = draw_together(cohort, lab, Upkeep())
    lab.forget(cohort)
    return sum(drawn[0].seconds.values())


def _best(cohorts: list[dict[str, Any]]) -> int:
    """Return the smallest size that is as good as the best."""
    least = min(row["seconds"] for row in cohorts)
    return next(row["cohort"] for row in cohorts if row["seconds"] <= AS_GOOD * least)


def _run(lab: Laboratory, evaluation: Evaluation) -> dict[str, Any]:
    """Return the properties of one model's samples, of all and of each block, and the seconds."""
    drawn = draw_together([evaluation], lab, Upkeep())[0]
    samples = drawn.samples
    lab.forget([evaluation])
    blocks = np.array_split(samples, BLOCKS)
    values = {}
    for prop in lab.job.spec.properties:
        instrument = lab.instrument(prop)
        values[prop.name] = [prop.measure(s, instrument).value for s in (samples, *blocks)]
    return {"values": values, **drawn.seconds}


def _advise(
    name: str, runs: list[list[dict[str, Any]]], images: int, t: float, u: float
) -> dict[str, Any]:
    """Return the two variances of a property and the number of images that uses time best."""
    values = np.array(
        [[run["values"][name] for run in pair] for pair in runs]
    )  # (C, 2, 1 + BLOCKS)
    whole, blocks = values[:, 0, 0], values[:, 0, 1:]  # of (coalition, seed, all and each block)
    pairs = list(itertools.combinations(range(len(blocks)), 2))
    differences = np.array([blocks[i] - blocks[j] for i, j in pairs])
    b = float(np.mean(differences.var(axis=1, ddof=1))) / 2 * (images / BLOCKS)
    alone = float(np.mean(blocks.var(axis=1, ddof=1))) * (images / BLOCKS)
    spread = whole - values[:, 1, 0]
    both = float(np.mean(spread**2)) / 2
    a = max(both - b / images, both / 10)  # what is left is training; six differences know no more
    best = math.sqrt(b * t / (a * u)) if a > 0 and u > 0 else float(images)
    recommended = max(ROUND_TO, math.ceil(best / ROUND_TO) * ROUND_TO)

    def cost(n: float) -> float:
        return (a + b / n) * (t + n * u)

    return {
        "property": name,
        "sd_of_coalitions": float(whole.std(ddof=1)),
        "sd_of_training": math.sqrt(a),
        "sd_of_sampling": math.sqrt(b / images),
        "sd_of_sampling_alone": math.sqrt(alone / images),
        "common_noise_saves": alone / b if b > 0 else None,
        "recommended": recommended,
        "time_for_equal_error": cost(recommended) / cost(images) if cost(images) > 0 else None,
    }


def pilot_text(found: dict[str, Any]) -> str:
    """Return a pilot's findings for a terminal."""
    seconds = found["seconds"]
    lines = [
        f"{found['coalitions']} coalitions, two training seeds each, {found['images']} images; a "
        f"model takes {seconds['finetune']:.2g} s, an image {1e3 * seconds['per_image']:.2g} ms",
        "",
        f"{'property':28} {'coalitions':>10} {'training':>10} {'sampling':>10} {'images':>8} "
        f"{'time':>6}",
    ]
    for row in found["properties"]:
        ratio = row["time_for_equal_error"]
        lines.append(
            f"{row['property']:28} {row['sd_of_coalitions']:>10.3g} {row['sd_of_training']:>10.3g} "
            f"{row['sd_of_sampling']:>10.3g} {row['recommended']:>8} "
            f"{'–' if ratio is None else f'{ratio:.2f}':>6}"
        )
    lines += [
        "",
        "Standard deviations of v(S): between coalitions, between training seeds, and of sampling",
        "in differences; the images that give the least error for the time, and the time for an",
        "equal error beside now. A pilot knows them to some 30 %. In the spec, before all runs:",
        f"sampling.images: {found['recommended']}",
    ]
    each = ", ".join(f"{row['cohort']}: {row['seconds']:.3g} s" for row in found["cohorts"])
    lines.append(f"resources.cohort: {found['recommended_cohort']} (a coalition takes, by {each})")
    return "\n".join(lines)
