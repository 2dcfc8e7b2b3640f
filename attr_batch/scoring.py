"""What the studies of a validation say: every method beside the retrained models.

Pure functions of the ledger: `score` can be had of an unfinished validation, and again at any
time. How a score and its interval are computed stands in `lds`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import takewhile
from statistics import median
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from attr_batch import __version__, lds
from attr_batch.coalition import Coalition
from attr_batch.errors import DataError, IncompleteDesign, SpecError
from attr_batch.estimators import Attribution, Entry, Estimator, Observation, PairedLS, Reference
from attr_batch.estimators.regression import Array
from attr_batch.estimators.surrogate import control
from attr_batch.evidence import (
    Budget,
    Estimate,
    Fidelity,
    Method,
    OracleSet,
    PropertyValidation,
    Removal,
    Validation,
)
from attr_batch.facts import Facts, one_thread
from attr_batch.job import Job, Study
from attr_batch.properties import Property
from attr_batch.studies import Studies

Family = Literal["estimator", "counterfactual", "baseline"]
_READER = TypeAdapter(Estimator)
BUDGETS = (1, 1.5, 2, 3, 4, 6, 8, 10, 15, 20)  # design coalitions for each contributor


@dataclass
class Readings:
    """The values of all studies, read from the ledger. `baselines`: by property, by name."""

    job: Job
    studies: Studies
    removal: Study | None = None
    baselines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    _facts: dict[str, Facts] = field(default_factory=dict, init=False, repr=False)
    _methods: dict[str, list[Values]] = field(default_factory=dict, init=False, repr=False)

    def facts(self, study: Study) -> Facts:
        """Return what the ledger holds of a study."""
        if study.name not in self._facts:
            self._facts[study.name] = Facts(self.job, list(self.job.evaluations(study)))
        return self._facts[study.name]

    def utilities(self, study: Study, prop: Property) -> dict[tuple[int, int], float]:
        """Return v by (mask, replicate)."""
        facts = self.facts(study)
        return {
            (planned.entry.coalition.mask, planned.entry.replicate): fact["value"]
            for planned, run in facts.rows
            if (fact := facts.values.get((run.key, prop.name))) is not None
        }

    def lacking(self, study: Study, prop: Property, entries: Sequence[Entry]) -> int:
        """Return how many of a study's entries have no value."""
        known = self.utilities(study, prop)
        return sum((e.coalition.mask, e.replicate) not in known for e in entries)

    def attribution(
        self, estimator: Any, study: Study, prop: Property, budget: int | None = None
    ) -> Attribution | None:
        """Return an estimator's reading of a study, or of its first `budget` design entries.

        None while more values are missing than the job allows.
        """
        entries, known = fitted(study, budget), self.utilities(study, prop)
        allowed = self.job.spec.estimator.max_failed
        if not entries or self.lacking(study, prop, entries) > allowed:
            return None
        surrogate, ends = self.job.surrogate(prop), self._published_ends(study, prop)
        observations = [
            Observation(e.coalition, ends.get(e.role, value), e.role, e.pair, e.replicate)
            for e in entries
            if (value := known.get((e.coalition.mask, e.replicate))) is not None
        ]
        try:
            with one_thread():
                return estimator.estimate(observations, self.studies.n, surrogate)
        except (DataError, IncompleteDesign):  # too few rows for this estimator
            return None

    def _published_ends(self, study: Study, prop: Property) -> dict[str, float]:
        """Return the endpoints' values by role where they are the paper's: see `spec.endpoints`."""
        if self.job.spec.endpoints == "derived" or study.streams:
            return {}
        found = {
            "grand": self._job_facts.reference(prop, "trained"),
            "empty": self._job_facts.reference(prop, "untrained"),
        }
        return {role: value for role, value in found.items() if value is not None}

    @cached_property
    def _job_facts(self) -> Facts:
        return Facts(self.job)

    def seconds(self, study: Study, entries: Sequence[Entry] | None = None) -> float:
        """Return worker seconds of a study's evaluations, or of some of its entries'."""
        facts = self.facts(study)
        wanted = None if entries is None else {(e.coalition.mask, e.replicate) for e in entries}
        total = 0.0
        for planned, run in facts.rows:
            at = (planned.entry.coalition.mask, planned.entry.replicate)
            if run.key in facts.derivations and (wanted is None or at in wanted):
                total += sum(facts.derivations[run.key]["seconds"].values())
                total += sum(
                    fact["seconds"]
                    for prop in self.job.spec.properties
                    if (fact := facts.values.get((run.key, prop.name))) is not None
                )
        return total

    def oracles(self, prop: Property) -> list[lds.Oracle]:
        """Return the retrained coalitions, one set a size, and those of mixed sizes."""
        section, studies = self.job.spec.validation, self.studies
        known, found = self.utilities(studies.oracle, prop), []
        for at, subsets in enumerate(section.subsets):
            coalitions = studies.subsets(at)
            v = [[known.get((c.mask, r), np.nan) for c in coalitions] for r in range(subsets.seeds)]
            name = f"alpha={subsets.alpha:g}"
            found.append(lds.Oracle(name, subsets.alpha, _members(coalitions), np.array(v)))
        if section.reference:
            known, entries = self.utilities(studies.reference, prop), studies.reference.entries
            design = [e for e in entries if e.role == "design" and not e.replicate]
            v = [[known.get((e.coalition.mask, 0), np.nan) for e in design]]
            Z, pairs = _members([e.coalition for e in design]), np.array([e.pair for e in design])
            found.append(lds.Oracle("mixed", None, Z, np.array(v), pairs))
        return found

    def reference(self, prop: Property) -> Attribution | None:
        """Return the Shapley values of retraining, unshrunken, with their intervals."""
        if not self.job.spec.validation.reference:
            return None
        return self.attribution(PairedLS(surrogate="none"), self.studies.reference, prop)


