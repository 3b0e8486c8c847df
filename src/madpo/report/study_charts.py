"""The figures of a study: rewards, sensitivity, ablation, reward against KL, training, calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from madpo.core.metrics import Estimate
from madpo.report import published
from madpo.report.charts import (
    Chart,
    Mark,
    Panel,
    Series,
    WeightPanel,
    calibration_panel,
    curves,
    figure,
    levels,
    reward_curves,
    value_mark,
)
from madpo.report.compare import Choice, settings_of
from madpo.report.equal_kl import frontiers
from madpo.report.methods import SFT, is_setting
from madpo.report.own import own_chart
from madpo.report.results import Row, Tier, mean_of, shared_seeds
from madpo.report.study_sections import weighting
from madpo.rewards.margins import reliability

REWARD = "mean oracle reward"
COLOURS = {"DPO": 0, "IPO": 1, "MADPO": 2, "β-DPO": 3, "Amp-Only": 4, "Reg-Only": 5, SFT: 7}
TIER_COLOURS = {"high": 3, "medium": 1, "low": 2}
FIRST = ("", "core")  # groups whose training curves are shown first
SHADES = 8
PAIRS_PER_BIN = 20  # of a calibration, at least
PARTS_ONLY = ("Amp-Only", "Reg-Only")


def study_charts(tiers: Sequence[Tier], beta: float, choices: Mapping[tuple[str, str], Choice]) -> list[Chart]:
    """Every figure that can be drawn; arguments as in :class:`madpo.report.study.Study`."""
    groups = list(dict.fromkeys(row.group for tier in tiers for row in tier.rows if row.group not in FIRST))
    training = [("", FIRST, ""), *((f"_{group}", (group,), f", {group}") for group in groups)]
    names = list(dict.fromkeys(row.method for tier in tiers for row in tier.rows))
    colours = {name: _colour(name, names) for name in names}
    found = [
        *(own_chart(tier, colours) for tier in tiers),
        main_chart(tiers, choices),
        sensitivity_chart(tiers, beta),
        ablation_chart(tiers, beta),
        frontier_chart(tiers, beta),
        calibration_chart(tiers),
        reward_model_chart(tiers),
        *(loss_chart(tiers, f"training_loss{end}", f"Training loss{words}", of) for end, of, words in training),
        *(margin_chart(tiers, f"training_margins{end}", f"Implicit margin{words}", of) for end, of, words in training),
    ]
    panels = [
        WeightPanel(tier.label, margins, p) for tier in tiers if len(tier.margins) for p, margins in [weighting(tier)]
    ]
    found.append(figure("weights", "Margins and their weights", panels))
    return [chart for chart in found if chart is not None]


def main_chart(tiers: Sequence[Tier], choices: Mapping[tuple[str, str], Choice]) -> Chart | None:
    """Figure 1: the reward of every method in every tier, over the training seeds that all have, with the paper's."""
    panels = []
    for tier in tiers:
        own = {name: choice for (of, name), choice in choices.items() if of == tier.name}
        rows = [*filter(None, [tier.sft]), *(choice.row for choice in own.values())]
        even = {row.key: row["oracle_reward"] for row in tier.even(rows)}
        lines = [
            (
                name,
                _colour(name, [*own]),
                choice.value if choice.chosen else even[choice.row.key],
                published.TABLE_1.get(name, {}).get(tier.name, (None,))[0],
            )
            for name, choice in own.items()
        ]
        if lines:
            sft = even[tier.sft.key] if tier.sft is not None else None
            reference = None if sft is None else (SFT, mean_of(sft))
            title = f"{tier.label} pairs{_seeds_only(tier, rows)}"
            panels.append(levels(title, REWARD, [(SFT, COLOURS[SFT], sft, None), *lines], reference))
    return figure("figure1_main", "Mean oracle reward by tier", panels)


