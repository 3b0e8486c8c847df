"""The folder of a result: ``record.json`` in it makes the result exist, and lists every file that belongs to it.

Work in progress is in ``unfinished``, with ``begun.json``, which says what is being made. When the work is done, its
record is written there, the files are moved up, and the record is moved last. So a reader sees the old result or the
new one, and a kill at any moment loses nothing that was finished: the next call completes the move. ``checkpoints``
inside ``unfinished`` is what only an interrupted run needs; it is never part of the result.

``--overwrite`` removes the files that the old record lists and nothing else.
"""

import hashlib
import json
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from madpo.core.config import first_difference
from madpo.core.errors import StorageError, shortened
from madpo.core.locks import LOCKS
from madpo.core.storage import json_object, remove_leftovers, sync_folder, write_atomically
from madpo.runner.record import RECORD, Record, load_record

UNFINISHED = "unfinished"
BEGUN = "begun.json"
CHECKPOINTS = "checkpoints"
ERROR = "error.txt"
_OURS = (*LOCKS, UNFINISHED, ERROR)
_REMEDY = "choose another --output_dir, or pass --overwrite"


def prepare(
    out: Path, begun: Mapping[str, Any], *, overwrite: bool = False, inputs: Iterable[Path] = ()
) -> Record | None:
    """Make a folder ready for the work; the caller holds its lock.

    Args:
        out: the folder of the result; created if absent.
        begun: what decides the result, as plain values: operation, config, inputs and libraries.
        overwrite: replace an earlier result; its files are removed when the new one is finished.
        inputs: files and folders that the work reads, which must not be removed.

    Returns:
        The record, if the result is there already and is not to be replaced; nothing is left to do then.

    Raises:
        StorageError: ``out`` holds something else, a result or an interrupted run of other settings, a result of which
            a file is missing, or (with ``overwrite``) files of the user that the new result would replace.
    """
    refuse_foreign(out)
    _complete_move(out)
    record = load_record(out)
    if record is not None and not overwrite:
        changed = what_changed(record.model_dump(), begun)
        if changed is None:
            if gone := [name for name in record.files or () if not (out / name).is_file()]:
                raise StorageError(
                    f"{out / gone[0]} is missing from the finished result; copy it back, choose another --output_dir, "
                    "or pass --overwrite to make the result again"
                )
            if not checkpoints(out / UNFINISHED):
                _remove_work(out / UNFINISHED)  # a kill just after the record was moved left it
            return record
        raise StorageError(f"{out} holds the result of other settings ({changed}); {_REMEDY}")
    if record is None and (out / RECORD).exists():
        raise StorageError(f"{out / RECORD} is damaged; move the folder away or choose another --output_dir")
    if record is not None:
        refuse_removal(out, record, inputs)
    _open_work(out, begun, overwrite=overwrite, inputs=inputs)
    return None


def refuse_foreign(out: Path) -> None:
    """Refuse a folder that holds something else than a result of ours; it needs no library and can be asked early.

    Raises StorageError: ``out`` is a file, or holds files and no record.
    """
    work = out / UNFINISHED
    if out.exists() and not out.is_dir():
        raise StorageError(f"{out} is a file; choose another --output_dir")
    # A kill may leave it before the note of what is made is written.
    foreign = (
        work.is_dir()
        and not (work / BEGUN).is_file()
        and not all(path.name.startswith(f".{BEGUN}.") and path.is_file() for path in work.iterdir())
    )
    if work.is_symlink() or foreign or (work.exists() and not work.is_dir()):
        raise StorageError(f"{work} was not made by madpo; move it away or choose another --output_dir")
    if not out.is_dir() or (out / RECORD).is_file() or (work / RECORD).is_file():
        return
    if entries := sorted(entry.name for entry in out.iterdir() if entry.name not in _OURS):
        raise StorageError(
            f"{out} is not empty and holds no result (it holds {entries[0]!r}); choose another --output_dir"
        )


def _remove_work(work: Path) -> None:
    """Remove ``unfinished``; the note that it is ours goes last, so that a kill in here leaves it recognisable."""
    if not work.is_dir():
        return
    _remove_all(work, (BEGUN,))
    (work / BEGUN).unlink(missing_ok=True)
    work.rmdir()


