"""Which coalitions to measure: deterministic sequences of which a budget is a prefix.

Four sequences, each with its own index. *Endpoints*: replicates of the empty and the grand
coalition. *Design*: what the estimator is fitted to. *Repeats*: the design's first coalitions once
more, which tells the noise. *Holdout*: what it is checked on. A sequence depends on (kind, n, seed)
and never on the budget, so a larger budget extends a smaller one, and every pod derives the same
plan without a coordinator.

The paper (Eq. 5) draws sizes by the Shapley kernel p(s) ∝ (n-1)/(s(n-s)) and then members
uniformly. `paired` keeps those marginals but takes a coalition with its complement (what is even
under complement cannot leak into the values), walks the sizes by a low-discrepancy sequence, and
never draws a pair twice before all are drawn. Balancing the contributors as well was measured and
gained nothing, so members are drawn uniformly.

Holdout and paired design are parted by a hash of the complement pair, the same for every seed: rows
of several seeds can be pooled and the check stays a check. `independent` and `permutations` draw
from all coalitions, since their readings do not reweight; a plan then leaves out of the holdout
what was drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations, islice
from math import ceil, comb
from random import Random
from typing import Literal

from attr_batch.coalition import Coalition
from attr_batch.errors import SpecError
from attr_batch.recipe import derive_seed

Role = Literal["empty", "grand", "design", "holdout"]
Window = tuple[float, float]
Sizes = Literal["kernel", "uniform"] | Window

HOLDOUT_SHARE = 8  # one in eight pairs of a middle size is kept for the check
# Draws have to be repeatable, not secret: hence the S311 exemptions below.
_GOLDEN = (5**0.5 - 1) / 2
MAX_PLAYERS = 5_000  # the readings take n^3 operations
_LISTED = 10_000  # so many coalitions of one size are shuffled rather than drawn
_MISSES = 64  # after so many draws in vain most of a size is taken: list what is left


@dataclass(frozen=True)
class Entry:
    """One line of a plan.

    `index` counts within the sequence, `pair` the complement pairs of the design, `batch` the
    groups of about n evaluations after which a sequential job may stop. `replicate` varies the
    training seed. `probability` is the chance, given what was drawn before, that the design's next
    draw is this coalition (`paired`: this pair; the hash that parts the holdout is not counted as
    chance); None where nothing was drawn by chance.
    """

    sequence: Literal["endpoint", "design", "repeat", "holdout", "reference", "oracle"]
    index: int
    coalition: Coalition
    role: Role
    pair: int | None
    batch: int
    replicate: int
    probability: float | None


def size_probability(n: int) -> list[float]:
    """Return p(s) ∝ (n-1)/(s(n-s)) for s = 0..n, zero at both ends, summing to one."""
    p = [0.0] + [1 / (s * (n - s)) for s in range(1, n)] + [0.0]
    total = sum(p)
    return [x / total for x in p]


def paired_sizes(n: int, sizes: Sizes) -> list[float]:
    """Return the paired design's p(s) for s = 0..n: zero at both ends, symmetric, summing to one.

    A window leaves the Shapley kernel between two shares of n. SpecError where no size is inside.
    """
    if sizes == "kernel":
        return size_probability(n)
    if sizes == "uniform":
        return [0.0] + [1 / (n - 1)] * (n - 1) + [0.0]
    low, high = sizes
    inside = [low * n - 1e-9 <= s <= high * n + 1e-9 for s in range(n + 1)]
    p = [x if keep else 0.0 for x, keep in zip(size_probability(n), inside, strict=True)]
    if not sum(p):
        what = f"no coalition of {n} contributors has a size between {low:g} n and {high:g} n"
        raise SpecError(what, "estimator.sizes", "widen the window")
    return [x / sum(p) for x in p]


def batch_pairs(n: int) -> int:
    """Return how many pairs make a batch: about n evaluations."""
    return max(4, -(-n // 2))


def held_out(coalition: Coalition) -> bool:
    """Say whether a coalition's pair belongs to the holdout side.

    Only sizes from n/4 to 3n/4, the range of the paper's own check (LDS), are held out: the
    smallest and the largest coalitions are few and the design needs them. Below 5 contributors
    none is.
    """
    n, mask = coalition.n, coalition.mask
    if n < 5 or not n <= 4 * coalition.size <= 3 * n:
        return False
    pair = min(mask, coalition.complement().mask)
    return hashlib.sha256(f"{n}:{pair:x}".encode()).digest()[0] % HOLDOUT_SHARE == 0


def endpoints(n: int, replicates: int) -> list[Entry]:
    """Return `replicates` of the empty and the grand coalition, in turn."""
    ends: list[tuple[Coalition, Role]] = [
        (Coalition.empty(n), "empty"),
        (Coalition.grand(n), "grand"),
    ]
    return [
        Entry("endpoint", 2 * r + k, coalition, role, None, 0, r, None)
        for r in range(replicates)
        for k, (coalition, role) in enumerate(ends)
    ]


def paired(n: int, seed: int, sizes: Sizes = "kernel") -> Iterator[Entry]:
    """Yield the paired design: S, its complement, the next S, ... without end.

    When all coalitions of these sizes are drawn it starts again with the next replicate.
    """
    p = paired_sizes(n, sizes)
    for index, (replicate, coalition, probability) in enumerate(_pairs(n, seed, p)):
        batch = index // batch_pairs(n)
        for k, member in enumerate((coalition, coalition.complement())):
            yield Entry(
                "design", 2 * index + k, member, "design", index, batch, replicate, probability
            )


def orders(n: int, seed: int) -> Iterator[list[int]]:
    """Yield random orders of the contributors, without end."""
    rng = Random(derive_seed("permutation", n, seed))  # noqa: S311
    while True:
        order = list(range(n))
        _shuffle(rng, order)
        yield order


def permutations(n: int, seed: int) -> Iterator[Entry]:
    """Yield antithetic permutations: along each of `orders`, a prefix and its complement.

    The complements are the prefixes of the reverse order, so 2 (n-1) coalitions hold both. One that
    an earlier order had is not measured again, until all were: then the next replicate begins. A
    batch is one order with its reverse. (Mitchell, Cooper, Frank and Holmes 2022, section 4.1.)
    """
    drawn: set[int] = set()
    batch = pair = replicate = 0
    for order in orders(n, seed):
        known, mask = len(drawn), 0
        for member in order[:-1]:
            mask |= 1 << member
            coalition = Coalition(mask, n)
            if mask in drawn:
                continue
            drawn |= {mask, coalition.complement().mask}
            for k, one in enumerate((coalition, coalition.complement())):
                yield Entry("design", 2 * pair + k, one, "design", pair, batch, replicate, None)
            pair += 1
        batch += len(drawn) > known
        if len(drawn) == (1 << n) - 2:
            drawn.clear()
            replicate += 1


def repeats(chosen: Sequence[Entry], share: float) -> Iterator[Entry]:
    """Yield the second replicate of this share of a paired design, whole pairs from its beginning.

    A pair is repeated in the batch in which the budget first asks for it. What the design repeats
    itself is left out.
    """
    exact = Fraction(str(share))  # so that 5 % of 120 is 6
    planned = {(entry.coalition, entry.replicate) for entry in chosen}
    for index, entry in enumerate(chosen[: 2 * ceil(exact * len(chosen) / 2)]):
        if entry.replicate == 0 and (entry.coalition, 1) not in planned:
            asked = chosen[2 * int(index // 2 / exact)]
            yield replace(
                entry,
                sequence="repeat",
                index=index,
                batch=asked.batch,
                replicate=1,
                probability=None,
            )


def independent(n: int, seed: int) -> Iterator[Entry]:
    """Yield the paper's design: independent draws; a repeated coalition is its next replicate."""
    rng = Random(derive_seed("reference", n, seed))  # noqa: S311
    p = size_probability(n)
    seen: dict[int, int] = {}
    index = 0
    while True:
        s = _inverse(dict(enumerate(p)), rng.random())
        coalition = Coalition(_subset(rng, n, s), n)
        replicate = seen.get(coalition.mask, 0)
        seen[coalition.mask] = replicate + 1
        batch = index // (2 * batch_pairs(n))
        yield Entry("design", index, coalition, "design", None, batch, replicate, p[s] / comb(n, s))
        index += 1


