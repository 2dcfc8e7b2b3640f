"""A validation of a game whose values are known: what it must say of each method."""

from __future__ import annotations

import json
import os
from typing import Any

import games
import numpy as np
import played
import pytest
from conftest import TINY
from scipy.stats import spearmanr

from attr_batch import outlook
from attr_batch.errors import SpecError
from attr_batch.estimators import Exact, PairedLS
from attr_batch.job import Evaluation, Job
from attr_batch.scoring import Readings, methods, names, ranks, score, to_bytes
from attr_batch.spec import validate
from attr_batch.studies import Studies
from attr_batch.validation_report import figures, page, table

N = 8
GAME = games.linear(N, 1)
SECTIONS = {
    "data": {"kind": "digits", "contributors": [str(d) for d in range(N)]},
    # never called
    "properties": [{"kind": "call", "target": "attr_batch.recipe:digest", "name": "game"}],
    "estimator": {"kind": "ridge", "budget": 40, "holdout": 4, "endpoint_replicates": 2},
    "validation": {
        "subsets": [
            {"alpha": 0.5, "count": 40, "seeds": 2},
            {"alpha": 0.25, "count": 10, "seeds": 1},
        ],
        "reference": 40,
        "designs": 2,
        "counterfactuals": [{"kind": "finetune", "steps": 7}],
        "baselines": [{"kind": "image_count"}],
        "steps": {"coalitions": 12, "steps": [2, 3], "ema": ["restarted", "raw"]},
    },
}