def sensitivity_chart(tiers: Sequence[Tier], beta: float) -> Chart | None:
    """Figure 2: reward against tau at c = 2, and against c at tau = 7."""
    panels = []
    for name, field, paper in (("τ", "tau", published.OVER_TAU), ("c", "c_max", published.OVER_C)):
        series = []
        for tier in tiers:
            rows = tier.even(_along(settings_of(tier, "MADPO", beta), field))
            if not rows:
                continue
            marks = [
                value_mark(r["oracle_reward"], float(r.loss[field]), f"{tier.label}, {name} = {r.loss[field]:g}")
                for r in rows
            ]
            colour = _tier_colour(tier.name)
            series.append(Series(tier.label + _seeds_only(tier, rows), tuple(m for m in marks if m), colour))
            theirs = paper.get(tier.name, {})
            points = tuple(Mark(x, y, says=f"the paper, {tier.label}: {y:.2f}") for x, y in theirs.items())
            series += [Series(f"{tier.label}, the paper", points, colour, published=True)] if points else []
        if any(len(s.marks) > 1 and not s.published for s in series):
            fixed = f"c = {published.FIXED_C:g}" if name == "τ" else f"τ = {published.FIXED_TAU:g}"
            panels.append(Panel(f"MADPO over {name}, at {fixed}", name, REWARD, tuple(series)))
    return figure("figure2_sensitivity", "Sensitivity to τ and c", panels)


def _along(rows: Iterable[Row], field: str) -> list[Row]:
    """The rows over tau at the paper's c, or over c at its tau."""
    line = []
    for row in rows:
        x = row.loss.get(field)
        at = (x, published.FIXED_C) if field == "tau" else (published.FIXED_TAU, x)
        if x is not None and is_setting(row.loss, *at):
            line.append(row)
    return sorted(line, key=lambda row: float(row.loss[field]))


def ablation_chart(tiers: Sequence[Tier], beta: float) -> Chart | None:
    """Figure 3: DPO, Amp-Only, Reg-Only and MADPO at the paper's settings and others, in tiers that have the parts."""
    panels = []
    for tau, c in _ablated(tiers, beta):
        paper = published.ABLATION.get(c, {}) if tau == published.FIXED_TAU else {}
        for tier in tiers:
            rows = [
                row
                for name in published.PARTS
                for row in settings_of(tier, name, beta)
                if name == "DPO" or is_setting(row.loss, tau, c)
            ]
            if not any(row.method in PARTS_ONLY for row in rows):
                continue
            even = tier.even(rows)
            lines = [
                (r.method, COLOURS[r.method], r["oracle_reward"], paper.get(r.method, {}).get(tier.name)) for r in even
            ]
            panels.append(levels(f"{tier.label}, c = {c:g}, τ = {tau:g}{_seeds_only(tier, even)}", REWARD, lines))
    return figure("figure3_ablation", "Ablation", panels)


def _ablated(tiers: Sequence[Tier], beta: float) -> list[tuple[float, float]]:
    """(tau, c) at which a part of MADPO was run, the paper's first."""
    paper = [(published.FIXED_TAU, c) for c in published.ABLATION]
    losses = [row.loss for tier in tiers for name in PARTS_ONLY for row in settings_of(tier, name, beta)]
    run = sorted({(float(x["tau"]), float(x["c_max"])) for x in losses if {"tau", "c_max"} <= x.keys()})
    run = [setting for setting in run if any(is_setting(loss, *setting) for loss in losses)]
    return [*(setting for setting in paper if setting in run), *(setting for setting in run if setting not in paper)]


def _seeds_only(tier: Tier, rows: Sequence[Row]) -> str:
    """ ", seed0 only" where rows that are shown together share fewer seeds than their tier has."""
    shared = shared_seeds(rows)
    return f", {' and '.join(shared)} only" if shared and len(shared) < len(tier.seeds) else ""


def frontier_chart(tiers: Sequence[Tier], beta: float) -> Chart | None:
    """Reward against KL, a line over beta for every method; a method with one beta is a point."""
    panels = []
    methods = list(dict.fromkeys(row.method for tier in tiers for row in tier.rows))
    for tier in tiers:
        found = frontiers(tier, beta)
        rows = [row for line in found.values() for row in line]
        even = iter(tier.even(rows))
        lines = {method: [next(even) for _ in line] for method, line in found.items()}
        series = [_against_kl(method, line, methods) for method, line in lines.items()]
        series = [one for one in series if one.marks]
        if tier.sft is not None and series:
            reward = tier.even([tier.sft, *rows])[0]["oracle_reward"]
            if (mark := value_mark(reward, 0.0, tier.sft.name)) is not None:
                series.append(Series(tier.sft.name, (mark,), COLOURS[SFT]))
        if len(series) > 1:
            title = tier.label + _seeds_only(tier, rows)
            panels.append(Panel(title, "KL to the reference, nats", f"mean {tier.reward}", tuple(series)))
    return figure("frontier", "Reward against KL to the reference", panels)


