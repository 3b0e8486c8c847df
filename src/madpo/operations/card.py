"""The README of a trained policy: what it was made from, how, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from madpo import __version__
from madpo.runner.record import load_record

if TYPE_CHECKING:
    from madpo.operations.policy import TrainReport
    from madpo.operations.train_settings import TrainSettings


def model_card(*, data: str, eval_data: str | Path | None, settings: TrainSettings, report: TrainReport) -> str:
    """Markdown with the hub's front matter."""
    library = "transformers" if settings.full else "peft"
    loss = {k: v for k, v in settings.loss.model_dump(mode="json").items() if k != "kind"}
    lines = [
        "---",
        f"library_name: {library}",
        f"base_model: {json.dumps(settings.model, ensure_ascii=False)}",
        "tags: [madpo, preference-optimization]",
        "---",
        "",
        f"# {_plain(Path(settings.model).name)}, trained with {settings.loss.kind}",
        "",
        f"- base model and reference: `{_plain(settings.model)}` "
        f"(SHA-256 of its files, or its commit: {report.model_digest or 'unknown'})",
        f"- pairs: `{_plain(data)}`, {report.pairs} for training "
        f"(SHA-256 of the data: {report.data_digest or 'unknown'})",
    ]
    if report.dropped or report.cut:
        lines.append(f"- longer than max_length: {report.dropped} pairs left out, {report.cut} cut")
    if report.eval_pairs:
        source = f"`{_plain(str(eval_data))}`" if eval_data else "whole prompts of the same data"
        lines.append(f"- held out: {report.eval_pairs} pairs, {source}")
    if (reward_model := _reward_model(Path(data))) is not None:
        lines.append(f"- margins from: {_plain(reward_model)}")
    if report.probe is not None:
        a = report.probe.accuracy
        lines.append(
            f"- margins from: a probe of the reference's states, out of fold (accuracy {a.mean:.1%}, {a.low:.1%} to "
            f"{a.high:.1%}; log loss {report.probe.log_loss.mean:.3f})"
        )
    if report.adapter:
        lines.append(f"- {_plain(report.adapter)}")
    lines += [
        f"- loss: `{settings.loss.kind}` with {', '.join(f'{k} = {json.dumps(v)}' for k, v in loss.items())}",
        f"- trained: {_weights(settings)}, {report.steps} steps, learning rate {report.learning_rate:g}",
        f"- made by madpo {__version__}; `config.toml` repeats it, `log.jsonl` holds the course of the training",
        "",
        "## Measured",
        "",
    ]
    if report.evaluation:
        lines += ["| on the held-out pairs | value |", "| --- | --- |"]
        lines += [f"| {name.removeprefix('eval_')} | {value:.6g} |" for name, value in report.evaluation.items()]
    else:
        lines.append("Nothing: no pairs were held out. `madpo evaluate` measures what the policy writes.")
    return "\n".join(lines) + "\n"


def _weights(settings: TrainSettings) -> str:
    if settings.full:
        return "all weights"
    return f"LoRA of rank {settings.lora.rank}{' over weights of 4 bits' if settings.qlora else ''}"


def _reward_model(data: Path) -> str | None:
    """Where the margins of scored data came from, if `madpo score` wrote them."""
    record = load_record(data.parent)
    if record is None or not record.operation.startswith("score_pairs/") or data.name not in (record.files or {}):
        return None
    made = record.config
    if made.get("reward_model"):
        return f"the reward model {made['reward_model']} (SHA-256 {record.inputs.get('reward_model') or 'unknown'})"
    if made.get("score_columns"):
        return f"the columns {' and '.join(map(str, made['score_columns']))}"
    if made.get("probe"):
        return f"a probe of the states of {made['probe']}, out of fold"
    reward = made.get("reward")
    base = reward.get("model") if isinstance(reward, dict) else "unknown"
    return f"{made.get('folds')} reward models on {base}, out of fold"


def _plain(text: str) -> str:
    return text.replace("`", "'").replace("\n", " ")
