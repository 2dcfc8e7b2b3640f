"""What the facts in a store look like: which keys a reader may rely on, and of what type.

A fact's sha256 says that its bytes are whole, not who wrote them: whoever may write to the store
can seal anything. So readers check its shape first, and what is no fact of ours is a conflict as a
torn file is, never a traceback. Keys that are not named here are let through.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# One part of a name in the store: it leads nowhere else.
Name = Annotated[str, Field(pattern="^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=255)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]


def _float(value: Any) -> Any:
    if type(value) is not float:
        raise ValueError("no float")  # a whole number in JSON may have any number of digits
    return value


LARGEST = 1e100  # its square and sums of it are still finite
Number = Annotated[float, BeforeValidator(_float), Field(ge=-LARGEST, le=LARGEST)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Data(_Shape):
    contributors: dict[str, str]


class _Content(_Shape):
    data: _Data


class Spec(_Shape):
    """`specs/<digest>.json`."""

    name: str
    content: _Content


class Manifest(_Shape):
    """`manifest.json` of a base or property: files by name, never outside its own folder."""

    files: dict[Name, Digest]
    inputs: dict[str, Any]
    seconds: Seconds


class Value(_Shape):
    """A measured utility."""

    key: str
    property: str
    property_digest: str
    value: Number
    stderr: Number | None
    seconds: Seconds


class _Recipe(_Shape):
    subject: str
    members: list[str] | None = None

    @model_validator(mode="after")
    def _derived_of_somebody(self) -> _Recipe:
        if self.subject == "derived" and self.members is None:
            raise ValueError("derived from nobody")
        return self


class _Provenance(_Shape):
    processor: str
    torch: str


class Derivation(_Shape):
    """`derivation.json`: how a run's samples came to be."""

    key: str
    recipe: _Recipe
    samples_sha256: str
    seconds: dict[str, Seconds]
    provenance: _Provenance


class Diverged(_Shape):
    """`diverged.json`: which run stands in."""

    next: Name


class PlanHead(_Shape):
    """The first line of a plan."""

    spec: Name
    numerics: dict[str, Any]
    bases: list[Name]
    properties: list[Name]


class PlanKey(_Shape):
    """What everybody reads of a plan's line."""

    key: Name


class PlanLine(PlanKey):
    """A line of a plan: one evaluation."""

    coalition: Annotated[str, Field(pattern="^[01]+$", max_length=100_000)]
    role: str
    replicate: Count
    subject: str


class _Bases(_Shape):
    trained: Digest
    pruned: Digest


class Period(_Shape):
    """`periods/<label>.json`: which report is a period's, and what the next may pin."""

    label: str
    name: str
    spec: Digest
    report: Annotated[str, Field(pattern="^reports/[0-9a-f]{64}-[0-9a-f]{12}$")]
    attribution_sha256: Digest
    bases: _Bases
    fitted: dict[str, Digest]


class _Contributor(_Shape):
    id: Annotated[str, Field(min_length=1)]
    images: Annotated[int, Field(gt=0, lt=1 << 53)]
    digest: Digest


class _Roster(_Shape):
    contributors: list[_Contributor]


class DataCard(_Shape):
    """`work/data/<digest>.json`: what planning needs of the data."""

    roster: _Roster
    label_names: list[str]
    channels: Annotated[int, Field(ge=1, le=16)]
    size: Annotated[int, Field(ge=1, le=100_000)]


class Beat(_Shape):
    """`work/heartbeats/<name>.json`: who works on a thing now."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    name: str
    phase: str
    done: Count
    total: Count
    host: str
    pid: Count
    process_start: str
    token: str
    time: Seconds


class Failure(_Shape):
    """`failures/<run key>.json`: what went wrong the last time."""

    about: str
    session: str
    time: Seconds
    message: str


class Cost(_Shape):
    """What of an earlier `cost.json` goes into the next."""

    wall_seconds: Seconds | None
    reused: Count


def fits(shape: type[BaseModel] | None, found: Any) -> bool:
    """Return whether a JSON value has this shape; any has where none is prescribed."""
    if shape is None:
        return True
    try:
        shape.model_validate(found)
    except (ValidationError, RecursionError):
        return False
    return True


def shape_of(name: str) -> type[BaseModel] | None:
    """Return the shape of the fact under a name of the store; None where none is prescribed."""
    family, _, rest = name.partition("/")
    if family == "specs":
        return Spec
    if rest.endswith("/manifest.json"):
        return Manifest
    if family == "work":
        return DataCard if rest.startswith("data/") else None
    if family == "periods":
        return Period
    if family != "runs":
        return None
    named = {"derivation.json": Derivation, "diverged.json": Diverged}
    return named.get(rest.rpartition("/")[2], Value)
