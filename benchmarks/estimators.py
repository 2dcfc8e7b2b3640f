"""Relative error, rank correlation, coverage and seconds of the estimators on games of known value.

    python benchmarks/estimators.py --json [--quick]

Five families and four on which nothing was tuned (tests/games.py), i.i.d. noise of sd nu * sd(F).
Error is |phi - truth| / |truth| in the Euclidean norm; `ratio` is that of `reference`, the paper's
closed form, over the estimator's. `equal_split` gives everyone the same: an error near its own is
no information. Coverage is that of the printed 95 % interval, null where none is printed.

The peer is shapiq (rows `shapiq ...`), with as many evaluations as ours have, endpoints counted; a
coalition has one noisy value however often it asks. `acceptance` holds what was promised.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import shapiq

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import games  # noqa: E402
from measure import commit  # noqa: E402

from attr_batch.errors import SpecError  # noqa: E402
from attr_batch.estimators import (  # noqa: E402
    GaussianProcess,
    Observation,
    PairedLS,
    Permutation,
    Reference,
    Ridge,
)
from attr_batch.estimators.attribution import spearman  # noqa: E402
from attr_batch.facts import one_thread  # noqa: E402

OURS = {
    "reference": (Reference, {}),
    "paired_ls": (PairedLS, {}),
    "ridge": (Ridge, {}),
    "gp": (GaussianProcess, {}),
    "permutation": (Permutation, {}),
    "paired_ls uniform": (PairedLS, {"sizes": "uniform"}),
    "ridge uniform": (Ridge, {"sizes": "uniform"}),
    "gp uniform": (GaussianProcess, {"sizes": "uniform"}),
    "ridge window": (Ridge, {"sizes": (0.1, 0.9)}),
    "gp window": (GaussianProcess, {"sizes": (0.1, 0.9)}),
}
THEIRS = {
    "shapiq KernelSHAP": lambda n, seed: shapiq.KernelSHAP(
        n, pairing_trick=False, random_state=seed
    ),
    "shapiq KernelSHAP paired": lambda n, seed: shapiq.KernelSHAP(
        n, pairing_trick=True, random_state=seed
    ),
    "shapiq UnbiasedKernelSHAP": lambda n, seed: shapiq.UnbiasedKernelSHAP(n, random_state=seed),
    "shapiq kADDSHAP": lambda n, seed: shapiq.kADDSHAP(n, max_order=2, random_state=seed),
    "shapiq PermutationSamplingSV": lambda n, seed: shapiq.PermutationSamplingSV(
        n, random_state=seed
    ),
    "shapiq SVARM": lambda n, seed: shapiq.SVARM(n, random_state=seed),
    "shapiq StratifiedSamplingSV": lambda n, seed: shapiq.StratifiedSamplingSV(
        n, random_state=seed
    ),
    "shapiq OwenSamplingSV": lambda n, seed: shapiq.OwenSamplingSV(
        n, n_anchor_points=2, random_state=seed
    ),
}
_PEER_LIMIT = 64  # contributors: above, sampling all sizes takes shapiq minutes


def observe(plan, game, sd, rng):
    values = game.v([e.coalition.mask for e in plan]) + sd * rng.normal(size=len(plan))
    return [
        Observation(e.coalition, float(v), e.role, e.pair, e.replicate)
        for e, v in zip(plan, values, strict=True)
    ]


def ask_peer(make, game, sd, rng, evaluations, seed):
    """Return a peer's values, or None where it cannot work with so few evaluations."""
    known = {}

    def value(Z):
        Z = np.atleast_2d(Z)
        for row in Z:
            if row.tobytes() not in known:
                noise = sd * rng.normal()
                known[row.tobytes()] = float(game.value(row[None].astype(float))[0]) + noise
        return np.array([known[row.tobytes()] for row in Z])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what shapiq lacks at small budgets
        try:
            found = make(game.n, seed).approximate(evaluations, value).get_n_order_values(1)
        except (ValueError, IndexError, np.linalg.LinAlgError):
            return None
    assert len(known) <= evaluations
    return found if np.isfinite(found).all() else None


