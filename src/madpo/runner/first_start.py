"""What an unfinished result fixes at its first start, so that every later start of it does the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from madpo.core import processes
from madpo.core.storage import json_object, write_atomically

T = TypeVar("T", int, str)
FILE = ".first_start.json"


def since_first_start(folder: Path, name: str, make: Callable[[], T]) -> T:
    """A value that ``make`` gave at the first start, the same on all processes; ``folder`` is that of the checkpoints.

    Raises StorageError: the file that holds it is damaged.
    """

    def look() -> T:
        found = _read(folder / FILE)
        if name not in found:
            found[name] = make()
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / FILE, json.dumps(found) + "\n")
        return found[name]  # type: ignore[return-value]

    return processes.on_main_process(look)


def fixed_before(folder: Path, name: str) -> int | str | None:
    """The value that an earlier start fixed, if there was one; the same on all processes.

    Raises StorageError: the file that holds it is damaged.
    """
    return processes.on_main_process(lambda: _read(folder / FILE).get(name))


def _read(path: Path) -> dict[str, int | str]:
    return json_object(path, "add --overwrite to start over") if path.exists() else {}
