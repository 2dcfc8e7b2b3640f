"""A job whose utilities are those of a game, put where the runner would have put them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attr_batch.job import Evaluation, Job

SECONDS = {"finetune": 2.0, "sample": 1.0}


def publish(
    job: Job, evaluations: Iterable[Evaluation], utility: Callable[[Evaluation], float]
) -> None:
    """Put utilities into the ledger, each property the same."""
    ledger = job.ledger
    provenance = {"processor": "p", "torch": "t"}
    for evaluation in evaluations:
        key = evaluation.key
        fact = {"key": key, "recipe": dict(evaluation.recipe), "seconds": SECONDS}
        fact["samples_sha256"] = "0" * 64
        ledger.publish_fact(ledger.derivation_name(key), {**fact, "provenance": provenance})
        for prop in job.spec.properties:
            prop_digest = job.property_digest(prop)
            value = {"value": utility(evaluation), "stderr": 0.0, "seconds": 0.0}
            fact = {"key": key, "property": prop.name, "property_digest": prop_digest, **value}
            ledger.publish_fact(ledger.value_name(key, prop.name, prop_digest), fact)


def prepare(job: Job) -> None:
    """Publish what all share, empty: the game needs none of it."""
    job.write_down()
    for family, thing_id in job.things:
        folder = job.ledger.work(f"{family}/{thing_id}")
        folder.mkdir()
        (folder / "card.json").write_text('{"macs": [2, 1], "parameters": [2, 1]}')
        job.ledger.publish_thing(family, thing_id, folder, {}, 0.0)
