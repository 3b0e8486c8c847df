"""The columns of preference data: what a trainer's rows may hold, what a loss demands, and how they are batched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from madpo.core.errors import DataError
from madpo.models.vocabulary import refuse_unknown

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
PAIR_COLUMNS = ("reward_margin", "chosen_score", "rejected_score", "weight")


@dataclass
class PreferenceCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator, with the columns that the loss reads.

    Attributes:
        columns: numeric columns that every example must have.
        optional: numeric columns that are passed on where they are present.
        embedding_rows: of the model; token ids beyond them are refused.
    """

    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ("weight",)
    embedding_rows: int | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad a batch: chosen rows, then rejected rows; one value per pair of each column."""
        batch: dict[str, Any] = super().torch_call(examples)
        if self.embedding_rows is not None:
            ids = batch["input_ids"]
            pairs = ", ".join(str(example["pair_id"]) for example in examples if "pair_id" in example)
            where = f"a batch{pairs and f' with the pairs {pairs}'}"
            refuse_unknown([int(ids.min()), int(ids.max())], self.embedding_rows, where)
        present = [name for name in self.optional if name in examples[0] and name not in self.columns]
        for name in (*self.columns, *present):
            values = [example.get(name) for example in examples]
            if any(value is None for value in values):
                row = examples[values.index(None)].get("pair_id", values.index(None))
                raise DataError(f"the column {name!r} is empty for pair {row}: fill it or drop the pair")
            # float64 keeps what the data has; the loss computes in float32 or wider.
            batch[name] = torch.tensor(values, dtype=torch.float64).float()
            if not bool(torch.isfinite(batch[name]).all()):
                place = int((~torch.isfinite(batch[name])).nonzero()[0])
                row = examples[place].get("pair_id", f"{place} of the batch")
                raise DataError(
                    f"the column {name!r} is {values[place]} for pair {row}, which is no finite float32; score the "
                    "pair again or drop it"
                )
        if "pair_id" in examples[0]:
            batch["pair_id"] = torch.tensor([example["pair_id"] for example in examples])
        return batch


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


def check_columns(dataset: Any, name: str, needs: Iterable[str]) -> None:
    """Refuse a data set, or a dictionary of some, that lacks a pair's column; a stream may not know its own.

    Raises:
        DataError: naming the column and the remedy.
    """
    for part, rows in dataset.items() if isinstance(dataset, dict) else ((name, dataset),):
        columns = getattr(rows, "column_names", None)
        if columns is None:
            continue
        if "margin" in columns and "reward_margin" not in columns:
            raise DataError(
                f"{part} has a column 'margin'; rename it to 'reward_margin' (TRL's reward trainer subtracts a column "
                "of the name 'margin' from its own margins)"
            )
        for column in sorted(set(needs) & set(PAIR_COLUMNS)):
            if column not in columns:
                raise DataError(
                    f"{part} has no column {column!r}, which the loss reads; "
                    + ("add it with `madpo score`" if column == "reward_margin" else "add it to the data")
                    + f" (columns found: {', '.join(columns)})"
                )
