"""The best of several settings, without peeking: chosen on one half of the held-out prompts, reported on the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from madpo.core.metrics import Estimate
from madpo.core.seeding import rng
from madpo.core.statistics import bootstrap_mean

FILE = "selection.json"
BOOTSTRAP_SEED = 0  # of every interval that a run reports: the same records give the same numbers


class Candidate(NamedTuple):
    """One setting: the mean of its values on the half that selects, and its estimate on the half that reports."""

    selecting: float
    reporting: Estimate


def selecting_half(prompt_ids: Iterable[int], seed: int = 0) -> set[int]:
    """The prompts that select: half of them (the smaller half), at random by the seed and the set of ids."""
    ids = np.array(sorted(set(prompt_ids)), dtype=np.int64)
    return {int(i) for i in ids[rng(seed, "selection").permutation(len(ids))[: len(ids) // 2]]}


def select(values: pd.DataFrame, reporting: Collection[int]) -> dict[str, Candidate]:
    """What every setting has on either half of the prompts; empty where a half holds none of them.

    Args:
        values: prompts by settings (larger is better), without gaps.
        reporting: the prompts of the half that reports; the others select.
    """
    half = values.index.isin(list(reporting))
    if half.all() or not half.any():
        return {}
    means = values[~half].mean()
    return {
        str(key): Candidate(float(means[key]), bootstrap_mean(values.loc[half, key].to_numpy(), seed=BOOTSTRAP_SEED))
        for key in values.columns
    }
