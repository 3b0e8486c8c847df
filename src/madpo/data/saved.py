"""Saved data sets of others: none of their files lies elsewhere, and no row makes a library open one.

``datasets.load_from_disk`` reads whatever ``state.json`` names, and decodes an image or a sound by opening the path, or
the address, in the row.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from madpo.core.errors import DataError
from madpo.core.storage import json_object, stays_inside
from madpo.data.raw import described_name

_AGAIN = "save the data set again"


def refuse_files_outside(name: str, folder: Path) -> None:
    """Refuse a saved data set whose files are not in its folder, by name or by a link.

    Raises:
        DataError: with the file.
    """
    files = json_object(folder / "state.json", _AGAIN, DataError).get("_data_files")
    found = [entry.get("filename") if isinstance(entry, dict) else None for entry in _entries(files)]
    if not found or not all(isinstance(file, str) for file in found):
        raise DataError(f"{name}: state.json does not name its files; save the data set again")
    for file in map(str, found):
        if not stays_inside(folder / file, folder):
            raise DataError(
                f"{name}: state.json names the file {described_name(file)}, which is outside the folder; copy it there "
                "if it is yours, or do not use the data set"
            )


def saved_splits(name: str, folder: Path) -> str:
    """The splits of a folder with several, for a sentence."""
    found = _entries(json_object(folder / "dataset_dict.json", _AGAIN, DataError).get("splits"))
    return ", ".join(str(split) if str(split).isprintable() else repr(split) for split in found[:12])


def unopened(feature: Any) -> Any:
    """Features of a data set, with images, sounds and the like left as they are stored. No loss reads one."""
    if isinstance(feature, dict):
        return type(feature)({key: unopened(inner) for key, inner in feature.items()})
    if isinstance(feature, list | tuple):
        return [unopened(inner) for inner in feature]
    found = copy.copy(feature)
    if hasattr(found, "feature"):  # a list of something
        found.feature = unopened(found.feature)
    elif hasattr(found, "decode") and type(found).__name__ != "Json":  # which is text in the row itself
        found.decode = False
    return found


def _entries(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
