"""Losses of the log-ratio margin alone: no reward model enters."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from madpo.losses.base import LossConfig, LossInputs, LossOutput, LossState


class DPO(LossConfig):
    """DPO (Rafailov et al., arXiv 2305.18290, Eq. 7), with label smoothing (cDPO).

    L = -(1 - e) log sigma(beta h) - e log sigma(-beta h), h the log-ratio margin of **summed** log-probs.
    """

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference; larger keeps the policy closer to it."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """e: probability that a label is flipped; the minimiser is then finite, beta h = logit(1 - e)."""

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        logits = self.beta * inputs.log_ratio_margin
        return LossOutput(smoothed_logistic(logits, self.label_smoothing), {})


def smoothed_logistic(logits: Tensor, smoothing: float | Tensor) -> Tensor:
    """-(1 - e) log sigma(z) - e log sigma(-z); with e = 0 exactly -log sigma(z), also where log sigma(-z) is huge."""
    if isinstance(smoothing, float) and smoothing == 0:
        return -F.logsigmoid(logits)
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)
