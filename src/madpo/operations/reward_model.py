"""``madpo reward``: a Bradley-Terry reward model from a user's pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from madpo.core.errors import DataError
from madpo.core.metrics import Estimate, Metrics
from madpo.core.progress import say
from madpo.core.reports import Report
from madpo.core.statistics import bootstrap_mean, bootstrap_temperature, proportion_of
from madpo.core.storage import write_atomically
from madpo.data.folds import prompt_key, prompt_keys
from madpo.data.rows import Pair
from madpo.models.adapters import adapter_text
from madpo.operations.inputs import Row, load_training, split_by_prompt
from madpo.operations.pair_scorer import remember_pairs
from madpo.operations.running import digest, load_report, run_in_folder, toml
from madpo.operations.settings import RewardSettings
from madpo.operations.trackers import reporting_to
from madpo.report.charts import Chart, Panel, calibration_panel, reward_curves
from madpo.report.command_pages import Section, command_page, logged, reliability_table, running_page, settings_section
from madpo.report.drawing import draw
from madpo.report.numbers import against, short
from madpo.report.pages import cell, write_page
from madpo.rewards.margins import MarginReport, Reliability, inspect
from madpo.rewards.reward_model import RewardModel
from madpo.runner.operation import operation
from madpo.training.margins import sequences
from madpo.training.settings import RewardModelStage

if TYPE_CHECKING:
    from madpo.training.run import Page

EVALUATIONS = 10
"""Evaluations on the held-out pairs during the training, where ``eval_every`` does not say otherwise."""

MEMORY_REMEDY = (
    "give a smaller --micro_batch_size, which leaves the result as it is unless "
    "--lora.dropout is on, or a lower --max_length"
)


class RewardReport(Report):
    """What :func:`reward` measured on held-out pairs that neither the weights nor the stopping saw."""

    data: str
    data_digest: str | None
    eval_data: str | None
    model_digest: str | None
    """SHA-256 of the files of the base model; None for one of the hub."""
    dropped: int
    """Pairs of more than max_length tokens that were left out; ``dropped.jsonl`` names them."""
    train_pairs: int
    stopping_pairs: int
    heldout_pairs: int
    steps: int
    """Optimiser steps of the weights that were kept."""
    adapter: str | None
    """Which weights the adapter changes, and their share of the model's parameters."""
    accuracy: Estimate
    """Share of held-out pairs whose chosen side has the higher reward, with its interval over prompts."""
    log_loss: float
    """Nats per pair; a coin's is 0.693."""
    log_loss_interval: Estimate
    """The same with its interval over prompts."""
    temperature: float
    """Divides margins to make them log-odds: ``margin_temperature`` of the losses."""
    temperature_interval: Estimate | None
    """The same with its interval; None where it was not fitted."""
    temperature_reason: str
    calibrated_log_loss: float
    reliability: tuple[Reliability, ...]
    """Up to 10 bins of equally many held-out pairs by |margin| / temperature."""
    date: str | None
    """What the chat template printed as now; None where it prints no date."""
    settings: RewardSettings

    def text(self) -> str:
        """The report for a person."""
        a = self.accuracy
        lines = [
            f"reward model: {self.train_pairs} training pairs, {self.steps} steps kept; "
            f"{self.stopping_pairs} held-out pairs decided when to stop",
            f"accuracy {a.mean:.1%} (95 % interval {a.low:.1%} to {a.high:.1%}) on {self.heldout_pairs} other "
            "held-out pairs",
            f"log loss {self.log_loss:.3f} ({_range(self.log_loss_interval)}), {self.calibrated_log_loss:.3f} at "
            f"temperature {self.temperature:.3g}"
            + (f" ({_range(self.temperature_interval)})" if self.temperature_interval else "")
            + " (a coin: 0.693)",
            f"    the temperature was {self.temperature_reason}",
            "pairs  predicted  observed",
        ]
        lines += [
            f"{b.pairs:5d}  {b.predicted:9.1%}  {b.observed.mean:8.1%} ({b.observed.low:.1%} to {b.observed.high:.1%})"
            for b in self.reliability
        ]
        if self.dropped:
            lines.append(f"longer than max_length: {self.dropped} pairs dropped (dropped.jsonl)")
        return "\n".join(lines)


