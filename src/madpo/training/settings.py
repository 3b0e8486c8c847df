"""Configurations of trainings. No torch, so that a mistake in one is reported before a library is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from madpo.core.config import Frozen, added
from madpo.models.hyperparameters import AdapterTraining, LoRA, Optimisation, Pooling

Algorithm = Literal["rloo", "grpo"]


class RewardTraining(Frozen):
    """How a reward model of a study is trained, but for its optimisation."""

    lora: LoRA = LoRA()
    eval_every: int = Field(default=20, ge=1)
    """Optimiser steps between two evaluations on the held-out pairs."""
    patience: int = Field(default=3, ge=1)
    """Evaluations without improvement before the training stops."""
    stopping_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the held-out pairs that decides when to stop. Below 1, only the others give the reported accuracy;
    at 1 (the paper) the same pairs do both, which flatters the model slightly."""
    pooling: Pooling = added("last")
    """Where the reward is read: at the last token, or as the mean over the response, which learns from fewer pairs."""
    folds: int | None = added(None, ge=2, le=1000)
    """Parts of the training pairs, each of which one model does not see, for margins out of fold; None is no
    division."""


class RewardModelStage(RewardTraining):
    """A Bradley-Terry reward model on the labelled pairs (Eq. 2), with early stopping on held-out pairs."""

    model: str
    optimisation: Optimisation
    seed: int = 0
    fold: int | None = added(None, ge=0)
    """The part that this model is not trained on."""


class PolicyTraining(AdapterTraining):
    """What the stages of all policies have: each is a LoRA adapter on the reference."""

    method: str
    """Name in tables and figures."""
    seed: int = Field(default=0, ge=0)


class OnlineSettings(Frozen):
    """Policy optimisation against a reward model."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the KL penalty, in rewards (log-odds) per nat; larger keeps the policy closer to the reference. RLOO
    subtracts beta * (log pi - log ref) of the whole response from its reward, so its optimum is ref * exp(r / beta), as
    for DPO at the same beta. GRPO adds beta * k3 to the loss, and its scaled advantages make another beta of it."""
    generations: int = Field(default=4, ge=2)
    """Responses per prompt and update, which are each other's baseline."""
    optimisation: Optimisation | None = None
    """``batch_size`` counts responses, not prompts; None is that of the other policies."""
    clip: float = Field(default=0.2, gt=0)
    """The probability ratio counts within 1 - clip and 1 + clip."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Only GRPO: advantages are divided by the standard deviation within the group (as published), within the batch,
    or not at all."""


class AutoSettings(Frozen):
    """``auto`` as a row: the average of DPO's policy and of one whose target mixes labels and margins."""

    beta: float = Field(default=0.1, gt=0)
    label_share: float | None = Field(default=None, ge=0, le=1)
    """Weight of the label in the second training's target. None decides it by the labels of held-out pairs; 1 is the
    control: two DPO policies of different seeds, averaged, which read no margins."""


class OnlineStage(PolicyTraining):
    """A policy that is trained on its own responses."""

    algorithm: Algorithm
    settings: OnlineSettings
    max_new_tokens: int = Field(default=48, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = added(None, ge=1)
