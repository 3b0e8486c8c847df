"""Charts as SVG, each with its legend, an alternative text and its numbers; the same figures as files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import numpy as np
from markupsafe import Markup

from madpo.core.storage import write_atomically
from madpo.report import svg
from madpo.report.charts import PAPER, Chart, Mark, Panel, Series, WeightPanel
from madpo.report.numbers import MINUS, one
from madpo.report.pages import Table, cell
from madpo.report.svg import PHONE, Scale
from madpo.rewards.weight_counts import WeightParameters, log_weight

HEIGHTS = {360: 240, 540: 320}
LEAST = 1e-3  # height of a panel, as a share of its largest value
LOW = 230  # of a panel of 540 where there are two rows of them, so that both are on the first screen
RIGHT, BOTTOM, ROW = 18, 46, 26
HOVER_FROM = 12  # points of a line from which the page's script reads values under the pointer
ALT_MARKS = 12  # values that a figure's alternative text spells out; its table has all


class Drawn(NamedTuple):
    """A chart for a page: its figures, its legend as (swatch, name), and its numbers."""

    chart: Chart
    columns: int
    panels: list[Markup]
    legend: list[tuple[Markup, str]]
    numbers: Table


def draw(chart: Chart) -> Drawn:
    """The chart for a page."""
    legend = [(svg.markup(swatch), name) for name, swatch in _legend(chart)]
    panels = [svg.markup(panel) for panel in _panels(chart)]
    head = ("what", "panel", "at", "value", "95 % interval")
    rows = [
        [cell(text) for text in (series.name, panel.title, *_said(panel, mark))]
        for panel in _axes_of(chart)
        for series in panel.series
        if not series.raw
        for mark in (series.marks if len(series.marks) <= ALT_MARKS else (series.marks[0], series.marks[-1]))
    ]
    return Drawn(chart, columns_of(chart), panels, legend, Table(f"Numbers, {chart.title}", head, rows, plain=True))


def save_charts(charts: Iterable[Chart], folder: Path) -> None:
    """Write every chart as an SVG file into ``folder``, in the light colours of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        write_atomically(folder / f"{chart.name}.svg", svg.standalone(_together(chart)))


def columns_of(chart: Chart) -> int:
    """Panels in one row."""
    n = len(chart.panels)
    if any(isinstance(panel, WeightPanel) for panel in chart.panels):
        return 1
    return {1: 1, 2: 2, 3: 3, 4: 2}.get(n, 3)


def _axes_of(chart: Chart) -> list[Panel]:
    return [panel for panel in chart.panels if isinstance(panel, Panel)]


def _panels(chart: Chart) -> list[ET.Element]:
    rows = [panel for panel in _axes_of(chart) if panel.rows]
    width = 360 if rows or columns_of(chart) == 3 else 540
    return [
        _axes(panel, rows, width, LOW if width == 540 and len(chart.panels) > 2 else HEIGHTS[width])
        if isinstance(panel, Panel)
        else weight_figure(
            panel.margins, panel.parameters, label=f"Weight curve and margins, {panel.title}", title=panel.title
        )
        for panel in chart.panels
    ]


# Axes


