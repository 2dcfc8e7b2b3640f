"""A design that goes on from another roster's: contributors came, left, or sent other images.

A coalition that was measured then is worth the same now if all its members are still here with the
same images; its complement is another one and is measured anew. To put such coalitions in front of
a new design would bias the values: none of them holds a newcomer, so the newcomers' rows would
come from pairs of other sizes than the kernel wants, and two newcomers would never be seen apart.
No weight by size mends that. So the new game's own sequence decides of every pair what it decides
by chance anyway, its sizes and on which side the newcomers are, and the coalitions known take the
places of those that are exchangeable with them: subsets of one size of the contributors that both
games share. The design has the distribution of a new one, and its readings need no correction.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from attr_batch.coalition import Coalition
from attr_batch.estimators.design import Entry, held_out


def continued(
    entries: Sequence[Entry], shared: Coalition, known: Iterable[Coalition]
) -> list[Entry]:
    """Return a paired plan with coalitions of `known` in the places of exchangeable ones.

    `shared` are the contributors of both games, `known` subsets of it, taken in the order given.
    No pair comes twice, none of the holdout side is taken, and the plan of a smaller budget is a
    prefix of a larger one's, as without. A repeat is one of what took the place, unless the design,
    when it has drawn every pair, repeats that itself.
    """
    waiting: dict[tuple[int, ...], deque[Coalition]] = defaultdict(deque)
    for coalition in known:
        if not held_out(coalition):
            waiting[_stratum(coalition, shared)].append(coalition)
    wanted = {_pair(coalition) for queue in waiting.values() for coalition in queue}
    instead: dict[int, Coalition] = {}  # of a pair that was given early: what it displaced
    given: set[int] = set()
    found: list[Entry] = []
    drawn: dict[int, Coalition] = {}  # the design, by index
    twice = {entry.coalition for entry in entries if entry.sequence == "design" and entry.replicate}
    for entry in entries:
        if entry.sequence == "repeat":
            if drawn[entry.index] not in twice:
                found.append(replace(entry, coalition=drawn[entry.index]))
            continue
        if entry.pair is None or entry.replicate:
            found.append(entry)
            continue
        if entry.index % 2:  # the complement of the one before
            drawn[entry.index] = drawn[entry.index - 1].complement()
            found.append(replace(entry, coalition=drawn[entry.index]))
            continue
        chosen = instead.pop(_pair(entry.coalition), entry.coalition)
        if _pair(chosen) not in wanted:
            queue = waiting[_stratum(chosen, shared)]
            while queue and not given.isdisjoint(_like(queue[0], shared)):
                queue.popleft()
            if queue:
                instead[_pair(queue[0])] = chosen
                chosen = queue.popleft()
        given.add(_pair(chosen))
        drawn[entry.index] = chosen
        found.append(replace(entry, coalition=chosen))
    return found


def _like(coalition: Coalition, shared: Coalition) -> tuple[int, int]:
    """Return its own pair and that of its complement among `shared`: its own of the earlier design.

    Of the two pairs only one is taken: the other tells the newcomers' value and little else.
    """
    mirror = Coalition(coalition.mask ^ shared.mask, coalition.n)
    return _pair(coalition), _pair(mirror)


def _pair(coalition: Coalition) -> int:
    return min(coalition.mask, coalition.complement().mask)


def _stratum(coalition: Coalition, shared: Coalition) -> tuple[int, ...]:
    """Return the sizes of those of the pair that hold nobody but `shared`; () for neither."""
    pair = (coalition, coalition.complement())
    return tuple(sorted(c.size for c in pair if not c.mask & ~shared.mask))
