"""What changes the number: canonical JSON, digests, seeds, and the frozen parts a spec is made of.

Two runs with the same recipe give the same bits on the same machine, so a recipe's digest is the
name under which the ledger keeps a value. Bump `RECIPE_VERSION` (and CHANGELOG's "Numbers")
whenever the code gives another number for the same recipe.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

RECIPE_VERSION = 2

# Put in a field's annotation (`Annotated[str, UNHASHED]`): a place or name that changes no number.
UNHASHED = "not part of the recipe"


class Part(BaseModel):
    """A frozen, validated piece of the job spec that owns its verb.

    Unknown keys are errors. `recipe()` is what enters a digest: every field, defaults included,
    but for those annotated `UNHASHED`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def recipe(self) -> dict[str, Any]:
        """Return the JSON-able content that may change a number."""
        fields: dict[str, FieldInfo] = type(self).model_fields
        return {
            name: _recipe(getattr(self, name))
            for name, field in fields.items()
            if UNHASHED not in field.metadata
        }


def _recipe(value: Any) -> Any:
    if isinstance(value, Part):
        return value.recipe()
    if isinstance(value, tuple | list):
        return [_recipe(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {key: _recipe(item) for key, item in cast("dict[str, Any]", value).items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def canonical(value: Any) -> bytes:
    """Return `value` as JSON bytes: sorted keys, no spaces, `repr` floats; NaN is a ValueError."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def digest(value: Any) -> str:
    """Return the sha256 (64 hex digits) of a JSON-able value or of bytes."""
    return hashlib.sha256(value if isinstance(value, bytes) else canonical(value)).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derive_seed(*parts: str | int) -> int:
    """Return a seed in [0, 2^63) that is a hash of `parts`: independent streams, no arithmetic."""
    return int.from_bytes(hashlib.sha256(canonical(list(parts))).digest()[:8], "big") >> 1
