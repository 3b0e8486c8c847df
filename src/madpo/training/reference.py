"""Reference log-probabilities as columns, computed once and reused.

The cache's key covers everything that changes the numbers (the weights, the token ids after truncation, the order
of the rows and the batch size, since those decide the padding, and the precision), and nothing else: not the loss,
beta, the learning rate, the output folder or the number of processes. These take turns with the batches that one
process would compute, so that the columns have the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from madpo.errors import ConfigError, DataError
from madpo.logprobs import completion_logps
from madpo.models import cache_dir
from madpo.modes import evaluating
from madpo.processes import everyone, first
from madpo.progress import bar
from madpo.storage import storage_errors, write_atomically
from madpo.training.columns import REFERENCE_COLUMNS

VERSION = 3
"""Bumped when the engine's numbers change."""


def weights_digest(model: nn.Module, adapter: str | None = None) -> str:
    """SHA-256 over the weights that a forward pass uses: the base model's, and those of the adapter named.

    A fresh adapter that is switched off does not enter, so every run of a study has the same reference.

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
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        parts = name.split(".")
        if (own | {"modules_to_save"}) & set(parts) and (adapter is None or adapter not in parts):
            continue
        plain = ".".join(part for part in parts if part not in ("base_model", "model", "base_layer", "original_module"))
        digest.update(f"{plain}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached_reference_logps(
    model: nn.Module,
    adapter: str | None,
    dataset: Dataset,
    collator: Any,
    accelerator: Any,
    batch_size: int,
    *,
    description: str,
) -> dict[str, np.ndarray]:
    """``ref_chosen_logps`` and ``ref_rejected_logps`` of a tokenised data set, nats, summed, float64.

    Args:
        model: the reference, with the adapter that belongs to it active and no others.
        adapter: the name of that adapter; None is the base model.
        collator: gives the padded batches of the training (its truncation counts into the key).
        batch_size: pairs per batch.

    Raises:
        ConfigError: the processes of the launch hold different weights, or parts of them.
        DataError: the cached columns do not agree with the model on a sample of rows.
    """
    weights = weights_digest(model, adapter)
    if len(set(everyone(weights))) > 1:
        raise ConfigError(
            "the processes hold different weights, so they have no common reference; load the whole model on each "
            "(fsdp_cpu_ram_efficient_loading: false), or give the columns ref_chosen_logps and ref_rejected_logps"
        )
    path = _path(weights, dataset, collator, accelerator, batch_size)
    columns: dict[str, np.ndarray] = {}

    def look() -> bool:
        if path.exists():
            columns.update(_read(path))
            _verify(model, dataset, collator, accelerator, batch_size, columns, path)
        return bool(columns)

    if first(look):  # on the leading process: the others may not see its disk
        return _everywhere(columns, len(dataset), accelerator)
    columns = _compute(model, dataset, collator, accelerator, batch_size, description)
    named = "pair_id" in dataset.column_names
    refuse_not_finite(columns, dataset["pair_id"] if named else [f"in row {row}" for row in range(len(dataset))])
    if accelerator.is_main_process:
        with storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(columns))
    return columns


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise DataError(f"{path} cannot be read ({error}); delete the file") from error


def refuse_not_finite(
    columns: Mapping[str, np.ndarray], names: Sequence[Any], model: str = "the reference model"
) -> None:
    """Refuse a model's numbers that are none, before they are kept.

    Raises:
        DataError: with the first pair, by its name.
    """
    for column, values in columns.items():
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(
                f"{column} of pair {names[row]} is {values[row]}, so {model} overflows or has diverged; run it in "
                "bfloat16 or float32, or train it again with a lower learning rate"
            )


def _path(weights: str, dataset: Dataset, collator: Any, accelerator: Any, batch_size: int) -> Path:
    digest = hashlib.sha256()
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        for ids in dataset[name]:
            digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
    what = {
        "version": VERSION,
        "weights": weights,
        "ids": digest.hexdigest(),
        "max_length": collator.max_length,
        "truncation_mode": collator.truncation_mode,
        "batch_size": batch_size,
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / "columns" / f"reference-{key[:32]}.safetensors"


@torch.no_grad()
def _batch_logps(model: nn.Module, batch: dict[str, Any], accelerator: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = {name: batch[name].to(accelerator.device) for name in ("input_ids", "attention_mask", "completion_mask")}
    with evaluating(model), accelerator.autocast():
        logps = completion_logps(model, **rows, pairs=True).logps
    chosen, rejected = logps.double().chunk(2)
    return chosen, rejected


def _compute(
    model: nn.Module, dataset: Dataset, collator: Any, accelerator: Any, batch_size: int, description: str
) -> dict[str, np.ndarray]:
    rows = dataset.select_columns(_present(dataset))
    count, starts = accelerator.num_processes, range(0, len(rows), batch_size)
    rounds = -(-len(starts) // count)
    found = torch.zeros(2, rounds, batch_size, dtype=torch.float64)
    model.to(accelerator.device)
    with bar(f"Reference log-probabilities ({description})", len(rows)) as advance:
        for turn, start in enumerate(starts[accelerator.process_index :: count]):
            batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
            pair = torch.stack(_batch_logps(model, batch, accelerator))
            found[:, turn, : pair.shape[1]] = pair.cpu()
            advance(min(count * batch_size, len(rows) - start))
    if count > 1:
        gathered = accelerator.gather(found[None].to(accelerator.device)).cpu()
        found = gathered.permute(1, 2, 0, 3)  # process 0's batch of a round, then that of process 1, ...
    table = found.reshape(2, -1)[:, : len(rows)].contiguous().numpy()
    return dict(zip(REFERENCE_COLUMNS, table, strict=True))


def _everywhere(columns: dict[str, np.ndarray], rows: int, accelerator: Any) -> dict[str, np.ndarray]:
    """The leading process's columns, on every process."""
    if accelerator.num_processes == 1:
        return columns
    table = torch.zeros(2, rows, dtype=torch.float64)
    if accelerator.is_main_process:
        table = torch.from_numpy(np.stack([columns[name] for name in REFERENCE_COLUMNS]))
    shared: Tensor = broadcast(table.to(accelerator.device))
    return dict(zip(REFERENCE_COLUMNS, shared.cpu().numpy(), strict=True))


