"""Which rows are settings of one method, which setting is chosen, and how two choices compare.

A method that is tried at several settings and reported at its best is flattered, since noise alone makes the best of
six better than one. So the held-out prompts are cut into two halves (:mod:`madpo.selection`): one half
chooses the setting, the other alone is reported, and a comparison in which either side was chosen among several
settings uses the reporting half alone. A method with one setting is reported on all prompts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from madpo.records import Estimate
from madpo.results import SFT, Row, Tier, at_shared_seeds, over_shared_seeds, shared_seeds
from madpo.selection import BOOTSTRAP_SEED, Candidate, select
from madpo.statistics import paired_difference

FEWEST = 10  # prompts; below, an interval says nothing
PAPER_BETA = 0.1
AGREEING, REDRAWN = "DPO on agreeing pairs", "DPO on re-drawn labels"
RIVALS = (AGREEING, REDRAWN, "rDPO", "Soft labels", "Soft MADPO", "cDPO", "RLOO", "GRPO", "Best of n")
_KINDS = {
    "beta_dpo": "β-DPO", "rdpo": "rDPO", "soft_dpo": "Soft labels", "soft_madpo": "Soft MADPO", "simpo": "SimPO",
    "alpha_dpo": "alpha-DPO", "odpo": "ODPO", "rpo": "RPO", "omni_dpo": "Omni-DPO", "wpo": "WPO",
}  # fmt: skip
_PARTS = {"full": "MADPO", "amplify": "Amp-Only", "dampen": "Reg-Only"}


def family_of(row: Row) -> str:
    """The method that a row is a setting of; a row of another kind stands for itself."""
    loss, kind = row.loss, row.loss.get("kind", row.key)
    if row.name == SFT:
        return SFT
    if row.trainer != "offline":
        return {"rloo": "RLOO", "grpo": "GRPO", "best_of_n": "Best of n"}.get(row.trainer, row.name)
    if row.pairs != "all":
        plain = {"agreeing": AGREEING, "redrawn": REDRAWN}
        return plain.get(row.pairs, row.name) if kind == "dpo" else row.name
    if kind == "dpo":
        return "cDPO" if loss.get("label_smoothing") else "DPO"
    if kind == "ipo":
        return "IPO" if loss.get("reduction", "sum") == "sum" else "IPO, mean per token"
    if kind == "madpo":
        name = _PARTS.get(loss.get("part", "full"), row.name)
        calibrated = float(loss.get("margin_temperature", 1.0)) != 1.0
        apart = [", calibrated margins"] * calibrated + [", out-of-fold margins"] * (row.margins == "out_of_fold")
        return name + "".join(apart)
    return _KINDS.get(kind, row.name)


def base_beta(tiers: Iterable[Tier]) -> float:
    """The beta that methods share in the main table: that of plain DPO, else the paper's."""
    given = (tier.baseline.loss.get("beta") for tier in tiers if tier.baseline is not None)
    return float(next((beta for beta in given if beta is not None), PAPER_BETA))


def settings_of(tier: Tier, family: str, beta: float | None) -> list[Row]:
    """The tier's rows of a family, at ``beta`` alone unless it is None."""
    rows = [row for row in tier.rows if family_of(row) == family]
    return [row for row in rows if beta is None or float(row.loss.get("beta", beta)) == beta]


@dataclass(frozen=True)
class Choice:
    """A method's setting, chosen on one half of the prompts among ``settings``.

    Attributes:
        name: of the method; tier: its name; row: the chosen setting.
        value: mean reward of the chosen setting on the reporting half, over the seeds that all settings have; where
            nothing was chosen, its own on all prompts.
        reporting: prompts that may be reported.
        best: the setting with the highest mean on all prompts, as the paper chooses; best_value: that mean.
        seeds: training seeds that all settings have, which the choice and the values are over.
        candidates: what every setting has on either half, by the row's key; empty where there are no samples.
    """

    name: str
    tier: str
    row: Row
    settings: int
    value: Estimate | float | None
    best: Row
    best_value: Estimate | float | None
    seeds: tuple[str, ...]
    reporting: frozenset[int] = frozenset()
    candidates: Mapping[str, Candidate] = field(default_factory=dict)

    @property
    def chosen(self) -> bool:
        """Whether there was a choice."""
        return self.settings > 1