def _axes(panel: Panel, together: Sequence[Panel], width: int, height: int) -> ET.Element:
    """A pair of axes; panels ``together`` with it share their range and the room for names where there are rows, which
    decide the height there."""
    rows, size = panel.rows, PHONE[width]
    top = (28 if panel.title else 8) if rows else (48 if panel.title else 28)
    height = top + ROW * len(rows) + BOTTOM if rows else height
    base = height - BOTTOM
    y = Scale(-0.5, len(rows) - 0.5, top, base) if rows else Scale(*_y_range(panel), base, top)
    y_ticks = list(enumerate(rows)) if rows else [(value, svg.number(value)) for value in y.ticks()]
    names = [name for p in together for name in p.rows] or [words for _, words in y_ticks]
    left = min(0.4 * width, max(svg.width_of(name, size) for name in names)) + 12
    x = _x_scale(panel, together if rows else [panel], left, width)
    figure = svg.figure(width, height, _alt(panel))
    for value, words in y_ticks:
        if not rows:
            svg.line(figure, left, y(value), width - RIGHT, y(value), "axis")
        svg.text(figure, left - 10, y(value) + 4, svg.cut(words, left - 12, size), "name end" if rows else "tick end")
    svg.line(figure, left, base, width - RIGHT, base, "axis strong")
    for value in x.ticks():
        words, room = svg.number(value), svg.width_of(svg.number(value), size) / 2
        if left - 12 < x(value) - room and x(value) + room < width:  # a label at the edge would leave the figure
            svg.line(figure, x(value), top if rows else base, x(value), base + 5, "axis" if rows else "axis strong")
            svg.text(figure, x(value), base + 19, words, "tick middle")
    svg.text(figure, width - RIGHT, height - 8, svg.cut(panel.x_label, width - RIGHT, size), "tick end")
    svg.text(figure, 2, 18, svg.cut(panel.title, width - 2, size), "panel-title")  # a bold Y reaches to its left
    svg.text(figure, 2, max(18, top - 13), svg.cut(panel.y_label, width - 2, size), "tick")
    if panel.diagonal:
        svg.path(figure, [(x(v), y(v)) for v in (0.5, 1.0)], "mark")
    if panel.reference is not None:
        value = panel.reference[1]
        ends = [(x(value), top), (x(value), base)] if rows else [(left, y(value)), (width - RIGHT, y(value))]
        svg.path(figure, ends, "mark")
        if not rows:
            _reference_name(figure, panel, x, y)
    for series in sorted(panel.series, key=lambda s: not s.published):
        _series(figure, series, x, y)
    if hover := _hover(panel):
        place = {"low": x.low, "high": x.high, "start": x.start, "end": x.end, "top": top, "base": base}
        figure.set("data-series", json.dumps({"series": hover, "x": place}, allow_nan=False))
    return figure


def _reference_name(figure: ET.Element, panel: Panel, x: Scale, y: Scale) -> None:
    """The name of the line to compare with, at the end where fewer marks are in its way."""
    assert panel.reference is not None
    name, value = panel.reference
    room = svg.width_of(name, svg.TICK)
    near = [x(m.x) for s in panel.series for m in s.marks if -8 < y(value) - y(m.y) < 24]
    right = sum(at > x.end - room for at in near) <= sum(at < x.start + room for at in near)
    svg.text(figure, x.end if right else x.start + 4, y(value) - 5, name, f"tick {'end ' * right}halo")


def _y_range(panel: Panel) -> tuple[float, float]:
    if panel.diagonal:
        return 0.0, 1.0
    values = [v for s in panel.series for m in s.marks for v in (m.y, m.low, m.high) if v is not None] or [0.0, 1.0]
    low, high = svg.value_range([*values, *([panel.reference[1]] if panel.reference else [])], 0.06)
    # Closer together, values would differ in digits that nobody reads.
    more = max(0.0, LEAST * max(abs(low), abs(high)) - (high - low)) / 2
    return low - more, high + more


def _x_scale(panel: Panel, panels: Sequence[Panel], left: float, width: int) -> Scale:
    marks = [m for p in panels for s in p.series for m in s.marks]
    points = [v for m in marks for v in (m.x, m.x_low, m.x_high) if v is not None] or [0.0, 1.0]
    points += [p.reference[1] for p in panels if p.reference and p.rows]
    if panel.log and min(points) > 0:
        low, high = svg.value_range([math.log10(v) for v in points], 0.06)
        return Scale(10**low, 10**high, left, width - RIGHT, log=True)
    whole = not panel.diagonal and all(float(v).is_integer() for v in points)  # steps
    return Scale(*((0.5, 1.0) if panel.diagonal else svg.value_range(points, 0.05)), left, width - RIGHT, whole=whole)


