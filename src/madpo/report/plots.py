"""Charts as files for papers and slides: PNG, SVG and PDF, drawn by matplotlib.

The same records give the same bytes: no dates, and ids from a fixed salt.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from madpo.core.storage import write_atomically
from madpo.report.charts import Chart, Panel, Series, WeightPanel
from madpo.rewards.weight_counts import log_weight

FORMATS = ("png", "svg", "pdf")
# The page's colours on light ground (page.css, s0 to s7).
PALETTE = ("#2f7fb0", "#c98a2b", "#a3476b", "#3c8f73", "#6f63b5", "#8a6d4f", "#5d7f2c", "#707780")
SHAPES = "os^D"
_STYLE: Any = {
    "svg.hashsalt": "madpo", "svg.fonttype": "path", "pdf.fonttype": 42, "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e4e1d9",
    "axes.axisbelow": True, "legend.frameon": False, "text.parse_math": False, "axes.unicode_minus": True,
}  # fmt: skip


def save_charts(charts: Iterable[Chart], folder: Path) -> list[Path]:
    """Write every chart in every format into ``folder``; the paths, in order."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # A name in letters that the font lacks is drawn as boxes; the page shows it as it is.
    with warnings.catch_warnings(), mpl.rc_context(_STYLE):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message=".*does not support Arabic natively")
        for chart in charts:
            figure = Figure(figsize=(max(4.6, 3.4 * len(chart.panels)), 3.2), layout="constrained")
            axes = figure.subplots(1, len(chart.panels), squeeze=False)[0]
            for place, panel in zip(axes, chart.panels, strict=True):
                _draw(place, panel)
            _legend(figure, chart)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once, not once more for every format
            for kind in FORMATS:
                path = folder / f"{chart.name}.{kind}"
                out = BytesIO()
                dates = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None, "ModDate": None}}[kind]
                figure.savefig(out, format=kind, dpi=160, metadata=dates)
                write_atomically(path, out.getvalue())
                written.append(path)
    return written


def _draw(axes: Any, panel: Panel | WeightPanel) -> None:
    if isinstance(panel, WeightPanel):
        _weights(axes, panel)
        return
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.categories:
        _bars(axes, panel)
        return
    if panel.diagonal:
        axes.plot([0.5, 1], [0.5, 1], color="#676c75", linewidth=0.8, linestyle=":")
        axes.set_xlim(0.5, 1)
        axes.set_ylim(0, 1)
    for series in panel.series:
        _line(axes, panel, series)


def _bars(axes: Any, panel: Panel) -> None:
    own = [s for s in panel.series if not s.published]
    paper = {s.name.removesuffix(", the paper"): s for s in panel.series if s.published}
    width = 0.8 / max(1, len(own))
    for i, series in enumerate(own):
        shift = -0.4 + width * (i + 0.5)
        if not series.marks:
            continue  # its place stays, so that a method has one place in all panels
        x, y = _xy(series)
        axes.bar(x + shift, y, width * 0.92, color=PALETTE[series.colour], label=series.name)
        for mark in series.marks:
            if mark.low is not None and mark.high is not None:
                axes.plot([mark.x + shift] * 2, [mark.low, mark.high], color="#23262b", linewidth=1)
        for mark in paper[series.name].marks if series.name in paper else ():
            ends = [mark.x + shift - width / 2, mark.x + shift + width / 2]
            axes.plot(ends, [mark.y] * 2, color="#23262b", linewidth=1.2, linestyle=(0, (2, 1)))
    axes.set_xticks(range(len(panel.categories)), panel.categories)
    axes.axhline(0, color="#676c75", linewidth=0.8)


def _line(axes: Any, panel: Panel, series: Series) -> None:
    names = list(dict.fromkeys(s.name.removesuffix(", the paper") for s in panel.series))
    place = names.index(series.name.removesuffix(", the paper")) if series.shape is None else series.shape
    shape = SHAPES[place % len(SHAPES)]
    colour = PALETTE[series.colour]
    x, y = _xy(series)
    axes.plot(
        x,
        y,
        color=colour,
        linewidth=1.3,
        linestyle=("--" if series.published else "-") if series.line else "",
        marker=shape if series.dots else "",
        markersize=4,
        markerfacecolor="none" if series.published else colour,
        alpha=0.6 if series.published else 1,
        label=None if series.published else series.name,
    )
    for mark in series.marks:
        if mark.low is not None and mark.high is not None:
            axes.plot([mark.x] * 2, [mark.low, mark.high], color=colour, linewidth=1)
        if mark.x_low is not None and mark.x_high is not None:
            axes.plot([mark.x_low, mark.x_high], [mark.y] * 2, color=colour, linewidth=1)


def _weights(axes: Any, panel: WeightPanel) -> None:
    margins, p = panel.margins, panel.parameters
    limit = max(float(np.abs(margins).max(initial=1)), p.tau * 1.15) * 1.04
    axes.hist(margins, bins=60, range=(-limit, limit), color=PALETTE[7], alpha=0.5)
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel("reward margin h, log-odds")
    axes.set_ylabel("pairs")
    curve = axes.twinx()
    curve.grid(visible=False)
    grid = np.linspace(-limit, limit, 481)
    curve.plot(grid, np.exp(log_weight(grid, p)), color="#23262b", linewidth=1.3)
    curve.set_ylim(0, 2)
    curve.set_ylabel("weight w(h)")
    curve.spines["right"].set_visible(True)
    for h in (-p.tau, p.tau):
        axes.axvline(h, color="#676c75", linewidth=0.8, linestyle=":")


def _legend(figure: Any, chart: Chart) -> None:
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if any(isinstance(p, Panel) and any(s.published for s in p.series) for p in chart.panels):
        from matplotlib.lines import Line2D

        handles["the paper"] = Line2D([], [], color="#23262b", linewidth=1.2, linestyle=(0, (2, 1)))
    if len(handles) > 1:
        names = [name if len(name) <= 32 else f"{name[:31]}…" for name in handles]
        figure.legend(handles.values(), names, loc="outside lower center", ncols=min(5, len(handles)), fontsize=8)


def _xy(series: Series) -> tuple[np.ndarray, np.ndarray]:
    return np.array([m.x for m in series.marks], dtype=float), np.array([m.y for m in series.marks], dtype=float)
