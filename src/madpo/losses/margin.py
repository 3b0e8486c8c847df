"""Losses that read a reward model's margin or scores: MADPO and its relatives."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from madpo.losses.base import LossConfig, LossInputs, LossOutput, LossState
from madpo.losses.weight import Part, check_weight_parameters, log_margin_weight


class MADPO(LossConfig):
    """MADPO (Rho, arXiv 2510.05342, Eq. 5): L = -w(h_phi) log sigma(beta h), the weight a constant.

    The mean over pairs divides by their number, not by the sum of the weights, as in the paper. Log-probs are
    summed. ``part`` gives the two ablations of Figure 3. See :func:`madpo.margin_weight` for what the weight does.
    """

    kind: Literal["madpo"] = "madpo"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference; larger keeps the policy closer to it."""
    tau: float = 7.0
    """|margin| at which the weight is exactly 1, log-odds; larger treats more pairs as hard."""
    c_max: float = 4.0
    """Amplification of small margins, above 1; larger learns more from them."""
    c_min: float | None = None
    """Dampening of large margins, in [0, 1); None is 1/c_max."""
    lam: float = 1.0
    """Steepness of the change from amplification to dampening around tau."""
    part: Part = "full"
    """"full", "amplify" (the paper's Amp-Only) or "dampen" (Reg-Only)."""
    margin_temperature: float = Field(default=1.0, gt=0)
    """Divides the margins first: the temperature that calibrates the reward model to log-odds."""

    needs: ClassVar[frozenset[str]] = frozenset({"reward_margin"})

    @model_validator(mode="after")
    def _check(self) -> MADPO:
        check_weight_parameters(tau=self.tau, c_max=self.c_max, c_min=self.c_min, lam=self.lam, part=self.part)
        return self

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        margin = inputs.required("reward_margin").detach() / self.margin_temperature
        weight = log_margin_weight(
            margin, tau=self.tau, c_max=self.c_max, c_min=self.c_min, lam=self.lam, part=self.part
        ).exp()
        per_pair = -weight * F.logsigmoid(self.beta * inputs.log_ratio_margin)
        return LossOutput(per_pair, weight_metrics(margin, weight))


def weight_metrics(margin: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """What to log of a batch's weights, one value per pair; the trainer reduces them over the logging window.

    ``weight/mean`` well below 1 means more label noise than Bradley-Terry, or a reward model that is not
    calibrated, and acts as a smaller learning rate. ``weight/square`` lets the trainer compute the effective
    sample size (sum w)^2 / sum w^2 over the window.
    """
    weight, margin = weight.detach(), margin.detach()
    return {
        "weight/mean": weight,
        "weight/square": weight.square(),
        "margin/negative": (margin < 0).to(weight.dtype),
        "weight/amplified": (weight > 1).to(weight.dtype),
        "weight/dampened": ((weight < 1) & (margin > 0)).to(weight.dtype),
        "weight/turned_down": ((weight < 1) & (margin < 0)).to(weight.dtype),
    }
