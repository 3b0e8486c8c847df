"""The best of several settings, without peeking: chosen on one half of the held-out prompts, reported on the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from madpo.errors import DataError
from madpo.records import Estimate
from madpo.seeding import rng
from madpo.statistics import bootstrap_mean

FILE = "selection.json"
BOOTSTRAP_SEED = 0  # of every interval that a run reports: the same records give the same numbers


class Candidate(NamedTuple):
    """One setting: the mean of its values on the half that selects, and its estimate on the half that reports."""

    selecting: float
    reporting: Estimate


class Selected(NamedTuple):
    """The setting with the highest mean on the selecting half, and all that it was chosen from."""

    best: str
    candidates: dict[str, Candidate]


def selecting_half(prompt_ids: Iterable[int], seed: int = 0) -> set[int]:
    """The prompts that select: half of them (the smaller half), at random by (seed, set of ids) alone."""
    ids = np.array(sorted(set(prompt_ids)), dtype=np.int64)
    return {int(i) for i in ids[rng(seed, "selection").permutation(len(ids))[: len(ids) // 2]]}


def select(values: Mapping[str, Mapping[int, float]], reporting: Collection[int]) -> Selected:
    """Choose among settings that answered the same prompts.

    Args:
        values: setting -> prompt id -> value (larger is better), such as the reward as its mean over seeds. Only
            prompts that all settings answered count.
        reporting: the prompts of the half that reports; the others select.

    Raises:
        DataError: there is no setting, or a half holds none of the shared prompts.
    """
    shared = set.intersection(*(set(v) for v in values.values())) if values else set()
    second = sorted(shared & set(reporting))
    first = sorted(shared - set(reporting))
    if not first or not second:
        raise DataError(
            f"{len(values)} settings share {len(first)} prompts that select and {len(second)} that report; a choice "
            "needs some of both"
        )
    candidates = {
        name: Candidate(
            float(np.mean([v[i] for i in first])), bootstrap_mean([v[i] for i in second], seed=BOOTSTRAP_SEED)
        )
        for name, v in values.items()
    }
    return Selected(max(candidates, key=lambda name: candidates[name].selecting), candidates)
