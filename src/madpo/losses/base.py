"""What every preference loss takes and gives.

A method is a frozen configuration that can be called: hyperparameters in, a pure function of log-probabilities
out. It returns one value per pair, and the trainer owns the mean, because weights, filters and parity tests all
need the values before they are averaged. Nothing here knows about models, files or trainers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict
from torch import Tensor


class LossConfig(BaseModel):
    """Base of every loss: frozen, no unknown keys, no NaN or infinite hyperparameters."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    needs: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True)
class LossInputs:
    """One batch of preference pairs.

    Log-probs are sums over completion tokens, in nats. Half-precision inputs are widened to float32 on
    construction (a sum near -300 nats has a spacing of 2 in bfloat16, which would destroy the log-ratios);
    float64 stays float64.

    Attributes:
        policy_chosen_logps, policy_rejected_logps: log pi(y|x) under the policy; differentiated.
        ref_chosen_logps, ref_rejected_logps: the same under the frozen reference.
        chosen_lengths, rejected_lengths: numbers of scored completion tokens.
        reward_margin: r(chosen) - r(rejected) under a learned reward model, log-odds.
        chosen_score, rejected_score: scores of an external judge or reward model, in its own unit.
        chosen_log_sum_sq, rejected_log_sum_sq: mean over completion tokens of log sum_v pi(v)^2 (WPO).
        weight: the user's own multiplier of any loss; 1 leaves the pair as it is.
    """

    policy_chosen_logps: Float[Tensor, " pairs"]
    policy_rejected_logps: Float[Tensor, " pairs"]
    ref_chosen_logps: Float[Tensor, " pairs"]
    ref_rejected_logps: Float[Tensor, " pairs"]
    chosen_lengths: Int[Tensor, " pairs"]
    rejected_lengths: Int[Tensor, " pairs"]
    reward_margin: Float[Tensor, " pairs"] | None = None
    chosen_score: Float[Tensor, " pairs"] | None = None
    rejected_score: Float[Tensor, " pairs"] | None = None
    chosen_log_sum_sq: Float[Tensor, " pairs"] | None = None
    rejected_log_sum_sq: Float[Tensor, " pairs"] | None = None
    weight: Float[Tensor, " pairs"] | None = None

    def __post_init__(self) -> None:
        shape = self.policy_chosen_logps.shape
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if value.shape != shape:
                raise ValueError(f"{field.name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
            if value.is_floating_point():
                object.__setattr__(self, field.name, widen(value))

    @property
    def chosen_log_ratio(self) -> Float[Tensor, " pairs"]:
        """log pi - log pi_ref of the chosen completion, nats."""
        return self.policy_chosen_logps - self.ref_chosen_logps

    @property
    def rejected_log_ratio(self) -> Float[Tensor, " pairs"]:
        """log pi - log pi_ref of the rejected completion, nats."""
        return self.policy_rejected_logps - self.ref_rejected_logps

    @property
    def log_ratio_margin(self) -> Float[Tensor, " pairs"]:
        """h_theta of the paper: log-ratio of the chosen less that of the rejected, nats. No beta inside."""
        return self.chosen_log_ratio - self.rejected_log_ratio

    def required(self, name: str) -> Tensor:
        """The optional input ``name``, or an error that names the column."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss needs the column {name!r}, and the batch has none")
        return value

    def replace(self, **changes: Tensor | None) -> LossInputs:
        """A copy with some tensors exchanged."""
        return replace(self, **changes)


class LossOutput(NamedTuple):
    """What a loss returns.

    Attributes:
        per_pair: one loss value per pair, not reduced.
        metrics: detached tensors for the log: scalars, or one value per pair, whose mean is logged.
        kept: pairs that take part (beta-DPO's filter); None keeps all. The trainer divides by the global count.
        state: the state after this batch, for losses that keep statistics; the trainer stores it.
    """

    per_pair: Float[Tensor, " pairs"]
    metrics: dict[str, Tensor]
    kept: Bool[Tensor, " pairs"] | None = None
    state: LossState | None = None


@dataclass(frozen=True)
class LossState:
    """Running statistics of a loss, as tensors that the trainer owns, saves and restores.

    A loss never changes a state in place: it returns the next one in ``LossOutput.state``.
    """

    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name, detached, for a checkpoint."""
        return {name: value.detach().clone() for name, value in self.tensors.items()}

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor]) -> LossState:
        """The state that ``state_dict`` described."""
        return cls({name: value.clone() for name, value in tensors.items()})

    def updated(self, **changes: Tensor) -> LossState:
        """A new state with some tensors exchanged."""
        return LossState({**self.tensors, **changes})


@runtime_checkable
class PreferenceLoss(Protocol):
    """A frozen configuration that can be called. ``needs`` names the optional inputs that it reads."""

    needs: ClassVar[frozenset[str]]

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        """Loss per pair. Pure: equal inputs and state give equal outputs."""
        ...


def widen(value: Tensor) -> Tensor:
    """float32 for half-precision tensors, the tensor itself otherwise."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
