"""What a resumed training depends on (:func:`training_identity`), and what cached columns of a reference depend on.

Everything that changes a number belongs in here. Names, paths and versions of a configuration do not. What changes last
digits only is reported at a resume and not refused: ``SavesCheckpoints._conditions``.

``madpo train`` continues if both identities are those of its first start: that of its step, and the one below.

- May not change: data and evaluation data (by content, wherever they are), the model (by content and by name), loss,
  adapter and every other setting; the pairs of a step; the arguments that :func:`decisive_arguments` keeps, such as
  the learning rate and the number of epochs; the device, the precision, the number of processes, and the versions of
  the libraries.
- May change: the arguments in ``_FREE`` and ``_FREE_PREFIXES``: how a step is split into micro-batches, how often it
  logs and saves, workers, recomputed activations; and threads, processor and machine.
- A trainer in a script has no step. It may also go on for longer, or with other evaluations: ``_CONTINUING``.

The step's identity (:mod:`madpo.runner.step`) must be known before a library is loaded and be the same on every
machine, so that plans, pages and finished results can be compared. The one below needs the model on its device. So the
two are computed apart. They share the versions of the libraries, the rule for arguments (:func:`decisive_arguments`),
and the search for the first difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig

from madpo.core.config import first_difference
from madpo.core.errors import ConfigError, DataError, shortened
from madpo.core.progress import say
from madpo.models.engine.logprobs import unwrapped
from madpo.runner.record import libraries
from madpo.training import checkpoints as disk

# Fields of a configuration that change no number of a forward pass. The weights carry their own dtypes.
_NO_NUMBERS = {
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("use_cache", "return_dict", "output_attentions", "_output_attentions", "output_hidden_states"),
    *("output_router_logits", "_post_init_done", "ignore_keys_at_rope_validation"),
    *("base_model_tp_plan", "base_model_pp_plan", "base_model_fsdp_plan"),
}
# Fields of an adapter's configuration that say where it came from, or how it is loaded.
_ADAPTER_ORIGIN = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}

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
    """Training arguments without those that bear on no result; of ``BATCH``, the product is for the caller to add."""
    return {k: v for k, v in arguments.items() if k not in _FREE and not k.startswith(_FREE_PREFIXES)}


# Arguments with which a training is continued on purpose: for longer, or with other evaluations.
_CONTINUING = {
    *("max_steps", "num_train_epochs", "metric_for_best_model", "greater_is_better", "batch_eval_metrics"),
    *("include_for_metrics", "bf16_full_eval", "fp16_full_eval"),
}


def model_settings(model: nn.Module) -> dict[str, Any]:
    """What decides a model's forward pass, next to its weights, as plain values.

    The class, the configuration without names and paths, the implementations of attention and experts, and the
    quantisation.
    """
    inner = unwrapped(model)
    return {"class": type(inner).__name__, **_configuration(getattr(inner, "config", None) or {})}


def adapter_settings(adapter: Any) -> dict[str, Any]:
    """An adapter's configuration without its origin; sets in a fixed order."""
    return {name: _plain(value) for name, value in adapter.to_dict().items() if name not in _ADAPTER_ORIGIN}


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that take part in a forward pass at this moment."""
    layers = (m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper))
    return sorted({name for layer in layers if not layer.disable_adapters for name in layer.active_adapters})


def _configuration(config: Any) -> dict[str, Any]:
    # `to_dict` leaves out the implementations of attention and experts.
    fields = config if isinstance(config, Mapping) else {"model_type": config.model_type, **vars(config)}
    return {str(name): _plain(value) for name, value in fields.items() if name not in _NO_NUMBERS}


def _plain(value: Any) -> Any:
    """The same for JSON; an object without plain values is its type, since its address changes with every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping | PreTrainedConfig):
        return _configuration(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, torch.dtype):
        return str(value)
    if hasattr(value, "to_dict"):
        return _configuration(value.to_dict())
    return f"{type(value).__module__}.{type(value).__qualname__}"


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the tensors that a forward pass uses at this moment, buffers included.

    An adapter that is switched off does not enter, so every run of a study has the same reference.

    Raises:
        ConfigError: DeepSpeed keeps the weights in parts, so that every model of a shape would look the same.
    """
    if any(getattr(p, "ds_numel", p.numel()) != p.numel() for p in model.parameters()):
        raise ConfigError(
            "DeepSpeed's ZeRO stage 3 keeps the weights in parts, so no process holds the reference; take stage 2, or "
            "give the columns ref_chosen_logps and ref_rejected_logps"
        )
    own = {
        name for module in model.modules() if isinstance(module, BaseTunerLayer) for name in module.adapter_layer_names
    }
    active = set(active_adapters(model))
    digest = hashlib.sha256()
    # Rotary frequencies are buffers that no state dict holds.
    for name, tensor in sorted({**dict(model.named_buffers()), **model.state_dict()}.items()):
        parts = name.split(".")
        if (own | {"modules_to_save"}) & set(parts) and not active & set(parts):
            continue
        plain = ".".join(part for part in parts if part not in ("base_model", "model", "base_layer", "original_module"))
        digest.update(f"{plain}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def reference_digest(model: nn.Module) -> str:
    """SHA-256 over everything of a model that its log-probabilities depend on: weights, settings, active adapters."""
    adapters, active = getattr(model, "peft_config", None) or {}, active_adapters(model)
    # PEFT can change the factor of an adapter without touching a weight or a configuration.
    factors = (getattr(module, "scaling", None) for module in model.modules() if isinstance(module, BaseTunerLayer))
    what = {
        "weights": weights_digest(model),
        "model": model_settings(model),
        "adapters": [adapter_settings(adapters[name]) for name in active if name in adapters],
        "scaling": [float(of[name]) for of in factors if isinstance(of, dict) for name in active if name in of],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and 64 values each of the weights that are not trained.

    A sample tells another model from this one, and costs nothing compared with a step.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}:{parameter.dtype}:{tuple(parameter.shape)}:{parameter.requires_grad}".encode())
        if not parameter.requires_grad and parameter.numel():
            flat = parameter.detach().reshape(-1)
            digest.update(_bytes(flat[:: max(1, flat.numel() // 64)][:64]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def rows_digest(dataset: Any, columns: Iterable[str]) -> str | None:
    """SHA-256 over the values of columns of a data set, in its order; None if it has none of them.

    Of a streamed data set only the names enter.
    """
    names = sorted(set(columns) & set(dataset.column_names or ()))
    if not names:
        return None
    digest = hashlib.sha256(json.dumps(names).encode())
    if not hasattr(dataset, "select_columns") or not hasattr(dataset, "__len__"):
        return digest.hexdigest()
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            column = table[name].combine_chunks()  # how a table is cut into chunks is no property of the data
            _hash_array(digest, column)
    return digest.hexdigest()


def _hash_array(digest: Any, array: pa.Array) -> None:
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        digest.update(np.asarray(pc.list_value_length(array).fill_null(-1)).astype(np.int64).tobytes())
        _hash_array(digest, array.flatten())
    elif array.null_count == 0 and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        wide = np.int64 if pa.types.is_integer(kind) else np.float64
        digest.update(np.asarray(array).astype(wide).tobytes())
    else:
        digest.update(json.dumps(array.to_pylist(), default=str).encode())


def check_identity(point: disk.Checkpoint, identity: Mapping[str, Any], *, continues: bool = False) -> None:
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
            say(f"Continuing {point.folder} with other settings: {', '.join(changed)}")
    if (differs := first_difference(before, now)) is not None:
        field, *values = differs
        old, found = (shortened(repr(value), 80) for value in values)
        raise DataError(
            f"{point.folder} belongs to another training: its {field} is {old}, and now it is {found}; set it back to "
            "continue, or remove the checkpoints to start again"
        )


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
    rows, groups = trainer.train_dataset, trainer.column_groups
    apart = {name for names in groups.values() for name in names}
    columns = set(rows.column_names or ())
    arguments = decisive_arguments(trainer.args.to_dict())
    adapters = getattr(trainer.model, "peft_config", None) or {}
    return {
        "data": _columns(trainer, rows, columns - apart),
        **{field: _columns(trainer, rows, names) for field, names in groups.items()},
        "evaluation data": _evaluation(trainer, trainer.eval_dataset),
        "configuration": json.loads(json.dumps(arguments, default=str)),
        "stage": trainer.stage_settings,
        "loss": trainer.loss.model_dump(mode="json") if hasattr(trainer, "loss") else None,
        "model": frozen_digest(trainer.model),
        "model configuration": model_settings(trainer.model),
        "adapter": {name: adapter_settings(adapter) for name, adapter in adapters.items()},
        "batch": trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps,
        "processes": trainer.accelerator.num_processes,
        "device": trainer.accelerator.device.type,
        "precision": str(trainer.accelerator.mixed_precision),
        "libraries": libraries(),
    }


def _evaluation(trainer: Any, dataset: Any) -> Any:
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _evaluation(trainer, part) for name, part in dataset.items()}
    return _columns(trainer, dataset, dataset.column_names or ())


def _columns(trainer: Any, dataset: Any, columns: Iterable[str]) -> str | None:
    """Columns by their values; those that the trainer computed by what they were computed with, not by last digits."""
    names, computed = set(columns), trainer.computed_columns(dataset)
    given = rows_digest(dataset, names - computed.keys())
    sources = dict.fromkeys(computed[name] for name in sorted(names & computed.keys()))
    return ", ".join([*([] if given is None else [given]), *sources]) or None
