"""What the ledger knows of a job's evaluations, and which of them count.

With `estimator.target_half_width` a job stops when the headline's intervals are narrow enough. The
design is cut into batches, and the first b count, where b is the smallest number after which the
mean half-width is within the target. That is a function of the values alone: which worker made
them, in what order and how often it was interrupted changes nothing, and every process that reads
the same ledger finds the same b. The width may stop a job, significance may not (docs/decisions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from attr_batch.errors import DataError
from attr_batch.estimators import Attribution, Observation
from attr_batch.job import Evaluation, Job, Subject, distinct
from attr_batch.ledger import DERIVATION
from attr_batch.properties import Property

PHASES: tuple[str, ...] = (
    "trained model",
    "pruned model",
    "instruments",
    "finetune",
    "sample",
    "measure",
)


@dataclass(frozen=True)
class Stopping:
    """How far a job with a target has come: the first `batches` of `planned` count.

    `half_width` is the headline's mean after these; None while values are missing, and where the
    intervals are not reliable.
    """

    target: float
    half_width: float | None
    batches: int
    planned: int

    @property
    def reached(self) -> bool:
        """Whether the intervals are narrow enough: no further batch counts."""
        return self.half_width is not None and self.half_width <= self.target

    def to_json(self) -> dict[str, Any]:
        """Return the part of attribution.json that says why there are so many coalitions."""
        return {**vars(self), "reached": self.reached}


class Facts:
    """All that the ledger knows of a job's evaluations. Facts do not change: each is read once.

    `rows` are the evaluations that count; with a target that is not reached yet the last batch of
    them is the one to be evaluated now. `evaluations` are read instead of the plan where given.
    """

    def __init__(self, job: Job, evaluations: Sequence[Evaluation] | None = None) -> None:
        self.job = job
        self.rows: list[tuple[Evaluation, Evaluation]] = []  # as planned, and what stands in for it
        self.values: dict[tuple[str, str], dict[str, Any]] = {}  # by (run key, property name)
        self.derivations: dict[str, dict[str, Any]] = {}  # by run key
        self.stopping: Stopping | None = None
        self._target = job.target if evaluations is None else None
        self._batches = job.batches if evaluations is None else (tuple(evaluations),)
        self._half_widths: dict[tuple[int, int], float | None] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read what has been published since the last time, as far as it counts."""
        self.rows = []
        prepared = all(self.job.ledger.has_thing(*thing) for thing in self.job.things)
        for count, batch in enumerate(self._batches, 1):
            self.rows += self._read(batch)
            if self._target is None:
                continue
            whole = prepared and self._whole_but_for_failures()
            half_width = self._half_width(count) if whole else None
            self.stopping = Stopping(self._target, half_width, count, len(self._batches))
            if not whole or self.stopping.reached:
                return

    def _read(self, batch: Sequence[Evaluation]) -> list[tuple[Evaluation, Evaluation]]:
        """Read what is new of a batch; return each evaluation with what stands in for it."""
        job, ledger = self.job, self.job.ledger
        files = job.survey(e for e in batch if not self._whole(e))
        rows = [(e, e if self._whole(e) else job.settled(e, files)) for e in batch]
        wanted: dict[str, tuple[str, Property | None]] = {}  # by file name
        for _, run in rows:
            if self._whole(run):
                continue
            there = files(run.key)
            for prop in job.spec.properties:
                if job.value_file(prop) in there and (run.key, prop.name) not in self.values:
                    name = ledger.value_name(run.key, prop.name, job.property_digest(prop))
                    wanted[name] = run.key, prop
            if DERIVATION in there and run.key not in self.derivations:
                wanted[ledger.derivation_name(run.key)] = run.key, None
        for name, fact in ledger.facts(wanted).items():
            key, prop = wanted[name]
            if fact is None:  # gone since: no fact goes but by `repair` or `gc`
                continue
            if prop is None:
                self.derivations[key] = ledger.owned(name, fact, key=key)
            else:
                owner = {"key": key, "property_digest": job.property_digest(prop)}
                self.values[key, prop.name] = ledger.owned(name, fact, **owner)
        return rows

    def _whole(self, run: Evaluation) -> bool:
        return run.key in self.derivations and self._measured(run)

    def _measured(self, run: Evaluation) -> bool:
        return all((run.key, prop.name) in self.values for prop in self.job.spec.properties)

    # -- sequential stopping ----------------------------------------------------------------------

    def _whole_but_for_failures(self) -> bool:
        """Return whether nothing is missing but what failed, and no more than may."""
        missing = self.missing()
        if len(missing) > self.job.spec.estimator.max_failed:
            return False
        return not missing or self.job.ledger.failed().issuperset(e.key for e in missing)

    def _half_width(self, count: int) -> float | None:
        """Return the headline's mean half-width after `count` batches, None if not reliable."""
        headline = self.job.spec.properties[0]
        at = count, sum((run.key, headline.name) in self.values for _, run in self.rows)
        if at not in self._half_widths:
            self._half_widths[at] = self._reliable_half_width(headline)
        return self._half_widths[at]

    def _reliable_half_width(self, prop: Property) -> float | None:
        try:
            found = self.estimate(prop)
        except DataError:  # an endpoint was given up
            return None
        return found.half_width if found.interval.reliable else None

    # -- readings ---------------------------------------------------------------------------------

    def estimate(self, prop: Property) -> Attribution:
        """Return the estimator's reading of one property; its errors are those of `estimate`."""
        with one_thread():
            return self.job.spec.estimator.estimate(
                self.observations(prop), len(self.job.card.roster), self.job.surrogate(prop)
            )

    def observations(self, prop: Property) -> list[Observation]:
        """Return what the estimator reads: endpoints as the spec says, design, holdout."""
        paper = self.job.spec.endpoints == "paper"
        ends = ("trained", "untrained") if paper else ("derived",)
        found = []
        for planned, run in self.rows:
            entry, fact = run.entry, self.values.get((run.key, prop.name))
            end = entry.role in ("empty", "grand")
            if fact is not None and planned.subject in (ends if end else ("derived",)):
                found.append(
                    Observation(
                        entry.coalition, fact["value"], entry.role, entry.pair, entry.replicate
                    )
                )
        return found

    def reference(self, prop: Property, subject: Subject) -> float | None:
        """Return the property of the trained, pruned or untrained model."""
        for planned, run in self.rows:
            if planned.subject == subject:
                fact = self.values.get((run.key, prop.name))
                return None if fact is None else fact["value"]
        return None

    @property
    def planned(self) -> int:
        """Number of evaluations that the estimator reads: the references are not among them."""
        return sum(planned.entry.sequence != "reference" for planned, _ in self.rows)

    def missing(self) -> list[Evaluation]:
        """Evaluations that the estimator reads without all their values."""
        return [
            planned
            for planned, run in self.rows
            if planned.entry.sequence != "reference" and not self._measured(run)
        ]

    # -- what it took -----------------------------------------------------------------------------

    def seconds_spent(self) -> dict[str, float]:
        """Return worker seconds by phase, of all work that the job's results rest on."""
        job = self.job
        spent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for (family, thing_id), phase in zip(job.things, job.thing_phases, strict=True):
            if job.ledger.has_thing(family, thing_id):
                manifest = job.ledger.fact(f"{family}/{thing_id}/manifest.json") or {}
                spent[phase] += manifest.get("seconds", 0.0)
        for fact in self.derivations.values():
            for phase, seconds in fact["seconds"].items():
                spent[phase] += seconds
        spent["measure"] += sum(fact["seconds"] for fact in self.values.values())
        return spent

    @property
    def seconds_per_evaluation(self) -> float | None:
        """Median worker seconds of a coalition's model and samples, None if unknown."""
        seconds = [
            sum(fact["seconds"].values())
            for fact in self.derivations.values()
            if fact["recipe"]["subject"] == "derived" and fact["recipe"]["members"]
        ]
        return median(seconds) if seconds else None


def one_thread() -> Any:
    """Keep BLAS to one thread: the last bits must not depend on the number of cores."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


class Agenda:
    """What there is to evaluate as far as is known: all of it, or with a target batch by batch."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._facts = None if job.target is None else Facts(job)

    @property
    def work(self) -> Sequence[Evaluation]:
        """The part of the plan that counts, then the studies."""
        if self._facts is None:
            return self._job.work
        return distinct((*(planned for planned, _ in self._facts.rows), *self._job.studied))

    @property
    def stopping(self) -> Stopping | None:
        """How far a job with a target has come."""
        return None if self._facts is None else self._facts.stopping

    def refresh(self) -> bool:
        """Look again; whether there is more to do than before."""
        if self._facts is None:
            return False
        before = len(self._facts.rows)
        self._facts.refresh()
        return len(self._facts.rows) > before
