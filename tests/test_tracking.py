"""The mirror against a real SQLite store: idempotent, within the limits, and without names."""

import base64
import errno
import fcntl
import json
import multiprocessing
import os
import shlex
import socket
import sqlite3
import stat
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from sample_report import HOSTILE, SPEC_DIGEST, job, names

from attr_batch import results, tracking
from attr_batch.errors import SpecError, StoreError
from attr_batch.spec import Tracking
from attr_batch.tracking import Child, Mirror, Pseudonyms, Snapshot, pseudonym, secret_key

# Of SQLAlchemy, at a query of MLflow's own.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
KEY = b"k" * 32


def snapshot(n=4, pairs=6, *, ids=None, finished=True, **spec) -> Snapshot:
    ids = ids or names(n)
    attribution, evidence, cost = job(ids=ids, pairs=pairs)
    facts = evidence["properties"]
    children = [
        Child(
            key=f"{k:064x}",
            coalition=u["coalition"],
            role=u["role"],
            pair=u["pair"],
            replicate=u["replicate"],
            metrics={
                p: (e["utilities"][k]["value"], 0.01)
                for p, e in facts.items()
                if k < len(e["utilities"])
            },
            seconds=3.5,
        )
        for k, u in enumerate(facts["cluster_entropy"]["utilities"])
    ]
    return Snapshot(
        spec={
            "name": "digits",
            "seed": 0,
            "data": {"kind": "image_folder", "path": f"data/{ids[0]}", "contributors": list(ids)},
            "estimator": {"kind": "ridge", "budget": 2 * pairs},
            "properties": [{"kind": "cluster_entropy"}, {"kind": "confidence"}],
            "tracking": {"uri": "http://user:password@host"},
            **spec,
        },
        spec_digest=SPEC_DIGEST,
        numerics={"device": "cpu", "threads": 1},
        version="0.1.0",
        roster=list(ids),
        digests={"digits": "d1" * 32},
        children=children if finished else children[:5],
        progress={"done": len(children) if finished else 5, "failed": 1},
        attribution=attribution if finished else None,
        evidence=evidence if finished else None,
        cost=cost if finished else None,
    )


