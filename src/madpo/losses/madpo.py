"""MADPO (Rho, arXiv 2510.05342): DPO weighted pair by pair by what a reward model says of the pair.

The paper writes the weight (Eq. 4) as w = sigma(c h) / sigma(h). Evaluated literally it is inf * 0 for strongly
negative margins (below -88 in float32), so it is computed as exp(log sigma(c h) - log sigma(h)), and the branch that is
not taken sees a harmless argument, so that gradients stay finite as well.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from madpo.core.columns import MARGIN
from madpo.core.errors import ConfigError, DataError
from madpo.core.lazy import F, torch
from madpo.losses.base import BetaLoss, LossInputs, LossOutput, LossState, published, widen

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Part = Literal["full", "amplify", "dampen"]
PARTS: tuple[Part, ...] = ("full", "amplify", "dampen")
LARGEST = 1e6
"""Largest tau, c_max and lam: far beyond any use, and no float32 product overflows."""


class MarginLoss(BetaLoss):
    """A loss with MADPO's coefficient c(|h|), see :func:`madpo.losses.margin_coefficient`."""

    needs = frozenset({MARGIN})

    tau: float = 7.0
    """|margin| at which coefficient and weight are exactly 1, log-odds; larger treats more pairs as hard."""
    c_max: float = 4.0
    """Amplification of small margins, above 1; larger learns more from them."""
    c_min: float | None = None
    """Dampening of large margins, in [0, 1); None is 1/c_max."""
    lam: float = 1.0
    """Steepness of the change from amplification to dampening around tau."""
    margin_temperature: float = Field(default=1.0, gt=0)
    """Divides the margins first: the temperature that calibrates the reward model to log-odds."""

    @model_validator(mode="after")
    def _check(self) -> MarginLoss:
        check_weight_parameters(**self.coefficient, part=getattr(self, "part", "full"))
        return self

    @property
    def coefficient(self) -> dict[str, Any]:
        """The parameters of :func:`madpo.losses.margin_coefficient`."""
        return {"tau": self.tau, "c_max": self.c_max, "c_min": self.c_min, "lam": self.lam}

    def margin(self, inputs: LossInputs) -> Tensor:
        """h per pair, log-odds, a constant to the gradient."""
        return inputs.required(MARGIN).detach() / self.margin_temperature


class MADPO(MarginLoss):
    """MADPO (Rho, arXiv 2510.05342, Eq. 5): L = -w(h_phi) log sigma(beta h), the weight a constant.

    The mean over pairs divides by their number, not by the sum of the weights, as in the paper. Log-probs are
    summed. ``part`` gives the two ablations of Figure 3. See :func:`madpo.margin_weight` for what the weight does.
    """

    kind: Literal["madpo"] = "madpo"
    paper = published("2510.05342")
    part: Part = "full"
    """"full", "amplify" (the paper's Amp-Only) or "dampen" (Reg-Only)."""

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        margin = self.margin(inputs)
        known = inputs.finite_columns
        weight = log_margin_weight(margin, **self.coefficient, part=self.part, finite=known).exp()
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


def check_weight_parameters(*, tau: float, c_max: float, c_min: float | None, lam: float, part: str) -> float:
    """Refuse parameters outside the paper's ranges; return c_min with its default 1/c_max filled in.

    Raises ConfigError.
    """
    ranges = (
        ("tau", tau, 0, "(log-odds; the paper uses 2 to 10)"),
        ("c_max", c_max, 1, "(the paper uses 2 to 4); for plain DPO use DPO()"),
        ("lam", lam, 0, "(the paper uses 1)"),
    )
    for name, value, low, hint in ranges:
        if not low < value <= LARGEST:
            raise ConfigError(f"{name} is {value}, but must be above {low} and at most 1e6 {hint}")
    resolved = 1 / c_max if c_min is None else c_min
    if not (math.isfinite(resolved) and 0 <= resolved < 1):
        raise ConfigError(f"c_min is {resolved}, but must be in [0, 1); leave it out for 1/c_max")
    if part not in PARTS:
        raise ConfigError(f"part is {part!r}, but must be one of {', '.join(map(repr, PARTS))}")
    return resolved


def margin_coefficient(
    reward_margin: Float[Tensor, "*shape"],
    *,
    tau: float,
    c_max: float,
    c_min: float | None = None,
    lam: float = 1.0,
    finite: bool = False,
) -> Float[Tensor, "*shape"]:
    """The coefficient c(|h|) of MADPO: above 1 for |h| < tau, exactly 1 at tau, towards c_min beyond.

    Written as c = c_min + (c_max - c_min) * sigma(-(log K + lam (|h| - tau))), K = (c_max - 1)/(1 - c_min),
    which cannot overflow.

    Args:
        reward_margin: margins h_phi, log-odds, any shape. Half precision is widened to float32.
        tau, c_max, c_min, lam: as in :func:`margin_weight`.
        finite: the margins are known to be finite. An accelerator then has nothing to wait for.

    Returns:
        Coefficients in (c_min, c_max), same shape.
    """
    c_min = check_weight_parameters(tau=tau, c_max=c_max, c_min=c_min, lam=lam, part="full")
    h = check_finite(reward_margin, known=finite)
    return c_min + (c_max - c_min) * _amplified(h, tau=tau, c_max=c_max, c_min=c_min, lam=lam)


