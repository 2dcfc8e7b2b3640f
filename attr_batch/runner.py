"""The batch runner: do whatever is missing, with any number of shards and worker processes.

`run_one` is the paper's algorithm for one coalition. Around it stands only bookkeeping: a worker
process makes what all coalitions share (trained model, pruned model, fitted instruments), then goes
through its own evaluations of the plan and, when these are done, takes missing ones from the far
end. Workers and shards talk through the ledger alone; a worker is a shard of a shard.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import secrets
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from attr_batch import __version__, outlook, results
from attr_batch.counterfactual import Finetuning
from attr_batch.errors import AttrBatchError, Interrupted, NumericsError, SpecError, StoreError
from attr_batch.estimators.surrogate import DataStatistics
from attr_batch.facts import Agenda
from attr_batch.job import GIVE_UP_AFTER, STATISTICS, SUBSTITUTE, Evaluation, Job, Study
from attr_batch.ledger import ALIVE_SECONDS
from attr_batch.log import OnTick, Progress, Upkeep, say
from attr_batch.properties import Property
from attr_batch.recipe import derive_seed, digest
from attr_batch.report import grid_png
from attr_batch.shapes import LARGEST
from attr_batch.spec import JobSpec
from attr_batch.store import explained
from attr_batch.training import Unseeded

POLL_SECONDS = 0.25
WATCH_SECONDS = 1.0  # at least, between two looks of the parent at how far everything is
AHEAD = 64  # evaluations after the last done one at which it looks
GRID_IMAGES = 64
FATAL = (64, 65, 73, 74)  # exit codes after which no other worker can do better


def run_one(evaluation: Evaluation, lab: Laboratory, upkeep: Upkeep) -> None:
    """Evaluate one coalition: its model, its samples, its properties (Algorithm of Section 3).

    Every step is a function of the recipe alone, so it may be interrupted, repeated or done twice.
    """
    missing = lab.job.missing_properties(evaluation)
    if not missing:
        return
    samples = lab.ledger.samples(evaluation.key)
    if samples is None:
        drawn = lab.drawn.pop(evaluation.key, None) or draw_together([evaluation], lab, upkeep)[0]
        samples = drawn.samples
        lab.keep(evaluation, drawn)
    for prop in missing:
        started = time.perf_counter()
        measured = prop.measure(samples, lab.instrument(prop))  # the utility v(S) and its noise
        lab.publish(evaluation, prop, measured, time.perf_counter() - started)


@dataclass(frozen=True)
class Drawn:
    """A coalition's samples, uint8 (images, channels, size, size), and what they took.

    Seconds by phase; of a cohort each coalition has its share.
    """

    samples: np.ndarray
    seconds: dict[str, float]


def placed(cohort: Sequence[Evaluation]) -> list[Evaluation]:
    """Return a cohort's evaluations by place; the first one also fills what is empty.

    The number of places and its own decide an evaluation's bits; who is in the others does not.
    """
    there = {e.place: e for e in cohort}
    return [there.get(place, cohort[0]) for place in range(cohort[0].cohort)]


def draw_together(cohort: Sequence[Evaluation], lab: Laboratory, upkeep: Upkeep) -> list[Drawn]:
    """Make the models of a cohort, one as a rule, and draw the samples of each.

    Diverged if one is not finite; AttrBatchError if the GPU's memory does not hold them.
    """
    try:
        started = time.perf_counter()
        model = lab.model(cohort, upkeep)  # the counterfactual: k steps on each coalition's data
        trained = time.perf_counter()
        samples = lab.draw(model, cohort, upkeep)
        drawn = time.perf_counter()
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        size = cohort[0].cohort
        what = f"the GPU's memory does not hold a coalition's training, {size} at a time"
        hint = "fewer at a time, fewer resources.workers, or smaller batches need less"
        raise AttrBatchError(what, "resources.cohort", hint) from None
    each = samples if cohort[0].cohort > 1 else [samples]
    spent = {"finetune": trained - started, "sample": drawn - trained}
    seconds = {phase: value / len(cohort) for phase, value in spent.items()}
    return [Drawn(each[e.place], seconds) for e in cohort]


class Diverged(NumericsError):
    """A model or its samples are not finite."""


class Laboratory:
    """What one worker process holds open: data, base models, instruments, and where results go."""

    def __init__(self, job: Job) -> None:
        self.job, self.spec, self.ledger = job, job.spec, job.ledger
        self.device = job.numerics["device"]
        self._instruments: dict[str, Any] = {}
        self.drawn: dict[str, Drawn] = {}  # what a cohort drew and none of it has measured yet

    # -- made once --------------------------------------------------------------------------------

    def things(self) -> list[Thing]:
        """Return what all coalitions share, in the order in which it can be made."""
        job = self.job
        dense = Thing("bases", job.dense_id, "trained model", job.dense_inputs, self._make_dense)
        pruned = Thing(
            "bases", job.pruned_id, "pruned model", job.pruned_inputs, self._make_pruned, dense
        )
        fitted = [
            Thing(
                "properties",
                thing_id,
                type(instrument).__name__,
                job.instrument_inputs(instrument),
                lambda folder, upkeep, it=instrument: it.fit(
                    job.dataset,
                    folder,
                    seed=derive_seed("instrument", self.spec.seed),
                    upkeep=upkeep,
                ),
            )
            for thing_id, instrument in job.instruments.items()
        ]
        by_id = {thing.id: thing for thing in fitted}
        statistics = [
            Thing(
                "properties",
                thing_id,
                f"statistics of {prop.name}",
                job.statistics_inputs(prop),
                lambda folder, _, it=prop: self._make_statistics(it, folder),
                by_id.get(job.instrument_id(prop)),
            )
            for thing_id, prop in job.statistics.items()
        ]
        return [dense, pruned, *fitted, *statistics]

    def _make_statistics(self, prop: Any, folder: Path) -> None:
        """Sum up the training images' statistics by contributor: the surrogate's ingredients."""
        dataset, instrument = self.job.dataset, self.instrument(prop)
        found = prop.statistics(dataset.images, instrument)
        by_contributor = [found[dataset.contributor == i] for i in range(len(dataset.roster))]
        body = DataStatistics.of(by_contributor).to_json()
        (folder / STATISTICS).write_text(json.dumps(body), encoding="utf-8")

    def _make_dense(self, folder: Path, upkeep: Upkeep) -> None:
        from attr_batch.counterfactual import prepare_dense

        prepare_dense(
            self.spec.model,
            self.job.dataset.images,
            folder,
            seed=derive_seed("trained", self.spec.seed),
            upkeep=upkeep,
            device=self.device,
        )

    def _make_pruned(self, folder: Path, upkeep: Upkeep) -> None:
        from attr_batch.counterfactual import prepare_pruned

        prepare_pruned(
            self.spec.model,
            self.spec.pruning,
            self.job.dataset.images,
            self.ledger.verified_thing("bases", self.job.dense_id)[0],
            folder,
            seed=derive_seed("pruned", self.spec.seed),
            upkeep=upkeep,
            device=self.device,
        )

    @cached_property
    def base(self) -> Any:
        """The trained and the pruned model, checked against their digests."""
        from attr_batch.counterfactual import load_base

        self.job.check_cohort()
        dense, self.dense_sha256 = self.ledger.verified_thing("bases", self.job.dense_id)
        pruned, self.pruned_sha256 = self.ledger.verified_thing("bases", self.job.pruned_id)
        card = self.job.card
        return load_base(self.spec.model, dense, pruned, card.channels, card.size, self.device)

    def instrument(self, prop: Property) -> Any:
        """Return what `prop` measures with, or None."""
        thing_id = self.job.instrument_id(prop)
        if thing_id and thing_id not in self._instruments:
            folder, sha256 = self.ledger.verified_thing("properties", thing_id)
            loaded = self.job.instruments[thing_id].load(folder, device=self.device)
            self._instruments[thing_id] = (loaded, sha256)
        return self._instruments[thing_id][0] if thing_id else None

    @cached_property
    def generated(self) -> np.ndarray:
        """Samples of the trained model, as the plan's own reference draws them."""
        (trained,) = (e for e in self.job.plan if e.subject == "trained")
        return self.draw(self.base.reference("trained"), [trained], Upkeep())

    def material(self, prop: Property, upkeep: Upkeep) -> Any:
        """Return what baselines see: the data, the trained model and what it draws."""
        from attr_batch.baselines import Material

        classified = self.job.classified
        return Material(
            dataset=self.job.dataset,
            base=self.base,
            generated=self.generated,
            sampling=self.spec.sampling,
            prop=prop,
            instrument=self.instrument(prop),
            classifier=None if classified is None else self.instrument(classified),
            seed=self.job.sampling_seed(),
            device=self.device,
            upkeep=upkeep,
        )

    # -- for one evaluation -----------------------------------------------------------------------

    def model(self, cohort: Sequence[Evaluation], upkeep: Upkeep) -> Any:
        """Return the evaluation's model, ready to sample from. Diverged if training did.

        Evaluations that join each other give a cohort's models, as many as it has places.
        """
        first = cohort[0]
        if first.subject != "derived":
            return self.base.reference(first.subject, first.recipe.get("seed"))
        counterfactual, dataset = first.study.counterfactual, self.job.dataset
        checkpoint = self.ledger.work(self.checkpoint_name(cohort))
        run: Unseeded = {"checkpoint": checkpoint, "upkeep": upkeep, "device": self.device}
        if first.cohort > 1 and isinstance(counterfactual, Finetuning):
            by_place = placed(cohort)
            images = [dataset.subset(e.entry.coalition).images for e in by_place]
            seeds = [e.recipe["seed"] for e in by_place]
            with _divergence():
                return counterfactual.derive_cohort(self.base, images, seeds, **run)
        coalition, seed = first.entry.coalition, first.recipe["seed"]
        others = coalition.complement()
        removed = dataset.subset(others).images if counterfactual.unlearns else None
        with _divergence():
            return counterfactual.derive(
                self.base, dataset.subset(coalition).images, removed, seed=seed, **run
            )

    def draw(self, model: Any, cohort: Sequence[Evaluation], upkeep: Upkeep) -> np.ndarray:
        """Return uint8 samples (images, channels, size, size), or (K, ...) of a cohort's K models.

        All of the plan begin with the same noise. Diverged if one is not finite.
        """
        card = self.job.card
        seeds = [e.recipe["sampling_seed"] for e in placed(cohort)]
        with _divergence():
            return self.spec.sampling.draw(
                model,
                self.base.schedule,
                (card.channels, card.size, card.size),
                seeds,
                device=self.device,
                upkeep=upkeep,
            )

    def checkpoint_name(self, cohort: Sequence[Evaluation]) -> str:
        """Return the name of a cohort's checkpoint among the work on the way.

        It begins with a run's key, and tells who else is in it.
        """
        keys = sorted(e.key for e in cohort)
        others = f"-{digest(keys)[:12]}" if cohort[0].cohort > 1 else ""
        return f"runs/{keys[0]}{others}.safetensors"

    def forget(self, cohort: Sequence[Evaluation]) -> None:
        """Remove all checkpoints that are named after one of a cohort's runs."""
        keys = {e.key for e in cohort}
        for name in self.ledger.store.children("work/runs"):
            if name[:64] in keys:
                self.ledger.store.discard(f"runs/{name}")

    def keep(self, evaluation: Evaluation, drawn: Drawn) -> None:
        """Publish what `sampling.keep` says, and how the samples came to be."""
        ledger, key, keep = self.ledger, evaluation.key, self.spec.sampling.keep
        samples = drawn.samples
        if keep in ("grid", "all"):
            ledger.store.publish(ledger.grid_name(key), grid_png(samples[:GRID_IMAGES]))
        if keep == "all":
            from safetensors.numpy import save

            data = save({"samples": np.ascontiguousarray(samples)})
            ledger.store.publish(ledger.samples_name(key), data)
        fact = {
            "key": key,
            "recipe": dict(evaluation.recipe),
            "samples_sha256": digest(samples.tobytes()),
            "seconds": drawn.seconds,
            "provenance": self._provenance,
        }
        ledger.publish_fact(ledger.derivation_name(key), fact)
        ledger.store.discard(self.checkpoint_name([evaluation]))

    def publish(
        self, evaluation: Evaluation, prop: Property, measured: Any, seconds: float
    ) -> None:
        """Publish one utility: it exists when it is done."""
        if not np.all(np.abs([measured.value, measured.stderr]) <= LARGEST):  # nor if one is NaN
            what = f"{prop.name} is {measured.value} ± {measured.stderr}"
            raise NumericsError(what, evaluation.title)
        ledger, entry = self.ledger, evaluation.entry
        prop_digest = self.job.property_digest(prop)
        fact = {
            "key": evaluation.key,
            "property": prop.name,
            "property_digest": prop_digest,
            "value": float(measured.value),
            "stderr": float(measured.stderr),
            "entry": {"coalition": str(entry.coalition), "role": entry.role, "index": entry.index},
            "seconds": seconds,
            "provenance": self._provenance,
        }
        ledger.publish_fact(ledger.value_name(evaluation.key, prop.name, prop_digest), fact)

    @cached_property
    def _provenance(self) -> dict[str, Any]:
        import torch

        _ = self.base
        name = torch.cuda.get_device_name() if self.device == "cuda" else _cpu_model()
        return {
            "attr_batch": __version__,
            "torch": torch.__version__,
            "processor": name,
            "capability": torch.backends.cpu.get_cpu_capability() if self.device == "cpu" else "",
            "trained_sha256": self.dense_sha256,
            "pruned_sha256": self.pruned_sha256,
        }


