"""Where facts lie: a folder or a bucket, both with atomic create-if-absent.

A name is relative, with forward slashes. `publish` creates it once, whoever else tries at the same
moment: in a folder by a link, which fails where something is, in a bucket by a PUT with
`If-None-Match: *`. Readers see all of a file or nothing. The same names and bytes lie in both, so
that a bucket copied into a folder is that folder's store, and the other way round.

What is not shared by its nature (checkpoints of work on the way, locks, copies of what was fetched)
lies in the folder itself, or beside a bucket in `$ATTR_BATCH_SCRATCH` on the local disk, from where
`keep` puts checkpoints into the bucket for whoever takes over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from attr_batch.errors import DataError, LedgerConflict, SpecError, StoreError

REPAIR_HINT = "`attr-batch repair JOB.yaml` puts such files aside; the next run makes them again"
ROOM_HINT = "free some space (`attr-batch gc STORE`), or mount it writable, and run again"


def is_temporary(name: str) -> bool:
    """Return whether `name` is what a killed writer may have left behind."""
    return name.startswith(".") and name.endswith(".tmp")


def checked(name: str) -> list[str]:
    """Return the parts of a name. ValueError if it would leave the store."""
    parts = name.split("/")
    if name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is not a name inside the store")
    return parts


class Store(ABC):
    """Files by name. Errors: DataError forbidden, StoreError full or away, LedgerConflict damaged.

    `poll_seconds` is how long to wait between two looks at it, `room_hint` what helps where its
    local files find no room.
    """

    poll_seconds: float
    room_hint: str = ROOM_HINT

    def __init__(self, location: str) -> None:
        self.location = location

    def __str__(self) -> str:
        return self.location

    def place(self, name: str) -> str:
        """Return where `name` lies, as messages say it."""
        return "/".join([self.location, *checked(name)])

    @abstractmethod
    def check(self) -> None:
        """Check that the store can be opened; it need not exist yet where one can be made."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the bytes under `name`, or None."""

    def read_many(self, names: Iterable[str]) -> dict[str, bytes | None]:
        """Return what `read` returns, by name."""
        return {name: self.read(name) for name in names}

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether something is published under `name`."""

    @abstractmethod
    def children(self, name: str) -> list[str]:
        """Return the sorted names of what lies in folder `name`; none if there is no folder."""

    def listing(self, name: str, children: Sequence[str]) -> dict[str, list[str]]:
        """Return what `children` returns of each of these children of folder `name`."""
        return {child: self.children(f"{name}/{child}") for child in children}

    @abstractmethod
    def walk(self, name: str) -> dict[str, int | None]:
        """Return {name: bytes} of every file below folder `name`, or of `name` if it is a file.

        None for what is no plain file: links, devices, and empty folders, which end with a slash.
        """

    @abstractmethod
    def publish(self, name: str, data: bytes) -> bool:
        """Create `name` with `data` unless it exists; True if this call created it."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Create or replace a mutable file: readers see the old bytes or the new ones."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a mutable file if it is there."""

    @abstractmethod
    def publish_folder(self, source: Path, name: str) -> None:
        """Publish the finished folder `source`, made in `scratch`, unless `name` exists.

        `source` holds a manifest.json, which says that the folder is whole. It is gone afterwards.
        """

    @abstractmethod
    def local(self, name: str, files: Mapping[str, str]) -> Path:
        """Return a local folder with what the published folder `name` holds of these files.

        `files` are their sha256 by name; it is the caller who checks them.
        """

    @abstractmethod
    def move(self, name: str, target: str) -> None:
        """Give a file or folder another name, under which there is nothing."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Remove a file or folder that nothing needs."""

    @abstractmethod
    def scratch(self, name: str) -> Path:
        """Return the local path of work on the way, whose folder exists, as `keep` last kept it."""

    @abstractmethod
    def keep(self, name: str) -> None:
        """Keep what lies at `scratch(name)` for whoever goes on with it."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Remove what is left of work on the way."""

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Hold `name` alone on this file system while the block runs; False: another has it.

        The kernel lets go of it when the process ends, however it ends.
        """
        path = self.scratch(f"locks/{name}")
        with explained(path):  # "w" would follow a link, and empty what it leads to
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        with explained(path), os.fdopen(number, "rb") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def leftovers(self, seconds: float) -> list[str]:
        """Return the names of what killed writers left behind more than `seconds` ago."""
        _ = seconds
        return []


# -- a folder -------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(path: Path, room_hint: str = ROOM_HINT) -> Iterator[None]:
    """Turn the operating system's errors about `path` into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise DataError("the store may not be written or read", str(path)) from error
        what = error.strerror or str(error)
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP):
            raise LedgerConflict(what, str(path), REPAIR_HINT) from error
        raise StoreError(what, str(path), room_hint) from error


