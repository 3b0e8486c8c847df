"""Who gives a pair its margin in a study, and the training pairs as the margins see them.

A reward model's margins on its own training pairs are optimistic. Two sources have not seen the pair: with K folds, the
model that was trained on the other folds; and a probe of the reference's hidden states, which is fitted out of fold.

Most of what a weight by the margin does is to turn down pairs whose label the reward model contradicts. Keeping only
the agreeing pairs, or drawing all labels again, are the simple ways to do the same, and the study compares with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import Field
from scipy.special import expit

from madpo.core.config import Frozen, added
from madpo.core.errors import ConfigError
from madpo.core.metrics import Metrics
from madpo.core.seeding import rng
from madpo.core.statistics import proportion_of
from madpo.models.engine.features import feature_layers
from madpo.models.load import load_model, load_tokenizer
from madpo.operations.study_pairs import PAIRS, write_table
from madpo.operations.study_training import MARGINS, SCORES, fold_of_pairs, prompts_of, read_pairs, reference_model
from madpo.rewards.probe import FOLDS, fit_probe
from madpo.rewards.probe_reward import pair_features, save_probe
from madpo.rewards.reward_model import RewardModel
from madpo.runner.operation import operation
from madpo.training.margins import margin_metrics, margin_table, sequences, side_scores

OUT_OF_FOLD = "out_of_fold.parquet"
# Input -> its file, and the columns that change places when a label turns. The margin changes its sign as well.
_SIDES = {
    "logps": ("reference.parquet", "ref_chosen_logps", "ref_rejected_logps"),
    "scores": (SCORES, "chosen_score", "rejected_score"),
}


class NoSettings(Frozen):
    """Of an operation that has none."""


@operation("score_margins/1")
def score_margins(config: NoSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``margins.parquet``, the margins of every pair under the trained reward model: pair_id, reward_margin
    (log-odds). Inputs: "pairs", "reward_model"."""
    pairs = read_pairs(inputs["pairs"])
    known = pd.read_parquet(inputs["reward_model"] / MARGINS)  # of the held-out pairs that measured the reward model
    others = pairs[~pairs["pair_id"].isin(known["pair_id"])]
    scored = margin_table(RewardModel.load(inputs["reward_model"]), others)
    return _write_margins(pairs, [known, scored], out)[0]


class OutOfFoldStage(Frozen):
    """Margins of every pair from reward models that were not trained on it."""

    folds: int = Field(ge=2)
    seed: int = 0
    """That of the reward models, which decides who is in which fold."""


