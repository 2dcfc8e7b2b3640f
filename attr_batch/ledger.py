"""The ledger: a store of immutable facts, each named by what it depends on.

    specs/<spec digest>.json            what was asked, resolved
    plans/<spec digest>-<its digest>.jsonl  which coalition is evaluated under which run key
    bases/<id>/  properties/<id>/       trained or fitted once; manifest.json holds their digests
    runs/<key>/<property>-<digest>.json one measured utility: it exists <=> it is done
    runs/<key>/derivation.json, grid.png, samples.safetensors, diverged.json
    reports/<spec digest>-<numerics>/   derived from the above, can be made again at any time
    periods/<label>.json                which report is a period's, and what to pin in the next
    work/  failures/                    checkpoints, heartbeats, what went wrong: the mutable places

A fact is published once (see `store`): readers see all of it or nothing, and the first published
fact stays. A crash at any moment leaves at most a temporary file. This is the only module that
knows file names.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attr_batch.bucket import open_store
from attr_batch.errors import AttrBatchError, LedgerConflict, StoreError
from attr_batch.log import TICK_SECONDS, OnTick
from attr_batch.recipe import canonical, digest, file_digest
from attr_batch.shapes import Beat, Failure, PlanHead, PlanKey, fits, shape_of
from attr_batch.store import REPAIR_HINT, Folder, is_temporary

if TYPE_CHECKING:
    import numpy as np

ALIVE_SECONDS = 3 * TICK_SECONDS
CLAIM_SECONDS = 0.02
_DIGEST = re.compile("[0-9a-f]{64}")
DERIVATION, DIVERGED, SAMPLES = "derivation.json", "diverged.json", "samples.safetensors"
_WORK = "work/runs/"  # of checkpoints, whose names begin with a run's key
PRUNED = ("specs", "bases", "properties", "runs", "reports", "failures")  # what `unneeded` judges
_TOKEN = secrets.token_hex(8)  # of this process
Files = Callable[[str], Collection[str]]  # the names of a run's files by its run key


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


def safe_name(text: str) -> str:
    """Return `text` with everything but letters, digits, `_`, `-` and `.` replaced."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "_" for c in text)


def value_file(prop: str, prop_digest: str) -> str:
    """Return the name of a property's value among a run's files."""
    return f"{safe_name(prop)}-{prop_digest[:12]}.json"


def _plan_lines(data: bytes, name: str, where: str) -> list[dict[str, Any]]:
    """Return the lines of the plan `name`. LedgerConflict if they are not those of that plan."""
    try:
        head, *lines = [json.loads(line) for line in data.splitlines()]
    except (ValueError, RecursionError):
        raise LedgerConflict("torn or foreign file", where, REPAIR_HINT) from None
    if not (fits(PlanHead, head) and all(fits(PlanKey, line) for line in lines)):
        raise LedgerConflict("is not a plan", where, REPAIR_HINT)
    if name != Ledger.plan_name(str(head["spec"]), data):
        raise LedgerConflict("altered", where, REPAIR_HINT)
    return [head, *lines]