class Folder(Store):
    """A folder on a disk, local or shared by all pods."""

    poll_seconds = 0.25

    def __init__(self, root: str | Path) -> None:
        super().__init__(str(root))
        self.root = Path(root)

    def path(self, name: str) -> Path:
        """Return the path of a name.

        ValueError if it would leave the store, LedgerConflict if a folder on the way is a link.
        """
        path = self.root
        *folders, last = checked(name)
        for folder in folders:
            path /= folder
            if path.is_symlink():
                raise LedgerConflict("a link where a folder should be", str(path), REPAIR_HINT)
        return path / last

    def check(self) -> None:
        """Check that the root is a folder, if it exists."""
        if self.root.exists() and not self.root.is_dir():
            hint = "name a folder; it need not exist"
            raise SpecError(f"{self.root} is no folder", "store", hint)

    def read(self, name: str) -> bytes | None:
        """Return the bytes under `name`, or None."""
        path = self.path(name)
        with explained(path):
            try:
                # Neither follow a link to somewhere else nor wait for a pipe's other end.
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                return None
            with os.fdopen(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise LedgerConflict("no plain file", str(path), REPAIR_HINT)
                return file.read()

    def exists(self, name: str) -> bool:
        """Return whether something is published under `name`."""
        return os.path.lexists(self.path(name))

    def children(self, name: str) -> list[str]:
        """Return the sorted names of what lies in folder `name`; none if there is no folder."""
        path = self.path(name)
        with explained(path):
            try:
                return sorted(entry.name for entry in os.scandir(path))
            except FileNotFoundError:
                return []

    def walk(self, name: str) -> dict[str, int | None]:
        """Return {name: bytes} of every file below folder `name`; links are not followed."""
        found: dict[str, int | None] = {}
        left = [(name, self.path(name))]
        while left:
            at, path = left.pop()
            with explained(path), contextlib.suppress(FileNotFoundError):  # gone since
                state = path.lstat()
                if stat.S_ISDIR(state.st_mode):
                    below = [*path.iterdir()]
                    left += [(f"{at}/{child.name}", child) for child in below]
                    if not below:
                        found[f"{at}/"] = None
                else:
                    found[at] = state.st_size if stat.S_ISREG(state.st_mode) else None
        return found

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

    def delete(self, name: str) -> None:
        """Remove a mutable file if it is there."""
        path = self.path(name)
        with explained(path):
            path.unlink(missing_ok=True)

    def publish_folder(self, source: Path, name: str) -> None:
        """Move the finished folder `source` (on the same disk) to `name` unless that exists."""
        path = self.path(name)
        with explained(path):
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
            _sync_folder(path.parent)

    def local(self, name: str, files: Mapping[str, str]) -> Path:
        """Return the folder itself."""
        _ = files
        return self.path(name)

    def move(self, name: str, target: str) -> None:
        """Give a file or folder another name, under which there is nothing."""
        path = self.path(target)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.path(name).rename(path)

    def drop(self, name: str) -> None:
        """Remove a file or folder that nothing needs."""
        aside = f"work/dropped/{secrets.token_hex(8)}"
        self.move(name, aside)  # gone at once: half a folder is a damaged one
        path = self.path(aside)
        with explained(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def scratch(self, name: str) -> Path:
        """Return the path under work/, whose folder exists."""
        path = self.path(f"work/{name}")
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def keep(self, name: str) -> None:
        """Do nothing: it lies in the store already."""

    def discard(self, name: str) -> None:
        """Remove what is left of work on the way."""
        self.delete(f"work/{name}")

    def leftovers(self, seconds: float) -> list[str]:
        """Return the names of what killed writers left behind more than `seconds` ago."""
        old = time.time() - seconds
        return [
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob(".*.tmp")
            if path.is_file() and path.stat().st_mtime < old
        ]

    @contextlib.contextmanager
    def _temporary(self, path: Path, data: bytes) -> Iterator[Path]:
        temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        with explained(path):
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


# -- a buck
