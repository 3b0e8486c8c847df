"""The identity of a training: everything that its result depends on, by field, so that a resume can compare it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from madpo.runner.record import libraries
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
