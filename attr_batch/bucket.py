"""A bucket of an object store as a store, and data fetched from one.

Every call is a request, so whoever looks at much does so with `listing`, `walk` and `read_many`,
which list a thousand names a request and send many requests at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from attr_batch.errors import DataError, LedgerConflict, SpecError, StoreError
from attr_batch.log import say
from attr_batch.recipe import file_digest
from attr_batch.store import Folder, Store, checked, explained, is_temporary

SCRATCH = "ATTR_BATCH_SCRATCH"  # environment variable: where a bucket's local files lie
ROOM_HINT = f"make room where ${SCRATCH} points, or let it point elsewhere, and run again"
CONCURRENT = 64  # requests at a time
FEW = 256  # folders that are listed one by one rather than by walking through all there are
URL = re.compile(r"(s3|gs|az)://([^/?#@:%]+)(?:/([^?#%]*))?")
# A request that fails (5xx, connection, time) is repeated with growing pauses for a minute.
RETRIES, RETRY_SECONDS = 1000, 60  # the seconds decide
PAUSES = 0.2, 5.0  # seconds: the first and the longest
CLIENT = {"connect_timeout": "5s", "timeout": "30s"}
LARGE = {"connect_timeout": "5s", "timeout": "15min"}  # a model's weights in one request
PASSING = ("ExpiredToken", "RequestTimeTooSkewed", "SlowDown")  # 403s that a retry may cure
REFUSED = re.compile(r"status code: 4|\b40[0134] |\(code: |169\.254\.|[Cc]redential")
FORBIDDEN = "are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY set, and may they do this?"

T = TypeVar("T")
R = TypeVar("R")


def is_url(location: str) -> bool:
    """Return whether `location` names a bucket and not a folder (`s3:/x` means neither)."""
    return "://" in location or location.startswith(("s3:", "gs:", "az:"))


def open_store(location: str | Path) -> Store:
    """Return the store at a folder's path or a bucket's URL. SpecError if the URL is none."""
    return Bucket(str(location)) if is_url(str(location)) else Folder(location)


def fetch(url: str) -> Path:
    """Return a local folder with what lies under a bucket's URL, fetched as far as it changed.

    Processes that share `$ATTR_BATCH_SCRATCH` fetch it once. DataError if there is nothing.
    """
    return Bucket(url, "data.path").mirrored()


def stamps(url: str) -> list[tuple[str, int, str]]:
    """Return (name, bytes, entity tag) of everything under a bucket's URL: one look, no content."""
    return Bucket(url, "data.path").stamps()


