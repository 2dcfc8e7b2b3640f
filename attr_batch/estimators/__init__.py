"""Estimators: each is a design (which coalitions to measure) and its reading.

`plan(n)` and `estimate(observations, n)` belong to one object, so a mismatched pair cannot be
written. `ridge`, `paired_ls` and `gp` read the same design: switching between them measures nothing
anew. `permutation` has one of its own. `reference` is the paper's Eq. 5 as published, kept for
comparison; `exact` is the definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator

from attr_batch.errors import IncompleteDesign, SpecError
from attr_batch.estimators import design, regression
from attr_batch.estimators.attribution import (
    PAIRS_PER_CONTRIBUTOR,
    Attribution,
    attribute,
    with_interval,
)
from attr_batch.estimators.design import Entry, Role, Sizes
from attr_batch.estimators.gp import gaussian_process
from attr_batch.estimators.observations import Observation, gather
from attr_batch.estimators.permutation import permutation_means
from attr_batch.estimators.ridge import ridge
from attr_batch.estimators.semivalue import Semivalue, exact
from attr_batch.estimators.surrogate import Surrogate
from attr_batch.recipe import Part

__all__ = [
    "Attribution",
    "Entry",
    "Estimator",
    "Exact",
    "GaussianProcess",
    "Observation",
    "PairedLS",
    "Permutation",
    "Reference",
    "Ridge",
    "Role",
    "Semivalue",
    "Surrogate",
]

Confidence = Annotated[float, Field(gt=0, lt=1)]
_EXACT_LIMIT = 16
_FEWEST_ORDERS = 10  # fewer say little of how much orders differ


def _shapley_only(semivalue: Any) -> Any:
    if semivalue in get_args(Semivalue) and semivalue != "shapley":
        raise ValueError(f"this estimator reads shapley only; exact and gp read {semivalue}")
    return semivalue


ShapleyOnly = Annotated[Literal["shapley"], BeforeValidator(_shapley_only)]
Control = Annotated[
    Literal["data", "none"],
    Field(
        description="data: the property of the coalition's own images as a control variate, where "
        "that can be measured."
    ),
]


class _Budgeted(Part):
    """What the estimators that sample have in common.

    `budget` counts design evaluations, by default six for each contributor (the intervals need
    five); endpoints and holdout come on top. `max_failed` is how many entries of the plan may stay
    without a value. `target_half_width`, in the headline property's unit: stop after the first
    batch at which the mean half-width of its intervals is no wider; the budget is the upper limit.
    `continues`: digest, or its beginning, of an earlier job's spec with other contributors, whose
    coalitions stand in for those of the design that they are exchangeable with. `repeats`: the
    share of the design that is measured twice, which tells the noise; it comes on top.
    """

    budget: int | None = Field(default=None, ge=2, le=200_000)
    seed: int = 0
    confidence: Confidence = 0.95
    holdout: int = Field(default=12, ge=0, le=10_000)
    repeats: float = Field(default=0.05, ge=0, le=1)
    endpoint_replicates: int = Field(default=4, ge=1, le=100)
    max_failed: int = Field(default=0, ge=0)
    target_half_width: float | None = Field(default=None, gt=0)
    continues: str | None = Field(default=None, pattern="^[0-9a-f]{8,64}$")

    @field_validator("budget")
    @classmethod
    def _whole_pairs(cls, budget: int | None) -> int | None:
        if budget is not None and budget % 2:
            raise ValueError(
                f"budget {budget} is odd: evaluations come in complement pairs, take {budget + 1}"
            )
        return budget

    def _design(self, n: int) -> Iterator[Entry]:
        raise NotImplementedError

    def _default_budget(self, n: int) -> int:
        return min(6 * n, (1 << n) - 2)

    def plan(self, n: int) -> list[Entry]:
        """Return endpoints, the design's first `budget` entries, repeats, holdout.

        A larger budget only adds coalitions; with `reference` and `permutation` some may move from
        the holdout, which goes on in its sequence, to the design. Where the design needs nearly all
        coalitions there is less to hold out. SpecError below two contributors.
        """
        design.check_players(n)
        chosen = design.prefix(self._design(n), self.budget or self._default_budget(n))
        taken = {entry.coalition for entry in chosen}
        held = (e for e in design.holdout(n, self.seed) if e.coalition not in taken)
        return [
            *design.endpoints(n, self.endpoint_replicates),
            *chosen,
            *design.repeats(chosen, self.repeats),
            *design.prefix(held, self.holdout),
        ]


class _Paired(_Budgeted):
    """What reads the paired design.

    `sizes`: of the coalitions, by the Shapley kernel, uniform, or by the kernel in a window of
    shares of n, symmetric since a coalition comes with its complement.
    """

    sizes: Sizes = "kernel"
    surrogate: Control = "data"

    @field_validator("sizes")
    @classmethod
    def _symmetric(cls, sizes: Sizes) -> Sizes:
        if isinstance(sizes, tuple):
            low, high = sizes
            if not 0 <= low < 0.5 or abs(low + high - 1) > 1e-9:
                raise ValueError("a window is [x, 1 - x] with x from 0 to below 0.5, as [0.2, 0.8]")
        return sizes

    def _design(self, n: int) -> Iterator[Entry]:
        return design.paired(n, self.seed, self.sizes)

    def _control(self, surrogate: Surrogate | None) -> Surrogate | None:
        return surrogate if self.surrogate == "data" else None


class Reference(_Budgeted):
    """The paper's own: independent draws by the Shapley kernel and the closed form of Eq. 5."""

    kind: Literal["reference"] = "reference"
    repeats: float = Field(default=0.0, ge=0, le=1)
    interval: regression.Sandwich = "hc2"
    semivalue: ShapleyOnly = "shapley"

    def _design(self, n: int) -> Iterator[Entry]:
        return design.independent(n, self.seed)

    def estimate(
        self,
        observations: Sequence[Observation],
        n: int,
        surrogate: Surrogate | None = None,  # noqa: ARG002
    ) -> Attribution:
        """Return the values of Eq. 5. DataError where an endpoint or the design has no value."""
        evidence = gather(observations, n)
        phi = regression.closed_form(evidence.rows)
        return attribute(self.kind, evidence, self.confidence, phi, sandwich=self.interval)


