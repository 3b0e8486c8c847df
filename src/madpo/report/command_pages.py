"""Pages of ``madpo reward``, ``train`` and ``evaluate``: what was measured, the course of the training, and samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import pandas as pd

from madpo.report.charts import Chart, Panel, captions, curves
from madpo.report.drawing import Drawn, draw
from madpo.report.pages import Card, Cell, Table, cell, render, write_page
from madpo.report.sources import json_lines
from madpo.rewards.margins import Reliability

REFRESH = 15
"""Seconds after which a browser loads the page of a running training again."""


class Section(NamedTuple):
    """A part of a page, whose heading is hidden where it is the first.

    Attributes:
        gist: what is inside, where it is folded.
        cards: figures with verdicts; weight: a weight curve, which a script brings to life.
        answers: prompts with their answers, as of :func:`madpo.report.samples.static`.
    """

    heading: str
    gist: str = ""
    note: str = ""
    cards: Sequence[Card] = ()
    weight: ET.Element | None = None
    charts: Sequence[Drawn] = ()
    table: Table | None = None
    answers: Sequence[Mapping[str, Any]] | None = None
    text: str = ""
    folded: bool = False
    id: str = ""


def command_page(
    kind: str,
    title: str,
    says: Sequence[str],
    tiles: Mapping[str, Cell],
    sections: Sequence[Section],
    *,
    scripts: Sequence[str] = ("samples.js", "page.js"),
    data: object = None,
    refresh: int | None = None,
    warnings: Sequence[str] = (),
) -> str:
    """A page as HTML: warnings, sentences, numbers, sections; a browser loads it again every ``refresh`` seconds."""
    parts = [{**s._asdict(), "id": s.id or f"section-{number}"} for number, s in enumerate(sections, start=1)]
    how = {"says": says, "tiles": tiles, "sections": parts, "refresh": refresh, "warnings": warnings}
    return render("command", title, scripts, data, kind=kind, **how)


def settings_section(settings: Mapping[str, Any] | str, gist: str) -> Section:
    """The settings, which close a page; as text or as JSON."""
    text = settings if isinstance(settings, str) else json.dumps(settings, indent=2, ensure_ascii=False, default=str)
    return Section("Settings", gist, text=text, folded=True)


def logged(log: Path) -> pd.DataFrame:
    """The lines of a training's ``log.jsonl``; none where there is no such file."""
    return pd.DataFrame(json_lines(log, "step") if log.exists() else [])


def reliability_table(bins: Iterable[Reliability]) -> Table:
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


# What a policy's log says over the steps -> column, its unit, and a line to compare with.
_COURSES = {
    "Loss": ("loss", "mean over pairs", None),
    "Implicit reward margin": ("rewards/margins", "chosen minus rejected", ("no preference", 0.0)),
    "Accuracy": ("rewards/accuracies", "share of pairs ordered as labelled", ("chance", 0.5)),
    "Mean weight": ("weight/mean", "multiplier of the loss", ("plain DPO", 1.0)),
}


def main_measures(evaluation: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(name, unit, value) of what a reader wants to know of the held-out pairs.

    Args:
        evaluation: as the trainer names it ("eval_loss").
    """
    named = ((name, unit, f"eval_{column}") for name, (column, unit, _) in _COURSES.items())
    return [(name, unit, evaluation[key]) for name, unit, key in named if key in evaluation]


def _all_measures(evaluation: Mapping[str, float]) -> Table:
    """Everything that was measured on held-out pairs, in words and by the log's names."""
    words = captions()["measures"] | {column: f"{name.lower()}, {unit}" for name, (column, unit, _) in _COURSES.items()}
    names = {name.removeprefix("eval_"): value for name, value in evaluation.items()}
    rows = [[Cell(words.get(name, name)), cell(value, digits=4), Cell(f"eval_{name}")] for name, value in names.items()]
    return Table("On the held-out pairs", ("measure", "value", "in log.jsonl"), rows, plain=True)


def training_chart(log: Path) -> Chart | None:
    """The course of a training from its ``log.jsonl``; None where nothing was logged."""
    rows = logged(log)
    panels = []
    for name, (column, unit, reference) in _COURSES.items():
        series = (*curves("training pairs", rows, column, 0), *curves("held-out pairs", rows, f"eval_{column}", 1))
        if any(len(curve.marks) > 1 for curve in series):  # one point is no course
            panels.append(Panel(name, "step", unit, series, reference=reference))
    pale = any(curve.raw for panel in panels for curve in panel.series)
    caption = "Of the training pairs a pale line and its running mean. " * pale
    caption += "Margins are in the loss's own unit, beta x nats."
    return Chart("training", "Training", caption, panels) if panels else None


def write_training_page(
    path: Path,
    *,
    title: str,
    says: Sequence[str],
    numbers: Mapping[str, float | str],
    evaluation: Mapping[str, float],
    log: Path,
    settings: str,
    trained: str = "",
    refresh: int | None = None,
) -> None:
    """The course of a training, which may still run: its loss, its margins, and the weights where the loss has any.

    Args:
        path: of the page.
        title: of the page.
        says: sentences that open it.
        numbers: name -> what is known of the whole training.
        evaluation: of the held-out pairs, as the trainer names it ("eval_loss").
        log: ``log.jsonl`` of the training.
        settings: the configuration as TOML.
        trained: which weights were trained, in a sentence.
        refresh: seconds after which a browser loads the page again; None for a training that has ended.
    """
    chart = training_chart(log)
    charts = [draw(chart)] if chart is not None else []
    tiles = {name: cell(value, digits=3) for name, value in numbers.items()}
    for name, _, value in main_measures(evaluation)[:3]:
        tiles[f"held-out {name.lower()}"] = cell(value, "share" if name == "Accuracy" else "number", digits=3)
    sections = [Section("The course of the training", charts=charts)] if charts else []
    if evaluation:
        table = _all_measures(evaluation)
        sections.append(Section(table.label, f"all {len(table.rows)} measures", table=table, folded=True))
    sections.append(settings_section(settings, "what repeats this training")._replace(note=trained))
    write_page(path, command_page("training", title, says, tiles, sections, refresh=refresh))


def running_page(out: Path, title: str, numbers: Mapping[str, float | str], settings: str) -> Callable[[str], None]:
    """What writes ``out/report.html`` while a training runs, given what to say of it; arguments as above."""

    def write(sentence: str) -> None:
        write_training_page(
            out / "report.html",
            title=title,
            says=[sentence],
            numbers=numbers,
            evaluation={},
            log=out / "log.jsonl",
            settings=settings,
            refresh=REFRESH,
        )

    return write
