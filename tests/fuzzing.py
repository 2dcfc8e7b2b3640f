"""Hostile inputs for everything that reads a file from outside, and what may come of them.

A target is a reader with seeds that it accepts (real specs, real store files). `hostile` makes
input number `index` of a target from a seed by damage to its structure, its bytes or both; it is a
function of both names, so any one can be made again. `attack` feeds inputs to the reader and counts
what comes of them: read, or refused with one of the exit codes that the target allows. Anything
else is a failure: another exception (the user would see a traceback), more than `SECONDS`, or more
memory than `BYTES`.
"""

from __future__ import annotations

import copy
import io
import json
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml
from conftest import TINY, work_through
from PIL import Image

from attr_batch import outlook, predecessor, results, spec, table
from attr_batch.data import ImageFolder
from attr_batch.errors import AttrBatchError
from attr_batch.instruments import LabelClassifier, PixelClusters
from attr_batch.job import Job
from attr_batch.ledger import seal, unseal
from attr_batch.models import WEIGHTS, DiffusersFolder, read_safetensors
from attr_batch.pruning import PruningPlan

SECONDS = 10.0  # an input that takes longer hangs
BYTES = 6 << 30  # of address space beside what the libraries have taken

# -- damage ---------------------------------------------------------------------------------------

NAMES = (
    *("../../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "\x00", "~root", "-rf"),
    *("\x1b[2J\x1b[31m", "\u202egnp", "=1+1", "<script>alert(1)</script>", "\ud800", "x" * 5000),
    *("nan", "1e400", "0x", "manifest.json", "sha256", "kind", "__class__", "🙂" * 50),
)
TOKENS = (
    *("&a ", "*a", "!!python/name:os.system ", "!!int ", "<<: ", "? ", "- ", "{", "[", "'", "\t"),
    *('"\\ud800"', "1:30:59", "0x" + "f" * 9000, "9" * 9000, "[" * 3000, "%YAML 9\n"),
)
NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 1e308, -1e308, 1e-320, 2**31, 2**63, 2**64, -(2**63), 10**30)
ODD = (None, True, False, [], {}, [[]], [None] * 300, {"": {}}, float("nan"), float("inf"))


def _deep(random: Random) -> Any:
    value: Any = 0
    for _ in range(random.choice((15, 50, 300))):
        value = [value] if random.random() < 0.5 else {"a": value}
    return value


def anything(random: Random) -> Any:
    """Return a JSON-able value of any type, likely one that some reader has not thought of."""
    kind = random.randrange(10)
    if kind < 4:
        return random.choice(NAMES)
    if kind < 7:
        return random.choice(NUMBERS)
    if kind < 9:
        return copy.deepcopy(random.choice(ODD))  # it is wounded in its turn
    return _deep(random)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of everything inside a tree, however deep it is."""
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            yield from ((node, key) for key in keys)
            left += [node[key] for key in keys]


def damaged_tree(tree: Any, random: Random) -> Any:
    """Return a copy of a JSON value with one to four wounds."""
    tree = json.loads(json.dumps(tree))
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        if not places or random.random() < 0.02:
            return anything(random)
        node, key = random.choice(places)
        other, theirs = random.choice(places)
        wound = random.randrange(9)
        try:
            if wound < 4:
                node[key] = anything(random)
            elif wound == 4:
                del node[key]
            elif wound == 5 and isinstance(node, dict):
                node[random.choice(NAMES)] = node.pop(key)
            elif wound == 6 and isinstance(node, list):
                node[key:key] = [copy.deepcopy(node[key]) for _ in range(random.choice((1, 2, 50)))]
            elif wound == 7:  # a number as text, text as a number
                node[key] = str(node[key]) if not isinstance(node[key], str) else len(node[key])
            else:
                node[key] = json.loads(json.dumps(other[theirs]))
        except (KeyError, IndexError, RecursionError):  # gone with an earlier wound; too deep
            continue
    return tree


def damaged_bytes(data: bytes, random: Random) -> bytes:
    """Return bytes with some flipped, cut, doubled, moved or made up."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5, 20))):
        at = random.randrange(len(data) + 1)
        size = random.choice((1, 2, 4, 8, 100))
        match random.randrange(6):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = random.randbytes(size)
            case 3:
                data[at:at] = data[at : at + size] * random.choice((1, 2, 200))
            case 4 if at < len(data):
                data[at] ^= 1 << random.randrange(8)
            case _:  # a length that cannot be
                data[at : at + size] = random.choice((b"\xff", b"\x00", b"\x7f", b"9")) * size
    return bytes(data)