@contextlib.contextmanager
def _divergence() -> Iterator[None]:
    """Tell what a model's own divergence is from a property that cannot be measured."""
    try:
        yield
    except NumericsError as error:
        raise Diverged.of(error.problems) from error


def _stops_all(error: Exception) -> bool:
    """Say whether no coalition will fare better: data, ledger or store, or told to stop."""
    return isinstance(error, AttrBatchError) and not isinstance(error, NumericsError)


@dataclass(frozen=True)
class Thing:
    """Something all coalitions share: where it is published, what it depends on, how to make it."""

    family: str
    id: str
    title: str
    inputs: Any
    make: Callable[[Path, Upkeep], None]
    after: Thing | None = None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


# -- a worker process -----------------------------------------------------------------------------


class Worker:
    """One process's way through the job. `shard` of `shards` counts worker processes.

    It stays until its own part is done, whoever is at it: a part whose owner has gone would be
    nobody's, should a helper die. `waits`: until nobody works on the job any more. With a target
    everyone stays until the batch is done: its values say whether there is another.
    """

    def __init__(
        self, lab: Laboratory, shard: int, shards: int, session: str, waits: bool = False
    ) -> None:
        self.lab, self.job, self.ledger = lab, lab.job, lab.ledger
        self.shard, self.shards, self.session = shard, shards, session
        self.waits = waits or self.job.target is not None
        self.stopped = False
        self.agenda = Agenda(self.job)
        self._began = time.time()
        self._finished: set[str] = set()  # keys that are done or were tried, never to be looked at
        self._queue: deque[Evaluation] = deque()  # what may be next, in order
        self._planned, self._helping = 0, False  # entries of the plan in it; others' parts, too

    def work(self, prepares: bool) -> None:
        """Make what is missing of what all share (or wait for it), then evaluate."""
        self.prepare(prepares)
        while True:
            cohort = self._next_cohort()
            if cohort:
                self._finished |= {e.key for e in cohort}
                self._evaluate(cohort)
            elif any(e.key not in self._finished for e in self._stays_for()):
                # Another process is at them: should it die, we go on.
                self._breathe(self.ledger.store.poll_seconds)
            elif not self.agenda.refresh():
                return

    def _stays_for(self) -> Sequence[Evaluation]:
        """Return what must be done before this worker goes: of a sharded job its own part."""
        work = self.agenda.work
        return work if self.waits else work[self.shard :: self.shards]

    def prepare(self, prepares: bool) -> None:
        """Make what is missing of what all share, or wait for it."""
        things = self.lab.things()
        order = things if self.shard == 0 else things[::-1]
        deadline = time.monotonic() + self.job.spec.resources.base_wait
        if prepares and self._missing(order):
            self.job.check_numbers()
        while missing := self._missing(order):
            ready = [t for t in missing if t.after not in missing] if prepares else []
            if any(self._make(thing) for thing in ready):
                continue
            self._breathe(self.ledger.store.poll_seconds)
            if not prepares and time.monotonic() > deadline:
                raise Interrupted(
                    f"waited {self.job.spec.resources.base_wait:.0f} s for the {missing[0].title}",
                    "resources.base_wait",
                    "shard 0 makes it: see its log, then run again",
                )

    def _missing(self, things: Sequence[Thing]) -> list[Thing]:
        return [t for t in things if not self.ledger.has_thing(t.family, t.id)]

    def _make(self, thing: Thing) -> bool:
        """Make a thing unless another process is at it; True if it was made here."""
        with self.ledger.store.lock(thing.id) as alone:
            if not alone or not self._missing([thing]) or not self.ledger.claim(thing.id, ""):
                return False
            folder = self.ledger.work(f"{thing.family}/{thing.id}")
            folder.mkdir(exist_ok=True)
            for file in folder.iterdir():
                if file.is_symlink():  # what is written under its name would land elsewhere
                    file.unlink()
            with (
                self.ledger.beating(thing.id, thing.title) as beat,
                self._upkeep(beat, f"{thing.family}/{thing.id}") as upkeep,
            ):
                started = time.perf_counter()
                thing.make(folder, upkeep)
                seconds = time.perf_counter() - started
                self.ledger.publish_thing(thing.family, thing.id, folder, thing.inputs, seconds)
        return True

    def _next_cohort(self) -> list[Evaluation]:
        """Claim the next evaluation and, where it is made in a cohort, others to join it."""
        cohort: list[Evaluation] = []
        try:
            while not cohort or len(cohort) < cohort[0].cohort:
                evaluation = self._next(cohort)
                if evaluation is None:
                    break
                cohort.append(evaluation)
        except Interrupted:
            for evaluation in cohort:
                self.ledger.rest(evaluation.key)
            raise
        return cohort

    def _next(self, cohort: Sequence[Evaluation] = ()) -> Evaluation | None:
        """Claim the next evaluation: own ones in order, then what others have not come to.

        It is one that can join the cohort.
        """
        plan = self.agenda.work
        if self._planned != len(plan):
            self._planned, self._helping = len(plan), False
            self._queue = deque(plan[self.shard :: self.shards])
        claimed_by_others: list[Evaluation] = []
        later: list[Evaluation] = []
        try:
            while self._queue or not self._helping:
                if not self._queue:
                    self._queue, self._helping = self._others(plan), True
                    continue
                evaluation = self._queue.popleft()
                if evaluation.key in self._finished:
                    continue
                if not evaluation.joins(cohort):
                    later.append(evaluation)
                    continue
                if self.stopped:
                    self._breathe()
                if self.job.done(evaluation) or self._failed(evaluation):
                    self._finished.add(evaluation.key)
                elif self.ledger.claim(evaluation.key, evaluation.title):
                    return evaluation
                else:
                    claimed_by_others.append(evaluation)
        finally:
            self._queue.extendleft(reversed(later))
            self._queue.extend(claimed_by_others)  # they may die of it
        return None

    def _others(self, plan: Sequence[Evaluation]) -> deque[Evaluation]:
        """Return what is left of other workers' parts, each from its far end, after one survey.

        The next lower worker's comes first: so those who have nothing left to do of their own do
        not all reach for the same evaluation.
        """
        left = [e for e in plan if e.key not in self._finished]
        files = self.job.survey(left)
        self._finished |= {e.key for e in left if self.job.done(e, files)}
        parts = ((self.shard - step) % self.shards for step in range(1, self.shards))
        theirs = (e for part in parts for e in reversed(plan[part :: self.shards]))
        return deque(e for e in theirs if e.key not in self._finished)

    def _failed(self, evaluation: Evaluation) -> bool:
        """Whether somebody tried it in vain since this run began."""
        failure = self.ledger.failure(evaluation.key)
        if failure is None:
            return False
        now = time.time()  # what a clock that was ahead has recorded is not recent
        recent = self._began <= failure.get("time", 0.0) <= now + ALIVE_SECONDS
        return recent or failure.get("session") == self.session

    def _evaluate(self, cohort: Sequence[Evaluation]) -> None:
        """Run a cohort's coalitions, one as a rule, which are ours meanwhile."""
        with contextlib.ExitStack() as claims:
            beats = [claims.enter_context(self.ledger.beating(e.key, e.title)) for e in cohort]
            if len(cohort) > 1:
                self._draw_together(cohort, beats)
            for evaluation, beat in zip(cohort, beats, strict=True):
                self._evaluate_one(evaluation, beat)
            if cohort[0].cohort > 1:
                self.lab.forget(cohort)

    def _draw_together(self, cohort: Sequence[Evaluation], beats: Sequence[OnTick]) -> None:
        """Draw for those of a cohort that have no samples yet.

        What fails for one of them (a model that is not finite makes the cohort's loss so) fails for
        all; then each is left to itself.
        """

        def beat(done: int, total: int, figures: dict[str, float]) -> None:
            for own in beats:
                own(done, total, figures)

        ledger, job = self.ledger, self.job
        undrawn = [e for e in cohort if job.settled(e) is e and ledger.samples(e.key) is None]
        if len(undrawn) < 2:
            return
        try:
            with self._upkeep(beat, self.lab.checkpoint_name(undrawn)) as upkeep:
                drawn = draw_together(undrawn, self.lab, upkeep)
            self.lab.drawn = dict(zip((e.key for e in undrawn), drawn, strict=True))
        except Exception as error:
            if _stops_all(error):
                raise

    def _evaluate_one(self, evaluation: Evaluation, beat: OnTick) -> None:
        """Run one coalition; a failure is recorded and the others go on."""
        try:
            self._run_with_substitutes(evaluation, beat)
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:
            if _stops_all(error):
                raise
            if not isinstance(error, AttrBatchError):
                traceback.print_exc()
            self.ledger.record_failure(evaluation.key, error, self.session, evaluation.title)
            return
        self.ledger.forgive(evaluation.key)

    def _run_with_substitutes(self, evaluation: Evaluation, beat: OnTick) -> None:
        """Repeat once what is not finite; a model that diverges twice gives way to a substitute."""
        current = self.job.settled(evaluation)
        while True:
            with self._upkeep(beat, self.lab.checkpoint_name([current])) as upkeep:
                try:
                    with contextlib.suppress(NumericsError):
                        return run_one(current, self.lab, upkeep)
                    return run_one(current, self.lab, upkeep)
                except Diverged as error:
                    attempt = current.entry.replicate // SUBSTITUTE
                    instead = self.job.substitute(current, attempt + 1)
                    if attempt >= GIVE_UP_AFTER or instead.key == current.key:
                        raise
                    fact = {"key": current.key, "reason": str(error), "next": instead.key}
                    self.ledger.publish_fact(self.ledger.diverged_name(current.key), fact)
                    current = instead

    @contextlib.contextmanager
    def _upkeep(self, beat: OnTick, work: str) -> Iterator[Upkeep]:
        """Give what a long loop calls: it beats, stops with the worker, and keeps checkpoints.

        Those lie at `work`, and are kept for whoever goes on should this process end.
        """
        keep = partial(self.ledger.store.keep, work)
        try:
            with explained(Path("work", work), self.ledger.store.room_hint):
                yield Upkeep(beat, lambda: self.stopped, on_saved=keep)
        except Interrupted:
            keep()
            raise

    def _breathe(self, seconds: float = POLL_SECONDS) -> None:
        last = time.monotonic() + seconds
        while not self.stopped and time.monotonic() < last:
            time.sleep(POLL_SECONDS)
        if self.stopped:
            raise Interrupted("stopped by a signal", hint="run the same command again to go on")


