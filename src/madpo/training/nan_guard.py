"""Bad numbers stop a training before they reach its weights: the step, the pairs of its batch, and the likely cause.

transformers replaces a loss that is not a number by the mean of the earlier ones in its log, clips gradients with an
infinite norm to zero or to nothing, and saves whatever the weights have become. Here loss and gradient are looked at
before the optimiser moves, and weights before they are saved, so the last checkpoint is always a good one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer

from madpo.core.errors import DataError, DivergedError, listed
from madpo.core.progress import say
from madpo.models.engine.devices import return_freed_memory
from madpo.training.checkpoints import folders

SKIPPED = 20
"""Steps in a row that a loss scaler may skip: its scale has fallen a million times by then, and nothing is trained."""
_SHOWN = 8
_SIDES = ("chosen_ids", "rejected_ids")


class FiniteTraining(Trainer):  # type: ignore[misc]
    """Mixin: a loss, a gradient or a weight that is NaN or infinite is an error that says where it came from."""

    _step_batches: Sequence[Mapping[str, Any]] = ()
    _skipped = 0
    _explain: Callable[[], DataError] | None = None
    """What to raise where the last loss is not finite, by a trainer that can name its pairs."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, kept to be named where the step fails."""
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_batches = samples[0]
        return samples

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As transformers'.

        Raises:
            DataError: the loss is NaN or infinite.
        """
        return_freed_memory()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss).all()):
            raise self._loss_error(loss, inputs)
        return loss

    def _loss_error(self, loss: Tensor, inputs: Any) -> DataError:
        if self._explain is not None:
            return self._explain()
        return self.not_finite(f"the loss is {float(loss.mean())}", self.pairs_of([inputs]))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None or math.isfinite(float(norm)):
            self._skipped = 0
            return norm
        self._skipped += 1
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled() and self._skipped <= SKIPPED:
            return norm  # the scaler leaves this step out and tries a smaller scale
        more = f" (the {self._skipped}th step in a row)" if self._skipped > 1 else ""
        raise self.not_finite(f"the gradient's norm is {float(norm)}{more}", self.pairs_of(self._step_batches))

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', whose mean over the held-out data leaves out a batch without a loss.

        Raises:
            DataError: the loss on held-out data is NaN or infinite.
        """
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if found[0] is not None and not bool(torch.isfinite(found[0]).all()):
            raise self._loss_error(found[0], inputs)
        return found

    def require_finite_weights(self) -> None:
        """Refuse weights that are not numbers, before they are kept.

        Raises:
            DataError: naming the first of them.
        """
        trained = self._weights(trained=True)
        if trained and not bool(torch.stack([torch.isfinite(p).all() for p in trained.values()]).all()):
            cause = f"{_first_bad(trained)} is not finite, so the step was too large; {_SLOWER}"
            where = self.pairs_of(self._step_batches)
            raise self.not_finite("a weight is no number", where, cause, finished=True)

    def _weights(self, *, trained: bool) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad == trained}

    def not_finite(self, what: str, pairs: str, cause: str | None = None, *, finished: bool = False) -> DataError:
        """The sentence: what is wrong, the step, the pairs, the likely cause, the remedy and what is kept.

        Args:
            what: the quantity and its value.
            pairs: where in the data, as :meth:`pairs_of` writes it.
            cause: where the caller knows it.
            finished: whether the step has been counted already.

        Returns:
            A DivergedError, but where the cause lies in what the training was given: a damaged base model or reference.
        """
        step = self.state.global_step
        when = (
            f"at step {step if finished else step + 1}"
            if self.model.training
            else f"in the evaluation after step {step}"
        )
        kept = folders(Path(self.args.output_dir))
        last = f"; the last checkpoint, {kept[0].name}, is good and stays" if kept else ""
        diverged = finished or (cause is None and _first_bad(self._weights(trained=False)) is None)
        text = f"{what} {when} for {pairs}: {cause or self._cause()}{last}"
        return DivergedError(text) if diverged else DataError(text)

    def _cause(self) -> str:
        trained = self._weights(trained=True)
        if name := _first_bad(self._weights(trained=False)):
            return (
                f"the base model's weight {name} is not finite, so the model is damaged; load it again from its source"
            )
        if name := _first_bad(trained):
            return f"the weight {name} is not finite, so an earlier step was too large; {_SLOWER}"
        where = _first_bad({name: p.grad for name, p in trained.items() if p.grad is not None})
        first = f"{where} is the first with a bad gradient, and " if where else ""
        mixed = str(self.accelerator.mixed_precision) == "fp16"
        if mixed or any(p.dtype == torch.float16 for p in self.model.parameters()):
            return (
                f"{first}float16 overflows above 65504; train in bfloat16 or float32 (bf16=True, or neither bf16 nor "
                "fp16)"
            )
        return f"{first}the step was too large or these pairs are unlike all others; {_SLOWER}, or look at them"

    def pairs_of(self, batches: Iterable[Mapping[str, Any]]) -> str:
        """The examples of some batches: by ``pair_id``, else by their rows in the training data."""
        ids: list[Any] = []
        for batch in batches:
            ids += batch.get("pair_id", [])
        if ids and None not in ids:
            held = "" if self.model.training else "held-out "
            return f"the {held}pairs [{listed(ids, _SHOWN)}]"
        if not self.model.training:
            return "a batch of the held-out data"
        rows = self._found_rows(batches)
        if not rows:
            return "this batch"
        if "pair_id" in (self.train_dataset.column_names or ()):
            named = [self.train_dataset[row]["pair_id"] for row in rows]
            if None not in named:
                return f"the pairs [{listed(named, _SHOWN)}]"
        return f"the rows [{listed(rows, _SHOWN)}] of the training data"

    def _found_rows(self, batches: Iterable[Mapping[str, Any]]) -> list[int]:
        """Positions in the training data; a search that only an error pays for."""
        wanted = {
            tuple(ids[mask.bool()].tolist())
            for batch in batches
            if {"input_ids", "attention_mask"} <= batch.keys()
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }
        if not wanted or not isinstance(self.train_dataset, Dataset):
            return []
        longest = max(map(len, wanted))
        columns = [name for name in ("input_ids", *_SIDES) if name in self.train_dataset.column_names]
        return [
            row
            for row, example in enumerate(self.train_dataset)
            if any(tuple([*example.get("prompt_ids", ()), *example[name]][:longest]) in wanted for name in columns)
        ]


