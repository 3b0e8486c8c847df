"""The page of ``madpo inspect``: drag tau, c_max, c_min and lambda, and see which pairs change.

It stands alone like the report of a run (``report.page``): nothing is loaded, all text of the data is escaped.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from madpo.core.storage import storage_errors, write_atomically
from madpo.data.margins import Margins
from madpo.report import MARGINS_SHOWN, page, table
from madpo.report.figures import weight_figure
from madpo.rewards.weight_counts import WeightParameters

if TYPE_CHECKING:
    from madpo.rewards.margins import MarginReport


def write_margin_page(path: Path, name: str, report: MarginReport, margins: Margins) -> None:
    """Write the page; ``name`` is what was inspected.

    Raises:
        StorageError: it cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, margin_page(name, report, margins))


def margin_page(name: str, report: MarginReport, margins: Margins) -> str:
    """The page as HTML. Margins are shown in log-odds, divided by the report's temperature."""
    h = np.asarray(margins.values) / report.margin_temperature
    shown = np.sort(h)
    if len(shown) > MARGINS_SHOWN:
        shown = shown[np.linspace(0, len(shown) - 1, MARGINS_SHOWN).round().astype(int)]
    # Two decimals, as a slider shows them.
    parameters = WeightParameters(tau=max(0.01, round(report.tau, 2)), c_max=report.c_max)
    data: dict[str, Any] = {
        "margins": [float(value) for value in shown],
        "parameters": parameters._asdict(),
        "pairs": [{"id": margins.pair_ids[i], "h": float(h[i]), **text} for i, text in sorted(margins.texts.items())],
        "of": len(h),
    }
    return page(
        "margins.html",
        ["weight.js", "margins.js"],
        data,
        title=escape(f"Reward margins of {Path(name).name or name}"),
        summary=_summary(report),
        weights=weight_figure(h, parameters, label="Weight curve and margins"),
        settings=_settings(report),
        calibration=_calibration(report),
        suspects=_suspects(report),
    )


def _summary(report: MarginReport) -> str:
    c = report.contradicted
    texts = [
        f"{report.pairs} pairs. The reward model contradicts {c.mean:.1%} of the labels "
        f"(95 % interval {c.low:.1%} to {c.high:.1%}).",
        f"Recommended: \u03c4 = {report.tau:.3g}, c_max = {report.c_max:g}, margin_temperature = "
        f"{report.margin_temperature:.3g} ({report.temperature_reason}).",
        "Why " + "; ".join(report.reasons) + ".",
        *(f"Warning: {warning}." for warning in report.warnings),
    ]
    return "".join(f'<p dir="auto">{escape(text)}</p>' for text in texts)


def _settings(report: MarginReport) -> str:
    head = ("\u03c4", "c_max", "mean weight", "effective sample size", "amplified", "dampened", "turned down")
    rows = []
    for i, s in enumerate(report.settings):
        mark = "<small>recommended</small>" if i == len(report.settings) - 1 else ""
        cells = [f"{s.c_max:g}", f"{s.mean_weight:.3f}", f"{s.effective_share:.1%} of the pairs"]
        cells += [f"{share:.1%}" for share in (s.amplified, s.dampened, s.turned_down)]
        rows.append([f"{s.tau:.3g}{mark}", *cells])
    return table(head, rows, "Settings")


def _calibration(report: MarginReport) -> str:
    head = ("|margin|", "pairs", "the reward model says", "the labels agree")
    rows = [
        [
            f"{b.low:.2f} to {b.high:.2f}",
            str(b.pairs),
            f"{b.predicted:.1%}",
            f"{b.observed.mean:.1%}<small>{b.observed.low:.1%} to {b.observed.high:.1%}</small>",
        ]
        for b in report.reliability
    ]
    return table(head, rows, "Calibration")


def _suspects(report: MarginReport) -> str:
    if not report.suspects:
        return '<p class="nothing">No margin is negative.</p>'
    cards = []
    for s in report.suspects:
        texts = "".join(
            f'<div class="answer"><h4>{side}</h4><p dir="auto">{escape(text)}</p></div>'
            for side, text in (("chosen", s.chosen), ("rejected", s.rejected))
            if text
        )
        cards.append(
            f'<div class="card"><p class="prompt" dir="auto">pair {s.pair_id}, margin {s.reward_margin:.2f}, '
            f"weight {s.weight:.2f}<br>{escape(s.prompt)}</p>{texts}</div>"
        )
    return "".join(cards)
