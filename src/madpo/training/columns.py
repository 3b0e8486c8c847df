"""The columns of preference data: what a trainer's rows may hold, what a loss demands, and how they are batched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset, Value
from torch import Tensor
from trl.data_utils import get_dataset_column_names
from trl.trainer.dpo_trainer import DataCollatorForPreference as DataCollatorForPreference

from madpo.core.columns import ID_COLUMNS, MARGIN, PAIR_COLUMNS, REFERENCE_COLUMNS, probe_gives_margin
from madpo.core.errors import DataError
from madpo.core.progress import say_once
from madpo.models.engine.packing import HostRows
from madpo.models.vocabulary import refuse_unknown
from madpo.training.refusals import refuse_images

HOST_ROWS = "host_rows"
BY_LENGTH = ("group_by_length", "batch_rebalance")
"""Values of ``train_sampling_strategy`` that need the lengths of rows."""
_TRAIN = "train_dataset"


@dataclass
class PreferenceCollator:
    """A collator, TRL's or any callable of the user's, with the columns that the loss reads.

    Attributes:
        collate: turns examples into a batch of ``input_ids``, ``attention_mask`` and ``completion_mask``, chosen rows
            first, then rejected ones.
        columns: numeric columns that every example must have.
        embedding_rows: of the model; token ids beyond them are refused.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    columns: tuple[str, ...] = ()
    embedding_rows: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch with one float32 per pair of each column, and the names of the pairs where they have some.

        Raises:
            DataError: a value is missing, no number or not finite, or a token id is beyond the embedding; with the
                pair.
        """
        batch = dict(self.collate(examples))
        if self.embedding_rows is not None:
            ids = batch["input_ids"]
            pairs = ", ".join(str(example["pair_id"]) for example in examples if "pair_id" in example)
            where = f"a batch{pairs and f' with the pairs {pairs}'}"
            refuse_unknown([int(ids.min()), int(ids.max())], self.embedding_rows, where)
        for name in (*self.columns, *(name for name in REFERENCE_COLUMNS if name in examples[0])):
            if name not in batch:
                batch[name] = _numbers(name, examples)
        rows = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
        if all(row.device.type == "cpu" for row in rows):
            batch[HOST_ROWS] = HostRows(*rows)
        if "pair_id" in examples[0]:  # numbers or text; for messages only
            batch["pair_id"] = [example.get("pair_id") for example in examples]
        return batch


def _numbers(name: str, examples: Sequence[dict[str, Any]]) -> Tensor:
    found: list[float] = []
    for place, example in enumerate(examples):
        value, pair = example.get(name), example.get("pair_id")
        pair = f"{place} of the batch" if pair is None else pair
        if value is None:
            raise DataError(f"the column {name!r} is empty for pair {pair}: fill it or drop the pair")
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            raise DataError(
                f"the column {name!r} is {value!r} for pair {pair}, which is no number; correct it or drop the pair"
            ) from None
        if not abs(found[-1]) <= torch.finfo(torch.float32).max:  # the loss computes in float32 or wider
            raise DataError(
                f"the column {name!r} is {value} for pair {pair}, which is no finite float32; score the pair again or "
                "drop it"
            )
        if name == "weight" and found[-1] < 0:
            raise DataError(
                f"the column 'weight' is {value} for pair {pair}, and would reverse the pair; exchange chosen and "
                "rejected, or drop the pair"
            )
    return torch.tensor(found, dtype=torch.float64).float()


def check_tokens(dataset: Any, name: str, rows: int) -> None:
    """Refuse a data set with a token id that the model has no embedding for; a stream is checked batch by batch.

    Args:
        rows: of the embedding.

    Raises:
        DataError: naming the first pair.
    """
    if not isinstance(dataset, Dataset) or not set(ID_COLUMNS) <= set(dataset.column_names):
        return
    start = 0
    for table in dataset.select_columns(list(ID_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        for column in ID_COLUMNS:
            ids: pa.Array = table[column].combine_chunks()
            ends = pc.min_max(pc.list_flatten(ids)).as_py()
            if (ends["min"] or 0) >= 0 and (ends["max"] or 0) < rows:
                continue
            for i, row in enumerate(ids.to_pylist()):
                refuse_unknown(row, rows, f"{name}, pair {start + i}, {column}")
        start += len(table)


def lacks_margin(dataset: Any) -> bool:
    """Whether a probe gives the margins of a data set, which it must read as a whole for that."""
    return isinstance(dataset, Dataset) and probe_gives_margin(dataset.column_names, past_scores=True)


def check_columns(dataset: Any, name: str, needs: Iterable[str], *, probed: bool = False) -> None:
    """Refuse a data set, or a dictionary of some, that lacks a column which the loss reads, or holds images.

    Args:
        probed: a probe of the training pairs gives the margins of a data set without any.

    Raises:
        DataError: naming the column and the remedy.
    """
    for part, rows in dataset.items() if isinstance(dataset, dict) and name != _TRAIN else ((name, dataset),):
        if rows is None and name != _TRAIN:
            continue
        if not isinstance(rows, Dataset | IterableDataset):
            parts = f"take one of its parts: {', '.join(map(str, rows))}" if isinstance(rows, dict) else ""
            raise DataError(
                f"{part} is of the type {type(rows).__name__}, but must be a Dataset or IterableDataset of the library "
                f"datasets; {parts or 'make one of a list of rows with Dataset.from_list(rows)'}"
            )
        if next(iter(rows), None) is None:
            raise DataError(f"{part} has no rows; give at least one pair")
        columns = get_dataset_column_names(rows)
        refuse_images(columns, part)
        if isinstance(rows, Dataset) and not set(ID_COLUMNS) <= set(columns):
            _check_texts(rows, part)
        for column in sorted(set(needs) & set(PAIR_COLUMNS)):
            if column in columns or (column == MARGIN and probed and lacks_margin(rows)):
                continue
            if column == MARGIN and "margin" in columns:
                raise DataError(
                    f"{part} has a column 'margin' and no 'reward_margin', which the loss reads; rename it (TRL's "
                    "reward trainer subtracts a column of the name 'margin' from its own margins)"
                )
            raise DataError(
                f"{part} has no column {column!r}, which the loss reads; "
                + ("add it with `madpo score --probe MODEL`" if column == MARGIN else "add it to the data")
                + f" (columns found: {', '.join(columns)})"
            )


def _check_texts(dataset: Dataset, name: str) -> None:
    """Refuse a data set without both sides, a text that is missing, and a text next to messages.

    Raises:
        DataError: naming the row, or the columns.
    """
    for column in ("chosen", "rejected"):
        if column not in dataset.column_names:
            raise DataError(
                f"{name} has no column {column!r} (columns found: {', '.join(dataset.column_names)}); rename the "
                "column, or let madpo.data.load_preferences make pairs of other layouts, such as one completion and a "
                "label a row"
            )
    columns = [column for column in ("prompt", "chosen", "rejected") if column in dataset.column_names]
    start = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for column in columns:
            if table[column].null_count:
                row = start + pc.index(pc.is_null(table[column]), True).as_py()
                raise DataError(f"{name}, row {row}: {column} is missing; fill it in, or leave the row out")
        start += len(table)
    texts = [column for column in columns if isinstance(dataset.features[column], Value)]
    if texts and texts != columns:
        others = [column for column in columns if column not in texts]
        raise DataError(
            f"{name}: {', '.join(texts)} hold text and {', '.join(others)} messages; write all of them as one or the "
            "other, such as [{'role': 'user', 'content': text}]"
        )


def with_plain_rows(dataset: Any) -> Any:
    """A data set whose rows are Python's lists and numbers, with all columns.

    Collators add lists. Of tensors or arrays (``set_format("torch")``) they would add the token ids.
    """
    if not isinstance(dataset, Dataset):
        return dataset.with_format(None)
    kind, shown = dataset.format["type"], dataset.format["columns"]
    plain = kind is None and set(shown) == set(dataset.column_names)
    return dataset if plain or kind == "custom" else dataset.with_format(None)


def with_lengths(dataset: Dataset, column: str) -> Dataset:
    """With the tokens of each pair's longer side, by which transformers groups rows of similar lengths."""
    if column in dataset.column_names:
        return dataset
    table = dataset.select_columns(list(ID_COLUMNS)).with_format("arrow")[:]
    prompt, chosen, rejected = (pc.list_value_length(table[name]) for name in ID_COLUMNS)
    return dataset.add_column(column, pc.add(prompt, pc.max_element_wise(chosen, rejected)).to_pylist())


def weights_are_used(dataset: Any, needs: Iterable[str], option: bool | None) -> bool:
    """Whether a pair's ``weight`` multiplies its loss; where the column is there and ignored, one line says so.

    Args:
        option: ``pair_weights`` of the configuration; None ignores the column.
    """
    if option is not None:
        return option
    known = isinstance(dataset, Dataset | IterableDataset) and dataset.column_names
    if known and "weight" in dataset.column_names and "weight" not in needs:
        say_once(
            "The column 'weight' is not used; pair_weights=True in PreferenceConfig (--args.pair_weights true) "
            "multiplies each pair's loss by it, and pair_weights=False says that this is meant."
        )
    return False
