"""A bucket as a store: the same names and bytes as in a folder, and errors a user can act on.

Against a real S3 server (SeaweedFS). `test_ledger` runs the ledger's own tests on a bucket, too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from obstore.exceptions import GenericError
from PIL import Image

from attr_batch import bucket as bucket_module
from attr_batch.bucket import Bucket, _files, fetch, open_store, stamps
from attr_batch.errors import AttrBatchError, DataError, LedgerConflict, SpecError, StoreError
from attr_batch.job import Job
from attr_batch.ledger import Ledger
from attr_batch.results import publish
from attr_batch.runner import run
from attr_batch.spec import validate
from attr_batch.store import Folder
from tests.conftest import TINY, work_through
from tests.faults.proxy import BadNetwork
from tests.s3 import READER, READER_SECRET


def content(ledger: Ledger, *families: str) -> dict[str, bytes | None]:
    """Return the bytes of every file of a store that is a fact."""
    names = [n for family in families for n in ledger.store.walk(family)]
    return ledger.store.read_many(names)


FACTS = ("specs", "plans")


def timeless(data: bytes | None) -> dict:
    """Return a value or derivation without its seconds, and without what depends on seconds."""
    fact = json.loads(data or b"{}")
    made = {k: v for k, v in fact["provenance"].items() if not k.endswith("_sha256")}
    return {k: v for k, v in fact.items() if k not in ("seconds", "sha256")} | {"provenance": made}


def test_a_job_in_a_bucket_leaves_the_same_facts_as_in_a_folder(bucket, tmp_path):
    jobs = [Job(validate({**TINY, "store": place})) for place in (bucket, str(tmp_path / "store"))]
    reports = []
    for job in jobs:
        work_through(job)
        reports.append(publish(job))
    there, here = (job.ledger for job in jobs)
    assert reports[0] == reports[1]
    assert content(there, *FACTS) == content(here, *FACTS)
    runs = [content(ledger, "runs") for ledger in (there, here)]
    assert runs[0].keys() == runs[1].keys()
    for name, data in runs[0].items():
        if name.endswith(".json"):
            assert timeless(data) == timeless(runs[1][name])
        else:
            assert data == runs[1][name]
    name = f"{jobs[0].report_name}/attribution.json"
    assert there.store.read(name) == here.store.read(name)
    assert there.bad_files() == []
    assert not [n for n in there.store.walk("work") if not n.startswith("work/data")]
    # A bucket copied into a folder is that folder's store.
    copy = Folder(tmp_path / "copy")
    for family in ("", "specs", "plans", "bases", "properties", "runs", "reports"):
        for name in there.store.walk(family) if family else [Ledger.MARKER]:
            copy.publish(name, there.store.read(name) or b"")
    copied = Job(validate({**TINY, "store": str(tmp_path / "copy")}))
    assert copied.ledger.bad_files() == []
    assert run(copied) == reports[0]


def test_a_checkpoint_is_there_for_another_machine(bucket, tmp_path, monkeypatch):
    first = open_store(bucket)
    path = first.scratch("bases/b")
    path.mkdir()
    (path / "checkpoint.safetensors").write_bytes(b"step 7")
    (path / ".checkpoint.tmp").write_bytes(b"half")
    first.keep("bases/b")
    single = first.scratch("runs/k.safetensors")
    single.write_bytes(b"step 3")
    first.keep("runs/k.safetensors")
    monkeypatch.setenv("ATTR_BATCH_SCRATCH", str(tmp_path / "elsewhere"))
    second = open_store(bucket)
    taken = second.scratch("bases/b")
    assert {f.name: f.read_bytes() for f in taken.iterdir()} == {
        "checkpoint.safetensors": b"step 7"
    }
    assert second.scratch("runs/k.safetensors").read_bytes() == b"step 3"
    second.discard("runs/k.safetensors")  # who finishes it removes it, whoever began it
    assert "work/runs/k.safetensors" not in first.walk("work")


def test_a_thing_is_fetched_once_and_a_damaged_copy_is_noticed(bucket):
    ledger = Ledger(bucket)
    work = ledger.work("bases/b")
    work.mkdir()
    (work / "weights").write_bytes(b"weights")
    ledger.publish_thing("bases", "b", work, {}, 0.0)
    folder, _ = ledger.verified_thing("bases", "b")
    (folder / "weights").write_bytes(b"damaged on this disk")
    assert (ledger.verified_thing("bases", "b")[0] / "weights").read_bytes() == b"weights"


def test_what_a_killed_maker_left_is_replaced(bucket):
    ledger = Ledger(bucket)
    ledger.store.publish("bases/b/weights", b"half of it")
    work = ledger.work("bases/b")
    work.mkdir()
    (work / "weights").write_bytes(b"all of it")
    ledger.publish_thing("bases", "b", work, {}, 0.0)
    assert (ledger.verified_thing("bases", "b")[0] / "weights").read_bytes() == b"all of it"


@pytest.mark.parametrize(
    "url",
    ["ftp://x/y", "s3://", "s3://key:secret@bucket/x", "s3://b/../c", "s3://b/a?x=1", "s3://b//c"],
)
def test_what_is_no_bucket_is_refused(url):
    with pytest.raises(SpecError, match="no URL of a bucket") as caught:
        open_store(url)
    assert caught.value.problems[0].where == "store"


def test_forbidden_is_a_data_error_that_names_the_variables(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    with pytest.raises(DataError, match=r"forbidden: .*\(AccessDenied\)") as caught:
        open_store(bucket).publish("runs/k/v.json", b"x")
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match="SignatureDoesNotMatch"):
        open_store(bucket).check()


def test_a_missing_bucket_is_a_data_error(bucket):
    with pytest.raises(DataError, match="no such bucket"):
        open_store("s3://nowhere-at-all/x").check()


def test_a_store_that_does_not_answer_is_a_store_error(bucket, monkeypatch):
    monkeypatch.setattr(bucket_module, "RETRIES", 0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
        with pytest.raises(StoreError, match="Error performing") as caught:
            open_store(bucket).read("specs/s.json")
    assert caught.value.exit_code == 74


def test_every_verb_gets_through_a_network_that_breaks(bucket, s3_server, monkeypatch):
    with BadNetwork(s3_server.port, share=0.4, seed=1, delay=0.01) as network:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{network.port}")
        monkeypatch.setattr(bucket_module, "PAUSES", (0.02, 0.1))
        store = open_store(bucket)
        for i in range(8):
            store.publish(f"specs/{i}.json", b"{}")
            assert store.read(f"specs/{i}.json") == b"{}"
            store.replace(f"failures/{i}.json", b"{}")
        work = store.scratch("bases/b")
        work.mkdir()
        (work / "weights").write_bytes(bytes(12 << 20))  # sent in parts
        (work / "manifest.json").write_bytes(b"{}")
        store.keep("bases/b")
        store.publish_folder(work, "bases/b")
        sums = {"weights": hashlib.sha256(bytes(12 << 20)).hexdigest()}
        assert (store.local("bases/b", sums) / "weights").stat().st_size == 12 << 20
        store.move("specs/0.json", "quarantine/0.json")
        for i in range(8):
            store.delete(f"failures/{i}.json")
        store.drop("bases/b")
        assert store.children("failures") == []
        assert store.walk("bases/b") == {}
        assert len(store.children("specs")) == 7
    assert all(network.done[fault] for fault in network.FAULTS), network.done


def test_no_secret_is_in_a_message(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    with pytest.raises(AttrBatchError) as caught:
        open_store(bucket).check()
    assert "canary-secret" not in str(caught.value)


def test_where_local_files_find_no_room_the_hint_names_their_place(bucket, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    store = open_store(bucket)
    store.publish("bases/b/card.json", b"{}")
    monkeypatch.setattr(bucket_module.tempfile, "mkstemp", full)
    with pytest.raises(StoreError, match="No space") as caught:
        store.local("bases/b", {"card.json": "0" * 64})
    assert "ATTR_BATCH_SCRATCH" in str(caught.value.problems[0].hint)


def test_a_forbidden_delete_is_a_data_error_at_once(bucket, monkeypatch):
    open_store(bucket).replace("failures/k.json", b"{}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    monkeypatch.setattr(bucket_module, "RETRY_SECONDS", 600)
    with pytest.raises(DataError, match="forbidden"):
        open_store(bucket).delete("failures/k.json")


@pytest.mark.parametrize(
    ("said", "tries"),
    [
        ("HTTP error: error sending request", 2),
        ("Server returned non-2xx status code: 400 Bad Request", 1),
        ("Error performing PUT x in 60.1s, after 16 retries, max_retries: 1000 - reset", 1),
        ("Error performing POST x in 2.5s, after 1 retries, max_retries: 1000 - reset", 2),
    ],
)
def test_a_broken_connection_is_tried_again_and_a_refusal_is_not(bucket, said, tries):
    made = []

    def call():
        made.append(1)
        if len(made) < 2:
            raise GenericError(said)
        return "done"

    store = open_store(bucket)
    if tries == 2:
        assert store._insisting(call, "x") == "done"
    else:
        with pytest.raises(StoreError):
            store._insisting(call, "x")
    assert len(made) == tries


def test_markers_of_folders_are_no_files():
    sizes = {"": 0, "runs/k": 0, "runs/k/a.json": 2, "runs/empty": 0, "runs/j/b.png": 0}
    assert _files(sizes) == ["runs/k/a.json", "runs/j/b.png"]


def test_a_folder_that_became_empty_lists_nothing(bucket):
    """The server keeps an object of the folder's own name."""
    store = open_store(bucket)
    store.publish("runs/k/x", b"1")
    store.delete("runs/k/x")
    assert store.children("runs/k") == []
    assert store.walk("runs/k") == {}


