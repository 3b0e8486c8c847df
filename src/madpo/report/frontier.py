"""Reward against KL to the reference, over beta: what a method earns at the distance that another one went."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from madpo.report.families import Choice, Comparison, choose, family_of, settings_of
from madpo.results import SFT, Row, Tier, at_shared_seeds, over_shared_seeds, shared_seeds
from madpo.selection import BOOTSTRAP_SEED
from madpo.statistics import bootstrap_statistic


def frontiers(tier: Tier, beta: float) -> dict[str, list[Row]]:
    """Per family, the rows of one setting over beta, by beta, all of them over the same training seeds.

    Of several settings the one with the most betas stands for the family; at a tie a core one, then the first.
    """
    lines: dict[str, dict[str, list[Row]]] = {}
    for row in tier.rows:
        if row.name != SFT and row.kls and row.rewards:
            other = repr(sorted((k, repr(v)) for k, v in row.loss.items() if k not in ("beta", "n")))
            lines.setdefault(family_of(row), {}).setdefault(other, []).append(row)
    found = {}
    for family, by_setting in lines.items():
        best = max(by_setting.values(), key=lambda rows: (len(rows), any(r.group in ("", "core") for r in rows)))
        found[family] = sorted(best, key=lambda row: (float(row.loss.get("beta", beta)), row.loss.get("n", 0)))
    even = iter(at_shared_seeds([row for line in found.values() for row in line]))
    return {family: [next(even) for _ in line] for family, line in found.items()}


def equal_kl(tier: Tier, method: Choice | None, what: str) -> Comparison:
    """A method's reward less what plain DPO, over its betas, earns at the same KL.

    DPO's curve is drawn straight between neighbouring betas, in order of KL; prompts are resampled for all rows alike.
    Rewards and KLs are means over the training seeds that all rows have, and every such seed has a curve of its own.
    Beyond the ends of a curve there is nothing to compare with.
    """
    rows = settings_of(tier, "DPO", None)
    if method is None or len(rows) < 2:
        return Comparison(what, missing="not run: it needs the method, and DPO at two or more β")
    everything = [method.row, *rows]
    sides = [*over_shared_seeds(everything), *over_shared_seeds(everything, kls=True)]
    shared = set.intersection(*(set(side) for side in sides))
    if method.chosen:
        shared &= method.reporting
    if len(shared) < 2:
        return Comparison(what, missing="there are no samples of all on the same prompts")
    ids = sorted(shared)
    values = np.array([[side[i] for i in ids] for side in sides]).T
    seeds, means = shared_seeds(everything), {"": values.mean(axis=0)}
    if len(seeds) > 1:
        for seed in seeds:
            of_seed = [*(row.seed_rewards[seed] for row in everything), *(row.seed_kls[seed] for row in everything)]
            means[seed] = np.array([np.mean([side[i] for i in ids]) for side in of_seed])
    for seed, mean in means.items():
        kl, *curve = mean[len(everything) :]
        if not min(curve) <= kl <= max(curve):
            span = f"{min(curve):.1f} to {max(curve):.1f}"
            place = f" in {seed}" if seed else ""
            whose = f"{method.name}'s KL{place}"
            return Comparison(what, missing=f"{whose} is {kl:.1f} nats, and DPO's curve spans {span}")
    per_seed = {seed: float(_above_curve(mean[None])[0]) for seed, mean in means.items() if seed}
    value = bootstrap_statistic(values, _above_curve, seed=BOOTSTRAP_SEED)
    return Comparison(what, value, per_seed or dict.fromkeys(seeds, value.mean), seeds=max(1, len(seeds)))


def less_dpo(tier: Tier, row: Row) -> Comparison:
    """Any row's reward less that of DPO's curve at the row's KL; none for DPO itself."""
    what = f"{row.name} less DPO at its KL, {tier.label}"
    if family_of(row) == "DPO":
        return Comparison(what, missing="DPO is what others are compared with")
    return equal_kl(tier, choose(row.name, tier, [row]), what)


def _above_curve(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns: rewards of the method and of the curve's points, then their KLs in the same order."""
    k = means.shape[1] // 2
    found = np.empty(len(means))
    for i, row in enumerate(means):
        order = np.argsort(row[k + 1 :])
        found[i] = row[0] - np.interp(row[k], row[k + 1 :][order], row[1:k][order])
    return found


def spread_of(rows: Sequence[Row]) -> str:
    """ "β 0.03 to 0.3" for a line, for its legend."""
    betas = [float(row.loss["beta"]) for row in rows if "beta" in row.loss]
    return f"β {min(betas):g} to {max(betas):g}" if len(set(betas)) > 1 else ""
