"""Figures as SVG text: they stand on the page without scripts, which only add what a pointer can ask.

Colours are classes of the style sheet, so that one figure serves light and dark.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from madpo.records import Estimate

WIDTH, LEFT, RIGHT = 720, 46, 14
MINUS = "\N{MINUS SIGN}"


class WeightParameters(NamedTuple):
    """Parameters of ``madpo.margin_weight``; the defaults are the paper's setting. ``c_min`` None is 1/c_max."""

    tau: float = 7.0
    c_max: float = 2.0
    c_min: float | None = None
    lam: float = 1.0


class WeightCounts(NamedTuple):
    """What a weight does to a set of margins. ``effective``: (sum w)^2 / sum w^2."""

    amplified: int
    dampened: int
    turned_down: int
    unchanged: int
    mean: float
    effective: float


def log_weight(margins: np.ndarray, p: WeightParameters) -> np.ndarray:
    """``madpo.log_margin_weight`` for float64 without torch, for figures (Eq. 4; a test holds them equal)."""
    low = 1 / p.c_max if p.c_min is None else p.c_min
    h = np.asarray(margins, dtype=np.float64)
    log_share = -np.logaddexp(0, math.log(p.c_max - 1) - math.log1p(-low) + p.lam * (np.abs(h) - p.tau))
    target = low * h + (p.c_max - low) * np.clip(h, None, 1e30) * np.exp(log_share)
    log = np.minimum(np.logaddexp(0, -h) - np.logaddexp(0, -target), math.log(2))
    return np.where(h > -p.tau, log, 0.0)


def count_weights(margins: np.ndarray, parameters: WeightParameters) -> WeightCounts:
    """How many margins the weight amplifies, dampens, turns down; mean weight and effective sample size."""
    log = log_weight(margins, parameters)
    weights = np.exp(log)
    squares = float((weights**2).sum())
    return WeightCounts(
        amplified=int((log > 0).sum()),
        dampened=int(((log < 0) & (margins > 0)).sum()),
        turned_down=int(((log < 0) & (margins <= 0)).sum()),
        unchanged=int((log == 0).sum()),
        mean=float(weights.mean()) if len(weights) else 0.0,
        effective=float(weights.sum()) ** 2 / squares if squares else 0.0,
    )


def weight_figure(margins: np.ndarray, parameters: WeightParameters, *, label: str) -> str:
    """The weight curve above the histogram of the margins, coloured by what the weight does."""
    tau = parameters.tau
    limit = max(float(np.abs(margins).max(initial=1)), tau * 1.15) * 1.04
    top, curve, gap, bars = 14, 170, 34, 120
    base = top + curve + gap + bars
    x, y = _scale(-limit, limit, LEFT, WIDTH - RIGHT), _scale(0, 2, top + curve, top)
    parts = []
    for w in (0, 0.5, 1, 1.5, 2):
        parts.append(_line(LEFT, y(w), WIDTH - RIGHT, y(w), "axis strong" if w == 1 else "axis"))
        parts.append(_text(LEFT - 8, y(w) + 4, f"{w:g}", "tick end"))
    parts += _x_ticks(x, -limit, limit, base)
    for h, name in ((-tau, f"{MINUS}τ"), (tau, "τ")):
        parts.append(_line(x(h), top, x(h), base, "mark"))
        parts.append(_text(x(h), top + curve + gap / 2 + 5, name, "tick middle strong"))
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
    parts.append(_path([(x(h), y(w)) for h, w in points], "curve"))
    parts.append(_text(LEFT, base + 36, "reward margin h of the pair (log-odds)", "tick"))
    parts.append(_text(LEFT + 4, top + 12, "weight w(h)", "tick"))
    return _svg(base + 40, parts, label)


def line_figure(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    label: str,
    x_label: str,
    y_label: str,
    order: Sequence[str] = (),
) -> str:
    """Lines over a common x, each named at its end. ``order`` keeps a name's colour the same in every figure."""
    points = [point for line in series.values() for point in line]
    (x_low, x_high), (y_low, y_high) = _range([p[0] for p in points], 0), _range([p[1] for p in points], 0.06)
    top, height, right = 24, 220, 130
    x, y = _scale(x_low, x_high, LEFT, WIDTH - right), _scale(y_low, y_high, top + height, top)
    parts = _y_ticks(y, y_low, y_high, WIDTH - right) + _x_ticks(x, x_low, x_high, top + height)
    ends = _spread([y(line[-1][1]) for line in series.values()])
    for (name, line), end in zip(series.items(), ends, strict=True):
        kind = _colour(name, order or list(series))
        values = f"{name}: {line[0][1]:.3g} at the start, {line[-1][1]:.3g} at the end"
        parts.append(_path([(x(a), y(b)) for a, b in line], f"line {kind}", values))
        parts.append(_text(WIDTH - right + 8, end + 4, _cut(name, 18), f"name {kind}"))
    parts.append(_text(LEFT, top + height + 36, x_label, "tick"))
    parts.append(_text(LEFT + 4, top - 8, y_label, "tick"))
    data = {"series": series, "x": {"low": x_low, "high": x_high, "start": LEFT, "end": WIDTH - right}}
    return _svg(top + height + 40, parts, label, data)