@operation("score_out_of_fold/1")
def score_out_of_fold(config: OutOfFoldStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``margins.parquet`` as :func:`score_margins` does; a held-out pair has the mean over the folds' models.

    Inputs: "pairs" and "fold0", "fold1", ...
    """
    pairs = read_pairs(inputs["pairs"])
    train, heldout = (pairs[pairs["split"] == split] for split in ("train", "heldout"))
    fold = fold_of_pairs(prompts_of(train).to_numpy(), config.folds, config.seed)
    tables, others = [], []
    for k in range(config.folds):
        model = RewardModel.load(inputs[f"fold{k}"])
        tables.append(margin_table(model, train[fold == k]))
        others.append(margin_table(model, heldout)["reward_margin"].to_numpy())
    metrics, own, prompts = _write_margins(pairs, [*tables, _margins_of(heldout, np.mean(others, axis=0))], out)
    return metrics | {name: value for name, value in margin_metrics(own, prompts).items() if name != "heldout_pairs"}


@operation("score_sides/1")
def score_sides(config: NoSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``scores.parquet``, for losses that read scores and not their difference: pair_id, chosen_score,
    rejected_score (log-odds). Inputs: "pairs", "reward_model"."""
    pairs = read_pairs(inputs["pairs"])
    model = RewardModel.load(inputs["reward_model"])
    chosen, rejected = (side.astype(np.float64) for side in side_scores(model, pairs))
    table = pd.DataFrame({"pair_id": pairs["pair_id"], "chosen_score": chosen, "rejected_score": rejected})
    table.to_parquet(out / SCORES, index=False)
    return {
        "pairs": len(table),
        "mean_chosen_score": float(chosen.mean()),
        "mean_rejected_score": float(rejected.mean()),
    }


class ProbeStage(Frozen):
    """A ridge logistic regression on the reference's hidden states; see :mod:`madpo.rewards.probe`."""

    folds: int = Field(default=FOLDS, ge=2)
    """Parts of the training pairs, each scored by a probe of the others."""
    seed: int = 0
    batch_size: int = Field(default=16, ge=1, exclude=True)
    """Sequences per forward pass."""
    part: Literal["train", "judge"] = added("train")
    """Which pairs it is fitted to: those that the policies learn from, or others."""


@operation("fit_pairs_probe/2")
def fit_pairs_probe(config: ProbeStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Fit a probe to the pairs of ``config.part``; writes it as a reward model, with margins of all pairs.

    ``margins.parquet`` holds those of the held-out pairs, by the probe of all those; ``out_of_fold.parquet``
    those of its own pairs, each by a probe that has not seen the pair. Inputs: "pairs", "reference".
    """
    pairs = read_pairs(inputs["pairs"])
    pairs = pairs[pairs["split"].isin([config.part, "heldout"])]
    reference_path = reference_model(inputs)
    model, tokenizer = load_model(reference_path), load_tokenizer(reference_path)
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
    _margins_of(pairs[~train], heldout).to_parquet(out / MARGINS, index=False)
    _margins_of(pairs[train], fitted.margins).to_parquet(out / OUT_OF_FOLD, index=False)
    made = (inputs["reference"] / "model").is_dir()
    save_probe(out, str(reference_path), layers, fitted.weights, model_digest=None, made=made)
    return {
        "penalty": fitted.report.penalty,
        "training_accuracy": fitted.report.accuracy,
        "training_log_loss": fitted.report.log_loss,
        **margin_metrics(heldout, prompts_of(pairs[~train])),
    }


@operation("probe_margins/1")
def probe_margins(config: NoSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``margins.parquet`` as :func:`score_margins` does, out of fold for training pairs.

    Inputs: "pairs", "reward_model" (:func:`fit_pairs_probe`).
    """
    tables = [pd.read_parquet(inputs["reward_model"] / name) for name in (OUT_OF_FOLD, MARGINS)]
    return _write_margins(read_pairs(inputs["pairs"]), tables, out)[0]


class AgreeingStage(Frozen):
    """The training pairs whose label the reward model agrees with; held-out pairs stay as they are."""

    above: float = 0.0
    """Margin (log-odds) that a training pair must exceed."""


@operation("keep_agreeing/1")
def keep_agreeing(config: AgreeingStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``pairs.parquet`` with fewer training pairs. Inputs: "pairs", "margins".

    Raises:
        ConfigError: no training pair is left.
    """
    pairs, margins, train = _with_margins(inputs)
    kept = train & (margins > config.above)
    if not kept.any():
        raise ConfigError(f"the reward model prefers the chosen side by more than {config.above} in no training pair")
    _write_pairs(pairs[kept | ~train], out)
    return {"pairs": int(kept.sum()), "agreeing_share": proportion_of(kept[train], prompts_of(pairs[train]))}


class RedrawnStage(Frozen):
    """All training pairs, with labels drawn again: the chosen side stays chosen with probability sigma(margin / t)."""

    margin_temperature: float = Field(default=1.0, gt=0)
    """t: divides the margins, to calibrate the reward model."""
    seed: int = 0


@operation("redraw_labels/1")
def redraw_labels(config: RedrawnStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``pairs.parquet`` and, turned with it, margins, reference log-probabilities and scores.

    The draw depends only on (seed, pair). Inputs: "pairs", "margins", "logps", and "scores" where there are some.
    """
    pairs, margins, train = _with_margins(inputs)
    uniform = np.array([rng(config.seed, "redrawn", int(pair_id)).random() for pair_id in pairs["pair_id"]])
    turned = train & (uniform >= expit(margins / config.margin_temperature))
    ids = pairs.loc[turned, "pair_id"]
    for name in [str(name) for name in pairs if str(name).startswith("chosen")]:
        _turn(pairs, ids, name, f"rejected{name.removeprefix('chosen')}")
    _write_pairs(pairs, out)
    _margins_of(pairs, np.where(turned, -margins, margins)).to_parquet(out / MARGINS, index=False)
    for role, (file, first, second) in _SIDES.items():
        if role in inputs:
            table = pd.read_parquet(inputs[role] / file)
            _turn(table, ids, first, second)
            table.to_parquet(out / file, index=False)
    return {"pairs": int(train.sum()), "turned_share": proportion_of(turned[train], prompts_of(pairs[train]))}


def _with_margins(inputs: Mapping[str, Path]) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """The pairs, their margins (log-odds), and which of them are for training."""
    pairs = read_pairs(inputs["pairs"])
    table = pd.read_parquet(inputs["margins"] / MARGINS)
    merged = pairs[["pair_id"]].merge(table, on="pair_id", how="left", validate="one_to_one")
    return pairs, merged["reward_margin"].to_numpy(dtype=np.float64), (pairs["split"] == "train").to_numpy()


def _margins_of(pairs: pd.DataFrame, margins: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"pair_id": pairs["pair_id"].to_numpy(), "reward_margin": margins})


def _write_margins(
    pairs: pd.DataFrame, tables: Iterable[pd.DataFrame], out: Path
) -> tuple[Metrics, np.ndarray, np.ndarray]:
    """The tables as one, in the order of the pairs; returns metrics, margins and prompts of the training pairs."""
    known = pairs[["pair_id", "split"]].assign(prompt_id=prompts_of(pairs))
    table = known.merge(pd.concat(tables), on="pair_id", validate="one_to_one")
    table[["pair_id", "reward_margin"]].to_parquet(out / MARGINS, index=False)
    train = table[table["split"] == "train"]
    own = train["reward_margin"].to_numpy()
    metrics: Metrics = {
        "pairs": len(table),
        "mean_train_margin": float(own.mean()),
        "negative_share": float((own < 0).mean()),
    }
    return metrics, own, train["prompt_id"].to_numpy()


def _write_pairs(pairs: pd.DataFrame, out: Path) -> None:
    write_table(pa.Table.from_pandas(pairs, schema=PAIRS, preserve_index=False), out / "pairs.parquet")


def _turn(table: pd.DataFrame, ids: pd.Series[int], first: str, second: str) -> None:
    keep = ~table["pair_id"].isin(ids)
    a, b = table[first], table[second]
    table[first], table[second] = a.where(keep, b), b.where(keep, a)
