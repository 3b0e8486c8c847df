"""Worlds with a known true reward, and log-linear policies trained in them by the losses of this package.

A policy is pi(y | x) proportional to ref(y | x) exp(theta . f(x, y)), with 150 features f of a prompt x and a response
y. The true reward is quadratic in the response and depends on the prompt, so no theta expresses it. Labels follow
Bradley-Terry. Reward models are linear in features of their own. The true reward and the KL of a policy are exact sums
over candidate responses to new prompts, so methods can be compared at equal KL without sampling noise.

Everything is computed for many worlds, methods and betas at once: parameters have the shape (worlds, features,
policies). Pure torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from madpo.core.config import Frozen
from madpo.core.seeding import derived_seed, rng
from madpo.losses.base import LossConfig, LossInputs
from madpo.losses.direct import DPO

PROMPT, RESPONSE, FEATURES = 4, 10, 150
PROMPTS, CANDIDATES = 50, 256
RELATIVE_BETAS = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 2.0, 4.0, 8.0)
"""beta / standard deviation of the reward."""
FOLDS = 5
BUDGET = 1.5
"""Sum of the learning rates of a policy's training: what Adam moves a parameter at most."""

Knowledge = Literal["good", "same", "poor"]
KNOWLEDGE: tuple[Knowledge, ...] = ("good", "same", "poor")
"""What a reward model sees: the terms of the true reward, the policy's features, or half of the response."""


