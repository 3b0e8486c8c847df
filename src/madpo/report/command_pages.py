"""Pages of ``madpo reward``, ``train`` and ``evaluate``: what was measured, the course of the training, and samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from madpo.core.metrics import Estimate
from madpo.data.messages import shown
from madpo.report.charts import Chart, Level, Levels, Panel
from madpo.report.drawing import Drawn, draw
from madpo.report.margin_page import reliability_table
from madpo.report.pages import Cell, Table, cell, render, write_page
from madpo.report.samples import CHARACTERS, STATIC, static
from madpo.report.sources import json_lines
from madpo.report.study_charts import calibration_panel, curves, reward_curves
from madpo.rewards.margins import Reliability

REFRESH = 15
"""Seconds after which a browser loads the page of a running training again."""


class Section(NamedTuple):
    """A part of a page; ``gist`` says what is inside where it is folded."""

    heading: str
    gist: str = ""
    note: str = ""
    charts: Sequence[Drawn] = ()
    table: Table | None = None
    text: str = ""
    samples: Sequence[Mapping[str, Any]] | None = None
    folded: bool = False


def command_page(
    kind: str,
    title: str,
    says: Sequence[str],
    tiles: Mapping[str, Cell],
    sections: Sequence[Section],
    data: object = None,
    refresh: int | None = None,
) -> str:
    """A page as HTML: sentences, numbers, and sections; a browser loads it again every ``refresh`` seconds."""
    scripts = ("samples.js", "page.js")
    parts = [s._asdict() for s in sections]
    return render("command", title, scripts, data, kind=kind, says=says, tiles=tiles, sections=parts, refresh=refresh)


def write_reward_page(
    path: Path,
    *,
    model: str,
    says: Sequence[str],
    tiles: Mapping[str, Estimate | float | str],
    bins: Sequence[Reliability],
    log: Path,
    settings: Mapping[str, Any],
) -> None:
    """How often the reward model is right, how sure it is, and how its training went.

    Args:
        path: of the page.
        model: base model.
        says: the report's first sentences.
        tiles: name -> what was measured.
        bins: held-out pairs by the size of their margin, after the temperature.
        log: ``log.jsonl`` of the training.
        settings: of the training, with the data.
    """
    panels = [calibration_panel("Calibration", bins, 3)]
    if series := reward_curves(pd.DataFrame(json_lines(log, "step")) if log.exists() else pd.DataFrame()):
        panels.append(Panel("Training", "step", "loss, nats", series, reference=("chance", 0.6931)))
    caption = (
        "Left: held-out pairs in bins of equal number with 95 % intervals; a calibrated model lies on the line. Right: "
        "the loss on training pairs (a pale line and its running mean) and on held-out pairs."
    )
    sections = [
        Section("Calibration and training", charts=[draw(Chart("reward_model", "Reward model", caption, panels))]),
        Section("Calibration in numbers", table=reliability_table(bins), folded=True, gist="the same bins as a table"),
        Section("Settings", text=_json(settings), folded=True, gist="data, model and training"),
    ]
    shown = {name: cell(value, "share" if name == "accuracy" else "number", digits=3) for name, value in tiles.items()}
    write_page(path, command_page("reward model", f"Reward model on {model}", says, shown, sections))


# What a policy's log says over the steps -> column, its unit, and a line to compare with.
_COURSES = {
    "Loss": ("loss", "loss", None),
    "Implicit reward margin": ("rewards/margins", "chosen less rejected", ("no preference", 0.0)),
    "Share of pairs that the policy orders as labelled": ("rewards/accuracies", "share", ("chance", 0.5)),
    "Mean weight": ("weight/mean", "multiplier of the loss", ("plain DPO", 1.0)),
}
_MEASURES = {
    "held-out loss": "eval_loss",
    "held-out accuracy": "eval_rewards/accuracies",
    "held-out margin": "eval_rewards/margins",
}


def training_chart(log: Path) -> Chart | None:
    """The course of a training from its ``log.jsonl``; None where nothing was logged."""
    rows = pd.DataFrame(json_lines(log, "step") if log.exists() else [])
    panels = []
    for name, (column, unit, reference) in _COURSES.items():
        series = (*curves("training pairs", rows, column, 0), *curves("held-out pairs", rows, f"eval_{column}", 1))
        if series:
            panels.append(Panel(name, "step", unit, series, reference=reference))
    caption = "Of the training pairs a pale line and its running mean. Margins are in the loss's own unit, beta x nats."
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
        refresh: seconds after which a browser loads the page again; None for a training that has ended.
    """
    chart = training_chart(log)
    charts = [draw(chart)] if chart is not None else []
    tiles = {name: cell(value, digits=4) for name, value in numbers.items()}
    tiles |= {name: cell(evaluation[key], digits=4) for name, key in _MEASURES.items() if key in evaluation}
    measured = [[Cell(name.removeprefix("eval_")), cell(value, digits=4)] for name, value in evaluation.items()]
    table = Table("On the held-out pairs", ("measure", "value"), measured, plain=True)
    sections = [Section("The course of the training", charts=charts)]
    if measured:
        sections.append(Section("On the held-out pairs", table=table, folded=True, gist=f"{len(measured)} measures"))
    sections.append(Section("Settings", text=settings, folded=True, gist="what repeats this training"))
    write_page(path, command_page("training", title, says, tiles, sections, refresh=refresh))


