"""What a surrogate saves, and that a useless one does no harm: on games of known value, on images.

    python benchmarks/surrogate.py --json [--quick]

Games: five families (tests/games.py), i.i.d. noise of sd nu * sd(F). The surrogate of correlation
rho is a mixture of the game and another one of its family, less what that has in common with the
game; rho is the correlation of what both have beyond their size. `unrelated` is the other game as
it is, `constant` knows nothing. Error is |phi - truth| / |truth| of the ridge; `same_error_without`
is how many evaluations without a surrogate have the same mean error (read off between the budgets
on a log-log line; null beyond the largest). Coverage is that of the printed 95 % interval,
`half_width` its mean relative to the mean |value|.

Images: the values that `attr-batch run` has measured of the jobs in JOBS with their settings, where
their store is in the working folder; a job without them is named on stderr and left out. Fitted to
M of the 60 coalitions, checked on the 24 held out; means over random choices of whole pairs.
`same_rmse_without`: how many evaluations without a surrogate have the same error there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import games  # noqa: E402
from estimators import machine, observe, rounded  # noqa: E402
from measure import commit  # noqa: E402

from attr_batch.estimators import Ridge, Surrogate  # noqa: E402
from attr_batch.estimators.regression import LS_COLUMNS, orthonormal, size_columns  # noqa: E402
from attr_batch.facts import one_thread  # noqa: E402

JOBS = {  # and what is set otherwise than in the file
    "examples/digits/job.yaml": [],
    "examples/fashion/job.yaml": ["estimator.budget=60", "estimator.holdout=24"],
}
MEASURED = (12, 20, 30, 40, 50, 60)  # evaluations of a job that the estimators are given
CORRELATIONS = (0.95, 0.8, 0.6)
NAMES = ("none", *(f"rho={rho:g}" for rho in CORRELATIONS), "unrelated", "constant")


def correlated(game, other, rho):
    """Return the surrogate whose correlation with the game, beyond the size, is rho."""
    n, rng = game.n, np.random.default_rng(0)
    s = rng.integers(1, n, 4000)
    Z = (rng.random((4000, n)).argsort(axis=1) < s[:, None]).astype(float)
    line = np.column_stack([np.ones(len(s)), s])
    Q = orthonormal(np.hstack([line, size_columns(s, n, LS_COLUMNS)]))

    def beyond_size(v):
        return v - Q @ (Q.T @ v)

    a, b = beyond_size(game.value(Z)), beyond_size(other.value(Z))
    common = (a @ b) / (a @ a)
    rest = float(np.linalg.norm(b - common * a) / np.linalg.norm(a))
    share = np.sqrt(1 - rho**2) / rest
    return Surrogate(lambda Z: (rho - share * common) * game.value(Z) + share * other.value(Z))


def surrogates(family, n, seed):
    game, other = family(n, seed), family(n, seed + 100)
    found = [None, *(correlated(game, other, rho) for rho in CORRELATIONS)]
    found += [Surrogate(other.value), Surrogate(lambda Z: np.ones(len(Z)))]
    return game, dict(zip(NAMES, found, strict=True))


def measure(n, multiples, noises, seeds):
    """Yield one record an estimate: its cell, and error, whether inside, half-width, used."""
    for family, seed in itertools.product(games.FAMILIES, range(seeds)):
        game, offered = surrogates(family, n, seed)
        phi, spread = game.shapley(), game.sd()
        for multiple, nu in itertools.product(multiples, noises):
            plan = Ridge(budget=int(multiple * n) // 2 * 2, seed=seed, holdout=0).plan(n)
            rng = np.random.default_rng([seed, int(100 * nu), int(10 * multiple)])
            seen = observe(plan, game, nu * spread, rng)
            for name, surrogate in offered.items():
                found = Ridge().estimate(seen, n, surrogate)
                error = np.linalg.norm(np.array(found.values) - phi) / np.linalg.norm(phi)
                inside = width = None
                if found.low is not None and found.high is not None:
                    inside = float(np.mean((found.low < phi) & (phi < found.high)))
                    width = found.half_width / float(np.abs(phi).mean())
                use = found.surrogate is not None and found.surrogate.weight != 0
                cell = (n, nu, name, int(multiple * n) // 2 * 2)
                yield cell, game.name, (float(error), inside, width, float(use))


def rows(records):
    """Return one row a cell: means over the games, and what the same error costs without."""
    cells, by_game = defaultdict(list), defaultdict(list)
    for cell, game, record in records:
        cells[cell].append(record)
        by_game[cell, game].append(record)
    mean_error = {cell: float(np.mean([r[0] for r in found])) for cell, found in cells.items()}
    out = []
    for cell, found in cells.items():
        n, nu, name, evaluations = cell
        plain = sorted((c[3], e) for c, e in mean_error.items() if c[:3] == (n, nu, "none"))
        inside = [r[1] for r in found if r[1] is not None]
        games_inside = [
            np.mean([r[1] for r in group])
            for (c, _), group in by_game.items()
            if c == cell and group[0][1] is not None
        ]
        widths = [r[2] for r in found if r[2] is not None]
        same = equal_cost(plain, mean_error[cell])
        base = mean_error[n, nu, "none", evaluations]
        out.append(
            {
                "name": f"games: {name} n={n} M={evaluations} nu={nu:g}",
                "surrogate": name,
                "n": n,
                "evaluations": evaluations,
                "nu": nu,
                "error": rounded(mean_error[cell]),
                "error_without": rounded(base),
                "ratio": rounded(base / mean_error[cell]),
                "derived": True,
                "same_error_without": rounded(same, 0),
                "used": rounded(float(np.mean([r[3] for r in found])), 2),
                "coverage": rounded(float(np.mean(inside)) if inside else None),
                "coverage_worst_game": rounded(min(games_inside) if games_inside else None),
                "half_width": rounded(float(np.mean(widths)) if widths else None),
            }
        )
    return out


def equal_cost(plain, error):
    """Return the evaluations at which the plain curve has this error, None beyond its end."""
    for (m, e), (m_next, e_next) in itertools.pairwise(plain):
        if e >= error >= e_next:
            step = np.log(e / error) / np.log(e / e_next) if e > e_next else 0.0
            return float(m * (m_next / m) ** step)
    return float(plain[0][0]) if error > plain[0][1] else None


# -- images ---------------------------------------------------------------------------------------


def of_job(path, settings, choices):
    """Return a row for each property and number of coalitions; none without the values."""
    from attr_batch.errors import AttrBatchError
    from attr_batch.facts import Facts
    from attr_batch.job import Job
    from attr_batch.spec import load

    out = []
    try:
        job = Job(load(ROOT / path, settings))
        facts = Facts(job)
        if facts.missing():
            command = " ".join(["attr-batch run", path, *(f"--set {each}" for each in settings)])
            print(f"no {path}: its values are not in the store; {command}", file=sys.stderr)
            return []
        n = len(job.card.roster)
        for prop in job.spec.properties:
            seen, surrogate = facts.observations(prop), job.surrogate(prop)
            found = [
                checked(f"{job.spec.name}: {prop.name}", seen, n, surrogate, m, choices)
                for m in MEASURED
            ]
            plain = [(row["evaluations"], row["rmse_without"]) for row in found]
            out += [
                {**row, "same_rmse_without": rounded(equal_cost(plain, row["rmse"]), 0)}
                for row in found
            ]
    except AttrBatchError as error:
        print(f"no {path}: {error}", file=sys.stderr)
    return out


def checked(name, seen, n, surrogate, m, choices):
    pairs = sorted({o.pair for o in seen if o.role == "design"})
    rng, checks = np.random.default_rng(0), defaultdict(list)
    for _ in range(1 if m == 2 * len(pairs) else choices):
        fitted = set(rng.choice(pairs, m // 2, replace=False).tolist())
        some = [o for o in seen if o.role != "design" or o.pair in fitted]
        for on, offered in ((False, None), (True, surrogate)):
            found = Ridge().estimate(some, n, offered)
            check = found.holdout
            used = found.surrogate is not None and found.surrogate.weight != 0
            width = np.nan if found.half_width is None else found.half_width
            beyond = 0.0 if check.beyond_size is None else check.beyond_size
            checks[on].append((check.spearman, beyond, check.rmse, width, used))
    off, on = (np.mean(checks[key], axis=0) for key in (False, True))
    keys = ("spearman", "beyond_size", "rmse", "half_width")
    both = {
        key + suffix: rounded(None if np.isnan(side[i]) else side[i], 4)
        for suffix, side in (("", on), ("_without", off))
        for i, key in enumerate(keys)
    }
    return {
        "name": f"{name} M={m}",
        "evaluations": m,
        "held_out": check.coalitions,
        **both,
        "ratio": rounded(off[2] / on[2]),
        "derived": True,
        "used": rounded(on[4], 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="under a minute: n = 10, few seeds")
    arguments = parser.parse_args()
    jobs = [(10, 2)] if arguments.quick else [(10, 6), (20, 3)]
    records, choices = [], 5 if arguments.quick else 20
    with one_thread():  # more only get into each other's way
        for n, seeds in jobs:
            multiples = (2, 5) if arguments.quick else (1, 2, 3, 5, 10, 20)
            noises = (0.25,) if arguments.quick else (0.1, 0.25)
            records += measure(n, multiples, noises, seeds)
        images = [row for path, given in JOBS.items() for row in of_job(path, given, choices)]
    found = {
        "machine": machine(),
        "torch": None,  # the classifier alone uses it
        "commit": commit(),
        "rows": rows(records) + images,
    }
    if arguments.json:
        lines = ",\n".join(json.dumps(row) for row in found.pop("rows"))
        print(f'{json.dumps(found)[:-1]}, "rows": [\n{lines}\n]}}')
        return
    for row in found["rows"]:
        print(" ".join(f"{k}={v}" for k, v in row.items() if k != "derived"))


if __name__ == "__main__":
    main()
