"""What `plan` and `status` say: how far a job is, what it can reuse, what makes the rest new.

Everything is derived from the files of the ledger at the moment of asking; nothing is stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

from attr_batch.errors import AttrBatchError, LedgerConflict
from attr_batch.estimators import Attribution
from attr_batch.estimators.attribution import PAIRS_PER_CONTRIBUTOR
from attr_batch.facts import Facts
from attr_batch.job import Evaluation, Job, numerics_text
from attr_batch.ledger import DERIVATION, SAMPLES, Files
from attr_batch.predecessor import Predecessor
from attr_batch.spec import validate
from attr_batch.studies import Studies

MODELS, INSTRUMENTS = "the coalitions' models", "fitted instruments"
# Which sections of the resolved spec each kind of thing depends on.
_MODEL = ("recipe_version", "numerics", "seed", "data", "model")
DEPENDS = {
    "the trained model": _MODEL,
    "the pruned model": (*_MODEL, "pruning"),
    INSTRUMENTS: ("recipe_version", "numerics", "seed", "data", "properties"),
    MODELS: (*_MODEL, "pruning", "counterfactual", "sampling"),
    "which coalitions": ("data", "estimator"),
    "the values": ("properties",),
}
NOTHING_NEW = "how results are read; nothing is evaluated anew"


def status(job: Job) -> dict[str, Any]:
    """Return counts by state, what runs now, what failed, seconds spent and expected."""
    facts = Facts(job)
    beats, failed = set(job.ledger.heartbeats()), job.ledger.failed()
    files = job.survey(planned for planned, _ in facts.rows)

    def state(planned: Evaluation) -> str:
        if job.done(planned, files):
            return "done"
        if planned.key in beats and job.ledger.heartbeat(planned.key) is not None:
            return "running"
        return "failed" if planned.key in failed else "waiting"

    rows = [(planned, state(planned)) for planned, _ in facts.rows]
    counts: dict[str, int] = dict.fromkeys(("done", "running", "failed", "waiting"), 0)
    for _, name in rows:
        counts[name] += 1
    left = sum(counts[name] for name in ("running", "failed", "waiting"))
    per_evaluation = facts.seconds_per_evaluation
    return {
        "name": job.spec.name,
        "spec_digest": job.spec_digest,
        "store": str(job.ledger),
        "numerics": job.numerics,
        "other_numerics": _other_numerics(job),
        "bases": {
            "trained": _thing(job, "bases", job.dense_id),
            "pruned": _thing(job, "bases", job.pruned_id),
        },
        "fitted": {
            prop.name: _thing(job, "properties", thing_id)
            for prop in job.spec.properties
            if (thing_id := job.instrument_id(prop))
        },
        "evaluations": {"planned": len(rows), **counts},
        "validation": _validation(job),
        "stopping": _stopping(facts),
        "running": list(_running(job)),
        "failed": [_failure(job, e) for e, name in rows if name == "failed"],
        "seconds_spent": sum(facts.seconds_spent().values()),
        "seconds_per_evaluation": per_evaluation,
        "seconds_expected": None if per_evaluation is None else left * per_evaluation / job.workers,
    }


def _other_numerics(job: Job) -> list[dict[str, Any]]:
    with contextlib.suppress(LedgerConflict):  # a damaged plan is for others to refuse
        return job.other_numerics()
    return []


def _validation(job: Job) -> dict[str, int] | None:
    """Count what `validate` evaluates beside the plan; None where the spec does not speak of it."""
    if "validation" not in job.spec.model_fields_set:
        return None
    beside = {e.key: e for study in Studies.of(job) for e in job.evaluations(study)}
    files = job.survey(beside.values())
    return {"planned": len(beside), "done": sum(job.done(e, files) for e in beside.values())}


def _stopping(facts: Facts) -> dict[str, Any] | None:
    return None if facts.stopping is None else facts.stopping.to_json()


def _running(job: Job) -> Iterator[dict[str, Any]]:
    names = {job.dense_id, job.pruned_id, *job.instruments, *(e.key for e in job.plan)}
    for name in job.ledger.heartbeats():
        beat = job.ledger.heartbeat(name) if name in names else None
        if beat is not None:
            yield {
                "what": beat.phase,
                "done": beat.done,
                "total": beat.total,
                "host": beat.host,
                "pid": beat.pid,
            }


def _failure(job: Job, evaluation: Evaluation) -> dict[str, Any]:
    failure = job.ledger.failure(evaluation.key) or {}
    return {"what": evaluation.title, "key": evaluation.key, "message": failure.get("message")}


def _thing(job: Job, family: str, thing_id: str) -> dict[str, Any]:
    return {"id": thing_id, "made": job.ledger.has_thing(family, thing_id)}


# -- what is new, and why -------------------------------------------------------------------------


def plan(job: Job) -> dict[str, Any]:
    """Return what a run would do, what is reused, and which paths of the spec made the rest new.

    With a target that is not reached yet this is the whole budget: what a run does at most.
    """
    facts = Facts(job)
    over = facts.stopping is not None and facts.stopping.reached
    planned = [planned for planned, _ in facts.rows] if over else job.plan
    files = job.survey(planned)
    done = {e.key: job.done(e, files) for e in planned}
    found = _counted(job, planned, files)
    things = {
        "trained model": job.ledger.has_thing("bases", job.dense_id),
        "pruned model": job.ledger.has_thing("bases", job.pruned_id),
        **{
            type(instrument).__name__: job.ledger.has_thing("properties", thing_id)
            for thing_id, instrument in job.instruments.items()
        },
    }
    per_evaluation = facts.seconds_per_evaluation
    new = found["new"]
    return {
        "name": job.spec.name,
        "spec_digest": job.spec_digest,
        "coalitions": [
            {
                "sequence": e.entry.sequence,
                "index": e.entry.index,
                "coalition": str(e.entry.coalition),
                "role": e.entry.role,
                "replicate": e.entry.replicate,
                "done": done[e.key],
                "key": e.key,
            }
            for e in planned
        ],
        "evaluations": found,
        "things": things,
        "continues": continued(job),
        "new_because": reasons(job) if not (all(done.values()) and all(things.values())) else None,
        "seconds_per_evaluation": per_evaluation,
        "seconds_expected": None if per_evaluation is None else new * per_evaluation / job.workers,
        "bytes_expected": new * _bytes_per_evaluation(job),
        "stopping": _stopping(facts),
        "half_width": _predicted_half_width(facts),
    }


def _counted(job: Job, planned: Sequence[Evaluation], files: Files) -> dict[str, int]:
    """Return how many of these evaluations are there, have their samples at least, or are new."""
    missing = [e for e in planned if not job.done(e, files)]
    kept = sum(SAMPLES in files(job.settled(e, files).key) for e in missing)
    return {
        "planned": len(planned),
        "reused": len(planned) - len(missing),
        "only measured": kept,
        "new": len(missing) - kept,
    }


def continued(job: Job) -> dict[str, Any] | None:
    """Return what the job that `estimator.continues` names gives to this one, and what not."""
    before = job.predecessor
    if before is None:
        return None
    known, ledger = set(before.known), job.ledger
    files = ledger.survey(before.planned.values())
    measured = (DERIVATION in files(key) for key in before.planned.values())
    return {
        "spec": before.spec,
        "name": before.name,
        "contributors": {"then": before.contributors, "unchanged": before.shared.size},
        "coalitions": {
            "planned": len(before.planned),
            "measured": sum(measured),
            "valid": len(known),
            "in this design": sum(
                e.entry.coalition in known and not e.entry.replicate
                for e in job.plan
                if e.entry.role == "design"
            ),
        },
        "new_because": _why_new(job, before),
    }


def _why_new(job: Job, before: Predecessor) -> str | None:
    """Return which path of the spec makes all runs of the earlier job useless; None for none."""
    counterfactual = job.spec.counterfactual
    if counterfactual.unlearns:
        return "counterfactual.kind: its models depend on who is left out as well"
    if counterfactual.start == "fresh" or job.dense_id == before.trained:
        return None
    return f"model.base, which would have to be {before.trained}: runs depend on the trained model"


def _bytes_per_evaluation(job: Job) -> int:
    """Return about how many bytes an evaluation adds to the store."""
    card, sampling = job.card, job.spec.sampling
    pixels = card.channels * card.size**2
    samples = sampling.images * pixels if sampling.keep == "all" else 0
    grid = 0 if sampling.keep == "none" else 64 * pixels
    return samples + grid + 4096 * (1 + len(job.spec.properties))


def _predicted_half_width(facts: Facts) -> dict[str, Any] | None:
    """Predict the headline's mean half-width at the budget, and the budget for the target.

    From what has values so far; None while that has no interval.
    """
    job, headline = facts.job, facts.job.spec.properties[0]
    try:
        found = facts.estimate(headline)
    except AttrBatchError:
        return None
    if found.half_width is None:
        return None
    return {
        "property": headline.name,
        "now": found.half_width,
        "reliable": found.interval.reliable,
        "at_budget": found.half_width_at(_planned_pairs(job)),
        "target": job.target,
        "budget_for_target": _budget_for_target(job, found),
    }


def _budget_for_target(job: Job, found: Attribution) -> int | None:
    pairs = None if job.target is None else found.pairs_for(job.target)
    if pairs is None:
        return None
    reliable, every = ceil(PAIRS_PER_CONTRIBUTOR * found.n), (1 << found.n) - 2
    return min(2 * max(pairs, reliable), every)


def _planned_pairs(job: Job) -> int:
    design = {e.entry.coalition for e in job.plan if e.entry.role == "design"}
    return sum(coalition.complement() in design for coalition in design) // 2


def reasons(job: Job) -> dict[str, Any]:
    """Compare with the nearest earlier spec in the store: which paths differ, what that makes.

    `pins`: what, set in the spec, would keep what other data make new; None where nothing would.
    """
    mine = flat({**job.content, "numerics": job.numerics})
    best: tuple[dict[str, Any], str, list[dict[str, Any]]] | None = None
    for head in _earlier(job):
        fact = job.ledger.fact(job.ledger.spec_name(head["spec"])) or {}
        theirs = flat({**fact["content"], "numerics": head["numerics"]})
        paths = [p for p in sorted({*theirs, *mine}) if theirs.get(p) != mine.get(p)]
        if best is None or len(paths) < len(best[2]):
            same = _same_things(job, head)
            differences = [
                {
                    "path": path,
                    "was": theirs.get(path),
                    "is": mine.get(path),
                    "makes_new": _makes_new(path, same),
                }
                for path in paths
            ]
            best = (head, f"{fact['name']} ({head['spec'][:12]})", differences)
    if best is None:
        return {"against": None, "differences": [], "pins": None}
    head, against, differences = best
    pins = _pins(job, head, [d["path"] for d in differences])
    return {"against": against, "differences": differences, "pins": pins}


def _earlier(job: Job) -> Iterator[dict[str, Any]]:
    for lines in job.ledger.plans().values():
        if lines and job.ledger.store.exists(job.ledger.spec_name(lines[0]["spec"])):
            yield lines[0]


def _same_things(job: Job, head: dict[str, Any]) -> list[str]:
    """Return what is that of the earlier job although data may differ: it is pinned."""
    names = ("the trained model", "the pruned model")
    ours = (job.dense_id, job.pruned_id)
    same = [name for name, a, b in zip(names, head["bases"], ours, strict=False) if a == b]
    return [*same, INSTRUMENTS] if job.instruments.keys() <= {*head["properties"]} else same


def _is_pin(path: str) -> bool:
    return path == "model.base" or (path.startswith("properties.") and path.endswith(".fitted"))


def _makes_new(path: str, same: Sequence[str]) -> list[str]:
    if _is_pin(path) and path != "model.base" and INSTRUMENTS in same:
        return []
    found = [what for what, on in DEPENDS.items() if path.split(".")[0] in on and what not in same]
    if "the pruned model" in same and MODELS in found:  # a run depends on its members only
        at = found.index(MODELS)
        if path == "model.base":
            del found[at]
        elif path.startswith("data."):
            found[at] += " with these images"
    return found


def _pins(job: Job, head: dict[str, Any], differing: Sequence[str]) -> dict[str, Any] | None:
    """Return {path: value} that would keep what other data make new, and how much it keeps.

    None where the data are the same, and where the models are new for another reason as well.
    """
    paths = {path for path in differing if path.split(".")[0] in _MODEL} - {"model.base"}
    if not paths or not all(path.startswith("data.") for path in paths):
        return None
    settings: dict[str, str] = {}
    if head["bases"][0] != job.dense_id:
        settings["model.base"] = head["bases"][0]
    fitted = {thing_id: _fitted_as(job, thing_id) for thing_id in head["properties"]}
    for i, prop in enumerate(job.spec.properties):
        instrument = prop.instrument()
        for thing_id, recipe in fitted.items():
            same = instrument is not None and recipe == instrument.recipe()
            if same and thing_id != job.instrument_id(prop):
                settings[f"properties.{i}.fitted"] = thing_id
    now, best = _counted(job, job.plan, job.survey(job.plan)), None
    for more in ({}, {"estimator.continues": head["spec"]}):
        with contextlib.suppress(AttrBatchError):  # it does not fit, or is damaged
            other = _with(job, {**settings, **more})
            then = _counted(other, other.plan, other.survey(other.plan))
            if (then["new"], then["only measured"]) < (now["new"], now["only measured"]):
                now, best = then, {"set": {**settings, **more}, "evaluations": then}
    return best


def _fitted_as(job: Job, thing_id: str) -> dict[str, Any] | None:
    """Return the recipe of a fitted instrument; None if it is not one, not there or damaged."""
    with contextlib.suppress(LedgerConflict):
        manifest = job.ledger.fact(f"properties/{thing_id}/manifest.json")
        return None if manifest is None else manifest["inputs"].get("instrument")
    return None


def _with(job: Job, settings: Mapping[str, str]) -> Job:
    """Return the job with these paths of its spec set, checked."""
    tree = job.spec.model_dump(mode="json", exclude_unset=True)
    for path, value in settings.items():
        *way, last = path.split(".")
        node: Any = tree
        for key in way:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[last] = value
    other = Job(validate(tree))
    other.card = job.card
    other.check()
    return other


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Return {dotted path: leaf} of nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    leaves: dict[str, Any] = {}
    for key, value in items:
        at = f"{path}.{key}" if path else str(key)
        leaves |= flat(value, at) if isinstance(value, dict | list) and value else {at: value}
    return leaves


# -- as text --------------------------------------------------------------------------------------


def reasons_text(found: dict[str, Any]) -> list[str]:
    """Say what makes work new, a line for each differing path."""
    if found["against"] is None:
        return ["new because the store holds no earlier job"]
    if not found["differences"]:
        return [f"the same as {found['against']}: nothing but unfinished work is new"]
    lines = [f"new against {found['against']} because of"]
    for d in found["differences"]:
        none = "keeps what is there" if _is_pin(d["path"]) else NOTHING_NEW
        effect = ", ".join(d["makes_new"]) or none
        lines.append(f"  {d['path']}: {_brief(d['was'])} -> {_brief(d['is'])}  ({effect})")
    if found["pins"] is not None:
        e = found["pins"]["evaluations"]
        lines.append(
            f"  {e['reused']} of {e['planned']} evaluations would be reused, "
            f"{e['only measured']} only measured, {e['new']} new with"
        )
        lines += [f"    --set {path}={value}" for path, value in found["pins"]["set"].items()]
    return lines


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def plan_text(facts: dict[str, Any]) -> str:
    """Lay out what `plan` found."""
    e = facts["evaluations"]
    lines = [
        f"{facts['name']}  spec {facts['spec_digest'][:12]}",
        f"evaluations  {e['planned']} planned: {e['reused']} reused, {e['only measured']} only "
        f"measured from kept samples, {e['new']} new",
        "shared       "
        + ", ".join(
            f"{name} {'reused' if made else 'new'}" for name, made in facts["things"].items()
        ),
    ]
    lines += continued_text(facts["continues"])
    if facts["new_because"] is not None:
        lines += reasons_text(facts["new_because"])
    seconds, width = facts["seconds_expected"], facts["half_width"]
    lines.append(
        "time         "
        + ("unknown before the first evaluation" if seconds is None else f"about {seconds:.0f} s")
        + f", disk about {facts['bytes_expected'] / 1e6:.1f} MB"
    )
    lines += [
        f"{'interval' if k == 0 else '':<13}{text}" for k, text in enumerate(_width_text(width))
    ]
    if facts["stopping"] is not None:
        lines.append(f"target       {_stopping_text(facts['stopping'])}")
    return "\n".join(lines)


def continued_text(found: dict[str, Any] | None) -> list[str]:
    """Say what comes from the job that is continued, and what makes it useless; [] without one."""
    if found is None:
        return []
    people, coalitions = found["contributors"], found["coalitions"]
    lines = [
        f"continues    {found['name']} ({found['spec'][:12]}): {people['unchanged']} of its "
        f"{people['then']} contributors are here with the same images",
        f"             {coalitions['valid']} of the {coalitions['planned']} coalitions it planned "
        f"hold only these, {coalitions['in this design']} stand in this design",
        f"             {coalitions['measured']} of the {coalitions['planned']} are measured so far",
    ]
    if found["new_because"] is not None:
        lines.append(f"             all of them are new because of {found['new_because']}")
    return lines


def _width_text(width: dict[str, Any] | None) -> list[str]:
    if width is None:
        return ["unknown before more evaluations are done"]
    rough = "" if width["reliable"] else " (rough: too few pairs)"
    at_budget = "unknown" if width["at_budget"] is None else f"about {width['at_budget']:.3g}"
    lines = [
        f"{width['property']}: mean half-width {width['now']:.3g} now{rough}, {at_budget} when the "
        "budget is spent"
    ]
    if width["target"] is not None:
        budget = width["budget_for_target"]
        needs = f"a budget of about {budget}" if budget else "more estimator.endpoint_replicates"
        lines.append(f"the target of {width['target']:.3g} needs {needs}")
    return lines


def _stopping_text(at: dict[str, Any]) -> str:
    if at["reached"]:
        return f"reached after {at['batches']} of {at['planned']} batches: the rest is not needed"
    width = "" if at["half_width"] is None else f", mean half-width {at['half_width']:.3g}"
    return f"{at['target']:.3g}, at batch {at['batches']} of at most {at['planned']}{width}"


def status_text(facts: dict[str, Any]) -> str:
    """Lay out what `status` found."""
    e = facts["evaluations"]
    lines = [f"{facts['name']}  spec {facts['spec_digest'][:12]}  store {facts['store']}"]
    things = [(f"{name} model", base, "") for name, base in facts["bases"].items()]
    things += [("fitted", fitted, f"  {name}") for name, fitted in facts["fitted"].items()]
    for name, thing, whose in things:
        made = "made" if thing["made"] else "not made yet"
        lines.append(f"{name:<14}{made}  {thing['id']}{whose}")
    lines.append(
        f"{'evaluations':<14}{e['done']} of {e['planned']} done, {e['running']} running, "
        f"{e['failed']} failed, {e['waiting']} waiting"
    )
    lines += [
        f"  not counted: what the numerics class {numerics_text(other)} did"
        for other in facts["other_numerics"]
    ]
    if (v := facts["validation"]) is not None:
        lines.append(f"{'validation':<14}{v['done']} of {v['planned']} done (attr-batch validate)")
    if facts["stopping"] is not None:
        lines.append(f"{'target':<14}{_stopping_text(facts['stopping'])}")
    for item in facts["running"]:
        steps = f" {item['done']}/{item['total']}" if item["total"] else ""
        lines.append(f"  running  {item['what']}{steps}  (process {item['pid']} on {item['host']})")
    lines += [f"  failed   {item['what']}: {item['message']}" for item in facts["failed"]]
    expected = facts["seconds_expected"]
    lines.append(
        f"{'seconds':<14}{facts['seconds_spent']:.0f} spent by workers, "
        + ("rest unknown yet" if expected is None else f"about {expected:.0f} to go")
    )
    return "\n".join(lines)
