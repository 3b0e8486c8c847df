"""Charts as SVG, each with its legend, an alternative text and its numbers; the same figures as files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

from markupsafe import Markup

from madpo.core.storage import write_atomically
from madpo.report import svg
from madpo.report.charts import Chart, Levels, Mark, Panel, Series, WeightPanel
from madpo.report.numbers import one
from madpo.report.svg import PHONE, Scale
from madpo.report.weight_figure import weight_figure

HEIGHTS = {360: 240, 540: 320}
RIGHT, BOTTOM, ROW = 18, 46, 26
HOVER_FROM = 12  # points of a line from which the page's script reads values under the pointer
ALT_MARKS = 12  # values that a figure's alternative text spells out; its table has all
PAPER = ", the paper"
NUMBERS = ("what", "panel", "at", "value", "95 % interval")


class Drawn(NamedTuple):
    """A chart for a page: its figures, its legend as (swatch, name), and its numbers as rows of text."""

    chart: Chart
    columns: int
    panels: list[Markup]
    legend: list[tuple[Markup, str]]
    numbers: list[tuple[str, ...]]


def draw(chart: Chart) -> Drawn:
    """The chart for a page."""
    legend = [(svg.markup(swatch), name) for name, swatch in _legend(chart)]
    panels = [svg.markup(panel) for panel in _panels(chart)]
    return Drawn(chart, columns_of(chart), panels, legend, list(_numbers(chart)))


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


def _panels(chart: Chart) -> list[ET.Element]:
    width = 360 if columns_of(chart) == 3 else 540
    levels = [panel for panel in chart.panels if isinstance(panel, Levels)]
    drawn = []
    for panel in chart.panels:
        if isinstance(panel, WeightPanel):
            label = f"Weight curve and margins, {panel.title}"
            drawn.append(weight_figure(panel.margins, panel.parameters, label=label, title=panel.title))
        elif isinstance(panel, Levels):
            drawn.append(_levels(panel, levels, width))
        else:
            drawn.append(_axes(panel, width))
    return drawn


# Values with intervals, one under the other


def _levels(panel: Levels, together: Sequence[Levels], width: int) -> ET.Element:
    """All panels of a chart have one range, so that they compare."""
    values = [v for p in together for ln in p.lines for v in (ln.mean, ln.low, ln.high, ln.published) if v is not None]
    values += [p.reference[1] for p in together if p.reference]
    names = [line.name for p in together for line in p.lines]
    size = PHONE[width]
    left = min(0.4 * width, max(svg.width_of(name, size) for name in names)) + 12
    top = 28 if panel.title else 8
    base = top + ROW * len(panel.lines)
    figure = svg.figure(width, base + 40, _alt_levels(panel))
    x = Scale(*svg.value_range(values, 0.05), left, width - RIGHT)
    if panel.title:
        svg.text(figure, 0, 18, svg.cut(panel.title, width, size), "panel-title")
    for value in x.ticks(5):
        svg.line(figure, x(value), top, x(value), base, "axis")
        svg.text(figure, x(value), base + 16, svg.number(value), "tick middle")
    svg.text(figure, width - RIGHT, base + 34, panel.label, "tick end")
    if panel.reference is not None:
        svg.line(figure, x(panel.reference[1]), top, x(panel.reference[1]), base, "mark")
    for i, line in enumerate(panel.lines):
        y, kind = top + ROW * (i + 0.5), f"s{line.colour}"
        svg.text(figure, left - 12, y + 4, svg.cut(line.name, left - 12, size), "name end")
        says = f"{line.name}: {one(line.mean)}"
        if line.published is not None:
            svg.dot(
                figure, x(line.published), y, i, f"dot published {kind}", f"{line.name}{PAPER}: {line.published:.2f}"
            )
        if line.low is not None and line.high is not None:
            svg.line(figure, x(line.low), y, x(line.high), y, f"error {kind}")
            says += f" ({one(line.low)} to {one(line.high)})"
        svg.dot(figure, x(line.mean), y, i, f"dot {kind}", says)
    return figure


# Axes


def _axes(panel: Panel, width: int) -> ET.Element:
    height, size = HEIGHTS[width], PHONE[width]
    top, base = (48 if panel.title else 28), HEIGHTS[width] - BOTTOM
    y = Scale(*_y_range(panel), base, top)
    marks = [svg.number(value) for value in y.ticks()]
    left = max(svg.width_of(mark, size) for mark in marks) + 12
    hover = _hover(panel)
    figure = svg.figure(width, height, _alt(panel))
    x = _x_scale(panel, left, width)
    for value, words in zip(y.ticks(), marks, strict=True):
        svg.line(figure, left, y(value), width - RIGHT, y(value), "axis")
        svg.text(figure, left - 8, y(value) + 4, words, "tick end")
    svg.line(figure, left, base, width - RIGHT, base, "axis strong")
    for value, words in _x_ticks(panel, x, size):
        svg.line(figure, x(value), base, x(value), base + 5, "axis strong")
        svg.text(figure, x(value), base + 19, words, "tick middle")
    svg.text(figure, width - RIGHT, height - 8, svg.cut(panel.x_label, width - RIGHT, size), "tick end")
    if panel.title:
        svg.text(figure, 0, 18, svg.cut(panel.title, width, size), "panel-title")
    svg.text(figure, 0, top - 10, svg.cut(panel.y_label, width, size), "tick")
    if panel.diagonal:
        svg.path(figure, [(x(v), y(v)) for v in (0.5, 1.0)], "mark")
    for series in sorted(panel.series, key=lambda s: not s.published):
        _series(figure, series, x, y, _shape(panel, series))
    if panel.reference is not None:
        name, value = panel.reference
        svg.line(figure, left, y(value), width - RIGHT, y(value), "mark")
        svg.text(figure, width - RIGHT, y(value) - 5, name, "tick end halo")
    if hover:
        place = {"low": x.low, "high": x.high, "start": x.start, "end": x.end, "top": top, "base": base}
        figure.set("data-series", json.dumps({"series": hover, "x": place}, allow_nan=False))
    return figure


def _y_range(panel: Panel) -> tuple[float, float]:
    if panel.diagonal:
        return 0.0, 1.0
    values = [v for s in panel.series for m in s.marks for v in (m.y, m.low, m.high) if v is not None] or [0.0, 1.0]
    return svg.value_range([*values, *([panel.reference[1]] if panel.reference else [])], 0.06)


def _x_scale(panel: Panel, left: float, width: int) -> Scale:
    points = [v for s in panel.series for m in s.marks for v in (m.x, m.x_low, m.x_high) if v is not None] or [0.0, 1.0]
    if panel.log and min(points) > 0:
        low, high = svg.value_range([math.log10(v) for v in points], 0.06)
        return Scale(10**low, 10**high, left, width - RIGHT, log=True)
    if panel.names:
        return Scale(-0.5, len(panel.names) - 0.5, left, width - RIGHT)
    return Scale(*((0.5, 1.0) if panel.diagonal else svg.value_range(points, 0.04)), left, width - RIGHT)


def _x_ticks(panel: Panel, x: Scale, size: float) -> list[tuple[float, str]]:
    if panel.names:
        room = (x.end - x.start) / len(panel.names)
        return [(float(i), svg.cut(name, room, size)) for i, name in enumerate(panel.names)]
    found = [(value, svg.number(value)) for value in x.ticks()]
    # A label in the middle of a tick at the edge would leave the figure.
    return [(value, words) for value, words in found if x(value) + svg.width_of(words, size) / 2 < x.end + RIGHT]


def _series(figure: ET.Element, series: Series, x: Scale, y: Scale, shape: int) -> None:
    kind = f"s{series.colour}{' published' * series.published}{' raw' * series.raw}"
    if series.line and len(series.marks) > 1:
        svg.path(figure, [(x(m.x), y(m.y)) for m in series.marks], f"line {kind}", series.name)
    for mark in series.marks if series.dots else ():
        if mark.low is not None and mark.high is not None:
            svg.line(figure, x(mark.x), y(mark.low), x(mark.x), y(mark.high), f"error thin {kind}")
        if mark.x_low is not None and mark.x_high is not None:
            svg.line(figure, x(mark.x_low), y(mark.y), x(mark.x_high), y(mark.y), f"error thin {kind}")
        svg.dot(figure, x(mark.x), y(mark.y), shape, f"dot {kind}", mark.says)


def _shape(panel: Panel, series: Series) -> int:
    if series.shape is not None:
        return series.shape
    names = list(dict.fromkeys(s.name.removesuffix(PAPER) for s in panel.series))
    return names.index(series.name.removesuffix(PAPER))


def _hover(panel: Panel) -> dict[str, Any]:
    """The values of every line, by name, where there are enough to ask for."""
    lines = [s for s in panel.series if not s.raw]
    if panel.log or max((len(s.marks) for s in lines), default=0) < HOVER_FROM:
        return {}
    return {s.name: [(m.x, float(f"{m.y:.4g}")) for m in s.marks] for s in lines}


# Legends, alternative texts, numbers


def _legend(chart: Chart) -> list[tuple[str, ET.Element]]:
    """Name -> a mark as in the figure; the paper last."""
    entries: dict[str, ET.Element] = {}
    paper: ET.Element | None = None
    for panel in chart.panels:
        if isinstance(panel, Levels) and any(line.published is not None for line in panel.lines):
            paper = _swatch(Series("", (), 7, published=True, line=False), 0)
        if not isinstance(panel, Panel):
            continue
        for series in panel.series:
            if series.published:
                paper = _swatch(Series("", (), 7, published=True, line=series.line), _shape(panel, series))
            elif not series.raw and len([s for s in panel.series if not s.raw]) > 1:
                entries.setdefault(series.name, _swatch(series, _shape(panel, series)))
    return [*entries.items(), *([("the paper's value", paper)] if paper is not None else [])]


def _swatch(series: Series, shape: int) -> ET.Element:
    element = ET.Element("svg", {"viewBox": "0 0 28 16", "class": "swatch", "aria-hidden": "true"})
    middle = (Mark(14, 8),) if series.dots else ()
    kind = f"s{series.colour}{' published' * series.published}"
    if series.line:
        svg.path(element, [(1, 8), (27, 8)], f"line {kind}")
    for mark in middle:
        svg.dot(element, mark.x, mark.y, shape, f"dot {kind}")
    return element


def _alt(panel: Panel) -> str:
    parts = []
    for series in panel.series:
        marks = series.marks
        if series.raw:
            continue
        if len(marks) > ALT_MARKS:
            parts.append(f"{series.name} from {one(marks[0].y)} to {one(marks[-1].y)}")
        elif marks:
            parts.append(f"{series.name} {', '.join(f'{_at(panel, m)} {one(m.y)}' for m in marks)}")
    return f"{': '.join(filter(None, (panel.title, panel.y_label)))}. {'; '.join(parts)}."


def _alt_levels(panel: Levels) -> str:
    words = ", ".join(f"{line.name} {one(line.mean)}" for line in panel.lines)
    return f"{': '.join(filter(None, (panel.title, panel.label)))}. {words}."


def _at(panel: Panel, mark: Mark) -> str:
    return panel.names[int(mark.x)] if panel.names else svg.number(round(mark.x, 3))


def _numbers(chart: Chart) -> Iterable[tuple[str, ...]]:
    """As in ``NUMBERS``."""
    for panel in chart.panels:
        if isinstance(panel, Levels):
            for line in panel.lines:
                yield line.name, panel.title, "", one(line.mean), _interval(line.low, line.high)
                if line.published is not None:
                    yield line.name + PAPER, panel.title, "", one(line.published), ""
        elif isinstance(panel, Panel):
            for series in panel.series:
                marks = series.marks if len(series.marks) <= ALT_MARKS else (series.marks[0], series.marks[-1])
                for mark in () if series.raw else marks:
                    yield series.name, panel.title, _at(panel, mark), one(mark.y), _interval(mark.low, mark.high)


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{one(low)} to {one(high)}"


# Files


def _together(chart: Chart) -> ET.Element:
    """All panels, the title and the legend in one figure."""
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