def fitted(study: Study, budget: int | None = None) -> list[Entry]:
    """Return the entries that an estimator is fitted to, of the first `budget` of the design.

    Coalitions to compare models on (sequence `oracle`) are not; repeats come with what they repeat.
    """
    return [
        e
        for e in study.entries
        if e.role != "holdout"
        and e.sequence != "oracle"
        and (budget is None or e.sequence == "endpoint" or e.index < budget)
    ]


def _members(coalitions: Sequence[Coalition]) -> Array:
    n = coalitions[0].n
    return np.array([[i in c for i in range(n)] for c in coalitions], dtype=np.float64)


# -- every method's values ------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """One method's values on each of its designs (designs, n), and what they took."""

    name: str
    family: Family
    counterfactual: str | None
    values: Array
    evaluations: int = 0
    seconds: float | None = None
    collapsed: int | None = None


def methods(readings: Readings, prop: Property) -> list[Values]:
    """Return every method's values of a property, the job's own first; unfinished ones lack."""
    if prop.name not in readings._methods:
        found = [value for _, read in _methods(readings) if (value := read(prop)) is not None]
        own = readings.job.spec.estimator.kind  # without it there is nothing to compare with
        readings._methods[prop.name] = found if found and found[0].name == own else []
    return readings._methods[prop.name]


def names(readings: Readings) -> list[str]:
    """Return what the methods of a finished validation are called."""
    return [name for name, _ in _methods(readings)]


