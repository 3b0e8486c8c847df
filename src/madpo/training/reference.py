"""Reference log-probabilities as columns, computed once and reused.

The cache's key covers everything that changes a bit of the numbers: the weights and the settings of the reference
(:func:`madpo.training.digests.reference_digest`), the token ids after truncation, the order of the rows and the batch
size (which decide the padding), the precision, the versions of the libraries, the processor and its threads. It covers
nothing else: not the loss, beta, the learning rate, the output folder or the number of processes. The processes take
turns with the batches that one process would compute, so that the columns have the same bytes.

So one batch that is computed again must give the same bits. Where it does not, the columns are computed again.

The same pass gives the features of a probe (:mod:`madpo.models.engine.features`) where they are asked for. They are
cached in a file of their own, under the same key plus the layers and the pooling. The leading process keeps them.

The cache is bounded (:func:`madpo.models.packaged.cache_limit`): files that were used longest ago go first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast
from datasets import Dataset
from torch import Tensor, nn

from madpo.core.columns import ID_COLUMNS, REFERENCE_COLUMNS
from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.core.feature_file import FeatureFile, FeatureWriter
from madpo.core.processes import all_gather_object, on_main_process
from madpo.core.progress import bar, say
from madpo.core.storage import remove_oldest
from madpo.models.engine.features import POOLING, feature_width
from madpo.models.engine.logprobs import completion_logps, unwrapped
from madpo.models.modes import evaluating
from madpo.models.packaged import cache_dir, cache_errors, cache_limit
from madpo.runner.record import conditions, libraries
from madpo.training.columns import DataCollatorForPreference, PreferenceCollator
from madpo.training.digests import reference_digest

VERSION = 5
"""Bumped when the engine's numbers or the files change."""
FEATURES_VERSION = 1
"""Bumped when features change."""
_COLUMNS = (1, REFERENCE_COLUMNS, "<f8")


class Reference(NamedTuple):
    """What the reference says of a data set.

    Attributes:
        columns: ``ref_chosen_logps`` and ``ref_rejected_logps``, nats, summed, float64.
        source: the digest of the model that they belong to.
        features: of both sides of the pairs, on the leading process where layers were asked for.
    """

    columns: dict[str, np.ndarray]
    source: str
    features: FeatureFile | None


