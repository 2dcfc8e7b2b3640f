"""Estimators: each is a design (which coalitions to measure) and its reading.

`plan(n)` and `estimate(observations, n)` belong to one object, so a mismatched pair cannot be
written. `ridge` and `paired_ls` read the same design: switching between them measures nothing anew.
`reference` is the paper's Eq. 5 as published, kept for comparison; `exact` is the definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator

from attr_batch.errors import IncompleteDesign, SpecError
from attr_batch.estimators import design, regression
from attr_batch.estimators.attribution import Attribution, attribute
from attr_batch.estimators.design import Entry, Role
from attr_batch.estimators.observations import Observation, gather
from attr_batch.estimators.ridge import ridge
from attr_batch.estimators.surrogate import Surrogate
from attr_batch.recipe import Part

__all__ = [
    "Attribution",
    "Entry",
    "Estimator",
    "Exact",
    "Observation",
    "PairedLS",
    "Reference",
    "Ridge",
    "Role",
    "Surrogate",
]

Confidence = Annotated[float, Field(gt=0, lt=1)]
_EXACT_LIMIT = 16


class _Budgeted(Part):
    """What the estimators that sample have in common.

    `budget` counts design evaluations, by default six for each contributor (the intervals need
    five); endpoints and holdout come on top. `max_failed` is how many entries of the plan may stay
    without a value. `target_half_width`, in the headline property's unit: stop after the first
    batch at which the mean half-width of its intervals is no wider; the budget is the upper limit.
    `continues`: digest, or its beginning, of an earlier job's spec with other contributors, whose
    coalitions stand in for those of the design that they are exchangeable with.
    """

    budget: int | None = Field(None, ge=2, le=200_000)
    seed: int = 0
    confidence: Confidence = 0.95
    interval: regression.Sandwich = "hc2"
    holdout: int = Field(12, ge=0, le=10_000)
    endpoint_replicates: int = Field(4, ge=1, le=100)
    max_failed: int = Field(0, ge=0)
    target_half_width: float | None = Field(None, gt=0)
    continues: str | None = Field(None, pattern="^[0-9a-f]{8,64}$")

    @field_validator("budget")
    @classmethod
    def _whole_pairs(cls, budget: int | None) -> int | None:
        if budget is not None and budget % 2:
            raise ValueError(
                f"budget {budget} is odd: evaluations come in complement pairs, take {budget + 1}"
            )
        return budget

    def _design(self, n: int) -> Iterator[Entry]:
        return design.paired(n, self.seed)

    def plan(self, n: int) -> list[Entry]:
        """Return endpoints, the design's first `budget` entries, holdout, for n contributors.

        A larger budget only adds coalitions; with `reference` some may move from the holdout, which
        goes on in its sequence, to the design. Where the design needs nearly all coalitions there
        is less to hold out. SpecError below two contributors.
        """
        design.check_players(n)
        chosen = design.prefix(self._design(n), self.budget or min(6 * n, (1 << n) - 2))
        taken = {entry.coalition for entry in chosen}
        held = (e for e in design.holdout(n, self.seed) if e.coalition not in taken)
        return [
            *design.endpoints(n, self.endpoint_replicates),
            *chosen,
            *design.prefix(held, self.holdout),
        ]


class Reference(_Budgeted):
    """The paper's own: independent draws by the Shapley kernel and the closed form of Eq. 5."""

    kind: Literal["reference"] = "reference"

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


class PairedLS(_Budgeted):
    """Least squares on differences of complement pairs: unshrunken, the one with the interval.

    Where the pairs do not determine all values, the smallest deviation from the equal split.
    """

    kind: Literal["paired_ls"] = "paired_ls"

    def estimate(
        self, observations: Sequence[Observation], n: int, surrogate: Surrogate | None = None
    ) -> Attribution:
        """Return the values. DataError where an endpoint or the design has no value."""
        evidence = gather(observations, n, surrogate)
        if evidence.rows.complete:
            phi, _ = regression.exact(evidence.rows)
            return attribute(self.kind, evidence, self.confidence, phi, sandwich=self.interval)
        fit = regression.paired_least_squares(evidence.rows)
        return attribute(
            self.kind,
            evidence,
            self.confidence,
            fit.phi,
            weight=fit.weight,
            sandwich=self.interval,
        )


class Ridge(_Budgeted):
    """Ridge toward the equal split with size columns; lambda by REML. The default.

    The best of those measured at every budget (docs/method.md); it ranks better than it
    spreads: `shrinkage_slope` says by how much. With every coalition measured it is `exact`.
    """

    kind: Literal["ridge"] = "ridge"

    def estimate(
        self, observations: Sequence[Observation], n: int, surrogate: Surrogate | None = None
    ) -> Attribution:
        """Return the values. DataError where an endpoint or the design has no value."""
        evidence = gather(observations, n, surrogate)
        if evidence.rows.complete:
            phi, _ = regression.exact(evidence.rows)
            return attribute(
                self.kind,
                evidence,
                self.confidence,
                phi,
                shrinkage_slope=1.0,
                sandwich=self.interval,
            )
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


class Exact(Part):
    """The definition, from all 2^n coalitions (n <= 16). It has no budget, seed or holdout."""

    kind: Literal["exact"] = "exact"
    confidence: Confidence = 0.95
    endpoint_replicates: int = Field(4, ge=1, le=100)
    max_failed: Literal[0] = 0

    def plan(self, n: int) -> list[Entry]:
        """Return endpoints and every other coalition. SpecError unless 2 <= n <= 16."""
        design.check_players(n)
        if n > _EXACT_LIMIT:
            raise SpecError(
                f"exact needs 2^{n} evaluations for {n} contributors",
                "estimator.kind",
                f"at most {_EXACT_LIMIT} contributors; else kind: ridge with a budget",
            )
        return [*design.endpoints(n, self.endpoint_replicates), *design.exhaustive(n)]

    def estimate(
        self,
        observations: Sequence[Observation],
        n: int,
        surrogate: Surrogate | None = None,  # noqa: ARG002
    ) -> Attribution:
        """Return the values. IncompleteDesign unless every coalition has a value."""
        evidence = gather(observations, n)
        if not evidence.rows.complete:
            have, wanted = len(evidence.rows.v), (1 << n) - 2
            raise IncompleteDesign(
                f"exact has {have} of the {wanted} coalitions between the endpoints",
                hint="run again to fill in what is missing, or read the values with kind: ridge",
            )
        phi, _ = regression.exact(evidence.rows)
        return attribute(self.kind, evidence, self.confidence, phi)


Estimator = Annotated[Reference | PairedLS | Ridge | Exact, Field(discriminator="kind")]
