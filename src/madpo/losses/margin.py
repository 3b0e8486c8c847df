"""Losses that read a reward model's margin or scores: MADPO's relatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from madpo.core.columns import MARGIN, SCORES
from madpo.core.config import added
from madpo.core.errors import DataError
from madpo.core.lazy import F, torch
from madpo.losses.base import (
    BetaLoss,
    LossInputs,
    LossOutput,
    LossState,
    per_token,
    published,
    soft_logistic,
)
from madpo.losses.madpo import MADPO, MarginLoss, check_finite, margin_coefficient

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class SoftMADPO(MarginLoss):
    """MADPO's target without the label's noise: both orders of the pair, weighted by what the target says.

    L = -sigma(c h) log sigma(beta h_theta) - sigma(-c h) log sigma(-beta h_theta), c = c(|h|), h the reward margin.
    For |h| < tau it is the mean of MADPO's loss over a Bradley-Terry label (the proof of Proposition 4.1), with no
    label variance. There is no cut-off: beyond tau the target stays c h, a dampening that MADPO's own loss does
    not have (its target is h + log w there, at most ln 2 below h). The label enters only through the reward model.
    """

    kind: Literal["soft_madpo"] = "soft_madpo"
    paper = MADPO.paper

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        margin = self.margin(inputs)
        c = margin_coefficient(margin, **self.coefficient, finite=inputs.finite_columns)
        per_pair = soft_logistic(self.beta * inputs.log_ratio_margin, c * margin)
        return LossOutput(per_pair, {"coefficient/mean": c, "target/mean": c * margin})


class SoftDPO(BetaLoss):
    """DPO whose target is a mixture of the label and the reward model's probability (MMPO, arXiv 2410.03145).

    L = -p log sigma(beta h_theta) - (1 - p) log sigma(-beta h_theta), with the target
    p = label_share + (1 - label_share) sigma(reward_margin / margin_temperature). MMPO is label_share = 0, DPO is
    label_share = 1. MMPO's ``bt_beta`` is 1/margin_temperature. Summed log-probs; the minimiser is
    beta h_theta = logit p.
    """

    kind: Literal["soft_dpo"] = "soft_dpo"
    paper = published("2410.03145")
    margin_temperature: float = Field(default=1.0, gt=0)
    """Divides the margins; larger makes the labels softer."""
    label_share: float = added(0.0, ge=0, le=1)
    """Weight of the label in the target, the margin has the rest: 0 is the margin's probability, 1 is DPO."""

    needs = frozenset({MARGIN})

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        target, logits = finite_margin(inputs) / self.margin_temperature, self.beta * inputs.log_ratio_margin
        rest = 1 - self.label_share
        wrong = rest * torch.sigmoid(-target)
        right = self.label_share + rest * torch.sigmoid(target)
        per_pair = -right * F.logsigmoid(logits) - wrong * F.logsigmoid(-logits)
        return LossOutput(per_pair, {"target/mean": target, "target/probability": right})


class ODPO(BetaLoss):
    """ODPO, DPO with an offset (Amini et al., arXiv 2402.10571): L = -log sigma(beta h - alpha f(reward_margin)).

    The official code takes f = log, which exists for positive margins only (the pairs are ordered by score);
    ``offset = "linear"`` takes the margin itself and any sign. Summed log-probs.
    """

    kind: Literal["odpo"] = "odpo"
    paper = published("2402.10571")
    alpha: float = Field(default=1.0, ge=0)
    """Size of the offset; larger asks for a wider gap on pairs with a large margin, 0 is DPO."""
    offset: Literal["log", "linear"] = "log"
    """f: "log" (official; every margin must be positive) or "linear"."""

    needs = frozenset({MARGIN})

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        margin = finite_margin(inputs)
        if self.offset == "log":
            low = (margin <= 0).nonzero()
            if len(low):
                row = int(low[0])
                raise DataError(
                    f"reward_margin in row {row} of the batch is {float(margin[row])}, but ODPO's offset is its "
                    'logarithm and needs margins above 0; order the pairs by reward or set offset = "linear"'
                )
            margin = margin.log()
        return LossOutput(-F.logsigmoid(self.beta * inputs.log_ratio_margin - self.alpha * margin), {})


