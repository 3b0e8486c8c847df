"""Numbers out of raw rows."""

from __future__ import annotations

import math
from typing import Any

from madpo.core.errors import DataError
from madpo.data.raw import described


def as_number(value: Any, name: str, place: str, *, from_text: bool = False) -> float:
    """A finite number, or a DataError; text counts only where the format has nothing else (CSV)."""
    number = value
    if isinstance(value, str) and from_text:
        try:
            number = float(value)
        except ValueError:
            raise DataError(
                f"{place}: {name} is {described(value)}, not a number; correct it or drop the row"
            ) from None
    if isinstance(number, bool) or not isinstance(number, int | float):
        hint = "write it without quotes" if isinstance(value, str) else "give a number"
        raise DataError(f"{place}: {name} is {described(value)}, not a number; {hint}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{place}: {name} is {number}, but must be finite; score the pair again or drop the row")
    return number
