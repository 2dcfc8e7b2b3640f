"""Plans and utilities as CSV, for games that are measured elsewhere ("ask" and "tell").

`write_design` prints a plan, `read_values` reads it back with a `value` column. Cells are read as
text, never guessed: a spreadsheet turns `0110` into 110 and long coalitions into 1.1E+05, which
would be another coalition. Whatever is wrong is reported at once, each with its line.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from attr_batch.coalition import Coalition
from attr_batch.errors import DataError, Problem
from attr_batch.estimators import Entry, Observation, Role
from attr_batch.estimators.design import check_players
from attr_batch.shapes import LARGEST

DESIGN_COLUMNS = ("row", "coalition", "pair", "batch", "role")
_KNOWN = (*DESIGN_COLUMNS, "value", "replicate", "weight")
_ROLES = ("", "endpoint", "empty", "grand", "design", "repeat", "holdout")
_FEWEST_COALITIONS = 2
_WEIGHTS = (1e-6, 1e6)
_MOST_BYTES = 1 << 28
_SHOWN = 20  # problems beyond these are counted
_SPREADSHEET = "a spreadsheet changes such cells: import the column as text, or use 0x and hex"
_NUMBER = re.compile(r"[0-9]+([.,][0-9]+)?([eE][+-]?[0-9]+)?")


def write_design(entries: Iterable[Entry], stream: TextIO) -> None:
    """Write one line an entry; its role is endpoint, design, repeat or holdout."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(DESIGN_COLUMNS)
    for row, entry in enumerate(entries):
        pair = "" if entry.pair is None else entry.pair
        writer.writerow([row, entry.coalition, pair, entry.batch, entry.sequence])


def read_values(path: str | Path, players: int | None = None) -> tuple[list[Observation], int]:
    """Return the observations of a CSV file and the number of contributors.

    Columns `coalition` and `value`, optionally those of `write_design`, `replicate` and `weight`.
    The number of contributors is `players`, else the length that most 0/1 strings have. Repeated
    coalitions are replicates. Who is whose complement is seen from the coalitions; a `pair` that
    says otherwise is an error, for then the columns do not belong together. DataError names
    everything that is wrong; SpecError says that there are too few or too many contributors.
    """
    if players is not None:
        check_players(players, "--players")
    where = str(path)
    header, lines = _cells(Path(path))
    problems = _header_problems(header, where)
    if problems:
        raise DataError.of(problems)
    texts = [cells[header.index("coalition")] for _, cells in lines if len(cells) == len(header)]
    widths = Counter(len(text) for text in texts if _is_binary(text))
    n = players or max(widths, key=lambda width: (widths[width], width), default=0)
    if not n and any(text[:2].lower() == "0x" for text in texts):
        what = "coalitions are hexadecimal, the number of contributors is not known"
        raise DataError(what, where, "give it with --players N")
    observations: list[Observation] = []
    for number, cells in lines:
        found, wrong = _observation(header, cells, n, f"{where}, line {number}")
        problems += wrong
        observations += found
    if not problems:
        problems = _whole_problems(observations, n, where) or _pair_problems(observations, where)
    if problems:
        more = len(problems) - _SHOWN
        tail = [Problem(f"and {more} more", where)] if more > 0 else []
        raise DataError.of([*problems[:_SHOWN], *tail])
    check_players(n, where)
    return observations, n


def _cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header and (line number, cells) of every line that is not blank."""
    try:
        with path.open("rb") as stream:  # which may be a device without end
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise DataError(f"more than {_MOST_BYTES:,} bytes", str(path), "is it the table?")
        text = data.decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [
            (reader.line_num, [cell.strip() for cell in cells])
            for cells in reader
            if any(cell.strip() for cell in cells)
        ]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", str(path)) from None
    except (UnicodeDecodeError, csv.Error) as error:
        hint = "save it as CSV, UTF-8"
        raise DataError(f"is not a CSV file in UTF-8: {error}", str(path), hint) from None
    if not lines:
        raise DataError("is empty", str(path), "the first line names the columns: coalition,value")
    return [name.lower() for name in lines[0][1]], lines[1:]


def _header_problems(header: list[str], where: str) -> list[Problem]:
    where = f"{where}, line 1"
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            hint = "save it with commas between the cells and a point in the numbers"
            return [Problem(f"cells are separated by {name}", where, hint)]
    problems = [
        Problem(f"column {name[:60]!r} appears {times} times", where)
        for name, times in Counter(header).items()
        if times > 1
    ]
    problems += [
        Problem(f"no column {name!r}", where, "the first line names the columns: coalition,value")
        for name in ("coalition", "value")
        if name not in header
    ]
    problems += [
        Problem(f"unknown column {name[:60]!r}", where, f"known are {', '.join(_KNOWN)}")
        for name in dict.fromkeys(header)
        if name not in _KNOWN
    ]
    return problems


def _observation(
    header: list[str], cells: list[str], n: int, where: str
) -> tuple[list[Observation], list[Problem]]:
    """Return one line's observation, or what is wrong with it."""
    if len(cells) != len(header):
        hint = "decimal commas need a point" if len(cells) > len(header) else None
        return [], [Problem(f"{len(cells)} cells, wanted {len(header)}", where, hint)]
    cell = dict(zip(header, cells, strict=True))
    problems: list[Problem] = []
    coalition = _coalition(cell["coalition"], n, where, problems)
    value = _number("value", cell["value"], where, problems)
    weight = _number("weight", cell.get("weight") or "1", where, problems)
    if value is not None and abs(value) > LARGEST:
        hint = "measure in a larger unit: every value divided by the same number"
        problems.append(Problem(f"value {value:g} is beyond {LARGEST:g}", where, hint))
    if weight is not None and not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:
        least, most = _WEIGHTS
        hint = "1 is the usual weight, 2 that of a value measured twice as often"
        problems.append(Problem(f"weight {weight:g}, wanted {least:g} to {most:g}", where, hint))
    pair = _index("pair", cell.get("pair") or "", where, problems)
    replicate = _index("replicate", cell.get("replicate") or "", where, problems)
    role = _role((cell.get("role") or "").lower(), coalition, where, problems)
    if problems or coalition is None or value is None or weight is None or role is None:
        return [], problems
    return [Observation(coalition, value, role, pair, replicate or 0, weight)], []


