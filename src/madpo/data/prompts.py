"""The prompt of a row: which columns make it, and how they are joined.

What a column is in the prompt is declared by its name in ``layouts.toml``. A column that carries context is joined or
refused, never dropped.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from madpo.core.errors import RowError
from madpo.core.layout import layout_table
from madpo.data.messages import SYSTEM_ROLES, Message, Text, as_text, contents, encodable, is_blank, said, texts_within
from madpo.data.raw import described, null

_TABLE = layout_table()["prompt"]
QUESTIONS = tuple(map(tuple, _TABLE["questions"]))
KNOWN = tuple(dict.fromkeys([*chain(*QUESTIONS), *_TABLE["system"], *_TABLE["history"], *_TABLE["context"]]))
_REQUIRED = ("prompt", "instruction", "question")
"""Columns that hold nothing but a prompt: null in one of them is a mistake. The others may be empty, or hold a copy of
the whole conversation."""


@dataclass(frozen=True)
class PromptColumns:
    """Which columns of a data set make the prompt.

    Attributes:
        question: the column with the prompt, and those whose texts go below it; empty where chosen and rejected hold
            the prompt.
        system: the column with the system prompt.
        history: the column with the turns before the prompt.
        context: columns that carry context and are not joined: their texts must be in the pair already.
    """

    question: tuple[str, ...] = ()
    system: str | None = None
    history: str | None = None
    context: tuple[str, ...] = ()

    @classmethod
    def found_in(cls, names: Iterable[str]) -> PromptColumns:
        """Look for the known columns among ``names``."""
        there = set(names)
        begins = next((entry for entry in QUESTIONS if entry[0] in there), ())
        question = tuple(name for name in begins if name in there)
        system = next((name for name in _TABLE["system"] if name in there), None)
        history = next((name for name in _TABLE["history"] if name in there.difference(question)), None)
        joined = {*question, system, history}
        return cls(question, system, history, tuple(name for name in KNOWN if name in there.difference(joined)))

    @property
    def joined(self) -> tuple[str, ...]:
        """The columns that the prompt is made of, in its order."""
        return tuple(name for name in (self.system, self.history, *self.question) if name is not None)


class Prompt(NamedTuple):
    """What a row says of its prompt.

    Attributes:
        text: None where chosen and rejected hold it.
        system: the system prompt; empty for none.
        history: turns before the prompt.
        context: columns that are not joined, which :func:`refuse_lost_context` looks at.
    """

    text: Text | None
    system: str = ""
    history: Sequence[Message] = ()
    context: tuple[str, ...] = ()

    def joined(self, prompt: Text) -> Text:
        """``prompt`` with the system prompt and the history in front, unless they are there already.

        Raises RowError: there are two system prompts.
        """
        if isinstance(prompt, str):
            assert not self.history, "a text has no turns"
            return prompt if self.system in prompt else f"{self.system}\n\n{prompt}"
        (own, turns), (before, history) = _system_and_turns(prompt), _system_and_turns(self.history)
        systems = [message["content"] for message in (*own, *before)]
        if self.system and not any(self.system in system for system in systems):
            systems.append(self.system)
        if len(set(systems)) > 1:
            raise RowError(
                f"there are two system prompts, {described(systems[0])} and {described(systems[1])}; keep one of them"
            )
        head = own or before or (said("system", self.system) if self.system else [])
        return [*head, *turns] if turns[: len(history)] == history else [*head, *history, *turns]


def _system_and_turns(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    count = 1 if messages and messages[0]["role"] in SYSTEM_ROLES else 0
    return list(messages[:count]), list(messages[count:])


def read_prompt(raw: Mapping[str, Any], columns: PromptColumns, *, completion: Text | None = None) -> Prompt:
    """The parts of a row's prompt. Raises RowError.

    A ``completion`` that is a conversation and does not begin with the assistant holds the prompt; a column such as
    ``messages`` next to it is then a copy.
    """
    text: Text | None = None
    whole = isinstance(completion, list) and completion[0]["role"] != "assistant"
    for name in columns.question:
        value = raw.get(name)
        if name in _REQUIRED and value is None and not whole:
            raise null(name)
        if value is None or (value == [] and name not in _REQUIRED):
            continue
        part = as_text(value, name)
        if text is None or (isinstance(text, str) and not text.strip() and part):
            text = part
        elif isinstance(text, str) and isinstance(part, str):
            text = f"{text}\n{part}" if part.strip() else text
        elif part:
            raise RowError(
                f"{columns.question[0]} and {name} are not both text, so they cannot be joined; write "
                f"{name} into {columns.question[0]}, or remove it"
            )
    context = columns.context
    if whole and isinstance(text, list) and columns.question[0] not in _REQUIRED:
        text, context = None, (*context, columns.question[0])
    return Prompt(text, _system(raw, columns.system), _history(raw, columns.history), context)


def whole_prompt(raw: Mapping[str, Any], *, chat: bool = False) -> Text | None:
    """The prompt of a row that is no pair: joined, or None where no column has one.

    ``chat``: text is the user's message. Raises RowError: as :func:`read_prompt` and :func:`refuse_lost_context`.
    """
    found = read_prompt(raw, PromptColumns.found_in(raw))
    if found.text is None:
        return None
    text = said("user", found.text) if (chat or found.history) and isinstance(found.text, str) else found.text
    prompt = found.joined(text)
    refuse_lost_context(raw, found.context, (prompt,))
    return prompt


def _system(raw: Mapping[str, Any], name: str | None) -> str:
    if name is None or (value := raw.get(name)) is None:
        return ""
    text = as_text(value, name)
    if not isinstance(text, str):
        raise RowError(f"{name} is {described(value)}, not text; give the system prompt as text")
    return text if text.strip() else ""


def _history(raw: Mapping[str, Any], name: str | None) -> list[Message]:
    if name is None or is_blank(value := raw.get(name)):
        return []
    remedy = "give a list of messages, or of pairs of a question and its answer"
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} is {described(value)}, not a list of turns; {remedy}")
    if any(isinstance(turn, Mapping) for turn in value):
        messages = as_text(value, name)
        assert isinstance(messages, list)
        return messages
    turns: list[Message] = []
    for i, turn in enumerate(value):
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RowError(f"{name}[{i}] is {described(turn)}, not a question and its answer; {remedy}")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            turns += said(role, encodable(text, f"{name}[{i}]"))
    return turns


def refuse_lost_context(raw: Mapping[str, Any], names: Sequence[str], pair: Sequence[Text]) -> None:
    """Refuse a row with context that would be lost (RowError): text in the columns ``names``, which are not joined to
    the prompt, that is not in ``pair`` (prompt, chosen and rejected) either.
    """
    for name in names:
        needles = [text.strip() for text in texts_within(raw.get(name))]
        if not any(needles):
            continue
        given = [content for part in pair for content in contents(part)]
        if not all(any(needle in content for content in given) for needle in needles):
            raise RowError(
                f"{name} is {described(raw[name])}, which may belong to the prompt, and nothing says how to "
                f"join them; give --columns.ignore {shlex.quote(name)} if the model need not see it, or name all "
                "columns of the prompt in their order (--columns.prompt A,B)"
            )