def _worker_process(
    spec: JobSpec,
    studies: Sequence[Study],
    shard: int,
    shards: int,
    session: str,
    prepares: bool,
    waits: bool,
    evaluates: bool,
    errors: Connection,
) -> None:
    """Be one worker process: set up signals and threads, work, send back what went wrong."""
    worker = None

    def stop(*_: object) -> None:
        if worker is not None:
            worker.stopped = True
        else:
            os._exit(Interrupted.exit_code)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sends SIGTERM
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: end with the parent
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before that was set
        sys.exit(Interrupted.exit_code)
    try:
        import torch

        job = Job(spec, studies)
        if job.numerics["device"] == "cpu":
            torch.set_num_threads(1)
        elif not torch.cuda.is_available():
            hint = "install torch for CUDA, or set resources.device: cpu"
            raise SpecError("torch sees no CUDA device", "resources.device", hint)
        worker = Worker(Laboratory(job), shard, shards, session, waits)
        (worker.work if evaluates else worker.prepare)(prepares)
    except Exception as error:
        if not isinstance(error, AttrBatchError):
            traceback.print_exc()
            error = AttrBatchError(f"{type(error).__name__}: {error}", "a worker process")
        with contextlib.suppress(OSError):  # the parent may have been killed
            errors.send(error)
        sys.exit(error.exit_code)


