"""The sections of a study's page: claims, every method, equal KL, margins, reward models, signs of degeneration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from madpo.core.metrics import Estimate
from madpo.report.caveats import doubtful, weights_from
from madpo.report.claims import Claim, counts, tested
from madpo.report.compare import NOT_RUN, Comparison, at_equal_kl
from madpo.report.methods import SFT, settings_words
from madpo.report.numbers import DASH, count, interval, one, short
from madpo.report.pages import MARGINS_SHOWN, Cell, Table, cell, shown_margins
from madpo.report.results import Row, Tier, Value
from madpo.report.tables import COLUMNS, UNEVEN, shown_columns
from madpo.report.weight_figure import weight_figure
from madpo.rewards.weight_counts import WeightParameters, count_weights

# Verdict -> class of the style sheet.
KINDS = {"held": "held", "did not hold": "broken", "not separated": "open", NOT_RUN: "absent"}


def sided(c: Comparison) -> str:
    """On which side of its bound a difference is."""
    return "the same answers" if c.same else "above" if c.above else "below" if c.below else "not separated"


# Claims


class ClaimView(NamedTuple):
    """A claim as a line of a table that opens."""

    claim: Claim
    kind: str
    closest: Cell
    remarks: list[str]
    numbers: Table


class ClaimsView(NamedTuple):
    """Claims by section; those that were not run at all, with the reason; and how to read them."""

    gist: str
    sections: dict[str, list[ClaimView]]
    absent: list[str]
    cautions: list[str]


def claims_view(found: Sequence[Claim], tiers: Sequence[Tier], seeds: int) -> ClaimsView:
    """Every claim with its verdict and its numbers."""
    run = [claim for claim in found if claim.verdict != NOT_RUN or claim.partly]
    gaps = [v for claim in run for c in claim.made if (v := c.value)]
    limit = max((max(abs(v.low), abs(v.high)) for v in gaps), default=1.0)
    sections: dict[str, list[ClaimView]] = {}
    for claim in run:
        sections.setdefault(claim.section, []).append(_claim(claim, doubtful(claim, tiers), limit))
    absent = [f"{c.text} {'; '.join(dict.fromkeys(x.missing for x in c.comparisons if x.missing != NOT_RUN))}".strip()
              for c in found if c not in run]  # fmt: skip
    texts = [*weights_from(tiers)[:1]]
    if n := tested(found):
        texts.append(
            f"{count(n, 'comparison').capitalize()} were made. If no method differed from another, about one interval "
            "in 20 would still exclude 0 by chance. Intervals are over prompts: they do not hold what another training "
            "would change."
        )
        if seeds < 3:
            texts.append(
                "One training seed says nothing about how results change from training to training."
                if seeds == 1
                else "Two training seeds show no significance: a verdict asks that both agree, and no more."
            )
    return ClaimsView(counts(found), sections, absent, texts)


def _claim(claim: Claim, doubted: Sequence[str], limit: float) -> ClaimView:
    remarks = ["Some of it has too few prompts to be judged."] if claim.too_few else []
    if same := sum(c.same for c in claim.made):
        remarks.append(f"{same} of {len(claim.made)} comparisons are of policies that answer alike: not a test.")
    if doubted:
        remarks.append(f"The reward model on {', '.join(doubted)} cannot be distinguished from chance.")
    closest = min(claim.made, key=lambda c: c.value.low - c.bound if c.value else 0.0)
    shown = cell(closest.value, "signed", limit)._replace(small=(closest.what,))
    rows = [[Cell(c.what), _difference(c, limit), cell(_seeds(c))] for c in claim.comparisons]
    numbers = Table(
        f"Numbers for: {claim.text}", ["difference of mean rewards", "this run", "each seed"], rows, plain=True
    )
    return ClaimView(claim, KINDS[claim.verdict], shown, remarks, numbers)


def _difference(c: Comparison, limit: float) -> Cell:
    if c.value is None:
        return Cell(DASH, (c.missing,))
    beyond = f", to lie above {one(c.bound, 'signed')}" if c.bound else ""
    words = f"{interval(c.value, 'signed')} over {c.value.n} prompts: {sided(c)}{beyond}"
    return cell(c.value, "signed", limit)._replace(small=(words,))


def _seeds(c: Comparison) -> str:
    own = "one seed" if c.value is not None else DASH
    return ", ".join(f"{seed} {one(value, 'signed')}".strip() for seed, value in c.per_seed.items()) or own


# Results


class TierResults(NamedTuple):
    """Every method of a tier, what is missing and why, and each seed's mean reward."""

    label: str
    table: Table
    note: str
    seeds: list[tuple[str, str]]
    missing: list[tuple[str, str]]


