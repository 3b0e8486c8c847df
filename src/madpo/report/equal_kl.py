"""Rewards at equal KL: a method against the curves of a base method over its betas, one for each learning rate."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from madpo.core.statistics import bootstrap_statistic, over_repetitions
from madpo.report.compare import NOT_RUN, Choice, Comparison, base_beta, choose, least_difference
from madpo.report.methods import SFT
from madpo.report.results import BOOTSTRAP_SEED, Row, Tier, against, cached_on_tier

Floats = NDArray[np.float64]


@cached_on_tier
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
    of the seeds widens (:func:`madpo.core.statistics.over_repetitions`, with the tier's other settings above the same
    curve). Beyond the ends of a curve there is nothing to compare with: such seeds are left out, and so are those in
    which the base has fewer than two settings.

    The base has a curve for each learning rate that it was trained at, and the difference is to the curve that leaves
    the least of it (:func:`madpo.report.compare.least_difference`): what is trained less may lie above another curve
    by that.

    Args:
        base: "DPO", or "MADPO" at its setting with the most betas.
        line: further settings of the chosen one over beta. The difference is then the mean over the distances that both
            curves span; else it is taken at the one setting's own distance.
    """
    own = list(line) or ([] if choice is None else [choice.row])
    keys, found = {row.key for row in own}, []
    for method, rows in frontiers(tier, base_beta([tier])).items():
        curve = [row for row in rows if row.key not in keys]
        if choice is not None and len(curve) > 1 and rows[0].family == base and method != choice.row.method:
            found.append(_above_curve(Comparison(what, against=method, **how), tier, choice, own, curve))
    needs = f"{NOT_RUN}: it needs the method, and {base} at two or more β"
    return least_difference(found) if found else Comparison(what, missing=needs, **how)


def _above_curve(
    comparison: Comparison, tier: Tier, choice: Choice, own: Sequence[Row], curve: Sequence[Row]
) -> Comparison:
    """The answer for one curve of the base."""
    keys, base = {row.key for row in own}, comparison.against
    both = _curves(tier, own, curve, (choice.name, base), tier.reporting if choice.chosen else None)
    if not both.spans:
        return replace(comparison, missing=both.missing)
    per_seed = both.per_seed()
    over_prompts = bootstrap_statistic(both.values, lambda means: both.above(means).mean(axis=1), seed=BOOTSTRAP_SEED)
    others = [found for key, found in _each_above(tier, base).items() if key not in keys]
    wide = per_seed.keys() if len(per_seed) > 1 else {*per_seed}.union(*others)
    alike = [[found[seed] for seed in sorted(wide)] for found in others if found.keys() >= wide]
    value = over_repetitions(over_prompts, [*per_seed.values()], alike)
    return replace(comparison, value=value, per_seed=per_seed, seeds=len(per_seed), left_out=both.out)


@cached_on_tier
def _each_above(tier: Tier, base: str) -> dict[str, dict[str, float]]:
    """Key of every trained row but the base's -> seed -> how far it lies above the base's curve at its own distance."""
    curve = frontiers(tier, base_beta([tier])).get(base, [])
    rows = [row for row in tier.policies if row.method != base]
    return {row.key: _curves(tier, [row], curve, (row.name, base)).per_seed() for row in rows}


@dataclass(frozen=True, eq=False)
class _Curves:
    """Some settings of a method, and a base's curve, in every training seed that has both.

    Attributes:
        values: prompts by columns: reward and KL of one setting after the other.
        sides: seed -> columns of the method's settings, and of the base's with the SFT model.
        spans: seed -> roots of the KLs between which both reach; out: seed -> why it has none.
        missing: why no seed has any.
    """

    values: Floats
    sides: Mapping[str, Sequence[slice]] = field(default_factory=dict)
    spans: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    out: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""

    def above(self, means: Floats) -> Floats:
        """Means of the columns (draws, columns) -> how far the method lies above the base (draws, seeds)."""
        found = []
        for seed, (low, high) in self.spans.items():
            (x, y), (u, v) = (_along(means, part) for part in self.sides[seed])
            grid = x if x.shape[1] == 1 else np.linspace(low, high, _DISTANCES)[None]
            found.append((_interpolated(grid, x, y) - _interpolated(grid, u, v)).mean(axis=1))
        return np.stack(found, axis=1)

    def per_seed(self) -> dict[str, float]:
        """:meth:`above` of the prompts as they are, by seed."""
        if not self.spans:
            return {}
        return dict(zip(self.spans, self.above(self.values.mean(axis=0)[None])[0].tolist(), strict=True))


