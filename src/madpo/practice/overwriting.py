"""What ``--overwrite`` may remove: results of our commands, never what a user laid beside them nor what it reads.

Names are looked at directly in a folder; inside ``adapter``, ``model`` and the like everything goes with the result.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from madpo.errors import StorageError
from madpo.locks import LOCKS
from madpo.packaged import PACKAGED
from madpo.places import TINY_FAMILIES
from madpo.recipe import CHECKPOINTS

Inputs = Sequence[tuple[str, str | Path | None]]
"""What a command reads: (its name for a person, the file, folder or other name that was given)."""

STATE = ".state.json"
FINISHED = ".finished.json"
CONFIG_HEADING = "# madpo train "
TRACKED = "runs"
"""Where transformers lets TensorBoard write, seen from the folder of the checkpoints."""
MARKERS = ("reward_model.json", "settings.json", "config.toml", "evaluation.json", "vocabulary.json")

_HIDDEN = (
    *(*LOCKS, STATE, FINISHED, f".{CHECKPOINTS}.old", ".rehearsal.tmp", ".*.[0-9]*.tmp"),
    *(".DS_Store", ".ipynb_checkpoints"),  # what file managers and notebooks leave in every folder
)
WRITTEN = (
    *_HIDDEN,
    *("README.md", "report.json", "log.jsonl", "dropped.jsonl", "check.json", CHECKPOINTS),
    *("config.toml", "adapter", "model", "merged", TRACKED),
    *("reward_model.json", "report.html"),
    *("evaluation.json", "samples.jsonl", "samples.html"),
    *("settings.json", "scored.jsonl", "scored.parquet", "parts", "folds"),
    *("study.journal", "study.journal.lock*", "trials.csv", "tune.html", "chosen.toml", "reference"),
    *("vocabulary.json", "kept_ids.json", "config.json", "generation_config.json"),
    *("model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"),
)
"""Names, and patterns of names, of all that the commands write directly into a folder of theirs."""


def refuse_occupied(output_dir: Path, *, overwrite: bool = False, inputs: Inputs = ()) -> None:
    """Refuse to write where something is.

    Raises:
        StorageError: it is a file, a mount point, or a folder that is not empty; with ``overwrite``, a folder that
            :func:`refuse_to_replace` refuses.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise StorageError(f"{output_dir} is a file, not a folder; choose another output_dir")
    if os.path.ismount(output_dir):  # a finished folder takes its place by a rename, which a mount point does not allow
        raise StorageError(f"{output_dir} is a mount point; give a folder inside it, such as {output_dir / 'result'}")
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise StorageError(f"{output_dir} is there and not empty; choose another output_dir, or add --overwrite")
    refuse_to_replace(output_dir, inputs)


def refuse_to_replace(output_dir: Path, inputs: Inputs = ()) -> None:
    """Refuse to overwrite a folder whose loss would hurt.

    Raises:
        StorageError: it holds files and no result of ours, something that the command reads, or beside a result of
            ours something that no command writes; the sentence names the first.
    """
    names = [entry.name for entry in output_dir.iterdir()]
    if not all(_matches(name, _HIDDEN) for name in names) and not any(_is_ours(output_dir / name) for name in MARKERS):
        raise StorageError(
            f"{output_dir} holds no result of madpo, so it is not overwritten; choose another output_dir"
        )
    refuse_inputs_inside(output_dir, inputs)
    if others := strangers(output_dir):
        raise StorageError(
            f"{output_dir} holds {others[0]}, which is no part of such a result and which --overwrite would "
            "remove; move it away, or choose another output_dir"
        )


def strangers(folder: Path) -> list[str]:
    """Names of what lies in a folder and is written by none of the commands, in order."""
    return sorted(entry.name for entry in folder.iterdir() if not _matches(entry.name, WRITTEN))


def refuse_inputs_inside(folder: Path, inputs: Inputs) -> None:
    """Refuse to remove a folder that the command itself reads from.

    Raises:
        StorageError: naming the input and the folder.
    """
    whole = folder.resolve()
    for name, given in inputs:
        for what, place in _read_from(name, given):
            if place == whole or whole in place.parents:
                raise StorageError(
                    f"{what} lies in {folder}, which this command would replace; choose another output_dir, or move "
                    "the input away"
                )


def _read_from(name: str, given: str | Path | None) -> Iterator[tuple[str, Path]]:
    """The place of an input, and that of the base model where it is an adapter (or holds one)."""
    if given is None or not (place := _place(given)):
        return
    yield f"the {name} {given}", place
    for file, key in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("adapter/adapter_config.json", "base_model_name_or_path"),
        ("reward_model.json", "base"),
    ):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # whoever loads it tells that better
            base = json.loads((place / file).read_bytes())[key]
            if found := _place(base):
                yield f"the base model {base} of the {name} {given}", found


def _place(given: str | Path) -> Path | None:
    """Where it lies; None for a packaged model, a tiny one, or a name of the hub."""
    if str(given) in PACKAGED or str(given) in (f"tiny-{family}" for family in TINY_FAMILIES):
        return None
    path = Path(given).expanduser()
    return path.resolve() if path.exists() else None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_ours(marker: Path) -> bool:
    """Whether a marker is there and is no file of somebody's that has a common name by chance."""
    if not marker.is_file():
        return False
    if marker.name == "config.toml":
        return marker.read_text(encoding="utf-8", errors="replace").startswith(CONFIG_HEADING)
    if marker.name == "settings.json":
        content = marker.read_bytes()
        return b'"data_digest"' in content or not _is_json(content)  # what is damaged may be overwritten
    return True


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def empty(folder: Path) -> None:
    """Remove everything in a folder that this process holds, but for its lock."""
    _remove_all(entry for entry in folder.iterdir() if entry.name not in LOCKS)


def discard(folder: Path) -> None:
    """Remove what the commands wrote into a folder, and the folder itself if nothing else is in it."""
    _remove_all(entry for entry in folder.iterdir() if _matches(entry.name, WRITTEN))
    with suppress(OSError):
        folder.rmdir()


def _remove_all(entries: Iterable[Path]) -> None:
    # Killed in between, what is left is still known as a result of ours; nobody else takes it before the lock is gone.
    for entry in sorted(entries, key=lambda entry: (entry.name in LOCKS, entry.name in MARKERS)):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
