"""What a figure shows, apart from how it is drawn (:mod:`madpo.report.drawing`)."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import pandas as pd

from madpo.core.metrics import Estimate
from madpo.report.numbers import short
from madpo.rewards.margins import Reliability
from madpo.rewards.weight_counts import WeightParameters

CURVE_POINTS = 400  # of a training curve
SMOOTH = 15  # a running mean of a curve is over one part in so many


@dataclass(frozen=True)
class Mark:
    """A point: where, its 95 % intervals (None: none), and what it is."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    says: str = ""


@dataclass(frozen=True)
class Series:
    """Marks under one name.

    Attributes:
        colour: number of a colour of the palette, which goes with a shape of the points.
        published: the paper's numbers, drawn hollow and dashed; line: joined; dots: drawn as points.
        raw: a pale line behind its running mean, without a place in the legend.
    """

    name: str
    marks: tuple[Mark, ...]
    colour: int
    published: bool = False
    line: bool = True
    dots: bool = True
    raw: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        rows: what y = 0, 1, 2, ... are called, from the top, where y is no number: values with intervals, one under the
            other. All such panels of a chart have one range, so that they compare.
        diagonal: with the line on which x and y are equal, from one half to one.
        reference: name and place of a line to compare with, upright where there are rows.
        log: x is in decades.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    rows: tuple[str, ...] = ()
    diagonal: bool = False
    reference: tuple[str, float] | None = None
    log: bool = False


def value_mark(value: Estimate | float | None, at: float, what: str, *, across: bool = False) -> Mark | None:
    """A value with its interval at a place of the other axis, upright or ``across``; None where there is no number."""
    mean, low, high = value[:3] if isinstance(value, Estimate) else (value, None, None)
    if mean is None or not np.isfinite(mean):
        return None
    says = f"{what}: {short(value)}"
    return Mark(mean, at, x_low=low, x_high=high, says=says) if across else Mark(at, mean, low, high, says=says)


PAPER = ", the paper"


def levels(
    title: str,
    label: str,
    lines: Iterable[tuple[str, int, Estimate | float | None, float | None]],
    reference: tuple[str, float] | None = None,
) -> Panel:
    """Values one under the other: (name, colour, value, the paper's value); without those that there is not."""
    rows: list[str] = []
    series = []
    for name, colour, value, paper in lines:
        if (mark := value_mark(value, len(rows), name, across=True)) is not None:
            series.append(Series(name, (mark,), colour))
            if paper is not None:
                theirs = Mark(paper, len(rows), says=f"{name}{PAPER}: {paper:.2f}")
                series.append(Series(name + PAPER, (theirs,), colour, published=True, line=False))
            rows.append(name)
    return Panel(title, label, "", tuple(series), tuple(rows), reference=reference)


@dataclass(frozen=True)
class WeightPanel:
    """Margins under the weight curve."""

    title: str
    margins: np.ndarray
    parameters: WeightParameters


@dataclass(frozen=True)
class Chart:
    """A figure: ``name`` is the stem of its file and its place on the page."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel | WeightPanel]


def figure(name: str, title: str, panels: Sequence[Panel | WeightPanel], caption: str = "") -> Chart | None:
    """A figure of a study, with the caption of its name or of ``caption``; None without panels."""
    return Chart(name, title, captions()["figures"][caption or name], panels) if panels else None


@cache
def captions() -> dict[str, dict[str, str]]:
    """Kind ("figures", "tables" or "measures") and name -> caption."""
    return tomllib.loads((files("madpo.report") / "templates" / "captions.toml").read_text(encoding="utf-8"))


def reward_curves(log: pd.DataFrame) -> tuple[Series, ...]:
    """Training and held-out loss of a reward model."""
    return (*curves("training pairs", log, "loss", 0), *curves("held-out pairs", log, "eval_loss", 1))


def curves(name: str, log: pd.DataFrame, column: str, colour: int) -> list[Series]:
    """A logged column over the steps: a pale line and its running mean, or as it is where it has few points."""
    if column not in log:
        return []
    found = log[["step", column]].replace([np.inf, -np.inf], np.nan).dropna()
    if len(found) < SMOOTH:
        return [_line(name, found, colour)] if len(found) else []
    smooth = found.assign(
        **{column: found[column].rolling(len(found) // SMOOTH + 1, center=True, min_periods=1).mean()}
    )
    raw = _line(name, found, colour)
    return [Series(name, raw.marks, colour, dots=False, raw=True), _line(name, smooth, colour)]


def _line(name: str, points: pd.DataFrame, colour: int) -> Series:
    if len(points) > CURVE_POINTS:
        points = points.iloc[np.linspace(0, len(points) - 1, CURVE_POINTS).round().astype(int)]
    marks = tuple(Mark(float(x), float(y)) for x, y in points.itertuples(index=False))
    return Series(name, marks, colour, dots=len(marks) == 1)


def calibration_panel(title: str, bins: Iterable[Reliability], colour: int) -> Panel:
    """Bins of pairs: how sure the reward model is, and how often it is right."""
    marks = tuple(
        Mark(b.predicted, b.observed.mean, b.observed.low, b.observed.high, says=f"{b.pairs} pairs") for b in bins
    )
    series = Series("held-out pairs", marks, colour, line=False)
    return Panel(title, "how sure the reward model is", "share of labels that agree", (series,), diagonal=True)
