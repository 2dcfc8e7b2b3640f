"""A job made concrete: which models, which coalitions, under which names in the ledger.

`Job` turns a spec and the data's digests into ids (bases, instruments), run keys and the plan. It
is a pure function of both, needs neither torch nor the pixels once their digests are cached, and is
computed anew by every command and every shard: nothing is coordinated, nothing can drift apart.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal

from attr_batch import __version__, ops
from attr_batch.coalition import Coalition, Contributor, Roster
from attr_batch.counterfactual import Counterfactual, Finetuning
from attr_batch.data import Dataset
from attr_batch.errors import AttrBatchError, DataError, LedgerConflict, SpecError, StoreError
from attr_batch.estimators import Entry, Role, Surrogate
from attr_batch.estimators.continued import continued
from attr_batch.estimators.surrogate import DataStatistics
from attr_batch.instruments import LabelClassifier
from attr_batch.ledger import DIVERGED, Files, Ledger, seal, value_file
from attr_batch.predecessor import Predecessor, find
from attr_batch.properties import Call, Instrument, Property
from attr_batch.recipe import RECIPE_VERSION, canonical, derive_seed, digest
from attr_batch.spec import JobSpec

Subject = Literal["derived", "trained", "pruned", "untrained"]
GIVE_UP_AFTER = 2  # replicates tried in place of one that diverges each time
STATISTICS = "sums.json"
_IDS_HINT = "`attr-batch status` of the job that fitted it prints the id and the property"
SUBSTITUTE = 1000  # replicate numbers of substitutes: far from every planned one


@dataclass(frozen=True)
class DataCard:
    """What planning needs of the data: who, how many, the digests and the shape; no pixels."""

    roster: Roster
    label_names: tuple[str, ...]
    channels: int
    size: int

    @classmethod
    def of(cls, dataset: Dataset) -> DataCard:
        """Return the card of a loaded data set."""
        _, channels, size, _ = dataset.images.shape
        return cls(dataset.roster, dataset.label_names, channels, size)

    @classmethod
    def from_json(cls, card: dict[str, Any]) -> DataCard:
        """Return the card that `asdict` wrote."""
        roster = Roster(tuple(Contributor(**c) for c in card["roster"]["contributors"]))
        return cls(roster, tuple(card["label_names"]), card["channels"], card["size"])

    def recipe(self) -> dict[str, Any]:
        """Return what a model trained on all data depends on."""
        return {
            "contributors": [c.digest for c in self.roster.contributors],
            "labels": list(self.label_names),
            "shape": [self.channels, self.size, self.size],
        }


@dataclass(frozen=True)
class Study:
    """Coalitions to evaluate under one counterfactual: the plan itself, or a part of a validation.

    `streams` names random streams of its own. The plan ('') starts all samples from the same noise,
    whatever the replicate; a study with a name does neither share noise with it nor between
    replicates, so that agreement with it cannot come from shared noise.
    """

    name: str
    entries: tuple[Entry, ...]
    counterfactual: Counterfactual
    streams: str = ""


@dataclass(frozen=True)
class Evaluation:
    """One line of the plan made concrete: a model to make, its samples to draw and to measure."""

    entry: Entry
    subject: Subject
    study: Study = field(repr=False)
    recipe: Mapping[str, Any] = field(repr=False)

    @cached_property
    def key(self) -> str:
        """The run key: digest of the recipe."""
        return digest(self.recipe)

    @property
    def cohort(self) -> int:
        """Models that are made and sampled at once, this one among them; 1: it alone."""
        return self.recipe["numerics"]["cohort"]

    @cached_property
    def place(self) -> int:
        """Its place among a cohort's models: a place may decide bits, so it follows from the key.

        Where vectors end, and how memory is aligned, depends on it (docs/decisions).
        """
        return int(self.key[:15], 16) % self.cohort

    def joins(self, others: Sequence[Evaluation]) -> bool:
        """Say whether it can be of one cohort with others.

        All but members and seeds must be the same, and nobody in its place.
        """
        own = dict.fromkeys(("members", "seed", "sampling_seed"))
        return all(
            self.place != other.place and {**self.recipe, **own} == {**other.recipe, **own}
            for other in others
        )

    @property
    def title(self) -> str:
        """Say in a few words what is evaluated."""
        if self.subject != "derived":
            return f"the {self.subject} model"
        repeat = f", replicate {self.entry.replicate}" if self.entry.replicate else ""
        study = f", {self.study.name}" if self.study.name else ""
        return f"coalition {self.entry.coalition}{repeat}{study}"


def first_cohort(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Return the first evaluations that can be of one cohort, as many as there are."""
    cohort: list[Evaluation] = []
    for evaluation in evaluations:
        if evaluation.joins(cohort):
            cohort.append(evaluation)
    return cohort


