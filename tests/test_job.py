"""Run keys and plans: what changes a number is in them, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY

from attr_batch import outlook
from attr_batch.coalition import Coalition
from attr_batch.errors import DataError, SpecError
from attr_batch.job import Job, Study
from attr_batch.spec import validate


def keys(job: Job) -> list[str]:
    return [evaluation.key for evaluation in job.plan]


SAME_KEYS = {
    "name": "other",
    "estimator": {**TINY["estimator"], "kind": "paired_ls", "confidence": 0.9},
    "properties": [{"kind": "classifier_confidence"}],
    "endpoints": "paper",
    "resources": {"device": "cpu", "workers": 2},
    "tracking": {"enabled": True, "experiment": "x"},
}
OTHER_KEYS = {
    "seed": 1,
    "counterfactual": {**TINY["counterfactual"], "steps": 4},
    "sampling": {**TINY["sampling"], "images": 64},
    "model": {**TINY["model"], "block_out_channels": [8, 24]},
    "pruning": {**TINY["pruning"], "ratio": 0.25},
}


@pytest.mark.parametrize("section", SAME_KEYS)
def test_what_changes_no_number_is_not_in_the_run_key(tiny, section):
    assert keys(tiny()) == keys(tiny(**{section: SAME_KEYS[section]}))


@pytest.mark.parametrize("section", OTHER_KEYS)
def test_what_changes_numbers_is_in_the_run_key(tiny, section):
    derived = [e.key for e in tiny().plan if e.subject == "derived"]
    other = [e.key for e in tiny(**{section: OTHER_KEYS[section]}).plan if e.subject == "derived"]
    assert not set(derived) & set(other)


def test_a_larger_budget_extends_the_plan(tiny):
    small = tiny()
    large = tiny(estimator={**TINY["estimator"], "budget": 20})
    assert set(keys(small)) < set(keys(large))


def test_native_and_reference_ops_have_keys_of_their_own(tiny, monkeypatch):
    monkeypatch.setenv("ATTR_BATCH_OPS", "reference")
    reference = tiny()
    assert reference.numerics["ops"] == "reference"
    gpu = tiny(resources={"device": "cuda"})
    assert not set(keys(reference)) & set(keys(gpu))


def test_every_recipe_is_distinct_but_for_repeated_coalitions(tiny):
    job = tiny(estimator={**TINY["estimator"], "budget": 40})
    seen = {(e.subject, str(e.entry.coalition), e.entry.replicate) for e in job.plan}
    assert len(set(keys(job))) == len(seen)


def test_another_contributors_data_leave_a_coalitions_members_alone(tiny):
    """A retrained coalition's key depends on its members, whoever else is on the roster."""
    retrain = {"kind": "retrain", "training": {"steps": 3, "batch": 8, "warmup": 0}}
    job, other = tiny(counterfactual=retrain), tiny(counterfactual=retrain)
    contributors = job.card.roster.contributors
    changed = (*contributors[:9], replace(contributors[9], digest="0" * 64))
    other.card = replace(other.card, roster=replace(other.card.roster, contributors=changed))
    without, with_it = Coalition.of([0, 3], 10), Coalition.of([0, 9], 10)
    study = Study("", (), job.spec.counterfactual)
    first, second = (
        [one.run_recipe(coalition, 0, "derived", study) for coalition in (without, with_it)]
        for one in (job, other)
    )
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_seeds_depend_on_the_replicate_alone(tiny):
    recipes = [e.recipe for e in tiny().plan if e.subject == "derived"]
    by_replicate = {}
    for evaluation in tiny().plan:
        if evaluation.subject == "derived":
            by_replicate.setdefault(evaluation.entry.replicate, set()).add(
                evaluation.recipe["seed"]
            )
    assert all(len(seeds) == 1 for seeds in by_replicate.values())
    assert len({recipe["sampling_seed"] for recipe in recipes}) == 1


def test_spec_and_plan_are_written_before_work(tiny):
    job = tiny()
    job.write_down()
    job.write_down()
    fact = job.ledger.fact(job.ledger.spec_name(job.spec_digest))
    assert fact["content"]["data"]["contributors"].keys() == {str(d) for d in range(10)}
    (lines,) = job.ledger.plans().values()
    assert lines[0]["bases"] == [job.dense_id, job.pruned_id]
    assert [line["key"] for line in lines[1:]] == keys(job)


def test_the_stored_spec_holds_no_places_and_no_secrets(tiny):
    job = tiny(tracking={"enabled": True, "uri": "http://user:secret@host/"})
    job.write_down()
    text = job.ledger.store.read(job.ledger.spec_name(job.spec_digest)).decode()
    assert "secret" not in text
    assert str(job.ledger) not in text


