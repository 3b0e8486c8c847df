"""Writing to disk so that a reader sees the old file or the new one, and mistakes of the disk told plainly."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from madpo.errors import StorageError

_REMEDY = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, finished steps are kept",
    errno.EDQUOT: "your disk quota is used up; free some space and run the same command again, finished steps are kept",
    errno.EACCES: "permission denied; make it writable for you or choose another folder",
    errno.EPERM: "the operation is not permitted; make it writable for you or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another folder",
    errno.EEXIST: "there is a file where a folder is needed; move it away or choose another folder",
    errno.EISDIR: "there is a folder where a file is needed; move it away or choose another folder",
}


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Turn a full disk, missing rights and the like into a StorageError; other errors pass through."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDY.get(error.errno or 0)
        if remedy is None:
            raise
        raise StorageError(f"{error.filename or place}: {remedy}") from error
    except Exception as error:
        # Writers in Rust and C++ (safetensors, torch) tell of a full disk in an error type of their own.
        if os.strerror(errno.ENOSPC) in str(error):
            raise StorageError(f"{place}: {_REMEDY[errno.ENOSPC]}") from error
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary one beside it, and make it durable before this returns.

    A crash leaves the old file or the new one, never a part.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder; the file itself is safe by then.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold ``root`` for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        StorageError: another run holds it, with its process id and host.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"{root} is in use by another run ({holder(root)}); wait for it, stop it, or choose another folder"
            ) from None
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": now()}, file)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def holder(root: Path) -> str | None:
    """Who holds the lock, as "process 12 on host a, since ..."; None if nobody does."""
    try:
        with (root / ".lock").open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read()
                # The holder writes its line just after it has taken the lock.
                who = json.loads(text) if text else {}
                return f"process {who.get('pid', '?')} on {who.get('host', '?')}, since {who.get('started', '?')}"
    except FileNotFoundError:
        return None
    return None


def now() -> str:
    """The time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