class PairedLS(_Paired):
    """Least squares on differences of complement pairs: unshrunken, the one with the interval.

    Where the pairs do not determine all values, the smallest deviation from the equal split.
    """

    kind: Literal["paired_ls"] = "paired_ls"
    interval: regression.Sandwich = "hc2"
    semivalue: ShapleyOnly = "shapley"

    def estimate(
        self, observations: Sequence[Observation], n: int, surrogate: Surrogate | None = None
    ) -> Attribution:
        """Return the values. DataError where an endpoint or the design has no value."""
        evidence = gather(observations, n, self._control(surrogate))
        measured = exact(evidence.rows, "shapley")
        if measured is not None:
            return attribute(self.kind, evidence, self.confidence, measured[0])
        fit = regression.paired_least_squares(evidence.rows)
        return attribute(
            self.kind,
            evidence,
            self.confidence,
            fit.phi,
            weight=fit.weight,
            sandwich=self.interval,
        )


class Ridge(_Paired):
    """Ridge toward the equal split with size columns; lambda by REML. The default.

    The best of those measured at every budget (docs/method.md); it ranks better than it
    spreads: `shrinkage_slope` says by how much. With every coalition measured it is `exact`.
    """

    kind: Literal["ridge"] = "ridge"
    interval: regression.Sandwich = "hc2"
    semivalue: ShapleyOnly = "shapley"

    def estimate(
        self, observations: Sequence[Observation], n: int, surrogate: Surrogate | None = None
    ) -> Attribution:
        """Return the values. DataError where an endpoint or the design has no value."""
        evidence = gather(observations, n, self._control(surrogate))
        measured = exact(evidence.rows, "shapley")
        if measured is not None:
            return attribute(self.kind, evidence, self.confidence, measured[0], shrinkage_slope=1.0)
        fit = ridge(evidence.rows)
        return attribute(
            self.kind,
            evidence,
            self.confidence,
            fit.phi,
            shrinkage_slope=fit.slope,
            lam=fit.lam,
            columns=fit.columns,
            fading=fit.fading,
            fading_share=fit.share,
            collapsed=fit.lam is None,
            weight=fit.weight,
            sandwich=self.interval,
        )


class GaussianProcess(_Paired):
    """The posterior mean of a Gaussian process on coalitions; reads every semivalue.

    The interval is the posterior's, so it is as good as the model. With every coalition measured it
    is `exact`. A surrogate helps Shapley values only.
    """

    kind: Literal["gp"] = "gp"
    semivalue: Semivalue = "shapley"

    def estimate(
        self, observations: Sequence[Observation], n: int, surrogate: Surrogate | None = None
    ) -> Attribution:
        """Return the values. DataError where an endpoint or the design has no value."""
        control = self._control(surrogate) if self.semivalue == "shapley" else None
        evidence = gather(observations, n, control)
        rows = evidence.rows
        measured = exact(rows, self.semivalue) if rows.complete else None
        if measured is not None:
            return attribute(
                self.kind,
                evidence,
                self.confidence,
                measured[0],
                shrinkage_slope=1.0,
                semivalue=self.semivalue,
            )
        fit = gaussian_process(rows, self.semivalue)
        found = attribute(
            self.kind,
            evidence,
            self.confidence,
            fit.phi,
            shrinkage_slope=fit.slope,
            columns=fit.columns,
            collapsed=fit.collapsed,
            weight=fit.weight,
            semivalue=self.semivalue,
        )
        return with_interval(
            found,
            "gp-posterior",
            None if fit.collapsed or rows.pairs <= n else fit.variance,
            fit.df,
            not fit.collapsed and rows.pairs >= PAIRS_PER_CONTRIBUTOR * n,
            by_empty=fit.by_empty,
            by_full=fit.by_full,
            residual=fit.residual,
        )


