"""Where a model lies, and its tokenizer: what can be had without loading PyTorch's models or PEFT.

A check of a million rows needs a tokenizer and nothing else, in less memory than those libraries take.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from madpo.errors import ConfigError
from madpo.packaged import PACKAGED, cache_dir, packaged, quiet_transformers
from madpo.untrusted import check_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY_FAMILIES = ("gemma3", "llama", "qwen3")


def resolve_model(name_or_path: str) -> Path | str:
    """A packaged model's folder, a tiny model's folder, a folder as given, or a hub id as given.

    Raises:
        ConfigError: a path without a model, or with one that could run code.
    """
    if name_or_path in PACKAGED:
        return packaged(name_or_path)
    if name_or_path.startswith("tiny-"):
        family = name_or_path.removeprefix("tiny-")
        if family not in TINY_FAMILIES:
            raise ConfigError(f"there is no tiny model {family!r}; known are {', '.join(TINY_FAMILIES)}")
        folder = cache_dir() / "models" / f"{name_or_path}-v1"
        if (folder / "config.json").exists():
            return folder
        from madpo.models import build_tiny

        return build_tiny(family, folder)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError(f"{path} has no config.json; give a model folder, a hub id, or {', '.join(PACKAGED)}")
        check_model(path)
        return path
    if path.is_absolute() or name_or_path.startswith((".", "~")):
        raise ConfigError(f"{path} is no folder; give a model folder, a hub id, or {', '.join(PACKAGED)}")
    return name_or_path


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token (its end token where it has none)."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
