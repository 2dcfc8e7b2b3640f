"""`attr-batch validate`: is the attribution right? Retrained models decide.

The job itself, then the studies of a validation in the same ledger and by the same runner: a
validation resumes, is shared by pods and fails as a job does. Who is retrained without the first
ranked can only be planned when the ranks are known, so that is a second round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from attr_batch import runner
from attr_batch.baselines import Baseline, TrainingProperty
from attr_batch.errors import IncompleteDesign, Interrupted
from attr_batch.evidence import Validation
from attr_batch.job import Job, Study
from attr_batch.lds import FEWEST
from attr_batch.log import Progress, Upkeep, say, warn
from attr_batch.properties import Property
from attr_batch.recipe import RECIPE_VERSION, digest
from attr_batch.results import Mirror
from attr_batch.scoring import Readings, ranks, score, to_bytes
from attr_batch.studies import Studies
from attr_batch.validation_report import page

Scores = dict[str, dict[str, dict[str, Any]]]  # by property, by baseline: scores and seconds


def validate(
    job: Job, shard: int = 0, shards: int = 1, provisional: bool = False
) -> Validation | None:
    """Evaluate whatever is missing of a validation, write its report, return validation.json.

    None where other shards have work left. `provisional`: evaluate nothing, report what there is.

    Raises:
        IncompleteDesign: evaluations failed for good, or there is nothing to report yet.
        Others: those of `runner.run`.
    """
    job.check_validation()
    studies = Studies.of(job)
    ranks(Readings(job, studies))  # who is to be ranked: a wrong name is said now
    for at, subsets in enumerate(job.spec.validation.subsets):
        some = studies.subsets(at)
        if len(some) < FEWEST:
            what = f"only {len(some)} coalitions of {some[0].size}, too few for a score"
            warn(f"alpha {subsets.alpha:g}: {what}")
    if provisional and not job.ledger.marked:
        raise IncompleteDesign("nothing has been evaluated yet", str(job.ledger))
    if not provisional:
        done = _work(job, shard, shards)
        if done is None:
            return None
        studies = done
    readings = Readings(job, studies, None, scores(job, studies))
    readings.removal = _removal(readings)
    return publish(readings)


def _work(job: Job, shard: int, shards: int) -> Studies | None:
    """Do the job, its studies, the baselines, then what the ranks ask for; None unless all is done.

    Whichever shard finds a round complete goes on to the next, if need be alone.
    """
    if job.target is not None and runner.run(job, shard, shards) is None:
        return None  # only when it has stopped is it known what counts
    studies = Studies.of(job)
    if not _evaluate(job, studies, None, shard, shards):
        return None
    runner.run(job, shard, shards)
    _score_baselines(job, studies)
    removal = _removal(Readings(job, studies, None, scores(job, studies)))
    if removal is not None and not _evaluate(job, studies, removal, shard, shards):
        return None
    return studies


def _evaluate(job: Job, studies: Studies, removal: Study | None, shard: int, shards: int) -> bool:
    """Do what is missing of the job and the studies; whether all is there then."""
    made = [digest(inputs) for *_, inputs in _wanted(job, studies)]
    wider = Job(job.spec, [*studies, *([removal] if removal else [])], made)
    wider.write_down()
    if runner.complete(wider):
        return True
    missing = len(runner.missing(wider, wider.work))
    say(f"validation of {job.spec.name}: {missing} of {len(wider.work)} evaluations to do")
    with runner.signals() as stopped:
        runner.evaluate(wider, shard, shards, stopped, lambda: None)
    if runner.complete(wider):
        return True
    failed = runner.failures(wider)
    if failed:
        what = f"{len(failed)} evaluations have no value, the first: {failed[0]['message']}"
        hint = "run again: what failed is tried again; or --provisional: report what there is"
        raise IncompleteDesign(what, failed[0]["about"], hint)
    say(f"shard {shard} of {shards} is done; others have work left")
    return False


def _removal(readings: Readings) -> Study | None:
    """Return the retrainings that the headline property's ranks ask for."""
    order = ranks(readings)
    return readings.studies.removal(order) if order else None


def publish(readings: Readings) -> Validation:
    """Write validation.json and validation.html beside the job's report; return the first."""
    found = score(readings)
    job = readings.job
    job.ledger.store.replace(f"{job.report_name}/validation.json", to_bytes(found))
    job.ledger.store.replace(f"{job.report_name}/validation.html", page(found).encode())
    attribution = job.ledger.store.read(f"{job.report_name}/attribution.json")
    if found["complete"]:
        Mirror(job).end("FINISHED", json.loads(attribution) if attribution else None)
    return found


# -- baselines ------------------------------------------------------------------------------------


def scores(job: Job, studies: Studies) -> Scores:
    """Return what has been computed of the baselines."""
    found: Scores = {prop.name: {} for prop in job.spec.properties}
    for prop, name, _, inputs in _wanted(job, studies):
        thing_id = digest(inputs)
        if job.ledger.has_thing("properties", thing_id):
            folder, _ = job.ledger.verified_thing("properties", thing_id)
            manifest = job.ledger.fact(f"properties/{thing_id}/manifest.json") or {}
            text = (folder / "scores.json").read_text(encoding="utf-8")
            found[prop.name][name] = {"scores": json.loads(text), "seconds": manifest["seconds"]}
    return found


def _wanted(
    job: Job, studies: Studies
) -> Iterator[tuple[Property, str, Baseline, Mapping[str, Any]]]:
    """Yield every baseline for every property: its name, and all that its scores depend on."""
    for baseline in job.spec.validation.baselines:
        for prop in job.spec.properties:
            own = isinstance(baseline, TrainingProperty)
            inputs = {
                "recipe_version": RECIPE_VERSION,
                "baseline": baseline.recipe(),
                "property": job.property_digest(prop) if own else None,
                "classifier": "" if job.classified is None else job.instrument_id(job.classified),
                "data": job.card.recipe(),
                "base": job.dense_id,
                "sampling": job.spec.sampling.recipe(),
                "sampling_seed": job.sampling_seed(),
                "numerics": job.alone,
            }
            yield prop, studies.label(baseline), baseline, inputs


def _score_baselines(job: Job, studies: Studies) -> None:
    """Compute what is missing of the baselines, in this process."""
    missing = {
        digest(inputs): (prop, name, baseline, inputs)
        for prop, name, baseline, inputs in _wanted(job, studies)
        if not job.ledger.has_thing("properties", digest(inputs))
    }
    if not missing:
        return
    import torch

    torch.set_num_threads(1)
    lab = runner.Laboratory(job)
    progress = Progress("baselines", len(missing), unit="baseline")
    with runner.signals() as stopped:
        upkeep = Upkeep(stopping=lambda: bool(stopped))
        seen = {p.name: lab.material(p, upkeep) for p in job.spec.properties}  # gradients are kept
        for done, (thing_id, (prop, name, baseline, inputs)) in enumerate(missing.items()):
            progress.update(done, now=name)
            folder = job.ledger.work(f"properties/{thing_id}")
            folder.mkdir(exist_ok=True)
            started = time.perf_counter()
            found = baseline.scores(seen[prop.name])
            (folder / "scores.json").write_text(json.dumps(found.tolist()), encoding="utf-8")
            seconds = time.perf_counter() - started
            job.ledger.publish_thing("properties", thing_id, folder, inputs, seconds)
            if stopped:
                raise Interrupted("stopped by a signal", hint="run the same command again")
    progress.close()
