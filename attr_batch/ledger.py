"""The ledger: one folder of immutable facts, each named by what it depends on.

    specs/<spec digest>.json            what was asked, resolved
    plans/<spec digest>-<numerics>.jsonl  which coalition is evaluated under which run key
    bases/<id>/  properties/<id>/       trained or fitted once; manifest.json holds their digests
    runs/<key>/<property>-<digest>.json one measured utility: it exists <=> it is done
    runs/<key>/derivation.json, grid.png, samples.safetensors, diverged.json
    reports/<spec digest>/              derived from the above, can be made again at any time
    work/  failures/                    checkpoints, heartbeats, what went wrong: the mutable places

A fact is published once: written under a temporary name in the same folder, flushed to disk, then
linked if absent, so that readers see all of it or nothing and the first published fact stays. A
crash at any moment leaves at most a temporary file. This is the only module that knows file names.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attr_batch.errors import AttrBatchError, DataError, LedgerConflict, StoreError
from attr_batch.log import TICK_SECONDS
from attr_batch.recipe import canonical, digest, file_digest

if TYPE_CHECKING:
    import numpy as np

ALIVE_SECONDS = 3 * TICK_SECONDS
CLAIM_SECONDS = 0.02
_DIGEST = re.compile("[0-9a-f]{64}")
_TOKEN = secrets.token_hex(8)  # of this process
REPAIR_HINT = "`attr-batch repair JOB.yaml` puts such files aside; the next run makes them again"


def seal(fact: dict[str, Any]) -> bytes:
    """Return a fact as readable JSON that carries the sha256 of its own content."""
    sealed = {**fact, "sha256": digest(fact)}
    text = json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Return the fact in sealed bytes. LedgerConflict when it is torn, foreign or altered."""
    try:
        fact = json.loads(data)
        claimed = fact.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise LedgerConflict("torn or foreign file", where, REPAIR_HINT) from None
    try:
        actual = digest(fact)
    except (ValueError, RecursionError):
        actual = None
    if actual != claimed:
        raise LedgerConflict("altered: its content does not match its sha256", where, REPAIR_HINT)
    return fact


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about `path` into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise DataError("the store may not be written or read", str(path)) from error
        what = error.strerror or str(error)
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise LedgerConflict(what, str(path), REPAIR_HINT) from error
        hint = "free some space (`attr-batch gc STORE`), or mount it writable, and run again"
        raise StoreError(what, str(path), hint) from error


class Store:
    """A folder with atomic create-if-absent. Names are relative, with forward slashes."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, name: str) -> Path:
        """Return the path of a name. ValueError if it would leave the store."""
        parts = name.split("/")
        if name.startswith("/") or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{name!r} is not a name inside the store")
        return self.root.joinpath(*parts)

    def read(self, name: str) -> bytes | None:
        """Return the bytes under `name`, or None."""
        path = self.path(name)
        with _explained(path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def exists(self, name: str) -> bool:
        """Return whether something is published under `name`."""
        return self.path(name).exists()

    def publish(self, name: str, data: bytes) -> bool:
        """Create `name` with `data` unless it exists; True if this call created it."""
        path = self.path(name)
        with self._temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            _sync_folder(path.parent)
            return True

    def replace(self, name: str, data: bytes) -> None:
        """Create or replace a mutable file: readers see the old bytes or the new ones."""
        path = self.path(name)
        with self._temporary(path, data) as temporary:
            temporary.replace(path)

    def publish_folder(self, source: Path, name: str) -> bool:
        """Move the finished folder `source` (on the same disk) to `name` unless that exists."""
        path = self.path(name)
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for file in source.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            _sync_folder(source)
            try:
                source.rename(path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                if not (path / "manifest.json").exists():
                    raise LedgerConflict("has no manifest", str(path), REPAIR_HINT) from None
                shutil.rmtree(source, ignore_errors=True)
                return False
            _sync_folder(path.parent)
            return True

    def delete(self, name: str) -> None:
        """Remove a mutable file if it is there."""
        path = self.path(name)
        with _explained(path):
            path.unlink(missing_ok=True)

    def children(self, name: str) -> list[str]:
        """Return the sorted names of what lies in folder `name`; none if there is no folder."""
        path = self.path(name)
        with _explained(path):
            try:
                return sorted(entry.name for entry in os.scandir(path))
            except FileNotFoundError:
                return []

    @contextlib.contextmanager
    def _temporary(self, path: Path, data: bytes) -> Iterator[Path]:
        temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        with _explained(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("xb") as handle:
                    handle.write(data)
                    handle.flush()
                    os.fsync(handle.fileno())
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_temporary(name: str) -> bool:
    """Return whether `name` is what a killed writer may have left behind."""
    return name.startswith(".") and name.endswith(".tmp")


def safe_name(text: str) -> str:
    """Return `text` with everything but letters, digits, `_`, `-` and `.` replaced."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "_" for c in text)


