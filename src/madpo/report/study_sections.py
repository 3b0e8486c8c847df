"""The sections of a study's page: claims, every method, equal KL, margins, reward models, signs of degeneration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from madpo.report.claims import Claim, counts
from madpo.report.compare import FEWEST, NOT_RUN, Comparison
from madpo.report.drawing import weight_figure
from madpo.report.equal_kl import at_equal_kl
from madpo.report.methods import SFT, settings_words
from madpo.report.numbers import DASH, by_seed, count, one, short
from madpo.report.pages import MARGINS_SHOWN, Cell, Table, cell, limit_of, shown_margins, values_table
from madpo.report.results import Row, Tier
from madpo.report.summary import doubtful, weights_from
from madpo.report.tables import OF_TEXTS, UNEVEN, headings
from madpo.rewards.weight_counts import WeightParameters, count_weights

# Verdict -> class of the style sheet.
KINDS = {"held": "held", "did not hold": "broken", "not separated": "open", NOT_RUN: "absent"}


def sided(c: Comparison) -> str:
    """On which side of its bound a difference is."""
    return "the same answers" if c.same else "above" if c.above else "below" if c.below else "not separated"


# Claims


def claims_view(found: Sequence[Claim], tiers: Sequence[Tier], seeds: int) -> dict[str, Any]:
    """Claims by section, each with its verdict and its numbers; those that were not run; and how to read them."""
    run = [claim for claim in found if claim.verdict != NOT_RUN or claim.partly]
    limit = limit_of(c.value for claim in run for c in claim.made)
    sections: dict[str, list[dict[str, Any]]] = {}
    for claim in run:
        sections.setdefault(claim.section, []).append(_claim(claim, doubtful(claim, tiers), limit))
    absent = [f"{c.text} {'; '.join(dict.fromkeys(x.missing for x in c.comparisons if x.missing != NOT_RUN))}".strip()
              for c in found if c not in run]  # fmt: skip
    made = count(n, "comparison").capitalize() if (n := sum(len(claim.made) for claim in found)) else ""
    head = {"gist": counts(found), "cautions": weights_from(tiers)[:1], "made": made, "seeds": seeds}
    return {**head, "sections": sections, "absent": absent}


def _claim(claim: Claim, doubted: Sequence[str], limit: float) -> dict[str, Any]:
    few = any(c.value is not None and c.value.n < FEWEST for c in claim.made)
    remarks = ["Some of it has too few prompts to be judged."] * few
    if same := sum(c.same for c in claim.made):
        remarks.append(f"{same} of {len(claim.made)} comparisons are of policies that answer alike: not a test.")
    if doubted:
        remarks.append(f"The reward model on {', '.join(doubted)} cannot be distinguished from chance.")
    closest = min(claim.made, key=lambda c: c.value.low - c.bound if c.value else 0.0)
    shown = cell(closest.value, "signed", limit)._replace(small=(closest.shown,))
    rows = [[Cell(c.shown), *_difference(c, limit)] for c in claim.comparisons]
    head = ["difference of mean rewards", "this run", "each seed"]
    numbers = Table(f"Numbers for: {claim.text}", head, rows, plain=True)
    kind = KINDS[claim.verdict]
    return {"claim": claim, "kind": kind, "closest": shown, "remarks": remarks, "numbers": numbers}


def _difference(c: Comparison, limit: float) -> tuple[Cell, Cell]:
    if c.value is None:
        return Cell(DASH, (c.missing,)), Cell(DASH)
    beyond = f", to lie above {one(c.bound, 'signed')}" if c.bound else ""
    note = f"{c.value.n} prompts: {sided(c)}{beyond}"
    note += "".join(f"; without {seed}: {why}" for seed, why in c.left_out.items())
    return cell(c.value, "signed", limit, more=[note]), cell(by_seed(c.per_seed, "signed") or "one seed")


# Results


def tier_results(tier: Tier, reasons: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """Every method of a tier, what is missing and why, and each seed's mean reward."""
    lines = []
    for row in tier.rows:
        words = ", ".join(filter(None, (row.group, settings_words(row.loss))))
        lines.append((Cell(row.name, (words,) if words else ()), row.values, ()))
    # With held-out pairs there are more columns than fit; the texts have a table of their own.
    crowded = any(row["heldout_accuracy"] is not None for row in tier.rows)
    columns = {name: how for name, how in headings(tier).items() if not crowded or name not in OF_TEXTS}
    measured = [row for row in tier.rows if row.per_seed]
    several = any(len(row.seeds) > 1 for row in measured)
    return {
        "label": tier.label,
        "table": values_table(f"Results, {tier.label}", columns, lines, sortable=True),
        "note": UNEVEN if tier.uneven else "",
        "seeds": [(row.name, by_seed(row.per_seed)) for row in measured] if several else [],
        "missing": [(name, reasons.get((tier.name, name), NOT_RUN)) for name in tier.missing],
    }


