"""Losses that read log-probabilities only: no reward model, no running statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from madpo.core.errors import ConfigError
from madpo.core.lazy import F
from madpo.losses.base import BetaLoss, LossConfig, LossInputs, LossOutput, LossState, per_token, published

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class DPO(BetaLoss):
    """DPO (Rafailov et al., arXiv 2305.18290, Eq. 7), with label smoothing (cDPO).

    L = -(1 - e) log sigma(beta h) - e log sigma(-beta h), h the log-ratio margin of **summed** log-probs.
    """

    kind: Literal["dpo"] = "dpo"
    paper = published("2305.18290")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """e: probability that a label is flipped; the minimiser is then finite, beta h = logit(1 - e)."""

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        logits, flipped = self.beta * inputs.log_ratio_margin, self.label_smoothing
        if not flipped:  # exactly, also where log sigma(-beta h) is huge
            return LossOutput(-F.logsigmoid(logits), {})
        return LossOutput(-(1 - flipped) * F.logsigmoid(logits) - flipped * F.logsigmoid(-logits), {})


class IPO(LossConfig):
    """IPO (Azar et al., arXiv 2310.12036, Eq. 17): L = (h - 1/(2 beta))^2, nats squared.

    Two forms go by this name, and at equal beta they differ in strength by the length of a response: the paper
    (and the MADPO study) uses summed log-probs, TRL since 0.7.11 the mean per token. Say which one a table shows.
    """

    kind: Literal["ipo"] = "ipo"
    paper = published("2310.12036")
    beta: float = Field(default=0.1, gt=0)
    """tau of the paper: h is pulled to 1/(2 beta), 5 nats at 0.1; larger keeps the policy closer."""
    reduction: Literal["sum", "mean"] = "sum"
    """"sum": log-ratios summed over tokens (the paper). "mean": per token (TRL), h in nats per token."""

    def _margin(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        return inputs.log_ratio_margin if self.reduction == "sum" else inputs.log_ratio_margin_per_token

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        return LossOutput((self._margin(inputs) - 1 / (2 * self.beta)).square(), {})

    def implicit_margin(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        """As :meth:`LossConfig.implicit_margin`."""
        return self.beta * self._margin(inputs)


class RDPO(BetaLoss):
    """Robust DPO (Chowdhury et al., arXiv 2403.00409): unbiased for DPO when labels are flipped at a known rate.

    L = [-(1 - e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2e). Its mean over flips is DPO's loss on the
    clean label. One pair's loss has no lower bound (slope -e/(1 - 2e) for large h), so negative values are
    normal. Summed log-probs.
    """

    kind: Literal["rdpo"] = "rdpo"
    paper = published("2403.00409")
    flip_rate: float = Field(default=0.1, ge=0, lt=0.5)
    """e: share of labels that are wrong; 0 is DPO, larger trusts a single label less."""

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        logits = self.beta * inputs.log_ratio_margin
        clean, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        rate = self.flip_rate
        return LossOutput(((1 - rate) * clean - rate * flipped) / (1 - 2 * rate), {})


class BCO(BetaLoss):
    """BCO on pairs (Jung et al., arXiv 2404.04656, without the reward shift): each side by itself, good or bad.

    L = -log sigma(beta r_w) - log sigma(-beta r_l), r the log-ratio of a completion, **summed**. TRL's "bco_pair".
    """

    kind: Literal["bco"] = "bco"
    paper = published("2404.04656")

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        chosen, rejected = self.beta * inputs.chosen_log_ratio, self.beta * inputs.rejected_log_ratio
        return LossOutput(-F.logsigmoid(chosen) - F.logsigmoid(-rejected), {})


class SimPO(LossConfig):
    """SimPO (Meng et al., arXiv 2405.14734): L = -log sigma(beta p - gamma), without a reference.

    p is the mean log-prob per token of the chosen minus that of the rejected. The paper names gamma, the official
    code the ratio gamma/beta: give one of the two.
    """

    kind: Literal["simpo"] = "simpo"
    paper = published("2405.14734")
    beta: float = Field(default=2.0, gt=0)
    """Scale of the per-token margin; larger sharpens the loss (the paper: 2 to 10)."""
    gamma: float | None = None
    """Target margin in the logits; larger asks for a wider gap. TRL's ``simpo_gamma``."""
    gamma_beta_ratio: float | None = None
    """gamma / beta, the official code's parameter, nats per token; 0.25 if neither is given."""

    needs_reference = False

    @model_validator(mode="after")
    def _check(self) -> SimPO:
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ConfigError(
                f"gamma is {self.gamma} and gamma_beta_ratio is {self.gamma_beta_ratio}, but one follows from the "
                "other (gamma = beta * gamma_beta_ratio): give one of them"
            )
        return self

    @property
    def target_margin(self) -> float:
        """gamma, in the unit of the logits."""
        if self.gamma is not None:
            return self.gamma
        return self.beta * (0.25 if self.gamma_beta_ratio is None else self.gamma_beta_ratio)

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        return LossOutput(-F.logsigmoid(self.implicit_margin(inputs) - self.target_margin), {})

    def implicit_margin(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        """Without a reference: beta times the mean log-prob per token, chosen minus rejected."""
        return self.beta * inputs.policy_margin_per_token


class WPO(LossConfig):
    """WPO (Zhou et al., arXiv 2406.11827): DPO weighted by how likely the policy is to write the pair itself.

    L = -w log sigma(beta h), log w = sum over both completions of mean_t [log pi_t - log sum_v pi(v|t)^2], a
    constant to the gradient. The DPO term uses summed log-probs, the weight means per token.
    """

    kind: Literal["wpo"] = "wpo"
    paper = published("2406.11827")
    beta: float = Field(default=0.01, gt=0)
    """Strength of the pull to the reference; larger keeps the policy closer to it."""
    clamp: bool = True
    """True: w at most 1 (official code, TRL before 0.29). False: no bound (the paper's formula, TRL since 0.29)."""

    needs = frozenset({"chosen_log_sum_sq", "rejected_log_sum_sq"})

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        chosen = per_token(inputs.policy_chosen_logps, inputs.chosen_lengths)
        rejected = per_token(inputs.policy_rejected_logps, inputs.rejected_lengths)
        log_weight = chosen - inputs.required("chosen_log_sum_sq") + rejected
        log_weight = (log_weight - inputs.required("rejected_log_sum_sq")).detach()
        # sum_v p^2 >= 1/V, so log w <= 2 log V: 43 is out of reach below 2^31 words and keeps exp finite.
        weight = log_weight.clamp(max=0.0 if self.clamp else 43.0).exp()
        return LossOutput(-weight * F.logsigmoid(self.beta * inputs.log_ratio_margin), {"weight/mean": weight})
