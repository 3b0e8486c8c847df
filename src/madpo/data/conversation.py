"""Conversations with tools: what of a row its chat template is given, and whether the template shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from madpo.core.errors import DataError, RowError
from madpo.data.messages import Message, as_json, is_blank, shown
from madpo.data.raw import CALLS, COLUMNS, NAMES, REASONING, described, short

_RESERVED = ("add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "return_tensors", "padding")
"""Options of ``apply_chat_template`` that are no variables of a template."""


class Conversation(list[Message]):
    """Messages, and the columns of their row that a chat template is given.

    Attributes:
        columns: ``tools`` and ``chat_template_kwargs`` as the row has them; those that say nothing are left out.
    """

    def __init__(self, messages: Sequence[Message] = (), columns: Mapping[str, Any] | None = None) -> None:
        super().__init__(messages)
        self.columns = dict(columns or {})

    @classmethod
    def of(cls, messages: Sequence[Message], raw: Mapping[str, Any]) -> Conversation:
        """The messages with the columns of their row ``raw``.

        Raises RowError: a column is not what a template can be given.
        """
        found = cls(messages, {name: raw[name] for name in COLUMNS if not is_blank(raw.get(name))})
        for name, value in found.columns.items():
            read = as_json(value, name)
            form = {"tools": list, "chat_template_kwargs": dict}[name]
            if not isinstance(read, form) or (form is list and not all(isinstance(tool, dict) for tool in read)):
                remedy = "a list of objects, each the JSON schema of a function" if form is list else "an object"
                raise RowError(f"{name} is {described(value)}; give {remedy}, or its JSON as text")
            if reserved := [key for key in _RESERVED if key in read and form is dict]:
                raise RowError(f"{name} has {reserved[0]!r}, which is no variable of a template; remove it")
        return found

    @property
    def options(self) -> dict[str, Any]:
        """For ``apply_chat_template``."""
        read = {name: as_json(value, name) for name, value in self.columns.items()}
        kwargs = {key: value for key, value in read.pop("chat_template_kwargs", {}).items() if value is not None}
        return read | kwargs

    def __add__(self, messages: list[Message]) -> Conversation:  # type: ignore[override]
        return Conversation([*self, *messages], self.columns)


def columns_of(text: object) -> dict[str, Any]:
    """``tools`` and ``chat_template_kwargs`` of a prompt; empty where it has none."""
    return text.columns if isinstance(text, Conversation) else {}


def unshown(
    written: Callable[[list[Message]], str],
    prompt: list[Message],
    sides: Mapping[str, tuple[list[Message], str]],
) -> Iterator[tuple[str, str]]:
    """Findings about what a chat template leaves out, texts apart: it writes the same text without it.

    Args:
        written: what the template makes of a conversation.
        sides: name -> messages of a completion, and the text of prompt and completion.

    Raises RowError: it leaves out tools or tool calls, or the reasoning of a completion.
    """
    (first, text), *_ = sides.values()
    if "tools" in columns_of(prompt):
        rest = {name: value for name, value in columns_of(prompt).items() if name != "tools"}
        if _same(written, Conversation([*prompt, *first], rest), text):
            raise _refusal("tools", columns_of(prompt)["tools"], "column")
    parts = {"prompt": (prompt, text), **sides}
    for keys in (CALLS, REASONING, NAMES):
        for name, (messages, text) in parts.items():
            # Templates show a tool's result without its name.
            given = [
                (key, m[key]) for m in messages for key in keys if key in m and (keys != NAMES or m["role"] != "tool")
            ]
            if not given:
                continue
            bare = [{key: value for key, value in m.items() if key not in keys} for m in messages]
            whole = Conversation(bare, columns_of(prompt)) + first if name == "prompt" else prompt + bare
            if not _same(written, whole, text):
                continue
            if keys == CALLS or (keys == REASONING and name != "prompt"):  # templates forget the reasoning of old turns
                raise _refusal(f"{given[0][0]} of {name}", given[0][1], "key")
            yield "dropped_content", f"{given[0][0]} of {name}: {shown(given[0][1])[:40]!r}"


def _same(written: Callable[[list[Message]], str], conversation: list[Message], text: str) -> bool:
    try:
        return written(conversation) == text
    except DataError:  # it cannot do without
        return False


def _refusal(what: str, value: Any, kind: str) -> RowError:
    return RowError(
        f"the chat template leaves out the {what} ({short(value)}), so that the model never sees it; use a "
        f"chat template that shows it (chat_template.jinja next to the model), or remove the {kind} if the model need "
        "not see it"
    )
