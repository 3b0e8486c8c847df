"""The README of a trained policy: what it was made from, how, what was measured, and how it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils._validators import validate_repo_id
from yaml import YAMLError  # type: ignore[import-untyped]

from madpo import __version__
from madpo.core.storage import expanded, write_atomically
from madpo.models.packaged import PACKAGED
from madpo.report.command_pages import training_chart
from madpo.report.drawing import save_charts
from madpo.runner.record import load_record

if TYPE_CHECKING:
    from madpo.operations.policy import TrainReport
    from madpo.operations.train_settings import TrainSettings

Kind = Literal["adapter", "merged", "model"]
CURVES = "training.svg"
_HYPERPARAMETERS = (
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    *(
        "optim",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "max_grad_norm",
        "lr_scheduler_type",
        "warmup_steps",
        "seed",
    ),
)
_SPLIT = re.compile(r"[\w.-]+/[\w.-]+(:[\w.+-]+)*")


def write_cards(out: Path, **about: Any) -> None:
    """A card with the curves in every folder that may be published, and the first of them on top.

    Args:
        about: as for :func:`model_card`.
    """
    chart = training_chart(out / "log.jsonl")
    kinds = [kind for kind in get_args(Kind) if (out / kind).is_dir()]
    for kind in kinds:
        if chart is not None:
            save_charts([chart], out / kind)
        write_atomically(out / kind / "README.md", model_card(kind=kind, curves=CURVES if chart else None, **about))
    curves = f"{kinds[0]}/{CURVES}" if chart else None
    write_atomically(out / "README.md", model_card(kind=kinds[0], curves=curves, **about))


def model_card(
    *,
    kind: Kind,
    data: str,
    eval_data: str | Path | None,
    settings: TrainSettings,
    arguments: Mapping[str, Any],
    report: TrainReport,
    curves: str | None,
) -> str:
    """Markdown with the hub's front matter.

    Args:
        kind: the folder of the result that the card is about.
        arguments: of the trainer.
        curves: where the picture of the training's course is, seen from the card; None where nothing was logged.
    """
    hub, licence = _origin(settings.model)
    is_hub_data = _SPLIT.fullmatch(data) is not None and not expanded(data).exists()
    front = ModelCardData(
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=hub,
        license=licence,
        datasets=[data.split(":")[0]] if is_hub_data else None,
        tags=["madpo", "preference-optimization"],
    )
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        f"# {_title(settings)}",
        "",
        *_made_from(data, eval_data, settings, report),
        f"- licence of the base model: {licence or 'unknown; say it here before you publish this'}",
        f"- made by madpo {__version__}; `config.toml` repeats it, `log.jsonl` holds the course of the training",
        "",
        *_measured(report, curves),
        *_hyperparameters(settings, arguments),
        *_use(kind, settings),
    ]
    return "\n".join(lines) + "\n"


def _title(settings: TrainSettings) -> str:
    return f"{_plain(Path(settings.model).name)}, trained with {settings.loss.kind}"


def _made_from(data: str, eval_data: str | Path | None, settings: TrainSettings, report: TrainReport) -> list[str]:
    lines = [
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
    loss = {k: v for k, v in settings.loss.model_dump(mode="json").items() if k != "kind"}
    return [
        *lines,
        f"- loss: `{settings.loss.kind}` with {', '.join(f'{k} = {json.dumps(v)}' for k, v in loss.items())}",
        f"- trained: {_weights(settings)}, {report.steps} steps, learning rate {report.learning_rate:g}",
    ]


def _measured(report: TrainReport, curves: str | None) -> list[str]:
    lines = ["## Measured", "", *report.measured()]
    if curves is not None:
        lines += ["", f"![Course of the training: loss, margins and accuracy over the steps]({curves})"]
    return [*lines, ""]


def _hyperparameters(settings: TrainSettings, arguments: Mapping[str, Any]) -> list[str]:
    values = {name: arguments[name] for name in _HYPERPARAMETERS if name in arguments}
    values |= {} if settings.full else {f"lora.{k}": v for k, v in settings.lora.model_dump(mode="json").items()}
    values["dtype"] = settings.dtype
    rows = [f"| `{name}` | {_plain(json.dumps(value, default=str))} |" for name, value in values.items()]
    return ["## Hyperparameters", "", "| argument | value |", "| --- | --- |", *rows, ""]


def _use(kind: Kind, settings: TrainSettings) -> list[str]:
    """Code and commands, of which a test runs the code."""
    name = "AutoPeftModelForCausalLM" if kind == "adapter" else "AutoModelForCausalLM"
    lines = [
        *("## Use", "", "```python"),
        f"from {'peft' if kind == 'adapter' else 'transformers'} import {name}",
        *("from transformers import AutoTokenizer", ""),
        f'folder = "{kind}"  # or OWNER/NAME on the hub',
        f"tokenizer, model = AutoTokenizer.from_pretrained(folder), {name}.from_pretrained(folder)",
        'text = "The film"',
        "if tokenizer.chat_template:",
        '    messages = [{"role": "user", "content": text}]',
        "    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
        'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)',
        "written = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        *("```", "", "```console"),
        "$ madpo chat .                        # next to its reference",
        f"$ hf upload OWNER/NAME {kind}{' ' * max(1, 15 - len(kind))}# with this card",
    ]
    if kind == "adapter":
        base = _origin(settings.model)[0] or settings.model
        lines.append(f"$ vllm serve {_plain(base)} --enable-lora --lora-modules policy=adapter")
    else:
        lines.append(f"$ vllm serve {kind}")
    return [*lines, "```"]


def _origin(model: str) -> tuple[str | None, str | None]:
    """The hub id that a base model comes from, and its licence; None where nothing says so."""
    if model in PACKAGED:
        return PACKAGED[model].hub, PACKAGED[model].license
    folder, found = expanded(model), model
    about: dict[str, Any] = {}
    if folder.is_dir():
        about = _front_matter(folder / "README.md")
        found = about.get("base_model") or ""
    try:
        validate_repo_id(found)
    except (HFValidationError, TypeError):
        found = ""
    licence = about.get("license")
    return (found if isinstance(found, str) and "/" in found else None), licence if isinstance(licence, str) else None


def _front_matter(card: Path) -> dict[str, Any]:
    try:
        found = metadata_load(card)
    except (OSError, ValueError, RecursionError, YAMLError):  # a stranger's file, and only a source of names
        return {}
    return found if isinstance(found, dict) else {}


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
