"""Results as folders: whole or absent, with the digests and the settings that made them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from madpo import processes
from madpo.config import first_difference
from madpo.errors import ConfigError, MadpoError, StorageError
from madpo.locks import LOCKS, locked
from madpo.memory import memory_errors
from madpo.practice.overwriting import FINISHED, STATE, Inputs, empty, refuse_inputs_inside, refuse_occupied
from madpo.progress import say
from madpo.recipe import CHECKPOINTS
from madpo.storage import storage_errors, sync_folder, write_atomically

_CHUNK = 1 << 20


@contextmanager
def building(
    output_dir: Path,
    state: Mapping[str, Any],
    *,
    overwrite: bool = False,
    inputs: Inputs = (),
    memory: str = "use a smaller batch size",
) -> Iterator[Path]:
    """A folder beside ``output_dir`` to work in, which takes its place when the work is done.

    When the work fails the folder is removed, unless it holds a checkpoint: hours of training outlive a full disk, a
    diverged step and a lack of memory. When it is interrupted or killed it stays as well, and the next call with the
    same ``state`` (what decides the result) works on in it. A call with another state begins anew, but not where that
    would discard a checkpoint: this takes ``overwrite``. Checkpoints are removed with the step that puts the result in
    its place; a call that finds a result which was finished, but not in its place, puts it there. All processes of a
    launch get the same folder; the leading one makes it, and the others wait for it at both ends.

    Args:
        overwrite: replace a result of madpo in ``output_dir``; see :func:`refuse_to_replace`.
        inputs: what the work reads, which must not be removed with the old result.
        memory: what to do when the memory is used up, for the sentence.

    Raises:
        StorageError: ``output_dir`` is there and not empty, or holds a checkpoint of another state (both without
            ``overwrite``; the sentence names the first difference), must not be replaced, was finished by a run before
            this one, or another run is writing it.
        MemoryShortage: the work needs more memory than there is.
    """
    output_dir = output_dir.resolve()
    partial = _partial(output_dir)
    text = json.dumps(state, sort_keys=True, default=str)
    with storage_errors(output_dir), ExitStack() as held:
        processes.first(lambda: _open(output_dir, partial, text, held, inputs, overwrite=overwrite))
        try:
            with storage_errors(partial), memory_errors(memory):
                yield partial
        except Exception as error:
            # A process that was killed breaks the others' connections; what they made so far is still good.
            if processes.leads() and (processes.count() == 1 or isinstance(error, MadpoError)):
                _clear(output_dir, partial)
            raise
        processes.first(lambda: _finish(output_dir, partial, overwrite=overwrite))


def in_place(output_dir: Path) -> bool:
    """Whether a result is there; one that an earlier run had finished, and did not come to put there, is put there.

    Raises:
        StorageError: another run is writing it.
    """
    partial = _partial(output_dir)
    if not output_dir.exists() and (partial / FINISHED).is_file():
        with storage_errors(partial), locked(partial, output_dir):
            _put_in_place(output_dir, partial)
    return output_dir.exists()


def _partial(output_dir: Path) -> Path:
    return output_dir.with_name(f".{output_dir.name}.partial")


def _open(output_dir: Path, partial: Path, state: str, held: ExitStack, inputs: Inputs, *, overwrite: bool) -> None:
    """Make the folder ours; ``held`` takes the lock."""
    refuse_occupied(output_dir, overwrite=overwrite, inputs=inputs)
    with storage_errors(output_dir):
        held.enter_context(locked(partial, output_dir))
        # The run that held the lock until now may have filled it.
        refuse_occupied(output_dir, overwrite=overwrite, inputs=inputs)
        if (partial / FINISHED).is_file():
            _deliver(output_dir, partial, overwrite=overwrite)
            held.enter_context(locked(partial, output_dir))  # the first lock went with the folder
        made_for = partial / STATE
        if not made_for.is_file() or made_for.read_bytes() != state.encode():
            if not overwrite:
                _refuse_to_lose(output_dir, partial, state)
            refuse_inputs_inside(partial, inputs)
            empty(partial)
            write_atomically(made_for, state)


def _refuse_to_lose(output_dir: Path, partial: Path, state: str) -> None:
    """Refuse to begin anew where an interrupted work of another state has left a checkpoint: it may be hours."""
    kept = _checkpoints(partial)
    if not kept:
        return
    try:
        before = json.loads((partial / STATE).read_bytes())
    except (OSError, ValueError, RecursionError):
        before = None
    changed = first_difference(before, json.loads(state))
    what = f"with {told(changed)}" if changed and changed[0] else "by another madpo"
    raise StorageError(
        f"{output_dir} was begun {what}, and its newest checkpoint is {kept[-1].parent}; set that back to continue, "
        "choose another output_dir, or add --overwrite to begin anew"
    )


def _finish(output_dir: Path, partial: Path, *, overwrite: bool) -> None:
    """Put the folder in its place. A kill in here leaves it there, or marked as finished for the next call."""
    with storage_errors(partial):
        (partial / STATE).rename(partial / FINISHED)
        sync_folder(partial)
        try:  # hours may have passed since it was looked at
            refuse_occupied(output_dir, overwrite=overwrite)
        except StorageError as error:
            raise _waiting(str(error).partition(";")[0], partial) from error
        _put_in_place(output_dir, partial)


def _waiting(why: str, partial: Path) -> StorageError:
    return StorageError(
        f"{why}; the new result is finished and waits in {partial}: move away what is in its place, and run the same "
        "command again, or move it yourself"
    )


def _deliver(output_dir: Path, partial: Path, *, overwrite: bool) -> None:
    """Put in its place what an earlier run had finished; where hours may be in it, nothing else in the same call.

    Raises:
        StorageError: it is in its place now, and without ``overwrite``, or after a training, that was all.
    """
    kept = _checkpoints(partial)
    _put_in_place(output_dir, partial)
    if kept or not overwrite:
        anew = "run the same command again" if overwrite else "add --overwrite"
        raise StorageError(
            f"{output_dir} is complete: an earlier run had finished it and was stopped before it was in its place, "
            f"which it is now; choose another output_dir, or {anew} to begin anew"
        )


def _put_in_place(output_dir: Path, partial: Path) -> None:
    """Take the mark off last: killed before, the next call begins this again.

    Raises:
        StorageError: the system does not let it be moved; the sentence says where it waits.
    """
    old = output_dir.with_name(f".{output_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        old.mkdir()
        if output_dir.exists():
            output_dir.rename(old / "result")
        # Renamed, since removing gigabytes takes its time, and no result should be missing for so long.
        if (partial / CHECKPOINTS).exists():
            (partial / CHECKPOINTS).rename(old / CHECKPOINTS)
        partial.rename(output_dir)
    except OSError as error:
        if (old / "result").exists() and not output_dir.exists():
            (old / "result").rename(output_dir)
        with suppress(OSError):
            old.rmdir()  # where nothing is in it
        raise _waiting(f"{output_dir} cannot be put in its place ({error.strerror or error})", partial) from error
    for name in (FINISHED, *LOCKS):
        (output_dir / name).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def _clear(output_dir: Path, partial: Path) -> None:
    """Remove what a failed work left, but for checkpoints."""
    kept = _checkpoints(partial)
    if not kept:
        shutil.rmtree(partial, ignore_errors=True)
        return
    say(
        f"{output_dir} is not finished; its newest checkpoint stays in {kept[-1].parent}, and the same command "
        "continues from there."
    )


def _checkpoints(partial: Path) -> list[Path]:
    """Manifests of the complete ones, the newest last."""
    return sorted(partial.rglob("checkpoint-*/manifest.json"), key=lambda path: path.stat().st_mtime)


def digest(place: str | Path) -> str | None:
    """SHA-256 of a file, or of a folder's files by name; None where it is neither (a name on the hub).

    What a kill just after the folder took its place leaves in it, and a lock, count for nothing.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return _file_digest(path)
    if not path.is_dir():
        return None
    parts = hashlib.sha256()
    passing = [path / name for name in (FINISHED, *LOCKS)]
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p not in passing):
        parts.update(f"{file.relative_to(path).as_posix()}:{_file_digest(file)}\n".encode())
    return parts.hexdigest()


