"""Hostile inputs for every reader of foreign files: 100,000 in process, some through the command.

    python benchmarks/fuzz.py --json > benchmarks/results/fuzz.json

Ends with 1 if any input ended in a traceback, took longer than its limit, or was refused with an
exit code that its target does not allow; the row then says which, by name and number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import logging  # noqa: E402

from fuzzing import BYTES, SECONDS, Outcome, Range, attack, command_line  # noqa: E402
from measure import envelope  # noqa: E402


def row(name: str, outcome: Outcome) -> dict:
    """Return one target's outcome; memory is the most that the process ever had."""
    seconds, index = outcome.slowest
    return {
        "name": name,
        "inputs": outcome.inputs,
        "outcomes": dict(sorted(outcome.counts.items())),
        "seconds": round(outcome.seconds, 2),
        "slowest": {"seconds": round(seconds, 3), "input": index},
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "failures": [{"input": index, "what": what} for index, what in outcome.failures[:5]],
        "failed": len(outcome.failures),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.add_argument("--quick", action="store_true", help="2,000 inputs")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--commands", type=int, default=120)
    parser.add_argument("--only", default="", help="targets whose name holds this")
    arguments = parser.parse_args()
    inputs, commands = (2000, 20) if arguments.quick else (arguments.inputs, arguments.commands)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Range(Path(scratch))
        targets = place.targets
        whole = sum(target.share for target in targets)
        for target in targets:
            if arguments.only in target.name:
                count = math.ceil(inputs * target.share / whole)
                rows.append(row(target.name, attack(target, range(count))))
                print(target.name, rows[-1]["outcomes"], file=sys.stderr, flush=True)
        if not arguments.only:
            rows.append(row("command line", command_line(place, commands)))
    failed = sum(r["failed"] for r in rows)
    found = envelope(
        rows,
        limits={"seconds": SECONDS, "bytes": BYTES},
        inputs=sum(r["inputs"] for r in rows),
        failed=failed,
    )
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for r in rows:
            print(f"{r['name']:<48} {r['inputs']:>7} {r['seconds']:>8.1f} s  {r['outcomes']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
