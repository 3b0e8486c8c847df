"""``madpo train``: a policy from a user's pairs with any preference loss, as an adapter, merged, or in full."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from madpo.core import processes
from madpo.core.columns import ID_COLUMNS, MARGIN, NUMBERS, probe_gives_margin
from madpo.core.errors import ConfigError
from madpo.core.metrics import Metrics
from madpo.core.statistics import design_effect
from madpo.core.storage import write_atomically
from madpo.data.folds import prompt_keys
from madpo.models.adapters import adapter_text
from madpo.models.engine.logprobs import completion_logps, unwrapped
from madpo.models.hyperparameters import CHECKPOINTS
from madpo.models.load import copy_companions, load_model, load_quantised, merged, resolve_model, save_model
from madpo.models.packaged import quiet_transformers
from madpo.operations.export import GGUF, refuse_unconvertible, write_gguf
from madpo.operations.inputs import Row, load_training
from madpo.operations.preconditions import require_columns
from madpo.operations.running import digest, load_report, run_in_folder
from madpo.operations.trackers import refuse_missing_trackers
from madpo.operations.train_report import TrainReport, resolved, title, write_report
from madpo.operations.train_settings import TrainSettings
from madpo.report.command_pages import running_page
from madpo.runner.first_start import since_first_start
from madpo.runner.operation import operation
from madpo.training import PreferenceConfig, PreferenceTrainer
from madpo.training.first_look import FirstLook, in_halves
from madpo.training.run import keep_tracked, run_training

HELDOUT = "heldout.jsonl"
"""One line for each held-out pair: its implicit margin, and its reward margin where the data have one."""
MARGINS = "margins.jsonl"
"""One line for each training pair, with a probe or a first look: its margin, out of fold where a probe gave it."""
FIRST_LOOK = "first_look.jsonl"
"""As ``HELDOUT``, of training pairs: what the policy said of them before it was trained on them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY_REMEDY = (
    "halve --batch_size and double --args.gradient_accumulation_steps, which leaves the result as it is unless "
    "--lora.dropout is on, or lower --max_length"
)


def train(
    data: str | Path,
    output_dir: str | Path,
    settings: TrainSettings,
    *,
    eval_data: str | Path | None = None,
    overwrite: bool = False,
) -> TrainReport:
    """Train a policy on preference pairs with the loss of ``settings``.

    Writes ``adapter`` (or ``model`` in full training; with ``merge`` also ``merged``, with ``export`` a file for
    llama.cpp), each with a card, ``README.md``, ``report.json``,
    ``report.html`` (the curves, from the first steps on), ``log.jsonl``, ``config.toml`` and, where pairs were too
    long, ``dropped.jsonl``; TensorBoard's files, where it is asked for, are in ``runs``. The folder appears when all is
    done. An interrupted training is continued by the same call, from the newest checkpoint (``args.save_steps`` says
    how often there is one); checkpoints are no part of the result.

    Args:
        data: as in :func:`madpo.data.load_preferences`, with the columns that the loss reads.
        output_dir: must not exist, or be empty.
        eval_data: held-out pairs; without it ``settings.eval_share`` of the pairs is held out.
        overwrite: replace what is in ``output_dir``.

    Raises:
        DataError, ConfigError, StorageError: one sentence; nothing is left behind.
    """
    inputs = {"data": data, "eval_data": eval_data, "model": settings.model}
    if settings.loss.kind == "auto":
        from madpo.operations.auto import AutoReport, train_auto

        out = run_in_folder(train_auto, settings, inputs, output_dir, overwrite=overwrite, memory=MEMORY_REMEDY)
        return load_report(out / "report.json", AutoReport)
    out = run_in_folder(train_pairs, settings, inputs, output_dir, overwrite=overwrite, memory=MEMORY_REMEDY)
    return load_report(out / "report.json", TrainReport)


