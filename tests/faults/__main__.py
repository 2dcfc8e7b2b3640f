"""Run the scenarios, print a line for each, write the result file."""

from __future__ import annotations

import argparse
import fcntl
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import commit, machine

from . import disks, kills, services, shards, surroundings
from .bench import Bench, Row, play

SCENARIOS = {
    **kills.SCENARIOS,
    **shards.SCENARIOS,
    **disks.SCENARIOS,
    **surroundings.SCENARIOS,
    **services.SCENARIOS,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file; rows of other scenarios stay in it")
    parser.add_argument("--quick", action="store_true", help="each fault once")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SCENARIOS, default=SCENARIOS)
    arguments = parser.parse_args()
    missed = False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and leave nothing running
    with tempfile.TemporaryDirectory(prefix="attr-batch-faults-") as scratch:
        bench = Bench(Path(scratch), arguments.quick)
        for row in play(bench, {name: SCENARIOS[name] for name in arguments.only}):
            print(line(row), flush=True)
            missed = missed or row.missed is not None
            if arguments.out:
                record(
                    arguments.out,
                    {**row.to_json(), "commit": commit(), "quick": arguments.quick},
                )
    return int(missed)


def record(out: Path, row: dict[str, Any]) -> None:
    """Put a scenario's row into the result file, which others may be writing to as well."""
    with out.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = {old["name"]: old for old in json.loads(file.read() or '{"rows": []}')["rows"]}
        rows[row["name"]] = row
        result = {"machine": machine(), "rows": [rows[name] for name in SCENARIOS if name in rows]}
        file.truncate(0)
        file.write(json.dumps(result, indent=1) + "\n")


def line(row: Row) -> str:
    """Return what the terminal shows of a scenario."""
    came = "same bytes" if row.same_bytes else "as promised"
    came = "MISSED" if row.missed else "not here" if row.not_here else came
    hits = ", ".join(f"{phase} {count}" for phase, count in sorted(row.hits.items()))
    codes = ", ".join(f"{code} x {count}" for code, count in sorted(row.exit_codes.items()))
    facts = ", ".join(f"{name} {value}" for name, value in row.facts.items())
    detail = row.missed or row.not_here or "; ".join(filter(None, (hits, codes, facts)))
    return f"{time.strftime('%X')} {row.name:<18} {row.seconds:6.1f} s  {came}  {detail}"


if __name__ == "__main__":
    sys.exit(main())
