"""Settings of ``madpo reward``, ``score``, ``evaluate`` and ``trim-vocab``. Imports no torch."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from madpo.core.config import Frozen, Seed, added, changed
from madpo.core.layout import Reading
from madpo.core.options import Cli
from madpo.models.hyperparameters import LoRA, Optimisation, Pooling, Temperature, Truncation

PROBE = "probe"
"""The judge that is fitted to a part of the pairs."""
NONE_IF_FALSE = BeforeValidator(lambda value: None if value is False else value)
"""For TOML, which has no word for nothing."""


class AdapterOptimisation(Optimisation):
    """AdamW and its schedule, with defaults for an adapter."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Largest learning rate of the schedule."""
    epochs: Annotated[float, Cli(also=("num_train_epochs",))] = Field(default=1.0, gt=0)
    """Passes over the pairs at most."""
    batch_size: Annotated[int, Cli(also=("train_batch_size", "per_device_train_batch_size"), bare=("batch_size",))] = (
        Field(default=16, ge=1)
    )
    """Pairs per optimiser step; micro_batch_size splits them."""


class PairReading(Reading):
    """How pairs become token ids, and which of them are held out."""

    eval_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the pairs held out (whole prompts at a time) where no evaluation data are given."""
    truncation: Truncation = "drop"
    """What happens to a pair of more than max_length tokens: drop it, cut its completions, or refuse it."""


class LimitedPairs(PairReading):
    """The same with a limit that is no argument of a trainer."""

    max_length: int | None = Field(default=None, ge=2)
    """Tokens of prompt and completion; None is no limit."""


class JudgedPairs(LimitedPairs):
    """Pairs on which a study compares policies: by held-out pairs, and by a judge of responses to their prompts."""

    eval_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the pairs held out (whole prompts at a time) where no evaluation data are given."""
    judge: str | None = None
    """What scores the policies' responses to held-out prompts: a folder that ``madpo reward`` wrote, a sequence
    classifier with one output (folder or hub id), or ``probe``, which is fitted to pairs that no policy sees. None
    compares by held-out pairs only."""
    judge_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the pairs that a judge ``probe`` is fitted to."""

    @property
    def judge_part(self) -> float:
        """Share of the pairs that no policy sees, since a judge is fitted to them."""
        return self.judge_share if self.judge == PROBE else 0.0


class Training(PairReading):
    """Model and data of every training on a user's pairs."""

    model: Annotated[str, Cli(also=("model_name_or_path",))]
    """Packaged name, folder or hub id of the model that the training starts from."""
    date: datetime | None = added(None)
    """The date that a chat template prints; None is that of the training's first start."""
    strict: bool = Field(default=False, exclude=True)
    """Treat what ``madpo check`` would warn of as an error."""


class Decoding(Frozen):
    """How the tokens of a response are drawn."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens of a response at most."""
    temperature: float = Field(default=1.0, ge=0)
    """0 takes the most likely token; larger draws more freely. The KL is the policy's own only at 1, with top_p 1 and
    no top_k."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most probable tokens that have this share of the probability."""
    top_k: int | None = added(None, ge=1)
    """At most this many of the most likely tokens can be drawn; None is all of them."""


class Drawing(Decoding):
    """How responses are drawn."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of a response at most."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampling: the same prompts get the same responses."""


class Sampling(Drawing):
    """How responses are drawn and scored in batches."""

    batch_size: int = Field(default=32, ge=1)
    """Responses generated at once."""
    score_batch_size: int = Field(default=16, ge=1)
    """Sequences per forward pass for rewards and KL."""


class RewardSettings(Training, LimitedPairs):
    """How a reward model is trained."""

    optimisation: Annotated[AdapterOptimisation, Cli(short=True)] = AdapterOptimisation()
    lora: LoRA = LoRA()
    eval_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the pairs held out (whole prompts at a time) where no evaluation data are given."""
    stopping_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the held-out pairs that decides when to stop; only the others are reported."""
    eval_every: int | None = Field(default=None, ge=1)
    """Optimiser steps between two evaluations on them; None is 10 evaluations at most."""
    patience: int = Field(default=3, ge=1)
    """Evaluations without improvement before the training stops."""
    pooling: Pooling = "last"
    """Where the reward is read: at the last token, as sequence classifiers of the hub do, or as the mean over the
    completion, which learns from fewer pairs."""
    report_to: tuple[str, ...] = Field(default=(), exclude=True)
    """Trackers that are installed, such as tensorboard, trackio or wandb."""
    seed: Seed = 0
    """Seed of split and training."""


