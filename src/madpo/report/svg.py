"""Parts of figures as SVG text: axes, ticks, lines and labels.

Colours are classes of the style sheet, so that one figure serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

MINUS = "\N{MINUS SIGN}"


class Scale:
    """From a value to a place: ``low`` at ``start``, ``high`` at ``end``."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.factor, self.start = low, (end - start) / ((high - low) or 1.0), start

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.factor


def value_range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """From the lowest to the highest with a share of room on both sides; never empty."""
    low, high = min(values), max(values)
    pad = (high - low) * margin if high > low else max(abs(high), 1.0) * (0.1 if margin else 0.0)
    return low - pad, high + pad if high + pad > low - pad else low + 1.0


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers between two values."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def number(value: float) -> str:
    """As short as it is exact, with a true minus sign."""
    return f"{value:g}".replace("-", MINUS)


def cut(text: str, length: int) -> str:
    """At most so many characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def text(x: float, y: float, words: str, kind: str) -> str:
    """Words, escaped."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def path(points: Sequence[tuple[float, float]], kind: str, title: str = "") -> str:
    """A line through points."""
    steps = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<path d="M{steps}" class="{kind}">{inside}</path>'


def dot(x: float, y: float, shape: int, kind: str, says: str) -> str:
    """A mark whose shape, not its colour alone, says which series it belongs to."""
    inside = f"<title>{escape(says)}</title>" if says else ""
    r = 5
    if shape % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" class="{kind}">{inside}</circle>'
    corners = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0, -r - 1), (r + 1, r), (-r - 1, r)],
        3: [(0, -r - 2), (r + 2, 0), (0, r + 2), (-r - 2, 0)],
    }[shape % 4]
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    return f'<polygon points="{points}" class="{kind}">{inside}</polygon>'
