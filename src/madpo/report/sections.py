"""What the page says, section by section: results, claims, figures, margins, reward models, training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from madpo.core.metrics import Estimate
from madpo.report import published
from madpo.report.caveats import accuracies, doubtful, in_words, near_chance, weights_from
from madpo.report.charts import Chart
from madpo.report.claims import Claim, tested
from madpo.report.compare import NOT_RUN, Choice, Comparison, frontiers, less_dpo
from madpo.report.drawing import chart_html
from madpo.report.figures import weight_figure
from madpo.report.markup import MARGINS_SHOWN, details, note, nothing, table
from madpo.report.methods import SFT, settings_words
from madpo.report.numbers import DASH, interval, one, write
from madpo.report.results import Row, Tier
from madpo.report.tables import COLUMNS, UNEVEN, shown_columns
from madpo.rewards.weight_counts import WeightParameters, count_weights

SPOKEN = 4  # differences that a claim spells out; its table has all

# Verdict -> class of the style sheet.
_KINDS = {"held": "held", "did not hold": "broken", "not separated": "open", NOT_RUN: "absent"}


# Claims


def claims_html(found: Sequence[Claim], seeds: int, tiers: Sequence[Tier] = ()) -> str:
    """Every claim with its verdict and its numbers; what was not run at all is folded away."""
    run = [claim for claim in found if claim.verdict != NOT_RUN or claim.partly]
    absent = [claim for claim in found if claim not in run]
    parts = []
    for section in dict.fromkeys(claim.section for claim in run):
        cards = "".join(_claim(claim, doubtful(claim, tiers)) for claim in run if claim.section == section)
        parts.append(f"<h3>{escape(section)}</h3>{cards}")
    if not run:
        parts.append(nothing("No claim of the paper can be tested on what is finished."))
    if absent:
        items = "".join(f"<li>{escape(_absent(claim))}</li>" for claim in absent)
        parts.append(details(f"{len(absent)} claims not run", f"<ul>{items}</ul>"))
    n = tested(found)
    if not n:
        return "".join(parts)
    caution = ["".join(f"<p>{escape(text)}</p>" for text in weights_from(tiers))]
    cautions = (
        f"{_comparisons(n)}. If no method differed from another, about one interval in 20 would still exclude 0 by "
        "chance. Intervals are over prompts: they do not hold what another training would change."
    )
    if seeds < 3:
        cautions += " " + (
            "One training seed says nothing about how results change from training to training."
            if seeds == 1
            else "Two training seeds alone claim no significance: a verdict asks that both agree, and no more."
        )
        single = sum(c.value is not None and c.seeds == 1 for claim in found for c in claim.comparisons)
        if seeds == 2 and single:
            cautions += f" {single} of the comparisons have one seed alone, and nothing to agree with."
    box = f'<div class="caution">{caution[0]}</div>' if caution[0] else ""
    return box + note(cautions) + "".join(parts)


def _comparisons(n: int) -> str:
    return "One comparison was made" if n == 1 else f"{n} comparisons were made"


def _absent(claim: Claim) -> str:
    reasons = dict.fromkeys(c.missing for c in claim.comparisons if c.missing and c.missing != NOT_RUN)
    return f"{claim.text} {'; '.join(reasons)}".strip()


def _claim(claim: Claim, doubted: Sequence[str]) -> str:
    run = [c for c in claim.comparisons if c.value is not None]
    remarks = ["Some of it stands on too few prompts to be judged."] if claim.too_few else []
    if same := sum(c.same for c in run):
        remarks.append(f"{same} of {len(run)} comparisons are of policies that answer alike, and test nothing.")
    if doubted:
        remarks.append(f"The reward model on {', '.join(doubted)} cannot be distinguished from chance.")
    doubts = f'<p class="doubt">{escape(" ".join(remarks))}</p>' if remarks else ""
    paper = f"<p><b>In the paper:</b> {escape(claim.paper)}.</p>" if claim.paper else ""
    words = "; ".join(f"{c.what} {write(c.value, 'signed')}" for c in run[:SPOKEN])
    more = f"; and {len(run) - SPOKEN} more below" if len(run) > SPOKEN else ""
    rows = [[escape(c.what), _difference(c), _seeds(c)] for c in claim.comparisons]
    head = ("difference of mean rewards", "this run", "each seed")
    numbers = table(head, rows, f"Numbers for: {claim.text}", plain=True)
    return (
        f'<article class="claim {_KINDS[claim.verdict]}"><h4>{escape(claim.text)}</h4>'
        f'<p class="verdict">{escape(claim.shown)}</p>{doubts}<p>{escape(claim.reading)}</p>'
        f"<p><b>This run:</b> {escape(words)}{more}.</p>{paper}"
        f"{details('The numbers, seed by seed', numbers)}</article>"
    )


def _difference(c: Comparison) -> str:
    if c.value is None:
        return f"<small>{escape(c.missing)}</small>"
    beyond = f", to lie above {one(c.bound, 'signed')}" if c.bound else ""
    mark = "the same answers" if c.same else "above" if c.above else "below" if c.below else "not separated"
    return (
        f"<b>{one(c.value.mean, 'signed')}</b><small>{interval(c.value, 'signed')} over {c.value.n} prompts: "
        f"{mark}{beyond}</small>"
    )


def _seeds(c: Comparison) -> str:
    alone = "one seed" if c.value is not None else DASH
    return escape(", ".join(f"{seed} {one(value, 'signed')}".strip() for seed, value in c.per_seed.items()) or alone)


# Results


def main_table(
    tiers: Sequence[Tier],
    choices: Mapping[tuple[str, str], Choice],
    beta: float,
    reasons: Mapping[tuple[str, str], str] | None = None,
) -> str:
    """Table 1: methods by tiers, this run above the paper.

    Args:
        reasons: (tier, method of the table) -> why there is no value, where it is not "not run".
    """
    if not choices:
        return nothing("None of the paper's four methods has been evaluated yet.")
    shown = tiers
    seeds = max(len(choice.row.seeds) for choice in choices.values())
    rows = []
    for name in published.METHODS:
        cells = [
            _main_cell(
                choices.get((tier.name, name)),
                published.TABLE_1[name].get(tier.name),
                (reasons or {}).get((tier.name, name), NOT_RUN),
                seeds,
            )
            for tier in shown
        ]
        rows.append([escape(name), *cells])
    if any(accuracies(tier) for tier in shown):
        rows.append(["reward model, right on held-out pairs", *map(_accuracy_cell, shown)])
    numbers: dict[str, set[int]] = {}
    for (_, name), choice in sorted(choices.items()):
        numbers.setdefault(name, set()).add(choice.settings)
    counts = ", ".join(f"{name} {' or '.join(map(str, sorted(n)))}" for name, n in numbers.items())
    text = (
        f"Settings per method, at β = {beta:g}: {counts}. Of several settings one is chosen on one half of the "
        "held-out prompts and reported on the other half, since the best of several is flattered on the prompts that "
        "choose it. A method with one setting is reported on all prompts."
    )
    return table(("method", *(tier.label for tier in shown)), rows, "Table 1") + note(text)


def _accuracy_cell(tier: Tier) -> str:
    found = accuracies(tier)
    if not found:
        return f"<b>{DASH}</b>"
    chance = "<small>not distinguished from chance</small>" if near_chance(tier) else ""
    return "".join(f"<small>{escape(in_words({seed: v}))}</small>" for seed, v in found.items()) + chance


def _main_cell(choice: Choice | None, paper: tuple[float, float] | None, reason: str, seeds: int) -> str:
    theirs = f'<small class="paper">paper {paper[0]:.2f} (s.e. {paper[1]:.2f})</small>' if paper else ""
    if choice is None:
        return f"<b>{DASH}</b><small>{escape(reason)}</small>{theirs}"
    value = choice.value
    own = f"<b>{one(value.mean)}</b><small>{interval(value)}</small>" if isinstance(value, Estimate) else _cell(value)
    if choice.chosen:
        own += f"<small>{escape(choice.row.name)}, of {choice.settings}</small>"
        own += f"<small>the paper's way: {write_short(choice.best_value)}</small>"
    per_seed = [value for seed, value in choice.row.per_seed.items() if seed in choice.seeds]
    if len(per_seed) > 1:
        own += f"<small>seeds {', '.join(map(one, per_seed))}</small>"
    if len(choice.seeds) < seeds:
        own += f"<small>{len(choice.seeds)} of {seeds} seeds</small>"
    return own + theirs


def selections_html(tiers: Sequence[Tier], found: Mapping[str, Sequence[Choice]]) -> str:
    """The experiment's own choices: what was chosen in each tier, among how many, and what it is worth."""
    rows = []
    for name, choices in found.items():
        by_tier = {choice.tier.name: choice for choice in choices}
        rows.append([escape(name), *(_selection_cell(by_tier.get(tier.name)) for tier in tiers)])
    if not rows:
        return ""
    head = ("choice", *(tier.label for tier in tiers))
    text = "What the experiment lists as choices, made and reported in the same way."
    return f"<h3>Other choices</h3>{note(text)}{table(head, rows, 'Other choices')}"


