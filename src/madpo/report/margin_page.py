"""The page of ``madpo inspect``: drag tau, c_max, c_min and lambda, and see which pairs change."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from madpo.data.margins import Margins
from madpo.report.charts import Chart, calibration_panel
from madpo.report.command_pages import Section, command_page, reliability_table
from madpo.report.drawing import draw, weight_figure
from madpo.report.numbers import one
from madpo.report.pages import Cell, Table, cell, shown_margins, write_page
from madpo.rewards.margins import MarginReport
from madpo.rewards.weight_counts import WeightParameters


def write_margin_page(path: Path, name: str, report: MarginReport, margins: Margins) -> None:
    """Write the page; ``name`` is what was inspected. Margins are in log-odds, divided by the report's temperature.

    Raises:
        StorageError: it cannot be written.
    """
    h = np.asarray(margins.values) / report.margin_temperature
    # Two decimals, as a slider shows them; without a recommendation the library's own.
    parameters = WeightParameters()
    if report.tau is not None and report.c_max is not None:
        parameters = WeightParameters(tau=max(0.01, round(report.tau, 2)), c_max=report.c_max)
    data = {
        "margins": shown_margins(h),
        "parameters": parameters._asdict(),
        "pairs": [{"id": margins.pair_ids[i], "h": float(h[i]), **text} for i, text in sorted(margins.texts.items())],
        "of": len(h),
    }
    note = (
        "Every pair has a margin: how sure the reward model is of its label, in log-odds after the margin temperature "
        f"({report.temperature_reason}). The curve is the weight that MADPO gives to a pair with that margin. Drag τ, "
        "c_max, c_min and λ to see what another setting would do."
    )
    other = f"the settings of the paper's search{'' if report.tau is None else ', and the recommended one last'}"
    sure = "how sure the reward model is, and how often the labels agree"
    chart = draw(Chart("reliability", "Calibration", "", [calibration_panel("", report.reliability, 4)]))
    bins = reliability_table(report.reliability)
    sections = [
        Section(
            "Margins and their weights",
            note=note,
            weight=weight_figure(h, parameters, label="Weight curve and margins"),
        ),
        Section(
            "Affected pairs", note="With scripts, the pairs that change most in weight are listed here.", id="affected"
        ),
        *_suspects(report),
        Section("Other settings", other, table=_settings(report), folded=True),
        Section("Calibration", sure, charts=[chart], table=bins, folded=True),
    ]
    title = f"Reward margins of {Path(name).name or name}"
    scripts = ("weight.js", "page.js", "margins.js")
    page = command_page(
        "margins",
        title,
        report.advice(),
        _tiles(report),
        sections,
        scripts=scripts,
        data=data,
        warnings=report.warnings,
    )
    write_page(path, page)


def _tiles(report: MarginReport) -> dict[str, Cell]:
    tiles = {
        **({} if report.tau is None else {"recommended τ": cell(f"{report.tau:.3g}")}),
        **({} if report.c_max is None else {"recommended c_max": cell(f"{report.c_max:g}")}),
        **({"margin temperature": cell(f"{report.margin_temperature:.3g}")} if report.scaled else {}),
        "labels contradicted": cell(report.contradicted, "share"),
        "log loss": Cell(f"{report.calibrated_log_loss:.3f}", ("chance: 0.693",)),
        "pairs": cell(f"{report.pairs:,}"),
    }
    if report.share is not None:
        tiles["log loss minus that of DPO's implicit margin"] = cell(report.share.difference, "signed")
    return tiles


def _suspects(report: MarginReport) -> list[Section]:
    """The pairs whose labels the reward model contradicts most, if there are any."""
    if not report.suspects:
        return []
    answers = [
        {
            "prompt": f"{s.name}, margin {one(s.reward_margin)}, weight {one(s.weight)}\n{s.prompt}",
            "answers": [(side, None, text) for side in ("chosen", "rejected") if (text := getattr(s, side))],
        }
        for s in report.suspects
    ]
    note = "the labels that the reward model contradicts most: swapped columns and wrong labels are here"
    return [Section("Suspicious pairs", note, answers=answers, folded=True, id="suspects")]


def _settings(report: MarginReport) -> Table:
    head = ("τ", "c_max", "mean weight", "effective sample size", "amplified", "dampened", "turned down")
    rows = [
        [
            Cell(f"{s.tau:.3g}", ("recommended",) if report.tau is not None and s is report.settings[-1] else ()),
            *(cell(f"{s.c_max:g}"), cell(f"{s.mean_weight:.3f}"), cell(f"{s.effective_share:.1%} of the pairs")),
            *(cell(f"{share:.1%}") for share in (s.amplified, s.dampened, s.turned_down)),
        ]
        for s in report.settings
    ]
    return Table("Settings", head, rows, plain=True)
