"""Contributors and coalitions: who takes part (`Roster`), and subsets of them (`Coalition`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from string import hexdigits


@dataclass(frozen=True, order=True)
class Coalition:
    """A subset of n contributors. Bit i of `mask` is contributor i.

    Written as a 0/1 string with contributor 0 first (`0110`), or as `0x` + hex of that string read
    as a binary number, zero-padded to ceil(n/4) digits.
    """

    mask: int
    n: int

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.mask < 1 << self.n:
            raise ValueError(f"mask {self.mask} is not a subset of {self.n} contributors")

    @classmethod
    def of(cls, members: Iterable[int], n: int) -> Coalition:
        """Return the coalition of the contributors with these indices."""
        mask = 0
        for i in members:
            if not 0 <= i < n:
                raise ValueError(f"contributor {i} is not one of 0..{n - 1}")
            mask |= 1 << i
        return cls(mask, n)

    @classmethod
    def empty(cls, n: int) -> Coalition:
        """Return the coalition without members."""
        return cls(0, n)

    @classmethod
    def grand(cls, n: int) -> Coalition:
        """Return the coalition of all n contributors."""
        return cls((1 << n) - 1, n)

    @classmethod
    def parse(cls, text: str, n: int | None = None) -> Coalition:
        """Read a 0/1 string, or `0x` + hex where `n` is given. ValueError says what is wrong."""
        text = text.strip()
        if text[:2].lower() == "0x":
            if n is None:
                raise ValueError(f"{text!r} is hexadecimal: the number of contributors is needed")
            width = -(-n // 4)
            if set(text[2:]) - set(hexdigits):
                raise ValueError(f"{text!r} is not hexadecimal")
            if len(text) - 2 != width:
                raise ValueError(f"{text!r} has {len(text) - 2} hex digits, wanted {width}")
            number = int(text, 16)
            if number >> n:
                raise ValueError(f"{text!r} has bits beyond {n} contributors")
            return cls.parse(format(number, f"0{n}b"), n)
        if not text or set(text) - {"0", "1"}:
            raise ValueError(f"{text!r} is not a string of 0 and 1")
        if n is not None and len(text) != n:
            raise ValueError(f"{text!r} has {len(text)} digits, wanted {n}")
        return cls(int(text[::-1], 2), len(text))

    @property
    def members(self) -> tuple[int, ...]:
        """Indices of the members, ascending."""
        return tuple(i for i in range(self.n) if self.mask >> i & 1)

    @property
    def size(self) -> int:
        """Number of members."""
        return self.mask.bit_count()

    def complement(self) -> Coalition:
        """Return the coalition of everyone else."""
        return Coalition(self.mask ^ ((1 << self.n) - 1), self.n)

    def __contains__(self, contributor: int) -> bool:
        return bool(self.mask >> contributor & 1)

    def __str__(self) -> str:
        return format(self.mask, f"0{self.n}b")[::-1]

    def hex(self) -> str:
        """Return the `0x` form."""
        return f"0x{int(str(self), 2):0{-(-self.n // 4)}x}"


@dataclass(frozen=True)
class Contributor:
    """One who is credited: an id, a number of images, and the sha256 of their content."""

    id: str
    images: int
    digest: str


@dataclass(frozen=True)
class Roster:
    """The contributors in order; a contributor's position is its index in every coalition."""

    contributors: tuple[Contributor, ...]

    def __post_init__(self) -> None:
        if len({c.id for c in self.contributors}) != len(self.contributors):
            raise ValueError("contributor ids must be distinct")

    def __len__(self) -> int:
        return len(self.contributors)

    @property
    def ids(self) -> tuple[str, ...]:
        """Contributor ids in order."""
        return tuple(c.id for c in self.contributors)

    def members(self, coalition: Coalition) -> tuple[Contributor, ...]:
        """Return the coalition's contributors in roster order."""
        return tuple(self.contributors[i] for i in coalition.members)