def equal_kl_table(tiers: Sequence[Tier], beta: float) -> Table | None:
    """What every setting earns more than DPO's and MADPO's curves at the setting's own distance."""
    found = [(tier, row, [*by_base.values()]) for tier in tiers for row, by_base in at_equal_kl(tier, beta)]
    made = [(tier, row, cs) for tier, row, cs in found if any(c.value for c in cs)]
    limit = limit_of(c.value for *_, cs in made for c in cs)
    rows = [
        [
            *(Cell(f"{tier.label}: {row.name}"), cell(row["kl"]), cell(row["oracle_reward"])),
            *(shown for c in cs for shown in _difference(c, limit)),
        ]
        for tier, row, cs in made
    ]
    compared = [head for base in ("DPO", "MADPO") for head in (f"minus {base}'s curve at this KL", "each seed")]
    return Table("Reward at equal KL", ["setting", "KL, nats", "reward", *compared], rows) if rows else None


def temperature_table(tier: Tier) -> Table | None:
    """Reward, and win rate against SFT at the same temperature, of every method at every decoding temperature."""
    at = tier.at_temperatures()
    rows = []
    for row in tier.rows:
        found = [next((own for own in other.rows if own.key == row.key), None) for other in at.values()]
        if any(found):
            cells = [Cell(row.name)]
            for values in [*(own.values if own else {} for own in found), row.values]:
                wins = values.get("win_rate")
                note = f"wins {short(wins, 'share')}" if wins is not None else ""
                cells.append(cell(values.get("oracle_reward"), more=[note]))
            rows.append(cells)
    head = ["method", *(f"{temperature:g}" for temperature in at), "as in the other tables"]
    return Table(f"Decoding temperatures, {tier.label}", head, rows) if rows else None


# Margins, reward models, degeneration


def weighting(tier: Tier) -> tuple[WeightParameters, np.ndarray]:
    """The weight that this run's MADPO used (its first, if there are several), else the paper's; and the training
    margins as it reads them, divided by its ``margin_temperature``."""
    losses = [row.loss for row in tier.rows if {"tau", "c_max"} <= row.loss.keys()]
    given = next((loss for loss in losses if loss.get("kind") == "madpo"), losses[0] if losses else {})
    parameters = WeightParameters(**{name: given[name] for name in WeightParameters._fields if name in given})
    return parameters, tier.margins / float(given.get("margin_temperature", 1.0))


def weights_view(tier: Tier) -> dict[str, Any]:
    """The weight curve over the tier's margins, and what the sliders of the page's script need."""
    parameters, margins = weighting(tier)
    return {
        "tier": tier,
        "parameters": parameters,
        "pairs": len(margins),
        "quantiles": MARGINS_SHOWN if len(margins) > MARGINS_SHOWN else 0,
        "found": count_weights(margins, parameters),
        "figure": weight_figure(margins, parameters, label=f"Weight curve and margins, {tier.label}"),
        "data": {"margins": shown_margins(margins), "parameters": parameters._asdict()},
    }


def reward_models_table(tiers: Sequence[Tier]) -> Table | None:
    """Accuracy and calibration, a line per tier and seed."""
    models = [(tier, seed, model.metrics) for tier in tiers for seed, model in tier.reward_models.items()]
    models += [(tier, f"{seed}, probe", probe.metrics) for tier in tiers for seed, probe in tier.probes.items()]
    lines = []
    for tier, seed, metrics in models:
        first = seed == next(iter(tier.reward_models), None) and len(tier.margins)
        agrees = cell(float((tier.margins > 0).mean()) if first else None, "share")
        lines.append((Cell(f"{tier.label} {seed}".strip()), metrics, [agrees]))
    return values_table("Reward models", MODELS, lines, "tier", ["agrees with its training labels"])


MODELS = {
    "heldout_accuracy": ("accuracy on held-out pairs", "share"),
    "heldout_log_loss": ("log-loss, nats", "number"),
    "temperature": ("fitted temperature", "number"),
    "calibrated_log_loss": ("log-loss after calibration", "number"),
}
DEGENERATION = {
    "length": ("length, tokens", "number"),
    "ended": ("ended by itself", "share"),
    "distinct_1": ("distinct-1", "number"),
    "distinct_2": ("distinct-2", "number"),
    "repeated": ("same text for several prompts", "share"),
    "perplexity": ("perplexity under the reference", "number"),
}
# Quantity -> what is said of a policy, and when, given its value and the SFT model's.
SIGNS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "distinct_2": ("distinct-2 under 0.7 of SFT's", lambda own, base: own < 0.7 * base),
    "length": ("half as long as SFT's", lambda own, base: own <= 0.5 * base),
    "repeated": ("a tenth more repeated texts than SFT's", lambda own, base: own > base + 0.1),
    "perplexity": ("perplexity above three times SFT's", lambda own, base: own > 3 * base),
}


def degeneration_table(tier: Tier) -> Table | None:
    """Whether texts fell apart while the reward rose, next to the SFT model."""
    if not tier.policies:
        return None
    lines = [(Cell(row.name), row.values, [cell("; ".join(doubts(row, tier.sft)) or DASH)]) for row in tier.rows]
    label = f"Degeneration, {tier.label}"
    return values_table(label, DEGENERATION, lines, last=["signs"], plain=True, sortable=True)


def doubts(row: Row, sft: Row | None) -> list[str]:
    """Signs that a policy's text fell apart, against the SFT model; thresholds are rules of thumb, not statistics."""
    if sft is None or row.method == SFT:
        return []
    values = {name: (row.mean(name), sft.mean(name)) for name in SIGNS}
    return [
        SIGNS[name][0]
        for name, (own, base) in values.items()
        if np.isfinite([own, base]).all() and SIGNS[name][1](own, base)
    ]
