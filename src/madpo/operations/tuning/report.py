"""What ``madpo tune`` found: the report, ``trials.csv`` for programs, and ``tune.html`` with a table and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from madpo.core.config import Frozen
from madpo.core.metrics import Estimate
from madpo.core.reports import Report
from madpo.core.storage import write_atomically
from madpo.operations.tuning.settings import Criterion, TuneSettings, Value
from madpo.report.charts import Chart, Mark, Panel, Series, value_mark
from madpo.report.command_pages import Section, command_page, settings_section
from madpo.report.drawing import draw
from madpo.report.numbers import DASH, short
from madpo.report.pages import Cell, Table, cell, write_page

# Name in files -> what a person reads; in the order of the table.
CRITERIA = {
    "accuracy": "accuracy",
    "log_loss": "log loss after one temperature",
    "reward": "reward at equal KL",
    "kl": "KL to the reference, nats",
    "raw_log_loss": "raw log loss (not selected on)",
}
BASELINE = -1  # number of plain DPO


class Heldout(Frozen):
    """What a setting's policies make of the pairs that they did not see; intervals are over prompts, and as wide as
    :data:`madpo.core.statistics.OUT_OF_FOLD` says."""

    accuracy: Estimate
    """Share of pairs whose chosen side has the higher implicit reward; a margin of 0 is half right."""
    log_loss: Estimate
    """Mean of -log sigma(margin / temperature), nats, at the one temperature that fits all held-out pairs."""
    temperature: float
    raw_log_loss: Estimate
    """The same at temperature 1. Never selected on: it is lowest for plain DPO by construction."""
    mean_margin: float
    """Mean implicit margin, log-odds."""
    reward: Estimate | None = None
    """Mean reward of samples at the common KL; None where it was not asked for, or no strength reached that KL."""
    kl: Estimate | None = None
    """KL(policy || reference) per response of the strongest adapter that was sampled, nats."""


class Trial(Frozen):
    """One setting, and what was measured of it; number -1 is plain DPO, the baseline."""

    number: int
    values: dict[str, Value]
    heldout: Heldout


class Diverged(Frozen):
    """A setting whose training did not stay finite: nothing is measured of it, and it is never chosen."""

    number: int
    values: dict[str, Value]
    reason: str


class TuneReport(Report):
    """What :func:`tune` found."""

    data_digest: str | None
    pairs: int
    dropped: int
    """Pairs of more than max_length tokens."""
    criterion: Criterion
    trials: tuple[Trial, ...]
    baseline: Trial | None
    chosen: int
    """Number of the best trial."""
    advantage: Estimate | None
    """How much better the chosen trial is than the baseline on the same held-out pairs (or prompts), in the
    criterion's unit; above 0 is better. It flatters: the chosen one is the best of several."""
    settings: TuneSettings
    diverged: tuple[Diverged, ...] = ()
    """Trials without a measurement."""

    @property
    def measured(self) -> tuple[Trial, ...]:
        """Trials with a measurement, the baseline first."""
        return (*([self.baseline] if self.baseline else []), *self.trials)

    @property
    def tried(self) -> tuple[Trial | Diverged, ...]:
        """Those, and then those that diverged."""
        return self.measured + self.diverged

    @property
    def criteria(self) -> list[str]:
        """What some trial was measured by."""
        return [name for name in CRITERIA if any(getattr(trial.heldout, name) for trial in self.measured)]

    def best(self) -> Trial:
        """The chosen trial."""
        return next(trial for trial in self.trials if trial.number == self.chosen)

    def text(self) -> str:
        """The report for a person."""
        best, s = self.best(), self.settings
        lines = [f"{len(self.trials)} trials, {s.folds} folds, {self.pairs} pairs; chosen on held-out {self.criterion}"]
        if self.dropped:
            lines.append(f"{self.dropped} pairs were longer than max_length and left out")
        names = list(s.searched)
        lines.append(f"{'trial':>8}  {'  '.join(f'{n:>14}' for n in names)}  accuracy  log loss  raw log loss")
        for trial in self.measured:
            h = trial.heldout
            shown = "  ".join(f"{shown_value(trial.values.get(n)):>14}" for n in names)
            name = "dpo" if trial.number < 0 else str(trial.number)
            mark = "  chosen" if trial.number == self.chosen else ""
            lines.append(
                f"{name:>8}  {shown}  {h.accuracy.mean:8.1%}  {h.log_loss.mean:8.4f}  {h.raw_log_loss.mean:12.4f}{mark}"
            )
        lines += [f"trial {lost.number} diverged ({in_words(lost.values)}): {lost.reason}" for lost in self.diverged]
        lines.append(f"chosen: {in_words(best.values)}")
        if self.advantage is not None:
            lines.append(advantage(self.advantage, len(self.trials)))
        lines.append("the raw log loss favours plain DPO by construction, whose target it is, and chose nothing")
        return "\n".join(lines)


def write_search(folder: Path, report: TuneReport) -> None:
    """Write ``trials.csv`` and ``tune.html``."""
    write_atomically(folder / "trials.csv", trials_csv(report))
    write_page(folder / "tune.html", search_page(report))