def _selection_cell(choice: Choice | None) -> str:
    if choice is None:
        return f"<b>{DASH}</b><small>not run</small>"
    prompts = f", {choice.value.n} prompts" if isinstance(choice.value, Estimate) else ""
    return (
        f"{_cell(choice.value)}<small>{escape(choice.row.name)}, of {choice.settings}</small>"
        f"<small>{escape(', '.join(choice.seeds))}{prompts}</small>"
    )


def write_short(value: Estimate | float | None) -> str:
    """The mean alone."""
    return write(value.mean if isinstance(value, Estimate) else value)


def tier_results(tier: Tier, reasons: Mapping[tuple[str, str], str] | None = None) -> str:
    """Every method of a tier, with what is missing and why."""
    columns = shown_columns(tier)
    limit = max(
        (max(abs(d.low), abs(d.high)) for r in tier.rows if isinstance(d := r["difference"], Estimate)), default=1.0
    )
    rows = []
    for row in tier.rows:
        cells = [_cell(row[c], COLUMNS[c][1], limit) for c in columns]
        rows.append([f"{escape(row.name)}{_settings(row)}", *cells])
    head = ("method", *(COLUMNS[c][0] for c in columns))
    uneven = note(UNEVEN) if tier.uneven else ""
    missing = ""
    if tier.missing:
        names = "".join(
            f"<li><bdi>{escape(name)}</bdi>: {escape((reasons or {}).get((tier.name, name), NOT_RUN))}</li>"
            for name in tier.missing
        )
        missing = details(f"{len(tier.missing)} methods not evaluated here yet", f"<ul>{names}</ul>")
    return (
        f'<h3 dir="auto">{escape(tier.label)}</h3>{table(head, rows, f"Results, {tier.label}", sortable=True)}'
        f"{uneven}{_per_seed(tier)}{missing}"
    )


