"""Writing to disk so that a reader sees the old file or the new one; errors of the disk in one sentence."""

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from madpo.core.errors import MadpoError, StorageError, first_line

_REMEDY = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, finished steps are kept",
    errno.EDQUOT: "your disk quota is used up; free some space and run the same command again, finished steps are kept",
    errno.EACCES: "permission denied; make it writable for you or choose another folder",
    errno.EPERM: "the operation is not permitted; make it writable for you or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another folder",
    errno.EEXIST: "there is a file where a folder is needed; move it away or choose another folder",
    errno.EISDIR: "there is a folder where a file is needed; move it away or choose another folder",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.EIO: "the disk reports an error; check it, and run the same command again, finished steps are kept",
    errno.EBUSY: "it is in use, as a mount point is, or a file that another process has open; choose another folder",
    errno.ELOOP: "a link is in its place; remove it or choose another folder",
    errno.EXDEV: "it cannot be renamed across file systems, or out of a container's image; choose another folder",
    errno.EFBIG: "it is larger than its file system or a limit (ulimit -f) allows; raise it or choose another folder",
    errno.EOPNOTSUPP: "its file system cannot do this; choose a folder on another one",
    errno.ENOSYS: "its file system cannot do this; choose a folder on another one",
    errno.EMFILE: "too many files are open at once; raise the limit (ulimit -n) and run the same command again",
    errno.ENFILE: "the system has too many files open at once; end other programs and run the same command again",
    # Network file systems and those of user programs (sshfs, FUSE).
    **dict.fromkeys(
        (errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EHOSTDOWN),
        "the connection to its file system is lost; mount it again and run the same command again",
    ),
}
_TEMPORARY = re.compile(r"\..+\.[0-9]+\.tmp")
_VANISHED = (
    "the folder has vanished while it was being written; if it was moved, move it back, and run the same command again"
)


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Turn a full disk, missing rights, a vanished folder and the like into a StorageError; other errors pass through.

    Args:
        place: the folder (or file) that is written, for the sentence; ``place`` that exists no more has vanished.
    """
    there = place.exists()
    try:
        yield
    except MadpoError:
        raise
    except OSError as error:
        if (sentence := disk_error(error, place)) is not None:
            raise sentence from error
        if error.errno == errno.ENOENT and (why := _missing(place, error.filename, there=there)) is not None:
            raise StorageError(f"{place}: {why}") from error
        raise
    except Exception as error:
        # Writers in Rust and C++ (safetensors, torch, Arrow) report the disk in an error type of their own.
        said = str(error)
        for code, remedy in _REMEDY.items():
            if f"os error {code})" in said or (code == errno.ENOSPC and os.strerror(code) in said):
                raise StorageError(f"{place}: {remedy}") from error
        if os.strerror(errno.ENOENT) in said and not place.exists():
            raise StorageError(f"{place}: {_VANISHED}") from error
        raise


def disk_error(error: OSError, place: object) -> StorageError | None:
    """The sentence with the remedy for an error of the disk, about its file or else ``place``; None for any other."""
    remedy = _REMEDY.get(error.errno or 0)
    return None if remedy is None else StorageError(f"{error.filename or place}: {remedy}")


def _missing(place: Path, file: object, *, there: bool) -> str | None:
    """Why ``file`` could not be found, if it is ``place`` or belongs to it and ``place`` does not exist."""
    if place.exists() or not isinstance(file, str | bytes | os.PathLike):
        return None
    found = Path(os.fsdecode(file)).absolute()
    if place.absolute() in found.parents or (there and found == place.absolute()):
        return _VANISHED
    if found in (place.absolute(), temporary_path(place.absolute()), *place.absolute().parents):
        return f"nothing can be created in {found.parent}; choose another place"
    return None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary one next to it, and make it durable before this returns.

    A crash leaves the old file or the new one, never a part.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # a rename would replace even /dev/null
        raise StorageError(f"{path} is not a regular file (a pipe or a device); choose another name")
    temporary = temporary_path(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        raise
    sync_folder(path.parent)


def json_object(path: Path, remedy: str, kind: type[MadpoError] = StorageError) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ``kind``: it is missing, damaged, or holds something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise kind(f"{path} cannot be read ({first_line(error, 120)}); {remedy}") from error
    if not isinstance(found, dict):
        raise kind(f"{path} cannot be read (it holds no JSON object); {remedy}")
    return found


def temporary_path(path: Path) -> Path:
    """Where this process writes a file until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed runs left in a folder and below; the caller holds the folder's lock."""
    for path in folder.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name) and not path.is_dir():
            path.unlink()


def remove_oldest(folder: Path, limit: int, keep: Collection[Path] = ()) -> int:
    """Remove files of a folder until at most ``limit`` bytes are left, those that were used longest ago first.

    Args:
        keep: never removed, and counted. Temporary files of the last week may be in use and are kept as well.

    Returns:
        How many files were removed.
    """
    found: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process makes room as well
            if path.is_file():
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    total, removed = sum(size for _, size, _ in found), 0
    for used, size, path in sorted(found):
        if total <= limit:
            break
        if path in keep or (_TEMPORARY.fullmatch(path.name) and time.time() - used < 7 * 24 * 3600):
            continue
        total, removed = total - size, removed + 1
        path.unlink(missing_ok=True)
    return removed


def stays_inside(path: Path, root: Path) -> bool:
    """Whether a path leads, through all links in it, to something inside ``root``."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, or a name that no file can have
        return False


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    if os.name == "nt":  # Windows opens no folder, and has no such call
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder; the file itself is safe by then.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


def expanded(path: str | Path) -> Path:
    """The path, with ``~`` at its beginning replaced by a home folder if there is one of that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def now() -> str:
    """The time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