def _plan_lines(data: bytes, where: str) -> list[dict[str, Any]]:
    """Return a plan's lines. LedgerConflict if they are not those of a plan."""
    try:
        head, *lines = [json.loads(line) for line in data.splitlines()]
        _ = head["spec"], head["numerics"], head["bases"], head["properties"]
        _ = [line["key"] for line in lines]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LedgerConflict("torn or foreign file", where, REPAIR_HINT) from None
    return [head, *lines]


@dataclass(frozen=True)
class Heartbeat:
    """Who works on a thing now, and how far it is. `name` is a run key, base or property id."""

    name: str
    phase: str
    done: int
    total: int
    host: str
    pid: int
    process_start: str
    token: str
    time: float

    @property
    def alive(self) -> bool:
        """Younger than three ticks; on this host also: its process still exists."""
        if self.host == _host() and _process_start(self.pid) != self.process_start:
            return False
        return time.time() - self.time < ALIVE_SECONDS

    @property
    def mine(self) -> bool:
        """Whether this very process wrote it."""
        return self.token == _TOKEN


def _host() -> str:
    """Return the host and its process namespace: containers may share a host name."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _process_start(pid: int) -> str:
    """Return the kernel's start time of a process (a pid alone may be reused), '' if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


class Ledger:
    """The store's file names and what each file means."""

    def __init__(self, root: str | Path) -> None:
        self.store = Store(root)

    def __str__(self) -> str:
        return str(self.store.root)

    # -- facts ------------------------------------------------------------------------------------

    def fact(self, name: str) -> dict[str, Any] | None:
        """Return the sealed fact under `name`, or None. LedgerConflict if it is damaged."""
        data = self.store.read(name)
        return None if data is None else unseal(data, str(self.store.path(name)))

    def publish_fact(self, name: str, fact: dict[str, Any]) -> dict[str, Any]:
        """Publish a fact unless there is one; return the one that stays."""
        if self.store.publish(name, seal(fact)):
            return fact
        kept = self.fact(name)
        if kept is None:
            raise LedgerConflict("vanished while it was read", str(self.store.path(name)))
        return kept

    def publish_same(self, name: str, data: bytes) -> None:
        """Publish bytes that are a pure function of `name`. LedgerConflict if others are there."""
        if not self.store.publish(name, data) and self.store.read(name) != data:
            raise LedgerConflict(
                "exists with other content", str(self.store.path(name)), REPAIR_HINT
            )

    # -- specs and plans --------------------------------------------------------------------------

    MARKER = "attr-batch-store.json"

    def mark(self) -> None:
        """Mark the folder as a store, so that `gc` touches no other."""
        self.store.publish(self.MARKER, seal({"format": 1}))

    @property
    def marked(self) -> bool:
        """Whether the folder is a store."""
        return self.store.exists(self.MARKER)

    def spec_name(self, spec_digest: str) -> str:
        """Return the name of a resolved spec."""
        return f"specs/{spec_digest}.json"

    def plan_name(self, spec_digest: str, content: bytes) -> str:
        """Return the name of a plan: it depends on spec, numerics class and program."""
        return f"plans/{spec_digest}-{digest(content)[:12]}.jsonl"

    def specs(self) -> dict[str, dict[str, Any]]:
        """Return every readable resolved spec by its digest."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.store.children("specs"):
            if name.endswith(".json") and not is_temporary(name):
                with contextlib.suppress(LedgerConflict):
                    spec = self.fact(f"specs/{name}")
                    if spec is not None:
                        found[name.removesuffix(".json")] = spec
        return found

    def plans(self) -> dict[str, list[dict[str, Any]]]:
        """Return every plan's lines (the first is its head) by file name.

        LedgerConflict if one is damaged: what it needs cannot be known.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for name in self.store.children("plans"):
            if not is_temporary(name):
                data = self.store.read(f"plans/{name}") or b""
                found[name] = _plan_lines(data, str(self.store.path(f"plans/{name}")))
        return found

    # -- things made once: bases and fitted properties --------------------------------------------

    def thing(self, family: str, thing_id: str) -> Path | None:
        """Return the folder of a base or property (`family` bases|properties), or None."""
        name = f"{family}/{thing_id}"
        return self.store.path(name) if self.store.exists(f"{name}/manifest.json") else None

    def verified_thing(self, family: str, thing_id: str) -> tuple[Path, str]:
        """Return the folder and its manifest's digest after checking every file's sha256."""
        name = f"{family}/{thing_id}"
        manifest = self.fact(f"{name}/manifest.json")
        folder = self.store.path(name)
        if manifest is None:
            raise LedgerConflict("is not there", str(folder), REPAIR_HINT)
        for file, sha256 in manifest["files"].items():
            if not (folder / file).is_file() or file_digest(folder / file) != sha256:
                raise LedgerConflict("missing or altered", str(folder / file), REPAIR_HINT)
        return folder, digest(manifest)

    def card(self, family: str, thing_id: str) -> dict[str, Any]:
        """Return the card.json of a thing: what it is, as its maker said."""
        path = self.store.path(f"{family}/{thing_id}/card.json")
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError):
            raise LedgerConflict("missing or torn", str(path), REPAIR_HINT) from None

    def publish_thing(
        self, family: str, thing_id: str, source: Path, inputs: Any, seconds: float
    ) -> None:
        """Publish a finished folder with a manifest: files' digests, inputs, seconds it took."""
        for leftover in source.glob(".*"):  # of a killed maker
            leftover.unlink()
        files = {file.name: file_digest(file) for file in sorted(source.iterdir())}
        files.pop("manifest.json", None)
        manifest = {"files": files, "inputs": inputs, "seconds": seconds}
        (source / "manifest.json").write_bytes(seal(manifest))
        self.store.publish_folder(source, f"{family}/{thing_id}")

    # -- runs -------------------------------------------------------------------------------------

    def value_name(self, key: str, prop: str, prop_digest: str) -> str:
        """Return the name of a measured value: run key, property name, property digest."""
        return f"runs/{key}/{safe_name(prop)}-{prop_digest[:12]}.json"

    def value(self, key: str, prop: str, prop_digest: str) -> dict[str, Any] | None:
        """Return a measured value's fact, or None. LedgerConflict if damaged or for another run."""
        name = self.value_name(key, prop, prop_digest)
        fact = self.fact(name)
        if fact is not None and (fact.get("key"), fact.get("property_digest")) != (
            key,
            prop_digest,
        ):
            raise LedgerConflict("belongs to another run", str(self.store.path(name)), REPAIR_HINT)
        return fact

    def samples(self, key: str) -> np.ndarray | None:
        """Return a run's kept samples, uint8 (images, channels, size, size), or None.

        LedgerConflict if they are not those that the run drew.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        name = self.samples_name(key)
        data, derivation = self.store.read(name), self.fact(self.derivation_name(key))
        if data is None or derivation is None:
            return None
        try:
            samples = load(data)["samples"]
            if digest(samples.tobytes()) == derivation["samples_sha256"]:
                return samples
        except (SafetensorError, KeyError):
            pass
        raise LedgerConflict("torn or altered", str(self.store.path(name)), REPAIR_HINT)

    def has_value(self, key: str, prop: str, prop_digest: str) -> bool:
        """Return whether a value is published (its digest is checked when it is read)."""
        return self.store.exists(self.value_name(key, prop, prop_digest))

    def derivation_name(self, key: str) -> str:
        """Return the name of the fact how a run's samples came to be: recipe, seconds, digests."""
        return f"runs/{key}/derivation.json"

    def samples_name(self, key: str) -> str:
        """Return the name of a run's kept samples."""
        return f"runs/{key}/samples.safetensors"

    def grid_name(self, key: str) -> str:
        """Return the name of a run's picture of some samples."""
        return f"runs/{key}/grid.png"

    def diverged_name(self, key: str) -> str:
        """Return the name of the fact that a run diverges each time and was given up."""
        return f"runs/{key}/diverged.json"

    # -- mutable: work and failures ---------------------------------------------------------------

    def work(self, name: str) -> Path:
        """Return a path under work/ whose folder exists."""
        path = self.store.path(f"work/{name}")
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def beat(self, name: str, phase: str, done: int = 0, total: int = 0) -> None:
        """Say that this process works on `name`."""
        pid = os.getpid()
        beat = {
            "name": name,
            "phase": phase,
            "done": done,
            "total": total,
            "host": _host(),
            "pid": pid,
            "process_start": _process_start(pid),
            "token": _TOKEN,
            "time": time.time(),
        }
        self.store.replace(f"work/heartbeats/{name}.json", canonical(beat))

    def claim(self, name: str, phase: str) -> bool:
        """Begin to work on `name` unless another live process does; True if it is ours.

        Of two that begin at the same moment the later writer keeps it. A lost race costs double
        work of a run, whose results are published once whoever is first; what must not be made
        twice at the same time also takes `lock`.
        """
        if self.heartbeat(name) is not None:
            return False
        self.beat(name, phase)
        time.sleep(CLAIM_SECONDS)
        holder = self.heartbeat(name)
        return holder is not None and holder.mine

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Hold `name` alone on this file system while the block runs; False: another has it.

        The kernel lets go of it when the process ends, however it ends.
        """
        path = self.work(f"locks/{name}")
        with _explained(path), path.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def rest(self, name: str) -> None:
        """Say that nobody works on `name` any more."""
        self.store.delete(f"work/heartbeats/{name}.json")

    def heartbeat(self, name: str) -> Heartbeat | None:
        """Return the live heartbeat of `name`, or None."""
        data = self.store.read(f"work/heartbeats/{name}.json")
        try:
            beat = None if data is None else Heartbeat(**json.loads(data))
            return beat if beat is not None and beat.alive else None
        except (ValueError, TypeError):
            return None

    def heartbeats(self) -> list[str]:
        """Return the names of all heartbeats, live or not."""
        children = self.store.children("work/heartbeats")
        return [name.removesuffix(".json") for name in children if not is_temporary(name)]

    def record_failure(self, key: str, error: BaseException, session: str, about: str) -> None:
        """Note that an evaluation failed; the next run tries it again."""
        failure = {
            "key": key,
            "about": about,
            "session": session,
            "time": time.time(),
            "error": type(error).__name__,
            "exit_code": error.exit_code if isinstance(error, AttrBatchError) else 1,
            "message": str(error) or repr(error),
        }
        self.store.replace(f"failures/{key}.json", canonical(failure))

    def failure(self, key: str) -> dict[str, Any] | None:
        """Return what went wrong the last time, or None."""
        data = self.store.read(f"failures/{key}.json")
        try:
            failure = None if data is None else json.loads(data)
            return failure if isinstance(failure, dict) else None
        except ValueError:
            return None

    def forgive(self, key: str) -> None:
        """Forget a failure: the evaluation succeeded."""
        self.store.delete(f"failures/{key}.json")

    # -- upkeep -----------------------------------------------------------------------------------

    def bad_files(self) -> list[tuple[str, str]]:
        """Return (name, reason) of every file that is no intact fact where a fact should be."""
        bad: list[tuple[str, str]] = []
        for family in ("specs", "runs", "bases", "properties", "plans"):
            path = self.store.path(family)
            if path.exists() and not path.is_dir():
                bad.append((family, "foreign file"))
                continue
            for child in self.store.children(family):
                bad += self._judge(family, child)
        return bad

    def _judge(self, family: str, child: str) -> Iterator[tuple[str, str]] | list[tuple[str, str]]:
        name = f"{family}/{child}"
        if is_temporary(child):
            return []
        if family in ("specs", "plans"):
            return self._judge_file(name, known=child.endswith((".json", ".jsonl")))
        if not self.store.path(name).is_dir():
            return [(name, "foreign file")]
        if family == "runs":
            known = (".json", ".png", "samples.safetensors")
            return [
                problem
                for file in self.store.children(name)
                if not is_temporary(file)
                for problem in self._judge_file(f"{name}/{file}", known=file.endswith(known))
            ]
        try:
            self.verified_thing(family, child)
        except LedgerConflict as conflict:
            return [(name, conflict.problems[0].what)]
        return []

    def _judge_file(self, name: str, known: bool) -> list[tuple[str, str]]:
        if not known or not self.store.path(name).is_file():
            return [(name, "foreign file")]
        try:
            if name.endswith(".json"):
                self.fact(name)
            elif name.endswith(".jsonl"):
                data = self.store.read(name) or b""
                head, *_ = _plan_lines(data, name)
                if name != self.plan_name(str(head["spec"]), data):
                    return [(name, "altered")]
            elif name.endswith(".safetensors"):
                self.samples(name.split("/")[1])
        except LedgerConflict as problem:
            damaged = Path(problem.problems[0].where or "").name
            if name.endswith(damaged):  # not where only the derivation beside it is damaged
                return [(name, problem.problems[0].what)]
        return []

    def quarantine(self, name: str) -> str:
        """Move a bad file or folder aside; return where it lies now."""
        target = f"quarantine/{name}-{secrets.token_hex(4)}"
        path = self.store.path(target)
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.store.path(name).rename(path)
        return target

    def temporaries(self) -> list[str]:
        """Return files that killed writers left behind (older than an hour)."""
        old = time.time() - 3600
        return [
            path.relative_to(self.store.root).as_posix()
            for path in self.store.root.rglob(".*.tmp")
            if path.is_file() and path.stat().st_mtime < old
        ]

    def unneeded(self, forget: list[str]) -> list[tuple[str, int]]:
        """Return (name, bytes) of what no plan refers to, `forget`-ed specs left out of account.

        LedgerConflict while a plan is damaged. Only what is named by a digest is ever dropped.
        """
        needed: set[str] = set()
        dropped: list[str] = []
        for name, (head, *lines) in self.plans().items():
            spec = str(head["spec"])
            if any(spec.startswith(given) for given in forget if given):
                dropped.append(f"plans/{name}")
                continue
            needed.add(f"specs/{spec}.json")
            needed |= {f"reports/{r}" for r in self.store.children("reports") if r.startswith(spec)}
            needed |= {f"bases/{base}" for base in head["bases"]}
            needed |= {f"properties/{thing}" for thing in head["properties"]}
            keys = {key for line in lines for key in self._with_substitutes(line)}
            needed |= {f"runs/{key}" for key in keys} | {f"failures/{key}.json" for key in keys}
            unfinished = (key for key in keys if not self.store.exists(self.derivation_name(key)))
            needed |= {f"work/runs/{key}.safetensors" for key in unfinished}
            needed |= {f"work/bases/{base}" for base in head["bases"]}
            needed |= {f"work/properties/{thing}" for thing in head["properties"]}
        families = ("specs", "bases", "properties", "runs", "reports", "failures")
        for family in (*families, "work/runs", "work/bases", "work/properties"):
            children = self.store.children(family)
            dropped += [f"{family}/{child}" for child in children if _DIGEST.match(child)]
            dropped += [name for name in self.temporaries() if name.startswith(f"{family}/")]
        names = [name for name in dict.fromkeys(dropped) if name not in needed]
        return [(name, self._bytes(name)) for name in names if self.store.exists(name)]

    def _with_substitutes(self, line: dict[str, Any]) -> Iterator[str]:
        """Yield a plan line's run key, and those that stand in for it where it diverged."""
        key: str | None = line["key"]
        seen: set[str] = set()
        while key is not None and key not in seen:
            seen.add(key)
            yield key
            diverged = self.fact(self.diverged_name(key))
            key = None if diverged is None else diverged["next"]

    def _bytes(self, name: str) -> int:
        path = self.store.path(name)
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file())

    def drop(self, name: str) -> None:
        """Remove a file or folder that nothing needs."""
        aside = self.work(f"dropped/{secrets.token_hex(8)}")
        with _explained(aside):
            self.store.path(name).rename(aside)  # gone at once: half a folder is a damaged one
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
