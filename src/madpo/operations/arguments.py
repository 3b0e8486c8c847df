"""Arguments of the trainer by name and type, without loading TRL: a mistake in one is reported within a second."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from madpo.core.config import MOST_SEED
from madpo.core.options import Cli
from madpo.core.suggestions import did_you_mean

_NONE = "none"
_NO_SUCH_LOSS = "belongs to a loss that madpo does not have; write one of your own (--loss custom)"
_REFUSED = {
    "output_dir": "is the command's own; use --output_dir",
    "trust_remote_code": "would run code that comes with a model; convert the model with tools that you trust",
    "push_to_hub": "is not for a command that finishes in a folder; look at the result, then upload it",
    "hub_token": "would be kept with the result, for everybody to read; log in with: hf auth login",
    "resume_from_checkpoint": "is not needed; the same command continues an interrupted training",
    "auto_find_batch_size": "would begin again with half of the batch when memory runs out; --dry_run says what fits",
    "use_peft": "is the default here; --full trains all weights instead of an adapter",
    "beta": "has no effect here, since the loss has its own; did you mean '--loss.beta'?",
    "loss_type": "has no effect here, since the loss is chosen by its kind; did you mean '--loss'?",
    "label_smoothing": "has no effect here; did you mean '--loss.label_smoothing' (of the loss dpo)?",
    "use_weighting": "has no effect here; did you mean '--loss wpo'?",
    "loss_weights": "has no effect here; did you mean '--loss combined', with --loss.parts and --loss.weights?",
    **dict.fromkeys(("ld_alpha", "discopop_tau", "f_divergence_type", "f_alpha_divergence_coef"), _NO_SUCH_LOSS),
}


# Type -> the arguments of PreferenceConfig that take it (an enumeration takes text). A test holds this
# against the class itself.
_BY_TYPE: dict[Any, str] = {
    bool: (
        "activation_offloading allow_pickle auto_find_batch_size average_tokens_across_devices "
        "batch_eval_metrics bf16_full_eval dataloader_drop_last dataloader_in_order "
        "dataloader_persistent_workers dataloader_pin_memory do_eval do_predict do_train "
        "enable_jit_checkpoint eval_do_concat_batches eval_on_start eval_use_gather_object fp16 "
        "fp16_full_eval full_determinism hub_always_push ignore_data_skip load_best_model_at_end "
        "log_on_each_node logging_first_step logging_nan_inf_filter padding_free precompute_ref_log_probs "
        "prediction_loss_only push_to_hub remove_unused_columns restore_callback_states_from_checkpoint "
        "save_on_each_node save_only_model skip_memory_metrics sync_ref_model torch_compile "
        "trust_remote_code use_cache use_cpu use_liger_kernel use_weighting"
    ),
    bool | None: (
        "activation_checkpointing bf16 ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph "
        "disable_dropout disable_tqdm gradient_checkpointing greater_is_better hub_private_repo pair_weights tf32"
    ),
    bool | str: "include_num_input_tokens_seen",
    int: (
        "dataloader_num_workers ddp_timeout gradient_accumulation_steps local_rank max_steps "
        "per_device_eval_batch_size per_device_train_batch_size ref_model_sync_steps seed"
    ),
    int | None: (
        "data_seed dataloader_prefetch_factor dataset_num_proc ddp_bucket_cap_mb eval_accumulation_steps "
        "max_length precompute_ref_batch_size save_total_limit torch_empty_cache_steps"
    ),
    int | str | None: "pad_to_multiple_of",
    float: (
        "adam_beta1 adam_beta2 adam_epsilon beta discopop_tau eval_delay f_alpha_divergence_coef "
        "label_smoothing label_smoothing_factor learning_rate logging_steps max_grad_norm num_train_epochs "
        "ref_model_mixup_alpha save_steps warmup_steps weight_decay"
    ),
    float | None: "eval_steps ld_alpha neftune_noise_alpha router_aux_loss_coef",
    str: (
        "eval_strategy f_divergence_type hub_strategy length_column_name log_level log_level_replica "
        "logging_strategy lr_scheduler_type optim project save_strategy token_metrics "
        "train_sampling_strategy truncation_mode"
    ),
    str | None: (
        "dataloader_multiprocessing_context ddp_backend fsdp hub_model_id hub_revision hub_token "
        "metric_for_best_model optim_args output_dir pad_token resume_from_checkpoint run_name "
        "torch_compile_backend torch_compile_mode trackio_bucket_id trackio_space_id"
    ),
    str | list[str]: "debug",
    str | dict[str, Any] | None: (
        "accelerator_config activation_checkpointing_kwargs deepspeed fsdp_config "
        "gradient_checkpointing_kwargs lr_scheduler_kwargs model_init_kwargs"
    ),
    str | list[str] | None: "optim_target_modules report_to",
    str | Literal[False] | None: "trackio_static_space_id",
    list[float] | None: "loss_weights",
    list[str]: "include_for_metrics loss_type",
    list[str] | None: "label_names",
    dict[str, bool] | None: "liger_kernel_config",
    dict[str, Any] | None: "parallelism_config",
}

TYPES = {name: kind for kind, names in _BY_TYPE.items() for name in names.split()}

ARGUMENTS = Cli(
    short=True,
    keys={name: TYPES[name] for name in sorted(TYPES) if name not in _REFUSED},
    about={
        "learning_rate": "The largest learning rate of the schedule (default: 1e-4, with --full 1e-6).",
        "num_train_epochs": "Passes over the pairs (default: 3).",
        "per_device_train_batch_size": "Pairs per forward pass (default: 8).",
        "gradient_accumulation_steps": "Forward passes per optimiser step (default: 1).",
        "max_length": "Tokens of prompt and completion; none is no limit (default: 1024).",
        "warmup_steps": "Optimiser steps over which the learning rate rises, below 1 their share (default: 0).",
        "lr_scheduler_type": "How the learning rate falls after that (default: linear).",
        "save_steps": "Optimiser steps between two checkpoints (default: 100).",
        "logging_steps": "Optimiser steps between two lines of log.jsonl (default: 10, less in short trainings).",
        "report_to": "A tracker that is installed, such as tensorboard (default: none).",
        "seed": "Seed of the training (default: 42).",
    },
    names={
        "learning_rate": "learning_rate",
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size",
        "train_batch_size": "per_device_train_batch_size",
        "seed": "seed",
    },
    refused=_REFUSED,
)
"""The options of a training's table ``args``."""


