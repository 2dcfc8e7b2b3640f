"""A job that stops early, through the command line: shards, a kill, the same bytes."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, tiny_tree
from test_jobs import finish, report_bytes, run, start, write

pytestmark = pytest.mark.e2e

# Any width will do, so it stops at the first reliable interval: 16 pairs for six contributors.
SIX: dict[str, Any] = {
    "data": {"kind": "digits", "contributors": [str(d) for d in range(6)]},
    "estimator": {
        **TINY["estimator"],
        "budget": 48,
        "holdout": 2,
        "target_half_width": 1e9,
    },
}


def evaluated(store: Path) -> int:
    return len(list(store.glob("runs/*/derivation.json")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    """The attribution.json of one worker that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = write(folder / "job.yaml", tiny_tree(folder / "store", **SIX))
    out, err = run("run", job)
    assert "at most" in err
    assert "topped after 4 of 6 batches" in " ".join(out.split())
    assert evaluated(folder / "store") == 32 + 2 + 2 + 2 * 2 + 3  # not 48 + ...
    _, err = run("run", job)
    assert "to do" not in err
    status, _ = run("status", job)
    assert "reached after 4 of 6" in status
    return report_bytes(folder / "store")


def test_a_shard_killed_within_a_batch_changes_nothing(undisturbed, tmp_path):
    store = tmp_path / "store"
    job = write(tmp_path / "job.yaml", tiny_tree(store, **SIX))
    shards = [start("run", job, "--shard", f"{i}/2") for i in range(2)]
    while evaluated(store) < 14:  # nine belong to no batch
        assert all(shard.poll() is None for shard in shards), [s.communicate() for s in shards]
        time.sleep(0.05)
    shards[1].send_signal(signal.SIGKILL)
    shards[1].communicate(timeout=60)
    finish(shards[0])
    assert report_bytes(store) == undisturbed
    (found,) = json.loads(undisturbed)["attributions"]
    assert found["stopping"]["reached"]
    assert found["coalitions"] == {"planned": 40, "used": 40, "failed": 0}
