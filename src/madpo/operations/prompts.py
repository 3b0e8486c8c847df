"""A user's prompts: rows of any source with text or messages, each prompt once."""

from __future__ import annotations

import shlex
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from madpo.core.errors import DataError
from madpo.core.layout import as_layout
from madpo.data.arrange import Arranger
from madpo.data.conversation import Conversation
from madpo.data.folds import prompt_key
from madpo.data.layouts import listed
from madpo.data.messages import Text
from madpo.data.prompts import PromptColumns, whole_prompt
from madpo.data.raw import described
from madpo.data.sources import open_source


class Prompt(NamedTuple):
    """A prompt, and where it is."""

    prompt_id: int
    """Index of its row, from 0."""
    content: Text
    place: str
    """For messages, such as ``prompts.jsonl, line 7``."""


def read_prompts(data: str | Path, count: int | None = None, columns: Any = None) -> list[Prompt]:
    """The prompts of a data set, or its first ``count``; of equal ones the first.

    Args:
        columns: as in :func:`madpo.data.load_preferences`; of it what makes the prompt.

    Raises:
        DataError: a row without a prompt, or fewer prompts than asked for.
    """
    source, given = open_source(data), as_layout(columns)
    found: dict[str, Prompt] = {}
    with closing(source.rows):
        for index, (number, raw) in enumerate(source.rows):
            if isinstance(raw, DataError):
                raise raw
            place = source.at(number)
            raw = Arranger(given, tuple(raw)).rest(raw, place) if given.given else raw
            names = PromptColumns.found_in(raw).question
            if not names:
                remedy = "name the column that holds it: --columns.prompt " + (
                    shlex.quote(next(iter(raw))) if raw else "NAME"
                )
                raise DataError(f"{place}: has no 'prompt' (found {listed(list(raw))}); {remedy}")
            content = whole_prompt(raw, raw, place)
            if not content:
                raise DataError(f"{place}: {names[0]} is {described(raw[names[0]])}; fill it in or drop the row")
            if isinstance(content, list):
                content = Conversation.of(content, raw, place)
            first = next(iter(found.values()), None)
            if first is not None and isinstance(content, str) != isinstance(first.content, str):
                raise DataError(f"{place}: text and messages are mixed; use one form in the whole file")
            found.setdefault(prompt_key(content), Prompt(index, content, place))
            if count is not None and len(found) == count:
                break
    if not found:
        raise DataError(f"{source.name}: has no rows; give at least one prompt")
    if count is not None and len(found) < count:
        raise DataError(f"{source.name}: has only {len(found)} different prompts, but {count} are asked for")
    return list(found.values())
