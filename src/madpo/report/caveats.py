"""How far a verdict can be trusted, and why a cell is empty: reward models near chance, idle parts, failed steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from madpo.core.metrics import Estimate
from madpo.models.packaged import cut_report
from madpo.report.claims import Claim
from madpo.report.numbers import listed, short
from madpo.report.results import Tier
from madpo.runner.record import Record

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
            f"On {listed(chance)} a reward model cannot be distinguished from chance: there MADPO's weights may be "
            "noise, and verdicts on MADPO say little about MADPO with a reward model that has learned something."
        )
    if little:
        texts.append(
            f"On {listed(little)} a reward model is only a little better than chance: read its results with care."
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
