"""Reference log-probabilities as columns, computed once and reused.

The cache's key covers everything that changes a bit of the numbers: the weights and the settings of the reference
(:func:`madpo.training.digests.reference_digest`), the token ids after truncation, the order of the rows and the batch
size (which decide the padding), the precision, the versions of the libraries, the processor and its threads. It covers
nothing else: not the loss, beta, the learning rate, the output folder or the number of processes. The processes take
turns with the batches that one process would compute, so that the columns have the same bytes.

So one batch that is computed again must give the same bits. Where it does not, the columns are computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from madpo.core.errors import ConfigError, DataError
from madpo.core.processes import all_gather_object, on_main_process
from madpo.core.progress import bar, say
from madpo.core.storage import storage_errors, write_atomically
from madpo.models.engine.logprobs import completion_logps
from madpo.models.load import cache_dir
from madpo.models.modes import evaluating
from madpo.runner.record import conditions, libraries
from madpo.training.columns import ID_COLUMNS, REFERENCE_COLUMNS, PreferenceCollator
from madpo.training.digests import reference_digest

VERSION = 4
"""Bumped when the engine's numbers change."""


def cached_reference_logps(
    model: nn.Module, dataset: Dataset, collator: Any, accelerator: Any, batch_size: int, *, description: str
) -> tuple[dict[str, np.ndarray], str]:
    """``ref_chosen_logps`` and ``ref_rejected_logps`` of a tokenised data set, nats, summed, float64.

    Args:
        model: the reference, with the adapters that belong to it active and no others.
        batch_size: pairs per batch.

    Returns:
        The columns, and the digest of the model that they belong to.

    Raises:
        ConfigError: the processes of the launch hold different weights, or parts of them.
        DataError: a log-probability is not finite.
    """
    digest = reference_digest(model)
    if len(set(all_gather_object(digest))) > 1:
        raise ConfigError(
            "the processes hold different weights, so they have no common reference; load the whole model on each "
            "(fsdp_cpu_ram_efficient_loading: false), or give the columns ref_chosen_logps and ref_rejected_logps"
        )
    path = _path(digest, dataset, collator, accelerator, batch_size)
    columns: dict[str, np.ndarray] = {}

    def look() -> bool:
        if path.exists():
            try:
                columns.update(_read(path, len(dataset)))
                _verify(model, dataset, collator, accelerator, batch_size, columns, path)
            except _UnusableCache as error:
                columns.clear()
                say(f"{path} {error}; the reference is computed again")
        return bool(columns)

    if on_main_process(look):  # on the leading process: the others may not see its disk
        return _everywhere(columns, len(dataset), accelerator), digest
    columns = _compute(model, dataset, collator, accelerator, batch_size, description)
    named = "pair_id" in dataset.column_names
    refuse_not_finite(columns, dataset["pair_id"] if named else [f"in row {row}" for row in range(len(dataset))])
    if accelerator.is_main_process:
        with storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(columns, metadata={"sha256": _checksum(columns)}))
    return columns, digest


class _UnusableCache(Exception):
    """A cached file that must not be used; the text says why."""