def utility(evaluation: Evaluation) -> float:
    """v(S), exact when retrained; the job's own way to it is noisier with fewer steps."""
    v = float(GAME.v([evaluation.entry.coalition.mask])[0])
    study = evaluation.study
    if study.streams:  # retrained
        noise = 0.02
    else:
        noise = {2: 0.6, 3: 0.1, 7: 0.05}[study.counterfactual.recipe()["steps"]]
    rng = np.random.default_rng(int(evaluation.key[:12], 16))
    return v + noise * GAME.sd() * rng.normal()


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> Readings:
    """A finished validation; who changes nothing may share it."""
    store = tmp_path_factory.mktemp("validation") / "store"
    job = Job(validate({**TINY, **SECTIONS, "store": str(store)}))
    studies = Studies.of(job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # a thousand small files
        played.prepare(job)
        played.publish(job, job.plan, utility)
        for study in studies:
            played.publish(job, job.evaluations(study), utility)
        scores = {"game": {"image count": {"scores": [1.0] * N, "seconds": 0.5}}}
        found = Readings(job, studies, baselines=scores)
        found.removal = studies.removal(ranks(found))
        played.publish(job, job.evaluations(found.removal), utility)
    return found


@pytest.fixture(scope="module")
def found(readings: Readings) -> Any:
    """What the finished validation says of its property."""
    validation = score(readings)
    assert validation["complete"]
    (found,) = validation["properties"]
    return found


def test_a_validation_of_an_additive_game_says_what_is_true_of_it(readings, found):
    at_half, at_quarter, mixed = found["oracle"]
    assert (at_half["size"], at_quarter["size"], mixed["size"]) == (4, 2, None)
    assert at_half["ceiling"]["value"] > 0.98
    assert at_half["additivity"]["value"] > 0.97
    assert at_half["floor"] == 0
    by_name = {method["name"]: method for method in found["methods"]}
    own = by_name["ridge"]
    assert found["methods"][0] is own
    assert np.allclose(np.mean(own["by_design"], axis=0), own["values"])
    Z, v = (getattr(readings.oracles(readings.job.spec.properties[0])[0], at) for at in "Zv")
    scores = [spearmanr(Z @ values, row).statistic for values in own["by_design"] for row in v]
    assert own["lds"]["alpha=0.5"]["value"] == pytest.approx(np.mean(scores))
    assert own["lds"]["alpha=0.5"]["value"] > 0.95
    assert own["agreement"]["value"] > 0.95
    assert np.allclose(own["values"], GAME.shapley(), atol=0.3 * np.abs(GAME.shapley()).max())
    assert found["reference_reliability"] > 0.95
    assert np.allclose(found["reference"], GAME.shapley(), atol=0.1)
    # In an additive game everyone adds the same to everyone: these know all there is to know.
    assert by_name["leave_one_out"]["lds"]["alpha=0.5"]["value"] > 0.8
    assert by_name["alone"]["lds"]["alpha=0.5"]["value"] > 0.8
    assert by_name["image count"]["lds"]["alpha=0.5"]["value"] == 0
    lead = by_name["image count"]["lead"]["alpha=0.5"]
    assert lead["value"] == own["lds"]["alpha=0.5"]["value"]
    assert 0 < lead["low"] <= lead["value"] <= lead["high"]


def test_the_mixed_set_is_of_pairs(readings):
    mixed = readings.oracles(readings.job.spec.properties[0])[-1]
    assert len(mixed.Z) == 40
    assert len(set(mixed.unit)) == 20
    for unit in mixed.unit:
        assert (mixed.Z[mixed.unit == unit].sum(axis=0) == 1).all()


def test_an_estimator_that_lacks_coalitions_has_no_reading(readings):
    prop, (design, *_) = readings.job.spec.properties[0], readings.studies.designs
    assert readings.attribution(Exact(), design, prop) is None
    assert readings.attribution(PairedLS(), design, prop) is not None


def test_evaluations_and_seconds_are_those_of_the_design(readings, found):
    by_name = {method["name"]: method for method in found["methods"]}
    entries = [e for e in readings.studies.designs[0].entries if e.role != "holdout"]
    distinct = {(e.coalition.mask, e.replicate) for e in entries}
    assert by_name["ridge"]["evaluations"] == len(distinct)
    assert by_name["ridge"]["seconds"] == 3.0 * len(distinct)
    assert by_name["leave_one_out"]["evaluations"] == N + 1
    assert by_name["ridge"]["designs"] == 2


def test_fidelity_rises_with_the_steps(found):
    by_steps = {
        (row["counterfactual"], row["steps"], row["ema"]): row["pearson"]["value"]
        for row in found["fidelity"]
    }
    assert set(by_steps) == {
        ("sparsified_finetune", 2, "restarted"),
        ("sparsified_finetune", 3, "restarted"),
        ("sparsified_finetune", 2, "raw"),
        ("sparsified_finetune", 3, "raw"),
        ("finetune", 7, "restarted"),
    }
    kind = "sparsified_finetune"
    assert by_steps[kind, 2, "restarted"] < by_steps[kind, 3, "restarted"] > 0.95


def test_more_coalitions_buy_a_better_score(found):
    own = [
        row
        for row in found["budget"]
        if row["estimator"] == "ridge" and row["counterfactual"].startswith("sparsified")
    ]
    curve = [row for row in own if row["counterfactual"] == own[0]["counterfactual"]]
    assert [row["evaluations"] for row in curve] == [8, 12, 16, 24, 32]
    assert curve[-1]["lds"] > curve[0]["lds"]
    assert [row["seconds"] for row in curve] == sorted(row["seconds"] for row in curve)


def test_removing_the_first_ranked_takes_away_what_they_are_worth(found):
    removed = [r for r in found["removal"] if r["method"] == "ridge" and not r["keeps"]]
    best = np.sort(GAME.shapley())[::-1]
    for row in removed:
        lost = best[: row["contributors"]].sum()
        assert row["value"] == pytest.approx(found["v_full"] - lost, abs=0.3)
    kept = [r for r in found["removal"] if r["method"] == "ridge" and r["keeps"]]
    assert [r["contributors"] for r in kept] == [7, 7, 6, 5, 4]


def test_an_unfinished_validation_reports_what_there_is(tiny):
    job = tiny(**SECTIONS)
    studies = Studies.of(job)
    played.prepare(job)
    played.publish(job, job.plan, utility)
    nothing = score(Readings(job, studies))
    assert not nothing["complete"]
    assert nothing["done"] < nothing["planned"]
    some = list(job.evaluations(studies.oracle))[:25]
    played.publish(job, some, utility)
    (found,) = score(Readings(job, studies))["properties"]
    assert found["oracle"][0]["subsets"] == 25
    assert found["oracle"][0]["ceiling"]["value"] is None
    assert found["methods"][0]["designs"] == 1
    for validation in (nothing, score(Readings(job, studies))):
        assert page(validation)
        assert table(validation)
        assert all(svg.startswith("<svg") for svg in figures(validation).values())


def test_status_counts_the_validation(readings, tiny):
    counts = outlook.status(readings.job)["validation"]
    assert counts["done"] == counts["planned"] > 100
    assert f"{counts['planned']} of {counts['planned']} done (attr-batch validate)" in (
        outlook.status_text(outlook.status(readings.job))
    )
    assert outlook.status(tiny())["validation"] is None


def test_the_same_facts_give_the_same_bytes(readings):
    again = Readings(Job(readings.job.spec), readings.studies, readings.removal, readings.baselines)
    assert to_bytes(score(readings)) == to_bytes(score(again))
    assert json.loads(to_bytes(score(again)))["job"] == "tiny"


def test_retraining_shares_no_noise_with_the_job_nor_between_its_studies(tiny):
    job = tiny(**SECTIONS)
    studies = Studies.of(job)
    oracle = list(job.evaluations(studies.oracle))
    first, second = oracle[0], oracle[40]
    assert first.entry.coalition == second.entry.coalition
    reference = next(job.evaluations(studies.reference))
    left_out = next(job.evaluations(studies.left_out_retrained))
    for name in ("seed", "sampling_seed"):
        seeds = [e.recipe[name] for e in (first, second, reference, left_out, job.plan[0])]
        assert len(set(seeds)) == len(seeds)


def test_the_reference_chooses_its_own_coalitions(tiny):
    """The choice of coalitions is a noise; shared, it would pass for agreement."""
    job = tiny(**{**SECTIONS, "validation": {**SECTIONS["validation"], "reference": 40}})
    studies = Studies.of(job)

    def chosen(study):
        return {e.coalition.mask for e in study.entries if e.role == "design"}

    for design in studies.designs:
        assert len(chosen(design) & chosen(studies.reference)) < 30


def test_what_is_fitted_to_the_retrainings_is_not_scored_on_them(found):
    by_name = {method["name"]: method for method in found["methods"]}
    assert "mixed" in by_name["ridge"]["lds"]
    assert set(by_name["retrain, ridge"]["lds"]) == {"alpha=0.5", "alpha=0.25"}
    assert set(by_name["retrain, ridge"]["lead"]) == {"alpha=0.5", "alpha=0.25"}


def test_a_validation_changes_nothing_of_the_job(tiny):
    plain, validated = tiny(), tiny(validation=SECTIONS["validation"])
    assert plain.spec_digest == validated.spec_digest
    assert [e.key for e in plain.plan] == [e.key for e in validated.plan]
    wider = Job(validated.spec, list(Studies.of(validated)))
    assert [e.key for e in wider.plan] == [e.key for e in plain.plan]


def test_no_two_methods_or_studies_are_called_the_same(tiny):
    ascents = [{"kind": "gradient_ascent", "learning_rate": rate} for rate in (1e-5, 1e-3)]
    twins = [{"kind": "finetune", "steps": 7}, {"kind": "finetune", "steps": 7, "batch": 16}]
    traks = [{"kind": "trak", "timesteps": t} for t in (1, 2)]
    section = {
        **SECTIONS["validation"],
        "counterfactuals": [*ascents, *twins, {"kind": "retrain", "ema": "restarted"}],
        "baselines": [*traks, {"kind": "pixel_similarity"}],
    }
    job = tiny(**{**SECTIONS, "validation": section})
    studies = Studies.of(job)
    studied = [study.name for study in studies]
    assert len(studied) == len(set(studied))
    called = names(Readings(job, studies))
    assert len(called) == len(set(called))
    assert "gradient ascent, 20 steps, learning_rate 0.001, ridge" in called
    assert "finetune, 7 steps, batch 16, ridge" in called
    assert "trak, timesteps 2" in called
    assert "pixel similarity" in called


def test_steps_take_only_the_weights_that_a_kind_has(tiny):
    lora = {"kind": "lora", "steps": 2, "batch": 16}
    section = {**SECTIONS["validation"], "steps": {"coalitions": 5, "steps": [3]}}
    job = tiny(**{**SECTIONS, "counterfactual": lora, "validation": section})
    emas = [study.counterfactual.recipe()["ema"] for study in Studies.of(job).steps]
    assert emas == ["restarted", "raw"]


def test_ranks_may_be_those_of_a_baseline_and_a_wrong_name_is_said(readings):
    section = readings.job.spec.validation
    for chosen in (("estimator", "image count"), ("estimator", "image_count")):
        removal = section.removal.model_copy(update={"methods": chosen})
        spec = readings.job.spec.model_copy(
            update={"validation": section.model_copy(update={"removal": removal})}
        )
        asked = Readings(Job(spec), readings.studies, None, readings.baselines)
        if chosen[1] == "image count":
            assert set(ranks(asked)) == {"ridge", "image count"}
            continue
        with pytest.raises(SpecError, match="no method 'image_count'"):
            ranks(asked)


def test_published_endpoints_are_those_of_the_job(tiny):
    job = tiny(**{**SECTIONS, "endpoints": "paper"})
    played.prepare(job)

    def moved(evaluation: Evaluation) -> float:
        return 100.0 if evaluation.subject == "trained" else utility(evaluation)

    played.publish(job, job.plan, moved)
    readings = Readings(job, Studies.of(job))
    (headline, *_) = methods(readings, job.spec.properties[0])
    from attr_batch.facts import Facts

    published = Facts(job).estimate(job.spec.properties[0])
    assert headline.values[0].tolist() == list(published.values)
