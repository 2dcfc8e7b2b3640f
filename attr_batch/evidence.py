"""What a report is made from, besides `attribution.json`: the evidence, and what the work cost.

`attribution.json` must be byte-identical for the same value files, so it holds only values. What a
reader needs to judge them (each utility, sample grids, cards of the instruments, failures) is the
*evidence*; what depends on when and where the job ran is the *cost*. Both are plain JSON. The
runner fills them from the ledger; `report` and `tracking` read them. Everything that may name a
contributor is in a field called `members` or in free text that `tracking` can rewrite.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class Utility(TypedDict):
    """One measured v(S): a row of the plan with its value."""

    coalition: str  # 0/1 string, contributor 0 first
    members: list[str]  # contributor ids, roster order
    size: int
    role: Literal["endpoint", "design", "holdout"]
    pair: int | None  # rows of one pair are complements
    replicate: int
    value: float
    stderr: float | None  # of the property over the samples drawn, not over training seeds
    predicted: NotRequired[float | None]  # what the attribution predicts; holdout rows


class PaperEndpoints(TypedDict):
    """The endpoints as the paper publishes them, neither of them pruned."""

    v_full: float | None  # the model trained on all data
    v_empty: float | None  # the untrained network, or the base without adapter


class PropertyEvidence(TypedDict):
    """What was measured of one property."""

    title: str  # "cluster entropy"
    higher_means: str  # completes "A higher value means ...": "more diverse images"
    utilities: list[Utility]
    paper: NotRequired[PaperEndpoints | None]


class Grid(TypedDict):
    """A sheet of samples; a coalition's members are printed after the caption."""

    caption: str
    members: list[str] | None  # None where it is no coalition's model, such as the unpruned one
    png_base64: str


class Pruning(TypedDict):
    """What pruning removed; MACs are of one forward pass on one image."""

    ratio: float
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int


class Instrument(TypedDict):
    """Something fitted that a property measures with; `card` holds whatever describes it."""

    kind: str
    card: dict[str, Any]


class Failure(TypedDict):
    """A plan entry without a value. It is absent from every estimate, never zero."""

    coalition: str
    members: list[str]
    replicate: int
    what: str


class Evidence(TypedDict):
    """Everything a report shows that is not a value and not a cost."""

    job: str
    provisional: bool  # made from an incomplete design, on request
    counterfactual: str  # "sparsified_finetune, 100 steps"
    base: str  # base id
    properties: dict[str, PropertyEvidence]  # by the name that attribution.json uses
    grids: list[Grid]
    pruning: Pruning | None  # None where the counterfactual does not prune
    instruments: list[Instrument]
    failures: list[Failure]
    warnings: list[str]  # such as: values of several machines in one report
    provenance: dict[str, str]  # printed as it is: versions, weights' sha256, device


class Cost(TypedDict):
    """`cost.json`: what depends on when, where and how often interrupted the job ran."""

    seconds: dict[str, float]  # by phase: base, recovery, instruments, finetune, sample, measure
    evaluated: int  # coalitions computed for this report
    reused: int  # coalitions found in the store
    median_seconds_per_coalition: float | None
    wall_seconds: float | None
    machines: list[str]
