"""The pilot against simulated evaluations whose variances are known."""

import json

import numpy as np
import pytest

from attr_batch import cli
from attr_batch.errors import SpecError
from attr_batch.pilot import BLOCKS, COALITIONS, _advise, pilot, pilot_text

IMAGES = 512


def simulate(a, shared, own, coalitions=600, seed=0):
    """Values with training variance a and, per image, sampling variances shared and own."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, shared**0.5, IMAGES)
    runs = []
    for _ in range(coalitions):
        mean, pair = rng.normal(0, 1), []
        for _ in range(2):
            image = mean + rng.normal(0, a**0.5) + common + rng.normal(0, own**0.5, IMAGES)
            values = [image.mean(), *(part.mean() for part in np.array_split(image, BLOCKS))]
            pair.append({"values": {"p": values}})
        runs.append(pair)
    return runs


@pytest.mark.parametrize(("a", "shared", "own"), [(0.01, 0, 4), (0.001, 6, 1), (0.1, 3, 30)])
def test_it_finds_the_variances_and_the_best_number(a, shared, own):
    t, u = 3.0, 0.02
    found = _advise("p", simulate(a, shared, own), IMAGES, t, u)
    assert found["sd_of_training"] ** 2 == pytest.approx(a, rel=0.25)
    assert found["sd_of_sampling"] ** 2 == pytest.approx(own / IMAGES, rel=0.1)
    # The shared noise is one draw for all coalitions: eight blocks say little about its size.
    assert found["common_noise_saves"] == pytest.approx(1 + shared / own, rel=0.6)
    n = np.arange(16, 100_000, 16)
    cost = (a + own / n) * (t + n * u)
    best = int(n[cost.argmin()])
    assert found["recommended"] == pytest.approx(best, rel=0.2, abs=16)
    now = (a + own / IMAGES) * (t + IMAGES * u)
    assert found["time_for_equal_error"] == pytest.approx(cost.min() / now, rel=0.1)


def test_without_any_noise_it_keeps_to_the_fewest():
    found = _advise("p", simulate(0, 0, 0, coalitions=6), IMAGES, 1.0, 0.1)
    assert found["recommended"] > 0
    assert found["time_for_equal_error"] is None


def test_it_runs_on_a_job_and_leaves_no_evaluations(tiny):
    job = tiny(sampling={"steps": 2, "images": 64, "batch": 64})
    found = pilot(job)
    assert found["coalitions"] == COALITIONS
    assert found["recommended"] == found["properties"][0]["recommended"] >= 16
    assert found["seconds"]["finetune"] > 0
    assert "sampling.images:" in pilot_text(found)
    assert not any(job.done(e) for e in job.plan)
    json.dumps(found, allow_nan=False)


def test_it_refuses_what_it_cannot_judge(tiny):
    with pytest.raises(SpecError, match="too few for a pilot"):
        pilot(tiny(sampling={"steps": 2, "images": 32}))
    estimator = {"kind": "ridge", "budget": 2, "holdout": 0}
    with pytest.raises(SpecError, match="the plan has 4 coalitions"):
        pilot(tiny(estimator=estimator, sampling={"steps": 2, "images": 64}))


def test_the_command_prints_it(tiny, monkeypatch, capsys):
    monkeypatch.setattr("attr_batch.cli._open", lambda _: tiny())
    monkeypatch.setattr("attr_batch.pilot.pilot", lambda _: {"images": 64})
    assert cli.main(["pilot", "job.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"images": 64}
