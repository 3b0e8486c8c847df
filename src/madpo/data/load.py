"""Preference data for training, and the stream of checked pairs that loading and checking share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from madpo.core.columns import ID_COLUMNS, NUMBERS
from madpo.core.errors import DataError, RowError, located, printable
from madpo.core.layout import Layout, as_layout, each, head, value_at
from madpo.core.progress import track
from madpo.data.arrange import Arranged, Arranger, LeftOut
from madpo.data.findings import Survey
from madpo.data.layouts import plain_name, recognise
from madpo.data.messages import is_blank
from madpo.data.raw import Source, described
from madpo.data.rows import WANTED, Columns, Pair, Reader
from madpo.data.sources import open_source
from madpo.data.templates import Clock
from madpo.data.tokens import Encoded, Encoder, as_tokenizer, check_options, text_length, truncated
from madpo.data.unpaired import paired_rows
from madpo.models.hyperparameters import Truncation

T = TypeVar("T")

BATCH_ROWS = 64
BATCH_CHARACTERS = 500_000  # few long rows fill a batch as well
BRIEF = 40  # characters of a text that may be the name of a column
LISTED = 5  # further rows with mistakes that a message names


class PairStream:
    """The pairs of a data set in order; mistakes of single rows are counted, and reported at the end.

    Attributes:
        source: the opened data.
        columns: which names are read as what; None before the first pair.
        layout: where a data set without ``chosen`` and ``rejected`` has them; None where it has both.
        other_labels: columns that could have ordered the completions as well.
        names: of the columns, of the first row where every row brings its own.
        left_out: kind of finding -> numbers of the rows that hold no preference.
    """

    def __init__(self, data: str | Path, columns: Any = None, *, every_column: bool = False) -> None:
        """Open the data; ``columns`` as for :func:`load_preferences`. ``every_column`` also reads the columns of a
        table that take no part, for :meth:`with_rows`.

        Raises DataError or ConfigError: the data cannot be opened, or no layout fits a table's columns.
        """
        self._data, self._given, self._every_column = data, as_layout(columns), every_column
        self.columns: Columns | None = None
        self.layout: Layout | None = None
        self.other_labels: tuple[str, ...] = ()
        self.names: tuple[str, ...] | None = None
        self.left_out: dict[str, list[int]] = {}
        self._arranger: Arranger | None = None
        self._reader: Reader | None = None
        self.source: Source = self._open()
        self._from_text = self.source.columns is not None and self.source.unit == "line"
        if self.source.columns is not None:
            with located(self.source.name):
                self._recognise(self.source.columns)

    def _open(self) -> Source:
        return open_source(self._data, wanted=None if self._every_column else self._wanted)

    def _wanted(self, names: Sequence[str]) -> Container[str]:
        """The columns of a table that are worth reading."""
        with located(printable(str(self._data))):
            found = recognise(names, self._given)
        if found is None:
            return WANTED
        return {*WANTED, *found[0].columns(names), *found[0].ordering(names)}

    def _recognise(self, names: Sequence[str]) -> None:
        self.names = tuple(map(str, names))
        found = recognise(self.names, self._given)
        if found is None:
            self._use(self.names)
        else:
            self.layout, self.other_labels = found
            self._arranger = Arranger(self.layout, self.names, from_text=self._from_text)

    def _use(self, names: Sequence[str]) -> Reader:
        self.columns = Columns.found_in(names)
        history = self.columns.prompt.history
        if history and self.layout and self.layout.history:
            history = self.layout.history
        turns = self._given.chat  # or whether a row has turns before its prompt; it decides how all rows are read
        if history is not None and not turns:
            source = open_source(self._data, wanted=(history,))
            with closing(source.rows):
                turns = any(isinstance(raw, dict) and not is_blank(value_at(raw, history)) for _, raw in source.rows)
        self._reader = Reader(self.columns, from_text=self._from_text, turns=turns)
        return self._reader

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names that nothing reads."""
        names = self.names or ()
        used = {*self.columns.read_as.values(), *self.columns.prompt.joined} if self.columns else set()
        if self.layout is not None:
            used |= {*self.layout.columns(names), *self.layout.ordering(names)}
        return tuple(name for name in names if name not in used)

    @property
    def texts(self) -> set[str]:
        """Columns that the pair was read from, in the rows of :meth:`with_rows`."""
        assert self.columns is not None
        sides = {theirs for ours, theirs in self.columns.read_as.items() if ours not in NUMBERS}
        return sides | {*self.columns.prompt.joined}

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns that the prompt is made of, in its order."""
        joined = self.columns.prompt.joined if self.columns else ()
        if self.layout is None:
            return joined
        own = {ours: each(getattr(self.layout, ours)) or (ours,) for ours in ("prompt", "system", "history")}
        there = {*(self.names or ())}
        return tuple(name for ours in joined for name in own.get(ours, (ours,)) if head(name, there) in there)

    def _rows(self) -> Iterator[tuple[int, int, dict[str, Any] | Arranged | DataError | LeftOut]]:
        """(number, index, the row, or why there is none) as the reader takes it."""
        index = -1
        with closing(self.source.rows):
            for index, (number, raw) in enumerate(self.source.rows):
                if isinstance(raw, DataError):
                    yield number, index, raw
                    continue
                if self.names is None:
                    with located(self.source.at(number)):
                        self._recognise(list(raw))
                if self._arranger is None:
                    yield number, index, raw
                    continue
                if self._arranger.layout.completion:
                    break
                try:
                    with located(self.source.at(number)):
                        for arranged in self._arranger.pairs(raw):
                            yield number, index, arranged
                except (DataError, LeftOut) as why:
                    yield number, index, why
        if index < 0:
            raise DataError(f"{self.source.name}: has no rows; give at least one pair")
        if self._arranger is not None and self._arranger.layout.completion:
            yield from paired_rows(self._open, self._arranger)

    def with_rows(self) -> Iterator[tuple[Pair, Mapping[str, Any]]]:
        """Every pair, and its row with all columns that take no part in the layout.

        Raises DataError after the last, if rows were wrong or there was none: the first mistake, and where the others
        are.
        """
        mistakes: list[DataError] = []
        wrong: list[int] = []
        several = self.layout is not None and self.layout.replies is not None
        count = 0
        for number, index, found in self._rows():
            try:
                if isinstance(found, DataError | LeftOut):
                    raise found
                row, flags = (found.row, found.flags) if isinstance(found, Arranged) else (found, ())
                with located(self.source.at(number)):
                    reader = self._reader or self._use(list(row))
                    pair = reader.pair(row, number, count if several else index, flags)
                    if self.layout is None:
                        _refuse_names_of_columns(pair, self.names or ())
            except LeftOut as left:
                self.left_out.setdefault(str(left), []).append(number)
                continue
            except DataError as mistake:
                if self.columns is None and not isinstance(found, DataError):
                    raise  # without the columns every row would be wrong in the same way
                mistakes[:] = mistakes or [mistake]
                wrong.append(number)
                continue
            if isinstance(found, Arranged):
                pair.strength = found.strength
            count += 1
            yield pair, row
        raise_first(mistakes, wrong, self.source)

    def __iter__(self) -> Iterator[Pair]:
        """Every pair. Raises DataError: as :meth:`with_rows`."""
        return (pair for pair, _ in self.with_rows())

    def refuse_no_pair(self, pairs: int) -> None:
        """Refuse data of which no row holds a preference (DataError)."""
        if pairs:
            return
        kind = max(self.left_out, key=lambda kind: len(self.left_out[kind]), default="unranked")
        raise DataError(f"{self.source.name}: {NO_PAIR[kind]}")


def _refuse_names_of_columns(pair: Pair, names: Sequence[str]) -> None:
    """Refuse a pair whose sides name two other columns, which hold its completions (RowError)."""
    named: set[str] = set()
    for said in (pair.chosen, pair.rejected):
        word = plain_name(said) if isinstance(said, str) and len(said) < BRIEF else ""
        named.update([name for name in names if word and f"_{plain_name(name)}".endswith(f"_{word}")][:1])
    if len(named) == 2 and named.isdisjoint(("prompt", "chosen", "rejected")):
        sides = ",".join(shlex.quote(name) for name in names if name in named)
        raise RowError(
            f"chosen is {described(pair.chosen)} and rejected {described(pair.rejected)}, which name other columns: "
            f"give --columns.sides {sides} --columns.label chosen, or --columns.chosen chosen --columns.rejected "
            "rejected if that is what they say"
        )


NO_PAIR = {
    "unranked": "no row has two different scores, so there is no pair; score them",
    "tie": "every row is a tie, so there is no pair; name another label with --columns.label NAME, or label them",
    "no_winner": "no row has a label, so there is no pair; name another label with --columns.label NAME, or label them",
    "no_completion": "no row has two completions, so there is no pair; fill them in",
    "unpaired": (
        "no prompt has both a good and a bad completion, so there is no pair; the losses here need pairs: give several "
        "completions of one prompt"
    ),
}


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


def batches(rows: Iterable[T], most: int, length: Callable[[T], int]) -> Iterator[list[T]]:
    """Batches for the tokenizer, bounded in rows and in characters."""
    batch: list[T] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += length(row)
        if len(batch) == most or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(pair: Pair) -> int:
    return sum(map(text_length, (pair.prompt, pair.prompt, pair.chosen, pair.rejected)))


def encoded_pairs(stream: PairStream, encoder: Encoder) -> Iterator[tuple[Pair, Encoded]]:
    """Pairs with their token ids; what the chat template refuses is reported at the end.

    Raises DataError: as iterating the stream does, and for conversations that the template refuses.
    """
    mistakes: list[DataError] = []
    wrong: list[int] = []
    for batch in batches(stream, BATCH_ROWS, _characters):
        results = encoder.encode(batch, stream.source.at)
        for pair, result in zip(batch, results, strict=True):
            if isinstance(result, DataError):
                mistakes[:] = mistakes or [result]
                wrong.append(pair.number)
            else:
                yield pair, result
    raise_first(mistakes, wrong, stream.source)


def surveyed_pairs(
    stream: PairStream, encoder: Encoder | None, survey: Survey, max_length: int | None = None
) -> Iterator[tuple[Pair, Encoded | None]]:
    """Every pair, with its token ids where there is an encoder; ``survey`` counts what is found.

    Raises DataError: as :func:`load_preferences`.
    """
    pairs = ((pair, None) for pair in stream) if encoder is None else encoded_pairs(stream, encoder)
    for pair, encoded in track(pairs, description=f"reading {stream.source.name}"):
        survey.take(pair, encoded, stream.source, max_length)
        yield pair, encoded
    survey.finish(stream.left_out, stream.source.at)
    stream.refuse_no_pair(len(survey.seen))


def surveyed(data: str | Path, encoder: Encoder | None = None, columns: Any = None) -> Survey:
    """What a check of the whole data set would warn of, in text and, with an encoder, in tokens.

    Raises DataError: as :func:`load_preferences`.
    """
    survey = Survey()
    for _ in surveyed_pairs(PairStream(data, columns), encoder, survey):
        pass
    return survey


@dataclass
class TooLong:
    """What became of the pairs longer than ``max_length``.

    Attributes:
        cut: how many lost the end of a completion.
        drops: how many were left out.
        dropped: pair_id, place and tokens of each pair that was left out: a line of ``dropped.jsonl``.
        keep: whether ``dropped`` is filled.
    """

    cut: int = 0
    drops: int = 0
    dropped: list[dict[str, Any]] = field(default_factory=list)
    keep: bool = True

    def fitted(
        self, pair: Pair, encoded: Encoded, max_length: int | None, policy: Truncation, source: Source
    ) -> Encoded | None:
        """The pair within ``max_length`` tokens; None if it is dropped.

        Raises DataError: it is longer, and the policy is "refuse".
        """
        kept = encoded if max_length is None else truncated(encoded, max_length, policy)
        if kept is None and policy == "refuse":
            raise DataError(
                f"{source.at(pair.number)}: prompt and completion have {encoded.length} tokens, more than max_length "
                f'{max_length}; raise max_length, shorten the pair, or set truncation to "drop" or "cut"'
            )
        self.cut += kept is not None and kept is not encoded
        self.drops += kept is None
        if kept is None and self.keep:
            self.dropped.append({"pair_id": pair.pair_id, source.unit: pair.number, "tokens": encoded.length})
        return kept

    def lines(self) -> str:
        """The content of ``dropped.jsonl``."""
        return "".join(json.dumps(line) + "\n" for line in self.dropped)


def load_preferences(
    data: str | Path,
    *,
    columns: Any = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncation: Truncation = "drop",
    too_long: TooLong | None = None,
    survey: Survey | None = None,
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """Rows for training: ``datasets.Dataset.from_list(load_preferences("pairs.jsonl"))`` goes to the trainer.

    Args:
        data: JSONL, CSV or Parquet file, a folder of such files, a saved data set, or a hub data set "owner/name",
            "owner/name:split" or "owner/name:configuration:split".
        columns: which columns hold the pair, such as ``{"prompt": "question", "chosen": "best", "rejected": "worse"}``
            (fields of :class:`madpo.core.layout.Layout`), a packaged layout's name, or a TOML file; None recognises
            them by their names.
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
    stream = PairStream(data, columns)
    too_long = TooLong(keep=False) if too_long is None else too_long
    encoder = None if tokenizer is None else Encoder(as_tokenizer(tokenizer), clock)
    rows: list[dict[str, Any]] = []
    for pair, encoded in surveyed_pairs(stream, encoder, Survey() if survey is None else survey, max_length):
        if encoded is None:
            rows.append(pair.row())
        elif kept := too_long.fitted(pair, encoded, max_length, truncation, stream.source):
            rows.append(pair.row() | {name: getattr(kept, name) for name in ID_COLUMNS})
    if not rows:
        raise DataError(f"{stream.source.name}: no pair fits into max_length {max_length}; raise it")
    return rows
