"""The MLflow mirror: what the store says, shown where a team already looks.

Nothing is ever read back from MLflow for a result, so the mirror may be lost, down or rebuilt at
any time (`attr-batch sync`); a failure to write it is a warning, never an error. `Mirror.sync` is
idempotent: it finds the job's parent run by our own tag, creates what is missing, drops what two
writers created twice, and brings the rest up to date. One parent per job, a flat child per measured
coalition; the coalition table, the values with their intervals and the figures are artifacts of the
parent, since MLflow's own metrics are single doubles and its child list is loaded a hundred at a
time.

Everyone with access to the server can read everything, so contributors appear under keyed
pseudonyms unless the job says otherwise: `Pseudonyms` rewrites the snapshot *before* figures and
page are drawn from it, so there is no text in which a name could be left. These are pseudonyms,
not anonymity: image counts and the position in a coalition's 0/1 string remain.
"""

from __future__ import annotations

import base64
import csv
import fcntl
import hashlib
import hmac
import io
import json
import logging
import os
import re
import secrets
import shlex
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote

from attr_batch import report, validation_report
from attr_batch.errors import SpecError, StoreError
from attr_batch.evidence import Cost, Evidence, Validation
from attr_batch.log import say, warn
from attr_batch.properties import slug

if TYPE_CHECKING:
    from attr_batch.spec import Tracking

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

MAX_PARAM, MAX_TAG, MAX_KEY, MAX_DIGEST = 6000, 8000, 250, 36  # characters, MLflow's limits
MAX_BATCH, MAX_METRICS = 100, 1000  # params or tags, and metrics, in one request
LONGEST_STRING = 64  # contributors up to which a child is named by its 0/1 string, then by hex
URI_VARIABLE = "MLFLOW_TRACKING_URI"
WRITERS = 8  # requests to a server at a time
PATIENCE = 60.0  # seconds without a try after MLflow was found down
SYNC_WAIT, END_WAIT = 5.0, 20.0  # seconds to wait while another process writes the mirror
SECOND_CHANCE = 2.0  # seconds before the last try is repeated, if it failed within as many
# A server that is away must cost seconds, not the minutes of MLflow's own defaults.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "PGCONNECT_TIMEOUT": "10",
}
# Not in the spec digest, so they may differ between two runs of one job; MLflow's params may not.
UNSENT = ("name", "store", "tracking", "resources")


@dataclass(frozen=True)
class Child:
    """One measured coalition: its run key, and `metrics` {property: (value, stderr or None)}."""

    key: str
    coalition: str
    role: str
    pair: int | None
    replicate: int
    metrics: Mapping[str, tuple[float, float | None]]
    seconds: float | None


@dataclass(frozen=True)
class Snapshot:
    """What is to be seen of a job now. All of it is JSON-able, and none of it comes from MLflow.

    `digests` are the content digests of the data by data set name; `roster` the contributor ids in
    order; `numerics` is the class of machine (`Job.numerics`); `progress` counts coalitions {done,
    failed, waiting, ...}; `attribution`, `evidence` and `cost` are those of the report, None until
    there is one; `validation` is validation.json.
    """

    spec: Mapping[str, Any]
    spec_digest: str
    numerics: Mapping[str, Any]
    version: str
    roster: Sequence[str]
    digests: Mapping[str, str]
    children: Sequence[Child]
    progress: Mapping[str, int] = field(default_factory=dict)
    attribution: Mapping[str, Any] | None = None
    evidence: Evidence | None = None
    cost: Cost | None = None
    validation: Validation | None = None


def pseudonym(key: bytes, contributor_id: str) -> str:
    """Return `c-` + 10 hex digits of HMAC-SHA256: the same id for the same key, not invertible."""
    mac = hmac.new(key, contributor_id.encode("utf-8", "surrogatepass"), hashlib.sha256)
    return f"c-{mac.hexdigest()[:10]}"


