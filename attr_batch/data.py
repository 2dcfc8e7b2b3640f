"""The contributors' images, in an order that depends on their content alone.

A value may only depend on what the members of a coalition gave (idea 4 of the architecture: the run
key holds the digests of the members' data and nothing else), so neither file names, row order, nor
the other contributors may leave a trace in the order of the training images. Contributors are
sorted by id, a contributor's images by the sha256 of their decoded pixels and label; taking a
coalition's images keeps that order. The players of the paper's game (Section 3) are these
contributors: labels of CIFAR-20, celebrities, or artists.

No torch here: `plan` and `status` need the roster in well under a second.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import struct
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator

from attr_batch import log
from attr_batch.bucket import fetch, is_url, stamps
from attr_batch.coalition import Coalition, Contributor, Roster
from attr_batch.errors import DataError, Problem
from attr_batch.recipe import RECIPE_VERSION, UNHASHED, Part, digest

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"  # the column's name in the Hugging Face layout
MAX_PIXELS = 80_000_000  # an image beyond it is taken for a decompression bomb
MAX_PROBLEMS = 100  # a message of 10,000 missing files helps nobody
MAX_NAME = 200  # characters of an id or a label
MAX_TABLE = 1 << 28  # bytes of the metadata: a million rows

# What Pillow raises on broken files: 60,000 damaged ones gave the first three (yes, SyntaxError),
# the others may escape from its parsers.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError)
_UNREADABLE += (OverflowError, struct.error, zlib.error)


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


# An id or a label: text; `3` in YAML means "3".
Name = Annotated[
    str,
    BeforeValidator(_number_as_text),
    Field(min_length=1, max_length=MAX_NAME),
    WithJsonSchema({"type": ["string", "integer"], "minLength": 1, "maxLength": MAX_NAME}),
]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and whose they are, in canonical order.

    images: uint8 (count, channels, size, size). contributor: int64 (count,), index into `roster`.
    labels: int64 (count,), index into `label_names`, or None where the data have no labels.
    """

    images: np.ndarray
    contributor: np.ndarray
    labels: np.ndarray | None
    label_names: tuple[str, ...]
    roster: Roster

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, size, size) of an image."""
        return self.images.shape[1:]

    @cached_property
    def digest(self) -> str:
        """The sha256 that stands for all of it: the contributors' digests in order.

        Ids are not in it: a contributor who changes name and keeps the place changes no number.
        """
        digests = [contributor.digest for contributor in self.roster.contributors]
        shape = list(self.shape)
        return digest({"data": digests, "labels": list(self.label_names), "shape": shape})

    def subset(self, coalition: Coalition) -> Dataset:
        """Return the data of a coalition's members, with a roster of them alone.

        The result is the same whoever else is on the roster. `label_names` stay: a label keeps its
        index. ValueError if the coalition is one of another number of contributors.
        """
        if coalition.n != len(self.roster):
            raise ValueError(f"a coalition of {coalition.n}, but {len(self.roster)} contributors")
        index = np.full(coalition.n, -1)
        index[list(coalition.members)] = np.arange(coalition.size)
        kept = index[self.contributor] >= 0
        return Dataset(
            self.images[kept],
            index[self.contributor[kept]],
            None if self.labels is None else self.labels[kept],
            self.label_names,
            Roster(self.roster.members(coalition)),
        )


def natural(text: str) -> tuple[Any, ...]:
    """Return a sort key under which "2" comes before "10"."""
    pieces = re.split(r"([0-9]+)", text)
    # (length, digits) orders as the numbers do, for numerals of any length
    numbered = [
        (len(piece.lstrip("0")), piece.lstrip("0")) if i % 2 else (0, piece)
        for i, piece in enumerate(pieces)
    ]
    return (*numbered, (0, text))


def arrange(
    images: np.ndarray, contributors: Sequence[str], labels: Sequence[str] | None
) -> Dataset:
    """Return the Dataset of images (count, channels, size, size) in any order: sort and digest."""
    ids = sorted(set(contributors), key=natural)
    label_names = tuple(sorted(set(labels or ()), key=natural))
    content = [
        _content(image, labels[i] if labels is not None else None) for i, image in enumerate(images)
    ]
    place = {name: i for i, name in enumerate(ids)}
    order = sorted(range(len(images)), key=lambda i: (place[contributors[i]], content[i]))
    contributor = np.array([place[contributors[i]] for i in order], dtype=np.int64)
    given: list[list[str]] = [[] for _ in ids]
    for i, owner in zip(order, contributor, strict=True):
        given[owner].append(content[i])
    roster = Roster(tuple(map(_contributor, ids, given)))
    number = {name: i for i, name in enumerate(label_names)}
    indices = None if labels is None else np.array([number[labels[i]] for i in order], np.int64)
    return Dataset(images[order], contributor, indices, label_names, roster)


def _content(image: np.ndarray, label: str | None) -> str:
    head = digest({"shape": list(image.shape), "label": label})
    return hashlib.sha256(head.encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def _contributor(name: str, content: list[str]) -> Contributor:
    return Contributor(name, len(content), digest(content))


# -- the kinds of data ----------------------------------------------------------------------------


class _Chosen(Part):
    """Data of which a spec may take some contributors only."""

    contributors: tuple[Name, ...] | None = Field(
        default=None, min_length=2, description="Only these contributors; default: all there are."
    )

    @field_validator("contributors")
    @classmethod
    def _distinct(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        twice = sorted(name for name, times in Counter(names or ()).items() if times > 1)
        if twice:
            raise ValueError(f"{', '.join(twice[:10])} stands twice")
        return names

    def _unknown(self, ids: set[str]) -> list[Problem]:
        """Return a problem for every chosen contributor who has no image."""
        return [
            Problem(f"contributor {name!r} has no images", "data.contributors", _near(name, ids))
            for name in self.contributors or ()
            if name not in ids
        ]


class Digits(_Chosen):
    """The 1,797 handwritten digits that come with scikit-learn; contributors and labels = digits.

    8x8, one channel, 0..16 stretched to 0..255. The small analogue of the paper's CIFAR-20 job.
    """

    kind: Literal["digits"] = "digits"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, size, size), known before loading."""
        return (1, 8, 8)

    def fingerprint(self) -> str:
        """Return a cheap identity of what `load` would read."""
        version = importlib.metadata.version("scikit-learn")
        return digest([RECIPE_VERSION, self.recipe(), version])

    def load(self) -> Dataset:
        """Return the digits; DataError if a chosen contributor is not a digit."""
        from sklearn.datasets import load_digits

        intensities, target = load_digits(return_X_y=True)
        pixels = np.rint(np.asarray(intensities) * (255 / 16)).astype(np.uint8)
        names = [str(digit) for digit in np.asarray(target)]
        _refuse(self._unknown(set(names)))
        kept = [i for i, name in enumerate(names) if name in (self.contributors or names)]
        chosen = [names[i] for i in kept]
        return arrange(pixels.reshape(-1, *self.shape)[kept], chosen, chosen)


