"""What a chat template may read besides role and content: keys of a message, and columns of its row."""

from __future__ import annotations

from typing import Any

CALLS = ("tool_calls", "function_calls", "function_call", "functions")
REASONING = ("reasoning_content", "reasoning", "thinking")
NAMES = ("name",)
KEYS = (*CALLS, *REASONING, *NAMES, "tool_call_id")
COLUMNS = ("tools", "chat_template_kwargs")


def without_filled_nulls(value: Any) -> Any:
    """A table's row without the nulls that tables write into objects where other rows have keys.

    A template would show them as arguments of a tool call. Only what these keys and columns hold is changed.
    """
    if isinstance(value, dict):
        return {
            k: _without_nulls(v) if k in KEYS or k in COLUMNS else without_filled_nulls(v) for k, v in value.items()
        }
    return [without_filled_nulls(entry) for entry in value] if isinstance(value, list) else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
