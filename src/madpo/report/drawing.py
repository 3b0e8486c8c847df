"""Charts as SVG for the page, each with its legend and, for who cannot see it, its numbers as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from madpo.report import svg
from madpo.report.charts import Chart, Mark, Panel, Series, WeightPanel
from madpo.report.figures import weight_figure
from madpo.report.markup import details, table
from madpo.report.numbers import one

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 300, 46, 12, 26, 44
HOVER_FROM = 12  # points of a line from which the page's script reads values under the pointer
ALT_MARKS = 12  # values that a figure's alternative text spells out; its table has all


def chart_html(chart: Chart) -> str:
    """The figure with its caption, its legend and its numbers."""
    panels = "".join(f"<div>{panel_svg(panel)}</div>" for panel in chart.panels)
    several = " several" if len(chart.panels) > 1 else ""
    return (
        f'<figure id="{escape(chart.name)}"><div class="panels{several}">{panels}</div>{_legend(chart)}'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>{_numbers(chart)}"
    )


def panel_svg(panel: Panel | WeightPanel) -> str:
    """One pair of axes."""
    if isinstance(panel, WeightPanel):
        return weight_figure(panel.margins, panel.parameters, label=f"Weight curve and margins, {panel.title}")
    base, data = TOP + HEIGHT - TOP - BOTTOM, None
    low, high = _y_range(panel)
    y = svg.Scale(low, high, base, TOP)
    parts = []
    for value in svg.ticks(low, high):
        parts.append(svg.line(LEFT, y(value), WIDTH - RIGHT, y(value), "axis"))
        parts.append(svg.text(LEFT - 8, y(value) + 4, svg.number(value), "tick end"))
    if panel.categories:
        parts += _bars(panel, y, max(low, min(0.0, high)), base)
    else:
        lines, data = _lines(panel, y, base)
        parts += lines
    parts.append(svg.text(LEFT, HEIGHT - 6, panel.x_label, "tick"))
    parts.append(svg.text(LEFT, 14, svg.cut(": ".join(filter(None, (panel.title, panel.y_label))), 60), "tick"))
    hover = f' data-series="{escape(json.dumps(data, allow_nan=False))}"' if data else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_alt(panel))}" class="figure"{hover}>'
        f"{''.join(parts)}</svg>"
    )


def _y_range(panel: Panel) -> tuple[float, float]:
    values = [v for s in panel.series for m in s.marks for v in (m.y, m.low, m.high) if v is not None] or [0.0, 1.0]
    if panel.diagonal:
        return 0.0, 1.0
    if panel.categories:
        values.append(0.0)
    low, high = svg.value_range(values, 0.06)
    return (0.0 if panel.categories and min(values) >= 0 else low), high


def _bars(panel: Panel, y: svg.Scale, zero: float, base: float) -> list[str]:
    own = [s for s in panel.series if not s.published]
    paper = {s.name.removesuffix(", the paper"): s for s in panel.series if s.published}
    slot = (WIDTH - LEFT - RIGHT) / len(panel.categories)
    width = slot * 0.8 / max(1, len(own))
    parts = [svg.line(LEFT, y(zero), WIDTH - RIGHT, y(zero), "axis strong")]
    for k, name in enumerate(panel.categories):
        parts.append(svg.text(LEFT + slot * (k + 0.5), base + 18, svg.cut(name, 16), "tick middle"))
    for i, series in enumerate(own):
        for mark in series.marks:
            x = LEFT + slot * (mark.x + 0.1) + width * i
            top, bottom = min(y(mark.y), y(zero)), max(y(mark.y), y(zero))
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{top:.1f}" width="{width - 2:.1f}" height="{max(0.5, bottom - top):.1f}" '
                f'class="column s{series.colour}"><title>{escape(mark.says)}</title></rect>'
            )
            middle = x + width / 2
            if mark.low is not None and mark.high is not None:
                parts.append(svg.line(middle, y(mark.low), middle, y(mark.high), "whisk"))
        for mark in paper[series.name].marks if series.name in paper else ():
            x = LEFT + slot * (mark.x + 0.1) + width * i
            parts.append(svg.path([(x, y(mark.y)), (x + width, y(mark.y))], "published", mark.says))
    return parts


def _lines(panel: Panel, y: svg.Scale, base: float) -> tuple[list[str], dict[str, Any] | None]:
    if panel.diagonal:
        x_low, x_high = 0.5, 1.0
    else:
        points = [v for s in panel.series for m in s.marks for v in (m.x, m.x_low, m.x_high) if v is not None]
        x_low, x_high = svg.value_range(points, 0.04)
    x = svg.Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    parts = [svg.line(LEFT, base, WIDTH - RIGHT, base, "axis strong")]
    for value in svg.ticks(x_low, x_high):
        parts.append(svg.line(x(value), base, x(value), base + 5, "axis strong"))
        parts.append(svg.text(x(value), base + 18, svg.number(value), "tick middle"))
    if panel.diagonal:
        parts.append(svg.line(x(0.5), y(0.5), x(1), y(1), "mark"))
    for series in sorted(panel.series, key=lambda s: not s.published):
        parts += _series(series, x, y, _shape(panel, series))
    longest = max((len(s.marks) for s in panel.series), default=0)
    if longest < HOVER_FROM:
        return parts, None
    values = {s.name: [(m.x, m.y) for m in s.marks] for s in panel.series}
    axis = {"low": x_low, "high": x_high, "start": LEFT, "end": WIDTH - RIGHT, "top": TOP, "base": base}
    return parts, {"series": values, "x": axis}


def _series(series: Series, x: svg.Scale, y: svg.Scale, shape: int) -> list[str]:
    kind = f"s{series.colour}{' published' if series.published else ''}"
    parts = []
    if series.line and len(series.marks) > 1:
        parts.append(svg.path([(x(m.x), y(m.y)) for m in series.marks], f"line {kind}", series.name))
    for mark in series.marks if series.dots else ():
        if mark.low is not None and mark.high is not None:
            parts.append(svg.line(x(mark.x), y(mark.low), x(mark.x), y(mark.high), f"error {kind}"))
        if mark.x_low is not None and mark.x_high is not None:
            parts.append(svg.line(x(mark.x_low), y(mark.y), x(mark.x_high), y(mark.y), f"error {kind}"))
        parts.append(svg.dot(x(mark.x), y(mark.y), shape, f"dot {kind}", mark.says))
    return parts


def _shape(panel: Panel, series: Series) -> int:
    if series.shape is not None:
        return series.shape
    names = list(dict.fromkeys(s.name.removesuffix(", the paper") for s in panel.series))
    return names.index(series.name.removesuffix(", the paper"))


def _legend(chart: Chart) -> str:
    entries: dict[str, str] = {}
    for panel in chart.panels:
        if not isinstance(panel, Panel) or (len(panel.series) == 1 and not panel.categories):
            continue
        for series in panel.series:
            if series.published:
                entries.setdefault("the paper", _swatch(series, panel, "s7"))
            else:
                entries.setdefault(series.name, _swatch(series, panel, f"s{series.colour}"))
    if not entries:
        return ""
    last = entries.pop("the paper", None)
    if last:
        entries["the paper"] = last
    items = "".join(f"<li>{mark}<bdi>{escape(name)}</bdi></li>" for name, mark in entries.items())
    return f'<ul class="legend">{items}</ul>'


def _swatch(series: Series, panel: Panel, colour: str) -> str:
    if panel.categories:
        inside = (
            svg.path([(2, 8), (26, 8)], "published")
            if series.published
            else f'<rect x="6" y="2" width="16" height="12" class="column {colour}"/>'
        )
    else:
        kind = f"{colour}{' published' if series.published else ''}"
        inside = svg.path([(1, 8), (27, 8)], f"line {kind}") if series.line else ""
        if series.dots:
            inside += svg.dot(14, 8, _shape(panel, series), f"dot {kind}", "")
    return f'<svg viewBox="0 0 28 16" class="swatch" aria-hidden="true">{inside}</svg>'


def _alt(panel: Panel) -> str:
    parts = []
    for series in panel.series:
        marks = series.marks
        if len(marks) > ALT_MARKS:
            parts.append(f"{series.name} from {one(marks[0].y)} to {one(marks[-1].y)}")
        elif marks:
            parts.append(f"{series.name} {', '.join(f'{_at(panel, m)} {one(m.y)}' for m in marks)}")
    title = ": ".join(filter(None, (panel.title, panel.y_label)))
    return f"{title}. {'; '.join(parts)}." if parts else f"{title}."


def _at(panel: Panel, mark: Mark) -> str:
    return panel.categories[int(mark.x)] if panel.categories else svg.number(round(mark.x, 3))


def _numbers(chart: Chart) -> str:
    rows: list[Sequence[str]] = []
    for panel in chart.panels:
        if not isinstance(panel, Panel):
            continue
        for series in panel.series:
            marks = series.marks if len(series.marks) <= ALT_MARKS else (series.marks[0], series.marks[-1])
            for mark in marks:
                interval = "" if mark.low is None or mark.high is None else f"{one(mark.low)} to {one(mark.high)}"
                rows.append((series.name, panel.title, _at(panel, mark), one(mark.y), interval))
    if not rows:
        return ""
    head = ("what", "panel", "at", "value", "95 % interval")
    cells = [[escape(cell) for cell in row] for row in rows]
    return details("The numbers of this figure", table(head, cells, f"Numbers, {chart.title}", plain=True))