def _methods(readings: Readings) -> Iterator[tuple[str, Callable[[Property], Values | None]]]:
    job, studies = readings.job, readings.studies
    own, section = job.spec.estimator, job.spec.validation
    ours, retrained = studies.label(job.spec.counterfactual), studies.label(section.oracle)

    def estimated(
        name: str, estimator: Any, designs: Sequence[Study], family: Family = "estimator"
    ) -> tuple[str, Callable[[Property], Values | None]]:
        return name, partial(_estimated, readings, name, estimator, designs, family)

    yield estimated(own.kind, own, studies.designs)
    for kind in section.estimators:
        if kind != own.kind:
            yield estimated(kind, _READER.validate_python({"kind": kind}), studies.designs)
    if studies.samplings:
        yield estimated("reference, own draws", Reference(), studies.samplings)
    if job.statistics:
        yield estimated(*_without_surrogate(own, studies.designs))
    others = [s for s in studies.steps if len(s.entries) > len(studies.compared)]
    for study in (*others, *studies.rivals):
        if study.counterfactual != job.spec.counterfactual:
            yield estimated(f"{study.name}, {own.kind}", own, [study], "counterfactual")
    if section.reference:
        yield estimated(f"{retrained}, {own.kind}", own, [studies.reference], "counterfactual")
    for name, way, study in (
        ("leave_one_out", ours, studies.left_out),
        (f"{retrained}, leave_one_out", retrained, studies.left_out_retrained),
    ):
        yield name, partial(_left_out, readings, name, way, study)
    yield "alone", partial(_alone, readings, ours, studies.alone)
    if job.statistics:
        yield "own images, shapley", partial(_own_images, readings)
    for baseline in section.baselines:
        name = studies.label(baseline)
        yield name, partial(_baseline, readings, name)


def _without_surrogate(
    estimator: Any, designs: Sequence[Study]
) -> tuple[str, Any, Sequence[Study]]:
    """Return what the free game of training images adds is seen without."""
    plain = estimator.model_copy(update={"surrogate": "none"})
    return f"{estimator.kind}, no surrogate", plain, designs


def _estimated(
    readings: Readings,
    name: str,
    estimator: Any,
    designs: Sequence[Study],
    family: Family,
    prop: Property,
) -> Values | None:
    # Up to the first that is not finished: so that all methods have the same designs in order.
    read = (readings.attribution(estimator, design, prop) for design in designs)
    found = list(takewhile(lambda attribution: attribution is not None, read))
    if not found:
        return None
    done = designs[: len(found)]
    return Values(
        name,
        family,
        readings.studies.label(designs[0].counterfactual),
        np.array([attribution.values for attribution in found if attribution]),
        evaluations=len({(e.coalition.mask, e.replicate) for e in fitted(designs[0])}),
        seconds=float(np.mean([readings.seconds(d, fitted(d)) for d in done])),
        collapsed=sum(a.collapsed for a in found if a)
        if estimator.kind in ("ridge", "gp")
        else None,
    )


def _left_out(
    readings: Readings, name: str, counterfactual: str, study: Study, prop: Property
) -> Values | None:
    """Return v(N) - v(N without i); the study's first entry is N."""
    if readings.lacking(study, prop, study.entries):
        return None
    known = readings.utilities(study, prop)
    full, *rest = [known[e.coalition.mask, 0] for e in study.entries]
    values = full - np.array(rest)
    seconds = readings.seconds(study)
    return Values(name, "baseline", counterfactual, values[None], len(study.entries), seconds)


def _alone(readings: Readings, counterfactual: str, study: Study, prop: Property) -> Values | None:
    """Return v({i})."""
    if readings.lacking(study, prop, study.entries):
        return None
    known = readings.utilities(study, prop)
    values = np.array([known[e.coalition.mask, 0] for e in study.entries])
    seconds = readings.seconds(study)
    return Values("alone", "baseline", counterfactual, values[None], len(values), seconds)


def _own_images(readings: Readings, prop: Property) -> Values | None:
    """Return the Shapley values of the surrogate, which needs no model."""
    surrogate = readings.job.surrogate(prop)
    if surrogate is None:
        return None
    psi = control(surrogate, readings.studies.n).psi
    return Values("own images, shapley", "baseline", None, psi[None])


