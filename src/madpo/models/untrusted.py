"""Untrusted models and adapters: what could run code is refused before a library reads it.

``trust_remote_code`` is off everywhere, and still libraries unpickle weights where safetensors are missing, fetch and
import attention kernels that ``config.json`` names (CVE-2026-4372), and follow an adapter to a base model of its
choice. A model of the hub is held to the same rules, by its ``config.json``, before its weights are fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from madpo.core.errors import ConfigError
from madpo.core.storage import json_object

MODEL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""What transformers reads a model's weights from, in this order."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""What PEFT reads an adapter's weights from."""
_EXPLICIT = "transformers_weights"  # a field of config.json that names another file
# Adapters whose configuration makes PEFT load more models, and the field that names them.
_NAMES_OTHERS = {"XLORA": "adapters", "SHADOW": "shadow_model"}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_NEVER_WEIGHTS = ("training_args.bin",)
# Implementations that transformers has within itself; any other name is looked up on the hub and imported.
_INSIDE = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def check_model(place: Path | str, revision: str | None = None) -> None:
    """Refuse a model folder, or a model of the hub (at a ``revision``), that could run code when it is loaded
    (ConfigError).

    What cannot be reached passes: loading it fails in the same way.
    """
    if isinstance(place, Path) or Path(place).is_dir():
        _check_folder(Path(place))
    else:
        _check_hub(place, revision)


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{folder} holds an adapter, which names a base model of its own; give the folder of a whole model "
            "(merge the adapter into its base first)"
        )
    config = {}
    if (folder / "config.json").exists():
        config = read_object(folder / "config.json")
        check_config(config, folder / "config.json")
    # What transformers opens: the file that config.json names, or else the first of the usual names.
    opened = next((name for name in _names(config) if (folder / name).is_file()), None)
    if opened is None:
        refuse_pickles(folder)
    elif opened.endswith(".index.json"):
        _check_index(folder / opened, folder / opened)


def _names(config: dict[str, Any]) -> tuple[str, ...]:
    """The names under which transformers looks for weights, of which the first that is there counts."""
    explicit = config.get(_EXPLICIT)
    return (explicit,) if isinstance(explicit, str) else MODEL_WEIGHTS


def _check_index(index: Path, place: Path | str) -> None:
    shards = read_object(index).get("weight_map")
    for name in shards.values() if isinstance(shards, dict) else ():
        if not isinstance(name, str) or PurePosixPath(name).name != name:
            raise ConfigError(f"{place} names the file {name!r}, which is outside the folder; do not use it")
        if not name.endswith(".safetensors"):
            raise ConfigError(
                f"{place} names the file {name!r}, which is no safetensors file and would be read as a pickle, which "
                "can run code; convert the weights to safetensors where you trust them (model.save_pretrained)"
            )


def _check_hub(name: str, revision: str | None) -> None:
    from transformers import PreTrainedConfig
    from transformers.utils import cached_file

    def file(path: str) -> str | None:
        found: str | None = cached_file(name, path, revision=revision, _raise_exceptions_for_missing_entries=False)
        return found

    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        adapter = file("adapter_config.json")
        index = next((place for path in _names(config) if path.endswith(".index.json") and (place := file(path))), None)
    except OSError:
        return
    if adapter is not None:
        raise ConfigError(
            f"{name} is an adapter, which names a base model of its own; download it and give its folder, or give a "
            "whole model"
        )
    check_config(config, name)
    if index is not None:
        _check_index(Path(index), f"the index of {name}")


def check_config(config: dict[str, Any], place: Path | str) -> None:
    """Refuse the fields of a model's configuration that fetch code, or name weights that are no safetensors.

    ``auto_map`` passes: with ``trust_remote_code`` off it is not followed. Raises ConfigError.
    """
    named = config.get(_EXPLICIT)
    if named is not None and not (
        isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise ConfigError(
            f"{place}: {_EXPLICIT} is {named!r}, which is no safetensors file and would be read as a pickle, which can "
            "run code; remove the field"
        )
    for key, value in _fields(config):
        if key.strip("_").removesuffix("_internal") not in _IMPLEMENTATIONS:
            continue
        for one in value.values() if isinstance(value, dict) else (value,):
            if one not in _INSIDE:
                raise ConfigError(
                    f"{place}: {key} is {one!r}, which can fetch and run code from the hub; remove the field, and the "
                    "model chooses an implementation that is installed"
                )


def _fields(value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > 20:  # no configuration is that deep, and a recursion without end is an attack of its own
        return
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        if isinstance(key, str):
            yield key, inner
        yield from _fields(inner, depth + 1)


def check_adapter(folder: Path) -> None:
    """Refuse an adapter's folder that could run code when it is loaded.

    Raises ConfigError: one sentence with the file, the field and the remedy.
    """
    path = folder / "adapter_config.json"
    settings = read_object(path)
    if settings.get("megatron_config") is not None:
        raise ConfigError(f"{path}: megatron_config makes PEFT import the module megatron_core; remove the field")
    for key, value in _fields(settings):
        if key == "trust_remote_code" and value:
            raise ConfigError(f"{path}: {key} is {value!r}, which runs code of the hub; remove the field")
    kind = settings.get("peft_type")
    if isinstance(kind, str) and kind in _NAMES_OTHERS:
        raise ConfigError(
            f"{path}: peft_type is {kind!r}, an adapter that loads other models or adapters by names of its choice "
            f"({_NAMES_OTHERS[kind]}); merge it into its base where you trust it, and give the merged model"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():  # then PEFT looks for adapter_model.bin, and unpickles it
        refuse_pickles(folder)
        raise ConfigError(f"{folder} has no {ADAPTER_WEIGHTS}; copy the folder again")


def adapter_base(folder: Path) -> str:
    """The base model that an adapter was trained on. Raises ConfigError: it does not say."""
    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{folder / 'adapter_config.json'} does not say its base model (base_model_name_or_path)")
    return base


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder with a file that a library could unpickle (ConfigError)."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.name not in _NEVER_WEIGHTS)
    if pickles:
        raise ConfigError(
            f"{folder} holds its weights as {pickles[0]}, a pickle that can run code when it is loaded; convert them "
            "to safetensors where you trust them (model.save_pretrained), and give that folder"
        )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ConfigError: it is missing, damaged, or holds something else."""
    return json_object(path, "copy the folder again", ConfigError)
