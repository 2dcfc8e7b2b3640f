"""Whole jobs through the command line: real data, real processes, real signals."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import TINY, tiny_tree

pytestmark = pytest.mark.e2e

DIGITS = [str(d) for d in range(10)]
# The digits job at the size of a test: what matters is that the planted truth is found.
PLANTED: dict[str, Any] = {
    **TINY,
    "name": "planted",
    "model": {
        "kind": "unet",
        "block_out_channels": [24, 48],
        "training": {"steps": 300, "batch": 64, "learning_rate": 3e-3, "warmup": 50},
    },
    "pruning": {
        "kind": "magnitude",
        "ratio": 0.5,
        "recovery": {"steps": 150, "batch": 64, "learning_rate": 2e-3},
    },
    "counterfactual": {"kind": "sparsified_finetune", "steps": 25, "learning_rate": 3e-3},
    "sampling": {"steps": 10, "images": 128, "keep": "all"},
    "properties": [
        {"kind": "class_share", "label": digit, "classifier": {"epochs": 8}} for digit in DIGITS
    ],
    "estimator": {"kind": "ridge", "budget": 30, "holdout": 0, "endpoint_replicates": 2},
    "resources": {"device": "cpu", "workers": 2, "cohort": 4},
}
COHORTS = {"device": "cpu", "workers": 2, "cohort": 3}


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "attr_batch.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    return out, err


def run(*arguments: str | Path, code: int = 0, **environment: str) -> tuple[str, str]:
    return finish(start(*arguments, **environment), code)


def report_bytes(store: Path) -> bytes:
    (path,) = store.glob("reports/*/attribution.json")
    return path.read_bytes()


def test_planted_truth(tmp_path):
    """With the property "share of images classified as d", contributor d must come first."""
    job = write(tmp_path / "job.yaml", {**PLANTED, "store": str(tmp_path / "store")})
    out, _ = run("run", job, "--json")
    found = json.loads(out)
    first = {
        a["property"].removeprefix("class_share-"): max(
            a["contributors"], key=lambda c: c["value"]
        )["id"]
        for a in found["attributions"]
    }
    right = [digit for digit in DIGITS if first[digit] == digit]
    assert len(right) >= 9, first
    for a in found["attributions"]:
        total = sum(c["value"] for c in a["contributors"])
        assert total == pytest.approx(a["v_full"] - a["v_empty"], abs=1e-9)
        assert abs(a["efficiency_gap"]) < 1e-9
    (evidence,) = (tmp_path / "store").glob("reports/*/evidence.json")
    pruning = json.loads(evidence.read_text())["pruning"]
    assert pruning["macs_before"] / pruning["macs_after"] >= 3.5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    """The tiny job's attribution.json, made without any disturbance by one worker."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = write(folder / "job.yaml", tiny_tree(folder / "store"))
    run("run", job)
    return report_bytes(folder / "store")


@pytest.fixture(scope="module")
def undisturbed_cohorts(tmp_path_factory) -> bytes:
    """The same in cohorts of 3."""
    folder = tmp_path_factory.mktemp("undisturbed-cohorts")
    run("run", write(folder / "job.yaml", tiny_tree(folder / "store", resources=COHORTS)))
    return report_bytes(folder / "store")


def test_two_workers_and_four_shards_give_the_same_bytes(undisturbed, tmp_path):
    two = write(
        tmp_path / "two.yaml",
        tiny_tree(tmp_path / "two", resources={"device": "cpu", "workers": 2}),
    )
    run("run", two)
    assert report_bytes(tmp_path / "two") == undisturbed
    four = write(tmp_path / "four.yaml", tiny_tree(tmp_path / "four"))
    shards = [
        start("run", four, JOB_COMPLETION_INDEX=str(i), ATTR_BATCH_SHARDS="4") for i in range(4)
    ]
    for shard in shards:
        finish(shard)
    assert report_bytes(tmp_path / "four") == undisturbed


def test_killed_at_ten_random_moments_and_resumed_gives_the_same_bytes(
    undisturbed, undisturbed_cohorts, tmp_path
):
    """Kill the run at random moments, gently or not, until it gets through; ten kills in all."""
    moments = random.Random(20)
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGINT] * 2
    started = 0
    while signals:
        started += 1
        store = tmp_path / f"store{started}"
        resources = TINY["resources"] if started % 2 else COHORTS
        wanted = undisturbed if started % 2 else undisturbed_cohorts
        job = write(tmp_path / f"job{started}.yaml", tiny_tree(store, resources=resources))
        for _ in range(6):
            process = start("run", job)
            time.sleep(moments.uniform(1.5, 8.0))
            if process.poll() is None and signals:
                chosen = signals.pop()
                process.send_signal(chosen)
                _, err = process.communicate(timeout=60)
                if chosen != signal.SIGKILL and process.returncode != 0:
                    assert process.returncode in (75, -chosen), err  # - : before it could listen
                assert "Traceback" not in err, err
            else:
                finish(process)
                break
        run("run", job)
        assert report_bytes(store) == wanted