def secret_key(folder: Path) -> bytes:
    """Return the 32 random bytes in `folder`/pseudonym.key, created once and readable by us alone.

    Several shards may come at once: the first link stays. StoreError if it cannot be kept.
    """
    path = folder / "pseudonym.key"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            # mkstemp: mode 0600 from the start.
            handle, name = tempfile.mkstemp(dir=folder, prefix=".pseudonym-")
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(name, path)
            except FileExistsError:
                pass
            finally:
                Path(name).unlink()
        key = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"the key of the pseudonyms cannot be kept: {error.strerror}",
            str(path),
            "let this user write the folder and read the file, or set tracking.key_env",
        ) from error
    if len(key) != 32:
        raise StoreError(
            f"wanted 32 bytes, got {len(key)}", str(path), "delete it; pseudonyms will change"
        )
    return key


class Pseudonyms:
    """Rewrites a snapshot field by field: lists of contributors by position, free text by words.

    In free text an id is rewritten where it stands alone (not inside another word), whatever its
    case. An id of one or two digits is too common for that: it is rewritten only where the text is
    nothing else, and only in the spec's `data`. Keys that our own files prescribe stay.
    """

    def __init__(self, key: bytes, roster: Iterable[str]) -> None:
        self._names = {name: pseudonym(key, name) for name in roster}
        # A property named after a label holds it as a file name does, with a digest to tell it.
        written = {slug(name): alias for name, alias in self._names.items() if slug(name) != name}
        self._folded = {n.casefold(): alias for n, alias in (self._names | written).items()}
        words = [*self._names, *written, *(w.rpartition("-")[0] for w in written)]
        words = [n for n in words if n.strip(" _-.") and not re.fullmatch(r"\d{1,2}", n)]
        words.sort(key=len, reverse=True)  # an id may contain another
        either = "|".join(map(re.escape, words)) or r"(?!)"
        # An underscore parts words here, as it does in file names.
        self._pattern = re.compile(rf"(?<![^\W_])(?:{either})(?![^\W_])", re.IGNORECASE)

    def text(self, text: str) -> str:
        """Return free text without contributor ids."""
        return self._pattern.sub(
            lambda m: self._names.get(m[0]) or self._folded.get(m[0].casefold(), "c-?"), text
        )

    def free(self, value: Any, *, exact: bool = False) -> Any:
        """Rewrite every key and string of a JSON-able value; `exact`: whole strings of any id."""
        if isinstance(value, str):
            return self._names[value] if exact and value in self._names else self.text(value)
        if isinstance(value, Mapping):
            return {self.free(k, exact=exact): self.free(v, exact=exact) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.free(item, exact=exact) for item in value]
        return value

    def snapshot(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot as it may be sent."""
        spec = {k: self.free(v, exact=k == "data") for k, v in snapshot.spec.items()}
        listed = spec.get("data", {}).get("contributors")
        if isinstance(listed, Mapping):  # {id: digest}, and a digest tells whose images they are
            spec["data"]["contributors"] = list(listed)
        return replace(
            snapshot,
            spec=spec,
            roster=self._ids(snapshot.roster),
            digests=self.free(snapshot.digests),
            children=[replace(c, metrics=self._named(c.metrics)) for c in snapshot.children],
            attribution=snapshot.attribution and self._attribution(snapshot.attribution),
            evidence=snapshot.evidence and self._evidence(snapshot.evidence),
            validation=snapshot.validation and self._validation(snapshot.validation),
        )

    def _validation(self, validation: Validation) -> Validation:
        found: Any = self.free(validation)
        found["contributors"] = self._ids(validation["contributors"])
        return found

    def _ids(self, names: Iterable[str]) -> list[str]:
        return [self._names[name] for name in names]

    def _named(self, by_property: Mapping[str, Any]) -> dict[str, Any]:
        return {self.text(name): value for name, value in by_property.items()}

    def _attribution(self, attribution: Mapping[str, Any]) -> dict[str, Any]:
        # Without digests, as in the spec.
        return {
            "headline": self.text(attribution["headline"]),
            "attributions": [
                {
                    **a,
                    "property": self.text(a["property"]),
                    "recipe": self.free(a["recipe"]),
                    "contributors": [
                        {**row, "id": self._names[row["id"]], "digest": None}
                        for row in a["contributors"]
                    ],
                }
                for a in attribution["attributions"]
            ],
        }

    def _evidence(self, evidence: Evidence) -> Evidence:
        def members(rows: Iterable[Any], *texts: str) -> list[Any]:
            return [
                {
                    **row,
                    "members": None if row["members"] is None else self._ids(row["members"]),
                    **{name: self.text(row[name]) for name in texts},
                }
                for row in rows
            ]

        properties: dict[str, Any] = {
            self.text(name): {
                **facts,
                "title": self.text(facts["title"]),
                "higher_means": self.text(facts["higher_means"]),
                "utilities": members(facts["utilities"]),
            }
            for name, facts in evidence["properties"].items()
        }
        return {
            **evidence,
            "job": self.text(evidence["job"]),
            "counterfactual": self.text(evidence["counterfactual"]),
            "properties": properties,
            "grids": members(evidence["grids"], "caption"),
            "instruments": [
                {"kind": self.text(i["kind"]), "card": self.free(i["card"])}
                for i in evidence["instruments"]
            ],
            "failures": members(evidence["failures"], "what"),
            "warnings": self.free(evidence["warnings"]),
            "provenance": self.free(evidence["provenance"]),
        }


def mirror(tracking: Tracking, job: str, work: Path, default_uri: str | None) -> Mirror | None:
    """Return the mirror that the job asks for, None if it asks for none.

    `job` is what its runs are found by. `work` is the store's local work folder, which keeps the
    default key and the lock. None, with a line that says so, if there is neither `tracking.uri` nor
    `default_uri`; None, with a warning, if that key cannot be had: names are never sent instead.
    SpecError if the environment variable named by `tracking.key_env` is empty.
    """
    if not tracking.enabled:
        return None
    uri = tracking.uri or default_uri
    if uri is None:
        say(f"MLflow is not written: neither tracking.uri nor {URI_VARIABLE} names a server")
        return None
    key = None
    if tracking.contributors == "pseudonyms":
        if tracking.key_env is None:
            try:
                key = secret_key(work)
            except StoreError as error:
                (problem,) = error.problems
                warn(f"MLflow is not written: {problem.where}: {problem.what}", problem.hint)
                return None
        elif not (key := os.environ.get(tracking.key_env, "").encode()):
            raise SpecError(
                f"the environment variable {tracking.key_env} is not set",
                "tracking.key_env",
                "set it to a long random text, or leave key_env out",
            )
    return Mirror(uri, tracking.experiment, job, key, work / "mlflow.lock")


def public_uri(uri: str) -> str:
    """Return a URI without user, password and query, fit to be shown."""
    if uri.startswith(("sqlite:", "file:")):
        return uri
    if "://" not in uri:
        return "…"  # no URI, perhaps a secret in its place
    # To the last @ and not the first /: SQLAlchemy takes a password with either in it.
    return re.sub(r"\?.*", "?…", re.sub(r"//.*@", "//…@", uri))


def _secrets(uri: str) -> list[str]:
    """Return the words of a URI that no message may hold: a library may quote any part of it."""
    hidden = " ".join(re.findall(r"//(.*)@", uri) + re.findall(r"\?(.*)", uri))
    words = set(re.split(r"\W+", f"{hidden} {unquote(hidden)}"))
    return sorted((word for word in words if len(word) > 2), key=len, reverse=True)


def where_to_look(uri: str) -> str:
    """Return what the terminal shows: a server's address, else the command that shows a store."""
    shown = public_uri(uri)
    if shown.startswith(("http://", "https://")):
        return shown
    return f"mlflow ui --backend-store-uri {shlex.quote(shown)}"


class _Left(Exception):
    """The mirror's `leaving` was set."""


class Load:
    """How busy this machine is: CPU, memory, disk, network, and GPUs where pynvml finds some.

    `began` is when the run began, in milliseconds. The readers are those of MLflow's own monitor,
    whose thread is not started: it gives up for good when the server is away once.
    """

    def __init__(self, uri: str, began: int) -> None:
        self.began = began
        self._readers: list[Any] = []
        with suppress(Exception):  # psutil may be missing, or know nothing of this machine
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._readers = SystemMetricsMonitor("", tracking_uri=uri).monitors
        self.sample()  # the first share of a CPU is one since nothing

    def sample(self) -> dict[str, float]:
        """Return {MLflow's name of a system metric: value}; empty where nothing can be read."""
        found = {}
        for reader in self._readers:
            with suppress(Exception):
                reader.collect_metrics()
                values = reader.aggregate_metrics()
                found |= {f"system/{name}": float(value) for name, value in values.items()}
                reader.clear_metrics()
        return found


class Mirror:
    """Keeps one job's runs in MLflow equal to a snapshot.

    `key` None sends contributors' own ids. Processes that hold `lock` write one after the other, so
    none creates what another is creating; what those without a common file system create twice, the
    next one drops. No method raises because of MLflow: the first failure is a warning, and further
    tries are at least `PATIENCE` seconds apart. While `leaving` is set, a `sync` in another thread
    ends after the requests it has sent.
    """

    def __init__(self, uri: str, experiment: str, job: str, key: bytes | None, lock: Path) -> None:
        self.leaving = threading.Event()
        self._uri, self._experiment = uri, experiment
        self._job, self._key, self._lock = job, key, lock
        self._client: Any = None
        self._experiment_id = ""
        self._parent: str | None = None
        self._done: set[str] = set()  # run keys of the children that are there
        self._sent: dict[str, str] = {}  # artifact -> sha256 of what was last uploaded
        self._shown: Snapshot | None = None  # what MLflow shows already
        self._load: Load | None = None
        self._warned, self._again = False, 0.0

    def sync(self, snapshot: Snapshot) -> bool:
        """Make MLflow show this snapshot, with the parent RUNNING.

        False if MLflow is away, or written by another process for long.
        """
        if time.monotonic() < self._again:
            return False
        return self._attempt(lambda: self._sync(snapshot), SYNC_WAIT)

    def follow(self, snapshot: Snapshot) -> bool:
        """Do as `sync`, and add to the parent how busy this machine is (`system/...`)."""
        return self.sync(snapshot) and self._attempt(self._send_load, SYNC_WAIT)

    def _stay(self) -> None:
        if self.leaving.is_set():
            raise _Left

    def end(self, status: Status, snapshot: Snapshot | None = None) -> bool:
        """Show the last snapshot, if there is one, and give the parent its final status.

        Always tries, however short ago MLflow was away; False if either could not be written. The
        status does not depend on the snapshot: a run nobody works on must not stay RUNNING.
        FINISHED comes last, since it says that all is there, any other status first.
        """

        def end() -> None:
            self._connect()
            if status != "FINISHED" and (parent := self._parent or self._find_parent()):
                self._client.set_terminated(parent, status)
            try:
                if snapshot is not None:
                    self._sync(snapshot, status)
            finally:
                if parent := self._parent or self._find_parent():
                    self._client.set_terminated(parent, status)

        self._done.clear()  # another process may have sent, or deleted, some meanwhile
        started = time.monotonic()
        if self._attempt(end, END_WAIT):
            return True
        if time.monotonic() - started > SECOND_CHANCE:
            return False
        time.sleep(SECOND_CHANCE)  # a server that restarts refuses the requests of a moment
        return self._attempt(end, END_WAIT)

    def _attempt(self, work: Callable[[], None], wait: float) -> bool:
        try:
            with self._locked(wait):
                work()
        except _Left:
            self._done.clear()  # some more may be there now
            return False
        except Exception as error:  # whatever a mirror's store throws, the work goes on
            self._again = time.monotonic() + PATIENCE
            self._client = self._parent = self._shown = None
            self._done.clear()
            self._sent.clear()
            if not self._warned:
                self._warned = True
                warn(
                    f"MLflow at {public_uri(self._uri)} is not written: {self._reason(error)}",
                    "work goes on; `attr-batch sync` catches up",
                )
            return False
        self._warned = False
        return True

    def _reason(self, error: BaseException) -> str:
        """Return in a line what first went wrong, without what is secret in the URI."""
        while inner := error.__cause__ or (not error.__suppress_context__ and error.__context__):
            error = inner
        text = str(error).replace(self._uri, public_uri(self._uri)).strip()
        reason = (text or type(error).__name__).splitlines()[0]
        reason = re.sub(r"//\S*@", "//…@", reason)
        for secret in _secrets(self._uri):
            reason = reason.replace(secret, "…")
        return reason[:300]

    @contextmanager
    def _locked(self, wait: float) -> Iterator[None]:
        """Hold the lock; TimeoutError if another process keeps it for more than `wait` seconds."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        last = time.monotonic() + wait
        with self._lock.open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= last:
                        raise TimeoutError("another process is writing it") from None
                    time.sleep(0.05)
                except OSError:  # a file system without locks
                    break
            yield

    def _sync(self, snapshot: Snapshot, status: Status = "RUNNING") -> None:
        if snapshot == self._shown:
            return
        sent = snapshot
        if self._key is not None:
            sent = Pseudonyms(self._key, snapshot.roster).snapshot(snapshot)
        self._connect()
        if self._parent is None:
            self._parent = self._find_parent() or self._create_parent(sent)
            if status in ("RUNNING", "FINISHED"):
                self._client.update_run(self._parent, status="RUNNING")
        self._send_facts(self._parent, sent)
        self._send_children(self._parent, sent)
        for name, content in _artifacts(sent):
            self._upload(self._parent, name, content)
        self._shown = snapshot

    def _connect(self) -> None:
        if self._client is not None:
            return
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        if not self._remote:
            from mlflow.store.db import utils

            utils.MAX_RETRY_COUNT = 3  # MLflow's own ten take minutes
        client = MlflowClient(tracking_uri=self._uri)
        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                self._experiment_id = client.create_experiment(
                    self._experiment,
                    artifact_location=_artifact_location(self._uri),
                )
            except MlflowException:  # another job was faster
                found = client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        if found is not None:
            self._experiment_id = found.experiment_id
            if found.lifecycle_stage == "deleted":  # the name stays taken until `mlflow gc`
                client.restore_experiment(found.experiment_id)
                say(f"MLflow: experiment {self._experiment!r} was deleted; restored with its runs")
        self._client = client

    @property
    def _remote(self) -> bool:
        return self._uri.startswith(("http://", "https://"))

    def _search(self, kind: str) -> list[Any]:
        """Return the job's runs of one kind, the oldest first."""
        found, token = [], None
        while True:
            page = self._client.search_runs(
                [self._experiment_id],
                f"tags.`attr_batch.job` = '{self._job}' and tags.`attr_batch.kind` = '{kind}'",
                max_results=1000,
                page_token=token,
            )
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def _find_parent(self) -> str | None:
        """Return the job's oldest parent run; drop others, which two processes created at once."""
        runs = [run.info.run_id for run in self._search("job")]
        for other in runs[1:]:
            self._client.delete_run(other)
        return runs[0] if runs else None

    def _create_parent(self, snapshot: Snapshot) -> str:
        run = self._client.create_run(
            self._experiment_id,
            run_name=str(snapshot.spec.get("name", "job"))[:MAX_KEY],
            tags={"attr_batch.job": self._job, "attr_batch.kind": "job"},
        )
        return self._find_parent() or run.info.run_id

    def _send_facts(self, parent: str, snapshot: Snapshot) -> None:
        """Send the parent's params, tags, metrics and data digests that are not there already."""
        from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag

        run = self._client.get_run(parent)
        # A param cannot be changed: the first value stays, as does its run.
        known = run.data.params
        params = [Param(k, v) for k, v in _params(snapshot.spec).items() if k not in known]
        tags = [RunTag(k, v) for k, v in _tags(snapshot).items() if run.data.tags.get(k) != v]
        for start in range(0, max(len(params), len(tags)), MAX_BATCH):
            part = slice(start, start + MAX_BATCH)
            self._client.log_batch(parent, params=params[part], tags=tags[part])
        now, step = int(time.time() * 1000), snapshot.progress.get("done", len(snapshot.children))
        metrics = [
            Metric(key, value, now, step)
            for key, value in _metrics(snapshot).items()
            if run.data.metrics.get(key) != value
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(parent, metrics=metrics[start : start + MAX_METRICS])
        present = {i.dataset.digest for i in run.inputs.dataset_inputs} if run.inputs else set()
        inputs = [
            DatasetInput(Dataset(name[:MAX_KEY], digest[:MAX_DIGEST], "attr-batch", "{}"), [])
            for name, digest in snapshot.digests.items()
            if digest[:MAX_DIGEST] not in present
        ]
        if inputs:
            self._client.log_inputs(parent, inputs)

    def _send_load(self) -> None:
        """Send a sample of this machine's load. Its step: seconds since the parent began."""
        from mlflow.entities import Metric

        if self._load is None:
            began = self._client.get_run(self._parent).info.start_time
            self._load = Load(self._uri, began)
        now = int(time.time() * 1000)
        sample, step = self._load.sample(), (now - self._load.began) // 1000
        if sample:
            metrics = [Metric(_key(name), value, now, step) for name, value in sample.items()]
            self._client.log_batch(self._parent, metrics=metrics)

    def _send_children(self, parent: str, snapshot: Snapshot) -> None:
        if self._done.issuperset(child.key for child in snapshot.children):
            return
        # Looked for once, for they may be many: what comes in later is ours.
        found = dict.fromkeys(self._done, "done") or self._find_children(parent)
        missing = [child for child in snapshot.children if found.get(child.key) != "done"]

        def send(child: Child) -> None:
            self._stay()
            self._send_child(parent, child, found.get(child.key))

        # SQLite knows one writer.
        with ThreadPoolExecutor(WRITERS if self._remote else 1) as pool:
            for _ in pool.map(send, missing):  # the first error cancels what has not begun
                pass
        self._done = {child.key for child in snapshot.children}

    def _find_children(self, parent: str) -> dict[str, str]:
        """Return {run key: "done" or the id of a run that was begun and not finished}.

        What two writers created twice is dropped; what hangs on a parent that is gone moves here.
        """
        by_key = defaultdict(list)
        for run in self._search("coalition"):
            by_key[run.data.tags["attr_batch.run_key"]].append(run)
        found = {}
        for key, runs in by_key.items():
            runs.sort(key=lambda run: run.info.status != "FINISHED")
            first, *others = runs
            for other in others:
                self._client.delete_run(other.info.run_id)
            if first.data.tags.get("mlflow.parentRunId") != parent:
                self._client.set_tag(first.info.run_id, "mlflow.parentRunId", parent)
            found[key] = "done" if first.info.status == "FINISHED" else first.info.run_id
        return found

    def _send_child(self, parent: str, child: Child, run_id: str | None) -> None:
        """Create a coalition's run, or complete one that a killed process left half written."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        if run_id is None:
            tags = {
                "mlflow.parentRunId": parent,
                "attr_batch.kind": "coalition",
                "attr_batch.job": self._job,
                "attr_batch.run_key": child.key,
                "attr_batch.coalition": child.coalition,
                "attr_batch.role": child.role,
                "attr_batch.replicate": str(child.replicate),
            }
            if child.pair is not None:
                tags["attr_batch.pair"] = str(child.pair)
            # Times would be the mirror's, not the work's: show the work's seconds as a duration.
            start = now - round(1000 * (child.seconds or 0))
            run = self._client.create_run(
                self._experiment_id, start, tags, f"{_short(child.coalition)} r{child.replicate}"
            )
            run_id = run.info.run_id
        metrics = {"size": float(child.coalition.count("1"))}
        for name, (value, stderr) in child.metrics.items():
            metrics[_key(name)] = value
            if stderr is not None:
                metrics[_key(f"{name}_stderr")] = stderr
        if child.seconds is not None:
            metrics["seconds"] = child.seconds
        entries = [Metric(k, v, now, 0) for k, v in metrics.items()]
        for start in range(0, len(entries), MAX_METRICS):
            self._client.log_batch(run_id, metrics=entries[start : start + MAX_METRICS])
        self._client.set_terminated(run_id, "FINISHED", now)

    def _upload(self, parent: str, name: str, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        if self._sent.get(name) == digest:
            return
        self._stay()
        place = Path(name)
        folder = None if place.parent == Path() else place.parent.as_posix()
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, place.name)
            file.write_bytes(content)
            self._client.log_artifact(parent, str(file), folder)
        self._sent[name] = digest


def _params(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the spec's leaves as {dotted path: text}, within MLflow's limits."""

    def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        nested = isinstance(value, Mapping) or (
            isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value)
        )
        if not nested:
            yield path, value
            return
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, item in items:
            yield from leaves(item, f"{path}.{name}" if path else str(name))

    params = {}
    for path, value in leaves({k: v for k, v in spec.items() if k not in UNSENT}, ""):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        params[_key(path)] = _cut(text, MAX_PARAM - 1)
    return params


def _tags(snapshot: Snapshot) -> dict[str, str]:
    tags = {
        "attr_batch.spec_digest": snapshot.spec_digest,
        "attr_batch.version": snapshot.version,
        "attr_batch.players": str(len(snapshot.roster)),
    }
    tags |= {f"attr_batch.numerics.{_key(k)}": str(v) for k, v in snapshot.numerics.items()}
    tags |= {f"attr_batch.data.{_key(k)}": v for k, v in snapshot.digests.items()}
    tables = [{"path": "coalitions.json", "type": "table"}]
    if snapshot.attribution is not None:
        tables.append({"path": "values.json", "type": "table"})
        # The run's description in the UI: values with intervals, which metrics cannot show.
        summary = report.table(report.headline(snapshot.attribution))
        tags["mlflow.note.content"] = _cut(f"```\n{_cut(summary, MAX_TAG - 20)}\n```", MAX_TAG)
    tags["mlflow.loggedArtifacts"] = json.dumps(tables)
    return tags


def _metrics(snapshot: Snapshot) -> dict[str, float]:
    """Return the parent's metrics: progress, then per property what is one number each."""
    metrics: dict[str, float | None] = {
        f"coalitions/{name}": float(count) for name, count in snapshot.progress.items()
    }
    for a in (snapshot.attribution or {"attributions": []})["attributions"]:
        check = a["holdout"] or {}
        found = {
            "v_empty": a["v_empty"],
            "v_full": a["v_full"],
            "efficiency_gap": a["efficiency_gap"],
            "coalitions_used": a["coalitions"]["used"],
            "holdout_spearman": check.get("spearman"),
            "holdout_beyond_size": check.get("beyond_size"),
            "holdout_chance95": check.get("chance95"),
            "holdout_rmse": check.get("rmse"),
            "shrinkage_slope": a["shrinkage_slope"],
        }
        metrics |= {f"{a['property']}/{name}": value for name, value in found.items()}
    for judged in (snapshot.validation or {"properties": []})["properties"]:
        for name, lds in judged["methods"][0]["lds"].items() if judged["methods"] else ():
            metrics[f"{judged['name']}/lds {name}"] = lds["value"]
    if snapshot.cost is not None:
        metrics |= {f"seconds/{phase}": s for phase, s in snapshot.cost["seconds"].items()}
    return {_key(name): float(value) for name, value in metrics.items() if value is not None}


def _artifacts(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """Yield (path, bytes) of the parent's artifacts; the same snapshot gives the same bytes."""
    names = sorted({name for child in snapshot.children for name in child.metrics})
    head = ["coalition", "size", "role", "pair", "replicate", "seconds"]
    head += [column for name in names for column in (name, f"{name}_stderr")]
    rows = []
    for c in snapshot.children:
        figures = [q for name in names for q in c.metrics.get(name, (None, None))]
        size = c.coalition.count("1")
        rows.append([c.coalition, size, c.role, c.pair, c.replicate, c.seconds, *figures])
    yield "coalitions.json", _json({"columns": head, "data": rows})
    yield "coalitions.csv", _csv(head, rows)
    yield "roster.json", _json(list(snapshot.roster))
    if snapshot.validation is not None:
        yield "validation/validation.json", _json(snapshot.validation)
        yield "validation/index.html", _bytes(validation_report.page(snapshot.validation))
        for name, svg in validation_report.figures(snapshot.validation).items():
            yield f"validation/{name}.svg", _bytes(svg)
    if snapshot.attribution is None:
        return
    yield "attribution.json", _json(snapshot.attribution)
    head = ["property", "contributor", "value", "ls_value", "se", "low", "high", "share", "images"]
    rows = [
        [a["property"], c["id"], *(c[k] for k in head[2:])]
        for a in snapshot.attribution["attributions"]
        for c in a["contributors"]
    ]
    yield "values.json", _json({"columns": head, "data": rows})
    yield "values.csv", _csv(head, rows)
    for a in snapshot.attribution["attributions"]:
        place = f"figures/{_key(a['property']).replace('/', '-')}"
        yield f"{place}-values.svg", _bytes(report.interval_svg(a))
        if snapshot.evidence is not None:
            facts = snapshot.evidence["properties"][a["property"]]
            yield f"{place}-utilities.svg", _bytes(report.utility_svg(a, facts))
            yield f"{place}-holdout.svg", _bytes(report.holdout_svg(a, facts))
    if snapshot.evidence is None or snapshot.cost is None:
        return
    for k, grid in enumerate(snapshot.evidence["grids"]):
        yield f"samples/{k:02d}.png", base64.b64decode(grid["png_base64"])
    yield "cost.json", _json(snapshot.cost)
    yield (
        "report/index.html",
        _bytes(report.page(snapshot.attribution, snapshot.evidence, snapshot.cost)),
    )


def _artifact_location(uri: str) -> str | None:
    """Return where a local SQLite mirror keeps artifacts: beside it, not in the working folder."""
    if not uri.startswith("sqlite:///"):
        return None  # the server knows
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def _short(coalition: str) -> str:
    if len(coalition) <= LONGEST_STRING:
        return coalition
    return f"0x{int(coalition, 2):0{-(-len(coalition) // 4)}x}"


def _key(name: str) -> str:
    """Return `name` as MLflow takes it for a key."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:MAX_KEY]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _json(value: Any) -> bytes:
    return _bytes(json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n")


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return _bytes(text.getvalue())


def _cell(value: Any) -> Any:
    """Return what a spreadsheet takes for text where `value` is text: not for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")
