"""What a job gains and loses by going on from one with other contributors (estimator.continues).

    python benchmarks/continued.py --json [--quick]

Games of known value (tests/games.py) of ten contributors, 60 evaluations, noise of a tenth of the
utility's spread, read by paired least squares. `new`: a design of its own. `in front`: the earlier
job's valid coalitions first, each with its new complement, then the new design. `exchanged`: what
`continues` does. `known` is how many of the 60 the earlier job, of six evaluations a contributor,
had measured; error is |phi - truth| / |truth| (root mean square), coverage that of the 95 %
interval, null where no interval could be had.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import games  # noqa: E402
from measure import commit  # noqa: E402

from attr_batch.coalition import Coalition  # noqa: E402
from attr_batch.estimators import Observation, PairedLS  # noqa: E402
from attr_batch.estimators.continued import continued  # noqa: E402

N, BUDGET, NOISE = 10, 60, 0.1
# Where each contributor of the earlier job stands in this one; None: gone, or with other images.
CHANGES: dict[str, list[int | None]] = {
    "one came": [*range(9)],
    "two came": [*range(8)],
    "one left": [None, *range(10)],
    "one sent other images": [*range(9), None],
}


def valid(place, seed):
    """Return the coalitions of the earlier job that hold nobody who is not here."""
    found = []
    for entry in PairedLS(holdout=0, seed=seed).plan(len(place)):
        members = [place[i] for i in entry.coalition.members]
        if entry.role in ("design", "grand") and None not in members:
            found.append(Coalition.of(members, N))
    return [c for c in dict.fromkeys(found) if c.size < N]


def in_front(plan, known):
    """Return the plan with the known coalitions first, each followed by its complement."""
    drawn = [e.coalition for e in plan if e.role == "design" and not e.index % 2]
    firsts: dict[int, Coalition] = {}
    for coalition in (*known, *drawn):
        firsts.setdefault(min(coalition.mask, coalition.complement().mask), coalition)
    pairs, found = iter(firsts.values()), []
    for entry in plan:
        if entry.role != "design":
            found.append(entry)
        elif entry.index % 2:
            found.append(replace(entry, coalition=found[-1].coalition.complement()))
        else:
            found.append(replace(entry, coalition=next(pairs)))
    return found


def row(change, game, design, runs):
    place, phi, sd = CHANGES[change], game.shapley(), NOISE * game.sd()
    shared = Coalition.of((i for i in place if i is not None), N)
    off, inside, counts = [], [], []
    for seed in range(runs):
        known = valid(place, seed)
        plan = PairedLS(budget=BUDGET, holdout=0, seed=10_000 + seed).plan(N)
        if design == "in front":
            plan = in_front(plan, known)
        elif design == "exchanged":
            plan = continued(plan, shared, known)
        counts.append(len({e.coalition for e in plan} & set(known)))
        v = game.v([e.coalition.mask for e in plan])
        v = v + sd * np.random.default_rng(seed).normal(size=len(plan))
        seen = [Observation(e.coalition, x, e.role) for e, x in zip(plan, v, strict=True)]
        read = PairedLS().estimate(seen, N)
        off.append(np.array(read.values) - phi)
        if read.low is not None and read.high is not None:
            inside.append(np.mean((np.array(read.low) < phi) & (phi < np.array(read.high))))
    length = np.linalg.norm(phi)
    return {
        "name": f"{change}, {game.name}, {design}",
        "known": round(float(np.mean(counts)), 1),
        "error": round(float(np.sqrt((np.array(off) ** 2).sum(1).mean()) / length), 3),
        "bias": round(float(np.linalg.norm(np.mean(off, 0)) / length), 3),
        "coverage": round(float(np.mean(inside)), 3) if inside else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs")
    arguments = parser.parse_args()
    runs = 20 if arguments.quick else 200
    rows = [
        row(change, family(N, 1), design, runs)
        for change in CHANGES
        for family in (games.log_total, games.synergy, games.class_entropy)
        for design in ("new", "in front", "exchanged")
    ]
    if arguments.json:
        # torch is not used
        found = {"machine": platform.machine(), "torch": None, "commit": commit(), "runs": runs}
        lines = ",\n".join(json.dumps(each) for each in rows)
        print(f'{json.dumps(found)[:-1]}, "rows": [\n{lines}\n]}}')
        return
    for each in rows:
        print(
            f"{each['name']:46s} known {each['known']:4.1f}  error {each['error']:.3f}  "
            f"bias {each['bias']:.3f}  coverage {each['coverage']}"
        )


if __name__ == "__main__":
    main()