class Bucket(Store):
    """A bucket, or a prefix in one, of an object store: `s3://bucket/prefix`, also `gs://`, `az://`.

    Credentials, region and endpoint come from the environment (`AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, or what a cloud gives its machines),
    never from the URL.
    """

    poll_seconds = 5.0
    room_hint = ROOM_HINT

    def __init__(self, url: str, where: str = "store") -> None:
        match = URL.fullmatch(url.rstrip("/"))
        if match is None or any(part in (".", "..", "") for part in (match[3] or "x").split("/")):
            hint = "s3://bucket/prefix; credentials come from the environment"
            raise SpecError("is no URL of a bucket", where, hint)
        super().__init__(url.rstrip("/"))
        self._where = where
        self._remote, self._large = self._client(CLIENT), self._client(LARGE)
        self._kept: dict[str, tuple[int, int]] = {}  # time and size of what was uploaded last
        self._root = _private_folder() / hashlib.sha256(self.location.encode()).hexdigest()[:16]

    def _client(self, options: Mapping[str, str]) -> Any:
        from datetime import timedelta

        from obstore.exceptions import BaseError
        from obstore.store import from_url

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        client: Any = {**options, "allow_http": endpoint.startswith("http://")}
        first, longest = (timedelta(seconds=pause) for pause in PAUSES)
        retry: Any = {
            "max_retries": RETRIES,
            "retry_timeout": timedelta(seconds=RETRY_SECONDS),
            "backoff": {"init_backoff": first, "max_backoff": longest, "base": 2},
        }
        try:
            return from_url(self.location, client_options=client, retry_config=retry)
        except (BaseError, ValueError) as error:
            raise SpecError(_brief(error), self._where) from None

    def check(self) -> None:
        """Check that the bucket is there and answers."""
        self.children("specs")

    def read(self, name: str) -> bytes | None:
        """Return the bytes under `name`, or None."""
        import obstore

        path = "/".join(checked(name))

        def read() -> bytes | None:
            try:
                return bytes(obstore.get(self._remote, path).bytes())
            except FileNotFoundError as error:
                _refuse_missing_bucket(error)
                return None

        return self._insisting(read, name)

    def read_many(self, names: Iterable[str]) -> dict[str, bytes | None]:
        """Return what `read` returns, by name, with many requests at a time."""
        names = list(names)
        return dict(zip(names, _at_once(self.read, names), strict=True))

    def exists(self, name: str) -> bool:
        """Return whether something is published under `name`."""
        import obstore

        path = "/".join(checked(name))

        def head() -> bool:
            try:
                obstore.head(self._remote, path)
            except FileNotFoundError:
                return False
            return True

        return self._insisting(head, name)

    def children(self, name: str) -> list[str]:
        """Return the sorted names of what lies in folder `name`; none if there is no folder."""
        import obstore

        path = "/".join(checked(name))
        found = self._insisting(lambda: obstore.list_with_delimiter(self._remote, path), name)
        paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        # An empty folder may be an object itself: a server's or a console's marker.
        return sorted(p.rstrip("/").rpartition("/")[2] for p in paths if p != path)

    def listing(self, name: str, children: Sequence[str]) -> dict[str, list[str]]:
        """Return what `children` returns of each of these children of folder `name`.

        A few are looked up one by one, many by listing the folder, a thousand files a request.
        """
        if len(children) <= FEW:
            looks = _at_once(lambda child: self.children(f"{name}/{child}"), children)
            return dict(zip(children, looks, strict=True))
        found: dict[str, list[str]] = {child: [] for child in children}
        for path in self.walk(name):
            child, slash, file = path.removeprefix(f"{name}/").partition("/")
            if slash and child in found:
                found[child].append(file)
        return found

    def walk(self, name: str) -> dict[str, int | None]:
        """Return {name: bytes} of every file below folder `name`."""
        path = "/".join(checked(name))
        sizes = {item["path"]: item["size"] for item in self._listed(path)}
        return {name: sizes[name] for name in _files(sizes)}

    def _listed(self, path: str | None) -> list[Any]:
        """Return what the store says of every object below a folder, or of all."""
        import obstore

        def listed() -> list[Any]:
            pages = obstore.list(self._remote, path, chunk_size=1000)
            return [item for page in pages for item in page]

        return self._insisting(listed, path or "")

    def publish(self, name: str, data: bytes) -> bool:
        """Create `name` with `data` unless it exists; True if this call created it."""
        return self._create(self._remote, name, data)

    def _create(self, remote: Any, name: str, data: bytes | Path) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        path = "/".join(checked(name))

        def create() -> bool:
            try:
                obstore.put(remote, path, data, mode="create")
            except AlreadyExistsError:
                return False  # or the answer to our first try was lost: the same bytes
            return True

        return self._insisting(create, name)

    def _upload(self, file: Path, name: str) -> None:
        import obstore

        self._insisting(lambda: obstore.put(self._large, name, file, mode="overwrite"), name)

    def _insisting(self, call: Callable[[], R], name: str) -> R:
        """Repeat a call whose connection broke, which the library does not always do itself."""
        from obstore.exceptions import GenericError

        last, pause = math.inf, PAUSES[0]
        while True:
            with self._answered(name):
                try:
                    return call()
                except GenericError as error:
                    now = time.monotonic()
                    last = min(last, now + RETRY_SECONDS)  # a call that fails may be long
                    if RETRIES == 0 or now > last or _final(str(error)):
                        raise
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    def replace(self, name: str, data: bytes) -> None:
        """Create or replace a mutable file: readers see the old bytes or the new ones."""
        import obstore

        path = "/".join(checked(name))
        put = partial(obstore.put, self._remote, path, data, use_multipart=False)
        self._insisting(put, name)

    def delete(self, name: str) -> None:
        """Remove a mutable file if it is there."""
        self._delete_all(["/".join(checked(name))])

    def publish_folder(self, source: Path, name: str) -> None:
        """Upload the finished folder `source` to `name`, its manifest last.

        What a killed maker left is replaced as long as there is no manifest. Two makers that are at
        it at the same moment make the same bytes; should they not, the manifest tells.
        """
        whole = f"{name}/manifest.json"
        for file in sorted(source.iterdir()):
            place = f"{name}/{file.name}"
            if file.name == "manifest.json" or self._create(self._large, place, file):
                continue
            if self.exists(whole):
                break
            self._upload(file, place)
        self.publish(whole, (source / "manifest.json").read_bytes())
        self.drop(source.relative_to(self._root).as_posix())  # checkpoints that were kept
        shutil.rmtree(source, ignore_errors=True)

    def local(self, name: str, files: Mapping[str, str]) -> Path:
        """Return a local copy of a published folder; what is there already is not fetched again."""
        folder = self._root / "fetched" / Path(*checked(name))
        with explained(folder, self.room_hint):
            folder.mkdir(parents=True, exist_ok=True)
            for file, sha256 in files.items():
                (part,) = checked(file)
                target = folder / part
                if not target.exists() or file_digest(target) != sha256:
                    self._download(f"{name}/{part}", target)
        return folder

    def _download(self, name: str, target: Path) -> bool:
        """Put a file's bytes at `target`, all or none; False if there is no such file."""
        import obstore

        def download() -> bool:
            try:
                stream = obstore.get(self._large, "/".join(checked(name))).stream()
            except FileNotFoundError:
                return False
            with explained(target, self.room_hint):
                handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
                try:
                    with os.fdopen(handle, "wb") as out:
                        for chunk in stream:
                            out.write(chunk)
                    Path(temporary).replace(target)
                finally:
                    Path(temporary).unlink(missing_ok=True)
            return True

        return self._insisting(download, name)

    def move(self, name: str, target: str) -> None:
        """Give a file or folder another name, under which there is nothing."""
        import obstore

        names = [*self.walk(name)] or [name]
        for old in names:
            new = "/".join(checked(target + old.removeprefix(name)))
            self._insisting(partial(obstore.copy, self._large, old, new), old)
        self._delete_all(names)
        self._forget_copies(name)

    def drop(self, name: str) -> None:
        """Remove a file or folder that nothing needs; of a folder its manifest first."""
        names = [*self.walk(name)] or [name]
        names.sort(key=lambda path: not path.endswith("/manifest.json"))
        self._delete_all(names[:1])
        self._delete_all(names[1:])
        self._forget_copies(name)

    def _delete_all(self, names: Sequence[str]) -> None:
        import obstore

        def delete(some: Sequence[str]) -> None:
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._remote, some)

        for start in range(0, len(names), 1000):
            some = names[start : start + 1000]
            self._insisting(partial(delete, some), some[0])

    def _forget_copies(self, name: str) -> None:
        shutil.rmtree(self._root / "fetched" / Path(*checked(name)), ignore_errors=True)

    def scratch(self, name: str) -> Path:
        """Return the local path of work on the way, fetched if another began it elsewhere."""
        path = self._root / "work" / Path(*checked(name))
        with explained(path, self.room_hint):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() and not name.startswith("locks/"):
                self._fetch_work(f"work/{name}", path)
        return path

    def _fetch_work(self, name: str, path: Path) -> None:
        if self._download(name, path):
            self._kept[name] = _stamp(path)
            return
        for file in self.walk(name):
            path.mkdir(exist_ok=True)
            self._download(file, path / file.rpartition("/")[2])

    def keep(self, name: str) -> None:
        """Upload what lies at `scratch(name)`, as far as it has changed."""
        path = self._root / "work" / Path(*checked(name))
        files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
        for file in files:
            if not file.exists() or is_temporary(file.name):
                continue
            place = f"work/{name}" if file == path else f"work/{name}/{file.name}"
            stamp = _stamp(file)
            if self._kept.get(place) != stamp:
                self._upload(file, place)
                self._kept[place] = stamp

    def discard(self, name: str) -> None:
        """Remove what is left of work on the way."""
        (self._root / "work" / Path(*checked(name))).unlink(missing_ok=True)
        if self._kept.pop(f"work/{name}", None) is not None:
            self.delete(f"work/{name}")

    # -- data -------------------------------------------------------------------------------------

    def stamps(self) -> list[tuple[str, int, str]]:
        """Return (name, bytes, entity tag) of everything there is, sorted."""
        items = {item["path"]: item for item in self._listed(None)}
        names = _files({name: item["size"] for name, item in items.items()})
        tags = {name: items[name]["e_tag"] or items[name]["last_modified"] for name in names}
        found = [(name, items[name]["size"], str(tag)) for name, tag in tags.items()]
        if not found:
            raise DataError(
                "there is nothing", self.location, "wanted a folder of images in a bucket"
            )
        return sorted(found)

    def mirrored(self) -> Path:
        """Return a local folder with everything there is, fetched as far as it changed."""
        folder = self._root / "data"
        index = self._root / "data.json"
        with explained(folder, self.room_hint):
            folder.mkdir(parents=True, exist_ok=True)
            with (self._root / "data.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                there: dict[str, Any] = {}
                with contextlib.suppress(OSError, ValueError):
                    there = json.loads(index.read_bytes())
                wanted = {name: [size, tag] for name, size, tag in self.stamps()}
                self._fetch_changed(folder, wanted, there)
                index.write_text(json.dumps(wanted))
        return folder

    def _fetch_changed(
        self, folder: Path, wanted: Mapping[str, Any], there: Mapping[str, Any]
    ) -> None:
        paths = {name: folder.joinpath(*checked(name)) for name in {*there, *wanted}}
        changed = [
            name
            for name, stamp in wanted.items()
            if there.get(name) != stamp or _size(paths[name]) != stamp[0]
        ]
        if changed:
            size = sum(wanted[name][0] for name in changed)
            say(f"fetching {len(changed)} files, {size / 1e6:.1f} MB, from {self.location}")
        for name in {*there} - {*wanted}:
            paths[name].unlink(missing_ok=True)

        def get(name: str) -> None:
            paths[name].parent.mkdir(parents=True, exist_ok=True)
            if not self._download(name, paths[name]):
                raise DataError("vanished while it was fetched", f"{self.location}/{name}")

        _at_once(get, changed)

    # -- errors -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _answered(self, name: str) -> Iterator[None]:
        """Turn the object store's errors into ours."""
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        place = f"{self.location}/{name}" if name else self.location
        try:
            yield
        except FileNotFoundError as error:
            _refuse_missing_bucket(error, place)
            raise LedgerConflict("vanished while it was read", place) from None
        except (BaseError, OSError) as error:
            text = str(error)
            # Of a list request the library says no more than the status.
            forbidden = "403 Forbidden" in text or "401 Unauthorized" in text
            forbidden |= "code: AccessDenied" in text  # of one of several deletes
            forbidden |= isinstance(error, PermissionDeniedError | UnauthenticatedError)
            if forbidden and not any(code in text for code in PASSING):
                raise DataError(f"forbidden: {_brief(error)}", place, FORBIDDEN) from None
            _refuse_missing_bucket(error, place)
            hint = "is AWS_ENDPOINT_URL right, and does it answer? then run again"
            if "169.254." in text or "credential" in text.lower():
                hint = "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise StoreError(_brief(error), place, hint) from None


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1


def _stamp(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_mtime_ns, state.st_size


def _refuse_missing_bucket(error: Exception, place: str = "store") -> None:
    if "NoSuchBucket" in str(error):
        raise DataError("there is no such bucket", place, "make it, or correct `store`") from None


def _final(text: str) -> bool:
    """Whether the server has said no, or the library has insisted for as long as we would."""
    waited = re.search(r" in ([\d.]+)s, after \d+ retries", text)
    exhausted = waited is not None and float(waited[1]) > RETRY_SECONDS - PAUSES[1]
    return exhausted or REFUSED.search(text) is not None


def _brief(error: Exception) -> str:
    """Return the telling part of an object store's message in one line, without the XML."""
    text = re.sub(r"\s+", " ", str(error).partition("Debug source")[0])
    code = re.search(r"<Code>(\w+)</Code>", text)
    text = re.sub(r":? ?<\?xml.*", "", text)[:300].strip()
    text = re.sub(r", after \d+ retries, max_retries: \d+, retry_timeout: \w+", "", text)
    return f"{text} ({code[1]})" if code and code[1] not in text else text


def _files(sizes: Mapping[str, int]) -> list[str]:
    """Return which of all paths below a folder are files.

    An empty folder may be an object without content, made by a console, whose slash the library
    takes away.
    """
    empty = [path for path, size in sizes.items() if not size]
    if not empty:
        return [*sizes]
    folders = {str(folder) for path in sizes for folder in PurePosixPath(path).parents}
    markers = {path for path in empty if path in folders or "." not in path.rpartition("/")[2]}
    return [path for path in sizes if path not in markers]


def _at_once(call: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return the results of many calls, `CONCURRENT` at a time."""
    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(CONCURRENT, len(items))) as pool:
        return list(pool.map(call, items))


def _private_folder() -> Path:
    """Return the scratch folder of buckets. SpecError if it belongs to another user."""
    given = os.environ.get(SCRATCH)
    path = Path(given) if given else Path(tempfile.gettempdir(), f"attr-batch-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        hint = "wanted a folder on a local disk that may be written"
        raise SpecError(f"{path}: {error.strerror}", SCRATCH, hint) from None
    with explained(path, ROOM_HINT):
        if not given and path.lstat().st_uid != os.getuid():
            hint = "set it to a folder of yours"
            raise SpecError(f"{path} belongs to another user", SCRATCH, hint)
    return path
