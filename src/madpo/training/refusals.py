"""What the trainer refuses of TRL's, each in one sentence with a remedy. The guide has the same as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from peft import PeftConfig, PeftType
from torch import nn
from transformers import PreTrainedModel
from trl import DPOConfig

from madpo.core.errors import ConfigError, DataError
from madpo.losses import BCO, DPO, IPO, RDPO, WPO, Combined, LossConfig
from madpo.models.engine.head import text_model
from madpo.models.engine.logprobs import unwrapped

_OWN = "a loss of your own (madpo.losses.Custom)"
# TRL's option -> what takes its place where a loss is given. Those that no loss of madpo has are refused anyhow.
_REPLACED = {
    "beta": "use the loss's own beta, such as MADPO(beta=...)",
    "loss_type": "leave loss=... out to train with it",
    "label_smoothing": "use DPO(label_smoothing=...) or RDPO(flip_rate=...)",
    "loss_weights": "use Combined(parts=..., weights=...)",
    "use_weighting": "use loss=WPO(...)",
}
_MISSING = {
    "ld_alpha": f"madpo has no length desensitisation; write {_OWN}",
    "f_divergence_type": f"madpo has no other divergence than the reverse KL; write {_OWN}",
    "f_alpha_divergence_coef": f"madpo has no other divergence than the reverse KL; write {_OWN}",
    "label_smoothing_factor": "use DPO(label_smoothing=...) or RDPO(flip_rate=...)",
}
_LOSSES: dict[str, Callable[[DPOConfig], LossConfig]] = {
    "sigmoid": lambda args: DPO(beta=args.beta),
    "ipo": lambda args: IPO(beta=args.beta, reduction="mean"),
    "robust": lambda args: RDPO(beta=args.beta, flip_rate=args.label_smoothing),
    "bco_pair": lambda args: BCO(beta=args.beta),
}
_LIKELIHOOD = "sft"
STOCK = "TRL's DPOTrainer"


def refuse_options(args: DPOConfig, *, loss_given: bool) -> None:
    """Refuse options without an effect, or with another one: ``loss=...`` or this trainer replaces what they change.

    Raises:
        ConfigError: an option differs from its default; the sentence names what to use instead.
    """
    if args.router_aux_loss_coef:
        raise ConfigError(
            f"router_aux_loss_coef={args.router_aux_loss_coef!r} has no effect here, since the load-balancing loss of "
            "a mixture of experts is not computed; remove it or set it to 0"
        )
    if args.device.type == "cpu":
        if args.fp16:
            raise ConfigError("fp16=True has no effect on a processor, which then computes in float32; use bf16=True")
        kwargs = args.activation_checkpointing_kwargs
        if args.activation_offloading or (isinstance(kwargs, dict) and kwargs.get("offload")):
            raise ConfigError(
                f"{'activation_offloading=True' if args.activation_offloading else 'offload=True'} moves activations "
                "from an accelerator to the host, and this training is on a processor; remove it, or recompute "
                "activations with activation_checkpointing=True"
            )
    for option in dataclasses.fields(args):
        remedy = (_MISSING | (_REPLACED if loss_given else {})).get(option.name)
        default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        value = getattr(args, option.name)
        # TRL turns a single loss type into a list of one.
        found, usual = (x[0] if isinstance(x, list) and len(x) == 1 else x for x in (value, default))
        if remedy is not None and found != usual:
            reason = ", since the loss is an object of its own" if option.name in _REPLACED else ""
            raise ConfigError(f"{option.name}={value!r} cannot be used here{reason}; remove it: {remedy}")


def loss_of(args: DPOConfig) -> LossConfig:
    """The loss that TRL's options name: one, or the weighted sum of several (MPO).

    Raises:
        ConfigError: madpo has none of that kind.
    """
    kinds = list(args.loss_type)
    weights = list(args.loss_weights or [1.0] * len(kinds))
    if missing := [kind for kind in kinds if kind not in (*_LOSSES, _LIKELIHOOD)]:
        raise ConfigError(
            f"loss_type={args.loss_type!r}: madpo has no loss like {', '.join(missing)}; write {_OWN}, or use {STOCK}"
        )
    if args.use_weighting and kinds != ["sigmoid"]:
        raise ConfigError(f"use_weighting=True weighs only loss_type='sigmoid' here; remove it, or use {STOCK}")
    if args.label_smoothing and "robust" not in kinds:
        raise ConfigError(
            f"label_smoothing={args.label_smoothing!r} has no effect on loss_type={args.loss_type!r} in TRL; use "
            "loss=DPO(label_smoothing=...), or remove it"
        )
    nll = sum(weight for kind, weight in zip(kinds, weights, strict=True) if kind == _LIKELIHOOD)
    terms = [(_LOSSES[kind](args), weight) for kind, weight in zip(kinds, weights, strict=True) if kind != _LIKELIHOOD]
    if not terms:
        raise ConfigError(f"loss_type={args.loss_type!r} names no preference loss; add one, or use TRL's SFTTrainer")
    if args.use_weighting:
        terms = [(WPO(beta=args.beta, clamp=False), weights[0])]
    if len(terms) == 1 and terms[0][1] == 1 and not nll:
        return terms[0][0]
    return Combined(parts=tuple(term for term, _ in terms), weights=tuple(weight for _, weight in terms), nll=nll)


def refuse_headless(model: str | nn.Module) -> None:
    """Refuse a model of transformers without an output head: a backbone or a classifier.

    Raises:
        ConfigError: naming its class.
    """
    inner = unwrapped(model) if isinstance(model, nn.Module) else None
    found = text_model(inner) if isinstance(inner, PreTrainedModel) else None
    if isinstance(found, PreTrainedModel) and found.get_output_embeddings() is None:
        raise ConfigError(
            f"{type(inner).__name__} has no output head that gives log-probabilities; load the model with "
            "AutoModelForCausalLM"
        )


def refuse_adapter(model: str | nn.Module, peft_config: PeftConfig | None, *, sync_ref_model: bool) -> None:
    """Refuse adapters that add virtual tokens or read a task's number: the engine hands the backbone token ids.

    With ``sync_ref_model`` every adapter is refused.

    Raises:
        ConfigError: naming the kind of adapter.
    """
    own = getattr(model, "peft_config", None) or {}
    if sync_ref_model and (own or peft_config is not None):
        raise ConfigError(
            "sync_ref_model=True moves a reference that has all weights of the model, and an adapter's reference is "
            "the model without it; train all weights, or remove it"
        )
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
