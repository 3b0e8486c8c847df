"""Finding a model and its tokenizer without loading PyTorch's models or PEFT.

A check of a data set needs a tokenizer and nothing else.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from madpo.core.errors import ConfigError
from madpo.core.storage import expanded
from madpo.models.loading import loading, no_such_model
from madpo.models.packaged import PACKAGED, cache_dir, packaged, quiet_transformers
from madpo.models.untrusted import check_model, read_object
from madpo.models.vocabulary import configured_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY_FAMILIES = ("gemma3", "llama", "qwen3")

# (class that a folder names, model types) for which AutoTokenizer takes the class itself; AutoTokenizer's module loads
# PyTorch, the classes do not. tests/models/test_places.py holds the pinned transformers to it.
_GEMMA_TYPES = ("gemma", "gemma2", "gemma3", "gemma3_text")
_KNOWN = {
    "TokenizersBackend": (*_GEMMA_TYPES, "llama", "qwen3", "smollm3"),
    "PreTrainedTokenizerFast": (*_GEMMA_TYPES, "llama", "qwen3", "smollm3"),
    "GemmaTokenizer": _GEMMA_TYPES,
    "GemmaTokenizerFast": _GEMMA_TYPES,
}


def lasting(name_or_path: str) -> str:
    """The model's name as it is found from any other folder: the place of a folder in full, other names as they are."""
    path = expanded(name_or_path)
    if name_or_path in PACKAGED or name_or_path.startswith("tiny-") or not path.is_dir():
        return name_or_path
    return str(path.resolve())


def resolve_model(name_or_path: str) -> Path | str:
    """A packaged model's folder, a tiny model's folder, a folder as given, or a hub id as given.

    Raises ConfigError: a path without a model, or with one that could run code.
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
        from madpo.models.load import build_tiny

        return build_tiny(family, folder)
    path = expanded(name_or_path)
    with loading(name_or_path):  # a name that is too long for a path, a folder that may not be read
        if path.is_dir():
            check_model(path)
            if not (path / "config.json").exists():
                raise ConfigError(f"{path} has no config.json; {_instead(path)}")
            return path
        if path.exists():
            raise ConfigError(f"{path} is a file; give the folder of a model")
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise ConfigError(f"{path} is no folder; give a model folder, a hub id, or {', '.join(PACKAGED)}")
    return name_or_path


def _instead(folder: Path) -> str:
    """What to give in place of a folder without a model."""
    for name in ("merged", "model"):
        if (folder / name / "config.json").is_file():
            return f"give the model in it, {folder / name}"
    if (folder / "reward_model.json").is_file():
        return "it is a reward model, which rewards and cannot write; give the model that it was trained from"
    if (folder / "adapter" / "adapter_config.json").is_file():
        return f"it holds only an adapter; train again with --merge, and give {folder / 'merged'}"
    return f"give a model folder, a hub id, or {', '.join(PACKAGED)}"


def refuse_unreachable(name: str) -> None:
    """Refuse a hub id that is not in the cache and cannot be downloaded, before libraries try for a minute.

    Raises ConfigError: the hub's address is unknown to this machine, and the model is not in the local cache.
    """
    from huggingface_hub import constants

    if _in_hub_cache(name):
        return
    if constants.HF_HUB_OFFLINE:
        raise no_such_model(name, "HF_HUB_OFFLINE is set, and it is not in the cache")
    if getproxies():  # which may know the address
        return
    host = urlsplit(constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        raise no_such_model(name, f"{host} cannot be reached") from None


def refuse_fetching(base: str | Path, named_in: Path, remedy: str = "") -> None:
    """Refuse to fetch a base model from the hub that only the folder ``named_in`` names, and not the user
    (ConfigError).

    A base that is a folder passes, and one that was fetched before. ``remedy`` is another way than fetching it first.
    """
    if isinstance(base, str) and not expanded(base).exists() and not _in_hub_cache(base):
        raise ConfigError(
            f"{named_in} names the base model {base!r}, which is not on this machine, and is fetched only where you "
            f"name it yourself: run hf download {base}{remedy}"
        )


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError as error:
        raise no_such_model(name, str(error).splitlines()[0]) from None


def read_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model as it is. Raises ConfigError, StorageError: as :func:`madpo.models.loading.loading`."""
    from transformers import AutoTokenizer

    with loading(path, "tokenizer"), quiet_transformers():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return tokenizer


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token (its end token where it has none).

    Raises ConfigError, StorageError: as :func:`read_tokenizer`, or it has neither of these tokens.
    """
    return _fitted(read_tokenizer(path), path)


def light_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer that :func:`load_tokenizer` gives, without PyTorch where its class is known by the files."""
    with loading(path, "tokenizer"), quiet_transformers():
        tokenizer = _light(Path(path))
    return load_tokenizer(path) if tokenizer is None else _fitted(tokenizer, path)


def _fitted(tokenizer: PreTrainedTokenizerBase, path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer with what is known of its model: a padding token that has an embedding, and how many have one."""
    rows = configured_rows(path)
    tokenizer.embedding_rows = rows
    if tokenizer.pad_token is None or (rows is not None and (tokenizer.pad_token_id or 0) >= rows):
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer {str(path)!r} has neither a padding token nor an end token in its vocabulary; set "
            "eos_token in its tokenizer_config.json"
        )
    return tokenizer


def _light(folder: Path) -> Any:
    needed = [folder / name for name in ("config.json", "tokenizer_config.json", "tokenizer.json")]
    if not all(file.is_file() for file in needed):
        return None
    config, settings = read_object(needed[0]), read_object(needed[1])
    named = settings.get("tokenizer_class")
    # Repositories with code of their own, or with several templates in a folder, are for AutoTokenizer to sort out.
    plain = "auto_map" not in settings and "auto_map" not in config and not any(f.is_dir() for f in folder.iterdir())
    if not plain or not isinstance(named, str) or config.get("model_type") not in _KNOWN.get(named, ()):
        return None
    if named.startswith("Gemma"):
        from transformers.models.gemma.tokenization_gemma import GemmaTokenizer as Known
    else:
        from transformers.tokenization_utils_tokenizers import TokenizersBackend as Known
    return Known.from_pretrained(folder, trust_remote_code=False)
