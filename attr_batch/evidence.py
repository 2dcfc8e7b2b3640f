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


# -- validation.json ------------------------------------------------------------------------------


class Estimate(TypedDict):
    """A figure and its 95 % bootstrap interval; None where it could not be computed."""

    value: float | None
    low: float | None
    high: float | None


class OracleSet(TypedDict):
    """Coalitions that were retrained, of one size or of mixed sizes, and what limits an LDS there.

    All four figures are rank correlations (1 = perfect) under one protocol: prediction against one
    retraining. `ceiling`: one retraining predicted by another; `additivity`: by the best additive
    model, cross-validated on the retrainings themselves; `floor`: by the equal split; `chance95`:
    what unrelated numbers stay below with 95 % chance.
    """

    name: str  # "alpha=0.5", "mixed"
    alpha: float | None  # None for mixed sizes
    size: int | None
    subsets: int  # retrained so far
    planned: int
    seeds: int
    ceiling: Estimate
    additivity: Estimate
    floor: float | None
    chance95: float
    mean: float | None  # of the property over the retrainings
    sd: float | None


class Method(TypedDict):
    """One way to attribute, judged by the retrainings; a row of the comparison table."""

    name: str  # unique: "ridge", "reference", "leave_one_out", "finetune, ridge", "trak mean"
    family: Literal["estimator", "counterfactual", "baseline"]
    counterfactual: str | None  # "sparsified_finetune, 100 steps"
    evaluations: int  # coalitions fine-tuned (or retrained) for it, endpoints included
    seconds: float | None  # worker seconds for these evaluations, or for the baseline
    designs: int  # seeds of the design that the figures are averaged over
    collapsed: int | None  # in how many of them the ridge fell back to the equal split
    values: list[float]  # mean over designs, in the order of `contributors`
    by_design: list[list[float]]  # each design's: `lds` is the mean of their scores
    lds: dict[str, Estimate]  # by OracleSet.name
    lead: dict[str, Estimate]  # LDS of the headline less this one's, by OracleSet.name
    agreement: Estimate  # Pearson correlation with the Shapley values of the retrainings


class Fidelity(TypedDict):
    """How well v(S) of one counterfactual follows retraining (the paper's Eq. 6, Prop. 1)."""

    counterfactual: str  # kind
    steps: int | None
    ema: str | None  # restarted, raw, continued
    base: str | None  # dense, pruned: where the counterfactual leaves the choice
    coalitions: int
    pearson: Estimate  # with one retraining, mean over the oracle's seeds
    spearman: float | None
    rmse: float | None  # in the property's unit
    bias: float | None  # mean of v(S) less retraining
    seconds: float | None  # median worker seconds of a coalition


class Budget(TypedDict):
    """LDS by what was spent."""

    counterfactual: str  # "sparsified_finetune, 100 steps"
    estimator: str
    evaluations: int  # design coalitions
    seconds: float  # of these and the endpoints
    lds: float | None  # on the first oracle set, mean over designs
    agreement: float | None


class Removal(TypedDict):
    """Retraining without the contributors a method ranks first, or with these alone."""

    method: str
    keeps: bool  # False: the top `share` removed; True: only the top `share` kept
    share: float
    contributors: int  # removed or kept
    value: float
    change: float  # relative to retraining on everything


class PropertyValidation(TypedDict):
    """Everything found out about one property."""

    name: str
    title: str
    unit: str
    oracle: list[OracleSet]  # the first is the one that curves are drawn for
    methods: list[Method]  # the headline method first
    fidelity: list[Fidelity]
    fidelity_ceiling: Estimate  # Pearson correlation of one retraining with another
    budget: list[Budget]
    removal: list[Removal]
    reference: list[float] | None  # Shapley values of the retrainings
    reference_low: list[float] | None
    reference_high: list[float] | None
    reference_reliability: float | None  # share of their spread that is not noise
    v_full: float | None  # retrained on everything


class Validation(TypedDict):
    """`validation.json`: is the attribution right? Retrainings decide."""

    job: str
    spec_digest: str
    version: str
    contributors: list[str]
    oracle: str  # "retrain, 600 steps"
    complete: bool
    done: int  # evaluations
    planned: int
    seconds: dict[str, float]  # worker seconds by study
    bootstrap: int  # draws
    properties: list[PropertyValidation]  # the headline first
    provenance: dict[str, str]
