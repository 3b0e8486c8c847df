"""Early stopping that keeps the best weights in memory, and goes on exactly after a kill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from madpo.training.resume import ExactResume

_COUNTERS = ("best", "step", "since", "evaluated_at")


class KeepsBest(ExactResume):
    """Mixin: :class:`ExactResume` of a trainer that may keep the weights of its lowest evaluation loss.

    Attributes:
        best: those weights so far; None until :meth:`keep_best`.
    """

    best: BestWeights | None = None

    def keep_best(self, patience: int) -> None:
        """From now on stop after so many evaluations without improvement; call it before ``train``."""
        self.best = BestWeights(self.model, patience)
        self.add_callback(self.best)

    def take_best(self) -> int:
        """After the training: the best weights, the last ones included, are the model's; returns their step."""
        assert self.best is not None
        if self.best.evaluated_at != self.state.global_step:
            self.evaluate()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.best.weights:
                    parameter.copy_(self.best.weights[name])
        return self.best.step

    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.best is None:
            return super()._extra_state()
        return self.best.weights, {name: getattr(self.best, name) for name in _COUNTERS}

    def _stops_early(self) -> bool:
        return (self.best is not None and self.best.stopped) or super()._stops_early()

    def _load_extra_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        if self.best is not None:
            self.best.weights = {name: tensor.to(self.args.device) for name, tensor in tensors.items()}
            for name in _COUNTERS:
                setattr(self.best, name, values[name])


class BestWeights(TrainerCallback):  # type: ignore[misc]
    """Keeps the trainable weights of the lowest evaluation loss, and stops when it no longer falls."""

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.model, self.patience = model, patience
        self.best, self.step, self.since, self.evaluated_at = float("inf"), 0, 0, -1
        self.weights: dict[str, Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.evaluated_at = state.global_step
        if metrics["eval_loss"] < self.best:
            self.best, self.step, self.since = metrics["eval_loss"], state.global_step, 0
            self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        else:
            self.since += 1
            if self.stopped:
                control.should_training_stop = True

    @property
    def stopped(self) -> bool:
        """Whether the loss has not fallen for ``patience`` evaluations."""
        return self.since >= self.patience
