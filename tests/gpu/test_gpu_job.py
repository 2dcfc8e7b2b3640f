"""A whole job on a GPU, by the command line: what the runner does there, alone and in cohorts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from on_device import CUDA, DEVICE, need_device

pytest.importorskip("torch_pruning")
image = pytest.importorskip("PIL.Image")
yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.gpu
need_device()

ROOT = Path(__file__).resolve().parents[2]
SIZE = 8


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job of four contributors; everyone draws squares of a place and colour of their own."""
    folder = tmp_path_factory.mktemp("job")
    lines, rng = ["file_name,artist,style"], np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(96):
        artist, pixels = i % 4, rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
        y, x = 4 * (artist // 2), 4 * (artist % 2)
        pixels[y : y + 4, x : x + 4, artist % 3] += 190
        image.fromarray(pixels).save(folder / f"images/{i}.png")
        lines.append(f"{i}.png,{artist},{artist}")
    (folder / "images/metadata.csv").write_text("\n".join(lines) + "\n")
    spec = {
        "name": "on a device",
        "data": {
            "kind": "image_folder",
            "path": "images",
            "contributor": "artist",
            "label": "style",
            "size": SIZE,
            "channels": 3,
        },
        "model": {
            "kind": "unet",
            "block_out_channels": [16, 32],
            "training": {"steps": 150, "batch": 16, "learning_rate": 2e-3},
        },
        "pruning": {
            "kind": "magnitude",
            "ratio": 0.5,
            "recovery": {"steps": 100, "batch": 16, "learning_rate": 2e-3},
        },
        "counterfactual": {
            "kind": "sparsified_finetune",
            "steps": 25,
            "batch": 16,
            "learning_rate": 2e-3,
        },
        "sampling": {"steps": 6, "images": 64, "batch": 48},
        "properties": [{"kind": "class_share", "label": "0"}],
        "estimator": {"kind": "exact"},
        "tracking": {"enabled": False},
        "resources": {"device": DEVICE.partition(":")[0], "workers": 1},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    return folder


def run(job, *words):
    """Return the attribution of a run, which must end with 0."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    command = [sys.executable, "-m", "attr_batch.cli", "run", "job.yaml", "--json", *words]
    done = subprocess.run(command, cwd=job, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = json.loads(done.stdout)["attributions"]
    assert found["coalitions"]["failed"] == 0
    return found


def test_a_job_runs_and_cohorts_give_its_values(job):
    """Whose squares count comes first; rounding moves few images from one label to another."""
    alone = run(job, "--set", "store=alone")
    cohorts = run(job, "--set", "store=cohorts", "--set", "resources.cohort=3")
    assert (alone["numerics"]["cohort"], cohorts["numerics"]["cohort"]) == (1, 3)
    assert alone["numerics"]["device"] == ("cuda" if CUDA else "cpu")
    first, *others = (c["value"] for c in alone["contributors"])
    assert first > 0.1 > max(others)
    for key in ("v_empty", "v_full"):
        assert cohorts[key] == pytest.approx(alone[key], abs=0.05)
    for one, other in zip(alone["contributors"], cohorts["contributors"], strict=True):
        assert other["value"] == pytest.approx(one["value"], abs=0.05)
