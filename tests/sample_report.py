"""A job's attribution, evidence and cost as the runner writes them, from a closed-form game.

Utilities come from a saturating game plus noise, so figures and tables look like a real job's; the
values are the game's additive part, shrunk as ridge would. Nothing here tests an estimator.
"""

import base64
import math
from typing import Any

import numpy as np

from attr_batch.coalition import Coalition
from attr_batch.evidence import Cost, Evidence, Grid, PropertyEvidence, Utility
from attr_batch.figures import grid_png

SPEC_DIGEST = "5e" * 32
HOSTILE = (
    '<script>alert("x")</script>',
    'Ana&Bo\'s "studio"',
    "\u202egnitirw sdrawkcab\u202c",
    "مريم الخطيب",
    "👩‍🎨 studio 🎨",
    "\x1b[31mred\x1b[0m\x00",
    "   ",
    "the-very-long-name-of-an-atelier-that-nobody-ever-thought-of-shortening-" * 3,
    "梅原龍三郎と安井曾太郎の記念館",
    "ordinary",
)


def names(n: int) -> list[str]:
    """Return n plausible contributor ids."""
    first = ("Arda", "Bekele", "Castro", "Dvorak", "Eriksen", "Farouk", "Gruber", "Haddad", "Ito")
    return [f"{first[i % 9]} {i // 9 + 1:02d}" if n > 9 else first[i] for i in range(n)]


def job(
    n: int = 10,
    pairs: int = 30,
    *,
    ids: list[str] | None = None,
    provisional: bool = False,
    seed: int = 0,
    images: np.ndarray | None = None,
) -> tuple[dict[str, Any], Evidence, Cost]:
    """Return (attribution.json, evidence, cost) of a job with three properties."""
    ids = ids or names(n)
    n = len(ids)
    properties = [
        _property(
            "cluster_entropy", "cluster entropy", ids, pairs, seed, 2.6, 0.95, "more variety"
        ),
        _property(
            "confidence", "mean confidence", ids, pairs, seed + 1, 0.25, 0.62, "clearer images"
        ),
        _property("inception_score", "Inception Score", ids, 4, seed + 2, 5.1, 1.1, "both"),
    ]
    attribution = {"headline": "cluster_entropy", "attributions": [a for a, _ in properties]}
    if images is None:
        images = np.random.default_rng(seed).integers(0, 255, (16, 1, 8, 8), dtype=np.uint8)
    evidence = Evidence(
        job="digits: who made it various",
        provisional=provisional,
        counterfactual="sparsified_finetune, 100 steps",
        base="b4" * 32,
        properties={a["property"]: e for a, e in properties},
        grids=_grids(ids, images, seed),
        pruning={
            "ratio": 0.5,
            "macs_before": 8_512_000,
            "macs_after": 2_155_000,
            "parameters_before": 361_000,
            "parameters_after": 93_400,
        },
        instruments=[
            {"kind": "classifier", "card": {"heldout_accuracy": 0.989, "epochs": 8, "classes": 11}},
            {"kind": "clusters", "card": {"clusters": 20, "features": "pixels"}},
        ],
        failures=[
            {
                "coalition": "1" * (n - 1) + "0",
                "members": ids[:-1],
                "replicate": 0,
                "what": f"loss is not finite at step 31 of the model without {ids[-1]}",
            }
        ],
        warnings=["values were computed on two CPU models: they agree to 1e-9 relative only"],
        provenance={"torch": "2.13.0", "python": "3.11", "cpu": "avx2, avx512"},
    )
    cost = Cost(
        seconds={
            "base": 26.1,
            "recovery": 11.2,
            "instruments": 7.4,
            "finetune": 171.0,
            "sample": 26.4,
            "measure": 3.1,
        },
        evaluated=2 * pairs - 8,
        reused=8,
        median_seconds_per_coalition=3.3,
        wall_seconds=161.0,
        machines=["worker-0", "worker-1"],
    )
    return attribution, evidence, cost