class Permutation(_Budgeted):
    """Mean gains over antithetic permutations: unshrunken, and free of any model.

    A permutation takes 2 (n-1) evaluations with its reverse. One that the budget cuts is not read
    until the budget grows.
    """

    kind: Literal["permutation"] = "permutation"
    semivalue: ShapleyOnly = "shapley"

    @field_validator("continues")
    @classmethod
    def _starts_anew(cls, continues: str | None) -> None:
        if continues is not None:
            raise ValueError("permutations cannot go on from another job: it would break orders")

    def _design(self, n: int) -> Iterator[Entry]:
        return design.permutations(n, self.seed)

    def _default_budget(self, n: int) -> int:
        return min(6 * (n - 1), (1 << n) - 2)

    def plan(self, n: int) -> list[Entry]:
        """Return endpoints, `budget` entries of the design, repeats, holdout.

        SpecError below two contributors, and where the budget holds no whole permutation.
        """
        if self.budget is not None and self.budget < min(2 * n - 2, (1 << n) - 2):
            raise SpecError(
                f"a budget of {self.budget} holds no permutation of {n} contributors",
                "estimator.budget",
                f"one takes 2 (n-1) = {2 * n - 2} evaluations with its reverse",
            )
        return super().plan(n)

    def estimate(
        self,
        observations: Sequence[Observation],
        n: int,
        surrogate: Surrogate | None = None,  # noqa: ARG002
    ) -> Attribution:
        """Return the values. DataError where an endpoint or every permutation lacks a value."""
        evidence = gather(observations, n)
        measured = exact(evidence.rows, "shapley")
        if measured is not None:
            return attribute(self.kind, evidence, self.confidence, measured[0])
        fit = permutation_means(evidence.rows, design.orders(n, self.seed))
        return with_interval(
            attribute(self.kind, evidence, self.confidence, fit.phi),
            "permutation-t",
            fit.variance,
            fit.drawn - 1,
            fit.drawn >= _FEWEST_ORDERS,
            by_empty=fit.by_empty,
            by_full=fit.by_full,
            residual=evidence.noise.pooled[0],
        )


class Exact(Part):
    """The definition, from all 2^n coalitions (n <= 16). It has no budget, seed or holdout.

    Leave-one-out asks only for those that lack one contributor, whatever n.
    """

    kind: Literal["exact"] = "exact"
    semivalue: Semivalue = "shapley"
    confidence: Confidence = 0.95
    endpoint_replicates: int = Field(default=4, ge=1, le=100)
    max_failed: Literal[0] = 0

    def plan(self, n: int) -> list[Entry]:
        """Return endpoints and every coalition that the semivalue asks for.

        SpecError below two contributors, and above 16 but for leave-one-out.
        """
        design.check_players(n)
        ends = design.endpoints(n, self.endpoint_replicates)
        if self.semivalue == "leave_one_out":
            return [*ends, *design.all_but_one(n)]
        if n > _EXACT_LIMIT:
            raise SpecError(
                f"exact needs 2^{n} evaluations for {n} contributors",
                "estimator.kind",
                f"at most {_EXACT_LIMIT} contributors; else kind: ridge with a budget",
            )
        return [*ends, *design.exhaustive(n)]

    def estimate(
        self,
        observations: Sequence[Observation],
        n: int,
        surrogate: Surrogate | None = None,  # noqa: ARG002
    ) -> Attribution:
        """Return the values. IncompleteDesign unless every coalition asked for has a value."""
        evidence = gather(observations, n)
        measured = exact(evidence.rows, self.semivalue)
        if measured is None:
            one_out = self.semivalue == "leave_one_out"
            have = int((evidence.rows.s == n - 1).sum()) if one_out else len(evidence.rows.v)
            raise IncompleteDesign(
                f"exact has {have} of the {n if one_out else (1 << n) - 2} coalitions between the "
                f"endpoints that {self.semivalue} values ask for",
                hint="run again to fill in what is missing, or read the values with kind: gp",
            )
        return attribute(
            self.kind, evidence, self.confidence, measured[0], semivalue=self.semivalue
        )


Estimator = Annotated[
    Reference | PairedLS | Ridge | GaussianProcess | Permutation | Exact,
    Field(discriminator="kind"),
]