def exhaustive(n: int) -> Iterator[Entry]:
    """Yield every coalition but the endpoints, each followed by its complement."""
    for index, mask in enumerate(range(1, 1 << (n - 1))):
        coalition = Coalition(mask, n)
        for k, member in enumerate((coalition, coalition.complement())):
            batch = index // batch_pairs(n)
            yield Entry("design", 2 * index + k, member, "design", index, batch, 0, None)


def all_but_one(n: int) -> Iterator[Entry]:
    """Yield the coalitions that lack one contributor, in the contributors' order."""
    for i in range(n):
        coalition = Coalition.of([i], n).complement()
        yield Entry("design", i, coalition, "design", None, 0, 0, None)


def holdout(n: int, seed: int) -> Iterator[Entry]:
    """Yield held-out coalitions of sizes n/4 .. 3n/4, each size in turn, without repeats."""
    rng = Random(derive_seed("holdout", n, seed))  # noqa: S311
    sizes = [s for s in range(1, n) if n >= 5 and n <= 4 * s <= 3 * n]
    _shuffle(rng, sizes)
    taken: set[int] = set()
    index = 0
    while sizes:
        for s in list(sizes):
            mask = _unseen(rng, n, s, taken)
            if mask is None:
                sizes.remove(s)
                continue
            taken.add(mask)
            yield Entry("holdout", index, Coalition(mask, n), "holdout", None, 0, 0, None)
            index += 1