def _baseline(readings: Readings, name: str, prop: Property) -> Values | None:
    found = readings.baselines.get(prop.name, {}).get(name)
    if found is None:
        return None
    values = np.array(found["scores"], dtype=np.float64)
    return Values(name, "baseline", None, values[None], seconds=found["seconds"])


def ranks(readings: Readings) -> dict[str, list[int]]:
    """Return the contributors in descending order of the headline's value, by method.

    The methods are those of `removal.methods`; SpecError if there is none of that name.
    """
    section, spec = readings.job.spec.validation.removal, readings.job.spec
    if section is None:
        return {}
    known = names(readings)
    for i, name in enumerate(section.methods):
        if name != "estimator" and name not in known:
            place = f"validation.removal.methods.{i}"
            raise SpecError(
                f"no method {name!r}", place, " ".join(map(repr, ["estimator", *known]))
            )
    wanted = {spec.estimator.kind if name == "estimator" else name for name in section.methods}
    return {
        method.name: [int(i) for i in np.argsort(-method.values.mean(axis=0), kind="stable")]
        for method in methods(readings, spec.properties[0])
        if method.name in wanted
    }


# -- validation.json ------------------------------------------------------------------------------


def score(readings: Readings) -> Validation:
    """Return validation.json of what is measured so far."""
    job, spec = readings.job, readings.job.spec
    studies = [*readings.studies, *([readings.removal] if readings.removal else [])]
    planned = [e for e, _ in Facts(job).rows]
    planned += [e for study in studies for e in job.evaluations(study)]
    files = job.survey(planned)
    done: dict[str, bool] = {e.key: job.done(e, files) for e in planned}
    for baseline in spec.validation.baselines:
        name = readings.studies.label(baseline)
        done[name] = all(name in readings.baselines.get(p.name, {}) for p in spec.properties)
    with one_thread():
        properties = [_property(readings, prop) for prop in spec.properties]
    return {
        "job": spec.name,
        "spec_digest": job.spec_digest,
        "version": __version__,
        "contributors": list(job.card.roster.ids),
        "oracle": readings.studies.label(spec.validation.oracle),
        "complete": all(done.values()),
        "done": sum(done.values()),
        "planned": len(done),
        "seconds": {study.name: readings.seconds(study) for study in studies},
        "bootstrap": lds.DRAWS,
        "properties": properties,
        "provenance": {"trained model": job.dense_id, "pruned model": job.pruned_id},
    }