def test_only_a_run_makes_a_store(tiny):
    job = tiny()
    job.check()
    assert not job.ledger.store.root.exists()


def test_the_cached_card_is_the_card(tiny):
    tiny().ledger.mark()
    first = tiny().card
    cached = tiny()
    assert cached.card == first
    assert "dataset" not in vars(cached)


def test_a_damaged_cache_is_made_again(tiny):
    first = tiny()
    first.ledger.mark()
    _ = first.card
    (name,) = first.ledger.store.children("work/data")
    path = first.ledger.store.path(f"work/data/{name}")
    for damage in (b'{"roster": 1}', path.read_bytes().replace(b'"0"', b'"Mallory"')):
        path.write_bytes(damage)
        assert tiny().card == first.card


def test_labels_are_needed_by_properties_that_read_them(tiny, tmp_path):
    from PIL import Image

    rows = ["file_name,artist"]
    for i in range(6):
        pixels = np.full((8, 8), 40 * i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'ab'[i % 2]}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    data = {
        "kind": "image_folder",
        "path": str(tmp_path),
        "contributor": "artist",
        "size": 8,
        "channels": 1,
    }
    tiny(data=data, properties=[{"kind": "cluster_entropy", "clusters": 4}]).check()
    with pytest.raises(SpecError, match="label") as caught:
        tiny(data=data, properties=[{"kind": "classifier_confidence"}]).check()
    assert "properties.0" in str(caught.value)
    assert "cluster_entropy" in str(caught.value)


def test_a_pinned_base_must_be_there(tiny):
    job = tiny(model={**TINY["model"], "base": "0" * 64})
    with pytest.raises(DataError, match=r"model\.base"):
        job.check()


def test_reasons_name_the_paths_that_differ(tiny):
    tiny().write_down()
    changed = tiny(counterfactual={**TINY["counterfactual"], "steps": 9})
    found = outlook.reasons(changed)
    assert found["against"].startswith("tiny")
    (difference,) = found["differences"]
    assert (difference["path"], difference["was"], difference["is"]) == (
        "counterfactual.steps",
        3,
        9,
    )
    assert difference["makes_new"] == ["the coalitions' models"]
    assert "counterfactual.steps: 3 -> 9" in "\n".join(outlook.reasons_text(found))


def test_reasons_choose_the_nearest_spec(tiny):
    tiny(seed=5, sampling={**TINY["sampling"], "steps": 4}).write_down()
    tiny(seed=5).write_down()
    assert [d["path"] for d in outlook.reasons(tiny())["differences"]] == ["seed"]


def test_plan_before_any_work(tiny):
    facts = outlook.plan(tiny())
    assert (
        facts["evaluations"]["new"] == facts["evaluations"]["planned"] == len(facts["coalitions"])
    )
    assert json.loads(json.dumps(facts)) == facts
    assert "no earlier job" in outlook.plan_text(facts)


def test_a_spec_of_one_contributor_is_refused(tiny):
    with pytest.raises((SpecError, DataError)):
        tiny(data={"kind": "digits", "contributors": ["3"]}).check()


def test_validate_reports_the_whole_tree():
    with pytest.raises(SpecError, match="missing"):
        validate({})


def test_a_batch_holds_its_pairs_and_its_repeats_and_the_first_all_else(tiny):
    estimator = {**TINY["estimator"], "budget": 80, "repeats": 0.25, "target_half_width": 0.1}
    job = tiny(estimator=estimator)
    batches = job.batches
    assert sorted(map(id, job.plan)) == sorted(id(e) for batch in batches for e in batch)
    assert len(batches) == 8  # of five pairs each
    for number, batch in enumerate(batches):
        entries = [e.entry for e in batch]
        pairs = [e.index // 2 for e in entries if e.sequence == "design"]
        assert pairs == [5 * number + k // 2 for k in range(10)]
        repeats = [e for e in entries if e.sequence == "repeat"]
        # one pair in four is repeated: the k-th with the 4 k-th pair, its own measured by then
        expected = [k for k in range(10) if 4 * k // 5 == number]
        assert [e.index // 2 for e in repeats] == [k for k in expected for _ in range(2)]
        assert {e.batch for e in repeats} <= {number}
        rest = {e.sequence for e in entries} - {"design", "repeat"}
        assert rest == (set() if number else {"endpoint", "holdout", "reference"})


def test_without_a_target_the_plan_is_one_batch(tiny):
    job = tiny(estimator={**TINY["estimator"], "budget": 80})
    assert job.batches == (job.plan,)
