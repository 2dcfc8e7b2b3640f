"""What a large store costs to read: status, report and mirror of a job of 10,000 coalitions.

    python benchmarks/store.py --json [--quick]

In a folder, and in a bucket of a real S3 server (SeaweedFS) on this machine, in one run. Utilities
are those of an additive game, put where the runner would have put them; what is timed reads and
writes the real store. `snapshot` is the part of `sync` that reads the store (`benchmarks/mirror.py`
times the part that writes to MLflow); `first look` is what one shard of a thousand does before it
begins.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from attr_batch import outlook, results, runner
from attr_batch.facts import Facts
from attr_batch.job import Job
from benchmarks.measure import envelope, significant
from benchmarks.scale import spec, utility
from tests import played
from tests.s3 import BUCKET, SeaweedFS


def fill(job: Job) -> None:
    """Put everything that the job would leave into its store, with many writers."""
    from concurrent.futures import ThreadPoolExecutor

    played.prepare(job)
    with ThreadPoolExecutor(16) as pool:
        work = job.work
        parts = [work[i::16] for i in range(16)]
        list(pool.map(lambda part: played.publish(job, part, utility), parts))


def looks(job: Callable[[], Job]) -> dict[str, Callable[[], object]]:
    """Return what is timed, each on a job that has read nothing yet."""
    return {
        "status": lambda: outlook.status(job()),
        "report": lambda: results.publish(job()),
        "snapshot": lambda: results.snapshot(Facts(job())),
        "repair": lambda: job().ledger.bad_files(),
        "first look": lambda: runner.missing(job(), runner.part(job().work, 1, 7, 1000)),
    }


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(coalitions: int) -> list[dict[str, Any]]:
    """Return a row for each look: seconds in a folder, in a bucket, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        server = SeaweedFS(scratch)
        server.start()
        os.environ.update({**server.environment, "ATTR_BATCH_SCRATCH": str(scratch / "local")})
        places = {"folder": str(scratch / "store"), "bucket": f"s3://{BUCKET}/store"}
        try:
            took: dict[str, dict[str, float]] = {}
            for side, place in places.items():
                whole = spec(scratch / "images", place, coalitions)
                _ = (job := Job(whole)).dataset
                took[side] = {"fill": seconds(lambda job=job: fill(job))}
                for look, call in looks(lambda whole=whole: Job(whole)).items():
                    took[side][look] = min(seconds(call) for _ in range(2))
        finally:
            server.stop(signal.SIGKILL)
    return [
        {
            "name": look,
            "folder": significant(took["folder"][look]),
            "bucket": significant(took["bucket"][look]),
            "ratio": significant(took["bucket"][look] / took["folder"][look]),
        }
        for look in took["folder"]
    ]


def main() -> None:
    """Measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="300 coalitions")
    arguments = parser.parse_args()
    coalitions = 300 if arguments.quick else 10_000
    rows = measure(coalitions)
    if arguments.json:
        print(json.dumps(envelope(rows, coalitions=coalitions, unit="seconds"), indent=1))
        return
    for row in rows:
        print(f"{row['name']:<12}{row['folder']:>10} s{row['bucket']:>10} s{row['ratio']:>8}x")


if __name__ == "__main__":
    main()
