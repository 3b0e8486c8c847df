"""Every trial of a search, as a table and a plot: ``trials.csv`` for programs, ``tune.html`` for people."""

from __future__ import annotations

import csv
import io
import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo.core.metrics import Estimate
from madpo.core.storage import write_atomically
from madpo.operations.running import toml
from madpo.report import table
from madpo.report.figures import Dot, scatter_figure
from madpo.report.numbers import DASH
from madpo.report.pages import Section, cell, sections_page

if TYPE_CHECKING:
    from madpo.operations.tuning.search import Trial, TuneReport

# Name in files -> what a person reads; in the order of the table.
CRITERIA = {
    "accuracy": "accuracy",
    "log_loss": "log loss after one temperature",
    "reward": "reward at equal KL",
    "kl": "KL to the reference, nats",
    "raw_log_loss": "raw log loss (not selected on)",
}


def write_table(folder: Path, report: TuneReport) -> None:
    """Write ``trials.csv`` and ``tune.html``."""
    write_atomically(folder / "trials.csv", trials_csv(report))
    write_atomically(folder / "tune.html", tune_page(report))


def trials_csv(report: TuneReport) -> str:
    """One row per trial, the baseline first and those that diverged last: number, settings, criteria with intervals."""
    names = list(report.settings.searched)
    measures = [name for name in CRITERIA if any(_estimate(trial, name) for trial in _all(report))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{name}{end}" for name in measures for end in ("", "_low", "_high")]
    writer.writerow(["trial", *names, *ends, "temperature", "mean_margin", "chosen", "diverged"])
    for trial in _all(report):
        numbers: list[Any] = []
        for name in measures:
            found = _estimate(trial, name)
            numbers += ["", "", ""] if found is None else [repr(v) for v in found[:3]]
        label = "dpo" if trial.number < 0 else trial.number
        settings = [trial.values.get(name, "") for name in names]
        h = trial.heldout
        chosen = int(trial.number == report.chosen)
        writer.writerow([label, *settings, *numbers, h.temperature, h.mean_margin, chosen, ""])
    for lost in report.diverged:
        settings = [lost.values.get(name, "") for name in names]
        writer.writerow([lost.number, *settings, *([""] * len(ends)), "", "", 0, lost.reason])
    return text.getvalue()


def tune_page(report: TuneReport) -> str:
    """The page as HTML; it stands alone."""
    best = report.best()
    lines = [
        f"{len(report.trials)} trials on {report.pairs} pairs in {report.settings.folds} folds. Chosen on "
        f"{CRITERIA[report.criterion]}: trial {best.number}, "
        + ", ".join(f"{key} = {_shown(value)}" for key, value in best.values.items())
        + "."
    ]
    if report.advantage is not None:
        a = report.advantage
        lines.append(
            f"On the same held-out pairs it is better than plain DPO by {a.mean:.4f} (95 % interval {a.low:.4f} to "
            f"{a.high:.4f}). The best of {len(report.trials)} flatters itself: measure it on pairs that took no part."
        )
    lines += [f"Trial {lost.number} diverged: {lost.reason}." for lost in report.diverged]
    return sections_page(
        "search",
        f"Search for {report.settings.loss.kind}",
        lines,
        [
            Section(
                "Trials",
                "Held-out pairs of all folds together, below each number its 95 % interval over prompts. The raw log "
                "loss is shown and never selected on: it favours plain DPO by construction, whose target it is.",
                _table(report),
            ),
            Section(
                "Plots",
                "Every trial, by each setting that was searched; the line is plain DPO.",
                "".join(_plot(report, key) for key in report.settings.searched),
            ),
            Section("Settings", "", f'<pre dir="auto">{escape(toml(report.settings.model_dump(mode="json")))}</pre>'),
        ],
    )


def _all(report: TuneReport) -> list[Trial]:
    return [*([report.baseline] if report.baseline else []), *report.trials]


def _estimate(trial: Trial, name: str) -> Estimate | None:
    found: Estimate | None = getattr(trial.heldout, name)
    return found


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(report: TuneReport) -> str:
    names = list(report.settings.searched)
    measures = [name for name in CRITERIA if any(_estimate(trial, name) for trial in _all(report))]
    rows = []
    for trial in _all(report):
        label = "plain DPO" if trial.number < 0 else str(trial.number)
        cells = [cell(label, small="chosen" if trial.number == report.chosen else "")]
        cells += [cell(_shown(trial.values[name]) if name in trial.values else DASH) for name in names]
        cells += [cell(_estimate(trial, name) or "not reached") for name in measures]
        rows.append(cells)
    for lost in report.diverged:
        cells = [cell(str(lost.number), small="diverged")]
        cells += [cell(_shown(lost.values[name]) if name in lost.values else DASH) for name in names]
        rows.append([*cells, *(cell(DASH) for _ in measures)])
    return table(["trial", *names, *(CRITERIA[measure] for measure in measures)], rows, "Trials")


def _plot(report: TuneReport, key: str) -> str:
    dimension = report.settings.searched[key]
    shown = [trial for trial in report.trials if _estimate(trial, report.criterion) is not None]
    if not shown:
        return ""
    values = [trial.values[key] for trial in shown]
    names: list[str] = []
    if any(isinstance(value, str | bool) for value in values):
        names = [str(value) for value in dimension.values or ()]
        places = [float(names.index(str(value))) for value in values]
    else:
        places = [math.log10(float(value)) if dimension.log else float(value) for value in values]
    dots = []
    for trial, x in zip(shown, places, strict=True):
        e = _estimate(trial, report.criterion)
        assert e is not None
        settings = ", ".join(f"{k} = {_shown(v)}" for k, v in trial.values.items())
        dots.append(Dot(x, e, f"trial {trial.number}: {settings}; {e.mean:.4f}", trial.number == report.chosen))
    baseline = _estimate(report.baseline, report.criterion) if report.baseline else None
    return scatter_figure(
        dots,
        label=f"{CRITERIA[report.criterion]} against {key}",
        x_label=f"log10 {key}" if dimension.log else key,
        y_label=CRITERIA[report.criterion],
        line=("plain DPO", baseline.mean) if baseline else None,
        names=names,
    )
