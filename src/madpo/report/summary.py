"""What a run found, in sentences that are made from its numbers and claim no more than they carry.

An interval that includes 0 is said to separate nothing, few seeds are named, and a reward that was reached at a larger
distance from the reference is called that. Then how far a verdict can be trusted, and why a cell is empty: reward
models near chance, idle parts, failed steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from madpo.core.metrics import Estimate
from madpo.models.packaged import cut_report
from madpo.report.claims import Claim
from madpo.report.numbers import count, format_list, one, short, side
from madpo.report.results import Row, Tier
from madpo.runner.record import Record

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
        """All of it in sentences, after the tier where there are several."""
        said = " ".join(filter(None, (self.level, self.gap, self.left)))
        return f"{self.tier}: {said}" if self.tier else said


def opening(tiers: Sequence[Tier]) -> str:
    """What was compared, on how many prompts, with how many seeds."""
    judged = [tier for tier in tiers if tier.policies]
    if not judged:
        return "No trained policy has been evaluated yet; what is finished so far is shown below."
    policies = [row for tier in judged for row in tier.policies]
    methods = sorted({row.name for row in policies})
    core = sorted({row.name for row in policies if row.group == "core"})
    few = len(methods) <= NAMED
    named = format_list(methods) if few or not core else f"at the core {format_list(core)}"
    sizes: dict[int, list[str]] = {}
    for tier in judged:
        sizes.setdefault(len(tier.policies), []).append(tier.label)
    each = f" ({', '.join(f'{n} on {format_list(labels)}' for n, labels in sizes.items())})" if len(sizes) > 1 else ""
    seeds = [len(row.seeds) for row in policies]
    fewer = sum(n < max(seeds) for n in seeds)
    less = f" ({fewer} of {len(seeds)} trainings have fewer)" if fewer else ""
    prompts = max((value.n for row in policies if isinstance(value := row["oracle_reward"], Estimate)), default=0)
    return (
        f"{count(len(methods), 'method' if few else 'setting').capitalize()} of preference training ({named}) on "
        f"{format_list([tier.label for tier in judged])} pairs{each}, {count(max(seeds), 'training seed')} each{less}"
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
            "One training seed cannot show how much the order changes from training to training; the intervals are "
            "only over prompts."
            if seeds == 1
            else "Two training seeds show little of how much the order changes from training to training; intervals of "
            "means are only over prompts, those of differences are over prompts and seeds."
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
    kind = side(gap)
    who = other.name if best is not baseline else f"{best.name} is first. The next, {other.name},"
    words = f"{who} minus {baseline.name} on the same prompts: {short(gap, 'signed')}, {SIDES[kind]}."
    near, far = baseline.mean("kl"), best.mean("kl")
    if kind == "above" and far > FAR * near:
        words += (
            f" It also moved further from the reference (KL {one(far, digits=1)} against {one(near, digits=1)} nats), "
            "and distance by itself can raise the reward."
        )
    return Verdict(tier.label, level, words, kind)


LITTLE = 0.6  # accuracy; below, a reward model above chance is only a little better


def trimmed_base(records: Mapping[str, Record], model: str = "") -> list[str]:
    """That the base model is not the one it is named after, where its vocabulary was cut, and what that costs.

    Args:
        model: the experiment's, which may be a packaged one with a cut vocabulary.
    """
    found: Mapping[str, Any] = records["base"].metrics if "base" in records else cut_report(model) or {}
    entries, before, covered = (found.get(name) for name in ("entries", "entries_before", "covered"))
    if not (isinstance(entries, int) and isinstance(before, int) and isinstance(covered, float)):
        return []
    text = (
        f"The base model's vocabulary was cut to {entries:,} of its {before:,} entries, which cover "
        f"{100 * covered:.1f} % of the corpus, to save time: all that follows rests on this smaller model."
    )
    measures = (found.get(name) for name in ("kl", "nats_per_byte_before", "nats_per_byte"))
    means = [value.mean if isinstance(value, Estimate) else value.get("mean") for value in measures if value]
    if len(means) == 3:
        lost, then, now = means
        text += (
            f" On held-out reviews the cut costs {lost:.3f} nats per token in KL, and takes the model from "
            f"{then:.3f} to {now:.3f} nats per byte."
        )
    return [text]


def unfinished_run(records: Mapping[str, Record], unfinished: Mapping[str, str]) -> str:
    """How far the run is, in one sentence; empty where it is complete."""
    if not unfinished:
        return ""
    failed = sum(why.startswith("failed") for why in unfinished.values())
    waiting = len(unfinished) - failed
    parts = [f"{failed} failed"] * bool(failed)
    parts += [f"{waiting} {'is' if waiting == 1 else 'are'} still to run"] * bool(waiting)
    n = len(records)
    return (
        f"This run is not complete: of {n + len(unfinished)} steps {n} {'is' if n == 1 else 'are'} done, "
        f"{' and '.join(parts)}. What follows is about the finished ones."
    )


def accuracies(tier: Tier) -> dict[str, Estimate]:
    """Seed -> the reward model's accuracy on held-out pairs."""
    found = {seed: model.metrics.get("heldout_accuracy") for seed, model in tier.reward_models.items()}
    return {seed: value for seed, value in found.items() if isinstance(value, Estimate)}