def test_a_listing_is_the_same_for_few_and_many(bucket, monkeypatch):
    store = open_store(bucket)
    for key in ("a", "b", "c"):
        for name in ("x.json", "y.png"):
            store.publish(f"runs/{key}/{name}", b"1")
    few = store.listing("runs", ["a", "c", "none"])
    monkeypatch.setattr(bucket_module, "FEW", 0)
    many = store.listing("runs", ["a", "c", "none"])
    assert {k: sorted(v) for k, v in few.items()} == {k: sorted(v) for k, v in many.items()}
    assert few["none"] == []


# -- data -----------------------------------------------------------------------------------------


def put_images(url: str, count: int) -> Bucket:
    there = Bucket(url)
    generator = np.random.default_rng(0)
    lines = ["file_name,artist"]
    for i in range(count):
        path = Path(str(there.scratch("image.png")))
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        there.replace(f"art/{i:03d}.png", path.read_bytes())
        lines.append(f"art/{i:03d}.png,{'ab'[i % 2]}")
    there.replace("metadata.csv", "\n".join(lines).encode())
    return there


def test_data_come_from_a_bucket(bucket, tmp_path, monkeypatch):
    there = put_images(bucket, 70)
    data = {"kind": "image_folder", "path": bucket, "contributor": "artist", "size": 8}
    job = Job(validate({**TINY, "data": data, "store": str(tmp_path / "store")}))
    assert [c.images for c in job.card.roster.contributors] == [35, 35]
    folder = fetch(bucket)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")}
    fingerprint = job.spec.data.fingerprint()

    shutil.copy(folder / "art/000.png", tmp_path / "other.png")
    there.replace("art/001.png", (tmp_path / "other.png").read_bytes())
    there.delete("art/069.png")
    assert job.spec.data.fingerprint() != fingerprint
    after = {p: p.stat().st_mtime_ns for p in fetch(bucket).rglob("*.png")}
    assert len(after) == 69
    changed = [p.name for p, time in after.items() if before[p] != time]
    assert changed == ["001.png"], "the others are not fetched again"


def test_an_empty_prefix_is_a_data_error(bucket):
    with pytest.raises(DataError, match="there is nothing"):
        stamps(bucket)


def test_a_vanished_object_is_a_conflict(bucket):
    with pytest.raises(LedgerConflict, match="vanished"):
        open_store(bucket).move("runs/none", "quarantine/none")
