"""Texts out of any data set: plain text, conversations, prompts, and both sides of preference pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from madpo.core.errors import DataError, RowError, located
from madpo.core.layout import Layout, as_layout, value_at
from madpo.data.arrange import Arranger
from madpo.data.conversation import Conversation
from madpo.data.layouts import listed_columns, recognise
from madpo.data.load import PairStream
from madpo.data.messages import Text, as_text, said
from madpo.data.prompts import PromptColumns, read_prompt, whole_prompt
from madpo.data.sources import open_source

_WHOLE = ("text", "messages", "conversations")
_COMPLETIONS = ("completion", "response", "output")


def read_texts(data: str | Path, columns: Any = None) -> Iterator[tuple[str, Text]]:
    """(place for messages, text or conversation) of every row; a pair gives two, the prompt before each side.

    Rows hold ``text``, ``messages``, a prompt with or without a ``completion``, or preference pairs in any layout that
    :func:`madpo.data.load_preferences` reads. The first row decides. Raises DataError: a row holds none of them, or the
    file cannot be read.
    """
    source = open_source(data)
    given, pairs = as_layout(columns), None
    with closing(source.rows):
        for number, raw in source.rows:
            if isinstance(raw, DataError):
                raise raw
            pairs = _are_pairs(raw, given) if pairs is None else pairs
            if pairs:
                break
            with located(place := source.at(number)):
                text = _text(Arranger(given, tuple(raw)).rest(raw) if given.given else raw, chat=given.chat)
                text = Conversation.of(text, raw) if isinstance(text, list) else text
            yield place, text
        else:
            if pairs is None:
                raise DataError(f"{source.name}: has no rows; give at least one text")
            return
    stream = PairStream(data, columns)
    for pair in stream:
        with located(place := stream.source.at(pair.number)):
            sides = [_joined(pair.prompt, side) for side in (pair.chosen, pair.rejected)]
        yield from ((place, side) for side in sides)


def _are_pairs(raw: dict[str, Any], given: Layout) -> bool:
    if given.has_completions or {"chosen", "rejected"} <= raw.keys():
        return True  # a column messages next to them is a copy of one side
    try:
        found = recognise(list(raw), given)
    except DataError:
        return "chosen" in raw and not raw.keys() & {*_WHOLE}  # a mistake, which the reader of pairs reports
    layout = given if found is None else found[0]
    if layout.completions:
        return isinstance(value_at(raw, layout.completions), list | tuple | dict)
    return not layout.completion


def _text(raw: dict[str, Any], *, chat: bool) -> Text:
    if "text" in raw:
        return as_text(raw["text"], "text")
    if whole := next((name for name in _WHOLE if name in raw), None):
        front = replace(PromptColumns.found_in(raw), question=())
        return read_prompt(raw, front).joined(as_text(raw[whole], whole))
    completion = next((name for name in _COMPLETIONS if name in raw), None)
    prompt = whole_prompt(raw, chat=chat)
    parts = [prompt] if prompt is not None else []
    if completion is not None:
        text = as_text(raw[completion], completion)
        parts.append(said("assistant", text) if chat and isinstance(text, str) else text)
    if not parts:
        raise RowError(
            f"has no 'text', 'messages', 'prompt' or 'chosen' and 'rejected' (found {listed_columns(list(raw))}); "
            "name the column: --columns.prompt NAME"
        )
    return parts[0] if len(parts) == 1 else _joined(parts[0], parts[1])


def _joined(prompt: Text, completion: Text) -> Text:
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt + completion
    raise RowError("prompt and completion must both be text or both be messages; write them alike")
