"""A job to disturb, its processes, and the oracle: the same bytes as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from attr_batch.errors import AttrBatchError
from attr_batch.job import Job
from attr_batch.spec import load

from .watched import WIDTH

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0  # seconds after which a process that should have ended hangs
GRACE = 30.0  # seconds that a cluster gives a pod after SIGTERM

# Small enough to be run a hundred times, long enough to be hit in every phase.
TREE: dict[str, Any] = {
    "name": "faults",
    "data": {"kind": "digits"},
    "model": {
        "kind": "unet",
        "block_out_channels": [8, 16],
        "training": {"steps": 60, "batch": 32, "warmup": 2},
    },
    "pruning": {"kind": "magnitude", "ratio": 0.5, "recovery": {"steps": 30, "batch": 32}},
    "counterfactual": {"kind": "sparsified_finetune", "steps": 12, "batch": 32},
    "sampling": {"steps": 6, "images": 48, "batch": 48, "keep": "all"},
    "properties": [{"kind": "cluster_entropy"}],
    "estimator": {"kind": "ridge", "budget": 8, "holdout": 4, "endpoint_replicates": 2},
    "resources": {"device": "cpu", "workers": 1},
}
EXIT_CODES = {0, 1} | {kind.exit_code for kind in AttrBatchError.__subclasses__()}


class Missed(AssertionError):
    """The job did not do what it promises."""


class NotHere(Exception):
    """This machine cannot do a fault for real."""


def expect(truth: object, what: str) -> None:
    """Missed, saying `what`, unless `truth`."""
    if not truth:
        raise Missed(what)


def wait_for(what: str, truth: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until `truth`; Missed after so many seconds."""
    last = time.monotonic() + seconds
    while not truth():
        expect(time.monotonic() < last, f"{seconds:.0f} s without: {what}")
        time.sleep(0.02)


@dataclass
class Row:
    """What is reported of one scenario."""

    name: str
    what: str
    hits: Counter[str] = field(default_factory=Counter)  # faults by the phase that they met
    exit_codes: Counter[int] = field(default_factory=Counter)
    compared: int = 0  # jobs whose bytes were compared with the undisturbed ones
    same_bytes: bool | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    not_here: str | None = None
    missed: str | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the row of the result file."""
        return {
            **vars(self),
            "hits": dict(sorted(self.hits.items())),
            "exit_codes": {str(code): count for code, count in sorted(self.exit_codes.items())},
            "seconds": round(self.seconds, 1),
        }


class Process:
    """One command in a process group of its own, its messages in a file."""

    def __init__(self, row: Row, command: Sequence[str], folder: Path, env: dict[str, str]) -> None:
        self._row, self._log = row, folder / "log.txt"
        self.watch = Path(env["FAULTS_WATCH"])
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
                cwd=ROOT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self.code is None

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    @property
    def log(self) -> str:
        """What it said so far on stderr."""
        return self._log.read_text(errors="replace")

    @property
    def phases(self) -> dict[int, str]:
        """The phase of each of its living processes, by pid."""
        found = {}
        for place in self.watch.iterdir():
            if place.name.isdecimal() and _state(int(place.name)) not in ("", "Z"):
                found[int(place.name)] = place.read_bytes()[:WIDTH].decode().strip()
        return found

    @property
    def workers(self) -> dict[int, str]:
        """The phase of each worker process that has begun, by pid."""
        return {pid: phase for pid, phase in self.phases.items() if "spawn_main" in _command(pid)}

    @property
    def parent(self) -> int:
        """The pid of attr-batch itself, below whatever wraps it."""
        ours = [pid for pid in self.phases if "spawn_main" not in _command(pid)]
        return min(ours, default=self.pid)

    def kill(self, number: int = signal.SIGKILL, pid: int | None = None) -> None:
        """Send a signal to the whole group, or to one process of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number) if pid is None else os.kill(pid, number)

    def end(self, *codes: int, seconds: float = PATIENCE) -> str:
        """Wait for the end, which must have one of these exit codes; return stdout."""
        try:
            out, _ = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill(signal.SIGKILL)
            self._process.communicate()
            raise Missed(f"still there after {seconds:.0f} s:\n{self.log[-2000:]}") from None
        code = self._process.returncode
        self._row.exit_codes[code] += 1
        said = f"exit code {code}, wanted one of {codes}:\n{self.log[-2000:]}"
        expect(not codes or code in codes, said)
        expect(code in EXIT_CODES or code < 0, said)
        return out.decode()

    def quiet(self) -> None:
        """Check that it explained itself without a traceback."""
        expect("Traceback" not in self.log, self.log[-3000:])

    def gone(self, seconds: float = GRACE) -> None:
        """Check that no process of its group is left within so many seconds."""
        wait_for("the end of all its processes", lambda: not _group(self.pid), seconds)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def _stat(pid: int) -> list[str]:
    """Return state, parent, group, ... of a process as the kernel tells it; [] if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _state(pid: int) -> str:
    return next(iter(_stat(pid)), "")


def _group(group: int) -> list[int]:
    """Return the living processes of a process group."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    stats = {pid: stat for pid in pids if (stat := _stat(pid))}
    return [pid for pid, (state, _, of, *_) in stats.items() if int(of) == group and state != "Z"]


