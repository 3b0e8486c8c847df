"""Digests and settings that tell one data set or model from another: for checkpoints and for the reference cache.

Everything that changes a number belongs in here. Names, paths and versions of a configuration do not.
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

from madpo.core.errors import ConfigError
from madpo.models.engine.logprobs import unwrapped

# Fields of a configuration that change no number of a forward pass. The weights carry their own dtypes.
_NO_NUMBERS = {
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("use_cache", "return_dict", "output_attentions", "_output_attentions", "output_hidden_states"),
    *("output_router_logits", "_post_init_done", "ignore_keys_at_rope_validation"),
    *("base_model_tp_plan", "base_model_pp_plan", "base_model_fsdp_plan"),
}
# Fields of an adapter's configuration that say where it came from, or how it is loaded.
_ADAPTER_ORIGIN = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}


def model_settings(model: nn.Module) -> dict[str, Any]:
    """What decides a model's forward pass besides its weights, as plain values.

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
    adapters = getattr(model, "peft_config", None) or {}
    what = {
        "weights": weights_digest(model),
        "model": model_settings(model),
        "adapters": [adapter_settings(adapters[name]) for name in active_adapters(model) if name in adapters],
        "scaling": _scaling(model),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _scaling(model: nn.Module) -> list[float]:
    """Factors of the active adapters, which PEFT can change without touching a weight or a configuration."""
    active = active_adapters(model)
    scalings = (getattr(module, "scaling", None) for module in model.modules() if isinstance(module, BaseTunerLayer))
    return [float(found[name]) for found in scalings if isinstance(found, dict) for name in active if name in found]


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