@pytest.fixture(autouse=True)
def brief(monkeypatch) -> None:
    monkeypatch.setattr(tracking, "SECOND_CHANCE", 0.1)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> bytes:
    """The bytes of a database with MLflow's tables, which take seconds to create."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mirror = Mirror(f"sqlite:///{path}", "attr-batch", "0" * 64, KEY, path.with_name("lock"))
    assert mirror.end("FINISHED")
    return path.read_bytes()


@pytest.fixture
def store(tmp_path, empty_store) -> Path:
    path = tmp_path / "mlflow.db"
    path.write_bytes(empty_store)
    return path


def mirror_of(
    store: Path, key: bytes | None = KEY, experiment: str = "job", job: str = SPEC_DIGEST
) -> Mirror:
    lock = store.with_name("mlflow.lock")
    return Mirror(f"sqlite:///{store}", experiment, job, key, lock)


def client_of(store: Path):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{store}")


def runs_of(store: Path, experiment: str = "job"):
    client = client_of(store)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id], max_results=5000)
    parents = [r for r in runs if r.data.tags["attr_batch.kind"] == "job"]
    return parents, [r for r in runs if r not in parents]


def artifacts_of(store: Path) -> dict[str, bytes]:
    (root,) = (store.parent / "mlartifacts").iterdir()
    root = root / "artifacts"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_the_mirror_says_what_the_snapshot_says(store):
    shot = snapshot()
    mirror = mirror_of(store)
    assert mirror.sync(shot)
    assert mirror.end("FINISHED")
    (parent,), children = runs_of(store)
    assert shot.attribution is not None
    first = shot.attribution["attributions"][0]
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "digits"
    assert parent.data.params["estimator.budget"] == "12"
    assert parent.data.params["properties.1.kind"] == "confidence"
    assert parent.data.metrics["cluster_entropy/v_full"] == first["v_full"]
    spearman = parent.data.metrics["cluster_entropy/holdout_spearman"]
    assert spearman == first["holdout"]["spearman"]
    assert parent.data.metrics["seconds/base"] == 26.1
    assert parent.data.metrics["coalitions/failed"] == 1
    assert parent.inputs is not None
    assert parent.inputs.dataset_inputs[0].dataset.digest == ("d1" * 32)[:36]
    assert "held-out check" in parent.data.tags["mlflow.note.content"]
    assert len(children) == len(shot.children)
    by_key = {c.data.tags["attr_batch.run_key"]: c for c in children}
    for child in shot.children:
        run = by_key[child.key]
        assert run.info.run_name == f"{child.coalition} r{child.replicate}"
        assert run.info.status == "FINISHED"
        assert run.info.end_time is not None
        assert run.info.end_time - run.info.start_time == 3500
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["attr_batch.role"] == child.role
        for name, (value, stderr) in child.metrics.items():
            assert run.data.metrics[name] == value
            assert run.data.metrics[f"{name}_stderr"] == stderr


def test_artifacts_hold_tables_figures_and_the_report(store):
    shot = snapshot()
    assert mirror_of(store, key=None).sync(shot)
    found = artifacts_of(store)
    assert json.loads(found["attribution.json"]) == shot.attribution
    table = json.loads(found["coalitions.json"])
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert row["coalition"] == "0000"
    assert row["cluster_entropy"] == shot.children[0].metrics["cluster_entropy"][0]
    assert len(table["data"]) == len(found["coalitions.csv"].decode().splitlines()) - 1
    assert found["figures/cluster_entropy-values.svg"].startswith(b"<svg")
    assert found["report/index.html"].startswith(b"<!doctype html>")
    assert shot.evidence is not None
    assert found["samples/00.png"] == base64.b64decode(shot.evidence["grids"][0]["png_base64"])


def test_syncing_again_changes_nothing(store):
    shot = snapshot()
    first = mirror_of(store)
    assert first.sync(shot)
    before = runs_of(store), artifacts_of(store)
    assert first.sync(replace(shot, progress={**shot.progress, "failed": 2}))
    assert first.sync(shot)
    assert mirror_of(store).sync(shot)  # another process
    after = runs_of(store), artifacts_of(store)
    ids = [sorted(r.info.run_id for r in runs[0] + runs[1]) for runs, _ in (before, after)]
    assert ids[0] == ids[1]
    assert before[1] == after[1]
    history = client_of(store).get_metric_history(
        after[0][0][0].info.run_id, "cluster_entropy/v_full"
    )
    assert len(history) == 1


def test_an_unchanged_snapshot_is_not_drawn_again(store, monkeypatch):
    mirror = mirror_of(store)
    assert mirror.sync(snapshot())
    monkeypatch.delattr(tracking, "_artifacts")
    assert mirror.sync(snapshot())
    assert mirror.end("FINISHED", snapshot())
    assert runs_of(store)[0][0].info.status == "FINISHED"
    assert not mirror.sync(snapshot(name="renamed"))


def test_a_job_grows_is_killed_and_resumes_under_the_same_run(store):
    mirror = mirror_of(store)
    assert mirror.sync(snapshot(finished=False))
    (parent,), children = runs_of(store)
    assert parent.info.status == "RUNNING"
    assert len(children) == 5
    assert mirror.end("KILLED")
    assert runs_of(store)[0][0].info.status == "KILLED"
    again = mirror_of(store)
    shot = snapshot(name="renamed", resources={"workers": 9})
    assert again.sync(shot)
    (resumed,), children = runs_of(store)
    assert resumed.info.run_id == parent.info.run_id
    assert resumed.info.status == "RUNNING"
    assert len(children) == len(shot.children)
    assert again.end("FAILED")
    assert runs_of(store)[0][0].info.status == "FAILED"


def test_one_spec_on_two_classes_of_machine_is_two_jobs(store):
    shot = snapshot()
    theirs = [replace(child, key=child.key[::-1]) for child in shot.children]
    assert mirror_of(store, job="5e-cpu").end("FINISHED", shot)
    assert mirror_of(store, job="5e-cuda").end("KILLED", replace(shot, children=theirs[:3]))
    assert mirror_of(store, job="5e-cpu").end("FINISHED", shot)
    parents, children = runs_of(store)
    found = {p.data.tags["attr_batch.job"]: p for p in parents}
    assert {name: p.info.status for name, p in found.items()} == {
        "5e-cpu": "FINISHED",
        "5e-cuda": "KILLED",
    }
    held = Counter(c.data.tags["mlflow.parentRunId"] for c in children)
    assert held[found["5e-cpu"].info.run_id] == len(shot.children)
    assert held[found["5e-cuda"].info.run_id] == 3


def end_together(store: Path, start, ended) -> None:
    """End the mirror of a whole job at the same time as another process does."""
    mirror = mirror_of(store)
    mirror._connect()  # imports MLflow
    start.wait(60)
    ended.put(mirror.end("FINISHED", snapshot()))


def test_two_processes_at_once_create_each_run_once(store):
    assert mirror_of(store).end("RUNNING")  # the experiment
    spawn = multiprocessing.get_context("spawn")
    start, ended = spawn.Barrier(2), spawn.Queue()
    both = [spawn.Process(target=end_together, args=(store, start, ended)) for _ in range(2)]
    for process in both:
        process.start()
    assert [ended.get(timeout=60) for _ in both] == [True, True]
    for process in both:
        process.join()
    (parent,), children = runs_of(store)
    assert parent.info.status == "FINISHED"
    keys = sorted(c.data.tags["attr_batch.run_key"] for c in children)
    assert keys == sorted(c.key for c in snapshot().children)


def test_what_another_process_sent_meanwhile_is_not_sent_again(store):
    first = mirror_of(store)
    assert first.sync(snapshot(finished=False))
    assert mirror_of(store).end("FINISHED", snapshot())
    assert first.end("FINISHED", snapshot())
    assert len(runs_of(store)[1]) == len(snapshot().children)


def test_a_mirror_that_another_process_keeps_is_left_to_it(store, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "SYNC_WAIT", 0.1)
    monkeypatch.setattr(tracking, "END_WAIT", 0.1)
    mirror = mirror_of(store)
    with store.with_name("mlflow.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not mirror.sync(snapshot())
        assert not mirror.end("FINISHED", snapshot())
    assert "another process is writing it" in capsys.readouterr().err
    assert mirror.end("FINISHED", snapshot())


def test_a_file_system_without_locks_is_mirrored_too(store, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert mirror_of(store).sync(snapshot())


def test_a_child_left_half_written_is_completed(store):
    shot = snapshot()
    assert mirror_of(store).sync(shot)
    victim = runs_of(store)[1][0].info.run_id
    with sqlite3.connect(store) as database:
        database.execute("update runs set status = 'RUNNING' where run_uuid = ?", [victim])
        database.execute("delete from latest_metrics where run_uuid = ?", [victim])
        database.execute("delete from metrics where run_uuid = ?", [victim])
    database.close()
    assert mirror_of(store).sync(shot)
    children = runs_of(store)[1]
    assert len(children) == len(shot.children)
    (healed,) = [c for c in children if c.info.run_id == victim]
    assert healed.info.status == "FINISHED"
    assert "cluster_entropy" in healed.data.metrics


def test_no_name_is_sent(store):
    ids = [
        "Margarethe Oldenburg",
        'Zoë "Zed" <Quux>',
        "Ωμέγα",
        "id",
        "value",
        "7",
        "customer-90125",
    ]
    shot = snapshot(ids=ids, name="job of Margarethe Oldenburg")
    assert shot.evidence is not None
    shot.evidence["warnings"].append("margarethe oldenburg and customer-90125 share 3 images")
    shot.evidence["instruments"][0]["card"]["Ωμέγα"] = 'accuracy on Zoë "Zed" <Quux>'
    shot.evidence["grids"][0]["caption"] = "samples_Margarethe Oldenburg_1"
    assert mirror_of(store).sync(shot)
    secrets = [
        "margarethe",
        "oldenburg",
        "quux",
        "ωμέγα",
        "\\u03c9\\u03bc",
        "90125",
        "user:password",
    ]
    files = {"database": store.read_bytes(), **artifacts_of(store)}
    for name, content in files.items():
        if name.endswith(".png"):
            continue
        text = (name + content.decode("utf-8", "ignore")).casefold()
        for secret in secrets:
            assert secret.casefold() not in text, (secret, name)
    (parent,), _ = runs_of(store)
    assert pseudonym(KEY, "7") in parent.data.params["data.contributors"]
    assert pseudonym(KEY, "Ωμέγα") in files["report/index.html"].decode()
    sent = json.loads(files["attribution.json"])["attributions"][0]["contributors"]
    assert [c["id"] for c in sent] == [pseudonym(KEY, i) for i in ids]
    assert {c["digest"] for c in sent} == {None}


def test_digests_of_contributors_are_not_sent(store):
    shot = snapshot(data={"contributors": {name: f"{k:064x}" for k, name in enumerate(names(4))}})
    assert mirror_of(store).sync(shot)
    (parent,), _ = runs_of(store)
    sent = json.loads(parent.data.params["data.contributors"])
    assert sent == [pseudonym(KEY, name) for name in names(4)]
    assert all(f"{3:064x}".encode() not in text for text in artifacts_of(store).values())


def test_names_are_sent_where_the_job_says_so(store):
    assert mirror_of(store, key=None).sync(snapshot(ids=list(HOSTILE)))
    assert "the-very-long-name" in artifacts_of(store)["report/index.html"].decode()


def test_pseudonyms_are_keyed_and_leave_other_words_alone():
    assert pseudonym(KEY, "Ann") == pseudonym(KEY, "Ann")
    assert pseudonym(KEY, "Ann") != pseudonym(b"other", "Ann")
    assert pseudonym(KEY, "Ann").startswith("c-")
    assert len(pseudonym(KEY, "Ann")) == 12
    rewrite = Pseudonyms(KEY, ["Ann", "Ann Lee", "4"])
    ann, lee, four = (pseudonym(KEY, n) for n in ("Ann", "Ann Lee", "4"))
    assert rewrite.text("Annual ANN, Ann Lee_ann.png") == f"Annual {ann}, {lee}_{ann}.png"
    assert rewrite.text("seed 4, torch 2.4") == "seed 4, torch 2.4"
    assert rewrite.free({"4": ["4", 4]}, exact=True) == {four: [four, 4]}
    assert Pseudonyms(KEY, ["4", " "]).text("4 and more") == "4 and more"


def test_long_and_odd_values_fit_mlflows_limits(store):
    long = {"target": "x" * 20_000, "odd key é%$": 1, "odd key é%€": 1, "k" * 400: 2}
    long |= {f"many_{k}": k for k in range(250)}
    assert mirror_of(store).sync(snapshot(royalty=long))
    (parent,), _ = runs_of(store)
    assert len(parent.data.params["royalty.target"]) < 6000
    assert parent.data.params["royalty.many_249"] == "249"
    assert parent.data.params["royalty.odd key ___"] == "1"
    assert all(not key.startswith(("tracking", "resources")) for key in parent.data.params)


def test_many_contributors_fit_too(store):
    shot = snapshot(258, 2)
    assert mirror_of(store).sync(shot)
    (parent,), children = runs_of(store)
    assert len(parent.data.tags["mlflow.note.content"]) <= 8000
    assert len(parent.data.params["data.contributors"]) < 6000
    assert {len(c.data.tags["mlflow.runName"]) for c in children} == {2 + 65 + 3}


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_down_is_one_warning_and_quick(capsys, monkeypatch, tmp_path):
    for name in tracking.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    uri = f"http://me:hidden@127.0.0.1:{closed_port()}"
    mirror = Mirror(uri, "job", SPEC_DIGEST, KEY, tmp_path / "lock")
    start = time.monotonic()
    assert not mirror.sync(snapshot())
    assert not mirror.sync(snapshot())
    assert not mirror.end("FAILED")
    assert time.monotonic() - start < 15
    said = capsys.readouterr().err
    assert said.count("warning: MLflow at http://…@127.0.0.1") == 1
    assert "attr-batch sync" in said
    assert "hidden" not in said


def test_a_mirror_that_was_down_catches_up(store, monkeypatch):
    mirror = mirror_of(store)
    monkeypatch.setattr(mirror, "_uri", f"sqlite:///{store}/below-a-file.db")
    assert not mirror.sync(snapshot())
    monkeypatch.setattr(mirror, "_uri", f"sqlite:///{store}")
    assert not mirror.sync(snapshot())  # too soon to try again
    assert mirror.end("FINISHED", snapshot())  # the last chance is taken
    (parent,), children = runs_of(store)
    assert parent.info.status == "FINISHED"
    assert len(children) == len(snapshot().children)


def test_the_parent_gets_its_status_although_the_snapshot_cannot_be_shown(store, monkeypatch):
    mirror = mirror_of(store)
    assert mirror.sync(snapshot(finished=False))
    monkeypatch.delattr(tracking, "_artifacts")
    assert not mirror.sync(snapshot())
    assert mirror.end("FAILED")  # at once, whatever PATIENCE says
    assert runs_of(store)[0][0].info.status == "FAILED"
    assert not mirror.end("KILLED", snapshot())
    assert runs_of(store)[0][0].info.status == "KILLED"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:hidden@host:5000/a", "http://…@host:5000/a"),
        ("https://host/a", "https://host/a"),
        ("postgresql://me:hid/den@hidden@host/db", "postgresql://…@host/db"),
        ("mysql+pymysql://host/db?password=hidden", "mysql+pymysql://host/db?…"),
        ("sqlite:////home/me@work/what?/mlflow.db", "sqlite:////home/me@work/what?/mlflow.db"),
    ],
)
def test_a_uri_is_shown_without_its_secrets(uri, shown):
    assert tracking.public_uri(uri) == shown
    look = shlex.split(tracking.where_to_look(uri))
    assert look[-1] == shown
    command = [] if uri.startswith("http") else ["mlflow", "ui", "--backend-store-uri"]
    assert look[:-1] == command


def test_a_long_reason_does_not_cut_through_the_password(store, monkeypatch, capsys):
    mirror = mirror_of(store)
    uri = "postgresql://me:hidden@host/db"

    def fail():
        raise ValueError("x" * 278 + uri)

    monkeypatch.setattr(mirror, "_uri", uri)
    monkeypatch.setattr(mirror, "_connect", fail)
    assert not mirror.end("FAILED")
    said = capsys.readouterr().err
    assert "xxx" in said
    assert "hidden" not in said


def test_the_users_own_environment_stays(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    mirror_of(store).end("FINISHED")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_the_default_key_is_made_once_and_private(tmp_path):
    key = secret_key(tmp_path / "work")
    path = tmp_path / "work" / "pseudonym.key"
    assert len(key) == 32
    assert secret_key(tmp_path / "work") == key
    assert secret_key(tmp_path / "other") != key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["pseudonym.key"]
    path.write_bytes(b"short")
    with pytest.raises(StoreError, match="wanted 32 bytes, got 5"):
        secret_key(tmp_path / "work")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be kept"):
        secret_key(tmp_path / "file")


def test_without_its_key_nothing_is_mirrored_and_work_goes_on(tmp_path, capsys):
    (tmp_path / "pseudonym.key").mkdir()  # as unreadable as another user's file
    assert tracking.mirror(Tracking(), SPEC_DIGEST, tmp_path, "sqlite:///d.db") is None
    said = capsys.readouterr().err
    assert f"MLflow is not written: {tmp_path}/pseudonym.key: the key of the pseudonyms" in said
    assert "tracking.key_env" in said


def test_the_spec_decides_who_is_mirrored_and_how(tmp_path, monkeypatch):
    def built(**fields):
        return tracking.mirror(Tracking(**fields), SPEC_DIGEST, tmp_path / "w", "sqlite:///d.db")

    assert built(enabled=False) is None
    names_sent = built(contributors="names", uri="http://host")
    assert names_sent is not None
    assert (names_sent._key, names_sent._uri) == (None, "http://host")
    assert not (tmp_path / "w").exists()
    own = built()
    assert own is not None
    assert (own._key, own._uri) == (secret_key(tmp_path / "w"), "sqlite:///d.db")
    monkeypatch.setenv("PSEUDONYM_KEY", "from outside")
    keyed = built(key_env="PSEUDONYM_KEY")
    assert keyed is not None
    assert keyed._key == b"from outside"
    monkeypatch.setenv("PSEUDONYM_KEY", "")
    with pytest.raises(SpecError, match="not set"):
        built(key_env="PSEUDONYM_KEY")


@pytest.fixture
def hanging(monkeypatch):
    """The address of a server that accepts and never answers; we wait a second for it, once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_hangs_delays_neither_the_work_nor_a_signal(hanging, tiny, capsys):
    mirror = results.Mirror(tiny(tracking={"uri": hanging}))
    mirror.follow()
    assert mirror._thread is not None
    assert mirror._thread.is_alive()  # nobody waited for an answer
    first = mirror._thread
    mirror.follow()
    assert mirror._thread is first
    assert not mirror.end("KILLED", brief=True)
    assert not first.is_alive()
    assert "is not written: timed out" in capsys.readouterr().err


