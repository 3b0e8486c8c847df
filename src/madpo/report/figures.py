"""Figures as SVG text: they stand on the page without scripts, which only add what a pointer can ask.

Colours are classes of the style sheet, so that one figure serves light and dark.
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from madpo.core.metrics import Estimate
from madpo.report import svg
from madpo.rewards.weight_counts import WeightParameters, log_weight

WIDTH, LEFT, RIGHT = 720, 46, 14


def weight_figure(margins: np.ndarray, parameters: WeightParameters, *, label: str) -> str:
    """The weight curve above the histogram of the margins, coloured by what the weight does."""
    tau = parameters.tau
    limit = max(float(np.abs(margins).max(initial=1)), tau * 1.15) * 1.04
    top, curve, gap, bars = 14, 170, 48, 120
    base = top + curve + gap + bars
    x, y = svg.Scale(-limit, limit, LEFT, WIDTH - RIGHT), svg.Scale(0, 2, top + curve, top)
    parts = []
    for w in (0, 0.5, 1, 1.5, 2):
        parts.append(svg.line(LEFT, y(w), WIDTH - RIGHT, y(w), "axis strong" if w == 1 else "axis"))
        parts.append(svg.text(LEFT - 8, y(w) + 4, f"{w:g}", "tick end"))
    parts += _x_ticks(x, -limit, limit, base)
    for h, name in ((-tau, f"{svg.MINUS}τ"), (tau, "τ")):
        parts.append(svg.line(x(h), top, x(h), base, "mark"))
        parts.append(svg.text(x(h), top + curve + 20, name, "tick middle strong"))
    counts, edges = np.histogram(margins, bins=60, range=(-limit, limit))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            height = bars * count / counts.max()
            kind = _kind(float(low + high) / 2, parameters)
            title = f"{count} pairs with margins from {low:.2f} to {high:.2f}"
            parts.append(
                f'<rect x="{x(low) + 0.5:.1f}" y="{base - height:.1f}" width="{max(1.0, x(high) - x(low) - 1):.1f}" '
                f'height="{height:.1f}" class="bar {kind}"><title>{title}</title></rect>'
            )
    grid = np.linspace(-limit, limit, 481)
    points = zip(grid, np.exp(log_weight(grid, parameters)), strict=True)
    parts.append(svg.path([(x(h), y(w)) for h, w in points], "curve"))
    parts.append(svg.text(LEFT, base + 36, "reward margin h of the pair (log-odds)", "tick"))
    parts.append(svg.text(LEFT + 4, top - 3, "weight w(h)", "tick"))
    return _svg(base + 40, parts, label)


class Dot(NamedTuple):
    """One point of :func:`scatter_figure`: where, its value with its interval, what it is, whether it stands out."""

    x: float
    y: Estimate
    title: str
    marked: bool


def scatter_figure(
    dots: Sequence[Dot],
    *,
    label: str,
    x_label: str,
    y_label: str,
    line: tuple[str, float] | None = None,
    names: Sequence[str] = (),
    diagonal: bool = False,
) -> str:
    """Points with the interval of their height; a marked one stands out.

    Args:
        line: name and height of a line to compare with.
        names: what x = 0, 1, 2, ... are called, where x is no number.
        diagonal: also the line on which x and y are the same.
    """
    (x_low, x_high) = svg.value_range([dot.x for dot in dots], 0.06)
    (y_low, y_high) = svg.value_range([v for dot in dots for v in dot.y[:3]] + ([line[1]] if line else []), 0.06)
    top, height, right = 24, 240, 130
    x, y, base = (
        svg.Scale(x_low, x_high, LEFT, WIDTH - right),
        svg.Scale(y_low, y_high, top + height, top),
        top + height,
    )
    parts = _y_ticks(y, y_low, y_high, WIDTH - right)
    if names:
        parts.append(svg.line(LEFT, base, WIDTH - right, base, "axis strong"))
        parts += [svg.text(x(i), base + 19, svg.cut(name, 14), "tick middle") for i, name in enumerate(names)]
    else:
        parts += _x_ticks(x, x_low, x_high, base)
    if line is not None:
        parts.append(svg.line(LEFT, y(line[1]), WIDTH - right, y(line[1]), "mark"))
        parts.append(svg.text(WIDTH - right + 8, y(line[1]) + 4, svg.cut(line[0], 18), "name"))
    if diagonal:
        low, high = max(x_low, y_low), min(x_high, y_high)
        parts.append(svg.line(x(low), y(low), x(high), y(high), "mark"))
    for dot in sorted(dots, key=lambda dot: dot.marked):
        kind = "s3" if dot.marked else "s0"
        parts.append(svg.line(x(dot.x), y(dot.y.low), x(dot.x), y(dot.y.high), f"error {kind}"))
        parts.append(
            f'<circle cx="{x(dot.x):.1f}" cy="{y(dot.y.mean):.1f}" r="{7 if dot.marked else 5}" class="dot {kind}">'
            f"<title>{escape(dot.title)}</title></circle>"
        )
    parts.append(svg.text(LEFT, base + 36, x_label, "tick"))
    parts.append(svg.text(LEFT + 4, top - 8, y_label, "tick"))
    return _svg(base + 40, parts, label)


def _kind(h: float, parameters: WeightParameters) -> str:
    log = float(log_weight(np.array([h]), parameters)[0])
    if abs(log) < 1e-12:
        return "unchanged"
    return "amplified" if log > 0 else "dampened" if h > 0 else "turned-down"


def _x_ticks(x: svg.Scale, low: float, high: float, base: float) -> list[str]:
    marks = [svg.line(x(low), base, x(high), base, "axis strong")]
    for value in svg.ticks(low, high):
        marks.append(svg.line(x(value), base, x(value), base + 5, "axis strong"))
        marks.append(svg.text(x(value), base + 19, svg.number(value), "tick middle"))
    return marks


def _y_ticks(y: svg.Scale, low: float, high: float, right: float) -> list[str]:
    marks = []
    for value in svg.ticks(low, high):
        marks.append(svg.line(LEFT, y(value), right, y(value), "axis"))
        marks.append(svg.text(LEFT - 8, y(value) + 4, svg.number(value), "tick end"))
    return marks


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}" class="figure">'
        f"{''.join(parts)}</svg>"
    )