# Argument -> the smallest and the largest value that mean something.
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, math.inf)),
    **dict.fromkeys(("precompute_ref_batch_size", "gradient_accumulation_steps"), (1, math.inf)),
    "max_length": (2, math.inf),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "dataloader_num_workers"), (0, math.inf)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, math.nextafter(1, 0))),
    **dict.fromkeys(("seed", "data_seed"), (0, MOST_SEED)),
}


def checked_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``PreferenceConfig``, each of a type that its field takes.

    The text ``none`` is None where the field takes that and no other text: TOML and a command line have no word for it.

    Raises:
        ValueError: an unknown name (with the nearest one), a wrong type, or an argument that the command sets.
    """
    found = {}
    for name, value in values.items():
        if name in _REFUSED:
            raise ValueError(f"args.{name} {_REFUSED[name]}")
        if name not in TYPES:
            raise ValueError(f"args.{name} is no argument of the trainer{did_you_mean(name, list(TYPES))}")
        if value == _NONE and _reads_none(name):
            value = None
        try:
            taken = TypeAdapter(TYPES[name]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].replace("Input should be", "must be")
            raise ValueError(f"args.{name} = {value!r}: {reason}") from None
        option = f" (--{next((short for short, key in ARGUMENTS.names.items() if key == name), name)})"
        low, high = _BOUNDS.get(name, (-math.inf, math.inf))
        if isinstance(value, bool) and type(taken) in (int, float):  # pydantic reads true as 1
            raise ValueError(f"args.{name}{option} = {value!r}: must be a number")
        if isinstance(taken, float) and not math.isfinite(taken):
            raise ValueError(f"args.{name}{option} = {value!r}: must be a finite number")
        if isinstance(taken, int | float) and not low <= taken <= high:
            bound = f"at least {low:g}" if taken < low else f"at most {high}" if high > 1 else "below 1"
            raise ValueError(f"args.{name}{option} = {value!r}: must be {bound}")
        if name == "num_train_epochs" and not taken > 0:
            raise ValueError(f"args.{name}{option} = {value!r}: must be greater than 0")
        found[name] = taken if isinstance(taken, int | float) else value  # 2 and 2.0 are one setting
    return found


def written_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as a file holds them, so that :func:`checked_arguments` reads the same."""
    return {name: _NONE if value is None and _reads_none(name) else value for name, value in values.items()}


def _reads_none(name: str) -> bool:
    """Whether the text ``none`` is None here; where any text is allowed, it is itself."""
    kinds = get_args(TYPES[name])
    return NoneType in kinds and str not in kinds
