"""What a validation evaluates beside the job's plan: studies, each a list of coalitions.

    oracle          coalitions of a few sizes, retrained: what the LDS is measured on
    reference       a paired design, retrained: Shapley values of the definition itself
    design d        the job's own method on further seeds of its design
    sampling d      the paper's own draws, for its closed form
    left out, alone N without i, and i alone, under the job's method; `left out` retrained too
    k steps, ema    the job's counterfactual with other steps and weights, on oracle coalitions
    <counterfactual>  another way to a coalition's model, on the design and on oracle coalitions
    removal         retrained without those who are ranked first (once the ranks are known)

What retraining draws (weights, batches, initial noise) it shares neither with the job nor between
its own seeds: agreement by shared noise would flatter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from attr_batch.baselines import Baseline
from attr_batch.coalition import Coalition
from attr_batch.counterfactual import Counterfactual
from attr_batch.estimators import Entry, Exact, PairedLS, Reference
from attr_batch.estimators.design import of_size
from attr_batch.facts import Facts
from attr_batch.job import Job, Study
from attr_batch.spec import JobSpec

ORACLE = "oracle"  # name of the study, and of the random streams of all that is retrained


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
        """Retrainings of a paired design with its endpoints."""
        budget = self.spec.validation.reference
        plan = PairedLS(budget=budget, holdout=0, endpoint_replicates=2).plan(self.n)
        return self._retrained("reference", plan)

    @cached_property
    def designs(self) -> list[Study]:
        """The job's estimator on several seeds of its design; the first is the job itself."""
        estimator, first = self.spec.estimator, self._own("design 0", self.plan)
        if isinstance(estimator, Exact):  # every coalition is measured: there is one design
            return [first]
        others = [
            estimator.model_copy(update={"seed": estimator.seed + d, "continues": None})
            for d in range(1, self.spec.validation.designs)
        ]
        plans = (other.plan(self.n) for other in others)
        return [first, *(self._own(f"design {d}", plan) for d, plan in enumerate(plans, 1))]

    @cached_property
    def samplings(self) -> list[Study]:
        """The paper's own draws: independent, by the Shapley kernel."""
        estimator, section = self.spec.estimator, self.spec.validation
        if "reference" not in section.estimators or isinstance(estimator, Exact):
            return []
        plans = [
            Reference(budget=estimator.budget, seed=estimator.seed + d, holdout=0).plan(self.n)
            for d in range(section.designs)
        ]
        return [self._own(f"sampling {d}", plan) for d, plan in enumerate(plans)]

    @cached_property
    def left_out(self) -> Study:
        """Everyone but one, under the job's counterfactual."""
        return self._own("left out", self._left_out())

    @cached_property
    def left_out_retrained(self) -> Study:
        """Everyone but one, retrained."""
        return self._retrained("left out, retrained", self._left_out())

    @cached_property
    def alone(self) -> Study:
        """Each contributor alone, under the job's counterfactual."""
        return self._own("alone", self._coalitions([Coalition.of([i], self.n) for i in self._i]))

    @property
    def _i(self) -> range:
        return range(self.n)

    def _left_out(self) -> list[Entry]:
        everyone = Coalition.grand(self.n)
        alone = [Coalition.of([i], self.n).complement() for i in self._i]
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
        section, own = self.spec.validation.steps, self.spec.counterfactual
        if section is None or not {"steps", "ema"} <= own.recipe().keys():
            return []
        found = []
        for ema in section.ema:
            for k in section.steps:
                other = own.model_copy(update={"steps": k, "ema": ema})
                design = self._job_design() if ema == own.recipe()["ema"] else []
                entries = [*self._coalitions(self.compared), *design]
                found.append(Study(label(other), tuple(entries), other))
        return found

    @cached_property
    def rivals(self) -> list[Study]:
        """Other counterfactuals, on the job's design and on oracle coalitions."""
        entries = (*self._coalitions(self.compared), *self._job_design())
        return [Study(label(c), entries, c) for c in self.spec.validation.counterfactuals]

    @cached_property
    def compared(self) -> list[Coalition]:
        """Oracle coalitions for v(S) itself to be compared on."""
        steps = self.spec.validation.steps
        return self.subsets(0)[: steps.coalitions if steps else 24]

    def _job_design(self) -> list[Entry]:
        return [e for e in self.plan if e.role != "holdout"]

    def removal(self, ranks: Mapping[str, Sequence[int]]) -> Study:
        """Retrainings that follow from ranks: contributors by method, the first first."""
        found = {
            coalition.mask: coalition
            for order in ranks.values()
            for _, _, coalition in self.removals(order)
        }
        return self._retrained("removal", self._coalitions(list(found.values())))

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

    def _retrained(self, name: str, entries: Sequence[Entry]) -> Study:
        return Study(name, tuple(entries), self.spec.validation.oracle, streams=ORACLE)


def label(part: Counterfactual | Baseline) -> str:
    """Return what tables call a counterfactual or baseline: what differs from its defaults."""
    fields = part.recipe()
    parts = [part.kind.replace("_", " ")]
    if "steps" in fields:
        parts.append(f"{fields['steps']} steps")
    for name in ("base", "ema", "rank", "reduce"):
        default = type(part).model_fields.get(name)
        if default is not None and fields[name] != default.default:
            said = name in ("ema", "rank")
            parts.append(f"{name} {fields[name]}" if said else str(fields[name]))
    return ", ".join(parts)
