"""Relative error, rank correlation, coverage and seconds of the estimators on games of known value.

    python benchmarks/estimators.py --json [--quick]

Five families (tests/games.py), i.i.d. noise of sd nu * sd(F). Error is |phi - truth| / |truth| in
the Euclidean norm; `ratio` is that of `reference`, the paper's closed form, over the estimator's.
`equal_split` gives everyone the same: an error near its own is no information. Coverage is that of
the printed 95 % interval, null where none is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import games  # noqa: E402

from attr_batch.estimators import Observation, PairedLS, Reference, Ridge  # noqa: E402
from attr_batch.estimators.attribution import spearman  # noqa: E402

KINDS = (Reference, PairedLS, Ridge)


def observe(plan, game, sd, rng):
    values = game.v([e.coalition.mask for e in plan]) + sd * rng.normal(size=len(plan))
    return [
        Observation(e.coalition, float(v), e.role, e.pair, e.replicate)
        for e, v in zip(plan, values, strict=True)
    ]


def measure(families, n, multiples, noises, seeds):
    """Yield one record an estimate: where it was made, and its error, rank, coverage, seconds."""
    for family in families:
        for seed in range(seeds):
            game = family(n, seed)
            phi, spread = game.shapley(), game.sd()
            for multiple in multiples:
                plans = {
                    k: k(budget=int(multiple * n) // 2 * 2, seed=seed, holdout=0).plan(n)
                    for k in KINDS
                }
                for nu in noises:
                    for kind, plan in plans.items():
                        rng = np.random.default_rng([seed, int(100 * nu), int(10 * multiple)])
                        seen = observe(plan, game, nu * spread, rng)
                        start = time.perf_counter()
                        found = kind().estimate(seen, n)
                        seconds = time.perf_counter() - start
                        inside = None
                        if found.low is not None and found.high is not None:
                            inside = np.mean(
                                (np.array(found.low) < phi) & (phi < np.array(found.high))
                            )
                        key = (game.name, n, multiple, nu, found.estimator)
                        yield key, score(found.values, phi), inside, found.shrinkage_slope, seconds
                    equal = np.full(n, (found.v_full - found.v_empty) / n)
                    yield (
                        (game.name, n, multiple, nu, "equal_split"),
                        score(equal, phi),
                        None,
                        None,
                        0.0,
                    )


def score(values, phi):
    values = np.asarray(values)
    rank = spearman(values, phi)
    return float(np.linalg.norm(values - phi) / np.linalg.norm(phi)), 0.0 if rank is None else rank


def rows(records, label):
    """Return one row a cell (n, M, nu, estimator): means over games, and each game's error."""
    cells = defaultdict(lambda: defaultdict(list))
    for (game, *cell), scores, inside, slope, seconds in records:
        cells[tuple(cell)][game].append((*scores, inside, slope, seconds))

    def mean(found, column):
        known = [r[column] for r in found if r[column] is not None]
        return float(np.mean(known)) if known else None

    out = []
    for (n, multiple, nu, kind), by_game in cells.items():
        every = [r for found in by_game.values() for r in found]
        reference = cells[n, multiple, nu, "reference"]
        base = np.mean([r[0] for found in reference.values() for r in found])
        coverage = {g: mean(found, 2) for g, found in by_game.items()}
        known = [c for c in coverage.values() if c is not None]
        out.append(
            {
                "name": f"{label}: {kind} n={n} M={multiple:g}n nu={nu:g}",
                "estimator": kind,
                "n": n,
                "evaluations": int(multiple * n) // 2 * 2,
                "nu": nu,
                "error": rounded(mean(every, 0)),
                "reference_error": rounded(float(base)),
                "ratio": rounded(float(base) / mean(every, 0)),
                "derived": True,
                "spearman": rounded(mean(every, 1)),
                "coverage": rounded(float(np.mean(known)) if known else None),
                "coverage_worst_game": rounded(min(known) if known else None),
                "slope": rounded(mean(every, 3)),
                "seconds": rounded(float(np.median([r[4] for r in every])), 5),
                "error_by_game": {g: rounded(mean(found, 0)) for g, found in by_game.items()},
            }
        )
    return out


def rounded(number, digits=3):
    return None if number is None else round(float(number), digits)


def machine():
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x.split(":", 1)[1] for x in info.read_text().splitlines() if "model name" in x]
        model = names[0].strip() if names else model
    return {"cpu": model, "python": platform.python_version(), "numpy": np.__version__}


def commit():
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="under a minute: n = 10 and 20")
    arguments = parser.parse_args()
    noises = (0.1, 0.25, 0.5)
    if arguments.quick:
        jobs = [(10, (2, 5, 20), 5), (20, (2, 5), 3)]
    else:
        jobs = [
            (10, (1, 2, 5, 20), 20),
            (20, (1, 2, 5, 20), 20),
            (50, (1, 2, 5, 20), 5),
            (258, (4,), 2),
        ]
    records = []
    for n, multiples, seeds in jobs:
        records += measure(games.FAMILIES, n, multiples, noises, seeds)
    linear = []
    for n in (10, 20) if arguments.quick else (10, 20, 50):
        linear += measure([games.linear], n, (5,), noises, 5 if arguments.quick else 20)
    found = {
        "machine": machine(),
        "torch": None,  # not used
        "commit": commit(),
        "rows": rows(records, "five games") + rows(linear, "linear"),
    }
    if arguments.json:
        lines = ",\n".join(json.dumps(row) for row in found.pop("rows"))
        print(f'{json.dumps(found)[:-1]}, "rows": [\n{lines}\n]}}')
        return
    for row in found["rows"]:
        print(
            f"{row['name']:48} error {row['error']:7.3f}  x{row['ratio']:<6.2f} "
            f"rank {row['spearman']:.2f}  coverage {row['coverage']}"
        )


if __name__ == "__main__":
    main()
