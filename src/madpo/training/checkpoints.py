"""Checkpoints on disk: complete or absent, verified before they are read, and free of pickle.

A checkpoint is a folder ``checkpoint-<step>``. It is filled under a hidden name, every file is made durable, a
manifest with the SHA-256 of each comes last, and one rename makes the checkpoint exist. So a kill or a power cut at
any point leaves the checkpoints that were there before, and a damaged one is known as such. The manifest also holds
the identity of the training: what its result depends on. Only safetensors and JSON are written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from madpo.core.errors import DataError, MadpoError, first_line, is_shortage
from madpo.core.progress import say
from madpo.core.storage import storage_errors, sync_folder, write_atomically
from madpo.models.untrusted import PICKLES
from madpo.runner.folder import file_digest

FORMAT = 2
MANIFEST = "manifest.json"
WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
EXTRA = "extra_state.safetensors"
TRAINING = "training.json"
TRAINER_STATE = "trainer_state.json"

# What each file is for the person who reads that it is missing.
_NEEDED = {
    WEIGHTS: "trainable weights",
    OPTIMIZER: "optimizer state",
    EXTRA: "state of the loss and of early stopping",
    TRAINING: "schedule, random states and running totals",
    TRAINER_STATE: "trainer's state",
}
_NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpoint(DataError):
    """A checkpoint that is incomplete or whose bytes changed."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        folder: where it is.
        step: optimiser steps that were finished when it was written.
        identity: what the training's result depends on, by field.
    """

    folder: Path
    step: int
    identity: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of its safetensors files, on the CPU."""
        with reading(self.folder / name):
            return dict(load_file(self.folder / name))

    def json(self, name: str) -> Any:
        """What one of its JSON files holds."""
        with reading(self.folder / name):
            return json.loads((self.folder / name).read_text(encoding="utf-8"))


# What reading the values of others can meet: a file that is no safetensors, a missing key, a value of another kind.
_OF_OTHERS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, SafetensorError)


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Take what a checkpoint holds; it may be anybody's, with digests that fit and contents that do not.

    Raises:
        DamagedCheckpoint: in place of the error that its contents cause.
    """
    try:
        yield
    except MadpoError:
        raise
    except _OF_OTHERS as error:  # RecursionError is a RuntimeError
        if is_shortage(error):
            raise
        raise DamagedCheckpoint(
            f"{place} holds something that madpo does not write ({type(error).__name__}: {first_line(error, 160)}); "
            "use another checkpoint"
        ) from error


@contextmanager
def writing(root: Path, step: int, identity: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to fill; when the block ends without an error it becomes ``root/checkpoint-<step>``, durably.

    Raises:
        StorageError: the disk is full, read-only and the like, or ``root`` is gone; the checkpoints that were there
            are untouched.
    """
    target, part = root / f"checkpoint-{step}", root / f".checkpoint-{step}.part"
    with storage_errors(root):
        # What a killed process left: unfinished checkpoints, and half-removed ones.
        for path in (*root.glob(".checkpoint-*.part"), *root.glob(".checkpoint-*.old")):
            shutil.rmtree(path)
        part.mkdir()
        try:
            yield part
            _seal(part, step, identity)
            if target.exists():
                remove(target)
            os.rename(part, target)
            sync_folder(root)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, wherever they are, as safetensors; those that share memory are written one by one."""
    held: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        storage = here.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != here.nbytes:
            here = here.clone()
        storages.add(here.untyped_storage().data_ptr())
        held[name] = here
    save_file(held, path)


def save_json(value: Any, path: Path) -> None:
    """Write plain values as JSON; floats keep every bit, infinities included."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _seal(folder: Path, step: int, identity: Mapping[str, Any]) -> None:
    """Make every file durable, and write the manifest last."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(inner)
    manifest = {"format": FORMAT, "step": step, "files": files, "identity": identity}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))


def verify(folder: Path) -> Checkpoint:
    """Check a checkpoint against its manifest.

    Raises:
        DamagedCheckpoint: it has no manifest, or a file is missing or changed; the sentence names the file.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        form, step, files, identity = (manifest[key] for key in ("format", "step", "files", "identity"))
        if type(step) is not int or not isinstance(files, dict) or not isinstance(identity, dict):
            raise ValueError("step, files or identity is of another kind")
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(f"{folder} has no {MANIFEST}, so it is no complete checkpoint of madpo") from None
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} cannot be read ({error}); use another checkpoint") from error
    if form != FORMAT:
        raise DamagedCheckpoint(f"{folder} has format {form!r}, and this madpo reads {FORMAT}; use another checkpoint")
    for name, what in _NEEDED.items():
        if name not in files:
            raise DamagedCheckpoint(f"{folder} holds no {what} ({name}), so training cannot continue from it")
    for name, entry in files.items():
        _verify_file(folder, name, entry)
    return Checkpoint(folder, step, identity)


def _verify_file(folder: Path, name: str, entry: Any) -> None:
    path = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        raise DamagedCheckpoint(f"{folder / MANIFEST} names {name!r}, which lies outside the checkpoint")
    if not (isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()):
        raise DamagedCheckpoint(f"{folder / MANIFEST} gives no bytes and sha256 for {name!r}; use another checkpoint")
    if path.suffix in PICKLES:
        raise DamagedCheckpoint(f"{path} is a pickle, which madpo does not write and which can run code; remove it")
    if path.is_symlink():
        raise DamagedCheckpoint(f"{path} is a link, which may lead out of the checkpoint; copy the file itself there")
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing: the checkpoint is incomplete; use an older one")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DamagedCheckpoint(f"{path} has {size} bytes instead of {entry['bytes']}: it is damaged; use an older one")
    if file_digest(path) != entry["sha256"]:
        raise DamagedCheckpoint(f"{path} has changed since it was written (SHA-256); use an older one")


def folders(root: Path) -> list[Path]:
    """Checkpoints in ``root``, complete or not, the newest first."""
    found = [(int(m[1]), p) for p in root.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def newest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint; None if there is none. Damaged ones are reported in one line."""
    damaged: list[DamagedCheckpoint] = []
    for folder in folders(root):
        try:
            found = verify(folder)
        except DamagedCheckpoint as error:
            damaged.append(error)
            continue
        if damaged:
            say(f"{damaged[0]}; continuing from {folder} instead")
        return found
    if damaged:
        say(f"{damaged[0]}; no checkpoint in {root} is complete")
    return None


def rotate(root: Path, keep: int, protected: Iterable[Path]) -> None:
    """Remove the oldest checkpoints until ``keep`` are left; those protected stay."""
    kept = {path.resolve() for path in protected}
    candidates = folders(root)
    surplus = len(candidates) - max(keep, 1)
    for folder in reversed(candidates):
        if surplus <= 0:
            break
        if folder.resolve() not in kept:
            remove(folder)
            surplus -= 1


def remove(folder: Path) -> None:
    """Remove a folder so that it is never seen half-removed."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