def test_a_sync_on_its_way_is_left_and_taken_up_again(store, capsys):
    mirror, shot = mirror_of(store), snapshot()
    send, sent = mirror._send_child, []

    def leave_at_the_third(parent, child, run_id):
        sent.append(child.key)
        if len(sent) == 3:
            mirror.leaving.set()
        send(parent, child, run_id)

    mirror._send_child = leave_at_the_third
    assert not mirror.sync(shot)
    assert len(sent) == 3
    mirror.leaving.clear()
    assert mirror.end("FINISHED", shot)
    assert sorted(sent) == sorted(child.key for child in shot.children)
    assert capsys.readouterr().err == ""


def test_the_load_of_the_machine_is_the_parents(store):
    mirror = mirror_of(store)
    assert mirror.follow(snapshot(finished=False))
    assert mirror.follow(snapshot(finished=False))
    (parent,), children = runs_of(store)
    load = {k: v for k, v in parent.data.metrics.items() if k.startswith("system/")}
    assert 0 < load["system/system_memory_usage_percentage"] < 100
    assert "system/cpu_utilization_percentage" in load
    assert not any(key.startswith("system/") for c in children for key in c.data.metrics)


def test_without_mlflows_monitors_there_is_no_load_and_no_harm(store, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "psutil", None)
    for name in [n for n in sys.modules if n.startswith("mlflow.system_metrics")]:
        monkeypatch.delitem(sys.modules, name)
    mirror = mirror_of(store)
    assert mirror.follow(snapshot(finished=False))
    assert not any(key.startswith("system/") for key in runs_of(store)[0][0].data.metrics)
    assert capsys.readouterr().err == ""


def test_the_mirror_is_where_the_spec_the_environment_or_the_store_says(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert results._tracking_uri(tiny(tracking={"uri": "http://spec"})) == "http://spec"
    assert results._tracking_uri(tiny()) == "http://environment"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert results._tracking_uri(tiny()) == f"sqlite:///{tmp_path}/store/mlflow.db"


def test_a_bucket_without_a_server_has_no_mirror(tmp_path, capsys):
    assert tracking.mirror(Tracking(), SPEC_DIGEST, tmp_path, None) is None
    assert "neither tracking.uri nor MLFLOW_TRACKING_URI names a server" in capsys.readouterr().err
    assert tracking.mirror(Tracking(uri="http://host"), SPEC_DIGEST, tmp_path, None) is not None