# -- the parent -----------------------------------------------------------------------------------


class Crew:
    """The worker processes of one shard, seen from their parent."""

    def __init__(self, job: Job, shard: int, shards: int, evaluates: bool = True) -> None:
        self.session = secrets.token_hex(8)
        workers = job.workers
        if shards == 1 and prepared(job):
            workers = min(workers, len(missing(job, job.work)))
        context = multiprocessing.get_context("spawn")
        if job.numerics["device"] == "cpu":
            for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
                os.environ[variable] = "1"
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for worker in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (
                job.spec,
                job.studies,
                shard * workers + worker,
                shards * workers,
                self.session,
                shard == 0,
                shards == 1,
                evaluates,
                sender,
            )
            process = context.Process(target=_worker_process, args=arguments)
            process.start()
            sender.close()
            self._pipes.append(receiver)
            self._processes.append(process)

    @property
    def working(self) -> bool:
        """Whether a worker is still at work."""
        return any(process.is_alive() for process in self._processes)

    @property
    def hopeless(self) -> bool:
        """Whether a worker met what stops all others too: bad data, a damaged or full store."""
        return any(process.exitcode in FATAL for process in self._processes)

    def stop(self) -> None:
        """Ask every worker to write a checkpoint and end."""
        for process in self._processes:
            if process.is_alive():
                process.terminate()

    def end(self) -> AttrBatchError | None:
        """Wait for the workers; return the gravest error that one of them met."""
        found: list[AttrBatchError] = []
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            if pipe.poll():
                with contextlib.suppress(EOFError):
                    found.append(pipe.recv())
                    continue
            if process.exitcode:
                code = process.exitcode
                what = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
                hint = "out of memory? fewer resources.workers need less; then run again"
                found.append(AttrBatchError(what, "a worker process", hint))
        found.sort(key=lambda error: (isinstance(error, Interrupted), error.exit_code not in FATAL))
        return found[0] if found else None