class Site:
    """One job in a store of its own."""

    def __init__(self, bench: Bench, folder: Path, store: str, tree: dict[str, Any]) -> None:
        self.bench, self.folder = bench, folder
        self.tree = {**tree, "store": store}
        self.yaml = folder / "job.yaml"
        self.yaml.write_text(yaml.safe_dump(self.tree, sort_keys=False))
        self.env = dict(bench.env)  # of every process that is started from now on
        self._started = 0

    @property
    def row(self) -> Row:
        return self.bench.row

    @property
    def store(self) -> Path:
        """The folder of a local store."""
        return Path(self.tree["store"])

    @property
    def job(self) -> Job:
        """The job as a reader sees it now."""
        return Job(load(self.yaml))

    def start(
        self, *arguments: str, command: str = "run", wrapper: Sequence[str] = (), **env: str
    ) -> Process:
        """Start an attr-batch command of this job, behind `wrapper`."""
        self._started += 1
        folder = self.folder / f"process-{self._started:03d}"
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):
            (folder / "nan").hardlink_to(self.folder / "nan")
        python = [sys.executable, "-m", "tests.faults.watched"]
        line = [*wrapper, *python, command, str(self.yaml), *arguments]
        environment = {**self.env, **env, "FAULTS_WATCH": str(folder)}
        process = Process(self.row, line, folder, environment)
        self.bench.started.append(process)
        return process

    def run(self, *arguments: str, codes: Sequence[int] = (0,), **options: Any) -> Process:
        """Run a command to its end, which must have one of these exit codes, explained."""
        process = self.start(*arguments, **options)
        self.said = process.end(*codes)
        process.quiet()
        return process

    # -- the oracle ---------------------------------------------------------------------------

    def state(self) -> tuple[bytes, dict[str, str]]:
        """Return attribution.json, and by run key the digest of the samples that it rests on."""
        job = self.job
        published = job.ledger.store.read(f"{job.report_name}/attribution.json")
        expect(published is not None, "there is no attribution.json")
        samples = {}
        for evaluation in job.plan:
            key = job.settled(evaluation).key
            derivation = job.ledger.fact(job.ledger.derivation_name(key))
            expect(derivation is not None, f"run {key} has no derivation")
            samples[key] = (derivation or {})["samples_sha256"]
        return published or b"", samples

    def finish(self, undisturbed: Site | None = None) -> None:
        """Run the same command to its end and check that all is as if nothing had happened."""
        self.run()
        self.check(undisturbed)

    def check(self, undisturbed: Site | None = None) -> None:
        """Check that all is as if nothing had happened: bytes, store, mirror."""
        row, reference = self.row, undisturbed or self.bench.undisturbed()
        same = self.state() == reference.state()
        row.compared += 1
        row.same_bytes = same and row.same_bytes is not False
        expect(same, "the bytes are not those of the undisturbed job")
        self.sound()
        self.mirrored("FINISHED")

    def sound(self) -> None:
        """Check that the store holds no damaged file, as `repair` sees it."""
        self.run("--dry-run", "--json", command="repair")
        expect(json.loads(self.said) == [], f"damaged files: {self.said}")

    def mirrored(self, status: str) -> None:
        """Check MLflow: one parent with this status, each measured coalition once and finished.

        A run that is killed at its beginning may have no parent yet.
        """
        if not self.tree["tracking"]["enabled"]:
            return
        from mlflow import MlflowClient

        job, tracking = self.job, self.tree["tracking"]
        client = MlflowClient(tracking_uri=tracking["uri"])
        experiment = client.get_experiment_by_name(tracking["experiment"])
        runs: list[Any] = []
        if experiment is not None:
            ours = f"tags.`attr_batch.job` = '{job.identity}'"
            runs = [*client.search_runs([experiment.experiment_id], ours, max_results=1000)]
        by_kind = {
            kind: [run for run in runs if run.data.tags["attr_batch.kind"] == kind]
            for kind in ("job", "coalition")
        }
        found = [run.info.status for run in by_kind["job"]]
        none_yet = status == "KILLED" and not found
        expect(found == [status] or none_yet, f"MLflow's parents are {found}, not one {status}")
        if status != "FINISHED":
            return
        (parent,) = by_kind["job"]
        children = by_kind["coalition"]
        keys = [run.data.tags["attr_batch.run_key"] for run in children]
        planned = sorted({job.settled(e).key for e in job.plan})
        expect(sorted(keys) == planned, f"MLflow has {len(keys)} coalitions, not {len(planned)}")
        for child in children:
            expect(child.info.status == "FINISHED", f"an MLflow child is {child.info.status}")
            expect(child.data.tags["mlflow.parentRunId"] == parent.info.run_id, "a foreign child")
        values = [
            job.ledger.fact(job.ledger.value_name(key, prop.name, job.property_digest(prop)))
            for key in planned
            for prop in job.spec.properties
        ]
        shown = sorted(
            run.data.metrics[prop.name] for run in children for prop in job.spec.properties
        )
        expect(shown == sorted(v["value"] for v in values if v), "MLflow shows other values")


