"""What a reward model says of pairs: the rewards of both sides, their margins, and how good these are."""

from __future__ import annotations

import numpy as np
import pandas as pd

from madpo.records import Metrics
from madpo.rewards import RewardModel
from madpo.statistics import fit_temperature, proportion
from madpo.training.reference import refuse_not_finite


def side_scores(model: RewardModel, pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Rewards (float32) of the chosen and of the rejected side of every pair."""
    return model.score_pairs(*joined_sides(pairs))


def joined_sides(pairs: pd.DataFrame) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Token ids of prompt and chosen, and of prompt and rejected completion; tokens of both that are the prompt's."""
    chosen, rejected = (
        [[*map(int, prompt), *map(int, side)] for prompt, side in zip(pairs["prompt_ids"], pairs[name], strict=True)]
        for name in ("chosen_ids", "rejected_ids")
    )
    return chosen, rejected, [len(prompt) for prompt in pairs["prompt_ids"]]


def margin_table(model: RewardModel, pairs: pd.DataFrame) -> pd.DataFrame:
    """pair_id and reward_margin (log-odds) of every pair; refuses one that is not finite."""
    chosen, rejected = side_scores(model, pairs)
    margins = np.asarray(chosen - rejected, dtype=np.float64)
    refuse_not_finite({"reward_margin": margins}, pairs["pair_id"].to_list(), "the reward model")
    return pd.DataFrame({"pair_id": pairs["pair_id"].to_numpy(), "reward_margin": margins})


def margin_metrics(margins: np.ndarray) -> Metrics:
    """Accuracy and log loss (nats per pair) on pairs that trained nothing; the latter with a fitted temperature too."""
    temperature, before, after = fit_temperature(margins)
    return {
        "heldout_pairs": len(margins),
        "heldout_accuracy": proportion(int((margins > 0).sum()), len(margins)),
        "heldout_log_loss": before,
        "temperature": temperature,
        "calibrated_log_loss": after,
    }
