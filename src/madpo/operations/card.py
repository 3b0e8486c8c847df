"""The README of a trained policy: what it was made from, how, what was measured, and how it is used."""

from __future__ import annotations

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
from madpo.core.storage import expanded, write_atomically
from madpo.data.sources import is_hub_name
from madpo.models.packaged import PACKAGED
from madpo.report.command_pages import training_chart
from madpo.report.drawing import save_charts
from madpo.report.pages import markdown
from madpo.runner.record import load_record

if TYPE_CHECKING:
    from madpo.operations.train_report import TrainReport
    from madpo.operations.train_settings import TrainSettings

Kind = Literal["adapter", "merged", "model"]
CURVES = "training.svg"
_HYPERPARAMETERS = (
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "lr_scheduler_type", "warmup_steps"),
    "seed",
)


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
        a, loss = report.probe.accuracy, report.probe.log_loss.mean
        margins.append(
            f"a probe of the reference's hidden states, out of fold (accuracy {a.mean:.1%}, {a.low:.1%} to "
            f"{a.high:.1%}; log loss {loss:.3f})"
        )
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
