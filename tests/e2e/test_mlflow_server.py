"""The mirror on a real server: `mlflow server` on PostgreSQL that proxies the artifacts."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, tiny_tree
from mlflow import MlflowClient
from servers import PASSWORD, MLflow, Postgres, servers
from test_jobs import finish, report_bytes, start, write
from test_tracking import KEY, snapshot

from attr_batch import cli, tracking
from attr_batch.recipe import digest
from attr_batch.tracking import Child, Mirror, Snapshot

pytestmark = pytest.mark.e2e

# Long enough to be interrupted.
TRAINING = {"model": {**TINY["model"], "training": {"steps": 100, "batch": 32, "warmup": 2}}}
USER, SECRET = "somebody", "s3cret"  # of a server that asks for none: sent, and to be kept


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Postgres, MLflow]]:
    try:
        with servers() as both:
            yield both
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.fixture(autouse=True)
def patient(monkeypatch) -> None:
    """Not the URI that a developer works with; and no minute between two tries."""
    monkeypatch.delenv(tracking.URI_VARIABLE, raising=False)
    monkeypatch.setattr(tracking, "PATIENCE", 0.0)


@dataclass
class Seen:
    """All that MLflow shows of an experiment but ids and times; the load is not compared.

    `parents` and `children` are (name, status, tags, metrics, params, data sets); `files` are the
    artifacts of the job's run; `load` names its system metrics.
    """

    parents: list[Any]
    children: list[Any]
    files: dict[str, bytes]
    load: set[str] = field(compare=False)


def seen(uri: str, experiment: str, download: Path | None = None) -> Seen:
    """Look at an experiment, and at the artifacts if there is a folder to put them."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    runs = [] if found is None else client.search_runs([found.experiment_id], max_results=5000)

    def told(run: Any) -> Any:
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
        metrics = {k: v for k, v in run.data.metrics.items() if not k.startswith("system/")}
        data = [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs]
        return run.info.run_name, run.info.status, tags, metrics, run.data.params, data

    parents = [r for r in runs if r.data.tags["attr_batch.kind"] == "job"]
    children = [r for r in runs if r.data.tags["attr_batch.kind"] == "coalition"]
    children.sort(key=lambda run: run.data.tags["attr_batch.run_key"])
    ids = {run.info.run_id for run in parents}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= ids
    files = {}
    if download is not None:
        root = Path(client.download_artifacts(*ids, "", str(download)))
        files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    load = {key for run in parents for key in run.data.metrics if key.startswith("system/")}
    return Seen([told(run) for run in parents], [told(run) for run in children], files, load)


def tree(folder: Path, experiment: str, **sections: Any) -> dict[str, Any]:
    given = {"tracking": {"experiment": experiment}, **TRAINING, **sections}
    return tiny_tree(folder / "store", **given)


def keys(found: Seen) -> list[str]:
    return [tags["attr_batch.run_key"] for _, _, tags, *_ in found.children]


def evaluated(folder: Path) -> int:
    """Return how many models a job's store holds the making of."""
    return len(list(folder.glob("store/runs/*/derivation.json")))


@dataclass
class Started:
    """A job that runs beside whatever else is tested."""

    folder: Path
    process: subprocess.Popen

    @cached_property
    def said(self) -> str:
        """All that it said until it ended."""
        return "".join(finish(self.process))