class ImageFolder(_Chosen):
    """A folder of images with a metadata file, as Hugging Face's ImageFolder lays it out.

    `metadata.csv` or `metadata.jsonl` in the folder has a column `file_name` (relative, forward
    slashes) and one that names the contributor. PNG, JPEG, WebP; EXIF orientation is applied,
    colour profiles are not; transparency is laid on white, 16 bits are cut to 8. The largest
    centred square is scaled to `size` (Lanczos, so scaling down does not alias): the shorter side
    becomes `size`, what sticks out is cut off.
    """

    kind: Literal["image_folder"]
    path: Annotated[str, UNHASHED] = Field(
        min_length=1, description="Folder, relative to the YAML, or its URL (s3://bucket/prefix)."
    )
    contributor: str = Field(min_length=1, description="Column that names the contributor.")
    label: str | None = Field(
        default=None,
        min_length=1,
        description="Column with the class; classifier properties need it.",
    )
    size: int = Field(ge=8, le=1024, description="Side of the square images, pixels.")
    channels: Literal[1, 3] = Field(default=3, description="3: colour, 1: grey.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, size, size), known before loading."""
        return (self.channels, self.size, self.size)

    def fingerprint(self) -> str:
        """Return a cheap identity of what `load` would read, without decoding an image.

        It moves when the metadata, the size or a time of a file they list, or the decoder changes.
        DataError where the folder or its metadata file is missing or not UTF-8.
        """
        version = importlib.metadata.version("pillow")
        if is_url(self.path):
            return digest([RECIPE_VERSION, self.recipe(), version, self.path, stamps(self.path)])
        table = _metadata_file(self.path)
        rows, _, _ = _read_table(table)
        names = [str(n) if isinstance(n := cells.get(FILE_NAME), str) else "" for _, cells in rows]
        listed = [None if _leads_out(name) else _stamp(table.parent / name) for name in names]
        content = digest(table.read_bytes())
        where = str(table.absolute())
        return digest([RECIPE_VERSION, self.recipe(), version, where, content, listed])

    def load(self) -> Dataset:
        """Decode everything. DataError lists all problems at once, each with file and line."""
        table = _metadata_file(self.path)
        rows, problems = self._rows(table)
        listed = {row.name for row in rows}
        if self.contributors is not None and rows:
            problems += self._unknown({row.contributor for row in rows})
            rows = [row for row in rows if row.contributor in self.contributors]
        images = np.empty((len(rows), *self.shape), np.uint8)
        small = 0
        for i, row in enumerate(rows):
            found = self._decode(table.parent / row.name, row.where)
            if isinstance(found, Problem):
                problems.append(found)
            else:
                images[i], enlarged = found
                small += enlarged
        if not problems:
            problems += self._too_few(rows, table)
        _refuse(problems)
        _warn_unlisted(table, listed)
        if small:
            hint = "choose a smaller data.size unless they are meant to be blurred"
            log.warn(f"{small} of {len(rows)} images are smaller than {self.size} pixels", hint)
        labels = [row.label for row in rows if row.label is not None]
        names = [row.contributor for row in rows]
        return arrange(images, names, labels if self.label is not None else None)

    def _rows(self, table: Path) -> tuple[list[_Row], list[Problem]]:
        """Return the good rows of the metadata, and what is wrong with the others."""
        wanted = [FILE_NAME, self.contributor, *([self.label] if self.label else [])]
        lines, columns, problems = _read_table(table)
        missing = [name for name in wanted if name not in columns]
        if lines and missing:
            hint = f"the columns are: {', '.join(columns)}"
            return [], problems + [Problem(f"no column {m!r}", str(table), hint) for m in missing]
        rows: list[_Row] = []
        first: dict[str, int] = {}
        for line, cells in lines:
            where = f"{table}:{line}"
            found = [_cell(cells, column, where) for column in wanted]
            bad = [item for item in found if isinstance(item, Problem)]
            texts = [item for item in found if isinstance(item, str)]
            if not isinstance(found[0], Problem):
                wrong_path = _wrong_path(table.parent, texts[0], where)
                bad += [wrong_path] if wrong_path else []
            problems += bad
            if bad:
                continue
            name = str(PurePosixPath(texts[0]))
            if name in first:
                hint = f"the first row is line {first[name]}; an image has one contributor"
                problems.append(Problem(f"{name} is listed twice", where, hint))
                continue
            first[name] = line
            rows.append(_Row(name, texts[1], texts[2] if self.label else None, where))
        return rows, problems

    def _decode(self, path: Path, where: str) -> tuple[np.ndarray, bool] | Problem:
        """Return an image (channels, size, size) and whether it had to be enlarged."""
        from PIL import Image, ImageOps

        place = f"{where}: {path.name}"
        hint = "is it a PNG, JPEG or WebP file, completely copied?"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF or palettes, which Pillow copes with
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                    refused = _refused(image, place)
                    if refused:
                        return refused
                    smallest = min(image.size)
                    image.draft(None, (2 * self.size, 2 * self.size))  # JPEG: decode no larger
                    upright = ImageOps.exif_transpose(image)
                    flat = _flat(upright).convert("L" if self.channels == 1 else "RGB")
                    square = (self.size, self.size)
                    fitted = ImageOps.fit(flat, square, Image.Resampling.LANCZOS)
            except (Image.DecompressionBombWarning, Image.DecompressionBombError):
                return _bomb(place)
            except _UNREADABLE as error:
                return Problem(f"not a readable image ({_first_line(error)})", place, hint)
        pixels = np.asarray(fitted, np.uint8).reshape(self.size, self.size, self.channels)
        return pixels.transpose(2, 0, 1), smallest < self.size

    def _too_few(self, rows: list[_Row], table: Path) -> list[Problem]:
        ids = sorted({row.contributor for row in rows})
        if not rows:
            return [Problem("lists no images", str(table), "add a row for every image")]
        if len(ids) == 1:
            what = f"only one contributor ({ids[0]!r}): there is nothing to divide"
            return [Problem(what, str(table), f"is {self.contributor!r} the right column?")]
        return []


Data = Annotated[Digits | ImageFolder, Field(discriminator="kind")]


# -- the metadata file ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    name: str
    contributor: str
    label: str | None
    where: str


def existing_folder(path: str, key: str, hint: str) -> Path:
    """Return the folder at `path`, the spec's `key`. DataError if there is or can be none."""
    folder = Path(path)
    try:
        if folder.is_dir():
            return folder
        what = "not a folder" if folder.exists() else "no such folder"
    except OSError as error:  # a name too long, a folder around it that may not be read
        what = f"cannot be a folder ({error.strerror})"
    raise DataError(what, f"{key}: {folder}", hint)


def _metadata_file(path: str) -> Path:
    if is_url(path):
        folder = fetch(path)
    else:
        folder = existing_folder(path, "data.path", "it is taken relative to the YAML's folder")
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) == 1:
        if not found[0].resolve().is_relative_to(folder.resolve()):
            what = f"{found[0].name} is a link that leads out of the folder"
            raise DataError(what, str(folder), "copy the file itself")
        if found[0].stat().st_size > MAX_TABLE:
            raise DataError(f"more than {MAX_TABLE:,} bytes", str(found[0]), "is it the metadata?")
        return found[0]
    if found:
        raise DataError("holds both metadata.csv and metadata.jsonl", str(folder), "remove one")
    below = sorted(path.parent for name in METADATA for path in folder.glob(f"*/{name}"))
    hint = (
        f"there is one in {below[0].name}/: set data.path to it"
        if below
        else f"one row per image, with a column {FILE_NAME} and one for the contributor"
    )
    raise DataError("holds no metadata.csv or metadata.jsonl", str(folder), hint)