class _Pass(NamedTuple):
    """A reference that reads a data set once."""

    model: nn.Module
    dataset: Dataset
    collator: PreferenceCollator
    accelerator: Any
    batch_size: int

    def batches(self, starts: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The batches that begin at these rows."""
        for start in starts:
            yield self.collator(list(self.dataset.select(range(start, min(start + self.batch_size, self.rows)))))

    @property
    def rows(self) -> int:
        return len(self.dataset)

    @property
    def starts(self) -> range:
        return range(0, self.rows, self.batch_size)


def cached_reference(
    model: nn.Module,
    dataset: Dataset,
    collator: PreferenceCollator,
    accelerator: Any,
    batch_size: int,
    *,
    description: str,
    layers: Sequence[int] = (),
) -> Reference:
    """The reference columns of a tokenised data set, and features of its responses, from the cache or computed now.

    Args:
        model: the reference, with the adapters that belong to it active and no others.
        batch_size: pairs per batch.
        layers: whose states become features; none by default.

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
    asked = _Pass(model, dataset, collator, accelerator, batch_size)
    path = _path(digest, asked)
    width = feature_width(unwrapped(model), layers) if layers else 0
    what = hashlib.sha256(json.dumps([path.name, FEATURES_VERSION, POOLING, list(layers)]).encode()).hexdigest()
    feature_path = path.with_name(f"features-{what[:32]}.safetensors")
    cached: list[tuple[dict[str, np.ndarray], FeatureFile | None]] = []

    def look() -> bool:
        if (found := _from_cache(path, feature_path if layers else None, asked, width)) is not None:
            cached.append(found)
        return bool(cached)

    if on_main_process(look):  # on the leading process: the others may not see its disk
        columns, features = cached[0] if cached else ({}, None)
        return Reference(_everywhere(columns, asked.rows, accelerator), digest, features)
    leads = accelerator.is_main_process
    named = "pair_id" in dataset.column_names
    names = dataset["pair_id"] if named else [f"in row {row}" for row in range(asked.rows)]
    # Both files are opened first: a cache that cannot be written is refused before the work, not after it.
    with cache_errors(path.parent), ExitStack() as opened:
        kept = opened.enter_context(FeatureWriter(path, asked.rows, *_COLUMNS)) if leads else None
        writer = opened.enter_context(FeatureWriter(feature_path, asked.rows, width)) if layers and leads else None
        columns = _compute(asked, description, layers, width, writer)
        refuse_not_finite(columns, names)
        if kept is not None:
            kept.write(0, *(columns[name][:, None] for name in REFERENCE_COLUMNS))
    features = None if writer is None else FeatureFile.read(feature_path, asked.rows, width)
    if leads:
        with cache_errors(path.parent):
            if gone := remove_oldest(path.parent, cache_limit(), (path, feature_path)):
                say(
                    f"{path.parent} keeps at most {cache_limit() / 1e9:g} GB (MADPO_CACHE_GB): {gone} files that were "
                    "used longest ago are removed."
                )
    return Reference(columns, digest, features)


def _from_cache(
    path: Path, feature_path: Path | None, asked: _Pass, width: int
) -> tuple[dict[str, np.ndarray], FeatureFile | None] | None:
    """Columns and features of the cache's files; None where one is missing, damaged, or not what the model gives now.

    Args:
        feature_path: None where no features are asked for.
    """
    paths = [used for used in (path, feature_path) if used is not None]
    if not all(used.exists() for used in paths):
        return None
    try:
        stored = FeatureFile.read(path, asked.rows, *_COLUMNS)
        sides = zip(REFERENCE_COLUMNS, (stored.chosen, stored.rejected), strict=True)
        columns = {name: np.array(side)[:, 0] for name, side in sides}
        features = None if feature_path is None else FeatureFile.read(feature_path, asked.rows, width)
        for used in paths:
            with suppress(OSError):  # a cache that cannot be written
                os.utime(used)
        _verify(asked, columns, path)
    except StorageError as error:
        say(f"{error}; the reference is computed again")
        return None
    return columns, features


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


def _path(model: str, asked: _Pass) -> Path:
    what = {
        "version": VERSION,
        "model": model,
        "batches": _batches_digest(asked),
        "precision": asked.accelerator.mixed_precision,
        "environment": _environment(asked.accelerator.device.type),
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / "columns" / f"reference-{key[:32]}.safetensors"


def _batches_digest(asked: _Pass) -> str:
    """SHA-256 of what the model reads: of TRL's collator, its input and its settings; of any other, its batches."""
    digest = hashlib.sha256(f"{asked.batch_size}".encode())
    collator: Any = asked.collator.collate
    if type(collator) is DataCollatorForPreference:
        settings = (collator.max_length, collator.truncation_mode, collator.pad_to_multiple_of, collator.pad_token_id)
        digest.update(repr(settings).encode())
        for name in ID_COLUMNS:
            for ids in asked.dataset[name]:
                digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
        return digest.hexdigest()
    for batch in asked.batches(asked.starts):
        for name in _READ:
            digest.update(repr(tuple(batch[name].shape)).encode() + batch[name].to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


_READ = ("input_ids", "attention_mask", "completion_mask")


def _environment(device: str) -> dict[str, Any]:
    """What decides the last digits of equal computations: libraries, kernels, and how a sum is split over threads."""
    found: dict[str, Any] = {**libraries(), "kind": device}
    if device == "cuda":
        return {**found, "device": torch.cuda.get_device_name(), "fp32": torch.backends.cuda.matmul.fp32_precision}
    kernels = {name: conditions()[name] for name in ("instruction_set", "processor")}
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return {**found, **kernels, "threads": torch.get_num_threads(), "fp32": precision}


@torch.no_grad()
def batch_logps(
    model: nn.Module, batch: dict[str, Any], accelerator: Any, layers: Sequence[int] = ()
) -> tuple[Tensor, ...]:
    """Summed log-probabilities of the chosen and the rejected completions of a batch, nats, float64.

    With layers, also their features, float32: those of the chosen ones, then those of the rejected ones.
    """
    rows = {name: batch[name].to(accelerator.device) for name in _READ}
    with evaluating(model), accelerator.autocast():
        scores = completion_logps(model, **rows, pairs=True, features=layers)
    found = scores.logps.double().chunk(2)
    return found if scores.features is None else (*found, scores.features.float())


def _compute(
    asked: _Pass, description: str, layers: Sequence[int], width: int, writer: FeatureWriter | None
) -> dict[str, np.ndarray]:
    accelerator, size = asked.accelerator, asked.batch_size
    count = accelerator.num_processes
    found = np.zeros((2, asked.rows))
    asked.model.to(accelerator.device)
    with bar(f"Reference log-probabilities ({description})", asked.rows) as advance:
        for first in range(0, len(asked.starts), count):  # a round: a batch for each process, in their order
            turn = asked.starts[first : first + count]
            values = torch.zeros(1, 2, size, 1 + width, dtype=torch.float64)  # a log-probability, then features
            for batch in asked.batches(turn[accelerator.process_index :][:1]):
                chosen, rejected, *features = batch_logps(
                    asked.model, batch, accelerator, *([layers] if layers else [])
                )
                values[0, :, : len(chosen), 0] = torch.stack([chosen, rejected])
                if layers:
                    values[0, :, : len(chosen), 1:] = features[0].view(2, len(chosen), width)
            every = values if count == 1 else accelerator.gather(values.to(accelerator.device)).cpu()
            for start, block in zip(turn, every.numpy(), strict=False):  # in the last round some have none
                block = block[:, : asked.rows - start]
                found[:, start : start + size] = block[..., 0]
                if writer is not None:
                    writer.write(start, *block[..., 1:].astype(np.float32))
            advance(min(count * size, asked.rows - turn[0]))
    return dict(zip(REFERENCE_COLUMNS, found, strict=True))


def _everywhere(columns: dict[str, np.ndarray], rows: int, accelerator: Any) -> dict[str, np.ndarray]:
    """The leading process's columns, on every process."""
    if accelerator.num_processes == 1:
        return columns
    table = torch.zeros(2, rows, dtype=torch.float64)
    if accelerator.is_main_process:
        table = torch.from_numpy(np.stack([columns[name] for name in REFERENCE_COLUMNS]))
    shared: Tensor = broadcast(table.to(accelerator.device))
    return dict(zip(REFERENCE_COLUMNS, shared.cpu().numpy(), strict=True))


def _verify(asked: _Pass, columns: dict[str, np.ndarray], path: Path) -> None:
    """Compute one batch again: an engine that changed must not pass.

    A difference is allowed only where the model itself does not repeat its bits, as kernels with atomic additions do.
    """
    start = asked.starts[int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % len(asked.starts)]
    (batch,) = asked.batches([start])
    asked.model.to(asked.accelerator.device)

    def computed() -> Tensor:
        return torch.stack(batch_logps(asked.model, batch, asked.accelerator)).cpu()

    stored = np.stack([columns[name][start : start + asked.batch_size] for name in REFERENCE_COLUMNS])
    found = computed()
    gap = float((found - torch.from_numpy(stored)).abs().max())
    if gap > 0 and not gap <= 4 * float((found - computed()).abs().max()):
        raise StorageError(f"{path} disagrees with the model by {gap:.3g} nats")
