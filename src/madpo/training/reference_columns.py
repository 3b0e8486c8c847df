"""The trainer's part that gives data sets the columns of the reference, and keeps those that a training began with.

Where a loss reads ``reward_margin`` and the data have none, a probe of the reference's hidden states gives it
(:mod:`madpo.rewards.probe`), from the pass that computes the reference log-probabilities.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import use_adapter

from madpo.core.columns import MARGIN, REFERENCE_COLUMNS
from madpo.core.errors import DataError
from madpo.core.feature_file import FeatureFile
from madpo.core.processes import on_main_process
from madpo.core.progress import say_once
from madpo.data.conversation import Conversation
from madpo.data.folds import prompt_keys
from madpo.data.messages import Text, content_of
from madpo.data.raw import COLUMNS, without_filled_nulls
from madpo.models.engine.dependence import without_numbers
from madpo.models.engine.features import feature_layers
from madpo.models.engine.logprobs import embedding_rows, unwrapped
from madpo.rewards.probe import FittedProbe, fit_probe
from madpo.training.columns import PreferenceCollator, check_tokens
from madpo.training.digests import reference_digest
from madpo.training.reference import batch_logps, cached_reference
from madpo.training.reference_adapter import COPY, frozen_stay, refuse_shared, switches_off
from madpo.training.resume import ExactResume


class ReferenceColumns(ExactResume):
    """Mixin: ``ref_chosen_logps``, ``ref_rejected_logps`` and ``reward_margin`` of every data set that lacks them.

    They are computed once, before the first step; with each batch where the data is streamed, or where the reference
    follows the policy.
    """

    loss: Any
    ref_model: Any
    data_collator: Any
    train_dataset: Any
    _needs: tuple[str, ...]
    _reference_dropped = False
    _synchronised = False
    """Whether the reference follows the policy (TR-DPO)."""
    _live: str | None = None
    """Digest of the first reference, where log-probabilities are computed with each batch."""
    _sources: dict[str, dict[str, str]]
    """Fingerprint of a data set -> computed column -> what it was computed with."""
    probe: FittedProbe | None = None
    """The probe of the training pairs, on the leading process, where ``reward_margin`` was missing."""
    probe_seed = 0
    """Seed of its folds: margins do not depend on the training's seed."""

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Reference columns and margins: as given, from the cache, or computed now."""
        if not isinstance(self.data_collator, PreferenceCollator):
            known = embedding_rows(unwrapped(self.model))
            self.data_collator = PreferenceCollator(self.data_collator, self._needs, known)
        collator = self.data_collator
        if collator.embedding_rows is not None:
            check_tokens(dataset, name, collator.embedding_rows)
        given = {*REFERENCE_COLUMNS} & {*get_dataset_column_names(dataset)}
        if self._synchronised or len(given) == 1:  # columns of the first step; one without the other says nothing
            dataset = dataset.remove_columns(sorted(given))
        if self._synchronised:
            self._keep_reference(name)
        present, streamed = set(get_dataset_column_names(dataset)), isinstance(dataset, IterableDataset)
        missing = {MARGIN} & set(self._needs) - present if not streamed else set()
        if self.loss.needs_reference and not set(REFERENCE_COLUMNS) <= present:
            if streamed:
                self._keep_reference(name)
            if self._live is None or not (self._synchronised or streamed):
                missing |= set(REFERENCE_COLUMNS)
        compared = self.loss.needs_reference and len(given) == 2 and not (streamed or self._synchronised)
        gone = self.state.global_step > 0 and self.ref_model is None  # or is trained
        compared = compared and not (self.sharded or gone or without_numbers(self.model))
        if not (missing or compared):
            return dataset
        rows = self._remove_unused_columns(dataset, name)
        if compared:
            self._compare_given(rows, name, batch_size)
        if not missing:
            return dataset
        with self._reference(name) as model:
            layers = feature_layers(unwrapped(model)) if MARGIN in missing else ()
            found = cached_reference(
                model,
                rows,
                replace(collator, columns=()),
                self.accelerator,
                batch_size,
                description=name,
                layers=layers,
            )
        self._set_reference_aside()
        columns = {column: found.columns[column] for column in REFERENCE_COLUMNS if column in missing}
        sources = dict.fromkeys(columns, f"reference {found.source}")
        if MARGIN in missing:
            columns[MARGIN] = np.array(on_main_process(lambda: self._margins(name, dataset, found.features)))
            sources[MARGIN] = f"probe of layers {layers} of {found.source}, seed {self.probe_seed}"
        for column, values in columns.items():
            dataset = dataset.add_column(column, values)
        self._sources[dataset._fingerprint] = sources
        return dataset

    def _compare_given(self, rows: Dataset, name: str, batch_size: int) -> None:
        """Say so where given log-probabilities are not those of the reference, by the first batch."""
        batch = replace(self.data_collator, columns=())(list(rows.select(range(min(batch_size, len(rows))))))
        with self._reference(name) as model:
            model.to(self.accelerator.device)
            own = torch.cat(batch_logps(model, batch, self.accelerator)).cpu()
        apart = (own - torch.cat([batch[column] for column in REFERENCE_COLUMNS])).abs().mean()
        if not apart <= 1 + 0.05 * own.abs().mean():
            say_once(
                f"{name}: its {' and '.join(REFERENCE_COLUMNS)} are {float(apart):.3g} nats apart from those of this "
                "model, on average, so they are of another reference or of other tokens; remove these columns unless "
                "that is meant."
            )

    def _keep_reference(self, name: str) -> None:
        """Keep the reference for as long as the trainer: a copy of the model where more than an adapter is trained."""
        if self._live is not None:
            return
        if self.sharded:
            raise DataError(
                f"{name} is streamed or its reference moves, and none is kept where DeepSpeed or FSDP splits the "
                f"model; add {' and '.join(REFERENCE_COLUMNS)}, load it without streaming, or leave out sync_ref_model"
            )
        with self._reference(name) as model:
            if self.ref_model is None and not switches_off(model):
                self.ref_model = copy.deepcopy(model).requires_grad_(False)
                inner = unwrapped(self.ref_model)
                vars(inner).pop("forward", None)  # TRL's own, which reads the model that it was made for
                vars(inner).pop("_madpo_completion_head", None)
            self._live = reference_digest(model)

    def _with_reference(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with its reference columns, computed now where the data has none."""
        if self._live is None or not self.loss.needs_reference or REFERENCE_COLUMNS[0] in batch:
            return batch
        with self._reference("a batch") as model:
            model.to(self.accelerator.device)
            columns = batch_logps(model, batch, self.accelerator)
        return batch | dict(zip(REFERENCE_COLUMNS, columns, strict=True))

    def _margins(self, name: str, dataset: Dataset, features: FeatureFile | None) -> list[float]:
        """Margins by the probe: out of fold for the training pairs, by the frozen one for others."""
        assert features is not None
        if self.probe is not None:
            weights = self.probe.weights
            margins: list[float] = (weights.rewards(features.chosen) - weights.rewards(features.rejected)).tolist()
            return margins
        prompts = _prompt_keys(dataset)
        self.probe = fit_probe(features.chosen, features.rejected, prompts, seed=self.probe_seed, name=name)
        say_once(  # auto trains twice on the same pairs
            f"The pairs have no {MARGIN!r}: a probe of the reference's hidden states gives it, out of fold "
            f"({self.probe.report.brief()})."
        )
        found: list[float] = self.probe.margins.tolist()
        return found

    @contextmanager
    def _reference(self, name: str) -> Iterator[nn.Module]:
        """The reference: the model as passed, without the adapter that is about to be trained."""
        inner = self.accelerator.unwrap_model(self.model)
        adapted = getattr(inner, "peft_config", None) is not None
        if self.ref_model is not None:
            refuse_shared(inner, self.ref_model)
            yield self.ref_model
        elif self._reference_dropped:
            raise DataError(
                f"{name} lacks {' and '.join(REFERENCE_COLUMNS)}, and ref_model is not kept where DeepSpeed or FSDP "
                "splits it; add these columns, or give the data as eval_dataset when the trainer is made"
            )
        elif self.state.global_step > 0 and not switches_off(inner):
            more = " (weights next to the adapter have trained)" if adapted else ""
            raise DataError(
                f"{name} lacks {' and '.join(REFERENCE_COLUMNS)}, and their reference, the model before its training, "
                f"is gone{more}; add these columns, or make the trainer with ref_model or with the data as eval_dataset"
            )
        elif not adapted:
            yield self.model
        else:  # TRL keeps a frozen copy, "ref", of an adapter that the model came with
            with frozen_stay(inner), use_adapter(inner, adapter_name=COPY if COPY in inner.peft_config else None):
                yield self.model

    def _set_reference_aside(self) -> None:
        """Free the accelerator of a reference that only later data sets would ask."""
        reference = self.ref_model
        if reference is None or self.sharded or self._live is not None:
            return
        if getattr(reference, "hf_quantizer", None) or getattr(reference, "hf_device_map", None):
            return  # bound to where it was loaded
        reference.to("cpu")

    def _reference_tensors(self) -> dict[str, Tensor]:
        """The computed columns, for a checkpoint."""
        return {
            f"reference.{name}.{column}": torch.tensor(np.array(dataset.with_format("arrow")[column], dtype=np.float64))
            for name, dataset in self._with_computed().items()
            for column in self._sources[dataset._fingerprint]
        }

    def _prepare_resume(self, tensors: dict[str, Tensor]) -> None:
        """Take the columns that the training began with: computed elsewhere, their last digits would be others."""
        for name, dataset in self._with_computed().items():
            sources = self._sources[dataset._fingerprint]
            kept = {column: tensors.get(f"reference.{name}.{column}") for column in sources}
            if any(value is None or value.shape != (len(dataset),) for value in kept.values()):
                continue  # a set that the training began without, or another one, which the identity refuses
            for column, value in kept.items():
                dataset = dataset.remove_columns(column).add_column(column, value.numpy())  # type: ignore[union-attr]
            self._sources[dataset._fingerprint] = sources
            if name == "train":
                self.train_dataset = dataset
            elif name == "eval":
                self.eval_dataset = dataset
            else:
                self.eval_dataset[name.removeprefix("eval.")] = dataset

    def _with_computed(self) -> dict[str, Dataset]:
        """The data sets with columns that this trainer computed."""
        several = isinstance(self.eval_dataset, dict)
        named = {f"eval.{k}": v for k, v in self.eval_dataset.items()} if several else {"eval": self.eval_dataset}
        every = {"train": self.train_dataset, **named}
        return {k: v for k, v in every.items() if getattr(v, "_fingerprint", None) in self._sources}

    def computed_columns(self, dataset: Any) -> dict[str, str]:
        """As :meth:`SavesCheckpoints.computed_columns`; with each batch, those of the first reference."""
        found = self._sources.get(getattr(dataset, "_fingerprint", ""), {})
        if self._live is not None and not {*REFERENCE_COLUMNS} & {*(getattr(dataset, "column_names", None) or ())}:
            found = found | dict.fromkeys(REFERENCE_COLUMNS, f"reference {self._live}")
        return found


def _prompt_keys(dataset: Dataset) -> list[str]:
    """:func:`prompt_keys` of a data set for training.

    They are of the text where the data set has it: one text may have different token ids, since its last ones depend on
    how a completion begins. Without the column prompt they are of ``prompt_ids``.
    """
    names = {"prompt", *COLUMNS} & {*dataset.column_names}
    if "prompt" not in names:
        return [str(ids) for ids in dataset["prompt_ids"]]
    return prompt_keys([_prompt_of(row) for row in dataset.select_columns(sorted(names))])


def _prompt_of(row: Mapping[str, Any]) -> Text:
    """The prompt of a data set's row, whose messages have every key that any message has."""
    row = without_filled_nulls(row)
    if isinstance(row["prompt"], str):
        return row["prompt"]
    present = [{key: value for key, value in message.items() if value is not None} for message in row["prompt"]]
    return Conversation.of([{**message, "content": content_of(message)} for message in present], row)
