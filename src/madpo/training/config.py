"""Trainer arguments that run everywhere, and the checks that keep TRL's loss options from being ignored silently."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TrainingArguments
from trl import DPOConfig

from madpo.core.errors import ConfigError
from madpo.models.engine.logprobs import unwrapped
from madpo.models.load import compute_dtype
from madpo.models.modes import without_own_noise


@dataclass
class PreferenceConfig(DPOConfig):  # type: ignore[misc]
    """TRL's ``DPOConfig`` with defaults that run everywhere.

    The CPU is used where there is no accelerator.

    Attributes:
        gradient_checkpointing: recompute activations in the backward pass; off by default (TRL: on).
        bf16: bfloat16; None is where the processor has it.
        disable_dropout: None switches off the model's own dropout (and layerdrop, router jitter and the like), so that
            training begins at the reference; LoRA dropout is what the user wrote. True switches off both (TRL's
            default), False neither.
        token_metrics: when to compute entropy, mean logits and token accuracy, which cost about a tenth of the head:
            "always" (as TRL does), "logged" at steps that are logged, or "never".
        pair_weights: whether a column ``weight`` multiplies each pair's loss. None ignores the column, and says so
            where there is one.
        allow_pickle: load checkpoints of transformers' own formats, and write them where DeepSpeed or FSDP splits the
            model. They hold pickles, which can run code when they are loaded. Otherwise checkpoints hold none.
    """

    gradient_checkpointing: bool | None = None
    disable_dropout: bool | None = None
    bf16: bool | None = None
    token_metrics: str = "always"
    pair_weights: bool | None = None
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.token_metrics not in ("logged", "always", "never"):
            raise ConfigError(f"token_metrics is {self.token_metrics!r}, but must be 'logged', 'always' or 'never'")
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and compute_dtype() is torch.bfloat16
        super().__post_init__()


def own_noise(model: nn.Module, args: TrainingArguments) -> AbstractContextManager[None]:
    """What a forward pass of ``model`` runs in: without its own dropout, unless ``args.disable_dropout`` is False."""
    return nullcontext() if args.disable_dropout is False else without_own_noise(unwrapped(model))