class ScoreSettings(Reading):
    """Where the scores come from: exactly one of ``reward_model``, ``score_columns``, ``probe`` and ``folds``."""

    reward_model: str | None = None
    """A folder that ``madpo reward`` wrote, the folder ``probe`` of a scoring with ``probe``, or a sequence classifier
    with one output (folder or hub id)."""
    score_columns: tuple[str, str] | None = None
    """Columns with the scores of chosen and rejected."""
    folds: int | None = Field(default=None, ge=2)
    """Reward models to train, each of which scores the part of the pairs that it did not see. With ``probe``: parts, 5
    by default."""
    probe: str | None = added(None)
    """A causal language model (packaged name, folder or hub id) whose hidden states give the margins, out of fold and
    without a training; best the model that will be trained."""
    probe_seed: int = added(0, ge=0)
    """Seed of the division into parts."""
    reward: Annotated[RewardSettings | None, Cli(short=True)] = None
    """How those are trained."""
    margin_temperature: float | None = Field(default=None, gt=0)
    """For ``score_columns``: the difference of the scores is divided by it; None fits it to the labels."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """Format of the scored file."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per forward pass; it decides the padding, and so the last digits."""
    strict: bool = Field(default=False, exclude=True)
    """Treat what ``madpo check`` would warn of as an error."""

    @model_validator(mode="after")
    def _check(self) -> ScoreSettings:
        folds = self.folds if self.probe is None else None
        given = [self.reward_model, self.score_columns, self.probe, folds]
        if sum(source is not None for source in given) != 1:
            raise ValueError("give one of reward_model, score_columns, probe and folds; probe MODEL needs no training")
        if folds is None and self.reward is not None:
            raise ValueError("only folds trains reward models; leave out the model and settings of that training")
        if folds is not None and self.reward is None:
            raise ValueError("folds trains reward models, so it needs the base model (--model_name_or_path)")
        if self.probe is None and "probe_seed" in changed(self):
            raise ValueError("probe_seed goes with probe; the folds of reward models have seed")
        if self.reward is not None and (self.reward.columns.given or self.reward.layout):
            raise ValueError("reward.columns and reward.layout have no effect; give columns and layout")
        if self.margin_temperature is not None and self.score_columns is None:
            raise ValueError("margin_temperature goes with score_columns; the losses take it for other margins")
        return self


class Answering(Frozen):
    """How often every prompt is answered."""

    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses of each policy to a prompt, which share the prompt's computation."""
    temperatures: tuple[Temperature, ...] = added(())
    """Further temperatures at which every prompt is answered with the same random numbers, for rewards and win rates,
    such as [0.25, 0.5, 0.75]; the KL is measured only at ``temperature``."""


class EvaluateSettings(Answering, Sampling, Reading):
    """How policy and reference are compared."""

    reward_model: Annotated[str, Cli(also=("reward",))]
    """A folder that ``madpo reward`` wrote, or a sequence classifier with one output (folder or hub id)."""
    reference: str | None = None
    """Model to compare with; None is the one that the policy started from, where its folder says so."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Different prompts at most, the first ones; None is all of them."""


class StudyDecoding(Decoding):
    """How responses are sampled in a study.

    The author samples with Gemma 3's generation settings, top-k 64 and top-p 0.95.
    """

    batch_size: int = Field(default=32, ge=1)
    """Responses generated at once; changes only the speed."""


class EvaluationSettings(Answering):
    """Sampling for the measurement of policies; a row of a study may have its own ``samples_per_prompt``."""

    prompts: int | None = Field(default=None, ge=1)
    """Held-out prompts at most, the first ones; None is all of them."""


class PairCorpus(JudgedPairs):
    """Pairs that others have made and ordered, such as people, in the place of a corpus of which a study makes its own.

    Prompts and held-out pairs are theirs as well, and a reward model judges.
    """

    kind: Literal["pairs"] = "pairs"
    data: str
    """File, folder or data set of the hub, as every command reads them ("owner/name:split")."""
    eval_data: Annotated[str | None, NONE_IF_FALSE] = None
    """Held-out pairs; None, or false in TOML, holds out ``eval_share`` of the prompts of ``data``."""
    train: int = Field(ge=1)
    """Training pairs at most, the first ones; estimates of time assume this number."""
    heldout: int = Field(ge=1)
    """Held-out pairs at most, in the same way."""
    judge: str
    max_length: int | None = Field(default=512, ge=2)


class TrimSettings(Reading):
    """What is kept of a vocabulary, and what it is measured on."""

    size: int | None = Field(default=None, ge=1)
    """Entries to keep at most; None keeps all that the corpus uses."""
    drop_reserved: bool = False
    """Leave out added tokens that are called unused or reserved and do not occur in the corpus."""
    held_out_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of the corpus's different texts that is held out and measured on, where no other text is given."""
    eval_texts: int = Field(default=128, ge=1)
    """Held-out texts to measure on at most."""
    eval_characters: int = Field(default=1000, ge=1)
    """Characters of each at most, up to a white space."""
    batch_size: int = Field(default=8, ge=1)
    """Texts per forward pass."""


class SimulationSettings(Frozen):
    """Simulated worlds, and where methods are compared in them."""

    worlds: int = Field(default=12, ge=3)
    """Draws of world, labels and training order, of every setting."""
    kl: float = Field(default=1.0, gt=0)
    """KL to the reference, in nats, at which methods are compared."""
    seed: int = 0
    """Seed of worlds and trainings."""


class VerifyAutoSettings(SimulationSettings):
    """What ``madpo verify-auto`` simulates."""

    whole: bool = False
    """The whole grid (42 cells) in place of the reduced one (15 cells)."""


class DemoSettings(SimulationSettings):
    """What ``madpo demo`` simulates."""

    pairs: int = Field(default=600, ge=50)
    """Training pairs in every world."""
    reward_sd: float = Field(default=1.5, gt=0)
    """Standard deviation of the true reward in log-odds: less makes labels noisier."""


class ChatSettings(Drawing):
    """How a policy and its reference are talked to."""

    reference: str | None = None
    """Model to compare with; None is the one that the policy started from, where its folder says so."""
    system: str | None = None
    """System prompt of both conversations."""
    temperature: float = Field(default=0.7, ge=0)
    """0 takes the most likely token; larger draws more freely."""
    batch_size: ClassVar[int] = 1