def tier_results(tier: Tier, reasons: Mapping[tuple[str, str], str]) -> TierResults:
    """The table of a tier."""
    columns = shown_columns(tier)
    gaps = [gap for row in tier.rows if isinstance(gap := row["difference"], Estimate)]
    limit = max((max(abs(gap.low), abs(gap.high)) for gap in gaps), default=1.0)
    rows = []
    for row in tier.rows:
        cells = [cell(row[c], how := COLUMNS[c][1], limit if how == "signed" else None) for c in columns]
        words = ", ".join(filter(None, (row.group, settings_words(row.loss))))
        rows.append([Cell(row.name, (words,) if words else ()), *cells])
    head = ["method", *(COLUMNS[c][0] for c in columns)]
    measured = [row for row in tier.rows if row.per_seed]
    several = any(len(row.seeds) > 1 for row in measured)
    seeds = [(r.name, ", ".join(f"{s} {one(v)}" for s, v in r.per_seed.items())) for r in measured] if several else []
    missing = [(name, reasons.get((tier.name, name), NOT_RUN)) for name in tier.missing]
    table = Table(f"Results, {tier.label}", head, rows, sortable=True)
    return TierResults(tier.label, table, UNEVEN if tier.uneven else "", seeds, missing)


def equal_kl_table(tiers: Sequence[Tier], beta: float) -> Table | None:
    """What every setting earns more than DPO's and MADPO's curves at the setting's own distance."""
    found = [(tier, row, compared) for tier in tiers for row, compared in at_equal_kl(tier, beta)]
    made = [(tier, row, cs) for tier, row, cs in found if any(c.value for c in cs.values())]
    gaps = [c.value for *_, cs in made for c in cs.values() if c.value]
    limit = max((max(abs(gap.low), abs(gap.high)) for gap in gaps), default=1.0)
    rows = [
        [
            Cell(f"{tier.label}: {row.name}"),
            cell(row["kl"]),
            cell(row["oracle_reward"]),
            *(shown for c in cs.values() for shown in (_difference(c, limit), cell(_seeds(c)))),
        ]
        for tier, row, cs in made
    ]
    compared = [head for base in ("DPO", "MADPO") for head in (f"less {base}'s curve at this KL", "each seed")]
    return Table("Reward at equal KL", ["setting", "KL, nats", "reward", *compared], rows) if rows else None


def temperature_table(tier: Tier) -> Table | None:
    """Reward, and win rate against SFT at the same temperature, of every method at every decoding temperature."""
    at = tier.at_temperatures()
    rows = []
    for row in tier.rows:
        found = [next((own for own in other.rows if own.key == row.key), None) for other in at.values()]
        if any(found):
            values = [*((own["oracle_reward"], own["win_rate"]) if own else (None, None) for own in found)]
            values.append((row["oracle_reward"], row["win_rate"]))
            rows.append([Cell(row.name), *(_rewarded(*value) for value in values)])
    head = ["method", *(f"{temperature:g}" for temperature in at), "as in the other tables"]
    return Table(f"Decoding temperatures, {tier.label}", head, rows) if rows else None


def _rewarded(reward: Value, wins: Value) -> Cell:
    own = cell(reward)
    return own if wins is None else own._replace(small=(*own.small, f"wins {short(wins, 'share')}"))


# Margins, reward models, degeneration


