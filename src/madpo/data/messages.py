"""Text and messages: what a field of a row may hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from madpo.core.errors import DataError
from madpo.data.raw import described

Message = dict[str, str]
Text = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SYSTEM_ROLES = ("system", "developer")
# What a chat template reads of a message besides role and content, and of a row besides its messages.
UNREAD_KEYS = (
    *("tool_calls", "tool_call_id", "function_call", "function_calls", "functions", "name"),
    *("reasoning_content", "reasoning", "thinking"),
)
UNREAD_COLUMNS = ("tools", "chat_template_kwargs")
_RENAME = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}


def as_text(value: Any, name: str, place: str) -> Text:
    """A field of a row: text, or messages with role and content only (text parts of a message joined).

    One message without a list around it is a conversation of one.

    Raises:
        DataError: anything else.
    """
    if isinstance(value, str):
        return encodable(value, name, place)
    if isinstance(value, dict):
        return [_message(value, name, place)]
    if not isinstance(value, list | tuple):
        raise DataError(f"{place}: {name} is {described(value)}, not text; give text or a list of messages")
    if not value:
        raise DataError(f"{place}: {name} is a list without messages; fill it in or drop the row")
    return [_message(m, f"{name}[{i}]", place) for i, m in enumerate(value)]


def _message(value: Any, name: str, place: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{place}: {name} is {described(value)}, not a message; give an object with role and content")
    refuse_unread_keys(value, name, place)
    if "role" not in value or "content" not in value:
        hint = "rename 'from' to 'role' and 'value' to 'content'" if "from" in value else "give both role and content"
        keys = ", ".join(repr(str(key)[:40]) for key in list(value)[:6]) or "nothing"
        raise DataError(f"{place}: {name} has {keys}, not role and content; {hint}")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        known = _RENAME.get(role.lower()) if isinstance(role, str) else None
        hint = f"rename it to {known!r}" if known else f"use one of {', '.join(ROLES)}"
        raise DataError(f"{place}: {name}.role is {described(role)}; {hint}")
    if isinstance(content, list):  # parts, as multimodal templates write them
        if any(
            not isinstance(p, dict) or p.get("type") != "text" or not isinstance(p.get("text"), str) for p in content
        ):
            raise DataError(f"{place}: {name}.content holds parts that are not text; only text can be trained on here")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{place}: {name}.content is {described(content)}, not text; fill it in or drop the row")
    return {"role": role, "content": encodable(content, f"{name}.content", place)}


def refuse_unread_keys(message: Mapping[str, Any], name: str, place: str) -> None:
    """Refuse what a chat template would show of a message and nothing here passes on: the two sides may differ in it.

    Raises:
        DataError: with the key and its value.
    """
    key = _first_given(message, UNREAD_KEYS)
    if key is not None:
        raise DataError(
            f"{place}: {name}.{key} is {described(message[key])}, but only role and content of a message are read; "
            f"render the conversations to text with the model's chat template, or remove {key!r} if the model need "
            "not see it"
        )


def refuse_unread_columns(raw: Mapping[str, Any], place: str) -> None:
    """Refuse what a chat template would be given beside the messages of a row and nothing here passes on.

    Raises:
        DataError: with the column and its value.
    """
    column = _first_given(raw, UNREAD_COLUMNS)
    if column is not None:
        raise DataError(
            f"{place}: {column} is {described(raw[column])}, but the chat template is given the messages alone; "
            "render the conversations to text with the model's chat template, or remove the column if the model need "
            "not see it"
        )


def _first_given(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if not is_blank(values.get(name))), None)


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: tables give every row all columns and every object all keys."""
    if isinstance(value, dict | list | tuple):
        return all(entry is None for entry in (value.values() if isinstance(value, dict) else value))
    return value is None or (isinstance(value, str) and value.strip() in ("", "null", "[]", "{}"))


def encodable(text: str, name: str, place: str) -> str:
    """The text, unless it holds half of a surrogate pair, which no tokenizer and no file can take."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: {name} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}); the text was cut "
                "inside an emoji, repair it or drop the row"
            ) from None
    return text


def contents(text: Text) -> list[str]:
    """The texts of a plain or conversational part."""
    return [text] if isinstance(text, str) else [message["content"] for message in text]


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message as a chat template takes it: text, parts of which some are text, or nothing."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        parts = (part.get("text") for part in content if isinstance(part, Mapping))
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def said(role: str, text: str) -> list[Message]:
    """A conversation of one message."""
    return [{"role": role, "content": text}]


def texts_within(value: Any) -> Iterator[str]:
    """Every text in a value of any shape; of a message only its content."""
    left = [value]
    while left:
        entry = left.pop()
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, Mapping):
            content = next((key for key in ("content", "value") if key in entry), None)
            left.extend(entry.values() if content is None else (entry[content],))
        elif isinstance(entry, list | tuple):
            left.extend(entry)
