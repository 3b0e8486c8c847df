"""The study's policy optimisation on the policy's own responses, as an operation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from madpo.core.metrics import Metrics
from madpo.models.load import load_model, load_tokenizer
from madpo.operations.study_training import reference_model
from madpo.rewards.reward_model import RewardModel
from madpo.runner.operation import operation
from madpo.training.settings import OnlineStage


@operation("train_online/1")
def train_online(config: OnlineStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Train on the tier's training prompts; writes ``out/adapter``. Inputs: "pairs", "reference", "reward_model"."""
    from madpo.training.online import fit_online

    pairs = pd.read_parquet(inputs["pairs"] / "pairs.parquet", columns=["pair_id", "split", "prompt_ids"])
    pairs = pairs[pairs["split"] == "train"]
    prompts = {int(i): [int(t) for t in ids] for i, ids in zip(pairs["pair_id"], pairs["prompt_ids"], strict=True)}
    reward_model = RewardModel.load(inputs["reward_model"])

    def reward(prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]) -> Sequence[float]:
        return [float(value) for value in reward_model.score_responses(prompt_ids, response_ids)]

    place = reference_model(inputs)
    trainer = fit_online(config, load_model(place), load_tokenizer(place), prompts, reward, out)
    trainer.model.save_pretrained(out / "adapter", safe_serialization=True)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row for row in rows if "reward" in row]
    last = last[-max(1, len(last) // 10) :]
    return {
        "prompts": len(prompts),
        "steps": int(trainer.state.global_step),
        "final_reward": float(np.mean([row["reward"] for row in last])),
        "final_kl_per_token": float(np.mean([row["kl"] for row in last])),
    }