def in_words(values: Mapping[str, Estimate]) -> str:
    """ "71 % (63 % to 77 %), ...", a share per seed."""
    return ", ".join(short(value, "share") for value in values.values())


def near_chance(tier: Tier) -> bool:
    """Whether the interval of some reward model of the tier includes chance, one half."""
    return any(value.low <= 0.5 for value in accuracies(tier).values())


def weights_from(tiers: Sequence[Tier]) -> list[str]:
    """Sentences on what the weights are made of: how often each tier's reward models are right."""
    given = {tier.label: accuracies(tier) for tier in tiers}
    parts = [f"{label} {in_words(values)}" for label, values in given.items() if values]
    if not parts:
        return []
    texts = [
        "MADPO's weights come from reward models that order held-out pairs as labelled, with 95 % intervals, in: "
        f"{'; '.join(parts)}; chance is 50 %."
    ]
    chance = [tier.label for tier in tiers if near_chance(tier)]
    little = [
        tier.label
        for tier in tiers
        if not near_chance(tier) and any(value.mean < LITTLE for value in accuracies(tier).values())
    ]
    if chance:
        texts.append(
            f"On {format_list(chance)} a reward model cannot be distinguished from chance: there MADPO's weights may "
            "be noise, and verdicts on MADPO say little about MADPO with a reward model that has learned something."
        )
    if little:
        texts.append(
            f"On {format_list(little)} a reward model is only a little better than chance: read its results with care."
        )
    return texts


def idle_parts(tiers: Sequence[Tier]) -> list[str]:
    """Where MADPO's parts are no methods of their own, since no margin reaches tau: a sentence per tier."""
    texts = []
    for tier in tiers:
        parts = [row.loss for row in tier.rows if row.loss.get("part") in ("amplify", "dampen")]
        losses = [loss for loss in parts if loss.get("tau")]
        if not losses or not len(tier.margins):
            continue
        largest = float(tier.margins.max())
        idle = [x for x in losses if largest < float(x["tau"]) * float(x.get("margin_temperature", 1.0))]
        if idle:
            taus = " and ".join(f"{tau:g}" for tau in sorted({float(loss["tau"]) for loss in idle}))
            texts.append(
                f"On {tier.label} no margin of the training pairs (first seed) reaches τ = {taus}, the largest is "
                f"{largest:.2f}: there Reg-Only changes no weight and is DPO, and Amp-Only is MADPO."
            )
    return texts


def doubtful(claim: Claim, tiers: Sequence[Tier]) -> list[str]:
    """Labels of the tiers that a claim on margins uses and that have a reward model near chance."""
    if not claim.reads_margins:
        return []
    words = [c.what for c in claim.comparisons if c.value is not None]
    return [tier.label for tier in tiers if near_chance(tier) and any(tier.label in what for what in words)]


def empty_cells(
    tiers: Sequence[Tier], rows: Iterable[Mapping[str, Any]], unfinished: Mapping[str, str]
) -> dict[tuple[str, str], str]:
    """(tier, row's name) -> why a planned row has no evaluation there: "failed", "not run: ... failed" or "not run"."""
    rows = list(rows)
    keys = {str(row["name"]): str(row.get("key", "")) for row in rows}
    # Agreeing or re-drawn pairs and margins out of fold are made by steps that are called so.
    own_kinds = {str(row["name"]): (row.get("pairs"), row.get("margins")) for row in rows}
    found = {}
    for tier in tiers:
        for name in tier.missing:
            own = [f"policy/{tier.name}/{keys.get(name)}/", f"evaluation/{tier.name}/{keys.get(name)}/"]
            kinds = ("pairs", "reward_model", "margins", "reference", *own_kinds.get(name, ()))
            shared = ["oracle", "base", "sft", "responses", *(f"{kind}/{tier.name}/" for kind in kinds)]
            states = {step: why for step, why in unfinished.items() if step.startswith(tuple(own))}
            above = [s for s, why in unfinished.items() if why.startswith("failed") and s.startswith(tuple(shared))]
            if any(why.startswith("failed") for why in states.values()):
                found[tier.name, name] = "failed"
            elif above:
                found[tier.name, name] = f"not run: {above[0]} failed"
            elif "begun" in states.values():
                found[tier.name, name] = "begun, not finished"
            else:
                found[tier.name, name] = "not run"
    return found
