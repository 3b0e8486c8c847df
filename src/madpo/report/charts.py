"""What a figure shows, apart from how it is drawn: the page draws it as SVG, the files beside it by matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from madpo.core.metrics import Estimate
from madpo.report import published
from madpo.report.compare import Choice, chosen, frontiers, settings_of
from madpo.report.methods import SFT, is_setting
from madpo.report.results import Row, Tier, Value, shared_seeds
from madpo.rewards.margins import reliability
from madpo.rewards.weight_counts import WeightParameters

REWARD = "mean oracle reward"
COLOURS = {"DPO": 0, "IPO": 1, "MADPO": 2, "β-DPO": 3, "Amp-Only": 4, "Reg-Only": 5, SFT: 7}
TIER_COLOURS = {"high": 3, "medium": 1, "low": 2}
SHADES = 8
CURVE_POINTS = 400  # of a training curve
PAIRS_PER_BIN = 20  # of a calibration, at least


@dataclass(frozen=True)
class Mark:
    """A point or a bar: where, how high, its 95 % intervals (None: none), and what it is."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    says: str = ""


@dataclass(frozen=True)
class Series:
    """Marks under one name. ``published``: the paper's numbers, drawn hollow and dashed; ``line``: joined."""

    name: str
    marks: tuple[Mark, ...]
    colour: int
    published: bool = False
    line: bool = True
    dots: bool = True
    shape: int | None = None  # of its points; by its place in the panel where it is left out


@dataclass(frozen=True)
class Panel:
    """One pair of axes. With ``categories`` the marks are bars at 0, 1, 2, ... of them."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    categories: tuple[str, ...] = ()
    diagonal: bool = False


@dataclass(frozen=True)
class WeightPanel:
    """The margins of a tier under the weight curve."""

    title: str
    margins: np.ndarray
    parameters: WeightParameters


@dataclass(frozen=True)
class Chart:
    """A figure: ``name`` is the stem of its files."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel | WeightPanel, ...] = field(default=())


def main_chart(tiers: Sequence[Tier], choices: Mapping[tuple[str, str], Choice]) -> Chart | None:
    """Figure 1: a bar per method in every tier, the paper's value as a dash."""
    shown = [tier for tier in tiers if any((tier.name, name) in choices for name in published.METHODS)]
    series = []
    for name in published.METHODS:
        marks = [
            _mark(k, choice.value, f"{name}, {tier.label}")
            for k, tier in enumerate(shown)
            if (choice := choices.get((tier.name, name)))
        ]
        series += [Series(name, tuple(m for m in marks if m), COLOURS[name])] if any(marks) else []
    if not series:
        return None
    names = {s.name for s in series}
    for name in [n for n in published.METHODS if n in names]:
        series.append(_published(name, [published.TABLE_1[name].get(tier.name, (None,))[0] for tier in shown]))
    panel = Panel("", "", REWARD, tuple(series), tuple(tier.label for tier in shown))
    caption = (
        "Figure 1 of the paper with this run's numbers: bars with 95 % intervals over prompts, the paper's values as "
        "dashes. A method with several settings is chosen on one half of the prompts and shown on the other half."
    )
    return Chart("figure1_main", "Reward of every method in every tier", caption, (panel,))


def sensitivity_chart(tiers: Sequence[Tier], beta: float) -> Chart | None:
    """Figure 2: reward against tau at c = 2, and against c at tau = 7."""
    panels = []
    for name, values, paper in (("τ", "tau", published.OVER_TAU), ("c", "c_max", published.OVER_C)):
        series = []
        for tier in tiers:
            line = _along(settings_of(tier, "MADPO", beta), values)
            if not line:
                continue
            even = tier.even([row for _, row in line])
            rows = [(x, row) for (x, _), row in zip(line, even, strict=True)]
            marks = [_mark(float(r.loss[values]), r["oracle_reward"], f"{tier.label}, {name} = {x:g}") for x, r in rows]
            colour = _tier_colour(tier.name)
            series.append(Series(tier.label + _alone(tier, even), tuple(m for m in marks if m), colour))
            theirs = paper.get(tier.name, {})
            points = tuple(Mark(x, y, says=f"the paper, {tier.label}: {y:.2f}") for x, y in theirs.items())
            series += [Series(f"{tier.label}, the paper", points, colour, published=True)] if points else []
        if any(len(s.marks) > 1 and not s.published for s in series):
            fixed = f"c = {published.FIXED_C:g}" if name == "τ" else f"τ = {published.FIXED_TAU:g}"
            panels.append(Panel(f"MADPO over {name}, at {fixed}", name, REWARD, tuple(series)))
    caption = "Figure 2 of the paper: MADPO's reward over τ and over c, a line per tier, the paper's values dashed."
    return Chart("figure2_sensitivity", "Sensitivity to τ and c", caption, tuple(panels)) if panels else None


