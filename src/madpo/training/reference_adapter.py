"""The adapter that a model comes with, whose copy is the reference of its further training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from madpo.core.errors import ConfigError, first_line
from madpo.models.engine.dependence import sharded, without_numbers
from madpo.training.digests import active_adapters

COPY = "ref"
"""What TRL calls it."""
_REMEDY = "merge the adapter into its model, or give a copy of the model as ref_model"


@contextmanager
def copied_adapter(model: Any, ref_model: nn.Module | None) -> Iterator[None]:
    """In here TRL adds the copy to a model that comes with an adapter, and it is one in every respect.

    TRL copies parameters with ``.default.`` in their names. That leaves out those of embeddings, of single tokens and
    of IA3 or VeRA, and the scales. PEFT draws initial values, for which PiSSA and OLoRA change the base weights again.

    Raises:
        ConfigError: what is active is not the adapter "default" only, or PEFT takes no second one.
    """
    if ref_model is not None or not isinstance(model, PeftModel):
        yield
        return
    active = active_adapters(model)
    if active != ["default"] or COPY in model.peft_config:
        raise ConfigError(
            f"the model comes with the adapters {', '.join(model.peft_config)}, of which {', '.join(active) or 'none'} "
            "is active, and only one that is active and called 'default' can be trained against its own copy; load it "
            f"with adapter_name='default' and no other, {_REMEDY}"
        )
    add = model.add_adapter

    def add_copy(name: str, config: Any, **options: Any) -> None:
        plain = copy.deepcopy(config)
        if hasattr(plain, "init_lora_weights"):
            plain.init_lora_weights = True
        try:
            add(name, plain, **options)
        except ValueError as error:
            raise ConfigError(
                f"PEFT takes no second adapter of this kind, as the reference ({first_line(error, 200).rstrip(' .')}); "
                f"{_REMEDY}"
            ) from error
        _copy(model)

    model.add_adapter = add_copy
    try:
        with frozen_stay(model):
            yield
    finally:
        vars(model).pop("add_adapter", None)


@torch.no_grad()
def _copy(model: nn.Module) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if COPY in parts:
            tensor.copy_(tensors[".".join("default" if part == COPY else part for part in parts)])
    for module in model.modules():
        scaling = getattr(module, "scaling", None) if isinstance(module, BaseTunerLayer) else None
        if isinstance(scaling, dict) and COPY in scaling:
            scaling[COPY] = scaling["default"]


@contextmanager
def frozen_stay(model: nn.Module) -> Iterator[None]:
    """Parameters that are frozen before are frozen after: PEFT lets all of an adapter train when it is switched on."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    trains = any(parameter.requires_grad for parameter in model.parameters())
    try:
        yield
    finally:
        for parameter in frozen if trains else ():
            parameter.requires_grad_(False)


def switches_off(model: nn.Module) -> bool:
    """Whether a model without its adapter is the one before the training: nothing else of it is trained.

    With ``bias="all"``, or where norms or embeddings train next to an adapter, weights move that stay.
    """
    adapters = getattr(model, "peft_config", None) or {}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return bool(adapters) and all(adapters.keys() & set(name.split(".")) for name in trained)


def refuse_shared(model: nn.Module, ref_model: nn.Module) -> None:
    """Refuse a reference that the training would change: it has weights of the model that are trained.

    Raises:
        ConfigError: naming one of them.
    """
    if sharded(model) or without_numbers(model):  # which have no place in memory
        return
    held = {parameter.data_ptr() for parameter in ref_model.parameters() if parameter.numel()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() in held:
            raise ConfigError(
                f"ref_model has the model's own weight {name}, which is trained, so the reference would follow the "
                "policy; load it once more or give a copy, made by copy.deepcopy before an adapter is added"
            )