def _curves(
    tier: Tier, own: Sequence[Row], curve: Sequence[Row], names: tuple[str, str], among: Collection[int] | None = None
) -> _Curves:
    """Of a method's settings and a base's, called ``names``, on the prompts ``among`` (None: all)."""
    name, base = names
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
        return _Curves(np.empty(0), missing=f"no training seed has {name} and two or more β of {base}")
    table = pd.concat(columns, axis=1).dropna().sort_index()
    values = table.to_numpy() if among is None else table[table.index.isin(list(among))].to_numpy()
    if len(values) < 2:
        return _Curves(values, missing="there are no samples of all on the same prompts")
    spans = {}
    for seed, parts in sides.items():
        ends = [(float(x.min()), float(x.max())) for x, _ in (_along(values.mean(axis=0)[None], p) for p in parts)]
        low, high = max(end[0] for end in ends), min(end[1] for end in ends)
        if low <= high:
            spans[seed] = low, high
            continue
        at, span = (" to ".join(dict.fromkeys(f"{x**2:{'.1f' if x >= 1 else '.2g'}}" for x in end)) for end in ends)
        out[seed] = f"{name}'s KL is {at} nats, and {base}'s curve spans {span}"
    missing = "; ".join(f"{seed}: {why}" if len(out) > 1 else why for seed, why in out.items())
    return _Curves(values, sides, spans, out, "" if spans else missing)


def _sampled(tier: Tier, row: Row) -> frozenset[str]:
    """The row's training seeds of which there are rewards and KLs."""
    has = [tier.cells(row, column).notna().any() for column in ("reward", "kl")]
    return frozenset(seed for seed in row.seeds if all(found[seed] for found in has))


def _along(means: Floats, part: slice) -> tuple[Floats, Floats]:
    """Roots of the KLs and rewards of some settings, of columns that have the reward and the KL of each."""
    own = means[:, part]
    return np.sqrt(np.maximum(own[:, 1::2], 0.0)), own[:, ::2]


@cached_on_tier
def at_equal_kl(tier: Tier, beta: float) -> list[tuple[Row, dict[str, Comparison]]]:
    """Every row of :func:`frontiers`, minus the curve of DPO and of MADPO at its own distance."""
    rows = [row for line in frontiers(tier, beta).values() for row in line]
    return [(row, {base: difference_at_its_kl(tier, row, base) for base in ("DPO", "MADPO")}) for row in rows]


def difference_at_its_kl(tier: Tier, row: Row, base: str = "DPO") -> Comparison:
    """Any row's reward minus that of the base method's curve at the row's KL; none for the base itself."""
    what = f"{row.name} minus {base} at its KL, {tier.label}"
    if row.method in (base, SFT):
        return Comparison(what, missing="it is the base")
    return equal_kl(what, tier, choose(row.name, tier, [row]), base=base)


_DISTANCES = 9  # at which two curves are compared


def _interpolated(grid: Floats, x: Floats, y: Floats) -> Floats:
    """``np.interp`` of every row: flat beyond the ends."""
    order = np.argsort(x, axis=1, kind="stable")
    x, y = np.take_along_axis(x, order, axis=1), np.take_along_axis(y, order, axis=1)
    at = np.clip(grid, x[:, :1], x[:, -1:])
    left = np.clip((at[:, :, None] >= x[:, None, :]).sum(-1) - 1, 0, max(0, x.shape[1] - 2))
    right = np.minimum(left + 1, x.shape[1] - 1)
    x0, x1, y0, y1 = (np.take_along_axis(v, i, axis=1) for v in (x, y) for i in (left, right))
    width = x1 - x0
    return np.asarray(y0 + (y1 - y0) * np.where(width > 0, (at - x0) / np.where(width > 0, width, 1.0), 1.0))
