"""What a training reports: ``report.json``, the page with its curves, the model cards, and its settings as TOML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from madpo.core.reports import Report
from madpo.core.statistics import proportion
from madpo.core.storage import write_atomically
from madpo.data.templates import Clock
from madpo.models.locate import lasting
from madpo.operations.arguments import written_arguments
from madpo.operations.card import write_cards
from madpo.operations.train_settings import TrainSettings
from madpo.report.command_pages import main_measures, write_training_page
from madpo.report.numbers import against, short
from madpo.rewards.probe import ProbeReport

if TYPE_CHECKING:
    from madpo.training import PreferenceConfig

PAGE = "report.html"
CONFIG_HEADING = "# madpo train "


class TrainReport(Report):
    """What :func:`train` did. Evaluation numbers are the trainer's, by its names; empty without held-out pairs."""

    pairs: int
    eval_pairs: int
    steps: int
    loss: float
    """Mean over the training."""
    evaluation: dict[str, float]
    dropped: int
    """Pairs of more than max_length tokens that were left out; ``dropped.jsonl`` names them."""
    eval_effect: float = 1.0
    """How many held-out pairs say as much as one (:func:`madpo.core.statistics.design_effect` of their accuracy over
    prompts): for intervals."""
    cut: int
    """Pairs whose completions were cut to max_length."""
    data_digest: str | None
    """SHA-256 of the data; None for a data set of the hub."""
    model_digest: str | None
    """SHA-256 of the files of the base model, or its commit on the hub."""
    learning_rate: float | None = None
    """The largest of the schedule."""
    adapter: str | None = None
    """Which weights the adapter changes, and their share of the model's parameters; None in full training."""
    probe: ProbeReport | None = None
    """How good the margins are, where a probe of the reference's hidden states gave them."""

    def decision(self) -> list[str]:
        """What was decided on the way, in sentences."""
        return []

    def measured(self) -> list[str]:
        """What was measured, in Markdown for the model card."""
        lines = [f"- {line}" for line in self.decision()]
        if not self.evaluation:
            return lines or ["Nothing: no pairs were held out. `madpo evaluate` measures what the policy writes."]
        lines += ["", "| on the held-out pairs | value | |", "| --- | --- | --- |"]
        measured = main_measures(self.evaluation)
        return lines + [f"| {name.lower()} | {value:.6g} | {unit} |" for name, unit, value in measured]

    def text(self) -> str:
        """The report for a person."""
        held = f", {self.eval_pairs} held out" if self.eval_pairs else ""
        lines = [f"{self.pairs} pairs{held}, {self.steps} steps, mean loss {self.loss:.4f}"]
        if self.dropped or self.cut:
            lines.append(f"longer than max_length: {self.dropped} pairs dropped (dropped.jsonl), {self.cut} cut")
        if self.probe is not None and not self.decision():
            lines.append(f"margins by a {self.probe.text()}")
        measured = main_measures(self.evaluation)
        found = [f"    {name.lower()}  {value:.4f}  ({unit})" for name, unit, value in measured]
        return "\n".join(
            [*lines, *self.decision(), *([f"on {self.eval_pairs} held-out pairs:"] if found else []), *found]
        )


def title(settings: TrainSettings) -> str:
    """The title of a training's page."""
    return f"{Path(settings.model).name}, trained with {settings.method}"


def write_report(
    out: Path,
    data: str,
    eval_data: Path | None,
    settings: TrainSettings,
    args: PreferenceConfig,
    report: TrainReport,
    clock: Clock,
) -> None:
    """The model cards, ``report.json``, ``config.toml`` and the page of a training."""
    write_cards(out, data=data, eval_data=eval_data, settings=settings, arguments=args.to_dict(), report=report)
    report.write(out / "report.json")
    config = resolved(data, settings, clock)
    write_atomically(out / "config.toml", config)
    unseen = "No pairs were held out, so nothing here says what the policy does with pairs that it has not seen."
    says = [] if report.decision() else [unseen]
    if (share := report.evaluation.get("eval_rewards/accuracies")) is not None:
        n, effect = report.eval_pairs, report.eval_effect
        right = proportion(round(share * n) / effect, n / effect)
        said = f"It orders {short(right, 'share')} of {report.eval_pairs} held-out pairs as labelled"
        says = [f"{said}: {against(right, 0.5, 'chance')}."]
    elif report.evaluation:
        says = [f"It was measured on {report.eval_pairs} held-out pairs."]
    write_training_page(
        out / PAGE,
        title=title(settings),
        says=[*report.decision(), *says],
        numbers={
            "pairs": f"{report.pairs:,}",
            "steps": f"{report.steps:,}",
            "learning rate": f"{report.learning_rate:g}",
            "mean loss": report.loss,
        },
        evaluation=report.evaluation,
        trained=f"{report.adapter or 'All weights were trained'}.",
        log=out / "log.jsonl",
        settings=config,
    )


def resolved(data: str | Path, settings: TrainSettings, clock: Clock | None = None) -> str:
    """The configuration as TOML, with every default that is ours: ``madpo train DATA --config`` repeats it.

    Args:
        clock: of the training, which the configuration fixes if the chat template prints a date.
    """
    resolved = settings.model_dump(mode="json", exclude_none=True)  # TOML has no word for nothing
    if clock is not None and clock.read:
        resolved["date"] = clock.text()
    if settings.full:
        resolved.pop("lora")
    resolved["model"] = lasting(settings.model)
    args = written_arguments(settings.arguments())
    resolved["args"] = {name: value for name, value in args.items() if value is not None}
    return f"{CONFIG_HEADING}{json.dumps(str(data))} --config config.toml --output_dir DIR\n{tomli_w.dumps(resolved)}"
