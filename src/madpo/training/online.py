"""RLHF's own policy optimisation: responses are sampled while training, and the reward model judges them.

The trainers are TRL's RLOO and GRPO. Sampling is ours: its random numbers belong to (seed, update, prompt, copy), so a
killed training continues to the bytes of an undisturbed one, and responses keep their token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from madpo.core.errors import ConfigError
from madpo.core.seeding import derived_seed
from madpo.models.engine.sampling import generate
from madpo.training.resume import ExactResume
from madpo.training.run import run_training
from madpo.training.settings import OnlineStage

Reward = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Sequence[float]]


class _OwnSampling(ExactResume):
    """Mixin for TRL's trainers: prompts as token ids, and responses from our own sampling."""

    _rows: list[dict[str, Any]]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        self._rows = inputs
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(row["prompt_ids"]) for row in self._rows], None, {}

    def _sampled(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        copies: dict[int, int] = {}
        keys = []
        for row in self._rows:  # a prompt is in it once for each of its responses
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
            top_k=self.top_k or None,
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
        "top_k": config.top_k or 0,  # 0 is no bound
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