@operation("train_pairs/5")
def train_pairs(settings: TrainSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The operation behind :func:`train`."""
    return _train(settings, inputs, out, noted=settings.first_look)


@operation("train_unnoted/5")
def train_unnoted(settings: TrainSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The same, but of ``first_look`` only the order of the rows is kept: the second training of ``auto``."""
    return _train(settings, inputs, out, noted=False)


def _train(settings: TrainSettings, inputs: Mapping[str, Path], out: Path, *, noted: bool) -> Metrics:
    data, eval_data = str(inputs["data"]), inputs.get("eval_data")
    args = trainer_arguments(settings, out, evaluated=eval_data is not None or settings.eval_share > 0)
    # The reference is computed as at the first start: another batch size would change its last digits.
    asked = int(args.precompute_ref_batch_size or args.per_device_train_batch_size)
    args.precompute_ref_batch_size = since_first_start(out / CHECKPOINTS, "reference_batch", lambda: asked)
    base, tokenizer, rows, heldout, too_long, clock = load_training(
        settings, data, eval_data, out, seed=split_seed(settings, args), max_length=args.max_length
    )
    messages = not isinstance(rows[0]["prompt"], str)
    probed = probe_gives_margin(rows[0], past_scores=settings.probe)
    if settings.export == "gguf":
        refuse_unconvertible(base)
    require_columns(rows, settings.loss, str(data), probed=probed)
    prompts, held = map(_prompts_by_pair, (rows, heldout))  # of two files, whose pair_ids may be the same
    if settings.first_look:
        rows = in_halves(rows, [prompts[row["pair_id"]] for row in rows], split_seed(settings, args))
    if heldout:
        require_columns(heldout, settings.loss, str(eval_data or data), probed=probed)
    if "logging_steps" not in settings.args:
        args.logging_steps = _every(args, len(rows))
    trainer = build_trainer(settings, args, base, tokenizer, rows, heldout)
    trainer.first_look = FirstLook() if noted else None
    if trainer.sharded and settings.merges:
        raise ConfigError(
            "--merge needs the whole model in one process, and FSDP or DeepSpeed has split it; leave --merge out "
            "and fold the adapter in afterwards with PEFT's merge_and_unload"
        )

    # The trainer knows by itself what of its arguments decides the result.
    stage = settings.model_copy(update={"args": {}})
    page = running_page(out, title(settings), {"pairs": f"{len(rows):,}"}, resolved(data, settings, clock))
    result = run_training(trainer, stage, f"Training ({settings.method})", out, page)
    evaluation = _evaluation(trainer) if heldout else {}
    report = TrainReport(
        pairs=len(trainer.train_dataset),
        eval_pairs=len(trainer.eval_dataset) if heldout else 0,
        eval_effect=_write_margins(trainer, prompts, held, out),
        steps=int(result.global_step),
        loss=float(result.training_loss),
        evaluation=evaluation,
        dropped=len(too_long.dropped),
        cut=too_long.cut,
        data_digest=digest(data),
        model_digest=model_digest(base, trainer.model),
        learning_rate=float(args.learning_rate),
        adapter=adapter_text(trainer.model),
        messages=messages,
        probe=trainer.probe.report if trainer.probe is not None else None,
    )
    _save(trainer, settings, tokenizer, out)
    if not processes.is_main_process():
        return {}
    keep_tracked(out)  # with the evaluation
    if too_long.dropped:
        write_atomically(out / "dropped.jsonl", too_long.lines())
    write_report(out, data, eval_data, settings, args, report, clock)
    return {"pairs": report.pairs, "steps": report.steps, "loss": report.loss, **evaluation}


def _evaluation(trainer: PreferenceTrainer) -> dict[str, float]:
    """What the trainer measures on held-out pairs, without its timing."""
    found, logs = trainer.evaluate(), reversed(trainer.state.log_history)
    logged = {**next((row for row in logs if "eval_loss" in row), {}), **found}
    timing = ("runtime", "per_second", "epoch", "num_tokens")
    names = [name for name in logged if name.startswith("eval_") and not name.endswith(timing)]
    return {name: float(logged[name]) for name in names}


def _every(args: PreferenceConfig, pairs: int) -> int:
    """Steps between two lines of the log: a short training has at least 20 lines, or one for each step."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else pairs * args.num_train_epochs / batch
    return max(1, min(int(args.logging_steps), int(steps) // 20))


def _prompts_by_pair(rows: Sequence[Row]) -> dict[int, str]:
    keys = prompt_keys([row["prompt"] for row in rows])
    return {row["pair_id"]: key for row, key in zip(rows, keys, strict=True)}


def trainer_arguments(settings: TrainSettings, out: Path, *, evaluated: bool) -> PreferenceConfig:
    """The trainer's arguments; checkpoints go into ``out``.

    Raises:
        ConfigError: values that do not fit together, in one sentence.
    """
    given = settings.arguments()
    if given.get("eval_strategy", "no") != "no" and not evaluated:
        raise ConfigError(f"args.eval_strategy = {given['eval_strategy']!r} needs eval_data or eval_share")
    refuse_missing_trackers(given["report_to"])
    if not torch.cuda.is_available():
        given.setdefault("dataloader_pin_memory", False)
    try:
        return PreferenceConfig(output_dir=str(out / CHECKPOINTS), **given)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"args: {(str(error).splitlines() or ['?'])[0]}; change the arguments") from error


def split_seed(settings: TrainSettings, args: PreferenceConfig) -> int:
    """The seed of the choice of held-out prompts."""
    return args.seed if settings.split_seed is None else settings.split_seed


def build_trainer(
    settings: TrainSettings,
    args: PreferenceConfig,
    base: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    heldout: Sequence[Row],
) -> PreferenceTrainer:
    """The trainer of ``settings``: the model, its adapter, and the rows with token ids."""
    model = load_quantised(base) if settings.qlora else load_model(base, dtype=chosen_dtype(settings))
    return trainer_of(settings, args, model, tokenizer, rows, heldout)


def trainer_of(
    settings: TrainSettings,
    args: PreferenceConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    heldout: Sequence[Row],
) -> PreferenceTrainer:
    """The same of a model that is loaded."""
    if not settings.full:
        _refuse_head(model, settings)
    torch.manual_seed(args.seed)  # the adapter starts at random
    with quiet_transformers():
        return PreferenceTrainer(
            model,
            args=args,
            loss=settings.loss,
            train_dataset=as_dataset(rows),
            eval_dataset=as_dataset(heldout) if heldout else None,
            processing_class=tokenizer,
            peft_config=None if settings.full else settings.lora.peft_config("CAUSAL_LM", model),
        )


def _refuse_head(model: nn.Module, settings: TrainSettings) -> None:
    """Refuse an adapter on the output head, whose weight the log-probabilities read directly."""
    targets = settings.lora.targets
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = {name: module for name, module in model.named_modules() if name}
    heads = [name for name, module in names.items() if module is head]
    if isinstance(targets, str) or not any(f".{name}".endswith(f".{target}") for name in heads for target in targets):
        return
    linear = (name for name, module in names.items() if isinstance(module, nn.Linear | Conv1D) and module is not head)
    possible = sorted({name.rsplit(".", 1)[-1] for name in linear})
    raise ConfigError(
        f"lora.targets = {targets!r}: the output head {heads[0]} is never a target; name some of "
        f"{', '.join(possible)}, or take all-linear"
    )


def chosen_dtype(settings: TrainSettings) -> torch.dtype | None:
    """Type of the loaded weights; None is what the processor multiplies natively."""
    return DTYPES.get(settings.dtype, torch.float32 if settings.full else None)


def model_digest(base: Path | str, model: nn.Module) -> str | None:
    """What the base model was: SHA-256 of its folder's files, or its commit on the hub."""
    commit = getattr(getattr(unwrapped(model), "config", None), "_commit_hash", None)
    return digest(base) or commit


def as_dataset(rows: Sequence[Row]) -> Dataset:
    """The columns that the trainer reads, and what makes two prompts the same, for the folds of its probe."""
    columns = {n: [row[n] for row in rows] for n in ("pair_id", *ID_COLUMNS, *NUMBERS, "prompt") if n in rows[0]}
    if "prompt" in columns:
        columns["prompt"] = prompt_keys(columns["prompt"])
    return Dataset.from_dict(columns)


@torch.no_grad()
def implicit_margins(trainer: PreferenceTrainer, rows: Dataset) -> NDArray[np.float64]:
    """The loss's implicit margin of every row, in order: log-odds, above 0 where the policy agrees with the label."""
    found = []
    trainer.model.eval()
    for batch in trainer.get_test_dataloader(rows):
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            masks = (inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
            scores = completion_logps(trainer.model, *masks, pairs=True)
        own = trainer.loss.implicit_margin(trainer._loss_inputs(scores, inputs))
        found.append(trainer.accelerator.gather_for_metrics(own).double().cpu().numpy())
    margins: NDArray[np.float64] = np.concatenate(found)
    return margins


def _write_margins(trainer: PreferenceTrainer, trained: Mapping[int, str], held: Mapping[int, str], out: Path) -> float:
    """``MARGINS``, ``HELDOUT`` and ``FIRST_LOOK``, where there are such margins.

    Args:
        trained, held: pair_id -> prompt, of the training pairs and of the held-out ones.

    Returns:
        The design effect of the held-out pairs, for the interval of their accuracy.
    """
    judged: dict[str, tuple[Dataset, Mapping[int, str], dict[int, float] | None]] = {}
    effect, rows = 1.0, trainer.train_dataset
    if trainer.probe is not None or (trainer.first_look is not None and MARGIN in rows.column_names):
        judged[MARGINS] = rows, trained, None
    if (rows := trainer.eval_dataset) is not None:
        judged[HELDOUT] = rows, held, dict(zip(rows["pair_id"], implicit_margins(trainer, rows).tolist(), strict=True))
    if trainer.first_look is not None:
        judged[FIRST_LOOK] = trainer.train_dataset, trained, trainer.first_look.deciding(trained)
    if not processes.is_main_process():
        return effect
    for name, (dataset, prompts, margins) in judged.items():
        table = pd.DataFrame({"pair_id": [*(dataset["pair_id"] if margins is None else margins)]})
        table["prompt"] = pd.factorize(table["pair_id"].map(prompts))[0]
        if margins is not None:
            table["implicit_margin"] = [*margins.values()]
        if MARGIN in dataset.column_names:
            table[MARGIN] = table["pair_id"].map(dict(zip(dataset["pair_id"], dataset[MARGIN], strict=True)))
        if name == HELDOUT:
            effect = design_effect(table["implicit_margin"] > 0, table["prompt"])
        write_atomically(out / name, "".join(json.dumps(row) + "\n" for row in table.to_dict("records")))
    return effect


def _save(trainer: PreferenceTrainer, settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    with quiet_transformers():
        if trainer.sharded:  # every process gives its part
            trainer.save_model(str(out / ("model" if settings.full else "adapter")))
            if settings.full and processes.is_main_process():
                copy_companions(resolve_model(settings.model), out / "model")
            return
        if not processes.is_main_process():
            return
        if settings.full:
            save_model(unwrapped(trainer.model), out / "model", tokenizer)
            if settings.export == "gguf":
                write_gguf(out / "model", out / GGUF)
            return
        trainer.model.save_pretrained(out / "adapter", safe_serialization=True)
        tokenizer.save_pretrained(out / "adapter")
        if settings.merges:
            model: nn.Module = trainer.model
            if settings.qlora:  # the sum is taken with the weights as they were before they had 4 bits
                model = load_model(resolve_model(settings.model), dtype=chosen_dtype(settings), adapter=out / "adapter")
            save_model(merged(model), out / "merged", tokenizer)
        if settings.export == "gguf":
            write_gguf(out / "merged", out / GGUF)
