"""What a reward model says of pairs: the rewards of both sides, their margins, and how good these are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from madpo.core.columns import MARGIN
from madpo.core.metrics import Metrics
from madpo.core.statistics import fit_temperature, proportion_of
from madpo.rewards.reward_model import RewardModel


def side_scores(model: RewardModel, pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Rewards (float32) of the chosen and of the rejected side of every pair."""
    sides = sequences(pairs.to_dict("records"))
    return model.score_pairs(sides["chosen_ids"], sides["rejected_ids"], sides["prompt_length"])


def sequences(rows: Iterable[Mapping[Any, Any]]) -> dict[str, list[Any]]:
    """Prompt and completion as one sequence each, the columns of TRL's reward trainer; the pair's name, its prompt's
    length.

    Args:
        rows: with ``pair_id``, ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
    """
    found: dict[str, list[Any]] = {"pair_id": [], "chosen_ids": [], "rejected_ids": [], "prompt_length": []}
    for row in rows:
        found["pair_id"].append(row["pair_id"])
        for side in ("chosen_ids", "rejected_ids"):
            found[side].append([*map(int, row["prompt_ids"]), *map(int, row[side])])
        found["prompt_length"].append(len(row["prompt_ids"]))
    return found


def margin_table(model: RewardModel, pairs: pd.DataFrame) -> pd.DataFrame:
    """pair_id and reward_margin (log-odds) of every pair; refuses one that is not finite."""
    from madpo.training.reference import refuse_not_finite

    chosen, rejected = side_scores(model, pairs)
    margins = np.asarray(chosen - rejected, dtype=np.float64)
    refuse_not_finite({MARGIN: margins}, pairs["pair_id"].to_list(), "the reward model")
    return pd.DataFrame({"pair_id": pairs["pair_id"].to_numpy(), MARGIN: margins})


def margin_metrics(margins: np.ndarray, prompts: ArrayLike | None = None) -> Metrics:
    """Accuracy (its interval over prompts) and log loss (nats per pair) on pairs that trained nothing; the loss also at
    a fitted temperature.

    A margin of 0 counts as wrong, as in TRL's reward trainer.
    """
    temperature, before, after = fit_temperature(margins)
    return {
        "heldout_pairs": len(margins),
        "heldout_accuracy": proportion_of(margins > 0, prompts),
        "heldout_log_loss": before,
        "temperature": temperature,
        "calibrated_log_loss": after,
    }
