"""Training pairs as the reward model sees them: those whose label it agrees with, or all with labels drawn anew.

Most of what a weight by the margin does is to turn down pairs whose label the reward model contradicts. These two are
the simple ways to do the same, and the study compares with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import Field
from scipy.special import expit

from madpo.core.config import Frozen
from madpo.core.errors import ConfigError
from madpo.core.metrics import Metrics
from madpo.core.seeding import rng
from madpo.core.statistics import proportion
from madpo.operations.study_pairs import PAIRS, write_table
from madpo.runner.operation import operation

MARGIN_FILE = "margins.parquet"
# Input -> its file, and the columns that change places when a label turns. The margin changes its sign as well.
_SIDES = {
    "logps": ("reference.parquet", "ref_chosen_logps", "ref_rejected_logps"),
    "scores": ("scores.parquet", "chosen_score", "rejected_score"),
}


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
    pairs = pd.read_parquet(inputs["pairs"] / "pairs.parquet")
    margins = _margins(inputs["margins"], pairs)
    train = (pairs["split"] == "train").to_numpy()
    kept = train & (margins > config.above)
    if not kept.any():
        raise ConfigError(f"the reward model prefers the chosen side by more than {config.above} in no training pair")
    _write_pairs(pairs[kept | ~train], out)
    return {"pairs": int(kept.sum()), "agreeing_share": proportion(int(kept.sum()), int(train.sum()))}


class RedrawnStage(Frozen):
    """All training pairs, with labels drawn anew: the chosen side stays chosen with probability sigma(margin / t)."""

    margin_temperature: float = Field(default=1.0, gt=0)
    """t: divides the margins, to calibrate the reward model."""
    seed: int = 0


@operation("redraw_labels/1")
def redraw_labels(config: RedrawnStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``pairs.parquet`` and, turned with it, margins, reference log-probabilities and scores.

    The draw depends only on (seed, pair). Inputs: "pairs", "margins", "logps", and "scores" where there are some.
    """
    pairs = pd.read_parquet(inputs["pairs"] / "pairs.parquet")
    margins = _margins(inputs["margins"], pairs)
    train = (pairs["split"] == "train").to_numpy()
    uniform = np.array([rng(config.seed, "redrawn", int(pair_id)).random() for pair_id in pairs["pair_id"]])
    turned = train & (uniform >= expit(margins / config.margin_temperature))
    swapped = pairs.copy()
    for name in pairs:
        if str(name).startswith("chosen"):
            other = "rejected" + str(name).removeprefix("chosen")
            swapped[name] = pairs[name].where(~turned, pairs[other])
            swapped[other] = pairs[other].where(~turned, pairs[name])
    _write_pairs(swapped, out)
    signed = np.where(turned, -margins, margins)
    pd.DataFrame({"pair_id": pairs["pair_id"], "reward_margin": signed}).to_parquet(out / MARGIN_FILE, index=False)
    ids = set(pairs.loc[turned, "pair_id"])
    for role, (file, first, second) in _SIDES.items():
        if role in inputs:
            table = pd.read_parquet(inputs[role] / file)
            turn = table["pair_id"].isin(ids)
            a, b = table[first], table[second]
            table[first], table[second] = a.where(~turn, b), b.where(~turn, a)
            table.to_parquet(out / file, index=False)
    return {"pairs": int(train.sum()), "turned_share": proportion(int(turned.sum()), int(train.sum()))}


def _margins(folder: Path, pairs: pd.DataFrame) -> np.ndarray:
    """In the order of the pairs, log-odds."""
    table = pd.read_parquet(folder / MARGIN_FILE)
    merged = pairs[["pair_id"]].merge(table, on="pair_id", how="left", validate="one_to_one")
    return merged["reward_margin"].to_numpy(dtype=np.float64)


def _write_pairs(pairs: pd.DataFrame, out: Path) -> None:
    write_table(pa.Table.from_pandas(pairs, schema=PAIRS, preserve_index=False), out / "pairs.parquet")