def _series(figure: ET.Element, series: Series, x: Scale, y: Scale) -> None:
    kind = f"s{series.colour}{' published' * series.published}{' raw' * series.raw}"
    if series.line and len(series.marks) > 1:
        svg.path(figure, [(x(m.x), y(m.y)) for m in series.marks], f"line {kind}", series.name)
    for mark in series.marks if series.dots else ():
        if mark.low is not None and mark.high is not None:
            svg.line(figure, x(mark.x), y(mark.low), x(mark.x), y(mark.high), f"error thin {kind}")
        if mark.x_low is not None and mark.x_high is not None:
            thin = "thin " * (mark.low is not None)
            svg.line(figure, x(mark.x_low), y(mark.y), x(mark.x_high), y(mark.y), f"error {thin}{kind}")
        svg.dot(figure, x(mark.x), y(mark.y), series.colour, f"dot {kind}", mark.says)


def _hover(panel: Panel) -> dict[str, Any]:
    """The values of every line, by name, where there are enough to ask for."""
    lines = [s for s in panel.series if not s.raw]
    if panel.log or max((len(s.marks) for s in lines), default=0) < HOVER_FROM:
        return {}
    return {s.name: [(m.x, float(f"{m.y:.4g}")) for m in s.marks] for s in lines}


# Legends, alternative texts, numbers


def _legend(chart: Chart) -> list[tuple[str, ET.Element]]:
    """Name -> a mark as in the figure; the paper last."""
    named: dict[str, Series] = {}
    paper: dict[str, Series] = {}
    for panel in _axes_of(chart):
        drawn = [s for s in panel.series if not s.raw]
        for series in drawn:
            if series.published:
                paper["the paper's value"] = replace(series, colour=7)
            elif len(drawn) > 1 and series.name not in panel.rows:
                # A point in one panel may be a line in another.
                named[series.name] = max(named.get(series.name, series), series, key=lambda s: len(s.marks))
    return [(name, _swatch(series)) for name, series in (named | paper).items()]


def _swatch(series: Series) -> ET.Element:
    element = ET.Element("svg", {"viewBox": "0 0 28 16", "class": "swatch", "aria-hidden": "true"})
    kind = f"s{series.colour}{' published' * series.published}"
    if series.line and len(series.marks) > 1:
        svg.path(element, [(1, 8), (27, 8)], f"line {kind}")
    if series.dots:
        svg.dot(element, 14, 8, series.colour, f"dot {kind}")
    return element


def _alt(panel: Panel) -> str:
    parts = []
    for series in panel.series:
        texts = [] if series.raw else [_said(panel, mark) for mark in series.marks]
        if len(texts) > ALT_MARKS:
            parts.append(f"{series.name} from {texts[0][1]} to {texts[-1][1]}")
        elif texts:
            parts.append(f"{series.name} {', '.join(' '.join(filter(None, words[:2])) for words in texts)}")
    return (
        f"{': '.join(filter(None, (panel.title, panel.x_label if panel.rows else panel.y_label)))}. {'; '.join(parts)}."
    )


def _said(panel: Panel, mark: Mark) -> tuple[str, str, str]:
    """Where a mark is, its value, and the value's interval."""
    if panel.rows:
        at, value, low, high = panel.rows[int(mark.y)], mark.x, mark.x_low, mark.x_high
        at = "" if any(series.name.removesuffix(PAPER) == at for series in panel.series) else at
    else:
        at, value, low, high = svg.number(round(mark.x, 3)), mark.y, mark.low, mark.high
    return at, one(value), "" if low is None or high is None else f"{one(low)} to {one(high)}"


# Files


