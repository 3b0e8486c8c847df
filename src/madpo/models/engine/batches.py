"""Sequences of token ids in padded batches of about equal lengths."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from madpo.core.errors import DataError
from madpo.core.progress import bar
from madpo.models.engine.logprobs import embedding_rows
from madpo.models.vocabulary import refuse_unknown


def padded_batches(
    sequences: Sequence[Sequence[int]], size: int, pad: int, model: nn.Module, description: str
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
    """(rows, ids, mask) with padding on the right; sequences of like length share a batch, longest first.

    Args:
        size: sequences in a batch.
        model: on whose device the batches are put.

    Raises:
        DataError: an empty sequence, or a token id that the model has no embedding for.
    """
    for rows in similar_lengths([len(sequence) for sequence in sequences], size, description):
        yield rows, *padded([sequences[row] for row in rows], pad, model)


def similar_lengths(
    lengths: Sequence[int], size: int, description: str, order: Sequence[int] | NDArray[np.int64] | None = None
) -> Iterator[NDArray[np.int64]]:
    """Numbers of the texts of each batch, longest first, or in another order that is given."""
    if len(lengths) and min(lengths) == 0:
        raise DataError(f"text {np.argmin(lengths)} has no tokens, so it has no reward; leave it out")
    if order is None:
        order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    with bar(description, len(order)) as advance:
        for start in range(0, len(order), size):
            rows = np.asarray(order[start : start + size])
            yield rows
            advance(len(rows))


def padded(sequences: Sequence[Sequence[int]], pad: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    """(ids, mask): shape [sequences, longest], padding on the right.

    Raises:
        DataError: a token id that the model has no embedding for.
    """
    rows = [torch.as_tensor(np.asarray(sequence, dtype=np.int64)) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    if (known := embedding_rows(model)) is not None:
        refuse_unknown([int(ids.min()), int(ids.max())], known, f"a text for {type(model).__name__}")
    device = next(model.parameters()).device
    return ids.to(device), mask.to(device)
