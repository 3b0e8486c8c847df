"""Whether a preference training moved its policy: too low a learning rate leaves no other trace than a flat loss."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from madpo.core.progress import say
from madpo.losses import LossInputs

HARDLY = 0.01
"""Mean |beta * log-ratio margin|, nats, below which a policy has hardly moved: DPO's loss is within 0.005 of log 2."""
ROUNDING = 0.1
"""The same in half precision, at most: there rounding moves log-ratios after the first step already."""
GROWTH = 1.5
"""What learning adds at least: the last steps' statistic over that of the first steps."""
PART = 0.1
"""Share of the steps that is looked at, at either end."""


class Movement(TrainerCallback):  # type: ignore[misc]
    """Says at the end of a training that the policy hardly left its reference, where it did not.

    The statistic is the mean of |beta * (log-ratio of the chosen - log-ratio of the rejected)| over pairs. Absolute
    values, since pairs that move in opposite directions have moved. It is 0 in the first step, which is left out.

    Args:
        trainer: a preference trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._first: list[Tensor] = []
        self._last: list[Tensor] = []

    def note(self, pairs: LossInputs, real: Tensor) -> None:
        """Keep the sum and the count of a micro-batch. A loss without a reference has no log-ratios.

        Args:
            real: which pairs count, ``pairs``.
        """
        state, loss = self.trainer.state, self.trainer.loss
        first, last = (
            state.global_step <= max(1, state.max_steps * PART),
            state.global_step >= state.max_steps * (1 - PART),
        )
        if not loss.needs_reference or state.global_step == 0 or not (first or last):
            return
        margin = getattr(loss, "beta", 1.0) * (pairs.chosen_log_ratio - pairs.rejected_log_ratio)
        size = torch.where(real, margin.detach().float().abs(), 0.0)
        sums = torch.stack([size.sum(), real.sum().float()])
        self._first += [sums] if first else []
        self._last += [sums] if last else []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first, self._last = [], []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._last:
            return
        zero = torch.zeros_like(self._last[0])
        sums = torch.stack([sum(self._first, zero), sum(self._last, zero)])
        (first, before), (last, after) = self.trainer.accelerator.reduce(sums, reduction="sum").tolist()
        first, last = first / max(before, 1), last / max(after, 1)
        if not after or last >= max(HARDLY, min(GROWTH * first, ROUNDING)):
            return
        rate = f"{args.learning_rate:g}"
        if isinstance(self.trainer.model, PeftModel):
            rate += "; 1e-4 is usual for LoRA"
        say(
            f"The policy hardly moved: the mean |beta * log-ratio margin| is {last:.2g} over its last {int(after)} "
            f"pairs and was {first:.2g} over the first ones; raise learning_rate (it was {rate}), or train for more "
            "steps."
        )
