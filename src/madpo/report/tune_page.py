"""Every trial of a search, as a table and a figure: ``trials.csv`` for programs, ``tune.html`` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from madpo.core.metrics import Estimate
from madpo.core.storage import write_atomically
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


@dataclass(frozen=True)
class Trial:
    """One setting and what was measured of it: an estimate per name of ``CRITERIA``, None where it was not reached."""

    number: int
    values: Mapping[str, Any]
    measured: Mapping[str, Estimate | None] = field(default_factory=dict)
    temperature: float | None = None
    mean_margin: float | None = None
    diverged: str = ""

    @property
    def label(self) -> str:
        """For people."""
        return "plain DPO" if self.number == BASELINE else str(self.number)


@dataclass(frozen=True)
class Search:
    """A search with all its trials.

    Attributes:
        dimensions: setting that was searched -> its values where it was a list (else None), and whether it is searched
            in decades.
        advantage: how much better the chosen trial is than plain DPO on the same held-out pairs; above 0 is better.
    """

    loss: str
    pairs: int
    folds: int
    criterion: str
    dimensions: Mapping[str, tuple[Sequence[Any] | None, bool]]
    trials: Sequence[Trial]
    chosen: int
    advantage: Estimate | None
    settings: Mapping[str, Any]

    @property
    def kept(self) -> list[Trial]:
        """Trials that were measured, the baseline among them."""
        return [trial for trial in self.trials if not trial.diverged]

    @property
    def criteria(self) -> list[str]:
        """What some trial was measured by."""
        return [name for name in CRITERIA if any(trial.measured.get(name) for trial in self.trials)]


def write_search(folder: Path, search: Search) -> None:
    """Write ``trials.csv`` and ``tune.html``."""
    write_atomically(folder / "trials.csv", trials_csv(search))
    write_page(folder / "tune.html", search_page(search))


def trials_csv(search: Search) -> str:
    """One row per trial, the baseline first and those that diverged last: number, settings, criteria with intervals."""
    rows = []
    for trial in search.trials:
        row: dict[str, Any] = {"trial": "dpo" if trial.number == BASELINE else trial.number}
        row |= {name: trial.values.get(name, "") for name in search.dimensions}
        for name in search.criteria:
            found = trial.measured.get(name) or (None, None, None)
            row |= {f"{name}{end}": value for end, value in zip(("", "_low", "_high"), found[:3], strict=True)}
        row |= {"temperature": trial.temperature, "mean_margin": trial.mean_margin}
        rows.append({**row, "chosen": int(trial.number == search.chosen), "diverged": trial.diverged})
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def search_page(search: Search) -> str:
    """The page as HTML."""
    tried = [trial for trial in search.kept if trial.number != BASELINE]
    best = next(trial for trial in tried if trial.number == search.chosen)
    says = [
        f"{len(tried)} trials on {search.pairs} pairs in {search.folds} folds. Chosen on {CRITERIA[search.criterion]}: "
        f"trial {best.number}, {in_words(best.values)}."
    ]
    if (gain := search.advantage) is not None:
        says.append(advantage(gain, len(tried)))
    says += [f"Trial {lost.number} diverged: {lost.diverged}." for lost in search.trials if lost.diverged]
    found = best.measured
    tiles = {"chosen": Cell(f"trial {best.number}", (in_words(best.values),))}
    tiles |= {CRITERIA[name]: cell(found.get(name), digits=4) for name in search.criteria if name != "raw_log_loss"}
    panels = [panel for name in search.dimensions if (panel := _panel(search, name)) is not None]
    note = (
        "Held-out pairs of all folds together, 95 % intervals over prompts. The raw log loss is shown and never "
        "selected on: it is plain DPO's own target, and favours it."
    )
    charts = [draw(Chart("trials", "Trials", "Every trial, and the chosen one.", panels))] if panels else []
    sections = [
        Section("Trials", note=note, charts=charts, table=_table(search)),
        settings_section(search.settings, "of the search"),
    ]
    return command_page("search", f"Search for {search.loss}", says, tiles, sections)


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


def _table(search: Search) -> Table:
    rows = []
    for trial in search.trials:
        mark = "chosen" if trial.number == search.chosen else "diverged" if trial.diverged else ""
        values = [cell(shown_value(trial.values.get(name))) for name in search.dimensions]
        missing = DASH if trial.diverged else "not reached"
        measured = [cell(trial.measured.get(name) or missing, digits=4) for name in search.criteria]
        rows.append([Cell(trial.label, (mark,) if mark else ()), *values, *measured])
    head = ["trial", *search.dimensions, *(CRITERIA[name] for name in search.criteria)]
    return Table("Trials", head, rows, plain=True, sortable=True)


def _panel(search: Search, name: str) -> Panel | None:
    """The criterion against one setting; plain DPO is a line."""
    listed, log = search.dimensions[name]
    shown = [t for t in search.kept if t.number != BASELINE and t.measured.get(search.criterion) is not None]
    if not shown:
        return None
    rows: tuple[str, ...] = ()
    if any(isinstance(trial.values[name], str | bool) for trial in shown):
        rows = tuple(str(value) for value in listed or ())
    marks: dict[bool, list[Mark]] = {False: [], True: []}
    for trial in shown:
        value, says = trial.values[name], f"trial {trial.number}: {in_words(trial.values)}"
        at = float(rows.index(str(value)) if rows else value)
        if (mark := value_mark(trial.measured[search.criterion], at, says, across=bool(rows))) is not None:
            marks[trial.number == search.chosen].append(mark)
    series = tuple(
        Series(words, tuple(marks[is_chosen]), colour, line=False)
        for is_chosen, words, colour in ((False, "trial", 0), (True, "chosen", 2))
        if marks[is_chosen]
    )
    baseline = next((t.measured.get(search.criterion) for t in search.kept if t.number == BASELINE), None)
    reference = ("plain DPO", baseline.mean) if baseline else None
    across, up = (CRITERIA[search.criterion], "") if rows else (name, CRITERIA[search.criterion])
    return Panel(name, across, up, series, rows, reference=reference, log=log)