def evaluate(
    job: Job,
    shard: int,
    shards: int,
    stopped: list[int],
    on_poll: Callable[[], None],
    evaluates: bool = True,
) -> None:
    """Do whatever this shard finds missing, showing progress; raise what went wrong.

    With `evaluates` False only what all coalitions share. `on_poll` is called a few times a second.
    The workers are stopped once `stopped` holds a signal.
    """
    crew = Crew(job, shard, shards, evaluates)
    watch = _Watch(job, shard, shards)
    try:
        while crew.working:
            time.sleep(POLL_SECONDS)
            if stopped or crew.hopeless:
                crew.stop()
            watch.show()
            on_poll()
    finally:
        crew.stop()
        error = crew.end()
        if not crew.hopeless:  # a store that is away is not waited for once more
            watch.show(now=True)
        watch.close()
    if stopped:
        raise Interrupted("stopped by a signal", hint="run the same command again to go on")
    if error is not None and not complete(job):
        raise error
    mine = [f for f in failures(job) if f.get("session") == crew.session]
    if shards > 1 and len(mine) > job.spec.estimator.max_failed:
        what = f"{len(mine)} evaluations of this shard failed, the first: {mine[0]['message']}"
        raise NumericsError(what, mine[0]["about"], "run again: what failed is tried again")


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C in the list given, instead of dying of them."""
    caught: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Watch:
    """Shows, from the ledger alone, how far everything is; of a sharded job the shard's part."""

    def __init__(self, job: Job, shard: int, shards: int) -> None:
        self.job, self._shard, self._shards = job, shard, shards
        self._seconds = max(WATCH_SECONDS, job.ledger.store.poll_seconds)
        self._missing_things = Laboratory(job).things()
        self._things = len(self._missing_things)
        self._agenda = Agenda(job)
        self._part = part(self._agenda.work, job.workers, shard, shards)
        self._missing = missing(job, self._part)
        self._progress: Progress | None = None
        self._last = 0.0

    def show(self, now: bool = False) -> None:
        if not now and time.monotonic() - self._last < self._seconds:
            return
        self._last = time.monotonic()
        ledger = self.job.ledger
        if self._missing_things:
            self._missing_things = [
                t for t in self._missing_things if not ledger.has_thing(t.family, t.id)
            ]
            doing = [beat for t in self._missing_things if (beat := ledger.heartbeat(t.id))]
            figures = {b.phase: f"{b.done}/{b.total}" for b in doing if b.total}
            made = self._things - len(self._missing_things)
            self._update("prepare", "thing", made, self._things, figures)
            return
        if self._agenda.refresh():
            self._part = part(self._agenda.work, self.job.workers, self._shard, self._shards)
            self._missing = self._part
        self._look(everywhere=now)
        total = len(self._part)
        self._update(self._label(), "coalition", total - len(self._missing), total, {})

    def _look(self, everywhere: bool) -> None:
        """Look what has been done since; at the next ones only, for a part is done in its order."""
        left: list[Evaluation] = []
        while self._missing and (everywhere or not left):
            ahead, self._missing = self._missing[:AHEAD], self._missing[AHEAD:]
            left += missing(self.job, ahead)
        self._missing = [*left, *self._missing]

    def _label(self) -> str:
        at = self._agenda.stopping
        return "evaluate" if at is None else f"evaluate, batch {at.batches} of at most {at.planned}"

    def _update(
        self, label: str, unit: str, done: int, total: int, figures: dict[str, Any]
    ) -> None:
        if self._progress is None or self._progress.label != label:
            self.close()
            self._progress = Progress(label, total, unit=unit)
        self._progress.update(done, **figures)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None


