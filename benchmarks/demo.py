"""What `make demo` costs: wall seconds of the main job on a fresh store, and its share per phase.

    python benchmarks/demo.py --json [--quick]

The job is examples/digits/job.yaml as shipped; `--quick` shortens it (and measures only that the
program runs). The second run finds everything in the store.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import commit, machine

ROOT = Path(__file__).parent.parent
QUICK = [
    "model.training.steps=20",
    "pruning.recovery.steps=10",
    "counterfactual.steps=5",
    "sampling.images=64",
    "estimator.budget=8",
    "estimator.holdout=4",
]


def run(store: str, overrides: list[str]) -> tuple[float, dict[str, Any]]:
    """Run the job; return wall seconds and its attribution.json."""
    settings = [word for item in [f"store={store}", *overrides] for word in ("--set", item)]
    command = [sys.executable, "-m", "attr_batch.cli", "run", "examples/digits/job.yaml"]
    started = time.perf_counter()
    out = subprocess.run(
        [*command, *settings, "--json"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout
    return time.perf_counter() - started, json.loads(out)


def measure(quick: bool, keep: str | None) -> dict[str, Any]:
    """Run the job twice in a fresh store and put together what it cost and found."""
    overrides = QUICK if quick else []
    with contextlib.ExitStack() as stack:
        folder = keep or stack.enter_context(tempfile.TemporaryDirectory())
        wall, found = run(folder, overrides)
        again, _ = run(folder, overrides)
        (report,) = Path(folder).glob("reports/*")
        cost = json.loads((report / "cost.json").read_text())
        evidence = json.loads((report / "evidence.json").read_text())
    seconds = cost["seconds"]
    total = sum(seconds.values())
    pruning = evidence["pruning"]
    return {
        "name": "digits",
        "wall_seconds": round(wall, 1),
        "second_run_seconds": round(again, 1),
        "worker_seconds": seconds,
        "share_of_worker_seconds": {k: round(v / total, 3) for k, v in seconds.items()},
        "median_seconds_per_coalition": cost["median_seconds_per_coalition"],
        "evaluations": cost["evaluated"],
        "macs_ratio": round(pruning["macs_before"] / pruning["macs_after"], 2),
        "properties": {
            a["property"]: {
                "v_empty": a["v_empty"],
                "v_full": a["v_full"],
                "holdout": a["holdout"],
                "collapsed": a["collapsed"],
                "shrinkage_slope": a["shrinkage_slope"],
                "noise": a["noise"],
                "values": {c["id"]: c["value"] for c in a["contributors"]},
            }
            for a in found["attributions"]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="(always)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", metavar="STORE", help="a new store that is to stay")
    given = parser.parse_args()
    print(
        json.dumps(
            {
                "benchmark": "demo",
                "quick": given.quick,
                "machine": machine(),
                "torch": version("torch"),
                "commit": commit(),
                "rows": [measure(given.quick, given.keep)],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