def _settings(row: Row) -> str:
    words = ", ".join(filter(None, (row.group, settings_words(row.loss))))
    return f"<small>{escape(words)}</small>" if words else ""


def _cell(value: Estimate | float | None, how: str = "number", limit: float = 1.0) -> str:
    if not isinstance(value, Estimate):
        return f"<b>{write(value, how)}</b>"
    whisker = _whisker(value, limit) if how == "signed" else ""
    return f"<b>{one(value.mean, how)}</b><small>{interval(value, how)}</small>{whisker}"


def _whisker(value: Estimate, limit: float) -> str:
    x = [60 + 54 * v / (limit or 1.0) for v in (value.low, value.mean, value.high)]
    kind = "above" if value.low > 0 else "below" if value.high < 0 else "open"
    return (
        f'<svg viewBox="0 0 120 14" class="whisker {kind}" aria-hidden="true"><line x1="60" x2="60" y1="0" y2="14" '
        f'class="axis"/><line x1="{x[0]:.1f}" x2="{x[2]:.1f}" y1="7" y2="7"/>'
        f'<circle cx="{x[1]:.1f}" cy="7" r="3"/></svg>'
    )


def _per_seed(tier: Tier) -> str:
    rows = [row for row in tier.rows if row.per_seed]
    if all(len(row.seeds) < 2 for row in rows):
        return ""
    lines = "".join(
        f"<li><bdi>{escape(row.name)}</bdi>: "
        f"{escape(', '.join(f'{seed} {one(value)}' for seed, value in row.per_seed.items()))}</li>"
        for row in rows
    )
    return details("Mean reward of every training seed", f"<ul>{lines}</ul>")


def chart_or(chart: Chart | None, otherwise: str) -> str:
    """The chart, or why there is none."""
    return chart_html(chart) if chart is not None else nothing(otherwise)


def equal_kl_html(tiers: Sequence[Tier], beta: float) -> str:
    """What every setting earns more than DPO at the setting's own distance, in the tiers where DPO has a curve."""
    rows = []
    for tier in tiers:
        for row in (row for line in frontiers(tier, beta).values() for row in line):
            found = less_dpo(tier, row)
            if found.value is not None:
                where = escape(f"{tier.label}: {row.name}")
                rows.append([where, _cell(row["kl"]), _cell(row["oracle_reward"]), _difference(found), _seeds(found)])
    if not rows:
        return ""
    head = ("setting", "KL, nats", "reward", "less DPO's curve at this KL", "each seed")
    text = "DPO's curve is drawn straight between its settings of β; beyond its ends there is nothing to compare with."
    return f"<h3>At the same distance</h3>{table(head, rows, 'Reward less DPO at equal KL')}{note(text)}"


# Margins and weights


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
    margins = np.sort(margins)
    if len(margins) > MARGINS_SHOWN:
        margins = margins[np.linspace(0, len(margins) - 1, MARGINS_SHOWN).round().astype(int)]
    return {"margins": [float(h) for h in margins], "parameters": parameters._asdict()}


