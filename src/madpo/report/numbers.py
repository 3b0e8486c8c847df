"""Numbers as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from madpo.core.metrics import Estimate

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
_ROUNDING = 1e-9  # what rounding leaves of a difference that is none


def one(value: float, how: str = "number", digits: int = 2) -> str:
    """One number with a true minus sign; ``how``: "number", "signed" or "share" (percent)."""
    if not math.isfinite(value):
        return DASH
    if how == "share":
        return f"{100 * value:.0f} %"
    if abs(value) < _ROUNDING:
        value = 0.0
    sign = "+" if how == "signed" else ""
    small = 0 < abs(value) < 0.5 * 10.0**-digits
    return format(value, f"{sign}.1g" if small else f"{sign}.{digits}f").replace("-", MINUS)


def interval(value: Estimate, how: str = "number", digits: int = 2) -> str:
    """``2.41 to 2.65``."""
    return f"{one(value.low, how, digits)} to {one(value.high, how, digits)}"


def short(value: Estimate | float | None, how: str = "number", digits: int = 2) -> str:
    """``2.53 (2.41 to 2.65)``, or the number, or a dash."""
    if isinstance(value, Estimate):
        return f"{one(value.mean, how, digits)} ({interval(value, how, digits)})"
    return DASH if value is None else one(value, how, digits)


def write(value: Estimate | float | None, how: str = "number", digits: int = 2) -> str:
    """``2.53 (95 % interval 2.41 to 2.65)``."""
    text = short(value, how, digits)
    return text.replace("(", "(95 % interval ", 1) if isinstance(value, Estimate) else text


def by_seed(values: Mapping[str, float], how: str = "number") -> str:
    """ "seed0 1.42, seed1 1.39"."""
    return ", ".join(f"{seed} {one(value, how)}".strip() for seed, value in values.items())


def format_list(names: Sequence[str]) -> str:
    """ "High, Medium and Low"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def count(n: int, noun: str) -> str:
    """ "two settings"."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return f"{words[n] if n < len(words) else n} {noun}{'' if n == 1 else 's'}"


def side(value: Estimate, level: float = 0.0) -> str:
    """ "above" or "below" a level with the whole interval, else "open"."""
    return "above" if value.low > level else "below" if value.high < level else "open"


def against(value: Estimate, level: float, name: str) -> str:
    """ "above chance", "below chance", or "not separated from chance", by the whole interval."""
    return f"{side(value, level).replace('open', 'not separated from')} {name}"
