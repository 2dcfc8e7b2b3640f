"""A validation as `validate` writes it, from a closed-form game.

Retrainings are an additive game with some interaction and noise; the methods' values are its true
values with more or less noise. Scores are computed, intervals are made up around them. Nothing
here tests an estimator.
"""

from __future__ import annotations

import numpy as np

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

SFT = "sparsified finetune, 100 steps"
# name, family, counterfactual, noise of the values, evaluations, seconds, collapsed
METHODS = [
    ("ridge", "estimator", SFT, 0.35, 66, 241.2, 1),
    ("paired_ls", "estimator", SFT, 0.8, 66, 241.2, None),
    ("gp", "estimator", SFT, 0.33, 66, 241.2, None),
    ("reference", "estimator", SFT, 1.4, 66, 239.8, None),
    ("leave_one_out", "baseline", SFT, 1.9, 16, 61.0, None),
    ("finetune, 100 steps, ridge", "counterfactual", "finetune, 100 steps", 0.6, 66, 702.4, 0),
    ("lora, 100 steps, ridge", "counterfactual", "lora, 100 steps", 1.1, 66, 655.0, 2),
    ("retrain, 600 steps, ridge", "counterfactual", "retrain, 600 steps", 0.25, 66, 3120.5, 0),
    ("influence unlearning, ridge", "counterfactual", "influence unlearning", 3, 66, 40, 0),
    ("single utilities", "baseline", SFT, 0.6, 16, 60.1, None),
    ("property of own images", "baseline", None, 0.3, 0, 0.4, None),
    ("image count", "baseline", None, 9.0, 0, 0.0, None),
    ("pixel similarity max", "baseline", None, 5.0, 0, 1.9, None),
    ("trak mean", "baseline", None, 2.5, 0, 88.0, None),
    ("d-trak mean", "baseline", None, 2.2, 0, 91.5, None),
    ("equal split", "baseline", None, None, 0, 0.0, None),
]