def _together(chart: Chart) -> ET.Element:
    panels, columns, gap, margin = _panels(chart), columns_of(chart), 24, 16
    sizes = [[float(v) for v in panel.get("viewBox", "").split()[2:]] for panel in panels]
    width = max(w for w, _ in sizes) * columns + gap * (columns - 1)
    whole = ET.Element("svg")
    y = margin + 20.0
    svg.text(whole, margin, margin + 8, svg.cut(chart.title, width, 13), "panel-title")
    for start in range(0, len(panels), columns):
        x = float(margin)
        for panel, (w, h) in zip(panels[start : start + columns], sizes[start : start + columns], strict=True):
            for name, value in (("x", x), ("y", y), ("width", w), ("height", h)):
                panel.set(name, f"{value:g}")
            panel.attrib.pop("data-series", None)
            whole.append(panel)
            x += w + gap
        y += max(h for _, h in sizes[start : start + columns]) + gap
    x = float(margin)
    for name, swatch in _legend(chart):
        if x > margin and x + 40 + svg.width_of(name, svg.TICK) > width:
            x, y = float(margin), y + 20
        for key, value in (("x", x), ("y", y - 12), ("width", 28.0), ("height", 16.0)):
            swatch.set(key, f"{value:g}")
        whole.append(swatch)
        svg.text(whole, x + 34, y, svg.cut(name, width - 40, svg.TICK), "tick")
        x += 56 + svg.width_of(name, svg.TICK)
    whole.set("viewBox", f"0 0 {width + 2 * margin:g} {y + margin:g}")
    return whole


def weight_figure(margins: np.ndarray, parameters: WeightParameters, *, label: str, title: str = "") -> ET.Element:
    """The weight curve above the histogram of the margins, coloured by what the weight does."""
    width, left, end = 720, 50, 706
    tau = parameters.tau
    limit = max(float(np.abs(margins).max(initial=1)), tau * 1.15) * 1.04
    top, curve, gap, bars = 20, 170, 52, 120
    base = top + curve + gap + bars
    x, y = svg.Scale(-limit, limit, left, end), svg.Scale(0, 2, top + curve, top)
    figure = svg.figure(width, base + 44, label)
    for w in (0, 0.5, 1, 1.5, 2):
        svg.line(figure, left, y(w), end, y(w), "axis strong" if w == 1 else "axis")
        svg.text(figure, left - 8, y(w) + 4, f"{w:g}", "tick end")
    svg.line(figure, left, base, end, base, "axis strong")
    for value in x.ticks(8):
        svg.line(figure, x(value), base, x(value), base + 5, "axis strong")
        svg.text(figure, x(value), base + 19, svg.number(value), "tick middle")
    for h, name in ((-tau, f"{MINUS}τ"), (tau, "τ")):
        svg.line(figure, x(h), top, x(h), base, "mark")
        svg.text(figure, x(h), top + curve + 20, name, "tick middle strong")
    counts, edges = np.histogram(margins, bins=60, range=(-limit, limit))
    middles = (edges[:-1] + edges[1:]) / 2
    log = log_weight(middles, parameters)
    kinds = np.where(log > 0, "amplified", np.where(middles > 0, "dampened", "turned-down"))
    kinds = np.where(np.abs(log) < 1e-12, "unchanged", kinds)
    for count, low, high, kind in zip(counts, edges[:-1], edges[1:], kinds, strict=True):
        if count:
            height = bars * count / counts.max()
            says = f"{count} pair{'' if count == 1 else 's'} with margins from {low:.2f} to {high:.2f}"
            wide = max(1.0, x(high) - x(low) - 1)
            svg.box(figure, x(low) + 0.5, base - height, wide, height, f"bar {kind}", says)
    grid = np.linspace(-limit, limit, 481)
    curve_points = zip(grid, np.exp(log_weight(grid, parameters)), strict=True)
    svg.path(figure, [(x(h), y(w)) for h, w in curve_points], "curve")
    svg.text(figure, end, base + 38, "reward margin h of the pair, log-odds", "tick end")
    svg.text(figure, 0, 12, "weight w(h)", "tick")
    svg.text(figure, end, 13, title, "panel-title end")
    svg.text(figure, 0, base - bars - 6, "pairs", "tick")
    return figure