def choose(name: str, tier: Tier, rows: Sequence[Row]) -> Choice | None:
    """The best of ``rows`` on the choosing half, over the training seeds that all have; None if there are none."""
    if not rows:
        return None
    # A setting of two seeds would differ from one of the first seed alone by what the seeds differ in.
    rewards = {row.key: values for row, values in zip(rows, over_shared_seeds(rows), strict=True)}
    best = max(rows, key=lambda row: _level(row.oracle_reward, rewards[row.key]))
    top = at_shared_seeds(rows)[rows.index(best)].oracle_reward
    seeds = tuple(shared_seeds(rows)) or best.seeds
    shared = set.intersection(*(set(values) for values in rewards.values()))
    if not shared & tier.reporting or not shared - tier.reporting:
        return Choice(name, tier.name, best, len(rows), top, best, top, seeds, tier.reporting)
    found = select(rewards, tier.reporting)
    row = next(row for row in rows if row.key == found.best)
    value = found.candidates[found.best].reporting if len(rows) > 1 else best.oracle_reward
    return Choice(name, tier.name, row, len(rows), value, best, top, seeds, tier.reporting, found.candidates)


def chosen(tier: Tier, family: str, beta: float | None) -> Choice | None:
    """The chosen setting of a family in a tier, at ``beta`` or, with None, over all of them."""
    return choose(family, tier, settings_of(tier, family, beta))


def selections(tiers: Sequence[Tier], wanted: Mapping[str, Sequence[str]]) -> dict[str, list[Choice]]:
    """The experiment's own choices, per tier: name -> names of rows or patterns on them, as its TOML has them."""
    found: dict[str, list[Choice]] = {}
    for name, among in wanted.items():
        for tier in tiers:
            rows = [row for row in tier.rows if any(fnmatch.fnmatchcase(row.name, word) for word in among)]
            if (choice := choose(name, tier, rows)) is not None:
                found.setdefault(name, []).append(choice)
    return found


