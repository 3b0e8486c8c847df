"""Folders that fill while a command works, and that the same command continues: whose they are, and for what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from madpo.config import first_difference
from madpo.errors import StorageError
from madpo.locks import LOCKS
from madpo.practice.folders import told
from madpo.practice.overwriting import Inputs, empty, refuse_to_replace


def claim(output_dir: Path, state: Mapping[str, Any], *, overwrite: bool, inputs: Inputs = ()) -> None:
    """Make a folder ours, or refuse it; ``settings.json`` in it says what it is for, and the caller writes that.

    The caller holds the folder's lock: otherwise ``overwrite`` would empty a folder that another run fills.

    Args:
        state: what decides the result: data, digests, settings.
        overwrite: discard results of ours that are in it; see :func:`refuse_to_replace`.
        inputs: what the command reads, which must not be discarded with them.

    Raises:
        StorageError: it holds something else, or was made with another state; names the first difference.
    """
    if overwrite:
        refuse_to_replace(output_dir, inputs)
        empty(output_dir)
    path = output_dir / "settings.json"
    if path.is_file():
        found = read_own(path)
        wanted = json.loads(json.dumps(state))
        if (changed := first_difference(found, wanted)) is not None:
            raise StorageError(
                f"{output_dir} was made with {told(changed)}; choose another output_dir, or add --overwrite"
            )
    elif any(entry.name not in LOCKS for entry in output_dir.iterdir()):
        raise StorageError(f"{output_dir} is there and not empty; choose another output_dir, or add --overwrite")


def read_own(path: Path) -> dict[str, Any]:
    """What a JSON file that a command left holds.

    Raises:
        StorageError: it is damaged.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({error}); add --overwrite to begin anew") from error
    return found
