"""The curve of MADPO's weight over the histogram of a set of margins."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import numpy as np

from madpo.report import svg
from madpo.report.numbers import MINUS
from madpo.rewards.weight_counts import WeightParameters, log_weight

WIDTH, LEFT, RIGHT = 720, 50, 14


def weight_figure(margins: np.ndarray, parameters: WeightParameters, *, label: str, title: str = "") -> ET.Element:
    """The weight curve above the histogram of the margins, coloured by what the weight does."""
    tau = parameters.tau
    limit = max(float(np.abs(margins).max(initial=1)), tau * 1.15) * 1.04
    top, curve, gap, bars = 20, 170, 52, 120
    base = top + curve + gap + bars
    x, y = svg.Scale(-limit, limit, LEFT, WIDTH - RIGHT), svg.Scale(0, 2, top + curve, top)
    figure = svg.figure(WIDTH, base + 44, label)
    for w in (0, 0.5, 1, 1.5, 2):
        svg.line(figure, LEFT, y(w), WIDTH - RIGHT, y(w), "axis strong" if w == 1 else "axis")
        svg.text(figure, LEFT - 8, y(w) + 4, f"{w:g}", "tick end")
    svg.line(figure, LEFT, base, WIDTH - RIGHT, base, "axis strong")
    for value in x.ticks(8):
        svg.line(figure, x(value), base, x(value), base + 5, "axis strong")
        svg.text(figure, x(value), base + 19, svg.number(value), "tick middle")
    for h, name in ((-tau, f"{MINUS}τ"), (tau, "τ")):
        svg.line(figure, x(h), top, x(h), base, "mark")
        svg.text(figure, x(h), top + curve + 20, name, "tick middle strong")
    counts, edges = np.histogram(margins, bins=60, range=(-limit, limit))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            height, kind = bars * count / counts.max(), _kind(float(low + high) / 2, parameters)
            says = f"{count} pair{'' if count == 1 else 's'} with margins from {low:.2f} to {high:.2f}"
            width = max(1.0, x(high) - x(low) - 1)
            svg.box(figure, x(low) + 0.5, base - height, width, height, f"bar {kind}", says)
    grid = np.linspace(-limit, limit, 481)
    curve_points = zip(grid, np.exp(log_weight(grid, parameters)), strict=True)
    svg.path(figure, [(x(h), y(w)) for h, w in curve_points], "curve")
    svg.text(figure, WIDTH - RIGHT, base + 38, "reward margin h of the pair, log-odds", "tick end")
    svg.text(figure, 0, 12, "weight w(h)", "tick")
    svg.text(figure, WIDTH - RIGHT, 13, title, "panel-title end")
    svg.text(figure, 0, base - bars - 6, "pairs", "tick")
    return figure


def _kind(h: float, parameters: WeightParameters) -> str:
    log = float(log_weight(np.array([h]), parameters)[0])
    if abs(log) < 1e-12:
        return "unchanged"
    return "amplified" if log > 0 else "dampened" if h > 0 else "turned-down"
