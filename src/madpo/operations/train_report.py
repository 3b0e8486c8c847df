"""What a training reports: ``report.json``, the page with its curves, the model cards, and its settings as TOML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils._validators import validate_repo_id
from yaml import YAMLError  # type: ignore[import-untyped]

from madpo import __version__
from madpo.core.reports import Report
from madpo.core.statistics import proportion
from madpo.core.storage import expanded, write_atomically
from madpo.data.sources import is_hub_name
from madpo.data.templates import Clock
from madpo.models.locate import lasting
from madpo.models.packaged import PACKAGED
from madpo.operations.arguments import written_arguments
from madpo.operations.running import toml
from madpo.operations.train_settings import TrainSettings
from madpo.report.command_pages import main_measures, training_chart, write_training_page
from madpo.report.drawing import save_charts
from madpo.report.numbers import against, short
from madpo.report.pages import markdown
from madpo.rewards.probe import ProbeReport
from madpo.runner.record import load_record

if TYPE_CHECKING:
    from madpo.training import PreferenceConfig

PAGE = "report.html"
CONFIG_HEADING = "# madpo train "
Kind = Literal["adapter", "merged", "model"]
CURVES = "training.svg"
_HYPERPARAMETERS = (
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "lr_scheduler_type", "warmup_steps"),
    "seed",
)


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
    messages: bool = True
    """False if the pairs were text, which the model sees without its chat template."""
    probe: ProbeReport | None = None
    """How good the margins are, where a probe of the reference's hidden states gave them."""

    def decision(self) -> list[str]:
        """What was decided on the way, in sentences."""
        return []

    def drawn(self) -> list[str]:
        """What the curves of the page are of, where that is not the whole training."""
        return []

    def measured(self) -> list[str]:
        """What was measured, in Markdown for the model card."""
        lines = [f"- {line}" for line in self.decision()]
        if not self.evaluation:
            return lines or ["Nothing: no pairs were held out. `madpo evaluate` measures what the policy writes."]
        lines += ["", "| on the held-out pairs | value | |", "| --- | --- | --- |"]
        measured = main_measures(self.evaluation)
        return lines + [f"| {name.lower()} | {value:.4g} | {unit} |" for name, unit, value in measured]

    def ordered(self) -> list[str]:
        """Whether the policy tells chosen from rejected on held-out pairs; nothing where none were held out."""
        if (share := self.evaluation.get("eval_rewards/accuracies")) is None:
            return []
        n = self.eval_pairs / self.eval_effect
        right = proportion(round(share * self.eval_pairs) / self.eval_effect, n)
        words = f"the policy orders {short(right, 'share')} of {self.eval_pairs} held-out pairs as labelled"
        return [f"{words}: {against(right, 0.5, 'chance')}"]

    def text(self) -> str:
        """The report for a person."""
        held = f", {self.eval_pairs} held out" if self.eval_pairs else ""
        lines = [f"{self.pairs} pairs{held}, {self.steps} step{'s' * (self.steps != 1)}, mean loss {self.loss:.3f}"]
        lines += self.ordered()
        if self.dropped or self.cut:
            lines.append(f"longer than max_length: {self.dropped} pairs dropped (dropped.jsonl), {self.cut} cut")
        if self.probe is not None and not self.decision():
            lines.append(f"margins by a {self.probe.text()}")
        measured = main_measures(self.evaluation)
        found = [f"    {name.lower()}  {value:.4g}  ({unit})" for name, unit, value in measured]
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
    _write_cards(out, data=data, eval_data=eval_data, settings=settings, arguments=args.to_dict(), report=report)
    report.write(out / "report.json")
    config = resolved(data, settings, clock)
    write_atomically(out / "config.toml", config)
    unseen = "No pairs were held out, so nothing here says what the policy does with pairs that it has not seen."
    says = [] if report.decision() else [unseen]
    if report.evaluation:
        says = [f"It was measured on {report.eval_pairs} held-out pairs."]
    if ordered := report.ordered():
        says = [f"{ordered[0]}."]
    write_training_page(
        out / PAGE,
        title=title(settings),
        says=[*says, *report.decision(), *report.drawn()],
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
    resolved = settings.model_dump(mode="json")
    if clock is not None and clock.read:
        resolved["date"] = clock.text()
    if settings.full:
        resolved.pop("lora")
    resolved["model"] = lasting(settings.model)
    resolved["args"] = written_arguments(settings.arguments())
    return f"{CONFIG_HEADING}{json.dumps(str(data))} --config config.toml --output_dir DIR\n{toml(resolved)}"


def _write_cards(out: Path, **about: Any) -> None:
    """The README of a trained policy, with the curves in every folder that may be published, and the first on top:
    what it was made from, how, what was measured, and how it is used.

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
    front = ModelCardData(
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=hub,
        license=licence,
        datasets=[data.split(":")[0]] if is_hub_name(data) else None,
        tags=["madpo", "preference-optimization"],
    )
    hyperparameters = {name: arguments[name] for name in _HYPERPARAMETERS if name in arguments}
    if not settings.full:
        hyperparameters |= {f"lora.{name}": value for name, value in settings.lora.model_dump(mode="json").items()}
    margins = [] if (source := _reward_model(Path(data))) is None else [source]
    if report.probe is not None:
        margins.append(f"a probe of the reference's hidden states, out of fold ({report.probe.brief()})")
    return markdown(
        "policy_card.md",
        version=__version__,
        front=front.to_yaml(),
        kind=kind,
        data=data,
        eval_data=eval_data,
        settings=settings,
        report=report,
        curves=curves,
        hub=hub,
        licence=licence,
        margins=margins,
        loss=settings.loss.model_dump(mode="json", exclude={"kind"}),
        hyperparameters=hyperparameters | {"dtype": settings.dtype},
    )


def _origin(model: str) -> tuple[str | None, str | None]:
    """The hub id that a base model comes from, and its licence; None where nothing says so."""
    if model in PACKAGED:
        return PACKAGED[model].hub, PACKAGED[model].license
    folder, found = expanded(model), model
    about: dict[str, Any] = {}
    if folder.is_dir():
        with suppress(OSError, ValueError, RecursionError, YAMLError):  # a stranger's file, and only a source of names
            about = read if isinstance(read := metadata_load(folder / "README.md"), dict) else {}
        found = about.get("base_model") or ""
    try:
        validate_repo_id(found)
    except (HFValidationError, TypeError):
        found = ""
    licence = about.get("license")
    return (found if isinstance(found, str) and "/" in found else None), licence if isinstance(licence, str) else None


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
