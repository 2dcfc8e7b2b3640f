"""Permutation sampling: the mean gain over orders in which the contributors may come.

An order is read where every coalition along it was measured, from ∅ to N: a permutation that the
budget cuts waits unread, and of one with a coalition that failed the reverse is read alone. The
orders are those of the plan. Where most coalitions lie on none of these (another seed, a plan of
somebody else), all orders are read that inclusion allows. They are counted rather than listed: a
gain v(S + i) - v(S) belongs to (ways to S) x (ways on from S + i) of them; with all coalitions
measured these are all n! orders, and their mean is the Shapley value. (Castro, Gomez and Tejada
2009; Mitchell, Cooper, Frank and Holmes 2022.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

import numpy as np

from attr_batch.errors import DataError
from attr_batch.estimators.regression import Array, Rows

_Step = tuple[int, int, float]  # a coalition, who joins it, and the share of orders that do so


@dataclass(frozen=True)
class Permutations:
    """Mean gains (n,) over complete orders, and their variance, None where nothing tells it.

    `drawn` is how many permutations, each with its reverse, as many coalitions are worth: orders
    that share some are not independent, and no more than these are counted.
    `by_empty`, `by_full` are the derivatives of the values by the endpoints.
    """

    phi: Array
    variance: Array | None
    drawn: int
    by_empty: Array
    by_full: Array


def permutation_means(rows: Rows, planned: Iterable[Sequence[int]]) -> Permutations:
    """Average the gains over complete orders. DataError where there is none.

    `planned` are the plan's orders of the contributors; as many as there are rows are looked at.
    """
    n, grand = rows.n, (1 << rows.n) - 1
    masks = [int("".join("01"[int(z)] for z in row[::-1]), 2) for row in rows.Z]
    v = {0: rows.v_empty, **dict(zip(masks, rows.v.tolist(), strict=True)), grand: rows.v_full}
    steps = _planned(v, islice(planned, len(masks)))
    if 2 * len({mask for mask, _, _ in steps}) < len(masks):
        steps = _by_inclusion(v, n)
    phi, square, mean, by_empty, by_full = np.zeros((5, n))
    for mask, i, share in steps:
        after = mask | 1 << i
        gain = v[after] - v[mask]
        # In the reverse order the same contributor joins whoever came after it.
        before, behind = v.get(grand ^ after), v.get(grand ^ mask)
        both = gain if before is None or behind is None else (gain + behind - before) / 2
        phi[i] += share * gain
        mean[i] += share * both
        square[i] += share * both * both
        by_empty[i] -= share * (mask == 0)
        by_full[i] += share * (after == grand)
    drawn = max(len(masks) // max(2 * n - 2, 1), 1)
    variance = np.maximum(square - mean**2, 0) / (drawn - 1) if drawn > 1 else None
    return Permutations(phi, variance, drawn, by_empty, by_full)


def _planned(v: dict[int, float], planned: Iterable[Sequence[int]]) -> list[_Step]:
    """Return the steps of the complete ones among orders and their reverses, each pair as one."""
    both = ((order, order[::-1]) for order in planned)
    complete = ([way for way in ways if _complete(v, way)] for ways in both)
    read = [ways for ways in complete if ways]
    return [
        (before, (before ^ after).bit_length() - 1, 1 / (len(read) * len(ways)))
        for ways in read
        for way in ways
        for before, after in pairwise(_path(way))
    ]


def _path(order: Sequence[int]) -> Iterator[int]:
    return accumulate(order, lambda mask, i: mask | 1 << i, initial=0)


def _complete(v: dict[int, float], order: Sequence[int]) -> bool:
    return all(mask in v for mask in _path(order))


def _by_inclusion(v: dict[int, float], n: int) -> list[_Step]:
    """Return the steps of all orders along which every coalition was measured."""
    grand = (1 << n) - 1
    by_size = sorted(v, key=lambda mask: (mask.bit_count(), mask))
    joins = {
        mask: [i for i in range(n) if not mask >> i & 1 and mask | 1 << i in v] for mask in by_size
    }
    onward, ways = {grand: 1}, dict.fromkeys(by_size, 0)
    for mask in by_size[-2::-1]:
        onward[mask] = sum(onward[mask | 1 << i] for i in joins[mask])
    if not onward[0]:
        raise DataError(
            f"none of the {n}! orders of the contributors has all its coalitions measured",
            hint=f"an order takes {n - 1} evaluations between the endpoints, each a prefix of the "
            "next; kind: ridge reads any coalitions",
        )
    ways[0] = 1
    steps: list[_Step] = []
    for mask in by_size:
        for i in joins[mask]:
            after = mask | 1 << i
            ways[after] += ways[mask]
            if ways[mask] and onward[after]:
                steps.append((mask, i, ways[mask] * onward[after] / onward[0]))
    return steps
