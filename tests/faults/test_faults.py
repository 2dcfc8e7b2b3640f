"""The cheapest telling faults, as CI runs them; `python -m tests.faults` runs them all."""

from __future__ import annotations

import pytest

from .bench import Bench, play
from .disks import disk_full, found_by_repair
from .kills import kill_group

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), quick=True, mirrored=False)


@pytest.mark.parametrize("scenario", [kill_group, found_by_repair, disk_full])
def test_a_job_ends_as_if_nothing_had_happened(bench, scenario):
    (row,) = play(bench, {scenario.__name__: scenario})
    if row.not_here:
        pytest.skip(row.not_here)
    assert row.missed is None, row.missed
    assert row.hits, "there was no fault"
