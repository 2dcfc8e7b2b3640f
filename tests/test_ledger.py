"""The ledger: published once, read whole, and honest about what is damaged."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attr_batch import ledger as ledger_module
from attr_batch import store as store_module
from attr_batch.errors import DataError, LedgerConflict, NumericsError, StoreError
from attr_batch.ledger import Ledger, safe_name, seal, unseal
from attr_batch.recipe import digest
from attr_batch.store import Folder, is_temporary

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(params=["folder", "bucket"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    bucket = request.param == "bucket"
    return Ledger(request.getfixturevalue("bucket") if bucket else tmp_path / "store")


@pytest.fixture
def in_folder(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "store")


def put(ledger: Ledger, name: str, data: bytes) -> None:
    """Write over whatever lies there, as no program of ours does."""
    ledger.store.replace(name, data)


@given(st.dictionaries(st.text().filter(lambda k: k != "sha256"), json_values, max_size=4))
def test_a_sealed_fact_comes_back_as_it_was(fact):
    assert unseal(seal(fact), "here") == fact


@given(st.integers(0, 200), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position, change):
    fact = {"value": 1.25, "coalition": "0110", "property": "entropy"}
    data = bytearray(seal(fact))
    position %= len(data)
    data[position] ^= change
    found = None
    with contextlib.suppress(LedgerConflict):
        found = unseal(bytes(data), "here")
    assert found in (None, fact)  # white space may change, the fact may not


@given(st.binary(max_size=60))
def test_foreign_bytes_are_a_conflict(data):
    with pytest.raises(LedgerConflict):
        unseal(data, "here")


def test_first_published_stays(ledger):
    assert ledger.store.publish("runs/k/a.json", b"first")
    assert not ledger.store.publish("runs/k/a.json", b"second")
    assert ledger.store.read("runs/k/a.json") == b"first"
    assert [n for n in ledger.store.children("runs/k") if is_temporary(n)] == []


def test_publishing_the_same_name_with_other_bytes_is_a_conflict(ledger):
    ledger.publish_same("plans/p.jsonl", b"a")
    ledger.publish_same("plans/p.jsonl", b"a")
    with pytest.raises(LedgerConflict, match="other content"):
        ledger.publish_same("plans/p.jsonl", b"b")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a/./b"])
def test_names_cannot_leave_the_store(ledger, name):
    with pytest.raises(ValueError, match="inside the store"):
        ledger.store.read(name)


@given(st.text())
def test_safe_names_are_names(text):
    assert "/" not in safe_name(text)
    assert safe_name(text).isascii()


def _publish_many(root: str, number: int) -> None:
    store = Folder(root)
    for i in range(50):
        store.publish(f"runs/{i}/value.json", f"{number}".encode() * 5000)


def test_racing_writers_publish_each_fact_once_and_whole(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_publish_many, args=(str(tmp_path), number)) for number in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    for i in range(50):
        data = Folder(tmp_path).read(f"runs/{i}/value.json")
        assert data is not None
        assert len(data) == 5000
        assert len(set(data)) == 1


def _publish_until_killed(root: str) -> None:
    store = Folder(root)
    for i in range(10_000):
        store.publish(f"runs/{i}/value.json", seal({"i": i, "padding": "x" * 20_000}))


def test_kill_9_leaves_whole_facts_or_none(tmp_path):
    process = multiprocessing.get_context("spawn").Process(
        target=_publish_until_killed, args=(str(tmp_path),)
    )
    process.start()
    while len(Folder(tmp_path).children("runs")) < 20:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    ledger = Ledger(tmp_path)
    assert ledger.bad_files() == []
    for child in ledger.store.children("runs"):
        fact = ledger.fact(f"runs/{child}/value.json")
        assert fact is None or fact["i"] == int(child)


def test_a_thing_is_published_whole_and_checked(ledger):
    work = ledger.work("bases/b")
    work.mkdir()
    (work / "weights").write_bytes(b"weights")
    ledger.publish_thing("bases", "b", work, {"seed": 0}, 1.5)
    assert not work.exists()
    folder, manifest_digest = ledger.verified_thing("bases", "b")
    assert (folder / "weights").read_bytes() == b"weights"
    assert len(manifest_digest) == 64
    put(ledger, "bases/b/weights", b"Weights")
    shutil.rmtree(os.environ.get("ATTR_BATCH_SCRATCH", "nowhere"), ignore_errors=True)
    with pytest.raises(LedgerConflict, match="altered"):
        ledger.verified_thing("bases", "b")
    assert ledger.bad_files() == [("bases/b", "missing or altered")]


def test_the_first_published_thing_stays(ledger):
    for content in (b"one", b"two"):
        work = ledger.work("bases/b")
        work.mkdir()
        (work / "weights").write_bytes(content)
        ledger.publish_thing("bases", "b", work, {}, 0.0)
    assert (ledger.verified_thing("bases", "b")[0] / "weights").read_bytes() == b"one"


def test_a_value_for_another_run_is_a_conflict(ledger):
    fact = {"key": "k1", "property": "p", "property_digest": "d" * 64, "value": 1.0}
    fact |= {"stderr": 0.1, "seconds": 1.0}
    ledger.publish_fact(ledger.value_name("k1", "p", "d" * 64), fact)
    name = ledger.value_name("k1", "p", "d" * 64)
    assert ledger.facts([name]) == {name: fact}
    assert ledger.owned(name, fact, key="k1", property_digest="d" * 64) == fact
    with pytest.raises(LedgerConflict, match="another run"):
        ledger.owned(name, fact, key="k2")


def test_repair_puts_bad_files_aside_and_leaves_good_ones(ledger):
    store = ledger.store
    ledger.publish_fact("runs/k/value-abc.json", {"value": 1.0})
    store.publish("runs/k/torn.json", seal({"value": 2.0})[:-20])
    store.publish("runs/stray.txt", b"hello")
    store.publish("runs/k/notes.txt", b"hello")
    store.publish("specs/s.json", b"[]")
    store.publish("plans/p.jsonl", b'{"spec": "s"}\n{"nokey": 1}\n')
    bad = dict(ledger.bad_files())
    assert set(bad) == {
        "runs/k/torn.json",
        "runs/stray.txt",
        "runs/k/notes.txt",
        "specs/s.json",
        "plans/p.jsonl",
    }
    for name in bad:
        moved = ledger.quarantine(name)
        assert store.exists(moved)
    assert ledger.bad_files() == []
    assert ledger.fact("runs/k/value-abc.json") == {"value": 1.0}


def test_heartbeats_end_with_their_process_and_their_age(ledger, monkeypatch):
    assert ledger.claim("k", "coalition 01")
    assert ledger.heartbeat("k").mine
    assert not ledger.claim("k", "again")
    beat = json.loads(ledger.store.read("work/heartbeats/k.json"))
    ledger.store.replace(
        "work/heartbeats/k.json", json.dumps({**beat, "process_start": "1"}).encode()
    )
    assert ledger.heartbeat("k") is None  # the pid belongs to another process now
    ledger.store.replace("work/heartbeats/k.json", json.dumps({**beat, "host": "pod-7"}).encode())
    assert ledger.heartbeat("k") is not None  # another host's process cannot be looked up
    late = time.time() + ledger_module.ALIVE_SECONDS + 1
    monkeypatch.setattr(ledger_module.time, "time", lambda: late)
    assert ledger.heartbeat("k") is None


def test_a_heartbeat_goes_on_while_nothing_ticks_and_ends_with_the_work(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "TICK_SECONDS", 0.01)
    with ledger.beating("report", "report") as beat:
        beat(2, 3, {})
        first = ledger.heartbeat("report")
        until = time.monotonic() + 10
        while ledger.heartbeat("report").time == first.time and time.monotonic() < until:
            time.sleep(0.01)
        later = ledger.heartbeat("report")
        assert later.time > first.time
        assert (later.done, later.total) == (2, 3)
    assert ledger.heartbeats() == []


def test_where_the_store_is_away_a_heartbeat_is_left_to_its_age(ledger):
    with contextlib.suppress(StoreError), ledger.beating("k", "fine-tuning"):
        raise StoreError("away", "store")
    assert ledger.heartbeats() == ["k"]


def test_a_torn_heartbeat_counts_as_none(ledger):
    ledger.store.replace("work/heartbeats/k.json", b'{"name": "k"')
    assert ledger.heartbeat("k") is None
    assert ledger.claim("k", "x")


def test_failures_are_recorded_and_forgiven(ledger):
    ledger.record_failure("k", NumericsError("NaN"), "session", "coalition 01")
    assert ledger.failure("k")["exit_code"] == 70
    ledger.forgive("k")
    assert ledger.failure("k") is None


def test_a_full_disk_is_a_store_error(in_folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    ledger = in_folder
    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(StoreError, match="No space") as caught:
        ledger.store.publish("runs/k/a.json", b"x")
    assert caught.value.exit_code == 74
    assert ledger.store.children("runs/k") == []


def test_a_forbidden_store_is_a_data_error(in_folder, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    ledger = in_folder
    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(DataError, match="may not be written") as caught:
        ledger.store.publish("runs/k/a.json", b"x")
    assert caught.value.exit_code == 65


def test_a_file_where_the_store_should_be_is_a_conflict(tmp_path):
    (tmp_path / "store").write_text("I am a file")
    with pytest.raises(LedgerConflict):
        Ledger(tmp_path / "store").store.publish("runs/k/a.json", b"x")


def test_gc_keeps_what_a_plan_needs(ledger):
    b1, b2, p1, k1, k2, k3, k4, s1 = (
        digest(name) for name in ["b1", "b2", "p1", "k1", "k2", "k3", "k4", "s1"]
    )
    plan = [
        {"spec": s1, "numerics": {}, "bases": [b1], "properties": [p1]},
        {"key": k1},
        {"key": k2},
    ]
    content = "\n".join(map(json.dumps, plan)).encode()
    plan_name = ledger.plan_name(s1, content)
    ledger.store.publish(plan_name, content)
    ledger.publish_fact(f"specs/{s1}.json", {"content": {}})
    runs = (f"runs/{k}/v" for k in (k1, k3, k4))
    for name in (f"bases/{b1}/w", f"bases/{b2}/w", f"properties/{p1}/w", *runs):
        ledger.store.publish(name, b"12345")
    ledger.store.publish("runs/thesis/model.pt", b"not ours")
    ledger.store.publish(f"work/runs/{k3}.safetensors", b"12")
    ledger.publish_fact(f"runs/{k2}/diverged.json", {"key": k2, "next": k4})
    dropped = ledger.unneeded([])
    assert sorted(dropped) == sorted(
        [(f"bases/{b2}", 5), (f"runs/{k3}", 5), (f"work/runs/{k3}.safetensors", 2)]
    )
    forgotten = {name for name, _ in ledger.unneeded([s1[:12]])}
    assert forgotten == {
        plan_name,
        f"specs/{s1}.json",
        f"properties/{p1}",
        f"work/runs/{k3}.safetensors",
        *(f"bases/{b}" for b in (b1, b2)),
        *(f"runs/{k}" for k in (k1, k2, k3, k4)),
    }
    for name, _ in dropped:
        ledger.drop(name)
    assert ledger.unneeded([]) == []
    assert ledger.store.exists(f"runs/{k4}/v")
    assert ledger.store.exists("runs/thesis/model.pt")


def test_gc_guesses_at_no_damaged_plan(ledger):
    ledger.store.publish("plans/p.jsonl", b'{"spec": "s"}\n{"key": ')
    with pytest.raises(LedgerConflict, match="torn"):
        ledger.unneeded([])


def test_a_plan_of_which_a_key_was_altered_is_not_read(ledger):
    """`gc` would drop what it names no more."""
    content = b'{"bases": [], "properties": [], "spec": "s", "numerics": {}}\n{"key": "k"}\n'
    name = ledger.plan_name("s", content)
    ledger.publish_same(name, content)
    assert len(ledger.plans()) == 1
    ledger.store.drop(name)
    ledger.publish_same(name, content.replace(b'"k"', b'"j"'))
    with pytest.raises(LedgerConflict, match="altered"):
        ledger.plans("s")
    assert dict(ledger.bad_files()) == {name: "altered"}


def test_a_folder_without_manifest_is_refused_and_repaired(in_folder):
    ledger = in_folder
    work = ledger.work("bases/b")
    work.mkdir()
    (work / "weights").write_bytes(b"weights")
    ledger.store.publish("bases/b/weights", b"half of it")
    with pytest.raises(LedgerConflict, match="no manifest"):
        ledger.publish_thing("bases", "b", work, {}, 0.0)
    assert (work / "weights").exists(), "what was made is not lost"
    ((name, _),) = ledger.bad_files()
    ledger.quarantine(name)
    ledger.publish_thing("bases", "b", work, {}, 0.0)
    assert ledger.has_thing("bases", "b")


def test_a_lock_is_held_by_one_and_let_go(ledger):
    with ledger.store.lock("x") as first, ledger.store.lock("x") as second:
        assert (first, second) == (True, False)
    with ledger.store.lock("x") as third:
        assert third


def test_an_altered_plan_is_found(ledger):
    plan = b'{"bases": [], "numerics": {}, "properties": [], "spec": "s"}\n{"key": "k"}\n'
    ledger.store.publish(ledger.plan_name("s", plan), plan)
    assert ledger.bad_files() == []
    put(ledger, ledger.plan_name("s", plan), plan.splitlines(True)[0])
    assert [reason for _, reason in ledger.bad_files()] == ["altered"]