def of_size(n: int, s: int, seed: int) -> Iterator[Coalition]:
    """Yield the coalitions of s members in random order, each once."""
    rng = Random(derive_seed("of size", n, s, seed))  # noqa: S311
    if comb(n, s) <= _LISTED:
        masks = [Coalition.of(members, n).mask for members in combinations(range(n), s)]
        _shuffle(rng, masks)
        yield from (Coalition(mask, n) for mask in masks)
        return
    seen: set[int] = set()
    while len(seen) < comb(n, s):
        mask = _subset(rng, n, s)
        if mask not in seen:
            seen.add(mask)
            yield Coalition(mask, n)


def check_players(n: int, where: str | None = None) -> None:
    """Raise SpecError unless there are 2 to `MAX_PLAYERS` contributors."""
    if n < 2:
        raise SpecError(
            f"{n} contributor{'s' if n != 1 else ''}: there is nothing to divide",
            where,
            hint="choose two or more contributors",
        )
    if n > MAX_PLAYERS:
        what = f"{n} contributors, at most {MAX_PLAYERS} can be told apart"
        raise SpecError(what, where, hint="group them, and credit the groups")


# ------------------------------------------------------------------ drawing without repeats


class _Stratum:
    """The pairs of one size s <= n/2, drawn uniformly without repeats from either side."""

    def __init__(self, n: int, s: int, rng: Random) -> None:
        self.n, self.s, self.rng = n, s, rng
        self.count = comb(n, s) // (2 if 2 * s == n else 1)
        self.drawn: set[int] = set()
        self._listed: dict[bool, list[int]] = {}  # what is left of a side, once it is worth listing

    def draw(self, held: bool) -> Coalition | None:
        """Return the next pair of one side, None when there is none left."""
        for _ in range(0 if held or held in self._listed else _MISSES):
            mask = _subset(self.rng, self.n, self.s)
            if self._key(mask) not in self.drawn and not held_out(Coalition(mask, self.n)):
                return self._take(mask)
        if held not in self._listed:
            self._listed[held] = self._left(held)
        return self._take(self._listed[held].pop()) if self._listed[held] else None

    def _take(self, mask: int) -> Coalition:
        self.drawn.add(self._key(mask))
        # A coin decides which of the two comes first: a prefix that cuts a pair stays fair.
        coalition = Coalition(mask, self.n)
        return coalition if self.rng.random() < 0.5 else coalition.complement()

    def _key(self, mask: int) -> int:
        return min(mask, mask ^ ((1 << self.n) - 1))

    def _left(self, held: bool) -> list[int]:
        every = (Coalition.of(c, self.n) for c in combinations(range(self.n), self.s))
        left = sorted({self._key(c.mask) for c in every if held_out(c) is held} - self.drawn)
        _shuffle(self.rng, left)
        return left