def run(
    job: Job, shard: int = 0, shards: int = 1, provisional: bool = False
) -> dict[str, Any] | None:
    """Do whatever is missing of a job, or of one shard of it; report when the plan is complete.

    Returns attribution.json; of a shard None where others have work left or have reported.

    Raises:
        Interrupted: stopped by a signal; checkpoints are written.
        NumericsError: evaluations failed for good and the spec allows no such gap.
    """
    started = time.monotonic()
    own = part(Agenda(job).work, job.workers, shard, shards)
    left = missing(job, own)
    found = frozenset(e.key for e in own) - {e.key for e in left}
    session, report = None, f"{job.report_name}/{results.PAGE}"
    why = outlook.reasons(job) if shard == 0 else None
    job.write_down(compare=shard == 0)
    mirror = results.Mirror(job) if shard == 0 else None
    with signals() as stopped:
        try:
            if shards > 1 and not left and job.ledger.store.exists(report):
                say(f"shard {shard} of {shards} has nothing to do: the report is written")
                return None
            if left or not complete(job):
                announce(job, shard, shards, why)
                evaluate(job, shard, shards, stopped, mirror.follow if mirror else lambda: None)
                session = results.Session(time.monotonic() - started, found)
            if shards > 1 and not provisional and _others_at_work(job):
                say(f"shard {shard} of {shards} is done; others have work left")
                if mirror is not None:
                    mirror.sync(None)
                return None
            with _reporting(job, shards, stopped) as ours:
                if not ours:
                    say(f"shard {shard} of {shards} is done; another writes the report")
                    return None
                attribution = results.publish(job, provisional, session)
        except BaseException as error:
            told_to_go = isinstance(error, Interrupted)
            if mirror is None and isinstance(error, AttrBatchError) and not told_to_go:
                mirror = results.Mirror(job)  # shard 0, which writes it, may have ended long ago
            if mirror is not None:
                brief = told_to_go or isinstance(error, StoreError)  # which cannot be read, either
                mirror.end("KILLED" if told_to_go else "FAILED", brief=brief)
            raise
        # Whoever completes the plan also completes the mirror: shard 0 may have ended long ago.
        (mirror or results.Mirror(job)).end("FINISHED", attribution)
    return attribution


