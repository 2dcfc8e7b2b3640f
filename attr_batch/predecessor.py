"""What an earlier job planned that a job with other contributors may go on from.

A run key holds the digests of its coalition's members, of the base and of nothing else about the
roster. So a coalition that was evaluated when others were there is evaluated now, if all its
members still are, with the same images, and if the base is the same (`model.base`).

A coalition counts from when it is planned, measured or not: the new plan must not change while
either job runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attr_batch.coalition import Coalition, Roster
from attr_batch.data import natural
from attr_batch.errors import LedgerConflict, SpecError
from attr_batch.ledger import Ledger
from attr_batch.shapes import PlanLine, fits
from attr_batch.store import REPAIR_HINT

_WHERE = "estimator.continues"


@dataclass(frozen=True)
class Predecessor:
    """An earlier job as the present one sees it.

    `planned` are its coalitions but the empty one, in its own roster, with their run keys. `shared`
    are the contributors of both with the same images, `known` those of the planned coalitions that
    hold nobody else, both in the present roster; `trained` and `pruned` its bases.
    """

    name: str
    spec: str
    trained: str
    pruned: str
    contributors: int
    planned: Mapping[str, str]
    shared: Coalition
    known: tuple[Coalition, ...]


def find(ledger: Ledger, prefix: str, roster: Roster, numerics: Mapping[str, Any]) -> Predecessor:
    """Return the job whose spec digest begins with `prefix`, seen from `roster`.

    SpecError unless the store holds one such spec, planned for the same numerics class.
    """
    specs = [spec for spec in ledger.specs() if spec.startswith(prefix)]
    if len(specs) != 1:
        what = f"{len(specs)} jobs in the store have a spec digest that begins with {prefix!r}"
        raise SpecError(what, _WHERE, "`attr-batch status` of the earlier job prints its digest")
    planned = ledger.plans(specs[0]).values()
    plans = [lines for lines in planned if lines[0]["numerics"] == numerics]
    if not plans:
        theirs_class = next((lines[0]["numerics"] for lines in planned), {})
        differ = [
            f"{name} {theirs_class.get(name)}, not {ours}"
            for name, ours in numerics.items()
            if theirs_class.get(name) != ours
        ]
        what = f"{specs[0][:12]} was planned for another numerics class: {', '.join(differ)}"
        hint = "set resources.cohort and device as there, or run where the earlier job ran"
        raise SpecError(what, _WHERE, hint)
    fact = ledger.fact(ledger.spec_name(specs[0])) or {}
    theirs: dict[str, str] = fact["content"]["data"]["contributors"]
    place = _places(theirs, roster)
    if not all(fits(PlanLine, line) for lines in plans for line in lines[1:]):
        what = f"a plan of {specs[0][:12]} has lines that are none"
        raise LedgerConflict(what, ledger.store.place("plans"), REPAIR_HINT)
    planned = {c: key for lines in plans for c, key in _planned(lines[1:])}
    if any(len(c) != len(theirs) for c in planned) or len(plans[0][0]["bases"]) != 2:
        what = f"the plan of {specs[0][:12]} is not one of its {len(theirs)} contributors"
        raise LedgerConflict(what, ledger.store.place("plans"), REPAIR_HINT)
    known = [moved for c in planned if (moved := _moved(c, place, len(roster))) is not None]
    head = plans[0][0]
    return Predecessor(
        name=fact["name"],
        spec=specs[0],
        trained=head["bases"][0],
        pruned=head["bases"][1],
        contributors=len(theirs),
        planned=planned,
        shared=Coalition.of((i for i in place if i is not None), len(roster)),
        known=tuple(c for c in known if c.size < len(roster)),
    )


def _places(theirs: Mapping[str, str], roster: Roster) -> list[int | None]:
    """Return where each of their contributors stands now; None for who left or changed images."""
    ours = {(c.id, c.digest): i for i, c in enumerate(roster.contributors)}
    return [ours.get((name, theirs[name])) for name in sorted(theirs, key=natural)]


def _planned(lines: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield (coalition, key) of a plan but the empty one: the design first, its order kept."""
    for role in ("design", "grand", "holdout"):
        for line in lines:
            own = line["subject"] == "derived" and not line["replicate"] and "study" not in line
            if own and line["role"] == role:
                yield line["coalition"], line["key"]


def _moved(text: str, place: list[int | None], n: int) -> Coalition | None:
    """Return their coalition in the present roster; None if it holds somebody who is not there."""
    members = [place[i] for i in Coalition.parse(text).members]
    return None if None in members else Coalition.of([i for i in members if i is not None], n)
