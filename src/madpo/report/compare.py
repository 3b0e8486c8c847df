"""Choices among settings of one method, and paired comparisons of rewards, also at equal KL.

A method that is tried at several settings and reported at its best is flattered, since noise makes the best of six
better than one. So the held-out prompts are cut into two halves (:func:`madpo.report.results.selecting_half`): one half
chooses, and the chosen setting is reported on the other, the reporting half. A method with one setting is reported on
all prompts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from madpo.core.metrics import Estimate
from madpo.core.statistics import bootstrap_statistic, over_repetitions
from madpo.report.methods import SFT
from madpo.report.results import (
    BOOTSTRAP_SEED,
    Candidate,
    Row,
    Tier,
    Value,
    against,
    mean_of,
    once,
    over_shared_seeds,
    paired,
    select,
)

FEWEST = 10  # prompts; below, an interval says nothing
PAPER_BETA = 0.1
NOT_RUN = "not run"


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


@once
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
        what: in words; value: its estimate over prompts and training seeds; per_seed: the difference of each seed.
        bound: what it must lie above; required: whether a claim needs it, or only must not be contradicted by it.
        missing: why there is no value; seeds: training seeds that it is the mean over.
        left_out: training seed -> why it is not among them.
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
    left_out: Mapping[str, str] = field(default_factory=dict)
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


def less(what: str, sides: Sequence[Choice | None], column: str = "reward", **how: Any) -> Comparison:
    """The first side's reward minus the second's, :func:`madpo.report.results.paired`; of four, (a - b) - (c - d).

    ``column`` is what is compared in the place of the reward. A comparison in which something was chosen is over the
    prompts that all sides may report.
    """
    given = [side for side in sides if side is not None]
    if len(given) < len(sides):
        return Comparison(what, missing=NOT_RUN, **how)
    cells = [side.tier.cells(side.row, column) for side in given]
    reporting = [side.tier.reporting for side in given] if any(side.chosen for side in given) else []
    found = paired(cells, frozenset.intersection(*reporting) if reporting else None)
    if found is None:
        return Comparison(what, missing="there are no samples of all sides on the same prompts", **how)
    value, per_seed, values = found
    same = len(given) == 2 and given[0].tier is given[1].tier and bool((values[0] == values[1]).all())
    return Comparison(what, value, per_seed, seeds=max(1, len(per_seed)), same=same, **how)


@once
def frontiers(tier: Tier, beta: float) -> dict[str, list[Row]]:
    """Per method, the rows of one setting over beta, by beta, each over the training seeds that it has.

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
    return found


