"""Training hyperparameters: LoRA, AdamW, learning-rate schedule. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from madpo.core.config import Frozen
from madpo.core.options import Cli

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

CHECKPOINTS = "checkpoints"
REPORT_TO = "MADPO_REPORT_TO"
"""Environment variable with the trackers of trainings that have no option for them, separated by commas. Trackers are
no part of a result, and worker processes inherit it."""

Pooling = Literal["last", "mean"]
"""Where a reward model reads its reward: the state of the last token, or the mean of the completion's states."""

Truncation = Literal["drop", "cut", "refuse"]
"""What happens to a pair of more than the allowed tokens."""

Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
"""Those of transformers that need no options of their own."""

Decay = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(ge=0)]


FULL_LEARNING_RATE = 1e-6
"""Default of a preference training of all weights, as in TRL."""
ADAPTER_LEARNING_RATE = 1e-4
"""Default of a preference training of an adapter. TRL's own default hardly moves one."""


class LoRA(Frozen):
    """A low-rank adapter."""

    rank: Annotated[int, Cli(also=("r",))] = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """0 makes the log-ratios exactly 0 before the first step."""
    targets: Annotated[Literal["all-linear"] | tuple[str, ...], Cli(also=("target_modules",))] = "all-linear"
    """Modules to adapt; the output head never is. ``all-linear`` is every linear layer of the language model and the
    weights of its experts, without routers (:mod:`madpo.models.adapters`)."""

    def peft_config(self, task: Literal["CAUSAL_LM", "SEQ_CLS"], model: nn.Module) -> LoraConfig:
        """The same for PEFT, on ``model``; a reward model's head trains in full and is saved with the adapter."""
        from madpo.models.adapters import adapter_config

        return adapter_config(self, model, task)


class EarlyStopping(Frozen):
    """When a fine-tuning ends before its last epoch; the weights of the lowest loss are kept."""

    texts: int = Field(ge=1)
    """Texts that the loss is measured on, and that are not trained on."""
    eval_every: int = Field(default=20, ge=1)
    """Optimiser steps between two measurements."""
    patience: int = Field(default=3, ge=1)
    """Measurements without improvement before the training stops."""


class Optimisation(Frozen):
    """AdamW and its schedule, the same for every training of the study."""

    learning_rate: float = Field(gt=0)
    """Largest learning rate of the schedule."""
    epochs: float = Field(gt=0)
    """Passes over the examples."""
    batch_size: int = Field(ge=1)
    """Examples (or pairs) per optimiser step."""
    micro_batch_size: int | None = Field(default=None, ge=1, exclude=True)
    """Examples per forward pass; None is the whole batch. Without dropout the result depends on it in
    last digits only; dropout draws other masks."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after that."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's memory of the gradient and of its square."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decay of the weights, times the learning rate, per step."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger norm are scaled down to it."""
    checkpoint_every: int = Field(default=25, ge=0, exclude=True)
    """Optimiser steps between two checkpoints, from which a killed training continues; 0 is none."""

    @model_validator(mode="after")
    def _divides(self) -> Optimisation:
        if self.batch_size % self.per_pass:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}; give a "
                "divisor of batch_size"
            )
        return self

    @property
    def per_pass(self) -> int:
        """Examples of one forward pass."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)

    def arguments(self, out: Path, seed: int) -> dict[str, Any]:
        """The same as keyword arguments of any transformers training configuration."""
        import torch

        from madpo.models.load import compute_dtype

        return {
            "output_dir": str(out / CHECKPOINTS),
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.per_pass,
            "per_device_eval_batch_size": self.per_pass,
            "gradient_accumulation_steps": self.batch_size // self.per_pass,
            "warmup_steps": self.warmup,
            "lr_scheduler_type": self.schedule,
            "adam_beta1": self.betas[0],
            "adam_beta2": self.betas[1],
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "seed": seed,
            "data_seed": seed,
            "logging_steps": 1,
            "save_strategy": "steps" if self.checkpoint_every else "no",
            "save_steps": self.checkpoint_every or 1,
            "save_total_limit": 2,
            "report_to": os.environ.get(REPORT_TO, "none").split(","),
            "project": "madpo",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "activation_checkpointing": False,
            "use_cpu": not torch.accelerator.is_available(),
            "bf16": compute_dtype() is torch.bfloat16,
            "disable_dropout": None,  # off in the model, as configured in its adapter
        }


class AdapterTraining(Frozen):
    """How an adapter is trained."""

    optimisation: Optimisation
    lora: LoRA = LoRA()
