"""What every preference loss takes and gives.

A method is a frozen configuration that can be called: hyperparameters in, a pure function of log-probabilities
out. It returns one value per pair, and the trainer owns the mean, because weights, filters and parity tests all
need the values before they are averaged. Nothing here knows about models, files or trainers.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import Field

from madpo.core.config import Frozen
from madpo.core.lazy import F, torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class Paper(NamedTuple):
    """Where a loss was published: for the cards of models that were trained with it."""

    arxiv: str
    title: str
    authors: str
    """As in BibTeX: "Last, First and others"."""
    year: int

    def bibtex(self) -> str:
        """An entry for a bibliography."""
        entry = {"title": f"{{{self.title}}}", "author": self.authors, "year": self.year}
        entry |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        lines = "".join(f"    {name:<13} = {{{value}}},\n" for name, value in entry.items())
        return f"@misc{{{self.authors.split(',')[0].replace(' ', '').lower()}{self.year},\n{lines}}}"


_PAPERS = tomllib.loads((files("madpo.losses") / "papers.toml").read_text(encoding="utf-8"))


def published(arxiv: str) -> Paper:
    """The paper with this number in ``papers.toml``."""
    return Paper(arxiv, **_PAPERS[arxiv])


class LossConfig(Frozen):
    """Base of every loss: frozen, no unknown keys, no NaN or infinite hyperparameters.

    A loss that keeps running statistics sets ``stateful`` and fills in the three methods ``init_state``,
    ``statistic`` and ``observe``; for every other loss they do nothing, so a trainer may call them always.
    One batch then is::

        gathered = all_gather(loss.statistic(inputs))      # every pair of the batch, the same order on every rank
        ready = loss.observe(gathered, state)              # moves the statistics and fixes beta, filter, scale
        output = loss(inputs, ready.rows(start, stop))     # once per micro-batch, with its rows of the batch
        state = output.state                               # after the last one; save its state_dict()

    "The batch" is the trainer's choice: one micro-batch over all ranks, or every micro-batch of an optimiser
    step, which makes the result independent of how the step is split. In evaluation the trainer calls
    ``observe(gathered, state, training=False)``: nothing moves and no pair is filtered out.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Optional inputs that the loss reads; the trainer refuses a batch that lacks one."""
    needs_reference: ClassVar[bool] = True
    """False: the reference log-probs are never read, and zeros may take their place."""
    stateful: ClassVar[bool] = False
    """True: the trainer keeps a :class:`LossState` for it."""
    paper: ClassVar[Paper | None] = None
    """What a model card cites."""

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        """Loss per pair. Pure: equal inputs and state give equal outputs."""
        raise NotImplementedError(f"{type(self).__name__} does not say how the loss is computed")

    def implicit_margin(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        """Reward of the chosen minus that of the rejected, as this loss reads a policy: log-odds; above 0 is right.

        Beta times the log-ratio margin, of summed log-probs or per token as the loss takes them.
        """
        margin: Float[Tensor, " pairs"] = getattr(self, "beta", 1.0) * inputs.log_ratio_margin
        return margin

    def init_state(self, seed: int) -> LossState:
        """The state before the first batch; ``seed`` fixes every draw that the loss will make."""
        return LossState({})

    def statistic(self, inputs: LossInputs) -> Float[Tensor, " pairs"]:
        """What ``observe`` wants of every pair of the batch, detached: nats, one number per pair."""
        return inputs.log_ratio_margin.detach()

    def observe(self, statistic: Float[Tensor, " batch"], state: LossState, *, training: bool = True) -> LossState:
        """The state after this batch, holding what ``__call__`` needs for its rows. Pure."""
        return state


PreferenceLoss = LossConfig
"""Another name of it, for annotations."""


class BetaLoss(LossConfig):
    """A loss of beta times the log-ratio margin."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference; larger keeps the policy closer to it."""


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
        weight: the user's own factor of any loss, which the trainer applies with ``pair_weights=True``.
        finite_columns: the columns of the data are known to be finite, as a collator has checked them on the host.
            Losses then need not look, and an accelerator need not wait.
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
    finite_columns: bool = False

    def __post_init__(self) -> None:
        shape = self.policy_chosen_logps.shape
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, torch.Tensor):
                continue
            if value.shape != shape:
                raise ValueError(f"{entry.name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
            if value.is_floating_point():
                object.__setattr__(self, entry.name, widen(value))

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
        """h_theta of the paper: log-ratio of the chosen minus that of the rejected, nats. No beta inside."""
        return self.chosen_log_ratio - self.rejected_log_ratio

    @property
    def policy_margin_per_token(self) -> Float[Tensor, " pairs"]:
        """Mean log pi per token of the chosen minus that of the rejected, nats per token; no reference."""
        chosen = per_token(self.policy_chosen_logps, self.chosen_lengths)
        return chosen - per_token(self.policy_rejected_logps, self.rejected_lengths)

    @property
    def log_ratio_margin_per_token(self) -> Float[Tensor, " pairs"]:
        """Mean log-ratio per token of the chosen minus that of the rejected, nats per token."""
        chosen = per_token(self.chosen_log_ratio, self.chosen_lengths)
        return chosen - per_token(self.rejected_log_ratio, self.rejected_lengths)

    def required(self, name: str) -> Tensor:
        """The optional input ``name``, or a ValueError that names the column."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss needs the column {name!r}, and the batch has none")
        return value

    def replace(self, **changes: Tensor | None) -> LossInputs:
        """A copy with some tensors exchanged."""
        return replace(self, **changes)  # type: ignore[arg-type]  # None is for the optional columns


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

    Attributes:
        tensors: the statistics, the number of batches seen and the seed of the draws; on the CPU.
        batch: what ``observe`` fixed for the batch at hand: 0-dimensional tensors for all of it, 1-dimensional
            ones with one value per pair. Empty between batches, and never saved.
    """

    tensors: dict[str, Tensor]
    batch: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name, detached, for a checkpoint."""
        return {name: value.detach().clone() for name, value in self.tensors.items()}

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor]) -> LossState:
        """The state that ``state_dict`` described."""
        return cls({name: value.detach().cpu().clone() for name, value in tensors.items()})

    def updated(self, **changes: Tensor) -> LossState:
        """A new state with some tensors exchanged."""
        return LossState({**self.tensors, **changes}, self.batch)

    def rows(self, start: int, stop: int) -> LossState:
        """The same state, for the pairs ``start`` to ``stop`` (exclusive) of the observed batch."""
        cut = {name: value[start:stop] if value.ndim else value for name, value in self.batch.items()}
        return LossState(self.tensors, cut)

    def settled(self) -> LossState:
        """The state between batches: only the statistics."""
        return LossState(self.tensors)


def widen(value: Tensor) -> Tensor:
    """float32 for half-precision tensors, the tensor itself otherwise."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def per_token(logps: Float[Tensor, " pairs"], lengths: Int[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """Sums divided by numbers of tokens; a completion that was cut to nothing counts as one token, not as NaN."""
    return logps / lengths.clamp(min=1)


def soft_logistic(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of Bern(sigma(logits)) under Bern(sigma(target)), nats; least where the two are equal."""
    return -torch.sigmoid(target) * F.logsigmoid(logits) - torch.sigmoid(-target) * F.logsigmoid(-logits)