@pytest.fixture(scope="module")
def undisturbed(running, tmp_path_factory) -> Started:
    """A job whose server stays up, at an address with a password."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = write(folder / "job.yaml", tree(folder, "undisturbed"))
    uri = running[1].uri.replace("//", f"//{USER}:{SECRET}@")
    return Started(folder, start("run", job, **{tracking.URI_VARIABLE: uri}))


def test_servers_come_and_go_and_the_job_goes_on(running, undisturbed, tmp_path, monkeypatch):
    """SIGTERM, kill -9, then no server from the middle to the end: the same bytes; sync mends."""
    postgres, server = running
    monkeypatch.setenv(tracking.URI_VARIABLE, server.uri)
    job = write(tmp_path / "job.yaml", tree(tmp_path, "disturbed"))

    def status() -> list[str]:
        return [status for _, status, *_ in seen(server.uri, "disturbed").parents]

    def running_job() -> subprocess.Popen:
        process = start("run", job)
        while status() != ["RUNNING"]:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        return process

    process = running_job()
    process.terminate()
    finish(process, 75)
    assert status() == ["KILLED"]
    process = running_job()
    process.kill()
    process.communicate()
    assert status() == ["RUNNING"]
    assert cli.main(["sync", str(job)]) == 0
    assert status() == ["KILLED"]
    assert undisturbed.said
    process = running_job()
    server.stop(signal.SIGKILL)
    postgres.stop()
    _, err = finish(process)
    assert err.count("is not written") == 1
    assert "attr-batch sync" in err
    assert report_bytes(tmp_path / "store") == report_bytes(undisturbed.folder / "store")
    postgres.start()
    server.start()
    assert cli.main(["sync", str(job)]) == 0
    assert status() == ["FINISHED"]
    found, wanted = (seen(server.uri, name).children for name in ("disturbed", "undisturbed"))
    assert len(found) == evaluated(tmp_path)
    assert [child[:2] for child in found] == [child[:2] for child in wanted]


def test_an_auditor_finds_everything_on_the_jobs_run(running, undisturbed, tmp_path):
    folder, said = undisturbed.folder, undisturbed.said
    found = seen(running[1].uri, "undisturbed", tmp_path)
    ((name, status, tags, metrics, params, data),) = found.parents
    assert (name, status) == ("tiny", "FINISHED")
    assert params["counterfactual.kind"] == "sparsified_finetune"
    assert params["estimator.budget"] == "8"
    assert [name for name, _ in data] == ["digits"]
    assert tags["attr_batch.data.digits"].startswith(data[0][1])
    count = evaluated(folder)
    assert metrics["coalitions/done"] == len(found.children) == count > 0
    assert "cluster_entropy" in tags["mlflow.note.content"]
    tables = json.loads(tags["mlflow.loggedArtifacts"])
    assert {table["path"] for table in tables} == {"coalitions.json", "values.json"}
    assert "system/cpu_utilization_percentage" in found.load
    assert "system/system_memory_usage_megabytes" in found.load
    assert {status for _, status, *_ in found.children} == {"FINISHED"}
    assert len(json.loads(found.files["coalitions.json"])["data"]) == count

    def values(attribution: bytes) -> list[float]:
        (headline,) = json.loads(attribution)["attributions"]
        return [c["value"] for c in headline["contributors"]]

    assert values(found.files["attribution.json"]) == values(report_bytes(folder / "store"))
    for kind in ("values", "utilities", "holdout"):
        assert found.files[f"figures/cluster_entropy-{kind}.svg"].startswith(b"<svg")
    assert {"values.csv", "roster.json", "cost.json", "report/index.html"} <= set(found.files)
    assert "//…@127.0.0.1" in said


def test_no_secret_is_said_stored_or_sent(running, undisturbed):
    import psycopg2

    postgres, server = running
    places = {"output": undisturbed.said.encode()}
    for root in (undisturbed.folder / "store", server.artifacts):
        places |= {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with psycopg2.connect(postgres.uri.replace("+psycopg2", "")) as connection:
        cursor = connection.cursor()
        cursor.execute("select tablename from pg_tables where schemaname = 'public'")
        for (table,) in cursor.fetchall():
            cursor.execute(f'select t::text from "{table}" t')
            places[table] = "\n".join(row for (row,) in cursor.fetchall()).encode()
    connection.close()
    assert b"attr_batch.run_key" in places["tags"]
    for secret in (SECRET, USER, PASSWORD):
        assert [p for p, content in places.items() if secret.encode() in content] == []


# -- the mirror alone, in this process ------------------------------------------------------------


@pytest.fixture
def opened(running, tmp_path, request) -> Callable[..., Mirror]:
    """Return a function that opens the mirror of one experiment, as a pod would."""
    name, uri = request.node.name, running[1].uri

    def mirror(pod: str = "pod") -> Mirror:
        return Mirror(uri, name, digest(name), KEY, tmp_path / f"{pod}.lock")

    return mirror


@pytest.fixture
def shown(running, request, tmp_path_factory) -> Callable[[], Seen]:
    """Return a function that looks at the experiment of the test."""

    def look() -> Seen:
        return seen(running[1].uri, request.node.name, tmp_path_factory.mktemp("seen"))

    return look


def test_deleted_runs_and_a_deleted_experiment_come_back_the_same(running, opened, shown, request):
    shot = snapshot()
    assert opened().end("FINISHED", shot)
    before = shown()
    client = MlflowClient(running[1].uri)
    experiment = client.get_experiment_by_name(request.node.name)
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        if run.data.tags.get("attr_batch.role") != "holdout":  # the job's run too
            client.delete_run(run.info.run_id)
    assert opened().end("FINISHED", shot)
    assert shown() == before
    client.delete_experiment(experiment.experiment_id)
    assert opened().end("FINISHED", shot)
    assert shown() == before


def test_what_pods_without_a_common_lock_create_twice_is_mended(running, opened, shown, request):
    shot = snapshot()
    assert opened().end("RUNNING")  # the experiment
    barrier = threading.Barrier(2)

    def pod(name: str) -> None:
        mirror = opened(name)
        find = mirror._find_parent

        def together() -> str | None:  # nobody sees the other's parent before both were created
            found = find()
            if found is None and not barrier.broken:
                barrier.wait(30)
            return found

        mirror._find_parent = together
        mirror.end("FINISHED", shot)

    pods = [threading.Thread(target=pod, args=[name]) for name in ("one", "two")]
    for thread in pods:
        thread.start()
    for thread in pods:
        thread.join()
    assert opened("later").end("FINISHED", shot)
    found = shown()
    assert [status for _, status, *_ in found.parents] == ["FINISHED"]
    assert {status for _, status, *_ in found.children} == {"FINISHED"}
    assert keys(found) == sorted(child.key for child in shot.children)


def test_a_growing_job_costs_what_is_new_and_restarts_are_survived(running, opened, shown):
    postgres, _ = running
    shot = snapshot()
    few: Snapshot = replace(snapshot(finished=False), children=shot.children[:5])
    mirror = opened()
    assert mirror.follow(few)
    begun = set(keys(shown()))
    postgres.stop()
    assert not mirror.sync(replace(few, children=shot.children[:7]))
    postgres.start()
    sent: list[str] = []
    send = mirror._send_child

    def noted(parent: str, child: Child, run_id: str | None) -> None:
        sent.append(child.key)
        send(parent, child, run_id)

    mirror._send_child = noted
    assert mirror.end("FINISHED", shot)
    assert sorted(sent) == sorted({c.key for c in shot.children} - begun)
    assert keys(shown()) == sorted(child.key for child in shot.children)
