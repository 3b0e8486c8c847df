"""Finished steps to an object store (any URL of fsspec), file by file and the record last.

A folder in the store without ``record.json`` is not finished, as on a disk. An upload that fails loses nothing: the
result lies in the run's folder, the run goes on, and the next run uploads what the store lacks. Credentials come from
the store's own environment and files; what a URL carries of them is never printed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from madpo.core.errors import ConfigError
from madpo.core.progress import say
from madpo.core.storage import stays_inside
from madpo.runner.record import RECORD

_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "obs", "cos"}
"""Kinds of stores in which a path begins with a bucket and a folder is only a part of a name."""


class Upload(AbstractContextManager["Upload"]):
    """Copies folders to ``url`` in a thread of its own, in the order they come; enter it, and leave it to wait.

    ``failed`` says what could not be uploaded, and why. Raises ConfigError: a URL of an unknown kind or without its
    package.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._secrets = _secrets(url)
        self.shown = shown(url)
        if not re.match(r"[a-z][a-z0-9+.-]*://", url):
            raise ConfigError(f"--upload {self.shown}: give a URL such as s3://bucket/folder or file:///mnt/store")
        try:
            self._store, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(f"--upload {self.shown}: {self._words(error)}") from None
        protocol = self._store.protocol
        self._buckets = not _WITHOUT_FOLDERS.isdisjoint([protocol] if isinstance(protocol, str) else protocol)
        self.failed: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._pending: dict[str, Future[None]] = {}

    def step(self, name: str, folder: Path, root: Path) -> None:
        """Queue a finished step's folder in ``root``. Of an export only the tables are there, which are files."""
        if not folder.is_dir():
            return
        self._queue(name, lambda: self._put_step(folder, folder.relative_to(root).as_posix()))

    def files(self, name: str, paths: Iterable[Path], root: Path) -> None:
        """Queue files that lie in ``root``; they replace those of the same name."""
        given = sorted(paths)

        def put_all() -> None:
            for path in given:
                self._put(path, path.relative_to(root).as_posix())

        self._queue(name, put_all)

    def _queue(self, name: str, work: Callable[[], None]) -> None:
        def attempt() -> None:
            try:
                work()
            except Exception as error:  # of any store's own kind; it must not cost a result
                self.failed[name] = self._words(error)
                say(f"{name}: not uploaded to {self.shown}: {self.failed[name]}")

        self._pending[name] = self._thread.submit(attempt)

    def _put_step(self, folder: Path, name: str) -> None:
        record = (folder / RECORD).read_bytes()
        remote = f"{self._root}/{name}/{RECORD}"
        if self._store.exists(remote):
            if self._store.cat_file(remote) == record:
                return
            self._store.rm_file(remote)  # of another run of the same step: unfinished until all of it is ours
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != RECORD and not path.name.endswith(".tmp"):
                self._put(path, f"{name}/{path.relative_to(folder).as_posix()}")
        self._put(folder / RECORD, f"{name}/{RECORD}")

    def _put(self, path: Path, name: str) -> None:
        if not stays_inside(path, path.parents[name.count("/")]):
            raise OSError(f"{path} leads out of the run's folder by a link; copy there what it points to")
        remote = f"{self._root}/{name}"
        if not self._buckets:  # where there are buckets, this would create one of a name that was mistyped
            self._store.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
        self._store.put_file(str(path), remote)
        self._store.invalidate_cache()
        size = self._store.info(remote)["size"]
        if size != path.stat().st_size:
            raise OSError(f"{name} has {size} bytes in the store and {path.stat().st_size} here")

    def _words(self, error: BaseException) -> str:
        text = str(error).partition("\n")[0]
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return f"{type(error).__name__}: {text}"[:300]

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        waiting = [name for name, future in self._pending.items() if not future.done()]
        if waiting and error is None:
            say(f"Waiting for {len(waiting)} uploads to {self.shown}.")
        self._thread.shutdown(wait=True, cancel_futures=error is not None)


def shown(url: str) -> str:
    """The URL without name, password and query."""
    try:
        parts = urlsplit(url)
        place = parts.netloc.rsplit("@", 1)[-1]
    except ValueError:
        return "(an unreadable URL)"
    return f"{parts.scheme}://{place}{parts.path}" if parts.scheme else parts.path


def _secrets(url: str) -> list[str]:
    """What must not be printed, longest first."""
    try:
        parts = urlsplit(url)
        user = parts.netloc.rpartition("@")[0]
        found: list[Any] = [user, parts.username, parts.password, parts.query, *parts.query.split("&")]
    except ValueError:
        return [url]
    found += [piece.partition("=")[2] for piece in parts.query.split("&")]
    found += [unquote(text) for text in found if text]
    return sorted({text for text in found if text}, key=len, reverse=True)
