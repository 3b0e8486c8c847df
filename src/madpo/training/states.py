"""What a training carries from step to step next to its weights, in forms that safetensors and JSON hold."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState

from madpo.core.errors import ConfigError, DataError


def pack(state: Any, what: str) -> tuple[dict[str, Tensor], Any]:
    """A nested state as named tensors, and its structure in values that JSON holds.

    Dictionaries become ``{"dict": [[key, value], ...]}`` (their keys are often numbers), tuples ``{"tuple": [...]}``
    and tensors ``{"tensor": name}``. A tensor that occurs twice (as bitsandbytes' tables do) has one name.

    Raises:
        ConfigError: an object of another kind; the sentence names its place in ``what``.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def walk(value: Any, place: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if type(value) in (Tensor, nn.Parameter):
            if id(value) not in names:
                names[id(value)] = place
                tensors[place] = value
            return {"tensor": names[id(value)]}
        if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
            return {"dict": [[key, walk(item, f"{place}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [walk(item, f"{place}.{number}") for number, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        whose, _, inside = place.partition(".")
        raise ConfigError(
            f"the {whose}'s {inside or 'state'} is a {type(value).__name__}, which a checkpoint without pickle cannot "
            "hold; use optim='adamw_torch' with one of transformers' schedules, or save_strategy='no'"
        )

    return tensors, walk(state, what)


def unpack(values: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that :func:`pack` took apart."""
    if isinstance(values, list):
        return [unpack(item, tensors) for item in values]
    if not isinstance(values, dict):
        return values
    ((kind, content),) = values.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in content)
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    raise ValueError(f"there is no state of the kind {kind!r}")


def check_groups(state: Mapping[str, Any], live: list[dict[str, Any]]) -> None:
    """Refuse an optimizer's state with other parameter groups than ``live``, those of the optimizer that will take it.

    Raises:
        DataError: the number of groups or of their parameters differs.
    """
    before, now = ([len(group["params"]) for group in groups] for groups in (state["param_groups"], live))
    if before != now:
        raise DataError(
            f"the checkpoint's optimizer has parameter groups of {before}, and this one has groups of {now}; the "
            "checkpoint belongs to another training"
        )


def random_states() -> dict[str, Any]:
    """The states of the random generators of python, numpy, torch and this process's CUDA devices."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(torch.cuda.get_rng_state(device)) for device in _cuda_devices()],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put the generators where :func:`random_states` found them."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(states["torch"]))
    for device, state in zip(_cuda_devices(), states["cuda"], strict=False):
        torch.cuda.set_rng_state(_from_hex(state), device)


def _cuda_devices() -> list[int]:
    if not torch.cuda.is_available():
        return []
    # One process per device: its own. One process for all (DataParallel): every one.
    single = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return list(range(torch.cuda.device_count())) if single else [torch.cuda.current_device()]


def _hex(state: Tensor) -> str:
    return bytes(state.numpy()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def restore_callbacks(callbacks: Iterable[Any], states: Mapping[str, Any]) -> None:
    """Put back the states that transformers keeps by class, so that early stopping counts on from where it was."""
    kept = {name: list(found) if isinstance(found, list) else [found] for name, found in states.items()}
    for callback in callbacks:
        if isinstance(callback, ExportableState) and kept.get(type(callback).__name__):
            attributes = kept[type(callback).__name__].pop(0)["attributes"]
            for name in callback.state()["attributes"]:
                setattr(callback, name, attributes[name])


def stored_metrics(window: Mapping[str, Iterable[Any]]) -> dict[str, Any]:
    """Values that wait to be logged, numbers or small float32 tensors, for JSON."""

    def plain(value: Any) -> Any:
        return {"values": value.tolist(), "host": value.device.type == "cpu"} if isinstance(value, Tensor) else value

    return {name: [plain(value) for value in values] for name, values in window.items()}


def restored_metrics(kept: Mapping[str, Iterable[Any]], device: torch.device) -> dict[str, list[Any]]:
    """What :func:`stored_metrics` wrote."""

    def value_of(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return torch.tensor(value["values"], dtype=torch.float32, device="cpu" if value["host"] else device)

    return {name: [value_of(value) for value in values] for name, values in kept.items()}
