"""What the MLflow mirror costs: a played job of 1,000 coalitions, a real server on PostgreSQL.

    python benchmarks/mirror.py --json [--quick]

Everything but the evaluations is real: the ledger's files, the report, `attr-batch sync` as the
command calls it, HTTP to `mlflow server` with two workers on the same machine, PostgreSQL with its
defaults, artifacts through the server. The utilities are those of a game. Each row is one sync by
a fresh mirror: `first` of 900 coalitions, `grown` by the last 100, `again` with nothing new,
`rebuilt` of all after the mirror's runs were deleted, and that one request at a time. `--quick`: a
tenth of the coalitions.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import envelope
from mlflow import MlflowClient

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import played  # noqa: E402
from conftest import TINY  # noqa: E402
from servers import servers  # noqa: E402

from attr_batch import results, tracking  # noqa: E402
from attr_batch.job import Evaluation, Job  # noqa: E402
from attr_batch.spec import validate  # noqa: E402


class Requests(logging.Handler):
    """Counts the requests that urllib3 says it made."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.count = 0
        logger = logging.getLogger("urllib3.connectionpool")
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Look at one line of urllib3's log."""
        self.count += bool(re.search(r"HTTP/1\.1", record.getMessage()))


def utility(evaluation: Evaluation) -> float:
    """Return an additive game's value: contributor i adds i + 1."""
    return float(sum(i + 1 for i, bit in enumerate(str(evaluation.entry.coalition)) if bit == "1"))


def measure(coalitions: int, folder: Path, uri: str) -> list[dict[str, Any]]:
    estimator = {
        "kind": "ridge",
        "budget": 2 * round(0.46 * coalitions),
        "holdout": round(0.06 * coalitions),
        "endpoint_replicates": round(0.01 * coalitions),
        "surrogate": "none",
    }
    sections = {"estimator": estimator, "tracking": {"uri": uri, "contributors": "names"}}
    job = Job(validate({**TINY, "store": str(folder / "store"), **sections}))
    requests, rows = Requests(), []

    def sync(name: str, **facts: Any) -> None:
        requests.count, started = 0, time.perf_counter()
        results.sync(job)
        seconds = time.perf_counter() - started
        row = {"name": name, "coalitions": len(job.plan), "seconds": round(seconds, 2)}
        rows.append({**row, "requests": requests.count, **facts})

    def delete() -> None:
        """Delete every run: MLflow gives the first thousand that are left."""
        (found,) = [e for e in client.search_experiments() if e.name == "attr-batch"]
        while runs := client.search_runs([found.experiment_id], max_results=1000):
            with ThreadPoolExecutor(tracking.WRITERS) as pool:
                list(pool.map(client.delete_run, [run.info.run_id for run in runs]))

    client = MlflowClient(uri)
    played.prepare(job)
    most = round(0.9 * len(job.plan))
    played.publish(job, job.plan[:most], utility)
    sync("first", sent=most)
    played.publish(job, job.plan[most:], utility)
    results.publish(job)
    sync("grown", sent=len(job.plan) - most)
    sync("again", sent=0)
    delete()
    sync("rebuilt", sent=len(job.plan))
    delete()
    tracking.WRITERS = 1
    sync("rebuilt, one request at a time", sent=len(job.plan))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the MLflow mirror against a real server")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="100 coalitions")
    given = parser.parse_args()
    writers = tracking.WRITERS
    with tempfile.TemporaryDirectory() as name, servers() as (_, server):
        rows = measure(100 if given.quick else 1000, Path(name), server.uri)
    found = envelope(rows, server_workers=2, writers=writers)
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for r in rows:
        print(f"{r['name']:32} {r['seconds']:>8} s {r['requests']:>7} requests")


if __name__ == "__main__":
    main()
