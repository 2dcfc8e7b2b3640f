"""The disk is full, read-only or slow; files of the store are torn, foreign or altered."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .bench import Bench, NotHere, expect
from .kills import met, reach, strace

PAGE = 4096


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs of its own on `folder`. NotHere if this user may not."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "faults", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise NotHere("a tmpfs cannot be mounted without root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> bool:
    """Change a mounted disk; False if the kernel says that it is busy."""
    command = ["mount", "-o", f"remount,{options}", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def size(store: Path) -> tuple[int, int]:
    """Return the bytes of the pages, and the number of inodes, that a store takes."""
    files = [path for path in store.rglob("*") if path.is_file()]
    pages = sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)
    return pages, sum(1 for _ in store.rglob("*"))


def _filled(bench: Bench, options: Callable[[float], str], larger: str) -> None:
    for share in (0.04, 0.3, 0.6, 0.95)[: bench.times(4, 1)]:
        disk = bench.scratch / f"{bench.row.name}-{share}"
        with small_disk(disk, options(share)):
            site = bench.site(store=str(disk / "store"))
            process = site.run(codes=(74,))
            bench.row.hits[f"{share:.0%} of what it needs"] += 1
            expect("hint:" in process.log, process.log)
            expect(not site.job.ledger.bad_files(), "a full disk left damaged files")
            expect(remount(disk, larger), "the disk could not be enlarged")
            site.finish()


def disk_full(bench: Bench) -> None:
    """The store lies on a tmpfs that fills up: 74; enlarged, the run goes on."""
    needed, _ = size(bench.undisturbed().store)
    _filled(bench, lambda share: f"size={round(share * needed / PAGE) * PAGE}", "size=1g")


def no_inodes(bench: Bench) -> None:
    """The same where it is inodes that run out."""
    _, needed = size(bench.undisturbed().store)
    _filled(bench, lambda share: f"size=1g,nr_inodes={round(share * needed) + 2}", "nr_inodes=0")


def read_only(bench: Bench) -> None:
    """The store turns read-only: before the run, and in the middle of it."""
    for phase in (None, "prepare", "fine-tuning")[: bench.times(3, 2)]:
        disk = bench.scratch / f"{bench.row.name}-{phase}"
        with small_disk(disk, "size=1g"):
            site = bench.site(store=str(disk / "store"))
            if phase is None:
                remount(disk, "ro")
                process = site.run(codes=(74,))
            else:
                process = site.start()
                reach(process, phase, 0.1)
                bench.row.hits[met(process)] += 1
                while not remount(disk, "ro"):  # busy while a file is being written
                    expect(process.running, "it ended before")
                process.end(74)
            process.quiet()
            expect("hint:" in process.log, process.log)
            remount(disk, "rw")
            expect(not site.job.ledger.bad_files(), "a read-only disk left damaged files")
            site.finish()


def slow_disk(bench: Bench) -> None:
    """Every fsync takes 0.2 s longer (strace); a run killed in one of them goes on."""
    delay = "inject=fsync:delay_enter=200000"
    site = bench.site()
    process = site.start(wrapper=[*strace(site.folder / "strace", "fsync"), "-e", delay])
    if reach(process, "publishing", 0.1):
        bench.row.hits[met(process)] += 1
    process.kill()
    process.end(-signal.SIGKILL)
    expect(not site.job.ledger.bad_files(), "a kill left damaged files")
    site.run(wrapper=[*strace(site.folder / "strace", "fsync"), "-e", delay])
    site.check()


# -- damage -----------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def flipped(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def foreign(path: Path) -> None:
    path.write_text('{"a": "file of another program"}\n')


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def linked(path: Path) -> None:
    """Put a link to an intact copy outside the store in its place."""
    store = next(above for above in path.parents if above.name == "store")
    path.symlink_to(path.rename(store.with_name(path.name)))


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


DAMAGES = (truncated, emptied, flipped, foreign, folder, linked, dangling)


@dataclass(frozen=True)
class Target:
    """Files of one kind: a pattern, whether they matter, and what else must be missing for that.

    A base is only read where something is left to evaluate, and samples where a value is missing.
    """

    pattern: str
    matters: bool = True
    sealed: bool = True  # repair finds every damage
    without: str = ""

    @property
    def damages(self) -> list[Callable[[Path], None]]:
        """What can be done to it. Of a base's weights a link to the right bytes will do."""
        weights = (
            self.pattern.startswith(("bases", "properties")) and "manifest" not in self.pattern
        )
        return [damage for damage in DAMAGES if not (weights and damage is linked)]


TARGETS = (
    Target("specs/*.json"),
    Target("plans/*.jsonl"),
    Target("bases/*/manifest.json", without="runs/*"),
    Target("bases/*/pruned.safetensors", without="runs/*"),
    Target("properties/*/manifest.json", without="runs/*"),
    Target("properties/*/*.safetensors", without="runs/*"),
    Target("runs/*/cluster_entropy-*.json"),
    Target("runs/*/derivation.json", without="runs/{}/cluster_entropy-*.json"),
    Target("runs/*/samples.safetensors", without="runs/{}/cluster_entropy-*.json"),
    Target("reports/*/attribution.json", sealed=False),
    Target("reports/*/cost.json", matters=False, sealed=False),
    Target("reports/*/evidence.json", matters=False, sealed=False),
    Target("runs/*/grid.png", matters=False, sealed=False),
    Target("work/data/*.json", matters=False, sealed=False),
)


def found_by_repair(bench: Bench) -> None:
    """Every damage to every sealed file of a finished store is found, and nothing else is."""
    site = bench.copy(bench.undisturbed())
    ledger = site.job.ledger
    for target in TARGETS:
        if not target.sealed:
            continue
        for damage in target.damages:
            path = bench.random.choice(sorted(site.store.glob(target.pattern)))
            kept = path.read_bytes()
            damage(path)
            name = path.relative_to(site.store).as_posix()
            thing = name.rpartition("/")[0] if name.startswith(("bases", "properties")) else name
            bad = [bad for bad, _ in ledger.bad_files()]
            expect(bad == [thing], f"{damage.__name__} {name}: found {bad}")
            bench.row.hits[f"{target.pattern.split('/')[0]} {damage.__name__}"] += 1
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            path.write_bytes(kept)
    expect(not ledger.bad_files(), "the store did not recover")


def damaged(bench: Bench) -> None:
    """A damaged file is refused with 73 where it matters; `repair` and a run make it anew."""
    missed = []
    for i, target in enumerate(TARGETS):
        if bench.quick and i % 5:
            continue
        site = bench.copy(bench.undisturbed())
        path = bench.random.choice(sorted(site.store.glob(target.pattern)))
        if target.without:
            gone = sorted(site.store.glob(target.without.format(path.parent.name)))
            shutil.rmtree(gone[0]) if gone[0].is_dir() else gone[0].unlink()
        damage = target.damages[i % len(target.damages)]
        damage(path)
        bench.row.hits[f"{target.pattern} {damage.__name__}"] += 1
        try:
            process = site.run(codes=(73,) if target.matters else (0, 73))
            site.run("--json", command="repair")
            if process.code == 73:
                expect("repair" in process.log, process.log)
                expect(json.loads(site.said), "repair found nothing")
            site.finish()
        except AssertionError as error:
            missed.append(f"{target.pattern} {damage.__name__}: {error}")
    expect(not missed, "\n".join(missed))


SCENARIOS = {
    f.__name__: f for f in (disk_full, no_inodes, read_only, slow_disk, found_by_repair, damaged)
}