_SLOWER = "lower the learning rate or max_grad_norm"


def _first_bad(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)


def drop_unscored(dataset: Any, args: Any, name: str) -> Any:
    """The pairs whose two completions keep a token to score after truncation; lines say how many are left out or cut.

    A pair without one has no loss. Streamed data pass, and the trainer gives such a pair no weight.

    Args:
        dataset: with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
        args: with ``max_length`` and ``truncation_mode``.

    Raises:
        DataError: no pair is left.
    """
    if not isinstance(dataset, Dataset) or not len(dataset):
        return dataset
    columns = ["prompt_ids", *_SIDES]
    tables = dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000)
    prompt, *sides = np.hstack([[pc.list_value_length(table[name]).to_numpy() for name in columns] for table in tables])
    completion, longest = np.minimum(*sides), int((prompt + np.maximum(*sides)).max())
    kept = prompt + completion if args.max_length is None else np.minimum(prompt + completion, args.max_length)
    # Completion tokens that have a token before them, after truncation: more of a longer completion.
    scored = np.minimum(completion, kept - 1) if args.truncation_mode == "keep_end" else kept - np.maximum(prompt, 1)
    keep = scored > 0
    cut = np.flatnonzero(keep & (prompt + np.maximum(*sides) > (args.max_length or np.inf)))
    if len(cut) and args.process_index == 0:
        end = args.truncation_mode != "keep_end"
        within = slice(None, args.max_length) if end else slice(-args.max_length, None)
        wholes = ([[*row["prompt_ids"], *row[side]][within] for side in _SIDES] for row in dataset.select(cut))
        same = sum(chosen == rejected for chosen, rejected in wholes)
        say(
            f"{name}: {len(cut)} of {len(keep)} pairs are longer than max_length {args.max_length} and lose the "
            f"{'end' if end else 'beginning'} of a text{f'; both sides of {same} are equal then' if same else ''}."
        )
    if keep.all():
        return dataset
    limit = "" if args.max_length is None else f" within max_length {args.max_length}"
    if not keep.any():
        if args.max_length is not None and longest > args.max_length:
            raise DataError(
                f"{name}: no pair keeps a token of both completions{limit}; raise max_length or shorten prompts"
            )
        raise DataError(
            f"{name}: no pair can be scored, since a first token has nothing before it to be predicted from; give "
            "prompts, longer completions, or a tokenizer with a beginning token"
        )
    if args.process_index == 0:
        say(
            f"{name}: {int((~keep).sum())} of {len(keep)} pairs keep no token of a completion{limit}, and are left out."
        )
    return dataset.select(np.flatnonzero(keep))
