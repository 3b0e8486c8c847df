"""Numbers of pairs in one safetensors file, written and read row by row, so that they need not fit into memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from madpo.core.errors import StorageError
from madpo.core.storage import sync_folder, temporary_path

SIDES = ("chosen", "rejected")


class FeatureFile:
    """A table for each side of the pairs, ``pairs x features``, mapped into memory.

    What features need not say: ``names`` of the tables, and ``dtype`` of their numbers (float32 or float64).
    """

    def __init__(self, path: Path, begin: int, shape: tuple[int, int], dtype: str) -> None:
        table: Any = np.memmap(path, dtype=dtype, mode="r", offset=begin, shape=(2, *shape))
        self.chosen, self.rejected = table

    @classmethod
    def read(
        cls, path: Path, pairs: int, features: int, names: Sequence[str] = SIDES, dtype: str = "<f4"
    ) -> FeatureFile:
        """Map a file that is whole.

        Raises StorageError: it is missing, has other sizes, or has changed since it was written; the text says which.
        """
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(min(size, 1 << 16))
                stated = json.loads(header)["__metadata__"]["sha256"]
                if header != _header((pairs, features), names, dtype, stated):
                    raise StorageError(f"{path} holds features of other sizes")
                if _digest(path, 8 + size) != stated:
                    raise StorageError(f"{path} has changed since it was written (SHA-256)")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path} cannot be read ({error})") from error
        return cls(path, 8 + size, (pairs, features), dtype)


class FeatureWriter:
    """Writes a :class:`FeatureFile`, which appears, whole and durable, when the ``with`` block ends without error."""

    def __init__(self, path: Path, pairs: int, features: int, names: Sequence[str] = SIDES, dtype: str = "<f4") -> None:
        self.path, self.kind = path, ((pairs, features), names, dtype)

    def __enter__(self) -> FeatureWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = temporary_path(self.path)
        header = _header(*self.kind, "0" * 64)
        self._begin = 8 + len(header)
        self._file = self._temporary.open("w+b")
        self._file.write(len(header).to_bytes(8, "little") + header)
        return self

    def write(self, start: int, chosen: NDArray[Any], rejected: NDArray[Any]) -> None:
        """Rows from ``start`` on."""
        (pairs, features), _, dtype = self.kind
        # No memory map: where the disk is full, writing to one ends the process (SIGBUS) and says nothing.
        for side, rows in enumerate((chosen, rejected)):
            self._file.seek(self._begin + (side * pairs + start) * features * np.dtype(dtype).itemsize)
            self._file.write(np.ascontiguousarray(rows, dtype=dtype).data)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                self._finish()
                self._temporary.replace(self.path)
                sync_folder(self.path.parent)
        finally:
            with suppress(OSError):  # the disk is full: the first error is the one to report
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        """Write the header that says the digest, make the file durable, and close it."""
        shape, _, dtype = self.kind
        self._file.flush()
        self._file.truncate(self._begin + 2 * math.prod(shape) * np.dtype(dtype).itemsize)
        header = _header(*self.kind, _digest(self._temporary, self._begin))
        self._file.seek(8)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()  # Windows renames no open file


def _header(shape: tuple[int, int], names: Sequence[str], dtype: str, digest: str) -> bytes:
    width = np.dtype(dtype).itemsize
    size = width * math.prod(shape)
    tables = {
        name: {"dtype": f"F{8 * width}", "shape": [*shape], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    text = json.dumps({"__metadata__": {"sha256": digest}, **tables}).encode()
    return text + b" " * (-len(text) % 8)


def _digest(path: Path, begin: int) -> str:
    with path.open("rb") as file:
        file.seek(begin)
        return hashlib.file_digest(file, "sha256").hexdigest()
