"""Choices among settings of one method, and paired comparisons of rewards, also at equal KL.

A method that is tried at several settings and reported at its best is flattered, since noise makes the best of
six better than one. So the held-out prompts are cut into two halves (:mod:`madpo.report.selection`): one half
chooses the setting, the other is reported, and a comparison in which a side was chosen among several settings uses
the reporting half. A method with one setting is reported on all prompts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from madpo.core.metrics import Estimate
from madpo.core.statistics import bootstrap_mean, bootstrap_statistic
from madpo.report.methods import SFT
from madpo.report.results import Row, Tier, Value, mean_of, over_shared_seeds
from madpo.report.selection import BOOTSTRAP_SEED, Candidate, select

FEWEST = 10  # prompts; below, an interval says nothing
PAPER_BETA = 0.1
NOT_RUN = "not run"

Interpolation = Literal["linear", "sqrt"]
INTERPOLATION: Interpolation = "linear"


def base_beta(tiers: Iterable[Tier]) -> float:
    """The beta that methods share in the main table: that of plain DPO, else the paper's."""
    given = (tier.baseline.beta for tier in tiers if tier.baseline is not None)
    return next((beta for beta in given if beta is not None), PAPER_BETA)


def settings_of(tier: Tier, method: str, beta: float | None) -> list[Row]:
    """The tier's rows of a method, only those at ``beta`` unless it is None."""
    return [row for row in tier.rows if row.method == method and (beta is None or row.beta in (None, beta))]


@dataclass(frozen=True)
class Choice:
    """A method's setting, chosen on one half of the prompts among ``settings``.

    Attributes:
        name: of the method; row: the chosen setting.
        value: mean reward of the chosen setting on the reporting half, over the seeds that all settings have; where
            nothing was chosen, its own on all prompts.
        best: the setting with the highest mean on all prompts, as the paper chooses; best_value: that mean.
        seeds: training seeds that all settings have, which the choice and the values are over.
        candidates: what every setting has on either half, by the row's key; empty where there are no samples.
    """

    name: str
    tier: Tier
    row: Row
    settings: int
    value: Value
    best: Row
    best_value: Value
    seeds: tuple[str, ...]
    candidates: Mapping[str, Candidate] = field(default_factory=dict)

    @property
    def chosen(self) -> bool:
        """Whether there was a choice."""
        return self.settings > 1


def choose(name: str, tier: Tier, rows: Sequence[Row]) -> Choice | None:
    """The best of ``rows`` on the choosing half, over the training seeds that all have; None if there are none."""
    if not rows:
        return None
    values, seeds = over_shared_seeds([tier.cells(row) for row in rows])
    means = values.mean() if len(values) else [mean_of(row["oracle_reward"]) for row in rows]
    best = rows[int(np.argmax(means))]
    top = tier.even(rows)[rows.index(best)]["oracle_reward"]
    kept = tuple(seeds) or best.seeds
    candidates = select(values.set_axis([row.key for row in rows], axis=1), tier.reporting)
    if len(rows) == 1 or not candidates:
        return Choice(name, tier, best, len(rows), top, best, top, kept, candidates)
    found = max(candidates, key=lambda key: candidates[key].selecting)
    row = next(row for row in rows if row.key == found)
    return Choice(name, tier, row, len(rows), candidates[found].reporting, best, top, kept, candidates)