def _range(e: Estimate) -> str:
    return f"{e.low:.3g} to {e.high:.3g}"


def reward(
    data: str | Path,
    output_dir: str | Path,
    settings: RewardSettings,
    *,
    eval_data: str | Path | None = None,
    overwrite: bool = False,
) -> RewardReport:
    """Train a reward model on preference pairs.

    Writes ``adapter`` (with the head) and ``reward_model.json``, which ``RewardModel.load`` reads, ``log.jsonl``,
    ``report.json`` and ``report.html`` (the curves while it runs, then the reliability). The folder appears when all is
    done; the same call continues an interrupted one.

    Args:
        data: as in :func:`madpo.data.load_preferences`, text or messages.
        output_dir: must not exist, or be empty.
        eval_data: held-out pairs; without it ``settings.eval_share`` of the pairs is held out.
        overwrite: replace what is in ``output_dir``.

    Raises:
        DataError, ConfigError, StorageError: one sentence; nothing is left behind.
    """
    inputs = {"data": data, "eval_data": eval_data, "model": settings.model}
    out = run_in_folder(reward_pairs, settings, inputs, output_dir, overwrite=overwrite, memory=MEMORY_REMEDY)
    return load_report(out / "report.json", RewardReport)


@operation("reward_pairs/3")
def reward_pairs(settings: RewardSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The operation behind :func:`reward`."""
    data, eval_data = str(inputs["data"]), inputs.get("eval_data")
    base, _, train, heldout, too_long, clock = load_training(
        settings, data, eval_data, out, seed=settings.seed, max_length=settings.max_length
    )
    stopping, reported = _halves(heldout, settings, str(eval_data or data))
    seen = {prompt_key(row["prompt"]) for row in train}
    if leaked := sum(prompt_key(row["prompt"]) in seen for row in reported):
        say(f"{leaked} of {len(reported)} held-out pairs have a prompt of the training pairs, which flatters.")
    config = toml({"data": data, **settings.model_dump(mode="json")})
    page = running_page(out, f"Reward model on {settings.model}", {"training pairs": f"{len(train):,}"}, config)
    steps = fit(settings, train, stopping, out, page)
    used = (Pair(row["pair_id"], 0, row["prompt"], row["chosen"], row["rejected"], {}) for row in [*train, *stopping])
    remember_pairs(out, used)
    model = RewardModel.load(out)
    measured = _measure(model, reported)
    report = RewardReport(
        data=data,
        data_digest=digest(data),
        eval_data=None if eval_data is None else str(eval_data),
        model_digest=digest(base),
        dropped=len(too_long.dropped),
        train_pairs=len(train),
        stopping_pairs=len(stopping),
        heldout_pairs=len(reported),
        steps=steps,
        adapter=adapter_text(model.model),
        accuracy=measured[0],
        log_loss=measured[1].log_loss,
        log_loss_interval=measured[2],
        temperature=measured[1].margin_temperature,
        temperature_interval=measured[3],
        temperature_reason=measured[1].temperature_reason,
        calibrated_log_loss=measured[1].calibrated_log_loss,
        reliability=measured[1].reliability,
        date=clock.text(),
        settings=settings,
    )
    if too_long.dropped:
        write_atomically(out / "dropped.jsonl", too_long.lines())
    write_report(report, out)
    report.write(out / "report.json")
    return {"accuracy": report.accuracy, "log_loss": report.log_loss_interval, "steps": steps}


def write_report(report: RewardReport, out: Path) -> None:
    """``report.html``: how often the reward model is right, how sure it is, and how its training went."""
    panels = [calibration_panel("Calibration", report.reliability, 4)]
    if series := reward_curves(logged(out / "log.jsonl")):
        panels.append(Panel("Training", "step", "loss, nats", series, reference=("chance", 0.6931)))
    caption = (
        "Calibration: held-out pairs in bins of equal number with 95 % intervals; a calibrated model lies on the line. "
        "Training: the loss on training pairs (a pale line and its running mean) and on held-out pairs."
    )
    bins = reliability_table(report.reliability)
    given = {"data": report.data, "eval_data": report.eval_data, **report.settings.model_dump(mode="json")}
    sections = [
        Section("Calibration and training", charts=[draw(Chart("reward_model", "Reward model", caption, panels))]),
        Section("Calibration in numbers", "the same bins as a table", table=bins, folded=True),
        settings_section(given, "data, model and training"),
    ]
    says = [
        f"It orders {short(report.accuracy, 'share')} of {report.heldout_pairs} held-out pairs as labelled: "
        f"{against(report.accuracy, 0.5, 'chance')}.",
        f"The temperature was {report.temperature_reason}.",
    ]
    tiles = {
        "accuracy": cell(report.accuracy, "share"),
        "log loss": cell(report.log_loss_interval, digits=3),
        "log loss after the temperature": cell(report.calibrated_log_loss, digits=3),
        "temperature": cell(report.temperature_interval or f"{report.temperature:.3g}", digits=3),
        "training pairs": cell(f"{report.train_pairs:,}"),
        "held-out pairs": cell(f"{report.heldout_pairs:,}"),
    }
    title = f"Reward model on {Path(report.settings.model).name}"
    write_page(out / "report.html", command_page("reward model", title, says, tiles, sections))


def _halves(heldout: Sequence[Row], settings: RewardSettings, name: str) -> tuple[list[Row], list[Row]]:
    """(decides when to stop, gives the report); no prompt is in both."""
    try:
        reported, stopping = split_by_prompt(heldout, settings.stopping_share, settings.seed + 1, name)
    except DataError:
        raise DataError(
            f"{name}: the held-out pairs have one prompt, but two are needed (one decides when to stop, the other "
            "measures); raise eval_share or give eval_data with more prompts"
        ) from None
    return stopping, reported


def fit(
    settings: RewardSettings, train: Sequence[Row], stopping: Sequence[Row], out: Path, page: Page | None = None
) -> int:
    """Train on rows with token ids; returns the step whose weights were kept.

    Args:
        page: written while it runs.
    """
    from datasets import Dataset

    from madpo.training.reward import fit_reward_model  # which loads TRL: scoring does without both

    planned = ceil(len(train) * settings.optimisation.epochs / settings.optimisation.batch_size)
    stage = RewardModelStage(
        model=settings.model,
        optimisation=settings.optimisation,
        lora=settings.lora,
        eval_every=settings.eval_every or ceil(planned / EVALUATIONS),
        patience=settings.patience,
        pooling=settings.pooling,
        seed=settings.seed,
    )
    pairs, held = (Dataset.from_dict(sequences(rows)) for rows in (train, stopping))
    with reporting_to(settings.report_to):
        return fit_reward_model(stage, pairs, held, out, page=page)


def _measure(model: RewardModel, rows: Sequence[Row]) -> tuple[Estimate, MarginReport, Estimate, Estimate | None]:
    """(accuracy, calibration, log loss, temperature where one was fitted), with intervals over prompts."""
    sides = sequences(rows)
    chosen, rejected = model.score_pairs(sides["chosen_ids"], sides["rejected_ids"], sides["prompt_length"])
    margins = chosen.astype(np.float64) - rejected
    prompts = prompt_keys([row["prompt"] for row in rows])
    found = inspect(margins, prompts=prompts)
    log_loss = bootstrap_mean(np.logaddexp(0.0, -margins), clusters=prompts, lowest=0.0)
    temperature = bootstrap_temperature(margins, clusters=prompts) if found.temperature_fitted else None
    return proportion_of(margins > 0, prompts), found, log_loss, temperature
