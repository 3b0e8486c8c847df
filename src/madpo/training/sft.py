"""Supervised fine-tuning: TRL's trainer with the loss from the fast completion head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from madpo.models.engine.logprobs import completion_logps
from madpo.training.best_weights import KeepsBest

__all__ = ["CompletionSFT", "SFTConfig"]


class CompletionSFT(KeepsBest, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the loss from the fast completion head: mean negative log-likelihood per token."""

    loss_is_scaled_for_ga = True

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        scores = completion_logps(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != -100)
        tokens = scores.lengths.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -scores.logps.sum() / tokens
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, scores) if return_outputs else loss