def weights_html(tier: Tier) -> str:
    """The weight curve over the tier's margins, which the page's script brings to life."""
    parameters, margins = weighting(tier)
    counts = count_weights(margins, parameters)
    figure = weight_figure(margins, parameters, label=f"Weight curve and margins, {tier.label}")
    n = len(margins)
    first = " (of the first training seed)" if len(tier.reward_models) > 1 else ""
    settings = f"τ = {parameters.tau:g}, c_max = {parameters.c_max:g}, λ = {parameters.lam:g}"
    few = f" The figure shows {MARGINS_SHOWN} evenly spaced quantiles of them." if n > MARGINS_SHOWN else ""
    text = (
        f"With {settings}, of {n} training pairs{first} {counts.amplified} are amplified, {counts.dampened} dampened, "
        f"{counts.turned_down} turned down since the reward model contradicts their label, and {counts.unchanged} left "
        f"as they are; mean weight {counts.mean:.3f}, effective sample size {counts.effective:.0f}.{few}"
    )
    return (
        f'<h3 dir="auto">{escape(tier.label)}</h3><p>{escape(text)}</p>'
        f'<div class="weight" id="weight-{escape(tier.name)}">{figure}</div>'
    )


# Reward models, degeneration


def reward_models_html(tiers: Sequence[Tier]) -> str:
    """Accuracy and calibration, a line per tier and seed."""
    names = {
        "heldout_accuracy": ("accuracy on held-out pairs", "share"),
        "heldout_log_loss": ("log-loss, nats", "number"),
        "temperature": ("fitted temperature", "number"),
        "calibrated_log_loss": ("log-loss after calibration", "number"),
    }
    models = [(tier, seed, model.metrics) for tier in tiers for seed, model in tier.reward_models.items()]
    shown = [key for key in names if any(key in metrics for _, _, metrics in models)]
    if not shown:
        return nothing("No reward model is finished yet.")
    rows = []
    for tier, seed, metrics in models:
        first = seed == next(iter(tier.reward_models))
        agrees = f"<b>{one(float((tier.margins > 0).mean()), 'share')}</b>" if first and len(tier.margins) else DASH
        cells = [_metric(metrics.get(key), names[key][1]) for key in shown]
        rows.append([escape(f"{tier.label} {seed}".strip()), *cells, agrees])
    head = ("tier", *(names[key][0] for key in shown), "agrees with its training labels")
    text = (
        "Where a reward model agrees with its training labels much more often than with held-out ones, its margins on "
        "the pairs that the policies learn from are too sure."
    )
    return table(head, rows, "Reward models") + note(" ".join([text, *weights_from(tiers)[1:]]))


def _metric(value: object, how: str) -> str:
    if isinstance(value, Estimate):
        return _cell(value, how)
    return f"<b>{one(float(value), how)}</b>" if isinstance(value, int | float) else f"<b>{DASH}</b>"


DEGENERATION = {
    "length": ("length, tokens", "number"),
    "ended": ("ended by itself", "share"),
    "distinct_1": ("distinct-1", "number"),
    "distinct_2": ("distinct-2", "number"),
    "repeated": ("same text for several prompts", "share"),
    "perplexity": ("perplexity under the reference", "number"),
}


def degeneration_html(tiers: Sequence[Tier]) -> str:
    """Whether texts fell apart while the reward rose, beside the SFT model."""
    parts = []
    for tier in tiers:
        shown = [key for key in DEGENERATION if any(row[key] is not None for row in tier.rows)]
        if not shown or not any(row.name != SFT for row in tier.rows):
            continue
        sft = next((row for row in tier.rows if row.name == SFT), None)
        rows = []
        for row in tier.rows:
            cells = [_cell(row[key], DEGENERATION[key][1]) for key in shown]
            rows.append([escape(row.name), *cells, escape("; ".join(doubts(row, sft)) or DASH)])
        head = ("method", *(DEGENERATION[key][0] for key in shown), "signs")
        label = f"Degeneration, {tier.label}"
        parts.append(f'<h3 dir="auto">{escape(tier.label)}</h3>{table(head, rows, label, plain=True, sortable=True)}')
    return "".join(parts) or nothing("No trained policy has been evaluated yet.")


# Quantity -> what is said of a policy, and when, given its value and the SFT model's.
SIGNS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "distinct_2": ("distinct-2 under 0.7 of SFT's", lambda own, base: own < 0.7 * base),
    "length": ("half as long as SFT's", lambda own, base: own <= 0.5 * base),
    "repeated": ("a tenth more repeated texts than SFT's", lambda own, base: own > base + 0.1),
    "perplexity": ("perplexity above three times SFT's", lambda own, base: own > 3 * base),
}


def doubts(row: Row, sft: Row | None) -> list[str]:
    """Signs that a policy's text fell apart, against the SFT model; thresholds are of thumb, not of statistics."""
    if sft is None or row is sft:
        return []
    signs = []
    for name, (words, broken) in SIGNS.items():
        own, base = (v.mean if isinstance(v := of[name], Estimate) else v for of in (row, sft))
        if own is not None and base is not None and broken(own, base):
            signs.append(words)
    return signs
