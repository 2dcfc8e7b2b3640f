"""Fixtures that several test modules share: a job small enough to run in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attr_batch.job import Job
from attr_batch.runner import Laboratory, Worker
from attr_batch.spec import validate

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


def work_through(job: Job, shard: int = 0, shards: int = 1, session: str = "test") -> None:
    """Do a job's missing work in this process."""
    job.write_down()
    Worker(Laboratory(job), shard, shards, session).work(prepares=True)