def measure(families, n, multiples, noises, seeds):
    """Yield one record an estimate: where it was made, and its error, rank, coverage, seconds."""
    for family in families:
        for seed in range(seeds):
            game = family(n, seed)
            phi, spread = game.shapley(), game.sd()
            for multiple in multiples:
                plans = plans_of(n, int(multiple * n) // 2 * 2, seed)
                evaluations = max(map(len, plans.values()))
                for nu in noises:
                    where = (game.name, n, multiple, nu)
                    stream = [seed, int(100 * nu), int(10 * multiple)]
                    for name, plan in plans.items():
                        seen = observe(plan, game, nu * spread, np.random.default_rng(stream))
                        yield (*where, name), *read(OURS[name][0](seed=seed), seen, phi)
                    ends = [o.value for o in seen if o.role == "grand"]
                    starts = [o.value for o in seen if o.role == "empty"]
                    equal = np.full(n, (np.mean(ends) - np.mean(starts)) / n)
                    yield (*where, "equal_split"), score(equal, phi), None, None, 0.0
                    for name, make in THEIRS.items() if n <= _PEER_LIMIT else ():
                        rng, start = np.random.default_rng(stream), time.perf_counter()
                        values = ask_peer(make, game, nu * spread, rng, evaluations, seed)
                        if values is not None:
                            seconds = time.perf_counter() - start
                            yield (*where, name), score(values, phi), None, None, seconds


def plans_of(n, budget, seed):
    """Return the plan of each of our estimators that can work with so few evaluations."""
    plans = {}
    for name, (kind, options) in OURS.items():
        try:
            plans[name] = kind(budget=budget, seed=seed, holdout=0, **options).plan(n)
        except SpecError:
            continue
    return plans


def read(estimator, seen, phi):
    start = time.perf_counter()
    found = estimator.estimate(seen, len(phi))
    seconds = time.perf_counter() - start
    inside = None
    if found.low is not None and found.high is not None:
        inside = np.mean((np.array(found.low) < phi) & (phi < np.array(found.high)))
    return score(found.values, phi), inside, found.shrinkage_slope, seconds


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


def acceptance(found):
    """Return the promises (mean over the five games), each with what was found."""
    by_name = {row["name"]: row for row in found}

    def at(label, kind, n, multiple, nu):
        return by_name.get(f"{label}: {kind} n={n} M={multiple}n nu={nu:g}")

    promises = []

    def promise(text, value, least=-np.inf, most=np.inf):
        if value is not None:
            bounds = [f">= {least}"] * (least > -np.inf) + [f"<= {most}"] * (most < np.inf)
            promises.append(
                {
                    "promise": text,
                    "wanted": ", ".join(bounds),
                    "found": value,
                    "holds": least <= value <= most,
                }
            )

    for kind in ("ridge", "gp", "gp uniform"):
        for n, bounds in ((20, (0.35, 0.45, 0.6)), (50, (0.3, 0.35, 0.4))):
            for nu, most in zip((0.1, 0.25, 0.5), bounds, strict=True):
                if row := at("five games", kind, n, 5, nu):
                    relative = rounded(row["error"] / row["reference_error"])
                    promise(
                        f"{kind}, n={n}, nu={nu}: error over closed form's", relative, most=most
                    )
        for nu, most, least in ((0.1, 0.22, 0.87), (0.25, 0.36, 0.75)):
            if row := at("five games", kind, 20, 5, nu):
                promise(f"{kind}, n=20, nu={nu}: error", row["error"], most=most)
                promise(f"{kind}, n=20, nu={nu}: rank correlation", row["spearman"], least=least)
        for row in found:
            if row["estimator"] != kind:
                continue
            label, cell = row["name"].split(": ")
            if label != "linear":
                equal = by_name[row["name"].replace(f": {kind} ", ": equal_split ")]["error"]
                relative = rounded(row["error"] / equal)
                promise(f"{label}, {cell}: error over equal split's", relative, most=1.1)
            elif row["evaluations"] == 5 * row["n"]:
                relative = rounded(1 / row["ratio"])
                promise(f"linear, {cell}: error over closed form's", relative, most=1.25)
    for row in found:
        enough = row["evaluations"] >= 5 * row["n"] and row["name"].startswith("five")
        if row["estimator"] == "paired_ls" and enough:
            worst = row["coverage_worst_game"]
            promise(f"{row['name']}: coverage", row["coverage"], 0.9, 0.98)
            promise(f"{row['name']}: coverage, worst game", worst, least=0.85)
    return promises


def machine():
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x.split(":", 1)[1] for x in info.read_text().splitlines() if "model name" in x]
        model = names[0].strip() if names else model
    return {"cpu": model, "python": platform.python_version(), "numpy": np.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="under a minute: n = 10 and 20")
    arguments = parser.parse_args()
    noises = (0.1, 0.25, 0.5)
    if arguments.quick:
        jobs = [(10, (2, 5), (0.1, 0.5), 2), (20, (5,), (0.1,), 2)]
    else:
        jobs = [
            (10, (1, 2, 5, 20), noises, 20),
            (20, (1, 2, 5, 20), noises, 20),
            (50, (1, 2, 5), noises, 5),
            (50, (20,), (0.1,), 2),
            (258, (4,), noises, 2),
        ]
    with one_thread():  # more only get into each other's way
        report(everything(jobs, noises, arguments.quick), arguments.json)


def everything(jobs, noises, quick):
    """Return the rows of all games."""
    found = []
    for label, families in (("five games", games.FAMILIES), ("unseen games", games.UNSEEN)):
        records = []
        for n, multiples, levels, seeds in jobs:
            if label == "five games" or (n <= 20 and not quick):
                print(f"{label}, n={n}", file=sys.stderr, flush=True)
                records += measure(families, n, multiples, levels, seeds)
        found += rows(records, label)
    linear = []
    for n in (10, 20) if quick else (10, 20, 50):
        linear += measure([games.linear], n, (5,), noises, 5 if quick else 20)
    return found + rows(linear, "linear")


def report(found, as_json):
    """Print the rows and the promises."""
    body = {
        "machine": machine(),
        "torch": None,  # not used
        "commit": commit(),
        "shapiq": shapiq.__version__,
        "acceptance": acceptance(found),
        "rows": found,
    }
    if as_json:
        lines = ",\n".join(json.dumps(row) for row in body.pop("rows"))
        print(f'{json.dumps(body)[:-1]}, "rows": [\n{lines}\n]}}')
        return
    for row in body["rows"]:
        print(
            f"{row['name']:58} error {row['error']:7.3f}  x{row['ratio']:<6.2f} "
            f"rank {row['spearman']:.2f}  coverage {row['coverage']}  {row['seconds']:.3f} s"
        )
    for check in body["acceptance"]:
        if not check["holds"]:
            print(f"missed: {check['promise']} {check['found']}, wanted {check['wanted']}")


if __name__ == "__main__":
    main()
