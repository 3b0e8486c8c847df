"""One run at a time in a folder.

The system's file lock ends with its process, however that ends, so it is used wherever it works. Some network file
systems have none (Lustre without ``-o flock``, NFS without lockd). There a file with the owner's name marks the folder.
It outlives a killed owner, so the next run on the same machine removes it, after a check that the process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from filelock import lock_descriptor

from madpo.core.errors import StorageError
from madpo.core.progress import say
from madpo.core.storage import now

LOCK = ".lock"
OWNER = ".lock.owner"
"""Where the system has no file locks: exists while a run holds the folder."""
LOCKS = (LOCK, OWNER, f"{OWNER}.break")
"""All names that a lock leaves in a folder for a while."""

_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, getattr(errno, "ENOTSUP", errno.EOPNOTSUPP), errno.EINVAL}
_said: set[int] = set()


class _NoFlock(Exception):
    """The file system has no file locks."""


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold ``root`` for this process.

    Raises:
        StorageError: another run holds it, with its process id and host.
    """
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_system_lock(root))
        except _NoFlock as error:
            if (device := root.stat().st_dev) not in _said:
                _said.add(device)
                say(
                    f"{root}: its file system has no file locks ({error}); the file {OWNER} marks the folder as in use "
                    "instead, and stays there when a run is killed on another machine."
                )
            stack.enter_context(_owner_file(root))
        yield


def holder(root: Path) -> str | None:
    """Who holds the lock, as "process 12 on host a, since ..."; None if nobody does."""
    try:
        with _opened(root / LOCK, create=False) as file, suppress(_NoFlock):
            if not _flock(file):
                return _named(_record(root / LOCK) or {})
    except OSError:
        pass  # there is no lock file, or none that we may read
    owner = _record(root / OWNER)
    return None if owner is None or _gone(owner) else _named(owner)


@contextmanager
def _system_lock(root: Path) -> Iterator[None]:
    path = root / LOCK
    while True:
        with _opened(path, create=True) as file:
            if not _flock(file):
                raise _in_use(root, _record(path) or {})
            try:
                file.truncate(0)
                file.write(json.dumps(_mine()))
                file.flush()
                # A run that met no file locks, for a while or on its machine only, marked the folder in the other way.
                owner = _record(root / OWNER)
                if owner is not None and not _gone(owner):
                    raise _in_use(root, owner, root / OWNER)
                if not _is(file, path):  # the one before us removed the file that we waited for
                    continue
                yield
                return
            finally:
                file.truncate(0)
                # Only while it is ours: the folder may have been renamed, and another run may hold a new one here.
                if _is(file, path):
                    with suppress(PermissionError):  # Windows does not remove an open file; the next run takes it over
                        path.unlink()


@contextmanager
def _owner_file(root: Path) -> Iterator[None]:
    path, mine = root / OWNER, _mine()
    if not _create(path, mine):
        _remove_if_gone(path)
        if not _create(path, mine):
            raise _in_use(root, _record(path) or {}, path)
    try:
        other = _record(root / LOCK)  # a run that took the system's lock while there were locks
        if other and not _gone(other):
            raise _in_use(root, other, root / LOCK)
        yield
    finally:
        if _record(path) == mine:  # the folder may have been renamed, and another run may hold a new one here
            # In this order: a run that gets the system's lock looks for the owner's file, then at its own.
            (root / LOCK).unlink(missing_ok=True)
            path.unlink()


def _create(path: Path, who: dict[str, Any]) -> bool:
    """Write a new file; False where it exists. Network file systems make creation exclusive too."""
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(who, file)
    except FileExistsError:
        return False
    return True


def _remove_if_gone(path: Path) -> None:
    """Remove an owner's file whose process has ended.

    Only one process at a time removes, and looks again before it does, so it never removes the file of a run that took
    the folder meanwhile. If it is killed in here, a person has to remove the owner's file, as the refusal says.
    """
    owner = _record(path)
    breaking = path.with_name(f"{path.name}.break")
    if owner is None or not _gone(owner) or not _create(breaking, {}):
        return
    try:
        owner = _record(path)
        if owner is not None and _gone(owner):
            path.unlink()
    finally:
        breaking.unlink()


@contextmanager
def _opened(path: Path, *, create: bool) -> Iterator[TextIO]:
    """A lock's file. A link is not followed: the lock would empty the file that it points to."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0) | flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StorageError(f"{path} is a link; remove it or choose another folder") from error
        if create or error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        handle = os.open(path, os.O_RDONLY | flags)  # somebody else's run, to look at
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StorageError(f"{path} is not a regular file; remove it or choose another folder")
    with os.fdopen(handle, "r+" if create else "r", encoding="utf-8") as file:
        yield file


def _flock(file: TextIO) -> bool:
    """Take the system's lock; False where another process holds it."""
    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        # EBADF: NFS locks nothing that is open for reading only.
        if error.errno in _NO_FLOCK or (error.errno == errno.EBADF and not file.writable()):
            raise _NoFlock(error.strerror) from error
        raise


def _is(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _mine() -> dict[str, Any]:
    return {"pid": os.getpid(), **_here(), "started": now(), "token": uuid.uuid4().hex}


def _here() -> dict[str, Any]:
    """Where a process number means a process: the host, and on Linux its namespace, which containers have their own."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = None
    return {"host": socket.gethostname(), "namespace": namespace}


def _gone(who: dict[str, Any]) -> bool:
    """Whether the process that a record names has ended for certain: it ran here, and no process has its number."""
    import psutil

    pid = who.get("pid")
    here = all(who.get(key) == value for key, value in _here().items())
    return here and isinstance(pid, int) and 0 < pid < 2**31 and not psutil.pid_exists(pid)


def _record(path: Path) -> dict[str, Any] | None:
    """What a lock's file says of its holder; None where there is no file, empty where it is being written."""
    try:
        with _opened(path, create=False) as file:
            who = json.loads(file.read(4096))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except StorageError:
        raise
    except (OSError, ValueError, RecursionError):  # Windows reads nothing of a file that another process has locked
        return {}
    return who if isinstance(who, dict) else {}


def _named(who: dict[str, Any]) -> str:
    return f"process {who.get('pid', '?')} on {who.get('host', '?')}, since {who.get('started', '?')}"


def _in_use(root: Path, who: dict[str, Any], left: Path | None = None) -> StorageError:
    """The refusal; ``left`` is the file that outlives its process."""
    ended = "" if left is None else f"; if that process has ended, remove {left}"
    return StorageError(
        f"{root} is in use by another run ({_named(who)}); wait for it, stop it, or choose another folder{ended}"
    )