def chosen(tier: Tier, method: str, beta: float | None) -> Choice | None:
    """The chosen setting of a method in a tier, at ``beta`` or, with None, over all of them."""
    return choose(method, tier, settings_of(tier, method, beta))


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
                tiers.setdefault(choice.tier.name, {})[name] = {
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
    """A difference of mean rewards, or why there is none.

    Attributes:
        what: in words; value: its estimate over prompts; per_seed: the same difference of each training seed.
        bound: what it must lie above; required: whether a claim needs it, or only must not be contradicted by it.
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


def less(what: str, sides: Sequence[Choice | None], **how: Any) -> Comparison:
    """The first side's reward less the second's, paired by prompt; of four sides, (a - b) - (c - d).

    A comparison in which something was chosen is over the prompts that all sides may report.
    """
    given = [side for side in sides if side is not None]
    if len(given) < len(sides):
        return Comparison(what, missing=NOT_RUN, **how)
    cells = [side.tier.cells(side.row) for side in given]
    values, seeds = over_shared_seeds(cells)
    if any(side.chosen for side in given):
        values = values[values.index.isin(frozenset.intersection(*(side.tier.reporting for side in given)))]
    if len(values) < 2:
        return Comparison(what, missing="there are no samples of all sides on the same prompts", **how)
    signs = np.array([1.0, -1.0, -1.0, 1.0])[: len(given)]
    value = bootstrap_mean(values.to_numpy() @ signs, seed=BOOTSTRAP_SEED)
    per_seed = {
        seed: float(sum(sign * side.loc[values.index, seed] for sign, side in zip(signs, cells, strict=True)).mean())
        for seed in seeds
    }
    same = len(given) == 2 and given[0].tier is given[1].tier and bool((values[0] == values[1]).all())
    return Comparison(what, value, per_seed, seeds=max(1, len(seeds)), same=same, **how)


def frontiers(tier: Tier, beta: float) -> dict[str, list[Row]]:
    """Per method, the rows of one setting over beta, by beta, all of them over the same training seeds.

    Of several settings the one with the most betas represents the method; at a tie a core one, then the first.
    """
    lines: dict[str, dict[str, list[Row]]] = {}
    for row in tier.policies:
        if tier.cells(row, "kl").notna().any(axis=None) and tier.cells(row).notna().any(axis=None):
            other = repr(sorted((k, repr(v)) for k, v in row.loss.items() if k not in ("beta", "n")))
            lines.setdefault(row.method, {}).setdefault(other, []).append(row)
    found = {}
    for method, by_setting in lines.items():
        best = max(by_setting.values(), key=lambda rows: (len(rows), any(r.group in ("", "core") for r in rows)))
        found[method] = sorted(best, key=lambda row: (beta if row.beta is None else row.beta, row.loss.get("n", 0)))
    even = iter(tier.even([row for line in found.values() for row in line]))
    return {method: [next(even) for _ in line] for method, line in found.items()}


def equal_kl(
    what: str, tier: Tier, choice: Choice | None, interpolation: Interpolation = INTERPOLATION, **how: Any
) -> Comparison:
    """A method's reward less what plain DPO, over its betas, earns at the same KL.

    Prompts are resampled for all rows alike. Rewards and KLs are means over the training seeds that all rows have, and
    every such seed has a curve of its own. Beyond the ends of a curve there is nothing to compare with.

    Args:
        interpolation: "linear" joins DPO's settings, in order of KL, by straight lines in KL. "sqrt" joins them by
            straight lines in the square root of KL, and begins at the SFT model, which has a KL of 0: reward grows
            about as the root of KL, so that straight lines in KL flatter a method between two settings of DPO.
    """
    curve = settings_of(tier, "DPO", None)
    if choice is None or len(curve) < 2:
        return Comparison(what, missing=f"{NOT_RUN}: it needs the method, and DPO at two or more β", **how)
    rows = [choice.row, *curve]
    start = [tier.sft] if interpolation == "sqrt" and tier.sft is not None else []
    rewards = [tier.cells(row) for row in [*rows, *start]]
    kls = [*(tier.cells(row, "kl") for row in rows), *(tier.cells(row) * 0.0 for row in start)]
    values, seeds = over_shared_seeds([*rewards, *kls])
    if choice.chosen:
        values = values[values.index.isin(tier.reporting)]
    if len(values) < 2:
        return Comparison(what, missing="there are no samples of all on the same prompts", **how)
    means = {"": values.mean().to_numpy()}
    if len(seeds) > 1:
        for seed in seeds:
            means[seed] = np.array([side.loc[values.index, seed].mean() for side in [*rewards, *kls]])
    for seed, mean in means.items():
        kl, *points = mean[len(rewards) :]
        if not min(points) <= kl <= max(points):
            span = f"{min(points):.1f} to {max(points):.1f}"
            where = f"{choice.name}'s KL{f' in {seed}' if seed else ''}"
            return Comparison(what, missing=f"{where} is {kl:.1f} nats, and DPO's curve spans {span}", **how)

    def above(draws: NDArray[np.float64]) -> NDArray[np.float64]:
        return _above_curve(draws, interpolation)

    per_seed = {seed: float(above(mean[None])[0]) for seed, mean in means.items() if seed}
    value = bootstrap_statistic(values.to_numpy(), above, seed=BOOTSTRAP_SEED)
    return Comparison(what, value, per_seed or dict.fromkeys(seeds, value.mean), seeds=max(1, len(seeds)), **how)


def less_dpo(tier: Tier, row: Row) -> Comparison:
    """Any row's reward less that of DPO's curve at the row's KL; none for DPO itself."""
    what = f"{row.name} less DPO at its KL, {tier.label}"
    if row.method in ("DPO", SFT):
        return Comparison(what, missing="DPO is what others are compared with")
    return equal_kl(what, tier, choose(row.name, tier, [row]))


def _above_curve(means: NDArray[np.float64], interpolation: Interpolation) -> NDArray[np.float64]:
    """Columns: rewards of the method and of the curve's points, then their KLs in the same order."""
    k = means.shape[1] // 2
    rewards, kls = means[:, :k], means[:, k:]
    x = np.sqrt(np.maximum(kls, 0.0)) if interpolation == "sqrt" else kls
    order = np.argsort(x[:, 1:], axis=1)
    curves = zip(x, rewards, order, strict=True)
    return np.array([y[0] - np.interp(at[0], at[1:][by], y[1:][by]) for at, y, by in curves])
