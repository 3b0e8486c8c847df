"""Margins from a probe of the reference's states, in the place of a trained reward model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from madpo.core.config import Frozen, added
from madpo.core.metrics import Metrics
from madpo.models.engine.features import feature_layers
from madpo.models.load import load_model, load_tokenizer
from madpo.operations.study_training import MARGINS, prompts_of, reference_model
from madpo.rewards.probe import FOLDS, fit_probe
from madpo.rewards.probe_reward import pair_features, save_probe
from madpo.runner.operation import operation
from madpo.training.margins import margin_metrics, sequences

OUT_OF_FOLD = "out_of_fold.parquet"


class ProbeStage(Frozen):
    """A ridge logistic regression on the reference's states; see :mod:`madpo.rewards.probe`."""

    folds: int = Field(default=FOLDS, ge=2)
    """Of the training pairs, for their margins."""
    seed: int = 0
    batch_size: int = Field(default=16, ge=1, exclude=True)
    """Sequences per forward pass."""
    part: Literal["train", "judge"] = added("train")
    """Which pairs it is fitted to: those that the policies learn from, or others."""


@operation("fit_pairs_probe/1")
def fit_pairs_probe(config: ProbeStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Fit a probe to the pairs of ``config.part``; writes it as a reward model, with margins of all pairs.

    ``margins.parquet`` holds those of the held-out pairs, by the probe of all those; ``out_of_fold.parquet``
    those of its own pairs, each by a probe that has not seen the pair. Inputs: "pairs", "reference".
    """
    pairs = pd.read_parquet(inputs["pairs"] / "pairs.parquet")
    pairs = pairs[pairs["split"].isin([config.part, "heldout"])]
    place = reference_model(inputs)
    model, tokenizer = load_model(place), load_tokenizer(place)
    layers = feature_layers(model)
    sides = sequences(pairs.to_dict("records"))
    ids = sides["chosen_ids"], sides["rejected_ids"], sides["prompt_length"]
    chosen, rejected = pair_features(model, tokenizer.pad_token_id, layers, *ids, config.batch_size)
    train = (pairs["split"] == config.part).to_numpy()
    prompts = [str(prompt) for prompt in prompts_of(pairs[train])]
    fitted = fit_probe(
        chosen[train], rejected[train], prompts, folds=config.folds, seed=config.seed, name=f"the {config.part} pairs"
    )
    heldout = fitted.weights.rewards(chosen[~train]) - fitted.weights.rewards(rejected[~train])
    _write(pairs.loc[~train, "pair_id"], heldout, out / MARGINS)
    _write(pairs.loc[train, "pair_id"], fitted.margins, out / OUT_OF_FOLD)
    made = (inputs["reference"] / "model").is_dir()
    save_probe(out, str(place), layers, fitted.weights, model_digest=None, made=made)
    return {
        "penalty": fitted.report.penalty,
        "training_accuracy": fitted.report.accuracy,
        "training_log_loss": fitted.report.log_loss,
        **margin_metrics(heldout),
    }


class ProbeMarginStage(Frozen):
    """Margins of every pair that a probe left."""


@operation("probe_margins/1")
def probe_margins(config: ProbeMarginStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``margins.parquet``: pair_id, reward_margin (log-odds), out of fold for training pairs.

    Inputs: "pairs", "reward_model" (:func:`fit_pairs_probe`).
    """
    pairs = pd.read_parquet(inputs["pairs"] / "pairs.parquet")[["pair_id", "split"]]
    found = pd.concat(pd.read_parquet(inputs["reward_model"] / name) for name in (OUT_OF_FOLD, MARGINS))
    table = pairs.merge(found, on="pair_id", validate="one_to_one")
    table[["pair_id", "reward_margin"]].to_parquet(out / MARGINS, index=False)
    own = table.loc[table["split"] == "train", "reward_margin"]
    return {"pairs": len(table), "mean_train_margin": float(own.mean()), "negative_share": float((own < 0).mean())}


def _write(pair_ids: pd.Series[int], margins: np.ndarray, path: Path) -> None:
    pd.DataFrame({"pair_id": pair_ids.to_numpy(), "reward_margin": margins}).to_parquet(path, index=False)