def point_figure(
    points: Mapping[str, tuple[Estimate, Estimate]],
    *,
    label: str,
    x_label: str,
    y_label: str,
    order: Sequence[str] = (),
) -> str:
    """One point per name with its 95 % intervals on both axes; colours as in ``line_figure``."""
    (x_low, x_high) = _range([v for a, _ in points.values() for v in a[:3]], 0.06)
    (y_low, y_high) = _range([v for _, b in points.values() for v in b[:3]], 0.06)
    top, height, right = 24, 260, 130
    x, y = _scale(x_low, x_high, LEFT, WIDTH - right), _scale(y_low, y_high, top + height, top)
    parts = _y_ticks(y, y_low, y_high, WIDTH - right) + _x_ticks(x, x_low, x_high, top + height)
    ends = _spread([y(b.mean) for _, b in points.values()])
    for (name, (a, b)), end in zip(points.items(), ends, strict=True):
        kind = _colour(name, order or list(points))
        title = f"{name}: {y_label} {b.mean:.2f} ({b.low:.2f} to {b.high:.2f}), {x_label} {a.mean:.2f}"
        parts.append(_line(x(a.low), y(b.mean), x(a.high), y(b.mean), f"error {kind}"))
        parts.append(_line(x(a.mean), y(b.low), x(a.mean), y(b.high), f"error {kind}"))
        parts.append(
            f'<circle cx="{x(a.mean):.1f}" cy="{y(b.mean):.1f}" r="6" class="dot {kind}">'
            f"<title>{escape(title)}</title></circle>"
        )
        parts.append(_path([(x(a.mean) + 9, y(b.mean)), (WIDTH - right + 4, end)], f"leader {kind}"))
        parts.append(_text(WIDTH - right + 8, end + 4, _cut(name, 18), f"name {kind}"))
    parts.append(_text(LEFT, top + height + 36, x_label, "tick"))
    parts.append(_text(LEFT + 4, top - 8, y_label, "tick"))
    return _svg(top + height + 40, parts, label)


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
    (x_low, x_high) = _range([dot.x for dot in dots], 0.06)
    (y_low, y_high) = _range([v for dot in dots for v in dot.y[:3]] + ([line[1]] if line else []), 0.06)
    top, height, right = 24, 240, 130
    x, y, base = _scale(x_low, x_high, LEFT, WIDTH - right), _scale(y_low, y_high, top + height, top), top + height
    parts = _y_ticks(y, y_low, y_high, WIDTH - right)
    if names:
        parts.append(_line(LEFT, base, WIDTH - right, base, "axis strong"))
        parts += [_text(x(i), base + 19, _cut(name, 14), "tick middle") for i, name in enumerate(names)]
    else:
        parts += _x_ticks(x, x_low, x_high, base)
    if line is not None:
        parts.append(_line(LEFT, y(line[1]), WIDTH - right, y(line[1]), "mark"))
        parts.append(_text(WIDTH - right + 8, y(line[1]) + 4, _cut(line[0], 18), "name"))
    if diagonal:
        low, high = max(x_low, y_low), min(x_high, y_high)
        parts.append(_line(x(low), y(low), x(high), y(high), "mark"))
    for dot in sorted(dots, key=lambda dot: dot.marked):
        kind = "s3" if dot.marked else "s0"
        parts.append(_line(x(dot.x), y(dot.y.low), x(dot.x), y(dot.y.high), f"error {kind}"))
        parts.append(
            f'<circle cx="{x(dot.x):.1f}" cy="{y(dot.y.mean):.1f}" r="{7 if dot.marked else 5}" class="dot {kind}">'
            f"<title>{escape(dot.title)}</title></circle>"
        )
    parts.append(_text(LEFT, base + 36, x_label, "tick"))
    parts.append(_text(LEFT + 4, top - 8, y_label, "tick"))
    return _svg(base + 40, parts, label)


def _kind(h: float, parameters: WeightParameters) -> str:
    log = float(log_weight(np.array([h]), parameters)[0])
    if abs(log) < 1e-12:
        return "unchanged"
    return "amplified" if log > 0 else "dampened" if h > 0 else "turned-down"


def _colour(name: str, order: Sequence[str]) -> str:
    return f"s{list(order).index(name) % 8}"


class _scale:
    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.factor, self.start = low, (end - start) / ((high - low) or 1.0), start

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.factor


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * margin if high > low else max(abs(high), 1.0) * (0.1 if margin else 0.0)
    return low - pad, high + pad if high + pad > low - pad else low + 1.0


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _x_ticks(x: _scale, low: float, high: float, base: float) -> list[str]:
    marks = [_line(x(low), base, x(high), base, "axis strong")]
    for value in _ticks(low, high):
        marks.append(_line(x(value), base, x(value), base + 5, "axis strong"))
        marks.append(_text(x(value), base + 19, _number(value), "tick middle"))
    return marks


def _y_ticks(y: _scale, low: float, high: float, right: float) -> list[str]:
    marks = []
    for value in _ticks(low, high):
        marks.append(_line(LEFT, y(value), right, y(value), "axis"))
        marks.append(_text(LEFT - 8, y(value) + 4, _number(value), "tick end"))
    return marks


def _spread(heights: Sequence[float], gap: float = 16) -> list[float]:
    """Label positions near ``heights``, in their order, that do not overlap."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    shift = sum(p - h for p, h in zip(placed, heights, strict=True)) / max(1, len(heights))
    return [p - shift for p in placed]


def _number(value: float) -> str:
    return f"{value:g}".replace("-", MINUS)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _path(points: Sequence[tuple[float, float]], kind: str, title: str = "") -> str:
    steps = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<path d="M{steps}" class="{kind}">{inside}</path>'


def _svg(height: float, parts: Sequence[str], label: str, data: object = None) -> str:
    # What a pointer can read off stands in an attribute, for the page's script.
    values = f' data-series="{escape(json.dumps(data, allow_nan=False))}"' if data is not None else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}" class="figure"{values}>'
        f"{''.join(parts)}</svg>"
    )
