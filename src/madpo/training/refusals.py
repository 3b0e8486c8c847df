"""What the trainer refuses of TRL's, each in one sentence with a remedy. The guide has the same as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from peft import PeftConfig, PeftType
from torch import nn
from trl import DPOConfig

from madpo.core.errors import ConfigError, DataError

_OWN = "a loss of your own (madpo.losses.Custom)"
# TRL's option -> what takes its place here. Options that no loss of madpo has are said to have none.
_REPLACED = {
    "beta": "use the loss's own beta, such as MADPO(beta=...)",
    "label_smoothing": "use DPO(label_smoothing=...) or RDPO(flip_rate=...)",
    "loss_weights": f"madpo adds no losses up; write {_OWN} that adds the terms",
    "use_weighting": "use loss=WPO(...)",
    "ld_alpha": f"madpo has no length desensitisation; write {_OWN}",
    "f_divergence_type": f"madpo has no other divergence than the reverse KL; write {_OWN}",
    "f_alpha_divergence_coef": f"madpo has no other divergence than the reverse KL; write {_OWN}",
}
_LOSSES = {
    "sigmoid": "DPO(beta=...)",
    "ipo": 'IPO(beta=..., reduction="mean")',
    "robust": "RDPO(beta=..., flip_rate=...)",
}
STOCK = "TRL's DPOTrainer"


def refuse_options(args: DPOConfig) -> None:
    """Refuse options that would have no effect, since ``loss=...`` or this trainer replaces what they change.

    Raises:
        ConfigError: an option differs from its default; the sentence names what to use instead.
    """
    if args.router_aux_loss_coef:
        raise ConfigError(
            f"router_aux_loss_coef={args.router_aux_loss_coef!r} has no effect here, since the load-balancing loss of "
            "a mixture of experts is not computed; remove it or set it to 0"
        )
    if args.sync_ref_model:
        raise ConfigError(
            "sync_ref_model=True moves the reference during the training, but this trainer computes its "
            f"log-probabilities once, before the first step; remove it, or use {STOCK}"
        )
    for option in dataclasses.fields(args):
        if option.name != "loss_type" and option.name not in _REPLACED:
            continue
        default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        value = getattr(args, option.name)
        if not _same(value, default):
            remedy = _REPLACED[option.name] if option.name != "loss_type" else _loss_for(value)
            raise ConfigError(
                f"{option.name}={value!r} has no effect here, since the loss is an object of its own; remove it: "
                f"{remedy}"
            )


def _loss_for(value: Any) -> str:
    kinds = value if isinstance(value, list) else [value]
    missing = [kind for kind in kinds if kind not in _LOSSES]
    if missing:
        return f"madpo has no loss like {', '.join(missing)}; write {_OWN}, or use {STOCK}"
    if len(kinds) > 1:
        return f"{_REPLACED['loss_weights']}, or use {STOCK}"
    return f"use loss={_LOSSES[kinds[0]]}"


def _same(value: Any, default: Any) -> bool:
    # TRL turns a single loss type into a list of one.
    first, second = (x[0] if isinstance(x, list) and len(x) == 1 else x for x in (value, default))
    return bool(first == second)


def refuse_adapter(model: str | nn.Module, peft_config: PeftConfig | None) -> None:
    """Refuse adapters that add virtual tokens or read a task's number: the engine hands the backbone token ids.

    Raises:
        ConfigError: naming the kind of adapter.
    """
    own = getattr(model, "peft_config", None) or {}
    for adapter in (*own.values(), *([] if peft_config is None else [peft_config])):
        if not isinstance(adapter, PeftConfig):
            continue
        if adapter.is_prompt_learning or adapter.is_adaption_prompt or adapter.peft_type == PeftType.POLY:
            raise ConfigError(
                f"an adapter of the type {getattr(adapter.peft_type, 'value', adapter.peft_type)} is not supported, "
                "since log-probabilities are computed from token ids; use one that changes weights, such as LoRA, or "
                f"{STOCK}"
            )


def refuse_images(columns: Iterable[str], name: str) -> None:
    """Refuse data with images: this trainer reads token ids.

    Raises:
        DataError: naming the column.
    """
    found = sorted({"image", "images"} & set(columns))
    if found:
        raise DataError(
            f"{name} has a column {found[0]!r}, but this trainer reads texts only; remove the column and the images in "
            f"the messages, or use {STOCK}"
        )
