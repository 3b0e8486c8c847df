"""What a figure shows, apart from how it is drawn (:mod:`madpo.report.drawing`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from madpo.rewards.weight_counts import WeightParameters


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
        colour: number of a colour of the palette; shape: of the points, by the place in the panel where it is None.
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
    shape: int | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        names: what x = 0, 1, 2, ... are called, where x is no number.
        diagonal: with the line on which x and y are equal, from one half to one.
        reference: name and height of a line to compare with.
        log: x is in decades.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    names: tuple[str, ...] = ()
    diagonal: bool = False
    reference: tuple[str, float] | None = None
    log: bool = False


@dataclass(frozen=True)
class Level:
    """A line of :class:`Levels`: a value with its interval, and the paper's."""

    name: str
    colour: int
    mean: float
    low: float | None = None
    high: float | None = None
    published: float | None = None


@dataclass(frozen=True)
class Levels:
    """Values with intervals, one under the other on a common axis; ``reference``: name and place of a line."""

    title: str
    label: str
    lines: tuple[Level, ...]
    reference: tuple[str, float] | None = None


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
    panels: Sequence[Panel | Levels | WeightPanel]