def _along(rows: Iterable[Row], name: str) -> list[tuple[float, Row]]:
    line = []
    for row in rows:
        tau, c = row.loss.get("tau"), row.loss.get("c_max")
        x = tau if name == "tau" else c
        fixed = (x, published.FIXED_C) if name == "tau" else (published.FIXED_TAU, x)
        if x is not None and is_setting(row.loss, *fixed):
            line.append((float(x), row))
    return sorted(line, key=lambda pair: pair[0])


def ablation_chart(tiers: Sequence[Tier], beta: float) -> Chart | None:
    """Figure 3: DPO, Amp-Only, Reg-Only and MADPO at the paper's settings and others, in tiers that have the parts."""
    panels = []
    for tau, c in _ablated(tiers, beta):
        paper = published.ABLATION.get(c, {}) if tau == published.FIXED_TAU else {}
        series, shown = [], []
        rows: dict[tuple[str, str], Row] = {}
        for tier in tiers:
            named = [
                (name, row)
                for name in published.PARTS
                for row in settings_of(tier, name, beta)
                if name == "DPO" or is_setting(row.loss, tau, c)
            ]
            if not any(name in _ALONE for name, _ in named):
                continue
            even = tier.even([row for _, row in named])
            rows |= {(tier.name, name): row for (name, _), row in zip(named, even, strict=True)}
            shown.append((tier, tier.label + _alone(tier, even)))
        for name in published.PARTS:
            marks = [
                _mark(k, rows[tier.name, name]["oracle_reward"], f"{name}, {tier.label}")
                for k, (tier, _) in enumerate(shown)
                if (tier.name, name) in rows
            ]
            series.append(Series(name, tuple(m for m in marks if m), COLOURS[name]))
        series += [_published(name, [of.get(tier.name) for tier, _ in shown]) for name, of in paper.items()]
        panels.append(Panel(f"c = {c:g}, τ = {tau:g}", "", REWARD, tuple(series), tuple(label for _, label in shown)))
    caption = "Figure 3 of the paper: what amplification alone and dampening alone do; the paper's values as dashes."
    return Chart("figure3_ablation", "Ablation", caption, tuple(panels)) if panels else None


_ALONE = ("Amp-Only", "Reg-Only")


def _ablated(tiers: Sequence[Tier], beta: float) -> list[tuple[float, float]]:
    """(tau, c) at which a part of MADPO was run, the paper's first."""
    paper = [(published.FIXED_TAU, c) for c in published.ABLATION]
    losses = [row.loss for tier in tiers for name in _ALONE for row in settings_of(tier, name, beta)]
    run = sorted({(float(x["tau"]), float(x["c_max"])) for x in losses if {"tau", "c_max"} <= x.keys()})
    run = [place for place in run if any(is_setting(loss, *place) for loss in losses)]
    return [*(place for place in paper if place in run), *(place for place in run if place not in paper)]


def _alone(tier: Tier, rows: Sequence[Row]) -> str:
    """ ", seed0 alone" where rows that are shown together share fewer seeds than their tier has."""
    shared = shared_seeds(rows)
    return f", {' and '.join(shared)} alone" if shared and len(shared) < len(tier.seeds) else ""


def frontier_chart(tiers: Sequence[Tier], beta: float) -> Chart | None:
    """Reward against KL, a line over beta for every method; a method with one beta is a point."""
    panels = []
    families = list(dict.fromkeys(row.method for tier in tiers for row in tier.rows))
    for tier in tiers:
        series, lines = [], frontiers(tier, beta)
        for family, rows in lines.items():
            marks = []
            for row in rows:
                if isinstance(k := row["kl"], Estimate) and isinstance(r := row["oracle_reward"], Estimate):
                    says = f"{row.name}: reward {r.mean:.2f} ({r.low:.2f} to {r.high:.2f}), KL {k.mean:.1f}"
                    marks.append(Mark(k.mean, r.mean, r.low, r.high, k.low, k.high, says))
            name = " ".join(filter(None, (family, _spread(rows))))
            shape = families.index(family)  # the same in every panel, whatever the panel lacks
            series += [Series(name, tuple(marks), _colour(family, families), shape=shape)] if marks else []
        sft = tier.sft
        if sft is not None and series:
            sft = tier.even([sft, *(row for rows in lines.values() for row in rows)])[0]
        if sft is not None and isinstance(r := sft["oracle_reward"], Estimate) and series:
            series.append(
                Series(
                    SFT,
                    (Mark(0.0, r.mean, r.low, r.high, says=f"SFT: {r.mean:.2f}"),),
                    COLOURS[SFT],
                    shape=families.index(SFT),
                )
            )
        if len(series) > 1:
            title = tier.label + _alone(tier, [row for rows in lines.values() for row in rows])
            panels.append(Panel(title, "KL to the reference, nats", REWARD, tuple(series)))
    caption = (
        "Reward against distance. A method that moves further from the reference usually earns more, so methods are "
        "compared at the same distance: to the left and above is better. A line joins one method's settings of β; of "
        "its other settings the one with the most β is shown. All points of a panel are over the same training seeds."
    )
    return Chart("frontier", "Reward against KL to the reference", caption, tuple(panels)) if panels else None


