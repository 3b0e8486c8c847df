"""Choices among settings of one method, and paired comparisons of rewards.

A method that is tried at several settings and reported at its best is flattered, since noise makes the best of six
better than one. So the held-out prompts are cut into two halves (:func:`madpo.report.results.selecting_half`): one half
chooses, and the chosen setting is reported on the other, the reporting half. A method with one setting is reported on
all prompts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from madpo.core.metrics import Estimate
from madpo.report.results import (
    Candidate,
    Row,
    Tier,
    Value,
    cached_on_tier,
    mean_of,
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


@cached_on_tier
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
        left_out: training seed, or curve of the base -> why it is not among them.
        against: the base's curve that it is the difference to, where the base has several.
        column: of the samples, whose mean is compared.
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
    against: str = ""
    column: str = "reward"
    same: bool = False

    @property
    def shown(self) -> str:
        """What is compared, with the base's curve."""
        return f"{self.what} ({self.against})" if self.against else self.what

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


def least_difference(found: Sequence[Comparison]) -> Comparison:
    """Of differences to several of a base's curves, the one that leaves the method least.

    A method is above the base only if it is above every curve; testing all of them, each at the level of one, keeps
    that level (intersection-union test). So a difference that is below 0 comes before one that is not separated, and
    this before one that is above; among those that are alike, the least mean. A method that equals K curves may lie
    below one of them by chance in up to K times the share of one. ``against`` names the curve, unless it is the base's
    only one.
    """
    made = [c for c in found if c.value is not None]
    least = min(made, key=lambda c: (c.above - c.below, c.value.mean if c.value else 0.0), default=found[0])
    rest = {c.against: c.missing for c in found if c.value is None} if made else {}
    return replace(least, against=least.against * (len(found) > 1), left_out={**least.left_out, **rest})


def difference(what: str, sides: Sequence[Choice | None], column: str = "reward", **how: Any) -> Comparison:
    """The first side's reward minus the second's, :func:`madpo.report.results.paired`; of four, (a - b) - (c - d).

    ``column`` is what is compared in the place of the reward. A comparison in which something was chosen is over the
    prompts that all sides may report.
    """
    how["column"] = column
    given = [side for side in sides if side is not None]
    if len(given) < len(sides):
        return Comparison(what, missing=NOT_RUN, **how)
    cells = [side.tier.cells(side.row, column) for side in given]
    reporting = [side.tier.reporting for side in given] if any(side.chosen for side in given) else []
    first = given[0]
    alike = first.tier.others([side.row for side in given if side.tier is first.tier], column)
    found = paired(cells, frozenset.intersection(*reporting) if reporting else None, alike)
    if found is None:
        return Comparison(what, missing="there are no samples of all sides on the same prompts", **how)
    value, per_seed, values = found
    same = len(given) == 2 and given[0].tier is given[1].tier and bool((values[0] == values[1]).all())
    return Comparison(what, value, per_seed, seeds=max(1, len(per_seed)), same=same, **how)