def training_state(
    data: str | Path, data_digest: str | None, eval_data: str | Path | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides a training's result: its settings, and its pairs by content (by name where they lie on the hub)."""
    return {
        "data": data_digest or str(data),
        "eval_data": None if eval_data is None else digest(eval_data) or str(eval_data),
        "settings": dict(settings),
    }


def told(changed: tuple[str, Any, Any]) -> str:
    """A difference in words: ``seed = 1, not 2``."""
    key, before, after = changed
    return f"{key if key.isprintable() else repr(key)} = {_short(before)}, not {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _file_digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def toml(data: Mapping[str, Any]) -> str:
    """The TOML text of plain values, lists and tables; what is None is left out, as TOML has no word for it."""
    lines: list[str] = []
    _table(data, (), lines)
    return "\n".join(lines) + "\n"


def _table(data: Mapping[str, Any], above: tuple[str, ...], lines: list[str]) -> None:
    tables = {key: value for key, value in data.items() if isinstance(value, Mapping)}
    for key, value in data.items():
        if key not in tables and value is not None:
            lines.append(f"{_key(key)} = {_value(value)}")
    for key, value in tables.items():
        lines.extend(["", f"[{'.'.join(map(_key, (*above, key)))}]"])
        _table(value, (*above, key), lines)


def _key(text: str) -> str:
    return text if text.replace("_", "").replace("-", "").isalnum() and text.isascii() else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(str(k))} = {_value(v)}" for k, v in value.items() if v is not None) + " }"
    raise ConfigError(f"{value!r} cannot be written as TOML; give text, a number, true/false or a list of them")