def trials_csv(report: TuneReport) -> str:
    """One row per trial, the baseline first and those that diverged last: number, settings, criteria with intervals."""
    rows = []
    for trial in report.tried:
        row: dict[str, Any] = {"trial": "dpo" if trial.number == BASELINE else trial.number}
        row |= {name: trial.values.get(name, "") for name in report.settings.searched}
        heldout = None if isinstance(trial, Diverged) else trial.heldout
        for name in report.criteria:
            found = getattr(heldout, name, None) or (None, None, None)
            row |= {f"{name}{end}": value for end, value in zip(("", "_low", "_high"), found[:3], strict=True)}
        row |= {name: getattr(heldout, name, None) for name in ("temperature", "mean_margin")}
        reason = trial.reason if isinstance(trial, Diverged) else ""
        rows.append({**row, "chosen": int(trial.number == report.chosen), "diverged": reason})
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def search_page(report: TuneReport) -> str:
    """The page as HTML."""
    best, tried, settings = report.best(), len(report.trials), report.settings
    says = [
        f"{tried} trials on {report.pairs} pairs in {settings.folds} folds. Chosen on {CRITERIA[report.criterion]}: "
        f"trial {best.number}, {in_words(best.values)}."
    ]
    if report.advantage is not None:
        says.append(advantage(report.advantage, tried))
    says += [f"Trial {lost.number} diverged: {lost.reason}." for lost in report.diverged]
    tiles = {"chosen": Cell(f"trial {best.number}", (in_words(best.values),))}
    shown = [name for name in report.criteria if name != "raw_log_loss"]
    tiles |= {CRITERIA[name]: _measured(best.heldout, name) for name in shown}
    panels = [panel for name in settings.searched if (panel := _panel(report, name)) is not None]
    note = (
        "Held-out pairs of all folds together, 95 % intervals over prompts. The raw log loss is shown and never "
        "selected on: it is plain DPO's own target, and favours it."
    )
    charts = [draw(Chart("trials", "Trials", note, panels))] if panels else []
    sections = [
        Section("Trials", note="" if charts else note, charts=charts, table=_table(report)),
        settings_section(settings.model_dump(mode="json"), "of the search"),
    ]
    return command_page("search", f"Search for {settings.loss.kind}", says, tiles, sections)


def advantage(gain: Estimate, trials: int) -> str:
    """How the chosen trial compares with plain DPO on the same held-out pairs, in two sentences."""
    clear = "better than" if gain.low > 0 else "worse than" if gain.high < 0 else "not separated from"
    return (
        f"On the same held-out pairs it is {clear} plain DPO: {short(gain, 'signed', 4)}, above 0 is better. The best "
        f"of {trials} flatters itself: measure it on pairs that took no part."
    )


def in_words(values: Mapping[str, Any]) -> str:
    """A trial's settings in one line."""
    return ", ".join(f"{key} = {shown_value(value)}" for key, value in values.items())


def shown_value(value: object) -> str:
    """A setting's value for a table."""
    return DASH if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _measured(heldout: Heldout | None, name: str, missing: str = "not reached") -> Cell:
    return cell(getattr(heldout, name, None) or missing, "share" if name == "accuracy" else "number", digits=4)


def _table(report: TuneReport) -> Table:
    rows, searched, criteria = [], report.settings.searched, report.criteria
    for trial in report.tried:
        lost = isinstance(trial, Diverged)
        mark = "chosen" if trial.number == report.chosen else "diverged" if lost else ""
        name = Cell("plain DPO" if trial.number == BASELINE else str(trial.number), (mark,) if mark else ())
        values = [cell(shown_value(trial.values.get(setting))) for setting in searched]
        measured = (None, DASH) if isinstance(trial, Diverged) else (trial.heldout, "not reached")
        rows.append([name, *values, *(_measured(measured[0], c, measured[1]) for c in criteria)])
    return Table("Trials", ["trial", *searched, *map(CRITERIA.__getitem__, criteria)], rows, plain=True, sortable=True)


def _panel(report: TuneReport, name: str) -> Panel | None:
    """The criterion against one setting; plain DPO is a line."""
    dimension, criterion = report.settings.searched[name], report.criterion
    shown = [trial for trial in report.trials if getattr(trial.heldout, criterion) is not None]
    if not shown:
        return None
    rows: tuple[str, ...] = ()
    if any(isinstance(trial.values[name], str | bool) for trial in shown):
        rows = tuple(str(value) for value in dimension.values or ())
    marks: dict[bool, list[Mark]] = {False: [], True: []}
    for trial in shown:
        value, says = trial.values[name], f"trial {trial.number}: {in_words(trial.values)}"
        at = float(rows.index(str(value)) if rows else value)
        if (mark := value_mark(getattr(trial.heldout, criterion), at, says, across=bool(rows))) is not None:
            marks[trial.number == report.chosen].append(mark)
    series = tuple(
        Series(words, tuple(marks[is_chosen]), colour, line=False)
        for is_chosen, words, colour in ((False, "trial", 0), (True, "chosen", 2))
        if marks[is_chosen]
    )
    baseline = None if report.baseline is None else getattr(report.baseline.heldout, criterion)
    reference = ("plain DPO", baseline.mean) if baseline else None
    across, up = (CRITERIA[criterion], "") if rows else (name, CRITERIA[criterion])
    return Panel(name, across, up, series, rows, reference=reference, log=dimension.log)