def _read(path: Path, rows: int) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            checksum = (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise _UnusableCache(f"cannot be read ({error})") from error
    if columns.keys() != set(REFERENCE_COLUMNS):
        raise _UnusableCache(f"holds the columns {', '.join(sorted(columns)) or 'nothing'}")
    for name, values in columns.items():
        if values.shape != (rows,):
            raise _UnusableCache(f"holds {name} of shape {values.shape} for {rows} pairs")
    if checksum != _checksum(columns):
        raise _UnusableCache("has changed since it was written (SHA-256)")
    return columns


def _checksum(columns: Mapping[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(columns[name].tobytes() for name in REFERENCE_COLUMNS)).hexdigest()


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


def _path(model: str, dataset: Dataset, collator: Any, accelerator: Any, batch_size: int) -> Path:
    what = {
        "version": VERSION,
        "model": model,
        "batches": _batches_digest(dataset, collator, batch_size),
        "precision": accelerator.mixed_precision,
        "environment": _environment(accelerator.device.type),
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / "columns" / f"reference-{key[:32]}.safetensors"


def _batches_digest(dataset: Dataset, collator: Any, batch_size: int) -> str:
    """SHA-256 of what the model reads: of our own collator, its input and its settings; of any other, its batches."""
    digest = hashlib.sha256(f"{batch_size}".encode())
    if type(collator) is PreferenceCollator:
        settings = (collator.max_length, collator.truncation_mode, collator.pad_to_multiple_of, collator.pad_token_id)
        digest.update(repr(settings).encode())
        for name in ID_COLUMNS:
            for ids in dataset[name]:
                digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
        return digest.hexdigest()
    for batch in _batches(dataset, collator, range(0, len(dataset), batch_size), batch_size):
        for name in _READ:
            digest.update(repr(tuple(batch[name].shape)).encode() + batch[name].to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


_READ = ("input_ids", "attention_mask", "completion_mask")


def _batches(dataset: Dataset, collator: Any, starts: Sequence[int], size: int) -> Iterator[dict[str, Any]]:
    for start in starts:
        yield collator(list(dataset.select(range(start, min(start + size, len(dataset))))))


def _environment(device: str) -> dict[str, Any]:
    """What decides the last digits of equal computations: libraries, kernels, and how a sum is split over threads."""
    found: dict[str, Any] = {**libraries(), "kind": device}
    if device == "cuda":
        return {**found, "device": torch.cuda.get_device_name(), "fp32": torch.backends.cuda.matmul.fp32_precision}
    kernels = {name: conditions()[name] for name in ("instruction_set", "processor")}
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return {**found, **kernels, "threads": torch.get_num_threads(), "fp32": precision}


@torch.no_grad()
def batch_logps(model: nn.Module, batch: dict[str, Any], accelerator: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probabilities of the chosen and the rejected completions of a batch, nats, float64."""
    rows = {name: batch[name].to(accelerator.device) for name in _READ}
    with evaluating(model), accelerator.autocast():
        logps = completion_logps(model, **rows, pairs=True).logps
    chosen, rejected = logps.double().chunk(2)
    return chosen, rejected


def _compute(
    model: nn.Module, dataset: Dataset, collator: Any, accelerator: Any, batch_size: int, description: str
) -> dict[str, np.ndarray]:
    count, starts = accelerator.num_processes, range(0, len(dataset), batch_size)
    rounds = -(-len(starts) // count)
    found = torch.zeros(2, rounds, batch_size, dtype=torch.float64)
    model.to(accelerator.device)
    with bar(f"Reference log-probabilities ({description})", len(dataset)) as advance:
        own = starts[accelerator.process_index :: count]
        for turn, batch in enumerate(_batches(dataset, collator, own, batch_size)):
            pair = torch.stack(batch_logps(model, batch, accelerator))
            found[:, turn, : pair.shape[1]] = pair.cpu()
            advance(min(count * batch_size, len(dataset) - own[turn]))
    if count > 1:
        gathered = accelerator.gather(found[None].to(accelerator.device)).cpu()
        found = gathered.permute(1, 2, 0, 3)  # process 0's batch of a round, then that of process 1, ...
    table = found.reshape(2, -1)[:, : len(dataset)].contiguous().numpy()
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


def _verify(
    model: nn.Module,
    dataset: Dataset,
    collator: Any,
    accelerator: Any,
    batch_size: int,
    columns: dict[str, np.ndarray],
    path: Path,
) -> None:
    """Compute one batch again: an engine that changed must not pass.

    A difference is allowed only where the model itself does not repeat its bits, as kernels with atomic additions do.
    """
    batches = (len(dataset) + batch_size - 1) // batch_size
    start = (int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % batches) * batch_size
    (batch,) = _batches(dataset, collator, [start], batch_size)
    model.to(accelerator.device)

    def computed() -> Tensor:
        return torch.stack(batch_logps(model, batch, accelerator)).cpu()

    stored = torch.from_numpy(np.stack([columns[name][start : start + batch_size] for name in REFERENCE_COLUMNS]))
    found = computed()
    gap = float((found - stored).abs().max())
    if gap > 0 and not gap <= 4 * float((found - computed()).abs().max()):
        raise _UnusableCache(f"disagrees with the model by {gap:.3g} nats")
