"""RLHF's own policy optimisation: responses are sampled while training, and the reward model judges them.

The trainers are TRL's RLOO and GRPO. Sampling is ours: its random numbers belong to (seed, update, prompt, copy), so a
killed training continues to the bytes of an undisturbed one, and responses keep their token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from datasets import Dataset
from pydantic import Field
from torch import nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from madpo.core.config import Frozen
from madpo.core.errors import ConfigError
from madpo.core.metrics import Metrics
from madpo.core.seeding import derived_seed
from madpo.models.engine.sampling import generate
from madpo.models.hyperparameters import LoRA, Optimisation
from madpo.models.load import load_model, load_tokenizer
from madpo.rewards.reward_model import RewardModel
from madpo.runner.operation import operation
from madpo.training.resume import ExactResume
from madpo.training.run import forget_checkpoints, run_training

Algorithm = Literal["rloo", "grpo"]
Reward = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Sequence[float]]


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
    """GRPO alone: advantages are divided by the standard deviation within the group (as published), within the batch,
    or not at all."""


class OnlineStage(Frozen):
    """A policy: a LoRA adapter on the SFT model, trained on its own responses."""

    method: str
    """Name in tables and figures."""
    algorithm: Algorithm
    settings: OnlineSettings
    optimisation: Optimisation
    lora: LoRA = LoRA()
    max_new_tokens: int = Field(default=48, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0


class _OwnSampling(ExactResume):
    """Mixin for TRL's trainers: prompts as token ids, and responses from our own sampling."""

    _rows: list[dict[str, Any]]

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        self._rows = inputs
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(row["prompt_ids"]) for row in self._rows], None, {}

    def _sampled(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        copies: dict[int, int] = {}
        keys = []
        for row in self._rows:  # one prompt stands as often as it has responses
            copy = copies[row["prompt_id"]] = copies.get(row["prompt_id"], -1) + 1
            keys.append(derived_seed(row["prompt_id"], copy))
        return generate(
            self.model,
            prompt_ids,
            keys=keys,
            draw=self.state.global_step,
            seed=derived_seed(self.args.seed, "online"),
            max_new_tokens=self.max_completion_length,
            eos_token_ids=set(self.eos_token_ids),
            temperature=self.temperature,
            top_p=self.top_p,
            description="Responses",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._metrics["train"].pop("step_time", None)  # what the clock says
        super().log(logs, start_time)


class _RLOO(_OwnSampling, RLOOTrainer):  # type: ignore[misc]
    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, fields: Any) -> list[list[int]]:
        return self._sampled(prompt_ids)


class _GRPO(_OwnSampling, GRPOTrainer):  # type: ignore[misc]
    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> tuple[list[list[int]], None]:
        return self._sampled(prompt_ids), None


@operation("train_online/1")
def train_online(config: OnlineStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Train on the tier's training prompts; writes ``out/adapter``. Inputs: "pairs", "reference", "reward_model"."""
    pairs = pd.read_parquet(inputs["pairs"] / "pairs.parquet", columns=["pair_id", "split", "prompt_ids"])
    pairs = pairs[pairs["split"] == "train"]
    prompts = {int(i): [int(t) for t in ids] for i, ids in zip(pairs["pair_id"], pairs["prompt_ids"], strict=True)}
    reward_model = RewardModel.load(inputs["reward_model"])

    def reward(prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]) -> Sequence[float]:
        return [float(value) for value in reward_model.score_responses(prompt_ids, response_ids)]

    place = inputs["reference"] / "model"
    trainer = fit_online(config, load_model(place), load_tokenizer(place), prompts, reward, out)
    trainer.model.save_pretrained(out / "adapter", safe_serialization=True)
    forget_checkpoints(out)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row for row in rows if "reward" in row]
    last = last[-max(1, len(last) // 10) :]
    return {
        "prompts": len(prompts),
        "steps": int(trainer.state.global_step),
        "final_reward": float(np.mean([row["reward"] for row in last])),
        "final_kl_per_token": float(np.mean([row["kl"] for row in last])),
    }


def fit_online(
    config: OnlineStage,
    model: nn.Module,
    tokenizer: Any,
    prompts: Mapping[int, Sequence[int]],
    reward: Reward,
    out: Path,
) -> Any:
    """Train a new adapter on ``model``; returns the trainer, whose ``model`` is the policy.

    Args:
        model: the reference, and where the policy starts.
        prompts: prompt id -> token ids.
        reward: (prompts, responses) as token ids -> one reward per response, log-odds.

    Raises:
        ConfigError: the batch does not hold whole groups of responses.
    """
    settings = config.settings
    if config.optimisation.batch_size % settings.generations:
        raise ConfigError(
            f"batch_size {config.optimisation.batch_size} is no multiple of generations {settings.generations}, and "
            "an update takes whole groups of responses"
        )

    def reward_model(
        prompts: Any, completions: Any, completion_ids: list[list[int]], prompt_ids: list[list[int]], **others: Any
    ) -> list[float]:
        return [float(value) for value in reward(prompt_ids, completion_ids)]

    rows = [{"prompt": str(key), "prompt_id": key, "prompt_ids": list(ids)} for key, ids in prompts.items()]
    arguments = {
        **config.optimisation.arguments(out, config.seed),
        "beta": settings.beta,
        "num_generations": settings.generations,
        "epsilon": settings.clip,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
    }
    common = {
        "model": model,
        "reward_funcs": reward_model,
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
        "peft_config": config.lora.peft_config("CAUSAL_LM", model),
    }
    trainer: Any
    if config.algorithm == "rloo":
        trainer = _RLOO(args=RLOOConfig(**arguments), **common)
    else:
        trainer = _GRPO(args=GRPOConfig(scale_rewards=settings.scale_rewards, **arguments), **common)
    run_training(trainer, config, config.method, out)
    return trainer
