"""Raw rows: what every format of preference data gives, numbers in them, and how a message shows a wrong value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Generator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from madpo.core.errors import DataError, RowError, printable, shortened

MAX_ROW = 64 * 2**20
"""Bytes of one row: more is a file without line ends or an unpacked bomb, not a preference pair."""

# What a chat template may read other than role and content: keys of a message, and columns of its row.
CALLS = ("tool_calls", "function_calls", "function_call", "functions")
REASONING = ("reasoning_content", "reasoning", "thinking")
NAMES = ("name",)
KEYS = (*CALLS, *REASONING, *NAMES, "tool_call_id")
COLUMNS = ("tools", "chat_template_kwargs")

_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?")

At = Callable[[int], str]
"""The place of a row by its number, for messages: ``pairs.jsonl, line 7``."""
RawRow = tuple[int, "dict[str, Any] | DataError"]
Wanted = Container[str] | Callable[[Sequence[str]], Container[str]] | None
"""Columns to read, or a function that chooses them from all; None reads all."""


@dataclass(frozen=True)
class Source:
    """An opened data set.

    Attributes:
        name: as the user wrote it, printable; begins every message.
        unit: "line" (lines of text, the first is 1, as in an editor) or "row" (tables and JSON arrays, the first is 0,
            as in an index).
        columns: names of a table's columns; None where every row brings its own keys.
        rows: (number in ``unit``, the row or what is wrong with it).
    """

    name: str
    unit: Literal["line", "row"]
    columns: tuple[str, ...] | None
    rows: Generator[RawRow, None, None]

    def at(self, number: int) -> str:
        """As :data:`At`."""
        return f"{self.name}, {self.unit} {number}"


def refuse_repeats(name: str, columns: Sequence[str]) -> None:
    """Refuse a table with two columns of one name (DataError)."""
    if (column := repeated(columns)) is not None:
        raise DataError(f"{name}: the column {described_name(column)} is there twice; keep one of the two")


def repeated(names: Sequence[str]) -> str | None:
    """The first name that is there a second time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def null(name: str) -> RowError:
    """The mistake of a field that says nothing."""
    return RowError(f"{name} is null; fill it in or drop the row")


def lacks(name: str) -> RowError:
    """The mistake of a row without a field that the first row has."""
    return RowError(f"lacks the field {name!r}, which the first row has; fill it in or drop the row")


def surplus(name: str) -> RowError:
    """The mistake of a row with a field that the first row lacks."""
    return RowError(f"has the field {name!r}, which the first row lacks; give it in every row or in none")


def described(value: object) -> str:
    """A value of the wrong type, for a message: what it is, and its beginning."""
    if value is None:
        return "null"
    kinds = ((bool, "true/false"), (int | float, "a number"), (str, "text"), (list | tuple, "a list"))
    kind = next((word for types, word in kinds if isinstance(value, types)), None)
    if kind is None:
        kind = "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"
    return f"{short(value)} ({kind})"


def described_name(name: str) -> str:
    """A name of a column or key, quoted, at most 80 characters of it."""
    return repr(shortened(name, 80))


def short(value: object) -> str:
    """The beginning of a value, or of the message of an error, in one printable line."""
    # Only the beginning is rendered: a field may be megabytes long.
    if isinstance(value, str):
        return repr(shortened(value, 43))
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a whole number of more than 40 digits"
    if isinstance(value, list | tuple | dict):
        return f"{len(value)} entries" if value else "empty"
    text = printable((str(value).splitlines() or [""])[0]) or type(value).__name__
    return shortened(text, 160)


def as_number(value: Any, name: str, *, from_text: bool = False) -> float:
    """A finite number; text counts only where the format has nothing else (CSV). Raises RowError."""
    number = value
    if isinstance(value, str) and from_text:
        try:
            number = float(value)
        except ValueError:
            raise RowError(f"{name} is {described(value)}, not a number; {_remedy(value)}") from None
    if isinstance(number, bool) or not isinstance(number, int | float | Decimal):
        hint = _remedy(value, quoted=True) if isinstance(value, str) else "give a number"
        raise RowError(f"{name} is {described(value)}, not a number; {hint}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(f"{name} is {number}, but must be finite; score the pair again or drop the row")
    return number


def _remedy(text: str, *, quoted: bool = False) -> str:
    """What to do with a text in the place of a number."""
    if _NUMBER.fullmatch(text.strip()):
        marks = ["commas"] * ("," in text) + ["quotes"] * quoted  # a comma may be a decimal point or between thousands
        return f"write it {'like 1234.5, ' * ('commas' in marks)}without {' and '.join(marks)}"
    return "correct or drop the row"


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
