"""What a training carries from step to step besides its weights: states of callbacks, and sums of a logging window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import ExportableState


def stored_callbacks(callbacks: Iterable[Any]) -> dict[str, Any]:
    """States of the callbacks that have one, by class; a list where a class occurs several times."""
    states: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: found[0] if len(found) == 1 else found for name, found in states.items()}


def restore_callbacks(callbacks: Iterable[Any], states: Mapping[str, Any]) -> None:
    """Put back what :func:`stored_callbacks` gave, so that early stopping counts on from where it was."""
    kept = {name: list(found) if isinstance(found, list) else [found] for name, found in states.items()}
    for callback in callbacks:
        if isinstance(callback, ExportableState) and kept.get(type(callback).__name__):
            attributes = kept[type(callback).__name__].pop(0)["attributes"]
            for name in callback.state()["attributes"]:
                setattr(callback, name, attributes[name])


def stored_metrics(window: Mapping[str, Iterable[Any]]) -> dict[str, Any]:
    """Values that wait to be logged, numbers or small float32 tensors, for JSON."""
    return {name: [_plain(value) for value in values] for name, values in window.items()}


def restored_metrics(kept: Mapping[str, Iterable[Any]], device: torch.device) -> dict[str, list[Any]]:
    """What :func:`stored_metrics` wrote."""
    return {name: [_value(value, device) for value in values] for name, values in kept.items()}


def _plain(value: Any) -> Any:
    return {"values": value.tolist(), "host": value.device.type == "cpu"} if isinstance(value, Tensor) else value


def _value(value: Any, device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    return torch.tensor(value["values"], dtype=torch.float32, device="cpu" if value["host"] else device)
