"""The page of ``madpo inspect``: drag tau, c_max, c_min and lambda, and see which pairs change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from madpo.data.margins import Margins
from madpo.report.charts import Chart
from madpo.report.drawing import draw
from madpo.report.numbers import DASH
from madpo.report.pages import Cell, Table, cell, render, shown_margins, write_page
from madpo.report.study_charts import calibration_panel
from madpo.report.weight_figure import weight_figure
from madpo.rewards.margins import MarginReport
from madpo.rewards.weight_counts import WeightParameters


def write_margin_page(path: Path, name: str, report: MarginReport, margins: Margins) -> None:
    """Write the page; ``name`` is what was inspected.

    Raises:
        StorageError: it cannot be written.
    """
    write_page(path, margin_page(name, report, margins))


def margin_page(name: str, report: MarginReport, margins: Margins) -> str:
    """The page as HTML. Margins are shown in log-odds, divided by the report's temperature."""
    h = np.asarray(margins.values) / report.margin_temperature
    # Two decimals, as a slider shows them.
    parameters = WeightParameters(tau=max(0.01, round(report.tau, 2)), c_max=report.c_max)
    data: dict[str, Any] = {
        "margins": shown_margins(h),
        "parameters": parameters._asdict(),
        "pairs": [{"id": margins.pair_ids[i], "h": float(h[i]), **text} for i, text in sorted(margins.texts.items())],
        "of": len(h),
    }
    found = f"{report.tau:.3g}", f"{report.c_max:g}"
    if not report.informative:
        found = DASH, DASH
    tiles = {
        "recommended τ": cell(found[0]),
        "recommended c_max": cell(found[1]),
        "margin_temperature": cell(f"{report.margin_temperature:.3g}"),
        "labels contradicted": cell(report.contradicted, "share"),
        "log loss": Cell(f"{report.calibrated_log_loss:.3f}", ("chance: 0.693",)),
        "pairs": cell(f"{report.pairs:,}"),
    }
    if report.deciding is not None:
        tiles["log loss less that of DPO's implicit margin"] = cell(report.deciding.difference, "signed")
    calibration = Chart("calibration", "Calibration", "", [calibration_panel("", report.reliability, 3)])
    return render(
        "margins",
        f"Reward margins of {Path(name).name or name}",
        ("weight.js", "margins.js"),
        data,
        report=report,
        tiles=tiles,
        figure=weight_figure(h, parameters, label="Weight curve and margins"),
        settings=_settings(report),
        calibration=draw(calibration),
        bins=reliability_table(report.reliability),
    )


def _settings(report: MarginReport) -> Table:
    head = ("τ", "c_max", "mean weight", "effective sample size", "amplified", "dampened", "turned down")
    rows = [
        [
            Cell(f"{s.tau:.3g}", ("recommended",) if s is report.settings[-1] else ()),
            *(cell(f"{s.c_max:g}"), cell(f"{s.mean_weight:.3f}"), cell(f"{s.effective_share:.1%} of the pairs")),
            *(cell(f"{share:.1%}") for share in (s.amplified, s.dampened, s.turned_down)),
        ]
        for s in report.settings
    ]
    return Table("Settings", head, rows, plain=True)


def reliability_table(bins: Any) -> Table:
    """Pairs by the size of their margin: how sure the reward model is, and how often the labels agree."""
    rows = [
        [
            Cell(f"{b.low:.2f} to {b.high:.2f}"),
            *(cell(f"{b.pairs}"), cell(f"{b.predicted:.1%}"), cell(b.observed, "share")),
        ]
        for b in bins
    ]
    head = ("|margin| / temperature", "pairs", "the reward model says", "the labels agree")
    return Table("Calibration", head, rows, plain=True)