def validation(
    n: int = 10, *, ids: list[str] | None = None, complete: bool = True, seed: int = 0
) -> Validation:
    """Return a validation of two properties."""
    ids = ids or [f"artist {i:03d}" for i in range(n)]
    return Validation(
        job="digits: does it hold?",
        spec_digest="5e" * 32,
        version="0.2.0",
        contributors=ids,
        oracle="retrain, 600 steps",
        complete=complete,
        done=412 if complete else 137,
        planned=412,
        seconds={"oracle": 9211.4, "design": 731.2, "fidelity": 1204.9, "baselines": 183.3},
        bootstrap=1000,
        properties=[
            _property("cluster_entropy", "cluster entropy", "nats", ids, 2.86, 0.4, seed),
            _property("confidence", "mean confidence", "", ids, 0.71, 0.9, seed + 1),
        ],
        provenance={"torch": "2.9.0", "cpu": "avx2", "bases": "b4" * 32},
    )


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) < 1e-12:
        return 0.0
    ranks = [np.argsort(np.argsort(z)).astype(float) for z in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def _around(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=value - 1.2 * half, high=min(1.0, value + half))


def _property(
    name: str, title: str, unit: str, ids: list[str], full: float, noise: float, seed: int
) -> PropertyValidation:
    n, rng = len(ids), np.random.default_rng(seed)
    phi = rng.normal(0.5, 1.0, n)
    phi *= 0.1 * full / phi.std()
    spread = float(phi.std())
    oracle, sets = [], {}
    for alpha in (0.5, 0.25, 0.75, None):
        m = 100 if alpha == 0.5 else 20
        size = None if alpha is None else max(1, int(alpha * n))
        sizes = rng.integers(1, n, m) if size is None else np.full(m, size)
        Z = np.stack([rng.permutation(n) < s for s in sizes]).astype(float)
        truth = Z @ phi
        truth = truth + rng.normal(0, 0.3 * truth.std(), m)
        v = truth + rng.normal(0, noise * truth.std(), (2, m))
        key = "mixed" if alpha is None else f"alpha={alpha}"
        sets[key] = (Z, v[0])
        oracle.append(
            OracleSet(
                name=key,
                alpha=alpha,
                size=size,
                subsets=m if alpha else 12,
                planned=m,
                seeds=2 if alpha == 0.5 else 1,
                ceiling=_around(_spearman(v[0], v[1]), 0.04)
                if alpha == 0.5
                else Estimate(value=None, low=None, high=None),
                additivity=_around(_spearman(truth, v[0]), 0.05),
                floor=_spearman(Z.sum(1), v[0]),
                chance95=1.65 / (m - 1) ** 0.5,
                mean=0.8 * full + float(v.mean()),
                sd=float(v.std()),
            )
        )
    methods = [_method(m, phi, spread, sets, rng) for m in METHODS]
    head = methods[0]
    for method in methods[1:]:
        method["lead"] = {
            key: Estimate(value=lead, low=lead - half, high=lead + half)
            for key, half in zip(sets, (0.07, 0.2, 0.2, 0.2), strict=True)
            for lead in [_lds(head, key) - _lds(method, key)]
        }
    reference = phi + rng.normal(0, 0.2 * spread, n)
    half = 0.4 * spread
    return PropertyValidation(
        name=name,
        title=title,
        unit=unit,
        oracle=oracle,
        methods=methods,
        fidelity=_fidelity(rng, spread),
        fidelity_ceiling={"value": 0.94, "low": 0.86, "high": 0.98},
        budget=_budget(rng),
        removal=_removal(rng, full, n),
        reference=reference.tolist(),
        reference_low=(reference - half).tolist(),
        reference_high=(reference + half).tolist(),
        reference_reliability=0.87,
        v_full=full,
    )


def _lds(method: Method, key: str) -> float:
    value = method["lds"][key]["value"]
    assert value is not None
    return value


def _method(given, phi, spread, sets, rng) -> Method:
    name, family, counterfactual, noise, evaluations, seconds, collapsed = given
    values = np.full(len(phi), float(phi.mean()))
    if noise is not None:
        values = phi + rng.normal(0, noise * spread, len(phi))
    score = {
        key: _around(_spearman(Z @ values, v), 0.06 if len(v) == 100 else 0.22)
        for key, (Z, v) in sets.items()
    }
    agreement = 0.0 if noise is None else float(np.corrcoef(values, phi)[0, 1])
    return Method(
        name=name,
        family=family,
        counterfactual=counterfactual,
        evaluations=evaluations,
        seconds=seconds,
        designs=3,
        collapsed=collapsed,
        values=values.tolist(),
        by_design=[values.tolist()] * 3,
        lds=score,
        lead={},
        agreement=Estimate(value=None, low=None, high=None)
        if noise is None
        else _around(agreement, 0.08),
    )


def _fidelity(rng, spread) -> list[Fidelity]:
    kinds = [
        ("sparsified_finetune", "restarted", 0.93, 0.036),
        ("sparsified_finetune", "raw", 0.80, 0.036),
        ("sparsified_finetune", "continued", 0.70, 0.036),
        ("finetune", "restarted", 0.90, 0.104),
        ("lora", "restarted", 0.74, 0.09),
    ]
    rows = []
    for kind, ema, top, each in kinds:
        for steps in (25, 50, 100, 200) if kind == "sparsified_finetune" else (50, 100):
            r = top * (1 - np.exp(-steps / 40)) + rng.normal(0, 0.02)
            rows.append(
                Fidelity(
                    counterfactual=kind,
                    steps=steps,
                    ema=ema,
                    base=None,
                    coalitions=24,
                    pearson=_around(float(r), 0.09),
                    spearman=float(r - 0.03),
                    rmse=spread * float(1.1 - r),
                    bias=-0.2 * spread,
                    seconds=0.4 + each * steps,
                )
            )
    rows.append(
        Fidelity(
            counterfactual="influence_unlearning",
            steps=None,
            ema=None,
            base="dense",
            coalitions=24,
            pearson=_around(0.12, 0.2),
            spearman=0.1,
            rmse=2 * spread,
            bias=None,
            seconds=2.5,
        )
    )
    return rows


def _budget(rng) -> list[Budget]:
    kinds = [
        (SFT, "ridge", 0.9, 18, 3.6),
        (SFT, "reference", 0.75, 60, 3.6),
        ("finetune, 100 steps", "ridge", 0.88, 20, 10.4),
        ("retrain, 600 steps", "ridge", 0.92, 15, 47.0),
    ]
    return [
        Budget(
            counterfactual=kind,
            estimator=estimator,
            evaluations=m,
            seconds=each * (m + 6),
            lds=None
            if m == 12 and estimator == "reference"
            else float(top * (1 - np.exp(-m / slow)) + rng.normal(0, 0.02)),
            agreement=0.7,
        )
        for kind, estimator, top, slow, each in kinds
        for m in (12, 20, 30, 40, 60)
    ]


def _removal(rng, full: float, n: int) -> list[Removal]:
    strength = {
        "ridge": 0.5,
        "leave_one_out": 0.25,
        "property of own images": 0.46,
        "image count": 0.1,
    }
    rows = []
    for method, by in strength.items():
        for share in (0.1, 0.2, 0.3, 0.4):
            change = float(-by * share + rng.normal(0, 0.01))
            rows.append(
                Removal(method=method, keeps=False, share=share, contributors=round(share * n),
                        value=full * (1 + change), change=change)
            )  # fmt: skip
        for share in (0.6, 0.7, 0.8, 0.9, 0.95):
            change = float(0.4 * by * (1 - share) + rng.normal(0, 0.005))
            rows.append(
                Removal(method=method, keeps=True, share=share, contributors=round(share * n),
                        value=full * (1 + change), change=change)
            )  # fmt: skip
    return rows
