"""The best of several settings, without peeking: chosen on one half of the held-out prompts, reported on the other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from madpo.errors import DataError
from madpo.records import Estimate, Record
from madpo.seeding import rng
from madpo.statistics import bootstrap_mean
from madpo.storage import write_atomically

FILE = "selection.json"


class Candidate(NamedTuple):
    """One setting: the mean of its values on the half that selects, and its estimate on the half that reports."""

    selecting: float
    reporting: Estimate


class Choice(NamedTuple):
    """The setting with the highest mean on the selecting half, and all that it was chosen from."""

    best: str
    candidates: dict[str, Candidate]


def selecting_half(prompt_ids: Iterable[int], seed: int = 0) -> set[int]:
    """The prompts that select: half of them (the smaller half), at random by (seed, set of ids) alone."""
    ids = np.array(sorted(set(prompt_ids)), dtype=np.int64)
    return {int(i) for i in ids[rng(seed, "selection").permutation(len(ids))[: len(ids) // 2]]}


def choose(values: Mapping[str, Mapping[int, float]], seed: int = 0) -> Choice:
    """Choose among settings that answered the same prompts.

    Args:
        values: setting -> prompt id -> value (larger is better), such as the reward as its mean over seeds. Only
            prompts that all settings answered count.
        seed: which half selects.

    Raises:
        DataError: there is no setting, or fewer than 4 prompts are shared.
    """
    shared = set.intersection(*(set(v) for v in values.values())) if values else set()
    if len(shared) < 4:
        raise DataError(f"{len(values)} settings share {len(shared)} prompts; a choice needs 4 for its two halves")
    first = selecting_half(shared, seed)
    second = sorted(shared - first)
    candidates = {
        name: Candidate(
            float(np.mean([v[i] for i in sorted(first)])), bootstrap_mean([v[i] for i in second], seed=seed)
        )
        for name, v in values.items()
    }
    return Choice(max(candidates, key=lambda name: candidates[name].selecting), candidates)


def write_selection(
    root: Path, records: Mapping[str, Record], selections: Mapping[str, Sequence[str]], tiers: Sequence[str], seed: int
) -> dict[str, Any]:
    """Make every choice that the finished evaluations allow, and write ``selection.json`` into the run's folder.

    Args:
        records: finished records by step name.
        selections: name of a choice -> keys of its rows.

    Returns:
        tier -> name of the choice -> best, candidates (selecting, reporting), missing rows.
    """
    found: dict[str, Any] = {}
    for tier in tiers:
        for name, keys in selections.items():
            values = {key: rewards for key in keys if (rewards := _rewards(root, records, tier, key))}
            if not values:
                continue
            choice = choose(values, seed)
            found.setdefault(tier, {})[name] = {
                "best": choice.best,
                "candidates": {
                    key: {"selecting": c.selecting, "reporting": c.reporting._asdict()}
                    for key, c in choice.candidates.items()
                },
                "missing": [key for key in keys if key not in values],
            }
    write_atomically(root / FILE, json.dumps({"seed": seed, "tiers": found}, indent=1) + "\n")
    return found


def _rewards(root: Path, records: Mapping[str, Record], tier: str, key: str) -> dict[int, float]:
    """Prompt id -> oracle reward, the mean over samples and seeds; prompts that a seed lacks are left out."""
    per_seed: list[dict[int, list[float]]] = []
    for name, record in records.items():
        if name.startswith(f"evaluation/{tier}/{key}/seed"):
            path = root / f"{name}-{record.identity[:8]}" / "samples.jsonl"
            rewards: dict[int, list[float]] = {}
            for line in path.read_text(encoding="utf-8").split("\n"):
                if not line:
                    continue
                row = json.loads(line)
                rewards.setdefault(int(row["prompt_id"]), []).append(float(row["oracle_reward"]))
            per_seed.append(rewards)
    shared = set.intersection(*(set(rewards) for rewards in per_seed)) if per_seed else set()
    return {i: float(np.mean([np.mean(rewards[i]) for rewards in per_seed])) for i in sorted(shared)}