def _shaped(fact: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return the fact under `name`. LedgerConflict if it is whole, but not what stands there."""
    if not fits(shape_of(name), fact):
        raise LedgerConflict("is not what its name says", where, REPAIR_HINT)
    return fact


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
        """Younger than three ticks; on this host also: its process still exists.

        One from the future, of a clock that was set, counts as dead: else it would block for long.
        """
        if self.host == _host() and _process_start(self.pid) != self.process_start:
            return False
        return abs(time.time() - self.time) < ALIVE_SECONDS

    @property
    def mine(self) -> bool:
        """Whether this very process wrote it."""
        return self.token == _TOKEN


def _beat_name(name: str) -> str:
    return f"work/heartbeats/{name}.json"


def _beat(name: str, phase: str, done: int, total: int) -> bytes:
    """Return this process's heartbeat for `name`."""
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
    return canonical(beat)


def _read_beat(data: bytes) -> Heartbeat | None:
    """Return a heartbeat if it is whole and live."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    beat = Heartbeat(**found) if fits(Beat, found) else None
    return beat if beat is not None and beat.alive else None


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
        self.store = open_store(root)

    def __str__(self) -> str:
        return str(self.store)

    @property
    def local_root(self) -> Path | None:
        """The store's folder, None if it is a bucket."""
        return self.store.root if isinstance(self.store, Folder) else None

    # -- facts ------------------------------------------------------------------------------------

    def fact(self, name: str) -> dict[str, Any] | None:
        """Return the sealed fact under `name`, or None. LedgerConflict if it is damaged."""
        data = self.store.read(name)
        place = self.store.place(name)
        fact = None if data is None else unseal(data, place)
        measured = name.startswith("runs/") and not name.endswith(DIVERGED)  # see `owned`
        return fact if fact is None or measured else _shaped(fact, name, place)

    def publish_fact(self, name: str, fact: dict[str, Any]) -> dict[str, Any]:
        """Publish a fact unless there is one; return the one that stays."""
        if self.store.publish(name, seal(fact)):
            return fact
        kept = self.fact(name)
        if kept is None:
            raise LedgerConflict("vanished while it was read", self.store.place(name))
        return kept

    def publish_same(self, name: str, data: bytes) -> None:
        """Publish bytes that are a pure function of `name`. LedgerConflict if others are there."""
        if not self.store.publish(name, data) and self.store.read(name) != data:
            raise LedgerConflict("exists with other content", self.store.place(name), REPAIR_HINT)

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

    @staticmethod
    def plan_name(spec_digest: str, content: bytes) -> str:
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

    def plans(self, spec: str = "") -> dict[str, list[dict[str, Any]]]:
        """Return the lines (the first is its head) of every plan, or a spec's, by file name.

        LedgerConflict if one is damaged: what it needs cannot be known.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for child in self.store.children("plans"):
            if child.startswith(spec) and not is_temporary(child):
                name = f"plans/{child}"
                data = self.store.read(name)
                if data is not None:  # else it was dropped since
                    found[child] = _plan_lines(data, name, self.store.place(name))
        return found

    # -- periods ----------------------------------------------------------------------------------

    def period_name(self, label: str) -> str:
        """Return the name of the fact which report is a period's."""
        return f"periods/{label}.json"

    def periods(self) -> dict[str, dict[str, Any]]:
        """Return every period by its label, in the order of the labels.

        LedgerConflict if one is damaged: what it needs cannot be known.
        """
        children = [n for n in self.store.children("periods") if not is_temporary(n)]
        names = {n.removesuffix(".json"): f"periods/{n}" for n in children}
        facts = self.facts(names.values())
        return {
            label: self.owned(name, fact, label=label)
            for label, name in names.items()
            if (fact := facts[name]) is not None
        }

    # -- things made once: bases and fitted properties --------------------------------------------

    def has_thing(self, family: str, thing_id: str) -> bool:
        """Return whether a base or property (`family` bases|properties) is made."""
        return self.store.exists(f"{family}/{thing_id}/manifest.json")

    def verified_thing(self, family: str, thing_id: str) -> tuple[Path, str]:
        """Return a local folder and its manifest's digest after checking every file's sha256."""
        name = f"{family}/{thing_id}"
        manifest = self.fact(f"{name}/manifest.json")
        if manifest is None:
            raise LedgerConflict("is not there", self.store.place(name), REPAIR_HINT)
        folder = self.store.local(name, manifest["files"])
        for file, sha256 in manifest["files"].items():
            path = folder / file
            if path.is_symlink() or not path.is_file() or file_digest(path) != sha256:
                place = self.store.place(f"{name}/{file}")
                raise LedgerConflict("missing or altered", place, REPAIR_HINT)
        return folder, digest(manifest)

    def card(self, family: str, thing_id: str) -> dict[str, Any]:
        """Return the card.json of a thing: what it is, as its maker said."""
        folder = f"{family}/{thing_id}"
        data = self.store.read(f"{folder}/card.json") or b""
        manifest = self.fact(f"{folder}/manifest.json") or {"files": {}}
        if digest(data) != manifest["files"].get("card.json"):
            place = self.store.place(f"{folder}/card.json")
            raise LedgerConflict("missing or altered", place, REPAIR_HINT)
        return json.loads(data)

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
        return f"runs/{key}/{value_file(prop, prop_digest)}"

    def owned(self, name: str, fact: dict[str, Any], **owner: str) -> dict[str, Any]:
        """Return the fact under `name`. LedgerConflict if it does not say that it is `owner`'s."""
        if any(fact.get(key) != value for key, value in owner.items()):
            raise LedgerConflict("belongs to another run", self.store.place(name), REPAIR_HINT)
        return _shaped(fact, name, self.store.place(name))

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
        raise LedgerConflict("torn or altered", self.store.place(name), REPAIR_HINT)

    def run_files(self, key: str) -> Collection[str]:
        """Return the names of what is published of a run: one look at the store."""
        return self.store.children(f"runs/{key}")

    def survey(self, keys: Iterable[str]) -> Files:
        """Return `run_files` of these runs as of now, with as few looks as the store allows."""
        found = self.store.listing("runs", [*dict.fromkeys(keys)])
        return lambda key: found[key] if key in found else self.run_files(key)

    def facts(self, names: Iterable[str]) -> dict[str, dict[str, Any] | None]:
        """Return `fact` of each name. LedgerConflict if one is damaged."""
        return {
            name: None if data is None else unseal(data, self.store.place(name))
            for name, data in self.store.read_many(names).items()
        }

    def derivation_name(self, key: str) -> str:
        """Return the name of the fact how a run's samples came to be: recipe, seconds, digests."""
        return f"runs/{key}/{DERIVATION}"

    def samples_name(self, key: str) -> str:
        """Return the name of a run's kept samples."""
        return f"runs/{key}/{SAMPLES}"

    def grid_name(self, key: str) -> str:
        """Return the name of a run's picture of some samples."""
        return f"runs/{key}/grid.png"

    def diverged_name(self, key: str) -> str:
        """Return the name of the fact that a run diverges each time and was given up."""
        return f"runs/{key}/{DIVERGED}"

    # -- mutable: work and failures ---------------------------------------------------------------

    def work(self, name: str) -> Path:
        """Return the local path of work on the way, whose folder exists."""
        return self.store.scratch(name)

    def beat(self, name: str, phase: str, done: int = 0, total: int = 0) -> None:
        """Say that this process works on `name`."""
        self.store.replace(_beat_name(name), _beat(name, phase, done, total))

    @contextlib.contextmanager
    def beating(self, name: str, phase: str) -> Iterator[OnTick]:
        """Keep the heartbeat of `name` going, also while nothing ticks, and end it.

        Gives what an `Upkeep` calls at a tick: it raises what the store does, the pulse does not.
        Where the store is away the heartbeat is left to its age: goodbyes are not waited for.
        """
        at, over, away = (0, 0), threading.Event(), False

        def beat(done: int, total: int, _: dict[str, float]) -> None:
            nonlocal at
            at = done, total
            self.beat(name, phase, done, total)

        def pulse() -> None:
            while not over.wait(TICK_SECONDS):
                with contextlib.suppress(AttrBatchError, OSError):
                    self.beat(name, phase, *at)

        self.beat(name, phase)
        thread = threading.Thread(target=pulse, daemon=True)
        thread.start()
        try:
            yield beat
        except StoreError:
            away = True
            raise
        finally:
            over.set()
            thread.join(0.0 if away else TICK_SECONDS)
            if not (away or thread.is_alive()):
                with contextlib.suppress(AttrBatchError):
                    self.rest(name)

    def claim(self, name: str, phase: str) -> bool:
        """Begin to work on `name` unless another live process does; True if it is ours.

        Of two that take over from a dead process at the same moment the later writer keeps it. A
        lost race, or a `rest` that a bad network repeats, costs double work of a run, whose results
        are published once whoever is first; what must not be made twice at the same time also takes
        the store's `lock`.
        """
        data = self.store.read(_beat_name(name))
        if data is None:
            if self.store.publish(_beat_name(name), _beat(name, phase, 0, 0)):
                return True  # else it is another's, or ours, should the answer have been lost
        elif _read_beat(data) is not None:
            return False
        else:
            self.beat(name, phase)
            time.sleep(CLAIM_SECONDS)
        holder = self.heartbeat(name)
        return holder is not None and holder.mine

    def rest(self, name: str) -> None:
        """Say that nobody works on `name` any more."""
        self.store.delete(_beat_name(name))

    def heartbeat(self, name: str) -> Heartbeat | None:
        """Return the live heartbeat of `name`, or None."""
        data = self.store.read(_beat_name(name))
        return None if data is None else _read_beat(data)

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
        except (ValueError, RecursionError):
            return None
        return failure if fits(Failure, failure) else None

    def failed(self) -> set[str]:
        """Return the keys of all evaluations that failed the last time."""
        children = self.store.children("failures")
        return {name.removesuffix(".json") for name in children if not is_temporary(name)}

    def forgive(self, key: str) -> None:
        """Forget a failure: the evaluation succeeded."""
        self.store.delete(f"failures/{key}.json")

    # -- upkeep -----------------------------------------------------------------------------------

    def bad_files(self) -> list[tuple[str, str]]:
        """Return (name, reason) of every file that is no intact fact where a fact should be."""
        bad: list[tuple[str, str]] = []
        for family in ("specs", "runs", "bases", "properties", "plans", "periods"):
            # Per child: itself under "", an empty folder under "/", what is below under "/<name>".
            children: defaultdict[str, dict[str, int | None]] = defaultdict(dict)
            for name, size in self.store.walk(family).items():
                if name == family:
                    bad.append((family, "foreign file"))
                    continue
                child, slash, below = name.removeprefix(f"{family}/").partition("/")
                children[child][slash + below] = size
            for child in sorted(children):
                if child and not is_temporary(child):
                    bad += self._judge(family, child, children[child])
        return bad

    def _judge(
        self, family: str, child: str, files: dict[str, int | None]
    ) -> list[tuple[str, str]]:
        name = f"{family}/{child}"
        if family in ("specs", "plans", "periods"):
            plain = files.get("") is not None and child.endswith((".json", ".jsonl"))
            return self._judge_file(name, plain)
        if "" in files:
            return [(name, "foreign file")]
        if family in ("bases", "properties"):
            try:
                self.verified_thing(family, child)
            except LedgerConflict as conflict:
                return [(name, conflict.problems[0].what)]
            return []
        bad: list[tuple[str, str]] = []
        for below, size in sorted(files.items()):
            file, folder, _ = below[1:].partition("/")
            if file and not is_temporary(file):
                known = file.endswith((".json", ".png", SAMPLES))
                bad += self._judge_file(f"{name}/{file}", known and not folder and size is not None)
        return bad

    def _judge_file(self, name: str, plain: bool) -> list[tuple[str, str]]:
        if not plain:
            return [(name, "foreign file")]
        try:
            if name.endswith(".json"):
                self.fact(name)
            elif name.endswith(".jsonl"):
                _plan_lines(self.store.read(name) or b"", name, self.store.place(name))
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
        self.store.move(name, target)
        return target

    def unneeded(self, forget: list[str]) -> list[tuple[str, int]]:
        """Return (name, bytes) of what no plan refers to, `forget`-ed specs left out of account.

        A period keeps its report, and what the next one may pin. LedgerConflict while a plan or a
        period is damaged. Only what is named by a digest is ever dropped.
        """
        needed: set[str] = set()
        for period in self.periods().values():
            needed |= {period["report"], self.spec_name(period["spec"])}
            needed |= {f"bases/{base}" for base in period["bases"].values()}
            needed |= {f"properties/{thing}" for thing in period["fitted"].values()}
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
            needed |= {f"{_WORK}{key}" for key in unfinished}
            needed |= {f"work/bases/{base}" for base in head["bases"]}
            needed |= {f"work/properties/{thing}" for thing in head["properties"]}
        there: dict[str, int] = {}
        for family in (*PRUNED, "work/runs", "work/bases", "work/properties"):
            for name, size in self.store.walk(family).items():
                child = name.removeprefix(f"{family}/").partition("/")[0]
                if _DIGEST.match(child):
                    thing = f"{family}/{child}"
                    there[thing] = there.get(thing, 0) + (size or 0)
        dropped += there
        dropped += [n for n in self.store.leftovers(3600) if n.startswith(PRUNED)]
        owner = {n: n[: len(_WORK) + 64] if n.startswith(_WORK) else n for n in dropped}
        names = [name for name in dict.fromkeys(dropped) if owner[name] not in needed]
        return [(name, there[name] if name in there else self._bytes(name)) for name in names]

    def _bytes(self, name: str) -> int:
        """Return the size of a file."""
        return len(self.store.read(name) or b"")

    def _with_substitutes(self, line: dict[str, Any]) -> Iterator[str]:
        """Yield a plan line's run key, and those that stand in for it where it diverged."""
        key: str | None = line["key"]
        seen: set[str] = set()
        while key is not None and key not in seen:
            seen.add(key)
            yield key
            diverged = self.fact(self.diverged_name(key))
            key = None if diverged is None else diverged["next"]

    def drop(self, name: str) -> None:
        """Remove a file or folder that nothing needs."""
        self.store.drop(name)