def _encoded(tree: Any) -> bytes:
    return json.dumps(tree).encode()  # NaN included: JSON readers of Python take it


def like_json(data: bytes, random: Random) -> bytes:
    """Damage JSON as a tree, or as bytes."""
    if random.random() < 0.25:
        return damaged_bytes(data, random)
    return _encoded(damaged_tree(json.loads(data), random))


def like_lines(data: bytes, random: Random) -> bytes:
    """Damage one line of JSON lines, or their order and number, or all as bytes."""
    if random.random() < 0.25:
        return damaged_bytes(data, random)
    lines = data.splitlines()
    at = random.randrange(len(lines))
    match random.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(random.randrange(len(lines)), lines[at])
        case _:
            lines[at] = like_json(lines[at], random)
    return b"\n".join(lines) + b"\n"


def like_fact(data: bytes, random: Random) -> bytes:
    """Damage a sealed fact; two times of three it is sealed again, as a forger would."""
    if random.random() < 1 / 3:
        return like_json(data, random)
    fact = {name: value for name, value in json.loads(data).items() if name != "sha256"}
    forged = damaged_tree(fact, random)
    try:
        return seal(forged)
    except (ValueError, TypeError):  # NaN, half a surrogate pair, no object
        return _encoded(forged)


def like_safetensors(data: bytes, random: Random) -> bytes:
    """Damage the header of a safetensors file as JSON, its length, or all as bytes."""
    size = int.from_bytes(data[:8], "little")
    if random.random() < 0.3:
        return damaged_bytes(data, random)
    header, body = data[8 : 8 + size], data[8 + size :]
    header = like_json(header, random)
    length = len(header) if random.random() < 0.9 else random.choice((0, 1, 2**40, 2**63))
    return length.to_bytes(8, "little") + header + body[: random.choice((len(body), len(body), 10))]


def like_csv(data: bytes, random: Random) -> bytes:
    """Damage a table cell by cell, or as bytes."""
    if random.random() < 0.25:
        return damaged_bytes(data, random)
    rows = [line.split(",") for line in data.decode().splitlines()]
    for _ in range(random.choice((1, 1, 3))):
        row = random.choice(rows)
        at = random.randrange(len(row))
        match random.randrange(6):
            case 0:
                del row[at]
            case 1:
                row.insert(at, row[at])
            case 2:
                rows.insert(random.randrange(len(rows)), list(row))
            case 3 if len(rows) > 1:
                rows.remove(row)
            case _:
                made = str(anything(random))[:20_000]
                row[at] = random.choice((made, f'"{made}"', f'"{made}', row[at] * 500))
            # a row may be empty now
        rows = [row or [""] for row in rows]
    return "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass")


def like_yaml(data: bytes, random: Random) -> bytes:
    """Damage a spec as a tree, its text token by token, or as bytes."""
    way = random.random()
    if way < 0.15:
        return damaged_bytes(data, random)
    if way < 0.35:
        text = data.decode()
        at = random.randrange(len(text))
        token = random.choice(TOKENS)
        return (text[:at] + token + text[at:]).encode()
    tree = damaged_tree(yaml.safe_load(data), random)
    return json.dumps(tree).encode() if way < 0.7 else yaml.safe_dump(tree).encode()


