"""What was measured, made ready to be read: replicates averaged, pairs found, holdout parted.

Pairs are found by complement and endpoints by coalition, whatever a plan called them, so a table
from elsewhere reads like a job of our own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attr_batch.coalition import Coalition
from attr_batch.errors import DataError
from attr_batch.estimators.design import Role, check_players
from attr_batch.estimators.regression import Array, Rows
from attr_batch.estimators.surrogate import Surrogate, control


@dataclass(frozen=True)
class Observation:
    """One utility that was measured. `weight` is what it is worth beside a plain measurement."""

    coalition: Coalition
    value: float
    role: Role
    pair: int | None = None
    replicate: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Mean:
    """A mean over replicates: its value, their standard deviation (None for one), how many."""

    value: float
    sd: float | None
    replicates: int


@dataclass(frozen=True)
class Noise:
    """Spread between replicates of the same coalition: at both endpoints, and in the design."""

    empty: Mean
    full: Mean
    repeats_sd: float | None
    repeats_df: int
    repeated: int

    @property
    def repeats(self) -> tuple[float | None, int]:
        """Variance of one measurement between the endpoints, and its degrees of freedom."""
        return (None if self.repeats_sd is None else self.repeats_sd**2, self.repeats_df)

    @property
    def pooled(self) -> tuple[float | None, int]:
        """The same over all replicates, the endpoints' included."""
        parts = [
            (self.empty.sd, self.empty.replicates - 1),
            (self.full.sd, self.full.replicates - 1),
            (self.repeats_sd, self.repeats_df),
        ]
        df = sum(k for sd, k in parts if sd is not None)
        return (sum(k * sd * sd for sd, k in parts if sd is not None) / df, df) if df else (None, 0)


@dataclass(frozen=True)
class Evidence:
    """Observations in order: averaged rows to fit, the noise, and the held-out coalitions."""

    rows: Rows
    noise: Noise
    held: tuple[Coalition, ...]
    held_members: Array
    held_v: Array
    used: int


def gather(
    observations: Sequence[Observation], n: int, surrogate: Surrogate | None = None
) -> Evidence:
    """Average the replicates, find the pairs, part the holdout; the order given does not matter.

    DataError where an endpoint or the whole design has no value, or a value is not finite.
    """
    check_players(n)
    grand = (1 << n) - 1
    fitted: dict[int, list[Observation]] = defaultdict(list)
    held: dict[int, list[Observation]] = defaultdict(list)
    for o in observations:
        if o.coalition.n != n:
            raise DataError(f"coalition {o.coalition} has {o.coalition.n} contributors, wanted {n}")
        if not np.isfinite(o.value) or not (np.isfinite(o.weight) and o.weight > 0):
            raise DataError(f"value {o.value} with weight {o.weight}", f"coalition {o.coalition}")
        end = o.coalition.mask in (0, grand)
        (held if o.role == "holdout" and not end else fitted)[o.coalition.mask].append(o)
    for mask, name in ((0, "empty"), (grand, "grand")):
        if mask not in fitted:
            raise DataError(
                f"no value of the {name} coalition {Coalition(mask, n)}",
                hint="Shapley values divide v(N) - v(∅): both endpoints must be measured",
            )
    masks = sorted(fitted.keys() - {0, grand})
    if not masks:
        raise DataError("no design coalition has a value", hint="measure some of the plan first")
    held_masks = sorted(held.keys() - fitted.keys())
    means = [_mean(fitted[mask]) for mask in masks]
    position = {mask: i for i, mask in enumerate(masks)}
    empty, full = _mean(fitted[0]), _mean(fitted[grand])
    rows = Rows(
        Z=indicators(masks, n),
        v=np.array([mean.value for mean in means]),
        count=np.array([sum(o.weight for o in fitted[mask]) for mask in masks]),
        replicates=np.array([mean.replicates for mean in means]),
        partner=np.array([position.get(mask ^ grand, -1) for mask in masks]),
        v_empty=empty.value,
        v_full=full.value,
        control=None if surrogate is None else control(surrogate, n),
    )
    spread = [(mean.sd, mean.replicates - 1) for mean in means]
    df = sum(k for sd, k in spread if sd is not None)
    total = sum(k * sd * sd for sd, k in spread if sd is not None)
    noise = Noise(
        empty=empty,
        full=full,
        repeats_sd=float(np.sqrt(total / df)) if df else None,
        repeats_df=df,
        repeated=sum(sd is not None for sd, _ in spread),
    )
    held_v = np.array([_mean(held[mask]).value for mask in held_masks])
    held_out = tuple(Coalition(mask, n) for mask in held_masks)
    members = indicators(held_masks, n)
    return Evidence(rows, noise, held_out, members, held_v, len(observations))


def indicators(masks: Sequence[int], n: int) -> Array:
    """Return memberships (len(masks), n) of bit masks of any length."""
    width = -(-n // 8)
    packed = np.frombuffer(b"".join(mask.to_bytes(width, "little") for mask in masks), np.uint8)
    bits = np.unpackbits(packed.reshape(len(masks), width), axis=1, bitorder="little")
    return bits[:, :n].astype(np.float64)


def _mean(group: Sequence[Observation]) -> Mean:
    # Sorted, so that the sum's rounding does not depend on the order of the observations.
    ordered = sorted(group, key=lambda o: (o.replicate, o.value, o.weight))
    w = np.array([o.weight for o in ordered])
    x = np.array([o.value for o in ordered])
    mean = float(w @ x / w.sum())
    if len(x) == 1:
        return Mean(mean, None, 1)
    # Reliability weights: with equal weights the usual n - 1.
    spread = float(w @ (x - mean) ** 2 / (w.sum() - (w @ w) / w.sum()))
    return Mean(mean, spread**0.5, len(x))