def part(work: Sequence[Evaluation], workers: int, shard: int, shards: int) -> Sequence[Evaluation]:
    """Return the evaluations that are a shard's own, in the order of the plan."""
    mine = range(shard * workers, (shard + 1) * workers)
    return [e for i, e in enumerate(work) if i % (shards * workers) in mine]


def missing(job: Job, work: Sequence[Evaluation]) -> list[Evaluation]:
    """Return which of these evaluations have not all their values."""
    files = job.survey(work)
    return [e for e in work if not job.done(e, files)]


def failures(job: Job) -> list[dict[str, Any]]:
    """Return what went wrong the last time with evaluations that are not done since."""
    failed = job.ledger.failed()
    tried = [e for e in Agenda(job).work if e.key in failed]
    return [f for e in missing(job, tried) if (f := job.ledger.failure(e.key)) is not None]


def prepare(job: Job) -> None:
    """Make what is missing of what all coalitions share, and evaluate nothing.

    Raises:
        Interrupted: stopped by a signal; checkpoints are written.
    """
    job.write_down()
    with signals() as stopped:
        if not prepared(job):
            evaluate(job, 0, 1, stopped, lambda: None, evaluates=False)
    say(f"{job.spec.name}: all that the coalitions share is there; store {job.ledger}")


def complete(job: Job) -> bool:
    """Return whether everything shared is made and every evaluation that counts has its values."""
    return prepared(job) and not missing(job, Agenda(job).work)


