"""What a validation evaluates beside the job's plan: studies, each a list of coalitions.

    oracle          coalitions of a few sizes, retrained: what the LDS is measured on
    reference       a paired design, retrained: Shapley values of the definition itself
    design d        the job's own method on further seeds of its design
    sampling d      the paper's own draws, for its closed form
    left out, alone N without i, and i alone, under the job's method; `left out` retrained too
    k steps, ema    the job's counterfactual with other steps and weights, on oracle coalitions
    <counterfactual>  another way to a coalition's model, on the design and on oracle coalitions
    removal         retrained without those who are ranked first (once the ranks are known)

What the oracle draws (weights, batches, initial noise) it shares neither with the job nor between
its own seeds, and the other retrained studies draw their own: agreement by shared noise would
flatter. Nor do reference and job share their coalitions, whose choice is a noise of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from pydantic import ValidationError

from attr_batch.baselines import Baseline
from attr_batch.coalition import Coalition
from attr_batch.counterfactual import Counterfactual
from attr_batch.estimators import Entry, Exact, PairedLS, Reference
from attr_batch.estimators.design import of_size
from attr_batch.facts import Facts
from attr_batch.job import Job, Study
from attr_batch.recipe import canonical, derive_seed
from attr_batch.spec import JobSpec

ORACLE = "oracle"  # name of the study and of its random streams


@dataclass(frozen=True)
class Studies:
    """The studies of a spec's `validation` section for n contributors, each under its name.

    `plan` are the entries of the job itself, as far as they count.
    """

    spec: JobSpec
    n: int
    plan: tuple[Entry, ...]

    @classmethod
    def of(cls, job: Job) -> Studies:
        """Return the studies beside a job."""
        counted = (planned for planned, _ in Facts(job).rows)
        plan = tuple(e.entry for e in counted if e.subject == "derived")
        return cls(job.spec, len(job.card.roster), plan)

    def __iter__(self) -> Iterator[Study]:
        """Yield all that is known before any value is: what costs least first."""
        yield self.left_out
        yield self.alone
        yield from self.designs[1:]
        yield from self.samplings
        yield from self.steps
        yield from self.rivals
        yield self.oracle
        section = self.spec.validation
        if section.reference or section.removal is not None:  # both are compared with all retrained
            yield self.left_out_retrained
        if section.reference:
            yield self.reference

    @cached_property
    def oracle(self) -> Study:
        """Retrainings that the score is measured on, one size after the other."""
        return self._retrained(ORACLE, list(self._subsets()))

    def _subsets(self) -> Iterator[Entry]:
        index = 0
        for at, subsets in enumerate(self.spec.validation.subsets):
            for replicate in range(subsets.seeds):
                for coalition in self.subsets(at):
                    yield Entry("oracle", index, coalition, "holdout", None, 0, replicate, None)
                    index += 1

    def subsets(self, at: int) -> list[Coalition]:
        """Return the distinct coalitions of the `at`-th part of `validation.subsets`."""
        subsets = self.spec.validation.subsets[at]
        size = min(self.n - 1, max(1, int(subsets.alpha * self.n + 1e-9)))
        return list(islice(of_size(self.n, size, self.spec.seed), subsets.count))

    @cached_property
    def reference(self) -> Study:
        """Retrainings of a paired design with its endpoints: coalitions of its own choice."""
        design = PairedLS(
            budget=self.spec.validation.reference,
            seed=derive_seed("reference", self.spec.seed),
            holdout=0,
            repeats=0,
            endpoint_replicates=2,
        )
        return self._retrained("reference", design.plan(self.n))

    @cached_property
    def designs(self) -> list[Study]:
        """The job's estimator on several seeds of its design; the first is the job itself."""
        estimator, first = self.spec.estimator, self._own("design 0", self.plan)
        if isinstance(estimator, Exact):  # every coalition is measured: there is one design
            return [first]
        others = [
            estimator.model_copy(
                update={"seed": estimator.seed + d, "continues": None, "budget": self.budget}
            )
            for d in range(1, self.spec.validation.designs)
        ]
        plans = (other.plan(self.n) for other in others)
        return [first, *(self._own(f"design {d}", plan) for d, plan in enumerate(plans, 1))]

    @property
    def budget(self) -> int:
        """Number of design coalitions that count of the job, repeats left out."""
        return sum(e.sequence == "design" for e in self.plan)

    @cached_property
    def samplings(self) -> list[Study]:
        """The paper's own draws: independent, by the Shapley kernel, as many as the job has."""
        estimator, section = self.spec.estimator, self.spec.validation
        if "reference" not in section.estimators or isinstance(estimator, Exact):
            return []
        budget = sum(e.role == "design" for e in self.plan)
        draws = Reference(
            budget=budget + budget % 2,
            holdout=0,
            endpoint_replicates=estimator.endpoint_replicates,
        )
        seeds = range(estimator.seed, estimator.seed + section.designs)
        return [
            self._own(f"sampling {d}", draws.model_copy(update={"seed": seed}).plan(self.n))
            for d, seed in enumerate(seeds)
        ]

    @cached_property
    def left_out(self) -> Study:
        """Everyone but one, under the job's counterfactual."""
        return self._own("left out", self._left_out())

    @cached_property
    def left_out_retrained(self) -> Study:
        """Everyone, and everyone but one, retrained."""
        return self._retrained("left out, retrained", self._left_out(), streams="removal")

    @cached_property
    def alone(self) -> Study:
        """Each contributor alone, under the job's counterfactual."""
        return self._own(
            "alone", self._coalitions([Coalition.of([i], self.n) for i in range(self.n)])
        )

    def _left_out(self) -> list[Entry]:
        everyone = Coalition.grand(self.n)
        alone = [Coalition.of([i], self.n).complement() for i in range(self.n)]
        return self._coalitions([everyone, *alone])

    @staticmethod
    def _coalitions(coalitions: Sequence[Coalition]) -> list[Entry]:
        return [
            Entry("oracle", index, coalition, "holdout", None, 0, 0, None)
            for index, coalition in enumerate(coalitions)
        ]

    @cached_property
    def steps(self) -> list[Study]:
        """The job's counterfactual with other steps and other weights to sample from.

        With its own weights on the job's design too, so that values can be compared by k.
        """
        found = []
        for other in self._steps:
            design = self._job_design() if other.ema == self._steps[0].ema else []
            entries = (*self._coalitions(self.compared), *design)
            found.append(Study(self.label(other), entries, other))
        return found

    @cached_property
    def _steps(self) -> list[Any]:
        """The counterfactuals that the section asks for, those with the job's own weights first."""
        section, own = self.spec.validation.steps, self.spec.counterfactual.model_dump()
        if section is None or not {"steps", "ema"} <= own.keys():
            return []
        emas = sorted(section.ema, key=lambda ema: ema != own["ema"])
        if emas[:1] != [own["ema"]]:
            emas = [own["ema"], *emas]
        found = []
        for ema in emas:
            for k in section.steps:
                with contextlib.suppress(ValidationError):  # weights that this kind does not have
                    found.append(
                        type(self.spec.counterfactual).model_validate(
                            {**own, "steps": k, "ema": ema}
                        )
                    )
        return found

    @cached_property
    def rivals(self) -> list[Study]:
        """Other counterfactuals, on the job's design and on oracle coalitions."""
        entries = (*self._coalitions(self.compared), *self._job_design())
        return [Study(self.label(c), entries, c) for c in self._rivals]

    @property
    def _rivals(self) -> list[Counterfactual]:
        """The section's counterfactuals, but for those that `steps` has already."""
        known = [canonical(c.recipe()) for c in self._steps]
        mine = self.spec.validation.counterfactuals
        return [c for c in mine if canonical(c.recipe()) not in known]

    def label(self, part: Counterfactual | Baseline) -> str:
        """Return what tables call a counterfactual or baseline: no two are called the same."""
        return self._labels[canonical(part.recipe())]

    @cached_property
    def _labels(self) -> dict[bytes, str]:
        section = self.spec.validation
        ours = (self.spec.counterfactual, section.oracle)
        parts: list[Any] = [*ours, *self._steps, *self._rivals, *section.baselines]
        recipes = {canonical(part.recipe()): part for part in parts}
        alike: dict[str, list[bytes]] = {}
        for recipe, part in recipes.items():
            alike.setdefault(brief(part), []).append(recipe)
        return {
            recipe: ", ".join([name, *_differing(recipes[recipe], [recipes[r] for r in twins])])
            for name, twins in alike.items()
            for recipe in twins
        }

    @cached_property
    def compared(self) -> list[Coalition]:
        """Oracle coalitions for v(S) itself to be compared on."""
        steps = self.spec.validation.steps
        return self.subsets(0)[: steps.coalitions if steps else 24]

    def _job_design(self) -> list[Entry]:
        """Return the job's design and endpoints; the noise that repeats tell is its own affair."""
        return [e for e in self.plan if e.role != "holdout" and e.sequence != "repeat"]

    def removal(self, ranks: Mapping[str, Sequence[int]]) -> Study:
        """Retrainings that follow from ranks: contributors by method, the first first."""
        found = {
            coalition.mask: coalition
            for order in ranks.values()
            for _, _, coalition in self.removals(order)
        }
        entries = self._coalitions(list(found.values()))
        return self._retrained("removal", entries, streams="removal")

    def removals(self, order: Sequence[int]) -> Iterator[tuple[bool, float, Coalition]]:
        """Yield (keeps, share, who is retrained): without the first ones, and on the first ones."""
        section = self.spec.validation.removal
        if section is None:
            return
        for share in section.remove:
            count = min(self.n - 1, max(1, round(share * self.n)))
            yield False, share, Coalition.of(order[count:], self.n)
        for share in section.keep:
            count = max(1, min(self.n - 1, int(share * self.n + 1e-9)))
            yield True, share, Coalition.of(order[:count], self.n)

    def _own(self, name: str, entries: Sequence[Entry]) -> Study:
        return Study(name, tuple(entries), self.spec.counterfactual)

    def _retrained(self, name: str, entries: Sequence[Entry], streams: str = "") -> Study:
        return Study(name, tuple(entries), self.spec.validation.oracle, streams=streams or name)


def brief(part: Any) -> str:
    """Return the kind of a counterfactual or baseline and the options one looks for first."""
    fields = part.recipe()
    said = [part.kind.replace("_", " ")]
    if "steps" in fields:
        said.append(f"{fields['steps']} steps")
    for name in ("base", "ema", "rank", "reduce"):
        default = type(part).model_fields.get(name)
        if default is not None and fields[name] != default.default:
            plain = name in ("base", "reduce")
            said.append(str(fields[name]) if plain else f"{name} {fields[name]}")
    return ", ".join(said)


def _differing(part: Any, twins: Sequence[Any]) -> list[str]:
    """Return the fields in which parts of one brief name differ."""
    fields = part.model_dump()
    others = [twin.model_dump() for twin in twins]
    return [
        f"{name} {value}"
        for name, value in fields.items()
        if any(other[name] != value for other in others)
    ]