class Bench:
    """Where scenarios happen: scratch, chance, the undisturbed jobs, and the row being written.

    `uri` is MLflow's, if jobs are to be `mirrored`; `env` is for the processes of new sites.
    """

    def __init__(self, scratch: Path, quick: bool, mirrored: bool = True) -> None:
        self.scratch, self.quick, self.mirrored = scratch, quick, mirrored
        self.random = random.Random(5)
        self.row = Row("", "")
        self.uri = f"sqlite:///{scratch / 'mlflow.db'}"
        self.env: dict[str, str] = {}
        self.started: list[Process] = []
        self._sites = 0
        self._undisturbed: dict[str, Site] = {}

    def place(self, name: str) -> str:
        """Return the `store` of the spec of the site that has this name."""
        return str(self.scratch / name / "store")

    def site(self, store: str | None = None, uri: str | None = None, **sections: Any) -> Site:
        """Return a new job in a new store, with whole sections of the spec replaced."""
        self._sites += 1
        name = f"{self._sites:03d}-{self.row.name}"
        folder = self.scratch / name
        folder.mkdir(parents=True)
        tracking = {"enabled": self.mirrored, "uri": uri or self.uri, "experiment": name}
        tree = {**TREE, "tracking": tracking, **sections}
        return Site(self, folder, store or self.place(name), tree)

    def undisturbed(self, **sections: Any) -> Site:
        """Return the finished job that nothing disturbed."""
        recipe = json.dumps(sections, sort_keys=True)
        if recipe not in self._undisturbed:
            row, self.row = self.row, Row("undisturbed", "")
            site = self.site(**sections)
            site.run()
            self._undisturbed[recipe], self.row = site, row
        return self._undisturbed[recipe]

    def copy(self, site: Site, **sections: Any) -> Site:
        """Return a new site whose local store begins as a copy of this one's."""
        other = self.site(**sections)
        shutil.copytree(site.store, other.store, symlinks=True)
        return other

    def times(self, many: int, few: int) -> int:
        """Return `many`, or `few` in the quick form."""
        return few if self.quick else many


Scenario = Callable[[Bench], None]


def play(bench: Bench, scenarios: Mapping[str, Scenario]) -> Iterator[Row]:
    """Run scenarios one after the other and yield what came of each."""
    for name, scenario in scenarios.items():
        bench.row = Row(name, " ".join((scenario.__doc__ or "").split()))
        bench.random.seed(name)
        started = time.monotonic()
        try:
            scenario(bench)
        except NotHere as reason:
            bench.row.not_here = str(reason)
        except AssertionError as error:
            bench.row.missed = str(error)
        except Exception:  # the bench's own fault: say so, and go on with the next scenario
            bench.row.missed = traceback.format_exc()
        finally:
            for process in bench.started:
                process.kill()
            bench.started.clear()
        bench.row.seconds = time.monotonic() - started
        yield bench.row