def test_a_stopped_training_resumes_from_its_checkpoint(tmp_path):
    """Stopped within the training on all data, it goes on from there to the same bits."""
    from safetensors import safe_open

    tree = tiny_tree(tmp_path / "whole")
    tree["model"] = {**TINY["model"], "training": {"steps": 1500, "batch": 32, "warmup": 2}}
    run("run", write(tmp_path / "whole.yaml", tree))
    store = tmp_path / "store"
    job = write(tmp_path / "job.yaml", {**tree, "store": str(store)})
    process = start("run", job)
    while not list(store.glob("work/bases/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(2.5)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    (checkpoint,) = store.glob("work/bases/*/checkpoint.safetensors")
    with safe_open(checkpoint, framework="np") as file:
        step = json.loads(file.metadata()["attr_batch"])["step"]
    assert 0 < step < 1500
    run("run", job)
    assert report_bytes(store) == report_bytes(tmp_path / "whole")


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory) -> Path:
    """A user's own folder: 120 real digits as PNG, three artists, styles as labels."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("images")
    digits = load_digits()
    rows = []
    for i in range(120):
        pixels = np.rint(digits.images[i] * 255 / 16).astype(np.uint8)
        name = f"{i:03d}.png"
        Image.fromarray(pixels).resize((20, 20)).save(folder / name)
        rows.append((name, ["Ada", "Grace <b>", "Zoë"][i % 3], f"style {digits.target[i] % 2}"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "artist", "style"])
        writer.writerows(rows)
    return folder


def test_a_folder_of_images_works_by_changing_the_spec_only(folder_of_images, tmp_path):
    data = {
        "kind": "image_folder",
        "path": str(folder_of_images),
        "contributor": "artist",
        "label": "style",
        "size": 16,
        "channels": 3,
    }
    properties = [
        {"kind": "cluster_entropy", "clusters": 6},
        {"kind": "classifier_confidence", "classifier": {"epochs": 2}},
    ]
    tree = tiny_tree(
        tmp_path / "store",
        data=data,
        properties=properties,
        estimator={"kind": "exact", "endpoint_replicates": 2},
    )
    tree["tracking"] = {"enabled": True}
    job = write(tmp_path / "job.yaml", tree)
    run("check", job)
    out, _ = run("run", job)
    for name in ("Ada", "Grace <b>", "Zoë"):
        assert name in out
    (page,) = (tmp_path / "store").glob("reports/*/index.html")
    html = page.read_text()
    assert "Grace &lt;b&gt;" in html
    assert "Grace <b>" not in html
    import sqlite3

    with sqlite3.connect(tmp_path / "store/mlflow.db") as database:
        rows = database.execute("select status, count(*) from runs group by status").fetchall()
    assert dict(rows) == {"FINISHED": 6 + 4 + 3 + 1}  # design, endpoints, references, the job
    for path in [tmp_path / "store/mlflow.db", *(tmp_path / "store/mlartifacts").rglob("*")]:
        if path.is_file():
            data = path.read_bytes()
            assert b"Grace" not in data, path
            assert "Zoë".encode() not in data, path


def test_mlflow_statuses_after_sigterm_and_failure(tmp_path):
    import sqlite3

    def statuses() -> set[str]:
        query = (
            "select status from runs join tags using (run_uuid) "
            "where key = 'attr_batch.kind' and value = 'job'"
        )
        try:
            with sqlite3.connect(tmp_path / "store/mlflow.db") as database:
                return {row[0] for row in database.execute(query)}
        except sqlite3.OperationalError:  # MLflow is making its tables
            return set()

    tree = tiny_tree(tmp_path / "store", tracking={"enabled": True})
    tree["model"] = {**TINY["model"], "training": {"steps": 20000, "batch": 32, "warmup": 2}}
    job = write(tmp_path / "job.yaml", tree)
    process = start("run", job)
    while not (tmp_path / "store/mlflow.db").exists() or statuses() != {"RUNNING"}:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert statuses() == {"KILLED"}
    tree["model"]["training"] = {"steps": 20, "learning_rate": 1e9, "warmup": 0, "clip": None}
    process = start("run", write(tmp_path / "job.yaml", tree))
    process.communicate(timeout=300)
    assert process.returncode == 70
    assert "FAILED" in statuses()
    tree["model"] = TINY["model"]
    run("run", write(tmp_path / "job.yaml", tree))
    assert statuses() == {"KILLED", "FAILED", "FINISHED"}


def test_an_unreachable_mlflow_does_not_stop_the_work(tmp_path, undisturbed):
    tree = tiny_tree(tmp_path / "store", tracking={"uri": "http://127.0.0.1:9"})
    _, err = run("run", write(tmp_path / "job.yaml", tree))
    assert "MLflow" in err
    assert report_bytes(tmp_path / "store") == undisturbed