def equal_kl(
    what: str,
    tier: Tier,
    choice: Choice | None,
    *,
    base: str = "DPO",
    line: Sequence[Row] = (),
    **how: Any,
) -> Comparison:
    """A method's reward less what a base method, over its betas, earns at the same KL.

    Settings are joined, in order of KL, by straight lines in the square root of KL, as which reward grows about. Where
    it grows less, a line lies below the curve, which flatters one setting between two far ones of the base. The base's
    curve begins at the SFT model, which has a KL of 0. Every training seed has curves of its own, of settings that were
    trained with it, and the difference is the mean over seeds; prompts are resampled for its interval, which the spread
    of the seeds widens (:func:`madpo.core.statistics.over_repetitions`). Beyond the ends of a curve there is nothing to
    compare with: such seeds are left out, and so are those in which the base has fewer than two settings.

    Args:
        base: "DPO", or "MADPO" at its setting with the most betas.
        line: further settings of the chosen one over beta. The difference is then the mean over the distances that both
            curves span; else it is taken at the one setting's own distance.
    """
    own = list(line) or ([] if choice is None else [choice.row])
    keys = {row.key for row in own}
    settings = settings_of(tier, "DPO", None) if base == "DPO" else frontiers(tier, base_beta([tier])).get(base, [])
    curve = [row for row in settings if row.key not in keys]
    if choice is None or len(curve) < 2:
        return Comparison(what, missing=f"{NOT_RUN}: it needs the method, and {base} at two or more β", **how)
    sampled = {row.key: _sampled(tier, row) for row in [*own, *curve]}
    columns: list[pd.Series[float]] = []
    sides: dict[str, list[slice]] = {}
    out: dict[str, str] = {}
    for seed in sorted({seed for row in own for seed in sampled[row.key]}):
        mine, points = ([row for row in rows if seed in sampled[row.key]] for rows in (own, curve))
        if len(points) < 2:
            out[seed] = f"{base} has fewer than two β there"
            continue
        start = [] if tier.sft is None else [against(tier.cells(tier.sft), [seed])[seed]]
        sides[seed] = []
        for rows, more in ((mine, []), (points, [c for sft in start for c in (sft, 0.0 * sft)])):
            found = [tier.cells(row, column)[seed] for row in rows for column in ("reward", "kl")] + more
            sides[seed].append(slice(len(columns), len(columns) + len(found)))
            columns += found
    if not sides:
        return Comparison(what, missing=f"no training seed has {choice.name} and two or more β of {base}", **how)
    table = pd.concat(columns, axis=1).dropna().sort_index()
    values = table[table.index.isin(tier.reporting)].to_numpy() if choice.chosen else table.to_numpy()
    if len(values) < 2:
        return Comparison(what, missing="there are no samples of all on the same prompts", **how)
    centre = values.mean(axis=0)[None]
    spans = {}
    for seed, parts in sides.items():
        ends = [(float(x.min()), float(x.max())) for x, _ in (_along(centre, part) for part in parts)]
        low, high = max(end[0] for end in ends), min(end[1] for end in ends)
        if low <= high:
            spans[seed] = low, high
            continue
        at, span = (" to ".join(dict.fromkeys(f"{x**2:.1f}" for x in end)) for end in ends)
        out[seed] = f"{choice.name}'s KL is {at} nats, and {base}'s curve spans {span}"
    if not spans:
        missing = "; ".join(f"{seed}: {why}" if len(out) > 1 else why for seed, why in out.items())
        return Comparison(what, missing=missing, **how)

    def above(means: NDArray[np.float64]) -> NDArray[np.float64]:
        found = []
        for seed, (low, high) in spans.items():
            (x, y), (u, v) = (_along(means, part) for part in sides[seed])
            grid = x if x.shape[1] == 1 else np.linspace(low, high, _DISTANCES)[None]
            found.append((_interpolated(grid, x, y) - _interpolated(grid, u, v)).mean(axis=1))
        return np.stack(found, axis=1)

    per_seed = dict(zip(spans, above(centre)[0].tolist(), strict=True))
    over_prompts = bootstrap_statistic(values, lambda means: above(means).mean(axis=1), seed=BOOTSTRAP_SEED)
    value = over_repetitions(over_prompts, [*per_seed.values()])
    return Comparison(what, value, per_seed, seeds=len(spans), left_out=out, **how)


def _sampled(tier: Tier, row: Row) -> frozenset[str]:
    """The row's training seeds of which there are rewards and KLs."""
    has = [tier.cells(row, column).notna().any() for column in ("reward", "kl")]
    return frozenset(seed for seed in row.seeds if all(found[seed] for found in has))


def _along(means: NDArray[np.float64], part: slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Roots of the KLs and rewards of some settings, of columns that have the reward and the KL of each."""
    own = means[:, part]
    return np.sqrt(np.maximum(own[:, 1::2], 0.0)), own[:, ::2]


@once
def at_equal_kl(tier: Tier, beta: float) -> list[tuple[Row, dict[str, Comparison]]]:
    """Every row of :func:`frontiers`, minus the curve of DPO and of MADPO at its own distance."""
    rows = [row for line in frontiers(tier, beta).values() for row in line]
    return [(row, {base: less_at_its_kl(tier, row, base) for base in ("DPO", "MADPO")}) for row in rows]


def less_at_its_kl(tier: Tier, row: Row, base: str = "DPO") -> Comparison:
    """Any row's reward minus that of the base method's curve at the row's KL; none for the base itself."""
    what = f"{row.name} minus {base} at its KL, {tier.label}"
    if row.method in (base, SFT):
        return Comparison(what, missing="it is the base")
    return equal_kl(what, tier, choose(row.name, tier, [row]), base=base)


_DISTANCES = 9  # at which two curves are compared


def _interpolated(grid: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """``np.interp`` of every row: flat beyond the ends."""
    order = np.argsort(x, axis=1, kind="stable")
    x, y = np.take_along_axis(x, order, axis=1), np.take_along_axis(y, order, axis=1)
    at = np.clip(grid, x[:, :1], x[:, -1:])
    left = np.clip((at[:, :, None] >= x[:, None, :]).sum(-1) - 1, 0, max(0, x.shape[1] - 2))
    right = np.minimum(left + 1, x.shape[1] - 1)
    x0, x1, y0, y1 = (np.take_along_axis(v, i, axis=1) for v in (x, y) for i in (left, right))
    width = x1 - x0
    return np.asarray(y0 + (y1 - y0) * np.where(width > 0, (at - x0) / np.where(width > 0, width, 1.0), 1.0))