def _open_work(out: Path, begun: Mapping[str, Any], *, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Continue the interrupted run in ``unfinished``, or begin one; a checkpoint of other settings is never dropped."""
    work = out / UNFINISHED
    text = json.dumps(begun, sort_keys=True, default=str)
    if (work / BEGUN).is_file():
        try:
            changed = what_changed(json_object(work / BEGUN, ""), json.loads(text))
        except StorageError:
            changed = "it is unreadable"
        if changed is None:
            remove_leftovers(work)
            return
        kept = checkpoints(work)
        if kept and not overwrite:
            raise StorageError(
                f"{out} holds an interrupted run of other settings ({changed}), with checkpoints in {kept}; set "
                f"that back to continue it, choose another --output_dir, or pass --overwrite to start over"
            )
        for path in inputs:
            if work.resolve() in (path := path.resolve()).parents or path == work.resolve():
                raise StorageError(f"{path} is an input and would be removed with {work}; move it first")
    _remove_work(work)
    work.mkdir(parents=True)
    write_atomically(work / BEGUN, text)


def what_changed(
    before: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> str | None:
    """The first difference in operation, config, inputs and libraries of two results, in words; None if nothing
    differs.

    ``names`` says what to call the inputs, by role.
    """
    for part in ("operation", "config", "inputs", "libraries"):
        found = first_difference(before.get(part), json.loads(json.dumps(now.get(part), default=str)))
        if found is None:
            continue
        key, old, new = found
        if part == "inputs":
            return f"its input {key} changed{f' ({names[key]})' if names and key in names else ''}"
        if part == "operation":
            return f"the operation is {new}, was {old}"
        return f"{key if key.isprintable() else repr(key)} is {_short(new)}, was {_short(old)}"
    return None


def _short(value: Any) -> str:
    return "not set" if value is None else shortened(json.dumps(value, ensure_ascii=False), 60)


def checkpoints(work: Path) -> Path | None:
    """The folder with what an interrupted run can continue from; None if it holds nothing but hidden files."""
    folder = work / CHECKPOINTS
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            return folder
    return None


def final_folder(work: Path) -> Path:
    """Where a result that is being made will be, for relative paths in it; other folders are as they are."""
    return work.parent if work.name == UNFINISHED else work


def files_of(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file of a finished work, without checkpoints and our own notes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] not in (CHECKPOINTS, BEGUN, RECORD):
            found[name.as_posix()] = file_digest(path)
    return found


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finish(out: Path, record: Record) -> None:
    """Make the finished work in ``unfinished`` the result."""
    work = out / UNFINISHED
    write_atomically(work / RECORD, record.model_dump_json(indent=1) + "\n")
    _complete_move(out)


def _complete_move(out: Path) -> None:
    """Move a finished work up; where a kill interrupted this, go on with it."""
    work = out / UNFINISHED
    new = load_record(work) if (work / RECORD).is_file() else None
    if new is None:
        return
    old = load_record(out)
    going = set() if old is None else set(_listed(out, old))
    entries = [entry for entry in sorted(work.iterdir()) if entry.name not in (CHECKPOINTS, BEGUN, RECORD)]
    for path in (path for entry in entries for path in [out / entry.name, *(out / entry.name).rglob("*")]):
        if path.is_file() and path.relative_to(out).as_posix() not in going:
            raise StorageError(
                f"{path} is in the way of the new result, which is finished and waits in {work}; move it away and run "
                "the same command again"
            )
    if old is not None:
        refuse_removal(out, old, ())
        for name in going:
            (out / name).unlink(missing_ok=True)
        for folder in sorted({parent for name in going for parent in Path(name).parents}, reverse=True):
            with suppress(OSError):  # something of the user's is in it
                (out / folder).rmdir()
        (out / RECORD).unlink()
    for entry in entries:
        with suppress(OSError):  # an empty folder that the old result left
            (out / entry.name).rmdir()
        entry.rename(out / entry.name)
    (work / RECORD).rename(out / RECORD)
    sync_folder(out)
    (out / ERROR).unlink(missing_ok=True)
    _remove_work(work)


def _listed(out: Path, record: Record) -> Iterator[str]:
    """Files of a result that are inside its folder; of an export, which keeps some of them, all that are there."""
    if record.files is None:
        yield from (name for name in files_of(out) if Path(name).parts[0] not in _OURS)
        return
    for name in record.files:
        if ".." not in Path(name).parts and not Path(name).is_absolute():
            yield name


def refuse_removal(out: Path, record: Record, inputs: Iterable[Path]) -> None:
    """Refuse to remove a result that the work reads, or one with files that the user has changed (StorageError)."""
    names = list(_listed(out, record))
    removed = {(out / name).resolve() for name in names}
    for path in inputs:
        whole = path.resolve()
        if whole in removed or any(whole in file.parents for file in removed):
            raise StorageError(f"{path} is an input and would be removed with the result in {out}; move it first")
    for name in names:
        path = out / name
        if path.is_file() and record.files is not None and file_digest(path) != record.files[name]:
            raise StorageError(f"{path} was changed after it was written; move it away, and run the same command again")


def clear(out: Path) -> None:
    """Empty the folder of a step, which the run owns, where a damaged record left files that belong to no result."""
    _remove_all(out, _OURS)


def _remove_all(folder: Path, but: Container[str]) -> None:
    for entry in folder.iterdir():
        if entry.name not in but:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def abandon(out: Path) -> Path | None:
    """Remove what a failed work left, unless it holds a checkpoint; the folder of those that stay."""
    work = out / UNFINISHED
    if kept := checkpoints(work):
        return kept
    _remove_work(work)
    return None