def write_samples_page(
    path: Path,
    *,
    title: str,
    says: Sequence[str],
    tiles: Mapping[str, Cell],
    measured: Mapping[str, tuple[Estimate | float, Estimate | float]],
    samples: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> None:
    """What policy and reference wrote to the same prompts, in the order of the data.

    Args:
        path: of the page.
        title: of the page.
        says: the report's first sentences.
        tiles: name -> what was measured of the two together.
        measured: quantity -> the policy's and the reference's value.
        samples: lines of ``samples.jsonl``.
        settings: of the evaluation.
    """
    rewards = measured["reward"]
    lines = [
        Level(name, colour, value.mean, value.low, value.high)
        for name, colour, value in zip(("policy", "reference"), (2, 7), rewards, strict=True)
        if isinstance(value, Estimate)
    ]
    charts = [draw(Chart("rewards", "Reward", "", [Levels("", "mean reward", tuple(lines))]))] if lines else []
    rows = [[Cell(name), *(cell(value, digits=3) for value in values)] for name, values in measured.items()]
    prompts = list(_prompts(samples))
    sides = ["policy", "reference"]
    note = "The same random numbers drew both. All samples are in samples.jsonl."
    entry = {"methods": sides, "baseline": [0, 1], "prompts": prompts, "of": len(samples)}
    data = {"samples": {"all": entry}, "unit": "its reward"}
    sections = [
        Section("Measured", charts=charts, table=Table("Measured", ("", *sides), rows, plain=True)),
        Section("Samples", note=note, samples=static(sides, prompts)),
        Section("Settings", text=_json(settings), folded=True, gist="sampling and the reward model"),
    ]
    write_page(path, command_page("evaluation", title, says, tiles, sections, data))


def _prompts(samples: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    room = CHARACTERS
    for number, sample in enumerate(samples):
        texts = [sample["response"], sample["reference_response"]]
        room -= sum(map(len, texts))
        if room < 0 and number >= STATIC:
            return
        ended = sample.get("ended", True), sample.get("reference_ended", True)
        yield {
            "id": sample["prompt_id"],
            "prompt": _flat(sample["prompt"]),
            "responses": texts,
            "rewards": [round(sample["reward"], 3), round(sample["reference_reward"], 3)],
            "notes": ["" if own else "cut at the limit" for own in ended],
        }


def _flat(prompt: Any) -> str:
    """A conversation with a line per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {shown([message])}" for message in prompt)


def _json(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False, default=str)