def _read_table(table: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str], list[Problem]]:
    """Return (line, cells) of the rows that can be read, the columns, and what is wrong."""
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start})", str(table), "save it as UTF-8") from None
    return (_read_csv if table.suffix == ".csv" else _read_jsonl)(text, table)


def _read_csv(
    text: str, table: Path
) -> tuple[list[tuple[int, dict[str, Any]]], list[str], list[Problem]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[Problem] = []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        for cells in reader:
            where = f"{table}:{reader.line_num}"
            if cells and len(cells) != len(header):
                what = f"has {len(cells)} cells, wanted {len(header)}"
                problems.append(Problem(what, where, "quote a cell that holds a comma"))
            elif cells:
                rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        hint = "a quote that does not close spoils the rows after it"
        problems.append(Problem(f"not valid CSV: {error}", f"{table}:{reader.line_num}", hint))
    problems += [
        Problem(f"column {name!r} stands twice", f"{table}:1", "remove one of the two")
        for name in sorted(name for name, times in Counter(header).items() if times > 1)
    ]
    return rows, header, problems


def _read_jsonl(
    text: str, table: Path
) -> tuple[list[tuple[int, dict[str, Any]]], list[str], list[Problem]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[Problem] = []
    hint = "one JSON object a line"
    for line, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        try:
            cells = json.loads(row)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(f"not valid JSON: {error}", f"{table}:{line}", hint))
            continue
        if isinstance(cells, dict):
            rows.append((line, cells))
        else:
            problems.append(Problem("not a JSON object", f"{table}:{line}", hint))
    columns = sorted({name[:MAX_NAME] for _, cells in rows for name in cells})
    return rows, columns, problems


def _cell(cells: dict[str, Any], column: str, where: str) -> str | Problem:
    """Return a cell as text in Unicode's composed form, so that an id is written in one way."""
    value = cells.get(column)
    value = _number_as_text(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return Problem(f"{column} is empty", where, "every image needs one")
    if not isinstance(value, str):
        try:
            shown = json.dumps(value)[:60]
        except RecursionError:
            shown = "a deep nest"
        return Problem(f"{column} is {shown}, wanted text", where, "put it in quotes")
    if re.search(r"[\ud800-\udfff]", value):
        what = f"{column} is {ascii(value)[:60]}, which is not Unicode text"
        return Problem(what, where, "half a surrogate pair: write the character itself in UTF-8")
    if column == FILE_NAME:
        return value
    text = unicodedata.normalize("NFC", value.strip())
    if len(text) > MAX_NAME:
        what = f"{column} has {len(text)} characters, at most {MAX_NAME} are allowed"
        return Problem(what, where, f"is {column!r} the right column?")
    return text


def _leads_out(name: str) -> bool:
    """Return whether a file's name alone leads out of the folder it is relative to."""
    pure = PurePosixPath(name)
    return pure.is_absolute() or ".." in pure.parts


def _wrong_path(root: Path, name: str, where: str) -> Problem | None:
    inside = f"paths are relative to {root.name}/ and stay inside it"
    if "\\" in name or "\0" in name:
        return Problem(f"bad file name {name!r}", where, "write paths with forward slashes")
    if _leads_out(name):
        return Problem(f"{name} leads out of the folder", where, inside)
    path = root / name
    try:
        if not path.is_file():
            hint = f"{name} is not in {root}" + (": it is a folder" if path.is_dir() else "")
            return Problem("file is missing", f"{where}: {name}", hint)
        linked_out = not path.resolve().is_relative_to(root.resolve())
    except OSError as error:  # a name too long, a folder that may not be read
        return Problem(f"{name[:60]} cannot be read ({error.strerror})", where, inside)
    return (
        Problem(f"{name} is a link that leads out of the folder", where, inside)
        if linked_out
        else None
    )


def _stamp(path: Path) -> list[int] | None:
    """Return what changes when a file does, or None if there is no such file.

    Whoever changes a file may set its mtime back, but not its ctime.
    """
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _listing(root: Path) -> list[str]:
    """Return the image files below `root` as sorted relative paths."""
    found = []
    for folder, _, files in os.walk(root):
        base = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found += [
            str(base / name)
            for name in files
            if name.lower().endswith(SUFFIXES) and (root / base / name).is_file()
        ]
    return sorted(found)


def _warn_unlisted(table: Path, listed: set[str]) -> None:
    unlisted = [name for name in _listing(table.parent) if name not in listed]
    if unlisted:
        shown = ", ".join(unlisted[:3]) + (", ..." if len(unlisted) > 3 else "")
        hint = f"nobody is credited for them: list them in {table.name} or move them away"
        log.warn(f"{len(unlisted)} images are not listed and not used ({shown})", hint)


# -- one image ------------------------------------------------------------------------------------


def _refused(image: Any, place: str) -> Problem | None:
    """Return what speaks against an opened, not yet decoded image."""
    if image.width * image.height > MAX_PIXELS:
        return _bomb(place)
    if getattr(image, "n_frames", 1) > 1:
        what = f"an animation of {image.n_frames} frames"
        return Problem(what, place, "save the frame that is meant as a still image")
    return None


def _bomb(place: str) -> Problem:
    what = f"more than {MAX_PIXELS // 1_000_000} megapixels"
    return Problem(what, place, "scale it down; so large a file may be made to fill the memory")


def _flat(image: Any) -> Any:
    """Return an image of 8 bits a channel without transparency: laid on white, 16 bits cut to 8."""
    from PIL import Image

    if image.mode.startswith("I"):
        high = np.asarray(image, np.float64).clip(0, 65535) * (255 / 65535)
        return Image.fromarray(np.rint(high).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    top = image.convert("RGBA")
    white = Image.new("RGBA", top.size, "white")
    return Image.alpha_composite(white, top)


# -- what went wrong ------------------------------------------------------------------------------


def _near(name: str, ids: set[str]) -> str:
    close = difflib.get_close_matches(name, ids, n=1)
    known = ", ".join(sorted(ids, key=natural)[:20]) + (", ..." if len(ids) > 20 else "")
    return f"did you mean {close[0]!r}?" if close else f"there are: {known or 'none'}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def _refuse(problems: list[Problem]) -> None:
    """Raise a DataError of all problems, if there are any."""
    if len(problems) > MAX_PROBLEMS:
        more = Problem(f"and {len(problems) - MAX_PROBLEMS} more problems like these")
        problems = [*problems[:MAX_PROBLEMS], more]
    if problems:
        raise DataError.of(problems)
