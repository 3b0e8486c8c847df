"""Preference data to begin with: twenty pairs, eight held-out ones, and eight prompts."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from madpo.core.errors import StorageError
from madpo.core.storage import expanded, storage_errors, write_atomically

FILES = ("pairs.jsonl", "heldout.jsonl", "prompts.jsonl")


def write_example(folder: str | Path) -> list[Path]:
    """Write the example's files into ``folder``, which is made where it does not exist.

    Raises StorageError: one of the files exists with other content, or the folder cannot be written.
    """
    folder = expanded(folder)
    texts = {folder / name: (files("madpo.data") / "example" / name).read_bytes() for name in FILES}
    with storage_errors(folder):
        for path, text in texts.items():
            if path.exists() and path.read_bytes() != text:
                raise StorageError(f"{path} already exists with other content; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            write_atomically(path, text)
    return list(texts)