def training_chart(tiers: Sequence[Tier], column: str, name: str, title: str, groups: Iterable[str]) -> Chart | None:
    """One logged quantity over the steps, a line per method of some groups."""
    wanted, panels = set(groups), []
    for tier in tiers:
        rows = [row for row in tier.rows if row.group in wanted and row.name in set(tier.curves["name"])]
        families = [row.method for row in rows]
        series = []
        for k, row in enumerate(rows):
            points = _points(tier.curves[tier.curves["name"] == row.name], column)
            alone = families.count(families[k]) == 1 and all(name in COLOURS for name in families)
            series += _curve(row.name, points, COLOURS[families[k]] if alone else k % SHADES)
        if series:
            panels.append(Panel(tier.label, "step", title, tuple(series)))
    caption = f"{title[:1].upper()}{title[1:]}, the first training seed of every method."
    return Chart(name, f"{title[:1].upper()}{title[1:]}", caption, tuple(panels)) if panels else None


def reward_model_chart(tiers: Sequence[Tier]) -> Chart | None:
    """The reward models' training and held-out losses."""
    panels = []
    for tier in tiers:
        series = []
        for colour, (column, name) in enumerate((("loss", "training pairs"), ("eval_loss", "held-out pairs"))):
            series += _curve(name, _points(tier.reward_curve, column), colour)
        if series:
            panels.append(Panel(tier.label, "step", "loss, nats", tuple(series)))
    caption = (
        "Loss of the reward models, first seed; 0.693 is a coin's. Training stops where the held-out loss is lowest."
    )
    return Chart("reward_model_training", "Training of the reward models", caption, tuple(panels)) if panels else None


def _points(log: pd.DataFrame, column: str) -> list[tuple[float, float]]:
    """(step, value) of a logged column, where it is finite."""
    if column not in log:
        return []
    found = log[["step", column]].replace([np.inf, -np.inf], np.nan).dropna()
    return list(found.itertuples(index=False, name=None))


def _curve(name: str, points: list[tuple[float, float]], colour: int) -> list[Series]:
    if len(points) > CURVE_POINTS:
        points = [points[i] for i in np.linspace(0, len(points) - 1, CURVE_POINTS).round().astype(int)]
    return [Series(name, tuple(Mark(x, y) for x, y in points), colour, dots=len(points) == 1)] if points else []


def calibration_chart(tiers: Sequence[Tier]) -> Chart | None:
    """How sure the reward model is against how often the labels agree, per tier, on pairs it was not trained on."""
    panels = []
    for tier in tiers:
        if not len(tier.heldout_margins):
            continue
        n = len(tier.heldout_margins)
        bins, _ = reliability(tier.heldout_margins, most=max(2, min(10, n // PAIRS_PER_BIN)))
        marks = tuple(
            Mark(b.predicted, b.observed.mean, b.observed.low, b.observed.high, says=f"{b.pairs} pairs") for b in bins
        )
        series = Series("held-out pairs", marks, _tier_colour(tier.name))
        labels = ("how sure the reward model is", "share of labels that agree")
        panels.append(Panel(f"{tier.label}, {n} pairs", *labels, (series,), diagonal=True))
    caption = (
        "Calibration of the reward models, first seed: pairs in bins of equal size by |margin|, 95 % intervals. On "
        "the diagonal the reward model is as sure as it is right; below it, it is too sure."
    )
    return Chart("calibration", "Calibration of the reward models", caption, tuple(panels)) if panels else None


def choices_of(tiers: Sequence[Tier], beta: float) -> dict[tuple[str, str], Choice]:
    """(tier, method of Table 1) -> its chosen setting, where it was run."""
    found = {(tier.name, name): chosen(tier, name, beta) for tier in tiers for name in published.METHODS}
    return {key: choice for key, choice in found.items() if choice is not None}


def _mark(x: float, value: Value, what: str) -> Mark | None:
    if isinstance(value, Estimate):
        return Mark(
            x, value.mean, value.low, value.high, says=f"{what}: {value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"
        )
    return Mark(x, value, says=f"{what}: {value:.2f}") if value is not None and np.isfinite(value) else None


def _published(name: str, values: Sequence[float | None]) -> Series:
    marks = (Mark(k, v, says=f"{name}, the paper: {v:.2f}") for k, v in enumerate(values) if v is not None)
    return Series(f"{name}, the paper", tuple(marks), COLOURS[name], published=True)


def _spread(rows: Sequence[Row]) -> str:
    """ "β 0.03 to 0.3" for a line, for its legend."""
    betas = {row.beta for row in rows if row.beta is not None}
    return f"β {min(betas):g} to {max(betas):g}" if len(betas) > 1 else ""


def _tier_colour(name: str) -> int:
    return TIER_COLOURS.get(name, 0)


def _colour(family: str, families: Sequence[str]) -> int:
    if family in COLOURS:
        return COLOURS[family]
    others = [name for name in families if name not in COLOURS]
    return (6, 7, 4, 5)[others.index(family) % 4]
