"""Margins from reward models that have not seen the pair, and scores of either side.

A reward model's margins on its own training pairs are optimistic. With K folds every training pair is scored by the
model that was trained on the other folds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import Field

from madpo.core.config import Frozen
from madpo.core.metrics import Metrics
from madpo.operations import study_training as stages
from madpo.rewards.reward_model import RewardModel
from madpo.runner.operation import operation
from madpo.training import margins


class OutOfFoldStage(Frozen):
    """Margins of every pair from reward models that were not trained on it."""

    folds: int = Field(ge=2)
    seed: int = 0
    """That of the reward models, which decides who is in which fold."""


@operation("score_out_of_fold/1")
def score_out_of_fold(config: OutOfFoldStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``margins.parquet`` as the in-sample step does; a held-out pair has the mean over the folds' models.

    Inputs: "pairs" and "fold0", "fold1", ...
    """
    pairs = pd.read_parquet(inputs["pairs"] / "pairs.parquet")
    train = pairs[pairs["split"] == "train"]
    fold = stages.fold_of_pairs(stages.prompts_of(train).to_numpy(), config.folds, config.seed)
    heldout = pairs[pairs["split"] == "heldout"]
    tables, others = [], []
    for k in range(config.folds):
        model = RewardModel.load(inputs[f"fold{k}"])
        tables.append(margins.margin_table(model, train[fold == k]))
        others.append(margins.margin_table(model, heldout)["reward_margin"].to_numpy())
    tables.append(pd.DataFrame({"pair_id": heldout["pair_id"].to_numpy(), "reward_margin": np.mean(others, axis=0)}))
    table = pairs[["pair_id", "split"]].merge(pd.concat(tables), on="pair_id", validate="one_to_one")
    table[["pair_id", "reward_margin"]].to_parquet(out / stages.MARGINS, index=False)
    own = table.loc[table["split"] == "train", "reward_margin"].to_numpy()
    return {
        "pairs": len(table),
        "mean_train_margin": float(own.mean()),
        "negative_share": float((own < 0).mean()),
        **{name: value for name, value in margins.margin_metrics(own).items() if name != "heldout_pairs"},
    }


class ScoreStage(Frozen):
    """Rewards of both sides of every pair, for losses that read scores and not their difference."""


@operation("score_sides/1")
def score_sides(config: ScoreStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``scores.parquet``: pair_id, chosen_score, rejected_score (log-odds). Inputs: "pairs", "reward_model"."""
    pairs = pd.read_parquet(inputs["pairs"] / "pairs.parquet")
    model = RewardModel.load(inputs["reward_model"])
    chosen, rejected = (side.astype(np.float64) for side in margins.side_scores(model, pairs))
    table = pd.DataFrame({"pair_id": pairs["pair_id"], "chosen_score": chosen, "rejected_score": rejected})
    table.to_parquet(out / stages.SCORES, index=False)
    return {
        "pairs": len(table),
        "mean_chosen_score": float(chosen.mean()),
        "mean_rejected_score": float(rejected.mean()),
    }
