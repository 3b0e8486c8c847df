"""How a command runs its operation: in the folder that the user names, through the runner that a study uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from madpo.core.errors import StorageError, first_line
from madpo.core.locks import LOCKS
from madpo.core.progress import say
from madpo.core.storage import expanded
from madpo.data.sources import split_of_folder
from madpo.runner.folder import UNFINISHED, file_digest
from madpo.runner.record import RECORD
from madpo.runner.step import OperationFn, Source, Step
from madpo.runner.work import run_step

Report = TypeVar("Report", bound=BaseModel)


def run_in_folder(
    fn: OperationFn,
    config: BaseModel,
    inputs: Mapping[str, str | Path | None],
    output_dir: str | Path,
    *,
    memory: str,
    overwrite: bool = False,
    protected: Iterable[str | Path] = (),
) -> Path:
    """Run an operation in ``output_dir``, or continue it; a finished one is left as it is.

    Args:
        fn: the operation, decorated with :func:`madpo.runner.operation.operation`.
        inputs: role -> file, folder, packaged name or hub id; None is left out.
        memory: what to do when the memory is used up, for the sentence.
        overwrite: replace an earlier result.
        protected: further files and folders that the operation reads, which ``overwrite`` must not remove; the base
            models of adapters and reward models are protected as well.

    Returns:
        The folder.

    Raises:
        StorageError: as :func:`madpo.runner.folder.prepare`.
    """
    out = expanded(output_dir)
    given = {
        role: Source(str(place), digest(place) or str(place)) for role, place in inputs.items() if place is not None
    }
    step = Step(fn.__name__, fn, config, given)
    places = [*given.values(), *(Source(str(place), "") for place in protected)]
    reads = [path for source in places for path in _bases(source.folder(out))]
    _, before = run_step(step, out, overwrite=overwrite, memory=memory, protected=reads)
    if before:
        say(f"{out} is complete; nothing to do.")
    return out


def _bases(path_or_name: Path) -> list[Path]:
    """``path_or_name`` and, where it is or holds an adapter or a reward model, the folder of its base model."""
    found = [path_or_name]
    for file, key in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("adapter/adapter_config.json", "base_model_name_or_path"),
        ("reward_model.json", "base"),
    ):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # loading it reports that better
            found.append(Path(json.loads((path_or_name / file).read_bytes())[key]))
    return found


def load_report(path: Path, model: type[Report]) -> Report:
    """The report that an operation wrote.

    Raises:
        StorageError: it is missing or damaged.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, ValueError) as error:
        raise StorageError(
            f"{path} is damaged ({first_line(error, 160)}); pass --overwrite to make it again"
        ) from error


def digest(path_or_name: str | Path) -> str | None:
    """SHA-256 of a file, or of a folder's files by name; None where it is neither (a name on the hub).

    Records and locks do not count, so that two equal results have one digest. Raises StorageError: it cannot be read.
    """
    part = split_of_folder(path_or_name)
    path = expanded(path_or_name) if part is None else part[0]
    try:
        if path.is_file():
            return file_digest(path)
        if not path.is_dir():
            return None
        parts = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            name = file.relative_to(path)
            if name.parts[0] not in (*LOCKS, RECORD, UNFINISHED):
                parts.update(f"{name.as_posix()}:{file_digest(file)}\n".encode())
        return parts.hexdigest()
    except OSError as error:
        raise StorageError(
            f"{error.filename or path} cannot be read ({error.strerror}); make it readable for you, or copy it again"
        ) from error


def toml(data: Mapping[str, Any]) -> str:
    """The TOML text of plain values; what is None is left out, as TOML has no word for it."""
    return tomli_w.dumps(_without_none(data))


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value