def _pairs(n: int, seed: int, p: Sequence[float]) -> Iterator[tuple[int, Coalition, float]]:
    """Yield (replicate, first of the pair, probability) of the paired design."""
    replicate = 0
    while True:
        for coalition, probability in _pass(n, derive_seed("pass", seed, replicate), p):
            yield replicate, coalition, probability
        replicate += 1


def _pass(n: int, seed: int, p: Sequence[float]) -> Iterator[tuple[Coalition, float]]:
    """Draw every pair once: the design side first, the holdout side when that is used up.

    `p` are the sizes' probabilities; what has none is not drawn.
    """
    rng = Random(seed)  # noqa: S311
    shift = rng.random()
    strata = {s: _Stratum(n, s, rng) for s in range(1, n // 2 + 1)}
    for held in (False, True):
        q = {s: p[s] + (p[n - s] if 2 * s != n else 0) for s in strata if p[s]}
        step = 0
        while q:
            # A golden-ratio walk with a random start: each step has the kernel's size
            # distribution, and every prefix has each size within about one of its share.
            s = _inverse(q, (shift + step * _GOLDEN) % 1)
            step += 1
            left = strata[s].count - len(strata[s].drawn)
            coalition = strata[s].draw(held)
            if coalition is None:
                del q[s]
            else:
                yield coalition, q[s] / sum(q.values()) / left


def _inverse(weights: dict[int, float], u: float) -> int:
    """Return the key at which the cumulated weights pass the fraction u."""
    target = u * sum(weights.values())
    for key, weight in weights.items():
        target -= weight
        if target < 0:
            return key
    return key  # pyright: ignore[reportPossiblyUnboundVariable]  # rounding, at u next to 1


def _unseen(rng: Random, n: int, s: int, taken: set[int]) -> int | None:
    """Return a held-out coalition of size s that is not taken, None when all are."""
    for _ in range(_MISSES * HOLDOUT_SHARE):
        mask = _subset(rng, n, s)
        if mask not in taken and held_out(Coalition(mask, n)):
            return mask
    left = [
        coalition.mask
        for coalition in (Coalition.of(c, n) for c in combinations(range(n), s))
        if held_out(coalition) and coalition.mask not in taken
    ]
    return left[int(rng.random() * len(left))] if left else None


# Only Random.random() is promised to give the same stream in every Python version.


def _subset(rng: Random, n: int, s: int) -> int:
    """Return the mask of a uniform subset of size s (Floyd's algorithm)."""
    mask = 0
    for j in range(n - s, n):
        i = int(rng.random() * (j + 1))
        mask |= 1 << (j if mask >> i & 1 else i)
    return mask


def _shuffle(rng: Random, items: list[int]) -> None:
    for i in range(len(items) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        items[i], items[j] = items[j], items[i]


def prefix(sequence: Iterator[Entry], length: int) -> list[Entry]:
    """Return the first `length` entries (fewer where the sequence ends)."""
    return list(islice(sequence, length))
