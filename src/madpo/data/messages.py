"""Text and messages: what a field of a row may hold."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from madpo.core.errors import RowError, first_line
from madpo.data.raw import CALLS, KEYS, described

Message = dict[str, Any]
"""``role`` and ``content``, both text, and of the keys that chat templates read those that hold something."""
Text = str | list[Message]

TRANSCRIPT = re.compile(r"\s*(?:Human|H):")
"""How a conversation that is written as one text begins, such as Anthropic's."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SYSTEM_ROLES = ("system", "developer")
# Roles and keys of other formats (ShareGPT, Open Assistant).
ASSISTANT = ("assistant", "gpt", "bot", "model", "chatgpt")
_RENAME = {"human": "user", "prompter": "user"} | dict.fromkeys(ASSISTANT[1:], "assistant")


def answered(prompt: Text, response: str) -> Text:
    """A response in the form of its prompt."""
    return response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]


def as_text(value: Any, name: str) -> Text:
    """A field of a row: text, or messages (text parts of a message joined).

    One message without a list around it is a conversation of one. Raises RowError: anything else.
    """
    if isinstance(value, str):
        return encodable(value, name)
    if isinstance(value, dict):
        return [_message(value, name)]
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} is {described(value)}, not text; give text or a list of messages")
    if not value:
        raise RowError(f"{name} is a list without messages; fill it in or drop the row")
    return [_message(m, f"{name}[{i}]") for i, m in enumerate(value)]


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        entry = "" if not isinstance(value, str) else ", or name one of several texts: --columns.rejected rejected.0"
        raise RowError(f"{name} is {described(value)}, not a message; give an object with role and content{entry}")
    value = with_our_keys(value)
    more = template_keys(value, name)
    if more and value.get("content") is None:  # a tool call or a thought without words
        value = {**value, "content": ""}
    if "role" not in value or "content" not in value:
        keys = ", ".join(repr(str(key)[:40]) for key in list(value)[:6]) or "nothing"
        raise RowError(f"{name} has {keys}, not role and content; give both role and content")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise RowError(f"{name}.role is {described(role)}; use one of {', '.join(ROLES)}")
    if isinstance(content, list):  # parts, as multimodal templates write them
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise RowError(f"{name}.content holds parts that are not text; only text can be trained on here")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowError(f"{name}.content is {described(content)}, not text; fill it in or drop the row")
    return {"role": role, "content": encodable(content, f"{name}.content"), **more}


def with_our_keys(message: dict[str, Any]) -> dict[str, Any]:
    """A message with ``role`` and ``content``, also where it has ShareGPT's keys or Open Assistant's."""
    if "role" in message and "content" in message and message["role"] in ROLES:
        return message
    found = dict(message)
    for ours, others in (("role", ("from",)), ("content", ("value", "text"))):
        if ours not in found and (theirs := next((key for key in others if key in found), None)):
            found[ours] = found.pop(theirs)
    role = found.get("role")
    return found | {"role": _RENAME[role.lower()]} if isinstance(role, str) and role.lower() in _RENAME else found


def template_keys(message: Mapping[str, Any], name: str) -> Message:
    """What a chat template may read of a message, other than role and content; keys that say nothing are left out.

    Raises RowError.
    """
    found = {}
    for key in KEYS:
        if is_blank(message.get(key)):
            continue
        where, value = f"{name}.{key}", message[key]
        if key in CALLS:
            value = as_json(value, where)
            calls = value if isinstance(value, list | tuple) else [value]
            if not all(isinstance(call, Mapping) for call in calls):
                raise RowError(f"{where} is {described(value)}; give a list of calls, each an object")
        elif not isinstance(value, str):
            raise RowError(f"{where} is {described(value)}, not text; correct it or remove the key")
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RowError(f"{where} is no JSON ({first_line(error, 120)}); correct it") from None
        encodable(text, where)
        found[key] = value
    return found


def as_json(value: Any, name: str) -> Any:
    """A value that data sets keep as an object, or as the text of its JSON.

    Raises RowError: it is text, and no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{name} is text, but no JSON ({first_line(error, 120)}); correct it") from None


def decoded(value: Any, name: str) -> Any:
    """A value, or what its text spells, as JSON or Python has it. Raises RowError: neither reads it."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return as_json(value, name)
    except RowError:
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(value.strip())  # what pandas writes of a list into CSV
        raise


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: tables give every row all columns and every object all keys."""
    if isinstance(value, dict | list | tuple):
        return all(entry is None for entry in (value.values() if isinstance(value, dict) else value))
    return value is None or (isinstance(value, str) and value.strip() in ("", "null", "[]", "{}"))


def encodable(text: str, name: str) -> str:
    """The text, unless it holds half of a surrogate pair, which no tokenizer and no file can take."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                f"{name} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}); the text was cut "
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


def is_silent(text: Text) -> bool:
    """Whether a part has no text but white space, and no tool call or thought either."""
    return not "".join(contents(text)).strip() and (isinstance(text, str) or all(len(m) == 2 for m in text))


def shown(value: Any) -> str:
    """A part of a pair, or what a key of a message holds, for a person: a message's further keys as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(m, Mapping) and "role" in m for m in value):
        return "\n".join(f"{m['content']} {shown({k: m[k] for k in KEYS if k in m})}".strip() for m in value)
    if not value:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str)


def said(role: str, text: str) -> list[Message]:
    """A conversation of one message."""
    return [{"role": role, "content": text}]


def shared_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the shared beginning of two texts or lists; by bisection, since slices compare fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


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


def role_of(message: Mapping[str, Any]) -> Any:
    """Who speaks in a message that nobody has read yet, of ours or of ShareGPT's form."""
    return message.get("role", message.get("from"))


def alike(chosen: Any, rejected: Any) -> tuple[Any, Any]:
    """Both sides as conversations of one length, where one is a whole conversation and the other its last answer."""
    if _is_whole(chosen):
        return chosen, _with_last(chosen, rejected)
    return (_with_last(rejected, chosen), rejected) if _is_whole(rejected) else (chosen, rejected)


def _is_whole(side: Any) -> bool:
    return isinstance(side, list) and len(side) > 1 and isinstance(side[0], dict) and role_of(side[0]) not in ASSISTANT


def _with_last(whole: list[Any], last: Any) -> Any:
    if isinstance(last, str):
        return [*whole[:-1], *said("assistant", last)]
    if isinstance(last, dict):
        last = [last]
    one = isinstance(last, list) and len(last) == 1 and isinstance(last[0], dict) and role_of(last[0]) in ASSISTANT
    return [*whole[:-1], *last] if one else last