class Setting(Frozen):
    """A kind of world."""

    pairs: int = Field(default=1000, ge=10)
    """For training; a fifth of the number, and 40 at least, decides in addition when a reward model stops."""
    reward_sd: float = Field(default=1.5, gt=0)
    """Standard deviation of the true reward, log-odds: larger makes labels less noisy."""
    tier: Literal["high", "low"] = "high"
    """high: two samples of the reference. low: the better of two against a worse text of another style."""
    flips: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the labels that are turned around in addition."""


@dataclass(frozen=True)
class Pairs:
    """Labelled pairs, chosen minus rejected; the first dimension is the world.

    Attributes:
        policy: differences of the policy's features.
        margin: true reward margins, log-odds.
        known: differences of each reward model's features.
    """

    policy: Float[Tensor, "worlds pairs features"]
    margin: Float[Tensor, "worlds pairs"]
    known: dict[Knowledge, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Worlds:
    """Several draws of one setting.

    Attributes:
        features, reward: of the candidate responses to new prompts; the reward in log-odds.
    """

    train: Pairs
    heldout: Pairs
    features: Float[Tensor, "worlds prompts candidates features"]
    reward: Float[Tensor, "worlds prompts candidates"]


class _World:
    """One draw: its reward, its features, and its generator."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.generator = torch.Generator().manual_seed(derived_seed(seed, "simulation", "world"))
        normal, waves = self.normal, FEATURES - RESPONSE
        self.frequencies = 0.45 * normal(PROMPT + RESPONSE, waves)
        self.phases = 2 * math.pi * self.uniform(waves)
        self.amplitudes = math.sqrt(2) * torch.arange(1.0, waves + 1) ** -0.25
        self.linear, self.first, self.second = normal(3, RESPONSE) / math.sqrt(RESPONSE)
        self.interaction = normal(PROMPT, RESPONSE) / math.sqrt(PROMPT * RESPONSE)
        self.mean, self.scale = torch.zeros(()), torch.ones(())
        drawn = self.reward(normal(20_000, PROMPT), normal(20_000, RESPONSE))
        self.mean, self.scale = drawn.mean(), setting.reward_sd / drawn.std()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def reward(self, x: Tensor, y: Tensor) -> Tensor:
        product = (y @ self.first) * (y @ self.second)
        found = y @ self.linear + 0.5 * product + 0.6 * ((x @ self.interaction) * y).sum(-1)
        standardised: Tensor = (found - self.mean) * self.scale
        return standardised

    def policy_features(self, x: Tensor, y: Tensor) -> Tensor:
        waves = torch.cos(torch.cat([x, y], -1) @ self.frequencies + self.phases)
        return torch.cat([y, self.amplitudes * waves], -1)

    def reward_features(self, x: Tensor, y: Tensor, knowledge: Knowledge) -> Tensor:
        if knowledge == "same":
            return self.policy_features(x, y)
        if knowledge == "poor":
            half = y[..., : RESPONSE // 2]
            return torch.cat([half, half.square() - 1], -1)
        crossed = (x[..., :, None] * y[..., None, :]).flatten(-2)
        product = (y @ self.first) * (y @ self.second)
        return torch.cat([y, y.square() - 1, 0.5 * crossed, product[..., None]], -1)

    def pairs(self, count: int) -> Pairs:
        x, one, two = self.normal(count, PROMPT), self.normal(count, RESPONSE), self.normal(count, RESPONSE)
        if self.setting.tier == "low":
            best = self.reward(x, one) >= self.reward(x, two)
            one = torch.where(best[:, None], one, two)
            up = self.linear / self.linear.norm()
            style = self.normal(RESPONSE)
            style = style - (style @ up) * up
            two = self.normal(count, RESPONSE) - 0.8 * up + 1.5 * style / style.norm()
        margin = self.reward(x, one) - self.reward(x, two)
        prefers = self.uniform(count) < torch.sigmoid(margin)
        prefers = prefers ^ (self.uniform(count) < self.setting.flips)
        sign = torch.where(prefers, 1.0, -1.0)

        def difference(features: Tensor, others: Tensor) -> Tensor:
            return sign[:, None] * (features - others)

        known = {k: difference(self.reward_features(x, one, k), self.reward_features(x, two, k)) for k in KNOWLEDGE}
        policy = difference(self.policy_features(x, one), self.policy_features(x, two))
        return Pairs(policy, sign * margin, known)


def draw(setting: Setting, seeds: Sequence[int]) -> Worlds:
    """One world for every seed; a world does not depend on which others are drawn with it."""
    worlds = [_World(setting, seed) for seed in seeds]
    train = _stacked([world.pairs(setting.pairs) for world in worlds])
    heldout = _stacked([world.pairs(max(40, setting.pairs // 5)) for world in worlds])
    features, reward = [], []
    for world in worlds:
        x = world.normal(PROMPTS, 1, PROMPT).expand(-1, CANDIDATES, -1)
        y = world.normal(PROMPTS, CANDIDATES, RESPONSE)
        features.append(world.policy_features(x, y))
        reward.append(world.reward(x, y))
    return Worlds(train, heldout, torch.stack(features), torch.stack(reward))


def _stacked(drawn: Sequence[Pairs]) -> Pairs:
    known = {k: torch.stack([pairs.known[k] for pairs in drawn]) for k in KNOWLEDGE}
    policy, margin = (torch.stack([getattr(pairs, name) for pairs in drawn]) for name in ("policy", "margin"))
    return Pairs(policy, margin, known)


@dataclass(frozen=True)
class Method:
    """A loss as it is trained in all worlds.

    Attributes:
        losses: one loss for all worlds, or one for each; with beta = 1, since the simulation multiplies by beta.
        margin: reward margins of the training pairs, where the loss reads them.
        kept: 1 for a pair that takes part, 0 for one that does not; None keeps all.
    """

    losses: Sequence[LossConfig]
    margin: Float[Tensor, "worlds pairs"] | None = None
    kept: Float[Tensor, " pairs"] | None = None

    def per_pair(self, scaled: Float[Tensor, "worlds rows betas"], rows: Int[Tensor, " rows"]) -> Tensor:
        """The loss of every row in every world, at every beta; ``scaled`` is beta times the log-ratio margin."""
        margin = None if self.margin is None else self.margin[:, rows, None].expand_as(scaled)
        if len(self.losses) == 1:
            found = self._loss(self.losses[0], scaled, margin)
        else:
            parts = [
                self._loss(loss, scaled[k], None if margin is None else margin[k]) for k, loss in enumerate(self.losses)
            ]
            found = torch.stack(parts)
        return found if self.kept is None else found * self.kept[rows, None]

    @staticmethod
    def _loss(loss: LossConfig, scaled: Tensor, margin: Tensor | None) -> Tensor:
        flat = scaled.reshape(-1)
        zero, one = torch.zeros_like(flat), torch.ones(len(flat), dtype=torch.long)
        inputs = LossInputs(flat, zero, zero, zero, one, one, None if margin is None else margin.reshape(-1))
        return loss(inputs).per_pair.reshape(scaled.shape)


def train(
    features: Float[Tensor, "worlds pairs features"],
    methods: Sequence[Method],
    betas: Sequence[float],
    *,
    seed: int,
    epochs: float = 2,
    budget: float = BUDGET,
    looks: int = 1,
    note: Callable[[Tensor, Tensor], None] | None = None,
) -> list[Float[Tensor, "worlds features methods betas"]]:
    """Train every method at every beta in every world, by mini-batch Adam from theta = 0.

    The learning rate falls along a cosine. All methods see the same batches, so they differ in their losses only.

    Args:
        seed: of the order of the pairs.
        budget: sum of the learning rates.
        looks: how many times theta is kept on the way, evenly spaced.
        note: gets the rows of every batch, and their log-ratio margins (worlds, rows, methods, betas) before the step.

    Returns:
        theta at each look, the last one at the end.
    """
    worlds, pairs, width = features.shape
    size = 8 if pairs <= 300 else 16 if pairs <= 1500 else 32
    steps = max(25, round(epochs * pairs / size))
    order = rng(seed, "simulation", "batches")
    passes = [order.permutation(pairs) for _ in range(-(-steps * size // pairs))]
    batches = torch.as_tensor(np.concatenate(passes)[: steps * size].reshape(steps, size))
    theta = torch.zeros(worlds, width, len(methods) * len(betas), requires_grad=True)
    scale = torch.tensor(betas, dtype=torch.float32)
    adam = torch.optim.Adam([theta], betas=(0.9, 0.95))
    falling = np.cos(np.arange(steps) / steps * math.pi / 2) ** 2
    rates = budget * falling / falling.sum()
    shape = (worlds, -1, len(methods), len(betas))
    at = {math.ceil(steps * (k + 1) / looks) - 1 for k in range(looks)}
    found = []
    for step, rows in enumerate(batches):
        margins = (features[:, rows] @ theta).reshape(shape)
        if note is not None:
            note(rows, margins.detach())
        per_pair = [method.per_pair(scale * margins[:, :, k], rows) for k, method in enumerate(methods)]
        adam.zero_grad()
        torch.stack([values.sum() for values in per_pair]).sum().div(size).backward()  # type: ignore[no-untyped-call]
        adam.param_groups[0]["lr"] = float(rates[step])
        adam.step()
        if step in at:
            found.append(theta.detach().clone().reshape(shape))
    return found


@dataclass(frozen=True)
class Margins:
    """A reward model's margins, in its own unit.

    Attributes:
        inside: of the training pairs, by the model that was trained on all of them.
        outside: of the training pairs, each by the model of a fold that it is not in.
    """

    inside: Float[Tensor, "worlds pairs"]
    outside: Float[Tensor, "worlds pairs"]


def reward_margins(worlds: Worlds, knowledge: Knowledge, *, seed: int) -> Margins:
    """Linear Bradley-Terry reward models: one on all training pairs, and one for each fold.

    Each is stopped where its log loss on the held-out pairs is least.
    """
    train_features, heldout_features = worlds.train.known[knowledge], worlds.heldout.known[knowledge]
    pairs = train_features.shape[1]
    fold = torch.as_tensor(rng(seed, "simulation", "folds").permutation(pairs) % FOLDS)
    masks = [torch.ones(pairs), *((fold != k).float() for k in range(FOLDS))]
    # With beta = 1 the DPO loss of a linear margin is the Bradley-Terry log loss.
    methods = [Method((DPO(beta=1.0),), kept=mask) for mask in masks]
    looks = torch.stack(train(train_features, methods, (1.0,), seed=seed, epochs=8, budget=3.0, looks=40))[..., 0]
    start = torch.zeros_like(looks[:1])
    looks = torch.cat([start, looks])  # the first look is the model that has learned nothing
    loss = torch.nn.functional.softplus(-torch.einsum("wnf,lwfm->lwmn", heldout_features, looks)).mean(-1)
    best = loss.argmin(0)[None, :, None].expand(1, -1, looks.shape[2], -1)
    chosen = looks.gather(0, best)[0]
    own = train_features @ chosen
    outside = own[..., 1:].gather(-1, fold[None, :, None].expand(len(own), -1, 1))[..., 0]
    return Margins(own[..., 0], outside)


@torch.no_grad()
def measure(
    worlds: Worlds, theta: Float[Tensor, "worlds features policies"]
) -> tuple[Float[Tensor, "worlds policies"], Float[Tensor, "worlds halves policies"]]:
    """KL(policy || reference) in nats, and the gain in true reward over the reference on each half of the prompts."""
    logits = torch.einsum("wpcf,wfk->wpck", worlds.features, theta)
    logps = torch.log_softmax(logits, 2)
    p = logps.exp()
    kl = (p * (logps + math.log(logps.shape[2]))).sum(2).mean(1)
    gain = torch.einsum("wpck,wpc->wpk", p, worlds.reward) - worlds.reward.mean(2)[..., None]
    return kl, torch.stack([half.mean(1) for half in gain.chunk(2, 1)], 1)


def at_kl(kl: Tensor, gain: Tensor, where: float) -> np.ndarray:
    """The gain at one KL, interpolated between betas and linear in sqrt(KL), the reference at 0.

    Args:
        kl: (worlds, betas).
        gain: (worlds, halves, betas).

    Returns:
        (worlds, halves); NaN where no beta reached the KL.
    """
    found = np.full(gain.shape[:2], np.nan)
    for world in range(len(kl)):
        order = kl[world].argsort()
        root = np.sqrt(np.concatenate([[0.0], kl[world][order].numpy()]))
        if root[-1] >= math.sqrt(where):
            for half in range(gain.shape[1]):
                values = np.concatenate([[0.0], gain[world, half][order].numpy()])
                found[world, half] = np.interp(math.sqrt(where), root, values)
    return found