def log_margin_weight(
    reward_margin: Float[Tensor, "*shape"],
    *,
    tau: float,
    c_max: float,
    c_min: float | None = None,
    lam: float = 1.0,
    part: Part = "full",
    finite: bool = False,
) -> Float[Tensor, "*shape"]:
    """Natural logarithm of :func:`margin_weight`: strictly below ln 2, finite also where the weight underflows.

    Args:
        finite: as in :func:`margin_coefficient`; the others as in :func:`margin_weight`.
    """
    c_min = check_weight_parameters(tau=tau, c_max=c_max, c_min=c_min, lam=lam, part=part)
    h = check_finite(reward_margin, known=finite)
    above = h > -tau
    # Where the branch is not taken, h is 0: its value and its gradient are finite.
    inside = torch.where(above, h, torch.zeros_like(h))
    amplified = _amplified(inside, tau=tau, c_max=c_max, c_min=c_min, lam=lam)
    # c * h in two terms: beyond 1e30 the second is 0 in every precision, and its gradient must not overflow.
    target = c_min * inside + (c_max - c_min) * (inside.clamp(max=1e30) * amplified)
    log_weight = F.logsigmoid(target) - F.logsigmoid(inside)
    # The weight is below 2 for every margin, but rounding can reach it (c h large, h tiny), and float32 rounds ln 2 up.
    log_weight = log_weight.clamp(max=float(torch.nextafter(*torch.tensor([math.log(2), 0.0], dtype=h.dtype))))
    active = above
    if part == "amplify":
        active = above & (h.abs() < tau)
    elif part == "dampen":
        active = above & (h.abs() >= tau)
    return torch.where(active, log_weight, torch.zeros_like(log_weight))


def margin_weight(
    reward_margin: Float[Tensor, "*shape"],
    *,
    tau: float,
    c_max: float,
    c_min: float | None = None,
    lam: float = 1.0,
    part: Part = "full",
) -> Float[Tensor, "*shape"]:
    """Per-pair weight of MADPO: sigma(c h) / sigma(h) with c = c(|h|) for h > -tau, and 1 below (Eq. 4).

    What the numbers do: above 1 for 0 < h < tau (at most 1.42 at the paper's settings, below 2 always), slightly
    below 1 for h > tau (never below 1/2), and far below 1 for -tau < h < 0, where the reward model contradicts
    the label: there the weight acts as a filter. Continuous everywhere; w(0) = w(tau) = w(-tau) = 1.

    Args:
        reward_margin: r(chosen) - r(rejected) under a frozen, calibrated reward model, log-odds, any shape.
            Computed in float32 or wider.
        tau: |margin| at which the coefficient is exactly 1; log-odds, > 0. Larger amplifies more pairs.
        c_max: limit of the coefficient for easy amplification, > 1. Larger learns more from small margins.
        c_min: limit of the coefficient for |margin| -> infinity, in [0, 1); None is 1/c_max.
        lam: steepness of the coefficient around tau, > 0.
        part: "full"; "amplify" sets the weight to 1 for |h| >= tau (the paper's Amp-Only); "dampen" sets it to 1
            for |h| < tau (Reg-Only).

    Returns:
        Weights, same shape, float32 or float64, in [0, 2] (strictly inside before rounding).

    Raises:
        ConfigError: a parameter outside its range, with the value and the range.
        DataError: a NaN or infinite margin, with its row.
    """
    return log_margin_weight(reward_margin, tau=tau, c_max=c_max, c_min=c_min, lam=lam, part=part).exp()


def _amplified(h: Tensor, *, tau: float, c_max: float, c_min: float, lam: float) -> Tensor:
    # The share of c_max in the coefficient. log K by log1p: near c_max = 1 the plain ratio would lose its digits.
    log_k = math.log(c_max - 1) - math.log1p(-c_min)
    return torch.sigmoid(-(log_k + lam * (h.abs() - tau)))


def check_finite(reward_margin: Tensor, *, known: bool = False) -> Tensor:
    """The margins in float32 or wider; DataError with the row of the first that is NaN or infinite.

    Args:
        known: nothing is looked at.
    """
    h = widen(reward_margin if reward_margin.is_floating_point() else reward_margin.float())
    if not known and len(bad := (~torch.isfinite(h)).flatten().nonzero()):
        row = int(bad[0])
        raise DataError(
            f"reward_margin in row {row} is {float(h.flatten()[row])}: margins must be finite numbers; "
            "score the pair again or drop it"
        )
    return h
