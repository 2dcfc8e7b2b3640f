"""Fixtures that several test modules share: a job small enough to run in seconds."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attr_batch.job import Job
from attr_batch.runner import Laboratory, Worker
from attr_batch.spec import validate
from tests.s3 import BUCKET, SeaweedFS

torch.set_num_threads(1)  # as in a worker process: the bits must not depend on the cores

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"kind": "digits"},
    "model": {
        "kind": "unet",
        "block_out_channels": [8, 16],
        "training": {"steps": 12, "batch": 32, "warmup": 2},
    },
    "pruning": {"kind": "magnitude", "ratio": 0.5, "recovery": {"steps": 6, "batch": 32}},
    "counterfactual": {"kind": "sparsified_finetune", "steps": 3, "batch": 32},
    "sampling": {"steps": 3, "images": 48, "batch": 48},
    "properties": [{"kind": "cluster_entropy"}],
    "estimator": {"kind": "ridge", "budget": 8, "holdout": 4, "endpoint_replicates": 2},
    "tracking": {"enabled": False},
    "resources": {"device": "cpu", "workers": 1},
}


def tiny_tree(store: Path, **sections: Any) -> dict[str, Any]:
    """Return the tiny job's spec as plain values, with whole sections replaced."""
    return {**TINY, "store": str(store), **sections}


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Job]:
    """Return a function that opens the tiny job, with whole sections replaced."""

    def job(**sections: Any) -> Job:
        sections.setdefault("store", str(tmp_path / "store"))
        return Job(validate({**TINY, **sections}))

    return job


@pytest.fixture(autouse=True)
def _no_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests away from the tracking server of whoever runs them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """Run a real S3 server."""
    server = SeaweedFS(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop(signal.SIGKILL)  # its own way takes half a minute


@pytest.fixture
def bucket(s3_server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an empty prefix in a bucket; the environment holds what it takes."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ATTR_BATCH_SCRATCH", str(tmp_path / "scratch"))
    return f"s3://{BUCKET}/{secrets.token_hex(6)}"


def install(folder: Path, *modules: str) -> None:
    """Make modules of a folder on sys.path a distribution's, as pip does: list them in a RECORD."""
    info = folder / "installed-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in modules))


def work_through(job: Job, shard: int = 0, shards: int = 1, session: str = "test") -> None:
    """Do a job's missing work in this process."""
    job.write_down()
    Worker(Laboratory(job), shard, shards, session).work(prepares=True)