# -- targets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Something that reads files from outside.

    `seeds` are inputs it accepts, `damage` spoils one, `read` reads it; `codes` are the exit codes
    with which it may refuse (0: it reads it). `share` is its part of a long run.
    """

    name: str
    share: float
    codes: frozenset[int]
    seeds: Sequence[bytes]
    damage: Callable[[bytes, Random], bytes]
    read: Callable[[bytes], object]


def hostile(target: Target, index: int) -> bytes:
    """Return input number `index` of a target: one of the seeds, damaged."""
    random = Random(f"{target.name} {index}")
    seed = random.choice(target.seeds)
    try:
        return target.damage(seed, random)
    except (RecursionError, ValueError, MemoryError):  # too deep or too large to write
        return damaged_bytes(seed, random)


@dataclass
class Outcome:
    """What came of a target's inputs."""

    inputs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, -1)  # seconds, index
    failures: list[tuple[int, str]] = field(default_factory=list)  # index, what happened


class _TooSlow(BaseException):
    """Not an Exception, so that no reader can swallow it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let no more than `BYTES` be taken within: a reader that wants more gets a MemoryError."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attack(target: Target, indices: range) -> Outcome:
    """Feed inputs to a target."""
    outcome = Outcome()
    with bounded_memory(), redirect_stderr(io.StringIO()):
        for index in indices:
            data = hostile(target, index)
            started = time.perf_counter()
            try:
                with within(SECONDS):
                    target.read(data)
                what, code = "read", 0
            except AttrBatchError as error:
                what, code = f"refused with {error.exit_code}", error.exit_code
                _ = str(error).encode("utf-8", "backslashreplace")
            except (Exception, _TooSlow) as error:
                what, code = "failed", None
                text = traceback.format_exc(limit=-6)
                outcome.failures.append((index, f"{type(error).__name__}\n{text}"))
            spent = time.perf_counter() - started
            if code is not None and code not in target.codes:
                outcome.failures.append((index, f"{what}, allowed {sorted(target.codes)}"))
            outcome.inputs += 1
            outcome.counts[what] += 1
            outcome.seconds += spent
            outcome.slowest = max(outcome.slowest, (spent, index))
    return outcome


def command_line(place: Range, count: int) -> Outcome:
    """Feed `count` inputs to the real command line, in turn to every command of `Range`."""
    outcome = Outcome()
    commands = list(place.commands())
    for index in range(count):
        target, path, arguments = commands[index % len(commands)]
        whole = path.read_bytes() if path.exists() else None
        path.write_bytes(hostile(target, 10**6 + index))
        started = time.perf_counter()
        program = [sys.executable, "-m", "attr_batch.cli", *arguments]
        try:
            ended = subprocess.run(program, capture_output=True, timeout=120)
            code, said = ended.returncode, ended.stderr.decode(errors="replace")
        except subprocess.TimeoutExpired:
            code, said = -1, "more than 120 s"
        finally:
            path.unlink()
            if whole is not None:
                path.write_bytes(whole)
        if code not in (0, 64, 65, 70, 73) or "Traceback" in said:
            outcome.failures.append((index, f"{arguments[0]}: {code}\n{said[-2000:]}"))
        spent = time.perf_counter() - started
        outcome.inputs += 1
        outcome.counts[f"{'read' if code == 0 else f'refused with {code}'}"] += 1
        outcome.seconds += spent
        outcome.slowest = max(outcome.slowest, (spent, index))
    return outcome


ROOT = Path(__file__).parent.parent


class Range:
    """Everything there is to attack, over a folder `scratch` that is its own.

    One tiny job is done there, so that store files are real.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.spec = spec.validate(
            {
                **TINY,
                "store": str(scratch / "store"),
                "properties": [{"kind": "cluster_entropy"}, {"kind": "class_share", "label": "3"}],
                "sampling": {**TINY["sampling"], "keep": "all"},
            }
        )
        self.job = Job(self.spec)
        work_through(self.job)
        results.publish(self.job)
        self.key = self.job.plan[0].key
        self.job.ledger.beat(self.key, "coalition 01")
        self.job.ledger.record_failure(self.key, RuntimeError("was"), "session", "coalition 01")

    @cached_property
    def targets(self) -> list[Target]:
        """All there is to attack."""
        return [*self._texts(), *self._images(), *self._models(), *self._facts(), *self._store()]

    # -- what users give ----------------------------------------------------------------------

    def _texts(self) -> Iterator[Target]:
        place = self.scratch / "text"
        examples = [p.read_bytes() for p in sorted(ROOT.glob("examples/*/*.yaml"))]
        yield Target("spec", 14, _codes(64), examples, like_yaml, self._written(place, spec.load))
        yield Target(
            "--set",
            3,
            _codes(64),
            [b"estimator.budget=24", b"sampling={solver: unipc}", b"properties.0.name=other"],
            damaged_bytes,
            lambda data: spec.load(
                ROOT / "examples/digits/job.yaml", [data.decode("utf-8", "surrogateescape")]
            ),
        )
        rows = ["coalition,value,pair,batch,role,replicate,weight"]
        rows += [f"{i:04b},{i / 7},{min(i, 15 - i)},0,,0,1" for i in range(16)]
        yield Target(
            "values.csv",
            14,
            _codes(64, 65),
            ["\n".join(rows).encode(), b"coalition,value\n0000,1\n1111,2\n0x3,1.5\n0x5,1\n"],
            like_csv,
            self._written(place, table.read_values),
        )
        folder = self.scratch / "images"
        folder.mkdir()
        for i, color in enumerate(("red", "green", "blue", "white")):
            Image.new("RGB", (8, 8), color).save(folder / f"{i}.png")
        (folder / "inside").mkdir()
        lines = [{"file_name": f"{i}.png", "artist": f"a{i % 2}", "style": "x"} for i in range(4)]
        table_csv = "file_name,artist,style\n" + "".join(f"{i}.png,a{i % 2},x\n" for i in range(4))
        part = ImageFolder(
            kind="image_folder", path=str(folder), contributor="artist", label="style", size=8
        )

        def load(name: str) -> Callable[[bytes], None]:
            def read(data: bytes) -> None:
                for other in ("metadata.csv", "metadata.jsonl"):
                    (folder / other).unlink(missing_ok=True)
                (folder / name).write_bytes(data)
                part.fingerprint()
                part.load()

            return read

        jsonl = b"\n".join(map(_encoded, lines))
        yield Target(
            "metadata.csv", 8, _codes(65), [table_csv.encode()], like_csv, load("metadata.csv")
        )
        yield Target("metadata.jsonl", 8, _codes(65), [jsonl], like_lines, load("metadata.jsonl"))

    def _images(self) -> Iterator[Target]:
        folder = self.scratch / "pictures"
        folder.mkdir()
        (folder / "metadata.csv").write_text("file_name,artist\n0.png,a\n1.png,b\n")
        pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
        picture = Image.fromarray(pixels)
        picture.save(folder / "0.png")
        part = ImageFolder(kind="image_folder", path=str(folder), contributor="artist", size=8)
        seeds = [self.job.ledger.store.read(self.job.ledger.grid_name(self.key)) or b""]
        exif = Image.Exif()
        exif[0x0112] = 6
        for kind, options in (("PNG", {}), ("JPEG", {"exif": exif}), ("WEBP", {}), ("WEBP", {})):
            for mode in ("L", "RGB", "P", "RGBA", "I;16"):
                if (kind == "PNG" or mode in ("L", "RGB")) and mode != "I;16":
                    file = io.BytesIO()
                    picture.convert(mode).save(file, kind, **options)
                    seeds.append(file.getvalue())

        def read(data: bytes) -> None:
            (folder / "1.png").write_bytes(data)
            part.load()

        yield Target("image", 14, _codes(65), seeds, damaged_bytes, read)

    def _models(self) -> Iterator[Target]:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        folder = self.scratch / "model"
        self.spec.model.build(1, 8, 0).save_pretrained(folder)
        DDPMScheduler().save_pretrained(folder)
        part = DiffusersFolder(path=str(folder))

        def within(name: str, also: Callable[[], object]) -> Callable[[bytes], None]:
            whole = (folder / name).read_bytes()

            def read(data: bytes) -> None:
                (folder / name).write_bytes(data)
                try:
                    part.check(1, 8)
                    also()
                finally:
                    (folder / name).write_bytes(whole)

            return read

        def build() -> None:
            part.initial(1, 8, 0)

        for name, damage, share in (
            ("config.json", like_json, 1.5),
            ("scheduler_config.json", like_json, 1),
            (WEIGHTS, like_safetensors, 1.5),
        ):
            seeds = [(folder / name).read_bytes()]
            yield Target(f"model {name}", share, _codes(65), seeds, damage, within(name, build))

    # -- the store ----------------------------------------------------------------------------

    def _facts(self) -> Iterator[Target]:
        root = self.job.ledger.store.root
        facts = [p.read_bytes() for p in sorted(root.glob("runs/*/*.json"))[:20]]
        yield Target("sealed fact", 22, _codes(73), facts, like_fact, lambda d: unseal(d, "here"))
        (pruned,) = root.glob("bases/*/pruning.json")
        plan = [pruned.read_bytes()]
        yield Target(
            "pruning plan",
            3,
            _codes(65),
            plan,
            lambda data, random: _encoded(damaged_tree(json.loads(data), random)),
            lambda data: PruningPlan.from_json(json.loads(data)),
        )
        weights = [next(root.glob("bases/*/dense.safetensors")).read_bytes()]
        place = self.scratch / "tensors"
        reader = self._written(place, read_safetensors)
        yield Target("safetensors", 6, _codes(65), weights, like_safetensors, reader)

    def _store(self) -> Iterator[Target]:
        """Files of a store in their place, each read by all that reads it."""
        root, job = self.job.ledger.store.root, self.job
        run = f"runs/{self.key}"
        value = job.ledger.value_name(
            self.key, "cluster_entropy", job.property_digest(self.spec.properties[0])
        )
        report = job.report_name
        plan = next(root.glob("plans/*")).relative_to(root).as_posix()
        bases = [("bases", job.dense_id), ("bases", job.pruned_id)]
        fitted = [("properties", i) for i in job.instruments]
        sums = [("properties", i) for i in job.statistics]
        card = next(root.glob("work/data/*")).relative_to(root).as_posix()
        heart, failed = f"work/heartbeats/{self.key}.json", f"failures/{self.key}.json"
        # 73: damaged; 70: incomplete, as after `diverged`.
        for name, damage, share, codes in (
            (f"specs/{job.spec_digest}.json", like_fact, 0.3, _codes(73)),
            (plan, like_lines, 0.3, _codes(73)),
            (value, like_fact, 0.3, _codes(73)),
            (f"{run}/derivation.json", like_fact, 0.3, _codes(73)),
            (f"{run}/diverged.json", like_fact, 0.14, _codes(70, 73)),
            (f"{run}/samples.safetensors", like_safetensors, 0.14, _codes(73)),
            *(
                (f"{f}/{i}/manifest.json", like_fact, 0.14, _codes(73))
                for f, i in (*bases, *fitted)
            ),
            *((f"{f}/{i}/manifest.json", like_fact, 0.14, _codes(73)) for f, i in sums[:1]),
            *(
                (f"{f}/{i}/card.json", like_json, 0.14, _codes(65, 73))
                for f, i in (*bases, *fitted)
            ),
            *((f"{f}/{i}/sums.json", like_json, 0.14, _codes(73)) for f, i in sums[:1]),
            (f"{report}/attribution.json", like_json, 0.14, _codes(73)),
            (f"{report}/cost.json", like_json, 0.14, _codes(73)),
            (card, like_fact, 0.14, _codes(64, 65, 70, 73)),  # it may tell of other data
            (heart, like_json, 0.14, _codes()),
            (failed, like_json, 0.14, _codes()),
        ):
            whole = (
                seal({"key": self.key, "reason": "was", "next": job.plan[1].key})
                if name.endswith("diverged.json")
                else (root / name).read_bytes()
            )
            title = "store " + re.sub("[0-9a-f]{64}", lambda m: m[0][:4], name)
            yield Target(title, share, codes, [whole], damage, self._in_place(name))

    def _in_place(self, name: str) -> Callable[[bytes], None]:
        """Return a reader that puts an input into the store and does all that reads it."""
        path = self.job.ledger.store.root / name
        keep = path.read_bytes() if path.exists() else None
        family = name.partition("/")[0]

        def read(data: bytes) -> None:
            path.write_bytes(data)
            try:
                job = Job(self.spec)
                job.ledger.bad_files()
                for reader in self._readers(job, family):
                    reader()
            finally:
                path.unlink()
                if keep is not None:
                    path.write_bytes(keep)

        return read

    def _readers(self, job: Job, family: str) -> Sequence[Callable[[], object]]:
        ledger = job.ledger
        match family:
            case "specs" | "plans":
                roster, spec_digest = job.card.roster, job.spec_digest[:8]
                found = partial(predecessor.find, ledger, spec_digest, roster, job.numerics)
                return [lambda: outlook.reasons(job), lambda: ledger.unneeded([]), found]
            case "bases" | "properties":
                return [lambda: self._things(job), lambda: outlook.status(job)]
            case "runs":
                return [
                    lambda: ledger.samples(self.key),
                    lambda: ledger.unneeded([]),
                    lambda: results.publish(job),
                ]
            case "reports":
                return [lambda: results.publish(job), lambda: results.damaged_report(job)]
        return [job.check, lambda: outlook.status_text(outlook.status(job))]

    def _things(self, job: Job) -> None:
        for family, thing_id in job.things:
            folder, _ = job.ledger.verified_thing(family, thing_id)
            if job.ledger.store.exists(f"{family}/{thing_id}/card.json"):
                job.ledger.card(family, thing_id)
            instrument = job.instruments.get(thing_id)
            if isinstance(instrument, LabelClassifier | PixelClusters):
                instrument.load(folder)

    # -- the command line ---------------------------------------------------------------------

    def commands(self) -> Iterator[tuple[Target, Path, list[str]]]:
        """Yield a target, the file its inputs go to, and a command that reads it."""
        by_name = {target.name.split("/")[0]: target for target in self.targets}
        job = self.scratch / "job.yaml"
        job.write_text(yaml.safe_dump(self.spec.model_dump(mode="json")))
        root = self.job.ledger.store.root
        plan = next(root.glob("plans/*"))
        derivation = root / self.job.ledger.derivation_name(self.key)
        spoilt, values = self.scratch / "spoilt.yaml", self.scratch / "values.csv"
        for command in ("check", "plan", "run"):
            yield by_name["spec"], spoilt, [command, str(spoilt)]
        yield by_name["values.csv"], values, ["attribute", str(values), "--json"]
        for command in ("status", "report", "repair"):
            more = ["--dry-run"] if command == "repair" else []
            yield by_name["store runs"], derivation, [command, str(job), *more]
        for command in (["plan", str(job)], ["gc", str(root)], ["repair", str(job), "--dry-run"]):
            yield by_name["store plans"], plan, command

    @staticmethod
    def _written(place: Path, read: Callable[[Path], object]) -> Callable[[bytes], None]:
        def written(data: bytes) -> None:
            place.write_bytes(data)
            read(place)

        return written


def _codes(*codes: int) -> frozenset[int]:
    return frozenset({0, *codes})