def selection_json(
    found: Mapping[str, Sequence[Choice]], wanted: Mapping[str, Sequence[str]], rows: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """What was chosen from what, and what is missing, for programs.

    Args:
        found: the experiment's choices; wanted: name -> rows or patterns on them, as in :func:`selections`.
        rows: name -> key of every row of the experiment.
        seed: which half selects.

    Returns:
        seed, and tiers: tier -> name of the choice -> best, candidates (selecting, reporting), missing (rows by key),
        seeds that the numbers are over.
    """
    tiers: dict[str, Any] = {}
    for name, choices in found.items():
        keys = [key for row, key in rows.items() if any(fnmatch.fnmatchcase(row, word) for word in wanted[name])]
        for choice in choices:
            if choice.candidates:
                tiers.setdefault(choice.tier, {})[name] = {
                    "best": choice.row.key,
                    "candidates": {
                        key: {"selecting": c.selecting, "reporting": c.reporting._asdict()}
                        for key, c in choice.candidates.items()
                    },
                    "missing": [key for key in keys if key not in choice.candidates],
                    "seeds": list(choice.seeds),
                }
    return {"seed": seed, "tiers": tiers}


@dataclass(frozen=True)
class Comparison:
    """One difference of rewards that a claim speaks of, or why there is none.

    Attributes:
        what: in words; value: its estimate over prompts; per_seed: the same difference of each training seed.
        bound: what it must lie above; required: whether the claim needs it, or only must not be contradicted by it.
        missing: why there is no value; seeds: training seeds that it is the mean over.
        same: whether both sides got the same reward on every prompt, as two trainings with the same weights do: then
            there is nothing to compare.
    """

    what: str
    value: Estimate | None = None
    per_seed: Mapping[str, float] = field(default_factory=dict)
    bound: float = 0.0
    required: bool = True
    missing: str = ""
    seeds: int = 1
    same: bool = False

    @property
    def above(self) -> bool:
        """Clearly above the bound: the whole interval, and every seed."""
        return self._clear(1)

    @property
    def below(self) -> bool:
        """Clearly below the bound: the whole interval, and every seed."""
        return self._clear(-1)

    def _clear(self, sign: int) -> bool:
        if self.value is None or self.value.n < FEWEST or self.same:
            return False
        edge = self.value.low if sign > 0 else self.value.high
        return sign * (edge - self.bound) > 0 and all(sign * (v - self.bound) > 0 for v in self.per_seed.values())


def less(a: Choice | None, b: Choice | None, what: str, **how: Any) -> Comparison:
    """``a`` less ``b`` on the prompts that both may be judged on."""
    if a is None or b is None:
        return Comparison(what, missing="not run", **how)
    one, other = over_shared_seeds([a.row, b.row])
    shared = one.keys() & other.keys()
    if a.chosen or b.chosen:
        shared = shared & a.reporting & b.reporting
    if len(shared) < 2:
        return Comparison(what, missing="there are no samples of both on the same prompts", **how)
    ids, seeds = sorted(shared), shared_seeds([a.row, b.row])
    value = paired_difference([one[i] for i in ids], [other[i] for i in ids], seed=BOOTSTRAP_SEED)
    per_seed = {}
    for seed in seeds:
        own, base = a.row.seed_rewards[seed], b.row.seed_rewards[seed]
        per_seed[seed] = float(np.mean([own[i] - base[i] for i in ids if i in own and i in base]))
    same = a.tier == b.tier and all(one[i] == other[i] for i in ids)
    return Comparison(what, value, per_seed, seeds=max(1, len(seeds)), same=same, **how)


def more_on(one: Sequence[Choice | None], other: Sequence[Choice | None], what: str, **how: Any) -> Comparison:
    """How much larger the first pair's difference is than the second's: (a1 - b1) - (a2 - b2), paired by prompt."""
    sides = [*one, *other]
    given = [side for side in sides if side is not None]
    if len(given) < len(sides):
        return Comparison(what, missing="not run", **how)
    rows = [side.row for side in given]
    sides_by_prompt, seeds = over_shared_seeds(rows), shared_seeds(rows)
    shared = set.intersection(*(set(values) for values in sides_by_prompt))
    if any(side.chosen for side in given):
        shared = shared.intersection(*(side.reporting for side in given))
    if len(shared) < 2:
        return Comparison(what, missing="there are no samples of all four on the same prompts", **how)
    ids = sorted(shared)
    a, b, c, d = (np.array([values[i] for i in ids]) for values in sides_by_prompt)
    value = paired_difference(a - b, c - d, seed=BOOTSTRAP_SEED)
    per_seed = {}
    for seed in seeds:
        of_seed = [row.seed_rewards[seed] for row in rows]
        per_seed[seed] = float(
            np.mean(
                [w[i] - x[i] - y[i] + z[i] for w, x, y, z in [of_seed] for i in ids if all(i in v for v in of_seed)]
            )
        )
    return Comparison(what, value, per_seed, seeds=max(1, len(seeds)), **how)


def _level(value: Estimate | float | None, rewards: Mapping[int, float]) -> float:
    """The mean of the rewards by prompt, of the metric where no samples are kept."""
    if rewards:
        return float(np.mean([*rewards.values()]))
    level = value.mean if isinstance(value, Estimate) else value
    return float("-inf") if level is None or not np.isfinite(level) else float(level)