class RPO(BetaLoss):
    """Reward-aware preference optimisation (NVIDIA, arXiv 2502.00203), and reward distillation (arXiv 2405.19316).

    With b = beta h_theta and the target a = eta * reward_margin: "sq" is (b - a)^2 (distilled DPO), "bwd_kl" is
    KL(Bern(sigma(a)) || Bern(sigma(b))), soft-label DPO minus the entropy of its label, and "fwd_kl" is
    KL(Bern(sigma(b)) || Bern(sigma(a))). Summed log-probs; each is least at b = a.
    """

    kind: Literal["rpo"] = "rpo"
    paper = published("2502.00203")
    eta: float = Field(default=1.0, gt=0)
    """Multiplies the margins; larger asks for wider gaps."""
    form: Literal["sq", "fwd_kl", "bwd_kl"] = "bwd_kl"
    """Distance between the policy's margin and the reward model's."""

    needs = frozenset({MARGIN})

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        target, logits = self.eta * finite_margin(inputs), self.beta * inputs.log_ratio_margin
        if self.form == "sq":
            per_pair = (logits - target).square()
        elif self.form == "bwd_kl":
            per_pair = bernoulli_kl(target, logits)
        else:
            per_pair = bernoulli_kl(logits, target)
        return LossOutput(per_pair, {"target/mean": target})


class OmniDPO(BetaLoss):
    """Omni-DPO, renamed Uni-DPO (Peng et al., arXiv 2506.10054): a quality weight times a focal weight.

    `L = -q f log sigma(beta d) - nll_weight [ref_w > p_w] [S_w >= good_score] p_w`, with every log-prob a mean per
    token: d the log-ratio margin, q = sigma(eta (S_w - S_l)) from a judge's scores,
    f = (1 - sigma(beta (p_w - p_l) - tau_ref))^gamma from the policy. q grows with the score margin, the opposite
    of MADPO's weight. In the official code the gradient also flows through f.
    """

    kind: Literal["omni_dpo"] = "omni_dpo"
    paper = published("2506.10054")
    beta: float = Field(default=2.0, gt=0)
    """Scale of the per-token margins."""
    eta: float = Field(default=0.7, ge=0)
    """Sharpness of the quality weight, in 1 / the judge's unit; 0 gives 1/2 to every pair."""
    tau_ref: float = 0.8
    """Policy margin, times beta, at which the focal weight is 2^-gamma; larger keeps fitted pairs in."""
    gamma: float = Field(default=3.0, ge=0)
    """Focus: larger ignores fitted pairs more, 0 switches the focal weight off."""
    nll_weight: float = Field(default=0.001, ge=0)
    """lambda of the paper: weight of the likelihood term on good answers that the policy came to dislike."""
    good_score: float = 3.2
    """tau_good: judge's score from which an answer is good."""
    detach_weight: bool = False
    """False: the gradient flows through the focal weight (official code). True: the weight is a constant."""

    needs = frozenset(SCORES)

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        chosen_score = inputs.required("chosen_score").detach()
        quality = torch.sigmoid(self.eta * (chosen_score - inputs.required("rejected_score").detach()))
        focal = (self.gamma * F.logsigmoid(self.tau_ref - self.beta * inputs.policy_margin_per_token)).exp()
        if self.detach_weight:
            focal = focal.detach()
        logistic = -F.logsigmoid(self.beta * inputs.log_ratio_margin_per_token)
        policy = per_token(inputs.policy_chosen_logps, inputs.chosen_lengths)
        reference = per_token(inputs.ref_chosen_logps, inputs.chosen_lengths)
        unlearned = (reference > policy) & (chosen_score >= self.good_score)
        likelihood = -self.nll_weight * torch.where(unlearned, policy, torch.zeros_like(policy))
        return LossOutput(
            quality * focal * logistic + likelihood,
            {"weight/quality": quality, "weight/focal": focal.detach(), "nll/share": unlearned.to(policy.dtype)},
        )

    def implicit_margin(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        """Beta times the log-ratio margin per token."""
        return self.beta * inputs.log_ratio_margin_per_token


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(Bern(sigma(p)) || Bern(sigma(q))) of two log-odds, nats; finite for every finite p and q."""
    yes = torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q))
    return yes + torch.sigmoid(-p) * (F.logsigmoid(-p) - F.logsigmoid(-q))


def finite_margin(inputs: LossInputs) -> Tensor:
    """The column reward_margin as a constant; a NaN or infinite value is refused with its row."""
    return check_finite(inputs.required(MARGIN).detach(), known=inputs.finite_columns)
