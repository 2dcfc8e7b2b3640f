"""Permutation sampling: the mean gain over the orders in which contributors may come.

An order is read where every coalition along it was measured, from ∅ to N: a permutation that the
budget cuts waits unread, and of one with a coalition that failed the reverse is read alone. Orders
are found by inclusion, whatever the coalitions were planned for, and counted rather than listed:
a gain v(S + i) - v(S) belongs to (ways to S) x (ways on from S + i) of them. With all coalitions
measured there are all n! orders, and their mean is the Shapley value. (Castro, Gomez and Tejada
2009; Mitchell, Cooper, Frank and Holmes 2022.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attr_batch.errors import DataError
from attr_batch.estimators.regression import Array, Rows


@dataclass(frozen=True)
class Permutations:
    """Mean gains (n,) over all complete orders, and their variance, None where nothing tells it.

    `drawn` is how many permutations with their reverses it would take to measure as many
    coalitions: orders that share some are not independent, and no more than these are counted.
    `by_empty`, `by_full` are the derivatives of the values by the endpoints.
    """

    phi: Array
    variance: Array | None
    drawn: int
    by_empty: Array
    by_full: Array


def permutation_means(rows: Rows) -> Permutations:
    """Average the gains over all complete orders. DataError where there is none."""
    n, grand = rows.n, (1 << rows.n) - 1
    masks = [int("".join("01"[int(z)] for z in row[::-1]), 2) for row in rows.Z]
    v = {0: rows.v_empty, **dict(zip(masks, rows.v.tolist(), strict=True)), grand: rows.v_full}
    steps = _steps(v, n)
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


def _steps(v: dict[int, float], n: int) -> list[tuple[int, int, float]]:
    """Return (coalition, who joins it, share of the complete orders in which this happens)."""
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
    steps: list[tuple[int, int, float]] = []
    for mask in by_size:
        for i in joins[mask]:
            after = mask | 1 << i
            ways[after] += ways[mask]
            if ways[mask] and onward[after]:
                steps.append((mask, i, ways[mask] * onward[after] / onward[0]))
    return steps