def _present(dataset: Dataset) -> list[str]:
    kept = ("prompt_ids", "chosen_ids", "rejected_ids", "reward_margin", "chosen_score", "rejected_score", "weight")
    return [name for name in kept if name in dataset.column_names]


def _verify(
    model: nn.Module,
    dataset: Dataset,
    collator: Any,
    accelerator: Any,
    batch_size: int,
    columns: dict[str, np.ndarray],
    path: Path,
) -> None:
    """Recompute one batch: a damaged file, or an engine that changed, must not pass."""
    if columns.keys() != set(REFERENCE_COLUMNS):
        raise DataError(
            f"{path} holds {', '.join(sorted(columns)) or 'nothing'}, expected {REFERENCE_COLUMNS}; delete the file"
        )
    if len(columns[REFERENCE_COLUMNS[0]]) != len(dataset):
        raise DataError(
            f"{path} holds {len(columns[REFERENCE_COLUMNS[0]])} rows, expected {len(dataset)}; delete the file"
        )
    batches = (len(dataset) + batch_size - 1) // batch_size
    start = (int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % batches) * batch_size
    rows = dataset.select_columns(_present(dataset)).select(range(start, min(start + batch_size, len(dataset))))
    model.to(accelerator.device)
    found = _batch_logps(model, collator(list(rows)), accelerator)
    tolerance = 0.5 if accelerator.mixed_precision != "no" or _narrow(model) else 1e-3
    for name, values in zip(REFERENCE_COLUMNS, found, strict=True):
        stored = torch.from_numpy(columns[name][start : start + batch_size])
        gap = float((values.cpu() - stored).abs().max())
        if not gap <= tolerance:
            raise DataError(f"{path} disagrees with the model by {gap:.3g} nats in {name}; delete the file")


def _narrow(model: nn.Module) -> bool:
    """Whether some weights are narrower than float32, so that products are rounded without autocast, too."""
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())
