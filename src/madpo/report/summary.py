"""What a run found, in sentences that are made from its numbers and claim no more than they carry.

An interval that includes 0 is said to separate nothing, few seeds are named, and a reward that was reached at a larger
distance from the reference is called that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from madpo.core.metrics import Estimate
from madpo.report.numbers import count, listed, one, short
from madpo.report.results import Row, Tier

NAMED = 6  # methods that the opening lists; of more, those of the core
SIDES = {"above": "above 0", "below": "below 0", "open": "not separated from 0"}
FAR = 1.1  # times the baseline's KL, from which a distance is worth a word


class Verdict(NamedTuple):
    """A tier's result: who is first and at what level, then how far from plain DPO.

    ``kind``: "above", "below" or "open", the side of that difference; ``left``: settings that are not ranked.
    """

    tier: str
    level: str
    gap: str = ""
    kind: str = "open"
    left: str = ""

    @property
    def text(self) -> str:
        """All of it in sentences."""
        return f"{self.tier}: {' '.join(filter(None, (self.level, self.gap, self.left)))}"


def headline(tiers: Sequence[Tier]) -> list[str]:
    """What was done and what came of it, one paragraph per entry."""
    return [opening(tiers), *(verdict(tier).text for tier in tiers if tier.policies)]


def opening(tiers: Sequence[Tier]) -> str:
    """What was compared, on how many prompts, with how many seeds."""
    judged = [tier for tier in tiers if tier.policies]
    if not judged:
        return "No trained policy has been evaluated yet; what is finished so far is shown below."
    policies = [row for tier in judged for row in tier.policies]
    methods = sorted({row.name for row in policies})
    core = sorted({row.name for row in policies if row.group == "core"})
    few = len(methods) <= NAMED
    named = listed(methods) if few or not core else f"at the core {listed(core)}"
    sizes: dict[int, list[str]] = {}
    for tier in judged:
        sizes.setdefault(len(tier.policies), []).append(tier.label)
    each = f" ({', '.join(f'{n} on {listed(labels)}' for n, labels in sizes.items())})" if len(sizes) > 1 else ""
    seeds = [len(row.seeds) for row in policies]
    fewer = sum(n < max(seeds) for n in seeds)
    less = f" ({fewer} of {len(seeds)} trainings have fewer)" if fewer else ""
    prompts = max((value.n for row in policies if isinstance(value := row["oracle_reward"], Estimate)), default=0)
    return (
        f"{count(len(methods), 'method' if few else 'setting').capitalize()} of preference training ({named}) on "
        f"{listed([tier.label for tier in judged])} pairs{each}, {count(max(seeds), 'training seed')} each{less}"
        f"{f', judged on {prompts} held-out prompts, with 95 % intervals over prompts' if prompts else ''}."
    )


def verdict(tier: Tier) -> Verdict:
    """Which method is first in a tier, and whether it is separated from plain DPO."""
    rows = _ranked(tier)
    found = _best(tier, rows)
    if left := len(tier.policies) - len(rows):
        verb = "is" if left == 1 else "are"
        found = found._replace(left=f"{count(left, 'setting').capitalize()} of fewer seeds {verb} not ranked here.")
    return found


def cautions(tiers: Sequence[Tier]) -> str:
    """What the number of seeds and of settings does to the verdicts; "" where it does nothing."""
    texts = []
    seeds = max(len(row.seeds) for tier in tiers for row in tier.policies)
    if seeds < 3:
        texts.append(
            f"{'One training seed' if seeds == 1 else 'Two training seeds'} cannot show how much the order changes "
            "from training to training; the intervals are only over prompts."
        )
    ranked = [len(_ranked(tier)) for tier in tiers]
    if max(ranked) > 2:
        most = f"{min(ranked)}" if min(ranked) == max(ranked) else f"{min(ranked)} to {max(ranked)}"
        texts.append(
            f"The best of {most} is picked on the same prompts that it is reported on, which flatters it a little."
        )
    return " ".join(texts)


def _ranked(tier: Tier) -> list[Row]:
    """Policies with all seeds of the baseline: the mean of fewer seeds would be ranked by what the seeds differ in."""
    wanted = set(tier.baseline.seeds if tier.baseline is not None else ())
    return [row for row in tier.policies if wanted <= set(row.seeds)]


def _best(tier: Tier, rows: Sequence[Row]) -> Verdict:
    best = max(rows, key=lambda row: row.mean("oracle_reward"))
    baseline, sft = tier.baseline, tier.sft
    reward = short(best["oracle_reward"])
    if sft is not None and best.mean("oracle_reward") <= sft.mean("oracle_reward"):
        level = f"no method has a mean reward above that of the SFT model, {short(sft['oracle_reward'])}"
        return Verdict(tier.label, f"{level}; the best, {best.name}, has {reward}.", kind="below")
    start = f"; the SFT model has {short(sft['oracle_reward'])}" if sft is not None else ""
    level = f"{best.name} has the highest mean reward, {reward}{start}."
    if baseline is None:
        return Verdict(tier.label, level, "There is no plain DPO to compare with.")
    other = best
    if best is baseline:
        others = [row for row in rows if row["difference"] is not None]
        if not others:
            return Verdict(tier.label, level)
        other = max(others, key=lambda row: row.mean("oracle_reward"))
    gap = other["difference"]
    if not isinstance(gap, Estimate):
        gap_words = f"{baseline.name} has {short(baseline['oracle_reward'])}; no paired samples compare the two."
        return Verdict(tier.label, level, gap_words)
    kind = "above" if gap.low > 0 else "below" if gap.high < 0 else "open"
    who = other.name if best is not baseline else f"{best.name} is first. The next, {other.name},"
    words = f"{who} less {baseline.name} on the same prompts: {short(gap, 'signed')}, {SIDES[kind]}."
    near, far = baseline.mean("kl"), best.mean("kl")
    if kind == "above" and far > FAR * near:
        words += (
            f" It also moved further from the reference (KL {one(far, digits=1)} against {one(near, digits=1)} nats), "
            "and distance by itself can raise the reward."
        )
    return Verdict(tier.label, level, words, kind)