def _property(
    name: str, title: str, ids: list[str], pairs: int, seed: int, gain: float, v0: float, means: str
) -> tuple[dict[str, Any], PropertyEvidence]:
    n = len(ids)
    rng = np.random.default_rng(seed)
    weight = rng.gamma(1.5, size=n)
    weight /= weight.sum()
    phi = gain * (0.5 / n + 0.5 * weight)
    if name == "confidence":
        phi = gain * (weight + rng.normal(0, 0.5 / n, n))
        phi *= gain / phi.sum()
    noise = 0.12 * gain / math.sqrt(n)

    def v(members: tuple[int, ...]) -> float:
        return float(
            v0 + gain * (max(phi[list(members)].sum(), 0.0) / gain) ** 0.7 + rng.normal(0, noise)
        )

    rows: list[Utility] = []

    def measure(coalition: Coalition, role: Any, pair: int | None, replicate: int = 0) -> None:
        inside = coalition.members
        predicted = float(v0 + phi[list(inside)].sum() + 0.15 * gain) if role == "holdout" else None
        rows.append(
            Utility(
                coalition=str(coalition),
                members=[ids[i] for i in inside],
                size=coalition.size,
                role=role,
                pair=pair,
                replicate=replicate,
                value=v(inside),
                stderr=noise / 3,
                predicted=predicted,
            )
        )

    for replicate in range(3):
        measure(Coalition.empty(n), "endpoint", None, replicate)
        measure(Coalition.grand(n), "endpoint", None, replicate)
    for k in range(pairs + 8):
        size = int(rng.integers(1, n))
        coalition = Coalition.of(map(int, rng.choice(n, size, replace=False)), n)
        measure(coalition, "design" if k < pairs else "holdout", k if k < pairs else None)
        if k < pairs:
            measure(coalition.complement(), "design", k)
    held = [u for u in rows if u["role"] == "holdout"]
    both = np.array([[u.get("predicted"), u["value"]] for u in held], float)
    rank = both.argsort(axis=0).argsort(axis=0) - (len(held) - 1) / 2
    spearman = (rank[:, 0] @ rank[:, 1]) / (rank[:, 0] @ rank[:, 0])
    ls = phi + rng.normal(0, 0.6 * noise, n)
    ls += (gain - ls.sum()) / n
    shrunk = gain / n + 0.7 * (ls - gain / n)
    se = np.full(n, 0.6 * noise) * rng.uniform(0.8, 1.2, n)
    known = pairs > n
    contributors = [
        {
            "id": ids[i],
            "value": float(shrunk[i]),
            "ls_value": float(ls[i]) if known else None,
            "se": float(se[i]) if known else None,
            "low": float(ls[i] - 2 * se[i]) if known else None,
            "high": float(ls[i] + 2 * se[i]) if known else None,
            "share": float(shrunk[i] / gain) if shrunk.min() > 0 else None,
            "images": int(rng.integers(20, 190)),
            "digest": f"{i:064x}",
        }
        for i in range(n)
    ]
    attribution = {
        "property": name,
        "semivalue": "shapley",
        "estimator": "ridge",
        "v_empty": v0,
        "v_full": v0 + gain,
        "efficiency_gap": 2.2e-16,
        "contributors": contributors,
        "interval": {
            "method": "paired-ls-hc2-t",
            "confidence": 0.95,
            "df": pairs - n,
            "pairs": pairs,
            "reliable": pairs >= 2.5 * n,
        },
        "coalitions": {"planned": 2 * pairs + 15, "used": 2 * pairs + 14, "failed": 1},
        "holdout": {
            "spearman": float(spearman),
            "rmse": 0.11 * gain,
            "coalitions": len(held),
            "chance95": 0.64,
            "size_spearman": 0.71,
            "size_rmse": 0.2 * gain,
            "beyond_size": 0.68,
            "predicted": {},
        },
        "noise": {"sd": noise},
        "shrinkage_slope": 0.7,
        "collapsed": False,
        "recipe": {"recipe_version": 1, "counterfactual": {"steps": 100}},
        "spec_digest": SPEC_DIGEST,
        "numerics": {"device": "cpu", "ops": "reference", "dtype": "bfloat16", "batch": 512},
        "version": "0.1.0",
    }
    facts = PropertyEvidence(
        title=title,
        higher_means=means,
        utilities=rows,
        paper={"v_full": v0 + 1.12 * gain, "v_empty": v0 - 0.2 * gain},
    )
    return attribution, facts


def _grids(ids: list[str], images: np.ndarray, seed: int) -> list[Grid]:
    rng = np.random.default_rng(seed)
    half = sorted(map(int, rng.choice(len(ids), len(ids) // 2, replace=False)))
    sheets = [
        ("trained on everybody's images", None),
        ("pruned and recovered", None),
        ("untrained", []),
        ("coalition of half the contributors", [ids[i] for i in half]),
        ("coalition of one", ids[:1]),
    ]
    return [
        Grid(
            caption=caption,
            members=members,
            png_base64=base64.b64encode(grid_png(np.roll(images, k, axis=0), 8)).decode(),
        )
        for k, (caption, members) in enumerate(sheets)
    ]
