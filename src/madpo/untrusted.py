"""Models and adapters of others: what in them could run code is refused before a library reads it.

``trust_remote_code`` is off everywhere, and still libraries unpickle weights where safetensors are missing, fetch and
import attention kernels that ``config.json`` names (CVE-2026-4372), and follow an adapter to a base model of its
choice. A model of the hub is held to the same rules, by its ``config.json``, before its weights are fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from madpo.errors import ConfigError, first_line

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_NEVER_WEIGHTS = ("training_args.bin",)
# Implementations that transformers has within itself; any other name is looked up on the hub and imported.
_INSIDE = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def check_model(place: Path | str) -> None:
    """Refuse a model folder, or a model of the hub, that could run code when it is loaded.

    Args:
        place: a folder, or a hub id. What cannot be reached passes: loading it fails in the same way.

    Raises:
        ConfigError: one sentence with the file, the field and the remedy.
    """
    if isinstance(place, Path) or Path(place).is_dir():
        _check_folder(Path(place))
    else:
        _check_hub(place)


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{folder} holds an adapter, which names a base model of its own; give the folder of a whole model "
            "(merge the adapter into its base first)"
        )
    if (folder / "config.json").exists():
        check_config(read_object(folder / "config.json"), folder / "config.json")
    _check_weights(folder, "model")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = read_object(index).get("weight_map")
        for name in shards.values() if isinstance(shards, dict) else ():
            if not isinstance(name, str) or PurePosixPath(name).name != name:
                raise ConfigError(f"{index} names the file {name!r}, which lies outside the folder; do not use it")


def _check_hub(name: str) -> None:
    from transformers import PreTrainedConfig
    from transformers.utils import cached_file

    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
        adapter = cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        return
    if adapter is not None:
        raise ConfigError(
            f"{name} is an adapter, which names a base model of its own; download it and give its folder, or give a "
            "whole model"
        )
    check_config(config, name)


def check_config(config: dict[str, Any], place: Path | str) -> None:
    """Refuse the fields of a model's configuration that fetch code.

    ``auto_map`` passes: with ``trust_remote_code`` off it is not followed.

    Raises:
        ConfigError: with the field, its value and the remedy.
    """
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

    Raises:
        ConfigError: one sentence with the file, the field and the remedy.
    """
    path = folder / "adapter_config.json"
    settings = read_object(path)
    if settings.get("megatron_config") is not None:
        raise ConfigError(f"{path}: megatron_config makes PEFT import the module megatron_core; remove the field")
    for key, value in _fields(settings):
        if key == "trust_remote_code" and value:
            raise ConfigError(f"{path}: {key} is {value!r}, which runs code of the hub; remove the field")
    _check_weights(folder, "adapter_model")


def adapter_base(folder: Path) -> str:
    """The base model that an adapter was trained on.

    Raises:
        ConfigError: it does not say.
    """
    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{folder / 'adapter_config.json'} does not say its base model (base_model_name_or_path)")
    return base


def _check_weights(folder: Path, stem: str) -> None:
    """Refuse pickles where there are no safetensors; beside safetensors nobody reads them."""
    if not any(path.name.startswith(stem) for path in folder.glob("*.safetensors*")):
        refuse_pickles(folder)


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder with a file that a library could unpickle.

    Raises:
        ConfigError: naming the first.
    """
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.name not in _NEVER_WEIGHTS)
    if pickles:
        raise ConfigError(
            f"{folder} holds its weights as {pickles[0]}, a pickle that can run code when it is loaded; convert them "
            "to safetensors where you trust them (model.save_pretrained), and give that folder"
        )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ConfigError: it is missing, damaged, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error, 120)
        raise ConfigError(f"{path} cannot be read ({reason}); copy the folder again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object; copy the folder again")
    return found