def _against_kl(method: str, rows: Sequence[Row], methods: Sequence[str]) -> Series:
    marks = []
    for row in rows:
        kl, reward = row["kl"], row["oracle_reward"]
        if isinstance(kl, Estimate) and isinstance(reward, Estimate):
            says = f"{row.name}: reward {reward.mean:.2f} ({reward.low:.2f} to {reward.high:.2f}), KL {kl.mean:.1f}"
            marks.append(Mark(kl.mean, reward.mean, reward.low, reward.high, kl.low, kl.high, says))
    return Series(method, tuple(marks), _colour(method, methods))


def loss_chart(tiers: Sequence[Tier], name: str, title: str, groups: Iterable[str]) -> Chart | None:
    """The training loss over the steps, a panel per method, since losses of different methods have different units."""
    panels = []
    of_tier = {tier.name: {row.name for row in tier.rows if row.group in set(groups)} for tier in tiers}
    for shown in dict.fromkeys(row.name for tier in tiers for row in tier.rows if row.name in of_tier[tier.name]):
        series = [
            line
            for tier in tiers
            if shown in of_tier[tier.name]
            for line in curves(tier.label, tier.curves[tier.curves["name"] == shown], "loss", _tier_colour(tier.name))
        ]
        panels += [Panel(shown, "step", "loss", tuple(series))] if series else []
    return figure(name, title, panels, "training_loss")


def margin_chart(tiers: Sequence[Tier], name: str, title: str, groups: Iterable[str]) -> Chart | None:
    """The implicit reward margin over the steps, a panel per tier."""
    panels, wanted = [], set(groups)
    for tier in tiers:
        rows = [row for row in tier.rows if row.group in wanted]
        methods = [row.method for row in rows]
        own = len(set(methods)) == len(methods) and all(method in COLOURS for method in methods)
        series = [
            line
            for k, row in enumerate(rows)
            for line in curves(
                row.name,
                tier.curves[tier.curves["name"] == row.name],
                "rewards/margins",
                COLOURS[row.method] if own else k % SHADES,
            )
            if not line.raw
        ]
        panels += [Panel(tier.label, "step", "implicit margin β·h, nats", tuple(series))] if series else []
    return figure(name, title, panels, "training_margins")


def reward_model_chart(tiers: Sequence[Tier]) -> Chart | None:
    """The reward models' training and held-out losses."""
    panels = []
    for tier in tiers:
        series = reward_curves(tier.reward_curve)
        if series:
            panels.append(Panel(tier.label, "step", "loss, nats", series, reference=("chance", float(np.log(2)))))
    return figure("reward_model_training", "Training of the reward models", panels)


def calibration_chart(tiers: Sequence[Tier]) -> Chart | None:
    """How sure the reward model is against how often the labels agree, per tier, on pairs it was not trained on."""
    panels = []
    for tier in tiers:
        if n := len(tier.heldout_margins):
            margins, prompts = (tier.heldout_margins[name].to_numpy() for name in ("reward_margin", "prompt_id"))
            bins, _ = reliability(margins, most=max(2, min(10, n // PAIRS_PER_BIN)), prompts=prompts)
            panels.append(calibration_panel(f"{tier.label}, {n} pairs", bins, _tier_colour(tier.name)))
    return figure("calibration", "Calibration of the reward models", panels)


def _tier_colour(name: str) -> int:
    return TIER_COLOURS.get(name, 0)


def _colour(method: str, methods: Sequence[str]) -> int:
    if method in COLOURS:
        return COLOURS[method]
    taken = {COLOURS[name] for name in methods if name in COLOURS}
    order = sorted((6, 4, 5, 1, 3, 0, 2), key=taken.__contains__)  # never that of the model that policies start from
    others = [name for name in methods if name not in COLOURS]
    return order[others.index(method) % len(order)]