def distinct(evaluations: Iterable[Evaluation]) -> tuple[Evaluation, ...]:
    """Return the evaluations, each key once: studies share coalitions."""
    found: dict[str, Evaluation] = {}
    for evaluation in evaluations:
        found.setdefault(evaluation.key, evaluation)
    return tuple(found.values())


def numerics(device: str, cohort: int = 1) -> dict[str, Any]:
    """Return the numerics class: what may change bits without changing the recipe.

    `cohort` belongs to it, because libraries choose how to multiply by how much there is.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "none")
    visible = Path("/dev/nvidiactl").exists() and not hidden
    device = ("cuda" if visible else "cpu") if device == "auto" else device
    threads = {"threads": 1} if device == "cpu" else {}
    return {"device": device, "ops": ops.backend(device), "cohort": cohort, **threads}


def numerics_text(found: Mapping[str, Any]) -> str:
    """Return a numerics class in words."""
    return ", ".join(f"{name} {value}" for name, value in found.items())


class Job:
    """A spec, its store, and every name that follows from them.

    `studies` are evaluated beside the plan; they change nothing of the plan or its names. `others`
    are ids of what else a validation makes once (see `validate`), for the store to be kept.
    """

    def __init__(
        self, spec: JobSpec, studies: Sequence[Study] = (), others: Sequence[str] = ()
    ) -> None:
        self.spec, self.studies, self.others = spec, tuple(studies), tuple(others)
        self.ledger = Ledger(spec.store)
        together = isinstance(spec.counterfactual, Finetuning)
        cohort = spec.resources.cohort if together else 1
        self.numerics = numerics(spec.resources.device, cohort)

    def in_cohorts(self, size: int) -> Job:
        """Return this job with cohorts of another size; it shares all that is made once."""
        resources = self.spec.resources.model_copy(update={"cohort": size})
        return Job(self.spec.model_copy(update={"resources": resources}), self.studies, self.others)

    # -- data -------------------------------------------------------------------------------------

    @cached_property
    def dataset(self) -> Dataset:
        """The pixels. DataError lists everything that is wrong with them."""
        dataset = self.spec.data.load()
        card = DataCard.of(dataset)
        if vars(self).setdefault("card", card) != card:
            hint = "leave the data alone while a job runs; run again to begin with the new ones"
            raise DataError("the data are not what they were when the job began", "data", hint)
        if self.ledger.marked:  # only a run makes a store
            # Others may only read it, or put something else there: the card is but a cache.
            with contextlib.suppress(DataError, StoreError, LedgerConflict):
                self.ledger.store.replace(self._card_name, seal(asdict(card)))
        return dataset

    @cached_property
    def card(self) -> DataCard:
        """Digests and shape: from the store's cache if the files look the same, else by loading."""
        try:
            cached = self.ledger.fact(self._card_name)
            return DataCard.from_json(cached) if cached else DataCard.of(self.dataset)
        except (LedgerConflict, ValueError):  # ValueError: an id twice
            return DataCard.of(self.dataset)

    @cached_property
    def _card_name(self) -> str:
        return f"work/data/{digest([__version__, self.spec.data.fingerprint()])}.json"

    def check(self) -> None:
        """Check what can be known before work: that data, model and properties fit together.

        Raises all problems at once, as the error of the first.
        """
        self.ledger.store.check()
        checks = [
            self._check_roster,
            self._check_continues,
            lambda: self.spec.model.check(self.card.channels, self.card.size),
            self._check_base,
            lambda: self.spec.counterfactual.check(self.spec.model),
        ]
        for i, prop in enumerate(self.spec.properties):
            checks.append(partial(self._check_property, prop, f"properties.{i}"))
        if "validation" in self.spec.model_fields_set:
            checks.append(self.check_validation)
        _raise_together(checks)

    def check_validation(self) -> None:
        """Check that what a validation asks for can be done with the model."""
        section, model = self.spec.validation, self.spec.model
        checks: list[Callable[[], None]] = [
            partial(section.oracle.check, model, "validation.oracle")
        ]
        for i, way in enumerate(section.counterfactuals):
            checks.append(partial(way.check, model, f"validation.counterfactuals.{i}"))
        for i, baseline in enumerate(section.baselines):
            where = f"validation.baselines.{i}"
            checks.append(partial(baseline.check, model.schedule, where))
        _raise_together(checks)

    def check_numbers(self) -> None:
        """Check what needs torch: that pruning and solver can do what the spec asks for."""
        card, spec = self.card, self.spec
        _raise_together(
            [
                lambda: spec.pruning.check(spec.model, card.channels, card.size),
                lambda: spec.sampling.check(spec.model.schedule),
                self.check_cohort,
            ]
        )

    def check_cohort(self) -> None:
        """Check that several of the job's models can be trained at once, if it says so."""
        if self.numerics["cohort"] == 1:
            return
        from attr_batch.fused import supported
        from attr_batch.training import drops

        module = self.spec.model.build(self.card.channels, self.card.size, 0)
        if not supported(module) or drops(module):
            what = "only plain UNet2DModels without dropout can be trained several at once"
            raise SpecError(what, "resources.cohort", "leave it at 1")

    def _check_roster(self) -> None:
        if len(self.card.roster) < 2:
            raise SpecError("one contributor: there is nothing to share out", "data")

    def _check_continues(self) -> None:
        if self.predecessor is None:
            return
        if any(e.entry.role == "design" and e.entry.pair is None for e in self.plan):
            what = f"kind {self.spec.estimator.kind} does not measure complement pairs"
            raise SpecError(what, "estimator.continues", "kind: ridge does")

    def _check_base(self) -> None:
        if self.spec.model.base is None:
            return
        inputs = self._inputs("bases", self.dense_id)
        if inputs is None:
            hint = "`attr-batch status` of the job that trained it prints the id"
            raise DataError(f"no base {self.dense_id!r} in the store", "model.base", hint)
        if inputs["stage"] == "pruned":
            what = "is a pruned model's id, wanted a trained one's"
            raise SpecError(what, "model.base", f"it was pruned from {inputs['dense']}")
        theirs, ours = inputs["model"], self.model_inputs
        differ = [key for key in self.architecture if theirs.get(key) != ours.get(key)]
        if differ:
            what = f"the base was made with another {', '.join(differ)}"
            raise SpecError(what, "model.base", "describe the model as the base's job did")

    def _check_property(self, prop: Property, where: str) -> None:
        labels: Sequence[str] = self.card.label_names
        images: int | None = sum(c.images for c in self.card.roster.contributors)
        if prop.fitted is not None:  # what it was fitted to decides, whatever the data are now
            labels, images = self._check_fitted(prop, f"{where}.fitted")["labels"], None
        prop.check(tuple(labels), where=where, images=images)

    def _check_fitted(self, prop: Property, where: str) -> dict[str, Any]:
        """Check a property's pin; return the recipe of the data that it was fitted to."""
        inputs, instrument = self._inputs("properties", prop.fitted or ""), prop.instrument()
        if inputs is None:
            what = f"no instrument {prop.fitted!r} in the store"
            raise DataError(what, where, _IDS_HINT)
        theirs, ours = inputs.get("instrument"), instrument.recipe() if instrument else {}
        if theirs is None:
            raise SpecError("is the id of something else than an instrument", where, _IDS_HINT)
        if theirs["kind"] != ours["kind"]:
            what = f"is the id of a {theirs['kind']}, wanted a {ours['kind']}"
            raise SpecError(what, where, _IDS_HINT)
        differ = [
            f"{key} {theirs.get(key)}, not {ours[key]}"
            for key in ours
            if theirs.get(key) != ours[key]
        ]
        if differ:
            what = f"was fitted with {', '.join(differ)}"
            raise SpecError(what, where, "describe the property as the job did that fitted it")
        if inputs["data"]["shape"] != self.card.recipe()["shape"]:
            what = f"was fitted to images of shape {inputs['data']['shape']}"
            raise SpecError(what, where, f"the data have {self.card.recipe()['shape']}")
        return inputs["data"]

    def _inputs(self, family: str, thing_id: str) -> dict[str, Any] | None:
        """Return what a pinned thing was made of, which is what its id is the digest of; or None.

        LedgerConflict if it is not: another program, or another person, wrote it.
        """
        name = f"{family}/{thing_id}"
        made = self.ledger.fact(f"{name}/manifest.json")
        if made is not None and digest(made["inputs"]) != thing_id:
            place = self.ledger.store.place(name)
            raise LedgerConflict("is not what its name says", place, "move it out of the store")
        return None if made is None else made["inputs"]

    def unseen_labels(self, prop: Property) -> list[str]:
        """Return the data's labels that a property's pinned classifier does not know."""
        if prop.fitted is None or not isinstance(prop.instrument(), LabelClassifier):
            return []
        known = self.ledger.card("properties", prop.fitted)["labels"]
        return [label for label in self.card.label_names if label not in known]

    # -- ids and keys -----------------------------------------------------------------------------

    @property
    def alone(self) -> dict[str, Any]:
        """The numerics class of what is made by itself, whatever the size of cohorts."""
        return {**self.numerics, "cohort": 1}

    @cached_property
    def model_inputs(self) -> dict[str, Any]:
        """What the model is before training; of a diffusers folder also its weights' digest."""
        return self.spec.model.inputs()

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """What of the model matters whatever its weights: in every run key, so it is read once."""
        return self.spec.model.architecture()

    @cached_property
    def dense_inputs(self) -> dict[str, Any]:
        """What the trained model depends on."""
        return {
            "stage": "trained",
            "recipe_version": RECIPE_VERSION,
            "data": self.card.recipe(),
            "model": self.model_inputs,
            "seed": self.spec.seed,
            "numerics": self.alone,
        }

    @cached_property
    def pruned_inputs(self) -> dict[str, Any]:
        """What the pruned model depends on."""
        return {
            "stage": "pruned",
            "recipe_version": RECIPE_VERSION,
            "dense": self.dense_id,  # which knows of the data, unless it is pinned
            "architecture": self.architecture,
            "pruning": self.spec.pruning.recipe(),
            "seed": self.spec.seed,
            "numerics": self.alone,
        }

    @cached_property
    def dense_id(self) -> str:
        """Id of the model trained on all data: pinned, or the digest of its inputs."""
        return self.spec.model.base or digest(self.dense_inputs)

    @cached_property
    def pruned_id(self) -> str:
        """Id of the pruned model."""
        return digest(self.pruned_inputs)

    @cached_property
    def instruments(self) -> dict[str, Instrument]:
        """What the properties need fitted, by id; several properties may share one."""
        return {
            self.instrument_id(prop): instrument
            for prop in self.spec.properties
            if (instrument := prop.instrument()) is not None
        }

    @property
    def things(self) -> list[tuple[str, str]]:
        """(family, id) of everything that is made once for all coalitions."""
        bases = [("bases", self.dense_id), ("bases", self.pruned_id)]
        return bases + [("properties", i) for i in (*self.instruments, *self.statistics)]

    @property
    def thing_phases(self) -> list[str]:
        """What making each of `things` is called in the accounts."""
        fitted = len(self.instruments) + len(self.statistics)
        return ["trained model", "pruned model", *["instruments"] * fitted]

    @cached_property
    def classified(self) -> Property | None:
        """The first property that is read from the labels' classifier; None without one."""
        read_by = (p for p in self.spec.properties if isinstance(p.instrument(), LabelClassifier))
        return next(read_by, None)

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """The properties whose statistics of the training images are needed, by these' id."""
        if getattr(self.spec.estimator, "surrogate", "none") == "none":
            return {}
        inputs = {prop.name: self.statistics_inputs(prop) for prop in self.spec.properties}
        return {
            digest(inputs[prop.name]): prop
            for prop in self.spec.properties
            if not isinstance(prop, Call)
        }

    def statistics_inputs(self, prop: Property) -> dict[str, Any]:
        """Return what the statistics of the training images depend on."""
        return {
            "recipe_version": RECIPE_VERSION,
            "statistics of": self.property_digest(prop),
            "data": self.card.recipe(),
        }

    def surrogate(self, prop: Property) -> Surrogate | None:
        """Return the property of a coalition's own images as a game; None if it is not known."""
        if prop.name in self._surrogates or isinstance(prop, Call):
            return self._surrogates.get(prop.name)
        thing_id = digest(self.statistics_inputs(prop))
        if thing_id not in self.statistics or not self.ledger.has_thing("properties", thing_id):
            return None
        folder, _ = self.ledger.verified_thing("properties", thing_id)
        body = json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
        found = DataStatistics.from_json(body).surrogate(prop.of_mean)
        return self._surrogates.setdefault(prop.name, found)

    @cached_property
    def _surrogates(self) -> dict[str, Surrogate]:
        """Kept, since a surrogate's own values are computed once for each object."""
        return {}

    @property
    def workers(self) -> int:
        """Worker processes of one shard: as the spec says, else the cores, or 1 on a GPU."""
        default = 1 if self.numerics["device"] == "cuda" else len(os.sched_getaffinity(0))
        return self.spec.resources.workers or default

    def instrument_id(self, prop: Property) -> str:
        """Return the id of what `prop` needs fitted: pinned, or its inputs' digest; '' for none."""
        instrument = prop.instrument()
        if instrument is None:
            return ""
        return prop.fitted or digest(self.instrument_inputs(instrument))

    def instrument_inputs(self, instrument: Instrument) -> dict[str, Any]:
        """Return what a fitted instrument depends on."""
        return {
            "recipe_version": RECIPE_VERSION,
            "data": self.card.recipe(),
            "instrument": instrument.recipe(),
            "seed": self.spec.seed,
            "numerics": self.alone,
        }

    def property_digest(self, prop: Property) -> str:
        """Return the digest that names a property's value files."""
        return self._property_digests[prop.name]

    @cached_property
    def _property_digests(self) -> dict[str, str]:
        """Taken once: the source of a user's own property may change while the job runs."""
        return {
            prop.name: digest(
                {
                    "recipe_version": RECIPE_VERSION,
                    "property": prop.recipe(),
                    "instrument": self.instrument_id(prop),
                }
            )
            for prop in self.spec.properties
        }

    def sampling_seed(self, streams: str = "", replicate: int = 0) -> int:
        """Return the seed of the initial noise: for the plan the same for every model."""
        seed = self.spec.sampling.seed
        own = (streams, replicate) if streams else ()
        return derive_seed("sampling", self.spec.seed if seed is None else seed, *own)

    def training_seed(self, replicate: int, streams: str = "") -> int:
        """Return the seed of a training: it depends on the replicate, not on the coalition."""
        own = (streams,) if streams else ()
        return derive_seed("run", self.spec.seed, replicate, *own)

    def run_recipe(
        self, coalition: Coalition, replicate: int, subject: Subject, study: Study
    ) -> dict[str, Any]:
        """Return everything that decides a model's samples; its digest is the run key."""
        together = (
            subject == "derived"
            and isinstance(study.counterfactual, Finetuning)
            and coalition.size > 0
        )
        recipe: dict[str, Any] = {
            "recipe_version": RECIPE_VERSION,
            "subject": subject,
            "sampling": self.spec.sampling.recipe(),
            "sampling_seed": self.sampling_seed(study.streams, replicate),
            "shape": self.card.recipe()["shape"],
            "architecture": self.architecture,
            "numerics": self.numerics if together else self.alone,
        }
        if subject == "trained":
            return {**recipe, "base": self.dense_id}
        if subject == "pruned":
            return {**recipe, "base": self.pruned_id}
        recipe["seed"] = self.training_seed(replicate, study.streams)
        if subject == "untrained":
            return {**recipe, "model": self.model_inputs}
        counterfactual = study.counterfactual
        if counterfactual.start == "fresh":
            recipe["model"] = self.model_inputs
        else:
            pruned = counterfactual.start == "pruned"
            recipe["base"] = self.pruned_id if pruned else self.dense_id
        recipe["counterfactual"] = counterfactual.recipe()
        recipe["members"] = self._digests(coalition)
        if counterfactual.unlearns:
            recipe["removed"] = self._digests(coalition.complement())
        return recipe

    def _digests(self, coalition: Coalition) -> list[str]:
        return [c.digest for c in self.card.roster.members(coalition)]

    # -- the plan ---------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> tuple[Evaluation, ...]:
        """Every evaluation of the attribution, in the order in which results are read."""
        n = len(self.card.roster)
        entries, before = self.spec.estimator.plan(n), self.predecessor
        if before is not None:
            entries = continued(entries, before.shared, before.known)
        study = Study("", tuple(entries), self.spec.counterfactual)
        return (*self.evaluations(study), *self._references(n, study))

    @cached_property
    def predecessor(self) -> Predecessor | None:
        """The job with other contributors that this one continues."""
        prefix = getattr(self.spec.estimator, "continues", None)
        if prefix is None:
            return None
        return find(self.ledger, prefix, self.card.roster, self.numerics)

    @property
    def target(self) -> float | None:
        """Mean half-width at which the job may stop before its budget is spent."""
        return getattr(self.spec.estimator, "target_half_width", None)

    @cached_property
    def batches(self) -> tuple[tuple[Evaluation, ...], ...]:
        """The plan in the parts between which a job with a target may stop; else it is one part.

        Repeats come with what they repeat. Endpoints and holdout belong to the first part, so that
        every interval has its endpoints.
        """
        if self.target is None:
            return (self.plan,)
        parts: dict[int, list[Evaluation]] = {0: []}
        for evaluation in self.plan:
            entry = evaluation.entry
            batch = entry.batch if entry.sequence in ("design", "repeat") else 0
            parts.setdefault(batch, []).append(evaluation)
        return tuple(tuple(parts[batch]) for batch in sorted(parts))

    @cached_property
    def work(self) -> tuple[Evaluation, ...]:
        """All there may be to evaluate, each once: the plan, then the studies."""
        return distinct((*self.plan, *self.studied))

    @cached_property
    def studied(self) -> tuple[Evaluation, ...]:
        """The evaluations of the studies."""
        return tuple(e for study in self.studies for e in self.evaluations(study))

    def evaluations(self, study: Study) -> Iterator[Evaluation]:
        """Yield the evaluations of a study, in the order of its entries."""
        return (self._evaluation(entry, "derived", study) for entry in study.entries)

    def _references(self, n: int, study: Study) -> Iterator[Evaluation]:
        """Models that show what pruning and v(all) mean; they are the paper's own endpoints."""
        everyone, nobody = Coalition.grand(n), Coalition.empty(n)
        references: tuple[tuple[Coalition, Role, Subject], ...] = (
            (everyone, "grand", "trained"),
            (everyone, "grand", "pruned"),
            (nobody, "empty", "untrained"),
        )
        for index, (coalition, role, subject) in enumerate(references):
            entry = Entry("reference", index, coalition, role, None, 0, 0, None)
            yield self._evaluation(entry, subject, study)

    def _evaluation(self, entry: Entry, subject: Subject, study: Study) -> Evaluation:
        recipe = self.run_recipe(entry.coalition, entry.replicate, subject, study)
        return Evaluation(entry, subject, study, recipe)

    def settled(self, evaluation: Evaluation, files: Files | None = None) -> Evaluation:
        """Return the evaluation that stands in for `evaluation` where it diverges each time.

        `files` is what a `survey` of the ledger found; without, the ledger is asked now.
        """
        files = files or self.ledger.run_files
        for attempt in range(1, GIVE_UP_AFTER + 1):
            if DIVERGED not in files(evaluation.key):
                break
            evaluation = self.substitute(evaluation, attempt)
        return evaluation

    def substitute(self, evaluation: Evaluation, attempt: int) -> Evaluation:
        """Return the same evaluation under another training seed."""
        if "seed" not in evaluation.recipe:
            return evaluation  # the trained and the pruned model: there is no other
        replicate = evaluation.entry.replicate % SUBSTITUTE + attempt * SUBSTITUTE
        entry = replace(evaluation.entry, replicate=replicate)
        return self._evaluation(entry, evaluation.subject, evaluation.study)

    def missing_properties(
        self, evaluation: Evaluation, files: Files | None = None
    ) -> list[Property]:
        """Return the properties without a value for this evaluation (their digests are unread)."""
        there = (files or self.ledger.run_files)(evaluation.key)
        return [prop for prop in self.spec.properties if self.value_file(prop) not in there]

    def value_file(self, prop: Property) -> str:
        """Return the name of a property's value among a run's files."""
        return value_file(prop.name, self.property_digest(prop))

    def survey(self, evaluations: Iterable[Evaluation]) -> Files:
        """Return what is published of these evaluations now, for `done`, `settled` and others."""
        return self.ledger.survey(e.key for e in evaluations)

    def done(self, evaluation: Evaluation, files: Files | None = None) -> bool:
        """Return whether every property of the evaluation has its value."""
        files = files or cache(self.ledger.run_files)  # one look for the two questions
        return not self.missing_properties(self.settled(evaluation, files), files)

    # -- what is written down ---------------------------------------------------------------------

    @cached_property
    def content(self) -> dict[str, Any]:
        """The resolved spec without names, places, resources: what the numbers depend on."""
        spec = self.spec
        return {
            "recipe_version": RECIPE_VERSION,
            "seed": spec.seed,
            "data": {
                **spec.data.recipe(),
                "channels": self.card.channels,
                "size": self.card.size,
                "labels": list(self.card.label_names),
                "contributors": {c.id: c.digest for c in self.card.roster.contributors},
            },
            "model": {**spec.model.recipe(), **spec.model.inputs()},
            "pruning": spec.pruning.recipe(),
            "counterfactual": spec.counterfactual.recipe(),
            "sampling": spec.sampling.recipe(),
            "properties": {prop.name: _pinned_recipe(prop) for prop in spec.properties},
            "order": [prop.name for prop in spec.properties],
            "endpoints": spec.endpoints,
            "estimator": self._estimator_recipe(),
        }

    def _estimator_recipe(self) -> dict[str, Any]:
        """Return the estimator's recipe; what it continues by its whole digest, however given."""
        recipe, before = self.spec.estimator.recipe(), self.predecessor
        return recipe if before is None else {**recipe, "continues": before.spec}

    @cached_property
    def spec_digest(self) -> str:
        """Digest of the resolved spec."""
        return digest(self.content)

    def write_down(self, compare: bool = True) -> None:
        """Publish the resolved spec and all there is to evaluate, before any work.

        `compare`: if the plan is there, check that it is the same. Its name holds its digest, so
        one shard that does so is enough; a plan may have megabytes.
        """
        self.ledger.mark()
        fact = {"name": self.spec.name, "content": self.content}
        self.ledger.publish_fact(self.ledger.spec_name(self.spec_digest), fact)
        name = self.ledger.plan_name(self.spec_digest, self.plan_lines)
        if compare or not self.ledger.store.exists(name):
            self.ledger.publish_same(name, self.plan_lines)

    @cached_property
    def plan_lines(self) -> bytes:
        """The plan as it is written down: a head, then a line for each evaluation."""
        head = {
            "spec": self.spec_digest,
            "numerics": self.numerics,
            "bases": [self.dense_id, self.pruned_id],
            "properties": sorted({*self.instruments, *self.statistics, *self.others}),
        }
        lines = [head, *(_plan_line(e) for e in self.work)]
        return b"".join(canonical(line) + b"\n" for line in lines)

    @property
    def identity(self) -> str:
        """What tells this job's results from others': spec and numerics class."""
        return f"{self.spec_digest}-{digest(self.numerics)[:12]}"

    def other_numerics(self) -> list[dict[str, Any]]:
        """Return what other numerics classes have planned this spec in the store."""
        planned = [head["numerics"] for head, *_ in self.ledger.plans(self.spec_digest).values()]
        return [one for k, one in enumerate(planned) if one not in (self.numerics, *planned[:k])]

    @property
    def report_name(self) -> str:
        """Name of the report's folder."""
        return f"reports/{self.identity}"


def _pinned_recipe(prop: Property) -> dict[str, Any]:
    """Return a property's recipe with its pin, if it has one."""
    recipe = prop.recipe()
    return recipe if prop.fitted is None else {**recipe, "fitted": prop.fitted}


def _plan_line(evaluation: Evaluation) -> dict[str, Any]:
    entry = evaluation.entry
    return {
        "sequence": entry.sequence,
        "index": entry.index,
        "coalition": str(entry.coalition),
        "role": entry.role,
        "pair": entry.pair,
        "batch": entry.batch,
        "replicate": entry.replicate,
        "probability": entry.probability,
        "subject": evaluation.subject,
        "key": evaluation.key,
        **({"study": evaluation.study.name} if evaluation.study.name else {}),
    }


def _raise_together(checks: Sequence[Callable[[], None]]) -> None:
    """Run all checks; raise what they found as one error of the first one's kind."""
    found: list[AttrBatchError] = []
    for check in checks:
        try:
            check()
        except AttrBatchError as error:
            found.append(error)
    if found:
        raise type(found[0]).of([problem for error in found for problem in error.problems])