def _coalition(text: str, n: int, where: str, problems: list[Problem]) -> Coalition | None:
    try:
        return Coalition.parse(text, n or None)
    except ValueError as error:
        shape = _is_binary(text) or _NUMBER.fullmatch(text)
        hint = _SPREADSHEET if shape else "a coalition is written like 0110, contributor 0 first"
        problems.append(Problem(f"coalition {error}", where, hint))
        return None


def _number(name: str, text: str, where: str, problems: list[Problem]) -> float | None:
    if not text:
        hint = "delete the line if this coalition was not measured"
        problems.append(Problem(f"no {name}", where, hint))
        return None
    try:
        number = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        number = None
    if number is None or not math.isfinite(number):
        hint = "numbers are written with a point, like 0.25" if number is None else None
        problems.append(Problem(f"{name} {text[:60]!r} is not a finite number", where, hint))
        return None
    return number


def _index(name: str, text: str, where: str, problems: list[Problem]) -> int | None:
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,18}", text):
        problems.append(Problem(f"{name} {text[:60]!r} is not a whole number", where))
        return None
    return int(text)


def _role(
    text: str, coalition: Coalition | None, where: str, problems: list[Problem]
) -> Role | None:
    """Return the role: the coalition says whether it is an endpoint, the cell whether held out."""
    if text not in _ROLES:
        wanted = "endpoint, design, repeat or holdout"
        problems.append(Problem(f"role {text[:60]!r}, wanted {wanted}", where))
        return None
    if coalition is None:
        return None
    ends: dict[int, Role] = {0: "empty", coalition.n: "grand"}
    end = ends.get(coalition.size)
    allowed = ("", "endpoint", end) if end else ("", "design", "repeat", "holdout")
    if text not in allowed:
        kind = f"the {end} coalition" if end else "neither empty nor grand"
        problems.append(Problem(f"role {text!r}, but {coalition} is {kind}", where))
        return None
    return end or ("holdout" if text == "holdout" else "design")


def _whole_problems(observations: list[Observation], n: int, where: str) -> list[Problem]:
    """Return what the file as a whole lacks."""
    if not n:
        return [Problem("no line with a coalition and a value", where)]
    if n < 2:
        return [Problem("1 contributor: there is nothing to divide", where)]
    problems = [
        Problem(
            f"no value of the {role} coalition",
            where,
            f"add a line for {text}: Shapley values divide v(N) - v(∅)",
        )
        for role, text in (("empty", "0" * n), ("grand", "1" * n))
        if all(o.role != role for o in observations)
    ]
    design = len({o.coalition for o in observations if o.role == "design"})
    if design < _FEWEST_COALITIONS:
        hint = "attr-batch design prints which coalitions to measure"
        problems.append(
            Problem(
                f"{design} distinct coalitions to fit, wanted {_FEWEST_COALITIONS} or more",
                where,
                hint,
            )
        )
    return problems


def _pair_problems(observations: list[Observation], where: str) -> list[Problem]:
    """Return the pairs that hold anything but a coalition and its complement."""
    pairs: dict[int, set[Coalition]] = defaultdict(set)
    for o in observations:
        if o.pair is not None:
            pairs[o.pair].add(o.coalition)
    hint = "is the table shifted? a column that means something else must not be called pair"
    found = []
    for pair, held in pairs.items():
        first = min(held)
        if held - {first, first.complement()}:
            some = ", ".join(map(str, sorted(held)[:3]))
            what = f"pair {pair} is not a coalition and its complement: {some}"
            found.append(Problem(what, where, hint))
    return found


def _is_binary(text: str) -> bool:
    return bool(text) and not set(text) - {"0", "1"}
