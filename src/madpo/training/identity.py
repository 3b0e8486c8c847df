"""The identity of a training: everything that its result depends on, by field, so that a resume can compare it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from madpo.core.progress import say
from madpo.runner.record import libraries
from madpo.training import checkpoints as disk
from madpo.training import digests

# Arguments that change where, how often or how fast, and no result (but for last digits, see `_conditions`).
_FREE = {
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "include_num_input_tokens_seen", "debug"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size", "use_cpu"),
    *("eval_accumulation_steps", "prediction_loss_only", "load_best_model_at_end", "enable_jit_checkpoint"),
    *("push_to_hub", "resume_from_checkpoint", "restore_callback_states_from_checkpoint", "local_rank"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataset_num_proc"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "skip_memory_metrics"),
    *("torch_empty_cache_steps", "do_train", "do_eval", "do_predict", "precompute_ref_batch_size"),
    *("precompute_ref_log_probs", "token_metrics", "allow_pickle", "pad_token"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading"),
}
_FREE_PREFIXES = ("logging_", "log_", "save_", "hub_", "trackio_", "ddp_")
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Free one by one; their product is not."""


def decisive_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments less those that bear on no result; of ``BATCH``, the product is for the caller to add."""
    return {k: v for k, v in arguments.items() if k not in _FREE and not k.startswith(_FREE_PREFIXES)}


# Arguments with which a training is continued on purpose: for longer, or with other evaluations.
_CONTINUING = {
    *("max_steps", "num_train_epochs", "metric_for_best_model", "greater_is_better", "batch_eval_metrics"),
    *("include_for_metrics", "bf16_full_eval", "fp16_full_eval"),
}


def check_identity(point: disk.Checkpoint, identity: Mapping[str, Any], *, continues: bool) -> None:
    """Refuse the checkpoint of another training.

    Args:
        continues: a longer training, or one with other evaluations, is reported and not refused.

    Raises:
        DataError: the first field that differs, with both values.
    """
    before: Mapping[str, Any] = point.identity
    now: Mapping[str, Any] = json.loads(json.dumps(identity))  # tuples become lists, as in the manifest
    if continues:
        with disk.reading(point.folder / disk.MANIFEST):
            before, was = _apart(before)
        now, new = _apart(now)
        changed = [
            "the evaluation data differ" if name == "evaluation data" else f"{name} was {was.get(name)}, is {new[name]}"
            for name in new
            if was.get(name) != new[name]
        ]
        if changed:
            say(f"Continuing {point.folder} otherwise than it began: {', '.join(changed)}")
    disk.check_identity(replace(point, identity=dict(before)), now)


def _apart(identity: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An identity without what a continued training may change, and that part."""
    configuration = identity["configuration"]
    free = {name: v for name, v in configuration.items() if name in _CONTINUING or name.startswith("eval_")}
    kept = {name: v for name, v in configuration.items() if name not in free}
    rest = {name: v for name, v in identity.items() if name != "evaluation data"}
    return {**rest, "configuration": kept}, {**free, "evaluation data": identity["evaluation data"]}


def training_identity(trainer: Any) -> dict[str, Any]:
    """What the result of a training depends on.

    Args:
        trainer: an :class:`madpo.training.resume.ExactResume`.
    """
    groups = trainer._column_groups()
    apart = {name for names in groups.values() for name in names}
    columns = set(trainer.train_dataset.column_names or ())
    arguments = decisive_arguments(trainer.args.to_dict())
    adapters = getattr(trainer.model, "peft_config", None) or {}
    return {
        "data": trainer._rows_digest(trainer.train_dataset, columns - apart),
        **{field: trainer._rows_digest(trainer.train_dataset, names) for field, names in groups.items()},
        "evaluation data": _evaluation_digest(trainer, trainer.eval_dataset),
        "configuration": json.loads(json.dumps(arguments, default=str)),
        "stage": trainer.stage_settings,
        "loss": trainer.loss.model_dump(mode="json") if hasattr(trainer, "loss") else None,
        "model": digests.frozen_digest(trainer.model),
        "model configuration": digests.model_settings(trainer.model),
        "adapter": {name: digests.adapter_settings(adapter) for name, adapter in adapters.items()},
        "batch": trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps,
        "processes": trainer.accelerator.num_processes,
        "device": trainer.accelerator.device.type,
        "precision": str(trainer.accelerator.mixed_precision),
        "libraries": libraries(),
    }


def _evaluation_digest(trainer: Any, dataset: Any) -> Any:
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _evaluation_digest(trainer, part) for name, part in dataset.items()}
    return trainer._rows_digest(dataset, dataset.column_names or ())
