"""`attr-batch validate` from the command line: real retrainings, resumed, reported, mirrored."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import tiny_tree

pytestmark = pytest.mark.e2e

SECTION = {
    "subsets": [{"alpha": 0.5, "count": 6, "seeds": 2}],
    "reference": 8,
    "designs": 2,
    "estimators": ["ridge", "reference"],
    "counterfactuals": [{"kind": "lora", "steps": 2, "batch": 16, "rank": 2}],
    "steps": {"coalitions": 5, "steps": [2], "ema": ["restarted"]},
    "removal": {"remove": [0.4], "keep": [0.6]},
    "baselines": [
        {"kind": "image_count"},
        {"kind": "training_property"},
        {"kind": "trak", "timesteps": 1, "dimension": 16},
    ],
}


def command(folder: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "attr_batch.cli",
        "validate",
        str(folder / "job.yaml"),
        *arguments,
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    digits = {"kind": "digits", "contributors": [str(d) for d in range(5)]}
    tree = tiny_tree(
        tmp_path / "store",
        data=digits,
        validation=SECTION,
        tracking={"enabled": True},
        resources={"device": "cpu", "workers": 2},
        properties=[{"kind": "cluster_entropy"}, {"kind": "classifier_confidence"}],
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own
def test_a_validation_is_interrupted_resumed_and_reported(folder):
    first = subprocess.Popen(command(folder), stderr=subprocess.PIPE, text=True)
    values = folder / "store" / "runs"
    while first.poll() is None and len(list(values.glob("*/derivation.json"))) < 25:
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 75, said

    partial = subprocess.run(command(folder, "--provisional", "--json"), capture_output=True)
    assert partial.returncode == 0, partial.stderr
    assert not json.loads(partial.stdout)["complete"]

    done = subprocess.run(command(folder, "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["complete"]
    assert found["done"] == found["planned"]
    entropy, confidence = found["properties"]
    names = [method["name"] for method in entropy["methods"]]
    assert names[0] == "ridge"
    assert {
        "ridge, no surrogate",
        "reference",
        "reference, own draws",
        "lora, 2 steps, rank 2, ridge",
        "retrain, ridge",
        "leave_one_out",
        "retrain, leave_one_out",
        "alone",
        "own images, shapley",
        "image count",
        "training property",
        "trak",
    } <= set(names)
    assert [oracle["subsets"] for oracle in entropy["oracle"]] == [6, 8]
    assert entropy["oracle"][0]["ceiling"]["value"] is not None
    assert entropy["removal"]
    assert "ridge, no surrogate" in {row["estimator"] for row in entropy["budget"]}
    assert confidence["fidelity"]
    trak = next(m for m in entropy["methods"] if m["name"] == "trak")
    assert trak["values"] == next(m for m in confidence["methods"] if m["name"] == "trak")["values"]

    (report,) = (folder / "store" / "reports").glob("*/validation.html")
    assert "<svg" in report.read_text()
    assert json.loads((report.parent / "validation.json").read_text()) == found

    again = subprocess.run(command(folder, "--json"), capture_output=True, text=True)
    assert again.stdout == done.stdout
    kept = subprocess.run(
        [sys.executable, "-m", "attr_batch.cli", "gc", str(folder / "store")],
        capture_output=True,
        text=True,
    )
    assert kept.stdout == "", "what a validation made is needed"

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("attr-batch")
    parent = next(
        run
        for run in client.search_runs([experiment.experiment_id])
        if "mlflow.parentRunId" not in run.data.tags
    )
    assert parent.data.metrics["cluster_entropy/lds alpha_0.5"] == pytest.approx(
        entropy["methods"][0]["lds"]["alpha=0.5"]["value"]
    )
    sent = {item.path for item in client.list_artifacts(parent.info.run_id, "validation")}
    assert {"validation/validation.json", "validation/index.html"} <= sent


def test_what_cannot_be_validated_is_said_before_any_work(folder):
    wrong = ["--set", "validation.baselines=[{kind: trak, timesteps: 5000}]"]
    found = subprocess.run(command(folder, *wrong), capture_output=True, text=True)
    assert found.returncode == 64
    assert "validation.baselines.0" in found.stderr
    assert not (folder / "store" / "runs").exists()
