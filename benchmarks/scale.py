"""What coordination costs: a sharded job of which only the evaluation itself is played.

    python benchmarks/scale.py --into benchmarks/results/scale.json
    python benchmarks/scale.py --into ... --store bucket --coalitions 10000 --shards 100

Shards are processes, at most 16 at a time, that run `runner.run` as pods do; some are killed at
random and started again, as a Job controller would. Everything is real but two things: the utility
of a coalition is that of an additive game, published at once instead of trained, sampled and
measured; and a shard does its work in its own process, forked with the plan made, instead of in
spawned workers (what a pod spends on making the plan is measured apart). With `--store bucket` the
store is a bucket of a real S3 server on this machine. At the end every planned run is there once,
with the right value. `--into` replaces the row of the same store and size in a result file.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from attr_batch import ledger, runner
from attr_batch.job import Evaluation, Job
from attr_batch.ledger import Ledger
from attr_batch.spec import validate
from attr_batch.store import Folder, is_temporary
from benchmarks.measure import commit, envelope, significant
from tests import played
from tests.conftest import TINY
from tests.s3 import BUCKET

CONTRIBUTORS = 20
AT_ONCE = 16
WEIGHTS = np.arange(1.0, CONTRIBUTORS + 1)


def utility(evaluation: Evaluation) -> float:
    """Return the utility of the additive game: its Shapley values are `WEIGHTS`."""
    return float(sum(WEIGHTS[i] for i in evaluation.entry.coalition.members))


def spec(folder: Path, store: str, coalitions: int) -> Any:
    """Return the spec of a job with so many design evaluations, on images made here."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    lines = ["file_name,artist"]
    for i in range(2 * CONTRIBUTORS):
        picture = generator.integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        lines.append(f"{i}.png,artist-{i % CONTRIBUTORS:02d}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    data = {"kind": "image_folder", "path": str(folder), "contributor": "artist"}
    design = {"kind": "ridge", "surrogate": "none", "budget": coalitions, "holdout": 4}
    return validate(
        {
            **TINY,
            "store": store,
            "data": {**data, "size": 8, "channels": 1},
            "estimator": {**design, "endpoint_replicates": 2},
        }
    )


# -- one shard ------------------------------------------------------------------------------------


class Tally(collections.Counter):
    """Counts what is asked of the store."""

    def watch(self, owner: Any, names: tuple[str, ...]) -> None:
        """Count the calls of these functions or methods."""
        for name in names:
            setattr(owner, name, self._counted(getattr(owner, name), name))

    def _counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self[name] += 1
            return call(*arguments, **options)

        return counted


def shard(job: Job, store: str, number: int, shards: int, out: Path) -> None:
    """Be one shard; leave behind what it asked of the store and how much it evaluated."""
    os.environ["ATTR_BATCH_SCRATCH"] = str(out / f"scratch-{number}")
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    job.ledger = Ledger(store)  # a client of its own: connections do not survive a fork
    ledger._TOKEN = secrets.token_hex(8)  # as a spawned process has one of its own
    tally, evaluated = Tally(), []
    if isinstance(job.ledger.store, Folder):
        tally.watch(Folder, ("read", "exists", "children", "publish", "replace", "delete"))
    else:
        import obstore

        calls = ("get", "head", "put", "delete", "list_with_delimiter", "list")
        tally.watch(obstore, calls)

    def run_one(evaluation: Evaluation, *_: object) -> None:
        if job.missing_properties(evaluation):
            played.publish(job, [evaluation], utility)
            evaluated.append(evaluation.key)

    def evaluate(job: Job, shard: int, shards: int, *_: object) -> None:
        worker = runner.Worker(runner.Laboratory(job), shard, shards, secrets.token_hex(8))
        worker.work(prepares=False)

    runner.run_one, runner.evaluate = run_one, evaluate
    with (out / f"{number}-{secrets.token_hex(4)}.log").open("w") as log:
        os.dup2(log.fileno(), 2)
        runner.run(job, number, shards)
    seconds = time.process_time()
    found = {"shard": number, "evaluated": len(evaluated), "seconds": seconds, "asked": tally}
    (out / f"{number}.json").write_text(json.dumps(found))


# -- all of them ----------------------------------------------------------------------------------


def simulate(job: Job, store: str, shards: int, kills: int, out: Path) -> dict[str, Any]:
    """Run all shards, at most `AT_ONCE` at a time, killing some; return what it took."""
    context = multiprocessing.get_context("fork")
    waiting = collections.deque(range(shards))
    running: dict[int, Any] = {}
    chance = random.Random(0)
    killed = restarted = 0
    started = time.monotonic()
    next_kill = started + 2.0
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number = waiting.popleft()
            running[number] = context.Process(target=shard, args=(job, store, number, shards, out))
            running[number].start()
        time.sleep(0.02)
        if killed < kills and time.monotonic() > next_kill and running:
            victim = chance.choice(sorted(running))
            os.kill(running[victim].pid, signal.SIGKILL)
            killed += 1
            next_kill = time.monotonic() + chance.uniform(0.5, 4.0)
        for number, process in [*running.items()]:
            if process.exitcode is None:
                continue
            del running[number]
            if process.exitcode != 0:
                if process.exitcode != -signal.SIGKILL:
                    logs = "\n".join(p.read_text()[-2000:] for p in out.glob(f"{number}-*.log"))
                    raise RuntimeError(f"shard {number} ended with {process.exitcode}: {logs}")
                restarted += 1
                waiting.appendleft(number)
    return {"wall_seconds": time.monotonic() - started, "killed": killed, "restarted": restarted}


def in_child(work: Callable[..., None], *arguments: Any) -> None:
    """Run something in a forked process, so that no connection is made in this one."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{work.__name__} failed")


def prepare(job: Job, store: str, out: Path) -> None:
    """Publish spec, plan, and what all share."""
    os.environ["ATTR_BATCH_SCRATCH"] = str(out / "scratch-prepare")
    job.ledger = Ledger(store)
    played.prepare(job)


def judge(job: Job, store: str, out: Path) -> None:
    """Check that nothing is lost, double or damaged, and that the values are the game's."""
    os.environ["ATTR_BATCH_SCRATCH"] = str(out / "scratch-judge")
    job.ledger = held = Ledger(store)
    files = [n for n in held.store.walk("runs") if not is_temporary(n.rpartition("/")[2])]
    planned = {e.key: e for e in job.work}
    by_run = collections.Counter(name.split("/")[1] for name in files)
    lost, files_each = set(planned) - set(by_run), 1 + len(job.spec.properties)
    double = [key for key, count in by_run.items() if key not in planned or count != files_each]
    prop = job.spec.properties[0]
    names = {
        held.value_name(key, prop.name, job.property_digest(prop)): e for key, e in planned.items()
    }
    for name, fact in held.facts(names).items():
        assert fact is not None, name
        assert fact["value"] == utility(names[name]), name
    (path,) = [n for n in held.store.walk("reports") if n.endswith("attribution.json")]
    found = json.loads(held.store.read(path) or b"")["attributions"][0]["contributors"]
    worst = max(abs(c["value"] - w) for c, w in zip(found, WEIGHTS, strict=True))
    left = [n for n in held.store.walk("work") if n.startswith("work/heartbeats/")]
    facts = {
        "lost": len(lost),
        "double_or_not_planned": len(double),
        "files": sum(len(held.store.walk(f)) for f in (*FAMILIES, "reports")),
        "heartbeats_left": len(left),
        "worst_error_of_a_value": worst,
    }
    (out / "judged.json").write_text(json.dumps(facts))
    assert not lost, f"lost: {lost}"
    assert not double, f"double or not planned: {double}"


FAMILIES = ("specs", "plans", "bases", "properties", "runs")


@contextmanager
def place(bucket: bool, scratch: Path) -> Iterator[str]:
    """Yield where the store is: a folder, or a bucket of a server that runs meanwhile."""
    if not bucket:
        yield str(scratch / "store")
        return
    # Apart from this process, which forks and so may hold no connection.
    command = [sys.executable, str(Path(__file__).parent.parent / "tests/s3.py")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in server.stdout or ():
            name, _, value = line.removeprefix("export ").strip().partition("=")
            os.environ[name] = value
            if name == "AWS_REGION":  # the last
                break
        yield f"s3://{BUCKET}/scale"
    finally:
        server.terminate()
        server.wait()


def measure(coalitions: int, shards: int, kills: int, bucket: bool) -> dict[str, Any]:
    """Return one row of the result."""
    with tempfile.TemporaryDirectory() as name, place(bucket, Path(name)) as store:
        scratch = Path(name)
        job = Job(spec(scratch / "images", str(scratch / "plan-only"), coalitions))
        started = time.process_time()
        keys = [e.key for e in job.work]
        _ = job.plan_lines
        plan_seconds = time.process_time() - started
        out = scratch / "out"
        out.mkdir()
        in_child(prepare, job, store, out)
        took = simulate(job, store, shards, kills, out)
        in_child(judge, job, store, out)
        found = [json.loads(path.read_text()) for path in out.glob("[0-9]*.json")]
        asked: collections.Counter = sum(
            (collections.Counter(one["asked"]) for one in found), collections.Counter()
        )
        return {
            "name": "bucket" if bucket else "folder",
            "coalitions": len(keys),
            "shards": shards,
            "at_once": AT_ONCE,
            **took,
            **json.loads((out / "judged.json").read_text()),
            "evaluated_by_survivors": sum(one["evaluated"] for one in found),
            "asked": dict(asked),
            "asked_per_coalition": significant(asked.total() / len(keys)),
            "cpu_seconds_per_coalition": significant(sum(o["seconds"] for o in found) / len(keys)),
            "cpu_seconds_for_the_plan": significant(plan_seconds),
        }


def main() -> None:
    """Measure, print the row, put it into the result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--into", type=Path, help="result file; other rows of it stay")
    parser.add_argument("--quick", action="store_true", help="a thousand coalitions, 20 shards")
    parser.add_argument("--coalitions", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=1_000)
    parser.add_argument("--store", choices=("folder", "bucket"), default="folder")
    arguments = parser.parse_args()
    size = (1_000, 20, 4) if arguments.quick else (arguments.coalitions, arguments.shards, 40)
    row = {"commit": commit(), **measure(*size, arguments.store == "bucket")}
    print("\n".join(f"{name:<28}{value}" for name, value in row.items()))
    if arguments.into:
        old = json.loads(arguments.into.read_text())["rows"] if arguments.into.exists() else []
        rows = {(r["name"], r["coalitions"]): r for r in (*old, row)}
        whole = envelope([rows[key] for key in sorted(rows)])
        arguments.into.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
