"""Preference data for training, and the stream of checked pairs that loading and checking share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from madpo.core.errors import DataError
from madpo.data.messages import is_blank
from madpo.data.raw import Source
from madpo.data.rows import WANTED, Columns, Pair, Reader
from madpo.data.sources import open_source
from madpo.data.survey import Survey
from madpo.data.templates import Clock
from madpo.data.tokens import Encoded, Encoder, as_tokenizer, check_options, text_length, truncated
from madpo.models.hyperparameters import Truncation

BATCH_ROWS = 64
BATCH_CHARACTERS = 500_000  # few long rows fill a batch as well
LISTED = 5  # further rows with mistakes that a message names


class PairStream:
    """The pairs of a data set in order; mistakes of single rows are counted, and told at the end.

    Attributes:
        source: the opened data.
        columns: which names are read as what; None before the first row of a file whose rows bring their own keys.
        ignored: names that nothing reads.
        unranked: numbers of rows without two different scores.
    """

    def __init__(self, data: str | Path) -> None:
        self._data = data
        self.source: Source = open_source(data, wanted=WANTED)
        self.columns: Columns | None = None
        self.ignored: tuple[str, ...] = ()
        self.unranked: list[int] = []
        self._from_text = self.source.columns is not None and self.source.unit == "line"
        if self.source.columns is not None:
            self._use(self.source.columns, self.source.name)

    def _use(self, names: Sequence[str], place: str) -> Reader:
        self.columns = Columns.found_in(names, place)
        self.ignored = self.columns.ignored(names)
        turns = _any_turns(self._data, self.columns.prompt.history)
        self._reader = Reader(self.columns, self.source.name, from_text=self._from_text, turns=turns)
        return self._reader

    def __iter__(self) -> Iterator[Pair]:
        """Every pair; after the last, a DataError if rows were wrong or there was none.

        Raises:
            DataError: the first mistake, and where the others are.
        """
        mistakes: list[DataError] = []
        wrong: list[int] = []
        index = -1
        with closing(self.source.rows):
            for index, (number, raw) in enumerate(self.source.rows):
                try:
                    if isinstance(raw, DataError):
                        raise raw
                    place = self.source.at(number)
                    reader = self._reader if self.columns is not None else self._use(list(raw), place)
                    pair = reader.pair(raw, number, index, place)
                except DataError as mistake:
                    if self.columns is None and not isinstance(raw, DataError):
                        raise  # without the columns every row would be wrong in the same way
                    mistakes[:] = mistakes or [mistake]
                    wrong.append(number)
                    continue
                if pair is None:
                    self.unranked.append(number)
                else:
                    yield pair
        raise_first(mistakes, wrong, self.source)
        if index < 0:
            raise DataError(f"{self.source.name}: has no rows; give at least one pair")


def _any_turns(data: str | Path, column: str | None) -> bool:
    """Whether a row has turns before its prompt, which decides how all rows are read."""
    if column is None:
        return False
    source = open_source(data, wanted=(column,))
    with closing(source.rows):
        return any(isinstance(raw, dict) and not is_blank(raw.get(column)) for _, raw in source.rows)


def raise_first(mistakes: Sequence[DataError], wrong: Sequence[int], source: Source) -> None:
    """Raise the first of several mistakes, with the places of the others."""
    if not mistakes:
        return
    more = ""
    if others := [str(n) for n in wrong[1 : LISTED + 1]]:
        rest = len(wrong) - 1
        more = f" ({rest} more {source.unit}{'s' * (rest > 1)} with mistakes: {', '.join(others)}"
        more += ", …)" if rest > LISTED else ")"
    raise DataError(f"{mistakes[0]}{more}")


def batches(pairs: Iterator[Pair] | PairStream) -> Iterator[list[Pair]]:
    """Batches for the tokenizer, bounded in rows and in characters."""
    batch: list[Pair] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += 2 * text_length(pair.prompt) + text_length(pair.chosen) + text_length(pair.rejected)
        if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded_pairs(stream: PairStream, encoder: Encoder) -> Iterator[tuple[Pair, Encoded]]:
    """Pairs beside their token ids; what the chat template refuses is told at the end.

    Raises:
        DataError: as iterating the stream does, and for conversations that the template refuses.
    """
    mistakes: list[DataError] = []
    wrong: list[int] = []
    for batch in batches(stream):
        results = encoder.encode(batch, stream.source.name, stream.source.unit)
        for pair, result in zip(batch, results, strict=True):
            if isinstance(result, DataError):
                mistakes[:] = mistakes or [result]
                wrong.append(pair.number)
            else:
                yield pair, result
    raise_first(mistakes, wrong, stream.source)


def surveyed(data: str | Path, encoder: Encoder | None = None) -> Survey:
    """What a check of the whole data set would warn of, in text and, with an encoder, in tokens.

    Raises:
        DataError: as :func:`load_preferences`.
    """
    stream, survey = PairStream(data), Survey()
    pairs = ((pair, None) for pair in stream) if encoder is None else encoded_pairs(stream, encoder)
    for pair, encoded in pairs:
        survey.take(pair, encoded, stream.source)
    survey.finish(stream.unranked, stream.source.at)
    return survey


def refuse_too_long(pair: Pair, encoded: Encoded, max_length: int, source: Source) -> DataError:
    """The sentence of ``truncation="refuse"``."""
    return DataError(
        f"{source.at(pair.number)}: prompt and completion have {encoded.length} tokens, more than max_length "
        f'{max_length}; raise max_length, shorten the pair, or set truncation to "drop" or "cut"'
    )


@dataclass
class TooLong:
    """What became of the pairs longer than ``max_length``.

    Attributes:
        cut: how many lost the end of a completion.
        dropped: pair_id, place and tokens of each pair that was left out: a line of ``dropped.jsonl``.
    """

    cut: int = 0
    dropped: list[dict[str, Any]] = field(default_factory=list)

    def drop(self, pair: Pair, encoded: Encoded, unit: str) -> None:
        """Remember a pair that is left out."""
        self.dropped.append({"pair_id": pair.pair_id, unit: pair.number, "tokens": encoded.length})

    def lines(self) -> str:
        """The content of ``dropped.jsonl``."""
        return "".join(json.dumps(line) + "\n" for line in self.dropped)


def load_preferences(
    data: str | Path,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncation: Truncation = "drop",
    too_long: TooLong | None = None,
    survey: Survey | None = None,
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """Rows for training: ``datasets.Dataset.from_list(load_preferences("pairs.jsonl"))`` goes to the trainer.

    Args:
        data: JSONL, CSV or Parquet file, a saved data set, or a hub data set "owner/name" or "owner/name:split".
        tokenizer: a tokenizer, or the name or folder of one. With it the rows also hold token ids, each completion
            with exactly one end token, which the trainer takes as they are.
        max_length: tokens of prompt and completion together; None is no limit. Needs a tokenizer.
        truncation: what happens to a longer pair: "drop" it, "cut" its completions at the end (the pair is dropped
            if the prompt leaves no room), or "refuse" the data.
        too_long: gathers what truncation did.
        survey: counts what :func:`madpo.data.check` would warn of.
        clock: the date that the chat template prints; None is now.

    Returns:
        One dict per pair: pair_id, prompt, chosen, rejected (all text, or all messages), the numeric columns that the
        data has (chosen_score, rejected_score, reward_margin, weight, ref_chosen_logps, ref_rejected_logps) and, with
        a tokenizer, prompt_ids, chosen_ids, rejected_ids.

    Raises:
        DataError: one sentence with file, row, field and remedy; of several the first, and where the others are.
        ConfigError: options that do not fit together.
    """
    check_options(tokenizer, max_length, truncation)
    stream = PairStream(data)
    survey = Survey() if survey is None else survey
    rows: list[dict[str, Any]] = []
    if tokenizer is None:
        for pair in stream:
            survey.take(pair, None, stream.source)
            rows.append(pair.row())
        survey.finish(stream.unranked, stream.source.at)
        return rows
    for pair, encoded in encoded_pairs(stream, Encoder(as_tokenizer(tokenizer), clock)):
        survey.take(pair, encoded, stream.source, max_length)
        kept = encoded if max_length is None else truncated(encoded, max_length, truncation)
        if kept is None and truncation == "refuse":
            assert max_length is not None
            raise refuse_too_long(pair, encoded, max_length, stream.source)
        if too_long is not None and kept is None:
            too_long.drop(pair, encoded, stream.source.unit)
        elif too_long is not None:
            too_long.cut += kept is not encoded
        if kept is not None:
            ids = {"prompt_ids": kept.prompt_ids, "chosen_ids": kept.chosen_ids, "rejected_ids": kept.rejected_ids}
            rows.append(pair.row() | ids)
    survey.finish(stream.unranked, stream.source.at)
    if not rows and not len(survey.seen):
        raise DataError(f"{stream.source.name}: no row has two different scores, so there is no pair; score them")
    if not rows:
        raise DataError(f"{stream.source.name}: no pair fits into max_length {max_length}; raise it")
    return rows