def weighting(tier: Tier) -> tuple[WeightParameters, np.ndarray]:
    """The weight that this run's MADPO used (its first, if there are several), else the paper's; and the training
    margins as it reads them, divided by its ``margin_temperature``."""
    losses = [row.loss for row in tier.rows if {"tau", "c_max"} <= row.loss.keys()]
    given = next((loss for loss in losses if loss.get("kind") == "madpo"), losses[0] if losses else {})
    parameters = WeightParameters(**{name: given[name] for name in WeightParameters._fields if name in given})
    return parameters, tier.margins / float(given.get("margin_temperature", 1.0))


def weight_data(tier: Tier) -> dict[str, Any]:
    """What the sliders of a tier's weight curve need."""
    parameters, margins = weighting(tier)
    return {"margins": shown_margins(margins), "parameters": parameters._asdict()}


def weights_view(tier: Tier) -> dict[str, Any]:
    """The weight curve over the tier's margins, which the page's script brings to life."""
    parameters, margins = weighting(tier)
    n, first = len(margins), " (of the first training seed)" if len(tier.reward_models) > 1 else ""
    found = count_weights(margins, parameters)
    few = f" The figure shows {MARGINS_SHOWN} evenly spaced quantiles of them." if n > MARGINS_SHOWN else ""
    text = (
        f"With τ = {parameters.tau:g}, c_max = {parameters.c_max:g}, λ = {parameters.lam:g}, of {n} training "
        f"pairs{first} {found.amplified} are amplified, {found.dampened} dampened, {found.turned_down} turned down "
        f"since the reward model contradicts their label, and {found.unchanged} left as they are; mean weight "
        f"{found.mean:.3f}, effective sample size {found.effective:.0f}.{few}"
    )
    figure = weight_figure(margins, parameters, label=f"Weight curve and margins, {tier.label}")
    return {"name": tier.name, "label": tier.label, "text": text, "figure": figure}


def reward_models_table(tiers: Sequence[Tier]) -> Table | None:
    """Accuracy and calibration, a line per tier and seed."""
    names = {
        "heldout_accuracy": ("accuracy on held-out pairs", "share"),
        "heldout_log_loss": ("log-loss, nats", "number"),
        "temperature": ("fitted temperature", "number"),
        "calibrated_log_loss": ("log-loss after calibration", "number"),
    }
    models = [(tier, seed, model.metrics) for tier in tiers for seed, model in tier.reward_models.items()]
    models += [(tier, f"{seed}, probe", probe.metrics) for tier in tiers for seed, probe in tier.probes.items()]
    shown = [name for name in names if any(name in metrics for _, _, metrics in models)]
    rows = []
    for tier, seed, metrics in models:
        first = seed == next(iter(tier.reward_models), None) and len(tier.margins)
        agrees = cell(float((tier.margins > 0).mean()), "share") if first else Cell(DASH)
        values = [value if isinstance(value := metrics.get(name), Estimate | float | int) else None for name in shown]
        cells = [cell(value, names[name][1]) for name, value in zip(shown, values, strict=True)]
        rows.append([Cell(f"{tier.label} {seed}".strip()), *cells, agrees])
    head = ["tier", *(names[name][0] for name in shown), "agrees with its training labels"]
    return Table("Reward models", head, rows) if shown else None


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
    shown = [name for name in DEGENERATION if any(row[name] is not None for row in tier.rows)]
    if not shown or not tier.policies:
        return None
    rows = [
        [
            Cell(row.name),
            *(cell(row[name], DEGENERATION[name][1]) for name in shown),
            cell("; ".join(doubts(row, tier.sft)) or DASH),
        ]
        for row in tier.rows
    ]
    head = ["method", *(DEGENERATION[name][0] for name in shown), "signs"]
    return Table(f"Degeneration, {tier.label}", head, rows, plain=True, sortable=True)


def doubts(row: Row, sft: Row | None) -> list[str]:
    """Signs that a policy's text fell apart, against the SFT model; thresholds are rules of thumb, not statistics."""
    if sft is None or row.name == SFT:
        return []
    values = {name: (row.mean(name), sft.mean(name)) for name in SIGNS}
    return [
        SIGNS[name][0]
        for name, (own, base) in values.items()
        if np.isfinite([own, base]).all() and SIGNS[name][1](own, base)
    ]