def prepared(job: Job) -> bool:
    """Return whether everything shared is made."""
    return all(job.ledger.has_thing(family, thing_id) for family, thing_id in job.things)


def _others_at_work(job: Job) -> bool:
    """Return whether some missing evaluation has not failed, or is tried again now."""
    left, failed = missing(job, Agenda(job).work), job.ledger.failed()
    return any(e.key not in failed or job.ledger.heartbeat(e.key) for e in left)


@contextlib.contextmanager
def _reporting(job: Job, shards: int, stopped: list[int]) -> Iterator[bool]:
    """Say that this shard writes the report; False once another has: it would be the same.

    While another is at it, wait: should that one die, nobody else would write it.
    """
    name = f"report-{job.identity}"
    while shards > 1 and not job.ledger.claim(name, "report"):
        if job.ledger.store.exists(f"{job.report_name}/{results.PAGE}"):
            yield False
            return
        if stopped:
            raise Interrupted("stopped by a signal", hint="run the same command again to go on")
        time.sleep(job.ledger.store.poll_seconds)
    with job.ledger.beating(name, "report") if shards > 1 else contextlib.nullcontext():
        yield True


def announce(job: Job, shard: int, shards: int, why: dict[str, Any] | None) -> None:
    """Say what there is to do, and which paths of the spec made it new."""
    work = part(job.work, job.workers, shard, shards)
    most = "" if job.target is None else "at most "
    what = f"{most}{len(missing(job, work))} of {len(work)} evaluations to do"
    whose = "" if shards == 1 else f", shard {shard} of {shards}"
    say(f"{job.spec.name}{whose}: {what}; store {job.ledger}")
    if why is not None:
        for line in (*outlook.continued_text(outlook.continued(job)), *outlook.reasons_text(why)):
            say(f"  {line}")
