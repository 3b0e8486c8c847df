"""Features of pairs in one safetensors file, written and read row by row, so that they need not fit into memory."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from madpo.core.errors import StorageError
from madpo.core.storage import sync_folder, temporary_path

SIDES = ("chosen", "rejected")
_BYTES = 1 << 24


class FeatureFile:
    """float32 tables ``chosen`` and ``rejected``, ``pairs x features``, mapped into memory."""

    def __init__(self, path: Path, mode: str, begin: int, pairs: int, features: int) -> None:
        shape = (2, pairs, features)
        table: Any = np.memmap(path, dtype="<f4", mode=mode, offset=begin, shape=shape)  # type: ignore[call-overload]
        self.path = path
        self.chosen, self.rejected = table
        self.flush = table.flush

    @classmethod
    def read(cls, path: Path, pairs: int, features: int) -> FeatureFile:
        """Map a file that is whole.

        Raises StorageError: it is missing, has other sizes, or has changed since it was written; the text says which.
        """
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(min(size, 1 << 16))
                stated = json.loads(header)["__metadata__"]["sha256"]
                if header != _header(pairs, features, stated):
                    raise StorageError(f"{path} holds features of other sizes")
                if _digest(path, 8 + size) != stated:
                    raise StorageError(f"{path} has changed since it was written (SHA-256)")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path} cannot be read ({error})") from error
        return cls(path, "r", 8 + size, pairs, features)


class FeatureWriter:
    """Writes a :class:`FeatureFile`, which appears, whole and durable, when the ``with`` block ends without error."""

    def __init__(self, path: Path, pairs: int, features: int) -> None:
        self.path, self.pairs, self.features = path, pairs, features

    def __enter__(self) -> FeatureWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = temporary_path(self.path)
        header = _header(self.pairs, self.features, "0" * 64)
        self._begin = 8 + len(header)
        with self._temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(self._begin + 8 * self.pairs * self.features)
        self._file = FeatureFile(self._temporary, "r+", self._begin, self.pairs, self.features)
        return self

    def write(self, start: int, chosen: NDArray[np.float32], rejected: NDArray[np.float32]) -> None:
        """Rows from ``start`` on."""
        self._file.chosen[start : start + len(chosen)] = chosen
        self._file.rejected[start : start + len(rejected)] = rejected

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            self._temporary.unlink(missing_ok=True)
            return
        self._file.flush()
        header = _header(self.pairs, self.features, _digest(self._temporary, self._begin))
        with self._temporary.open("r+b") as file:
            file.seek(8)
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)


def _header(pairs: int, features: int, digest: str) -> bytes:
    size = 4 * pairs * features
    tables = {
        side: {"dtype": "F32", "shape": [pairs, features], "data_offsets": [i * size, (i + 1) * size]}
        for i, side in enumerate(SIDES)
    }
    text = json.dumps({"__metadata__": {"sha256": digest}, **tables}).encode()
    return text + b" " * (-len(text) % 8)


def _digest(path: Path, begin: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(begin)
        while block := file.read(_BYTES):
            digest.update(block)
    return digest.hexdigest()