def to_bytes(validation: Validation) -> bytes:
    """Return the file's content."""
    text = json.dumps(validation, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def _property(readings: Readings, prop: Property) -> PropertyValidation:
    oracles, every = readings.oracles(prop), methods(readings, prop)
    whole = [oracle.whole for oracle in oracles if oracle.enough]
    first = oracles[0].whole if oracles[0].enough else None
    draws = {o.name: lds.Draws.of(o, readings.job.spec.seed) for o in whole}
    reference = readings.reference(prop)
    everyone = Coalition.grand(readings.studies.n).mask
    retrained = readings.utilities(readings.studies.left_out_retrained, prop)
    full = retrained.get((everyone, 0))
    fidelity, ceiling = _fidelity(readings, prop, first)
    return {
        "name": prop.name,
        "title": prop.title,
        "unit": prop.unit,
        "oracle": [_oracle_set(oracle, draws.get(oracle.name)) for oracle in oracles],
        "methods": _judged(readings, every, whole, draws, reference),
        "fidelity": fidelity,
        "fidelity_ceiling": ceiling,
        "budget": list(_budget(readings, prop, first, reference)),
        "removal": list(_removal(readings, prop, full)),
        "reference": _listed(reference and reference.ls_values),
        "reference_low": _listed(reference and reference.low),
        "reference_high": _listed(reference and reference.high),
        "reference_reliability": _reliability(reference),
        "v_full": full,
    }


def _listed(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else list(values)


def _reliability(reference: Attribution | None) -> float | None:
    """Return the share of the values' variance that is not their own noise."""
    if reference is None or reference.se is None or reference.ls_values is None:
        return None
    spread = np.var(reference.ls_values, ddof=1)
    noise = np.sum(np.square(reference.se)) / (len(reference.se) - 1)  # errors that sum to zero
    return float(max(0.0, 1 - noise / spread)) if spread > 0 else None


def _oracle_set(oracle: lds.Oracle, draws: lds.Draws | None) -> OracleSet:
    whole, nothing = oracle.whole, lds.interval(None, np.zeros(0))
    known = oracle.v[np.isfinite(oracle.v)]
    return {
        "name": oracle.name,
        "alpha": oracle.alpha,
        "size": None if oracle.alpha is None else int(oracle.Z[0].sum()),
        "subsets": whole.v.shape[1],
        "planned": oracle.v.shape[1],
        "seeds": len(whole.v),
        "ceiling": lds.ceiling(whole, draws) if draws else nothing,
        "additivity": lds.additivity(whole, draws) if draws else nothing,
        "floor": lds.floor(whole) if draws else None,
        "chance95": lds.chance95(max(3, whole.v.shape[1])),
        "mean": float(known.mean()) if len(known) else None,
        "sd": float(known.std(ddof=1)) if len(known) > 1 else None,
    }


def _judged(
    readings: Readings,
    every: Sequence[Values],
    oracles: Sequence[lds.Oracle],
    draws: Mapping[str, lds.Draws],
    reference: Attribution | None,
) -> list[Method]:
    """Score every method on every set, and the lead of the first over it.

    What is fitted to the retrainings of mixed sizes is not scored on them.
    """
    fitted_to_mixed = readings.studies.label(readings.job.spec.validation.oracle)
    scores = {
        method.name: {
            o.name: lds.lds(lds.subset_sums(list(method.values), o), o, draws[o.name])
            for o in oracles
            if o.name != "mixed" or method.counterfactual != fitted_to_mixed
        }
        for method in every
    }
    first = scores[every[0].name] if every else {}
    return [
        {
            "name": method.name,
            "family": method.family,
            "counterfactual": method.counterfactual,
            "evaluations": method.evaluations,
            "seconds": method.seconds,
            "designs": len(method.values),
            "collapsed": method.collapsed,
            "values": [float(value) for value in method.values.mean(axis=0)],
            "by_design": method.values.tolist(),
            "lds": {name: lds.interval(*found) for name, found in scores[method.name].items()},
            "lead": {
                name: lds.interval(first[name][0] - found, first[name][1] - sample)
                for name, (found, sample) in scores[method.name].items()
                if method is not every[0]
            },
            "agreement": _agreement(readings, method.values, reference),
        }
        for method in every
    ]


def _agreement(readings: Readings, values: Array, reference: Attribution | None) -> Estimate:
    """Correlate with retraining's values; the interval has the reference's own noise in it."""
    if reference is None or reference.ls_values is None:
        return lds.interval(None, np.zeros(0))
    target, noisy = np.array(reference.ls_values), np.zeros((0, len(reference.ls_values)))
    if reference.se is not None:
        rng = np.random.default_rng(readings.job.spec.seed)
        noisy = target + rng.normal(size=(lds.DRAWS, len(target))) * np.array(reference.se)
    return lds.agreement(values, target, noisy, readings.job.spec.seed)


def _fidelity(
    readings: Readings, prop: Property, oracle: lds.Oracle | None
) -> tuple[list[Fidelity], Estimate]:
    """Compare v(S) of each counterfactual with retraining, coalition by coalition.

    Also returns how one retraining compares with another, on the same coalitions.
    """
    studies, seed = readings.studies, readings.job.spec.seed
    if oracle is None:
        return [], lds.interval(None, np.zeros(0))
    masks = [sum(1 << int(i) for i in np.flatnonzero(row)) for row in oracle.Z]
    place = {mask: k for k, mask in enumerate(masks)}
    compared = [c.mask for c in studies.compared if c.mask in place]
    truth = oracle.v[:, [place[mask] for mask in compared]]
    ceiling = lds.interval(None, np.zeros(0))
    if len(truth) > 1:
        ceiling = lds.correlation(truth[0], truth[1:], seed)
    rows: list[Fidelity] = []
    for study in (*studies.steps, *studies.rivals):
        known = readings.utilities(study, prop)
        if not all((mask, 0) in known for mask in compared):
            continue
        x, y = np.array([known[mask, 0] for mask in compared]), truth.mean(axis=0)
        recipe = study.counterfactual.recipe()
        seconds = [
            sum(fact["seconds"].values())
            for fact in readings.facts(study).derivations.values()
            if fact["recipe"]["members"]
        ]
        rows.append(
            {
                "counterfactual": study.counterfactual.kind,
                "steps": recipe.get("steps"),
                "ema": recipe.get("ema"),
                "base": recipe.get("base"),
                "coalitions": len(x),
                "pearson": lds.correlation(x, truth, seed),
                "spearman": lds.spearman(x, y) if len(x) else None,
                "rmse": float(np.sqrt(np.mean((x - y) ** 2))) if len(x) else None,
                "bias": float(np.mean(x - y)) if len(x) else None,
                "seconds": median(seconds) if seconds else None,
            }
        )
    return rows, ceiling


def _budget(
    readings: Readings,
    prop: Property,
    oracle: lds.Oracle | None,
    reference: Attribution | None,
) -> Iterator[Budget]:
    """Score prefixes of every design: what each further coalition buys."""
    if oracle is None:
        return
    studies, own = readings.studies, readings.job.spec.estimator
    curves = [(own.kind, own, studies.designs), ("reference", Reference(), studies.samplings)]
    if readings.job.statistics:
        curves.insert(1, _without_surrogate(own, studies.designs))
    others = [s for s in studies.steps if s.counterfactual != studies.spec.counterfactual]
    curves += [(own.kind, own, [study]) for study in (*others, *studies.rivals)]
    if readings.job.spec.validation.reference:
        curves.append((own.kind, own, [studies.reference]))
    target = reference and reference.ls_values
    for name, reader, designs in curves:
        most = max((sum(e.sequence == "design" for e in d.entries) for d in designs), default=0)
        for budget in (int(times * studies.n) // 2 * 2 for times in BUDGETS):
            if not 4 <= budget <= most:
                continue
            found = [a for d in designs if (a := readings.attribution(reader, d, prop, budget))]
            if not found:
                continue
            values = [np.array(a.values) for a in found]
            spent = [readings.seconds(d, fitted(d, budget)) for d in designs]
            yield {
                "counterfactual": studies.label(designs[0].counterfactual),
                "estimator": name,
                "evaluations": budget,
                "seconds": float(np.mean(spent)),
                "lds": lds.lds(lds.subset_sums(values, oracle), oracle)[0],
                "agreement": None
                if target is None
                else lds.pearson(np.mean(values, axis=0), np.array(target)),
            }


def _removal(readings: Readings, prop: Property, full: float | None) -> Iterator[Removal]:
    """Say what became of the headline without the first ranked; the ranks are by its values."""
    headline = readings.job.spec.properties[0]
    if readings.removal is None or full is None or prop.name != headline.name:
        return
    known = readings.utilities(readings.removal, prop)
    for name, order in ranks(readings).items():
        for keeps, share, coalition in readings.studies.removals(order):
            value = known.get((coalition.mask, 0))
            if value is not None:
                yield {
                    "method": name,
                    "keeps": keeps,
                    "share": share,
                    "contributors": coalition.size if keeps else coalition.n - coalition.size,
                    "value": value,
                    "change": (value - full) / abs(full) if full else 0.0,
                }
