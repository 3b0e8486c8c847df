"""Losses that keep running statistics of the policy's own margins: beta-DPO, alpha-DPO and RE-DPO.

:meth:`LossConfig.observe` is the one place where a batch enters: it gets the margins of the whole batch, in the
same order on every rank, works on the CPU in float64, and draws from (seed, number of the batch) only. So every rank,
device and split into micro-batches gets the same numbers. A plain call observes its own inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from madpo.core.errors import ConfigError, DivergedError
from madpo.core.lazy import F, torch
from madpo.core.seeding import derived_seed, rng
from madpo.losses.base import BetaLoss, LossInputs, LossOutput, LossState, published, soft_logistic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class StatefulLoss(BetaLoss):
    """A loss that keeps running statistics."""

    stateful = True

    def ready(self, inputs: LossInputs, state: LossState | None) -> LossState:
        """The state with this call's batch: as prepared by ``observe``, or observed from the inputs themselves."""
        state = self.init_state(0) if state is None else state
        return state if state.batch else self.observe(self.statistic(inputs), state)


class RunningLoss(StatefulLoss):
    """What beta-DPO and alpha-DPO share: moving averages of the mean and the standard deviation over a batch.

    The averages move before they are used. The spread is the average of standard deviations (with n - 1), not of
    variances, as in both official codes. It has a floor where those divide by zero, and a batch of one pair leaves it.
    """

    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old average that is kept; larger moves more slowly."""
    bias_correction: bool = True
    """True: the first batch sets the averages and later ones count fully (divides by 1 - momentum^t). False:
    the official codes, whose averages start at initial_mean and initial_std and need some 20 batches."""
    initial_mean: float = 0.0
    """Average of the mean before the first batch, where bias_correction is off."""
    initial_std: float = Field(default=1.0, ge=0)
    """Average of the standard deviation before the first batch, where bias_correction is off."""
    std_floor: float = Field(default=1e-6, gt=0)
    """Least spread; only degenerate batches reach it."""

    def init_state(self, seed: int) -> LossState:
        """Averages at their initial values, no batch seen; ``seed`` decides every later draw."""
        return LossState(
            {
                "mean": torch.tensor(self.initial_mean, dtype=torch.float64),
                "std": torch.tensor(self.initial_std, dtype=torch.float64),
                "batches": torch.tensor(0, dtype=torch.int64),
                "seed": torch.tensor(derived_seed(seed, "loss", type(self).__name__), dtype=torch.int64),
            }
        )

    def followed(
        self, statistic: Float[Tensor, " batch"], state: LossState, *, training: bool
    ) -> tuple[Float[Tensor, " batch"], LossState, float, float]:
        """A batch (CPU, float64), the state after it, and the mean and floored spread to standardise it by.

        In evaluation the averages stay; before any training, mean and spread are the batch's own.
        """
        values = batch_values(statistic)
        seen, keep = int(state.tensors["batches"]) + training, self.momentum
        if training:
            if self.bias_correction:  # equals Adam's correction, written as a decay that starts at 0
                keep *= (1 - keep ** (seen - 1)) / (1 - keep**seen)
            average, spread = keep * state.tensors["mean"] + (1 - keep) * values.mean(), state.tensors["std"]
            if len(values) > 1:
                spread = keep * spread + (1 - keep) * values.std()
            state = state.updated(mean=average, std=spread, batches=torch.tensor(seen, dtype=torch.int64))
        mean, std = float(state.tensors["mean"]), float(state.tensors["std"])
        if seen == 0:
            mean, std = float(values.mean()), float(values.std()) if len(values) > 1 else std
        return values, state, mean, max(std, self.std_floor)


class BetaDPO(RunningLoss):
    """beta-DPO (Wu et al., arXiv 2407.08639): DPO whose beta follows the batch's mean margin, on a filtered batch.

    With M = h (``margin_scale = "raw"``) or beta h ("beta"), M_0 and sigma the moving mean and spread of M:

    - beta-batch: beta_batch = beta (1 + batch_scale (mean M - M_0)), at least ``floor``;
    - beta-guided filtering: of n pairs int(keep n), at least one, are drawn without replacement with probability
      proportional to N(M; M_0, sigma^2). ``LossOutput.kept`` is the draw; the trainer divides the sum of the kept
      losses by their number in the whole batch.

    Three versions of it exist; ``BetaDPO.preset(name)`` in Python, ``preset = "name"`` in TOML:

    - "official" (junkangwu/beta-DPO): raw h, averages from 0 and 0, filter first and beta from the kept pairs,
      beta at least 1e-3;
    - "madpo_notebook" (the MADPO author's baseline): beta h, averages from 0 and 1, beta from all pairs, no floor;
    - "madpo_text" (Section 2.5 of the MADPO paper): raw h, fixed M_0 = 0 and sigma = 1, beta from all pairs, no
      floor. The momentum of its Section 5.1 has no meaning under this reading.

    Without a floor beta can become negative, and the loss then pushes pairs apart the wrong way. The defaults are
    the beta-DPO paper's formula (beta h, filter first) with the official floor and bias-corrected averages.
    """

    kind: Literal["beta_dpo"] = "beta_dpo"
    paper = published("2407.08639")
    adapt_beta: bool = True
    """beta-batch on or off."""
    batch_scale: float = Field(default=0.6, ge=0)
    """The paper's alpha, MADPO's m: how strongly beta follows the batch. 10 times weaker on "beta" than on "raw"
    at beta = 0.1."""
    filter: bool = True
    """beta-guided filtering on or off."""
    keep: float = Field(default=0.8, gt=0, le=1)
    """rho of the paper, p of MADPO: share of the batch that is kept."""
    margin_scale: Literal["raw", "beta"] = "beta"
    """M: "raw" is h in nats (official code), "beta" is beta h (both papers' definition of the reward margin)."""
    center: Literal["ema", "fixed"] = "ema"
    """"ema": M_0 and sigma move. "fixed": they stay at initial_mean and initial_std."""
    order: Literal["filter-first", "beta-first"] = "filter-first"
    """Whether beta is taken from the kept pairs or from all of them."""
    floor: float | None = Field(default=1e-3, gt=0)
    """Least beta; None has none."""

    @classmethod
    def preset(cls, name: str, **overrides: object) -> BetaDPO:
        """A named version: "official", "madpo_notebook" or "madpo_text", with some fields changed."""
        return cls.model_validate({"preset": name, **overrides})

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        # Expanded before validation: a preset and the same fields written out are the same configuration.
        if not isinstance(data, Mapping) or "preset" not in data:
            return data
        name = data["preset"]
        if name not in PRESETS:
            raise ConfigError(f"preset is {name!r}, but must be one of {', '.join(map(repr, PRESETS))}")
        return {**PRESETS[name], **{key: value for key, value in data.items() if key != "preset"}}

    def statistic(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        """M per pair, detached."""
        margin = inputs.log_ratio_margin.detach()
        return margin if self.margin_scale == "raw" else self.beta * margin

    def observe(self, statistic: Float[Tensor, " batch"], state: LossState, *, training: bool = True) -> LossState:
        """Moves M_0 and sigma, draws the kept pairs and fixes beta for the batch.

        In evaluation nothing moves, every pair is kept, and beta follows the evaluated batch around the M_0 of
        training.
        """
        values, state, center, spread = self.followed(statistic, state, training=training)
        if self.center == "fixed":
            center, spread = self.initial_mean, max(self.initial_std, self.std_floor)
        kept = torch.ones(len(values), dtype=torch.bool)
        if self.filter and training:
            scores = -0.5 * ((values - center) / spread).square()
            # 1e-9 undoes products such as 0.29 * 100 = 28.999999999999996.
            kept = gumbel_top_k(scores, max(1, math.floor(self.keep * len(values) + 1e-9)), state)
        beta = self.beta
        if self.adapt_beta:
            used = values[kept] if self.order == "filter-first" else values
            beta *= 1 + self.batch_scale * (float(used.mean()) - center)
        if self.floor is not None:
            beta = max(beta, self.floor)
        batch = {"beta": torch.tensor(beta, dtype=torch.float64), "kept": kept}
        return LossState(state.tensors, batch)

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        state = self.ready(inputs, state)
        margin = inputs.log_ratio_margin
        beta = state.batch["beta"].to(margin.dtype).to(margin.device)
        kept = rows_of(state, "kept", margin)
        metrics = {"beta": beta, "filter/kept": kept.to(margin.dtype)}
        return LossOutput(-F.logsigmoid(beta * margin), metrics, kept, state.settled())


_FIELDS = ("margin_scale", "center", "order", "floor", "bias_correction", "initial_std")
PRESETS: dict[str, dict[str, object]] = {
    "official": dict(zip(_FIELDS, ("raw", "ema", "filter-first", 1e-3, False, 0.0), strict=True)),
    "madpo_notebook": dict(zip(_FIELDS, ("beta", "ema", "beta-first", None, False, 1.0), strict=True)),
    "madpo_text": dict(zip(_FIELDS, ("raw", "fixed", "beta-first", None, False, 1.0), strict=True)),
}


class AlphaDPO(RunningLoss):
    """alpha-DPO (Wu et al., arXiv 2410.10148): SimPO whose target margin follows the standardised log-ratio margin.

    p is the policy's margin and g the log-ratio margin, both means per token, z = (g - mean)/spread by the moving
    averages; the offset is a constant to the gradient. "code" (official repository):
    L = -log sigma(beta (p - gamma_beta_ratio - alpha z)). "paper": L = -log sigma(beta p - gamma - alpha z), with
    gamma = beta * gamma_beta_ratio, so that alpha acts beta times more weakly. alpha = 0 is SimPO. Unlike SimPO it
    needs the reference.
    """

    kind: Literal["alpha_dpo"] = "alpha_dpo"
    paper = published("2410.10148")
    beta: float = Field(default=10.0, gt=0)
    """Scale of the per-token margin; larger sharpens the loss (released settings: 2.5 and 10)."""
    gamma_beta_ratio: float = 0.4
    """Target margin, nats per token; larger asks for a wider gap."""
    alpha: float = Field(default=0.2, ge=0)
    """How far the target follows the pair; 0 is SimPO."""
    scale: Literal["code", "paper"] = "code"
    """Whether beta multiplies alpha z ("code") or not ("paper")."""

    @classmethod
    def official(cls, **overrides: object) -> AlphaDPO:
        """The official repository's averages: from 0 and 0, without correction (early z are some 10 times larger)."""
        return cls.model_validate({"bias_correction": False, "initial_std": 0.0, **overrides})

    def statistic(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        """g per pair, detached."""
        return inputs.log_ratio_margin_per_token.detach()

    def implicit_margin(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        """Beta times the mean log-prob per token, chosen minus rejected: only the target depends on the reference."""
        return self.beta * inputs.policy_margin_per_token

    def observe(self, statistic: Float[Tensor, " batch"], state: LossState, *, training: bool = True) -> LossState:
        """Moves the averages and standardises the batch; in evaluation they stay as training left them."""
        values, state, mean, spread = self.followed(statistic, state, training=training)
        return LossState(state.tensors, {"z": (values - mean) / spread})

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        state = self.ready(inputs, state)
        margin = inputs.policy_margin_per_token
        z = rows_of(state, "z", margin)
        factor = self.alpha * (self.beta if self.scale == "code" else 1.0)
        logits = self.beta * margin - self.beta * self.gamma_beta_ratio - factor * z
        return LossOutput(-F.logsigmoid(logits), {"z/mean": z, "z/square": z.square()}, None, state.settled())


class REDPO(StatefulLoss):
    """RE-DPO (Cao et al., arXiv 2509.24159): DPO that infers for each label how likely it is to be right.

    A label is right with probability eta, the reliability of the annotator. With z = beta h:

    - E-step (Eq. 4): w = eta sigma(z) / (eta sigma(z) + (1 - eta) sigma(-z)) = sigma(z + logit eta), a constant to the
      gradient;
    - M-step (Eq. 5): L = -w log sigma(z) - (1 - w) log sigma(-z);
    - reliability (Eq. 7): eta moves to (1 - alpha) eta + alpha mean w, after the batch.

    DPO's sigma(z) is the probability that Eq. 2 makes of its loss. Near the reference w is eta, so that a step is that
    of DPO with label smoothing 1 - eta; later w falls below 1/2 where z < -logit eta, and the pair is learned the
    other way round. All labels have one annotator, as in the paper's main results. Summed log-probs.
    """

    kind: Literal["re_dpo"] = "re_dpo"
    paper = published("2509.24159")
    reliability: float = Field(default=0.9, gt=0, lt=1)
    """eta before the first batch: share of labels that are right. 1/2 learns nothing from a label at the reference."""
    momentum: float = Field(default=0.9, ge=0, le=1)
    """Share of the old eta that is kept, 1 - alpha of the paper (0.1); 1 keeps eta where it starts."""

    def init_state(self, seed: int) -> LossState:
        """eta at its start, no batch seen. Nothing is drawn."""
        eta = torch.tensor(self.reliability, dtype=torch.float64)
        return LossState({"reliability": eta, "batches": torch.tensor(0, dtype=torch.int64)})

    def statistic(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        """z per pair, detached."""
        return self.beta * inputs.log_ratio_margin.detach()

    def observe(self, statistic: Float[Tensor, " batch"], state: LossState, *, training: bool = True) -> LossState:
        """Fixes w for the batch, as log-odds, and then moves eta; in evaluation eta stays."""
        eta = state.tensors["reliability"]
        target = batch_values(statistic) + torch.logit(eta)
        if training:
            eta = self.momentum * eta + (1 - self.momentum) * torch.sigmoid(target).mean()
            # An eta of exactly 0 or 1, which rounding can reach, would never move again.
            state = state.updated(reliability=eta.clamp(1e-9, 1 - 1e-9), batches=state.tensors["batches"] + 1)
        return LossState(state.tensors, {"target": target})

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        state = self.ready(inputs, state)
        logits = self.beta * inputs.log_ratio_margin
        target = rows_of(state, "target", logits)
        reliability = state.tensors["reliability"].to(logits.dtype).to(logits.device)
        metrics = {"confidence/mean": torch.sigmoid(target), "reliability": reliability}
        return LossOutput(soft_logistic(logits, target), metrics, None, state.settled())


def batch_values(statistic: Tensor) -> Float[Tensor, " batch"]:
    """The gathered numbers on the CPU in float64, refused if one is NaN or infinite: it would stay in the averages."""
    values = statistic.detach().cpu().double()  # in this order: not every device knows float64
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise DivergedError(
            f"the policy's margin in row {row} of the batch is {float(values[row])}: the training has diverged, or a "
            "reference log-prob is not a number; check the reference columns or lower the learning rate"
        )
    return values


def gumbel_top_k(log_scores: Float[Tensor, " batch"], count: int, state: LossState) -> Tensor:
    """A draw of ``count`` rows without replacement, with probability proportional to exp(log_scores).

    Equals drawing one row after the other (``torch.multinomial``), but stays exact where scores underflow. The
    noise comes from the state's seed and the number of the batch: a pure function, the same on every rank.
    """
    seed, batch = int(state.tensors["seed"]), int(state.tensors["batches"])
    noise = torch.from_numpy(rng(seed, "filter", batch).gumbel(size=len(log_scores)))
    kept = torch.zeros(len(log_scores), dtype=torch.bool)
    kept[(log_scores + noise).topk(count).indices] = True
    return kept


def rows_of(state: LossState, name: str, like: Tensor) -> Tensor:
    """The prepared per-pair values of this call, on the inputs' device; their number must be the inputs'."""
    values = state.batch[name]
    if values.shape != like.shape:
        raise ValueError(
            f"the observed batch holds {name!r} of {len(values)} pairs, but this call has {len(like)}: "
            "pass state.rows(start, stop) with this call's part of the batch"
        )
    return (values.to(like.dtype) if values.is_floating_point() else values).to(like.device)
