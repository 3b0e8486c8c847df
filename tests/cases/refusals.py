"""What a sentence about a mistake must name: the place, the value and the remedy. How it is worded is free."""

import contextlib
import re
from collections.abc import Iterator
from itertools import permutations

import pytest


@contextlib.contextmanager
def refused(
    error: type[Exception] | tuple[type[Exception], ...], *named: object
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """A block that ends with this error, whose text names all of these."""
    with pytest.raises(error) as caught:
        yield caught
    names(str(caught.value), *named)


def names(text: str, *named: object) -> None:
    """Check that a text names files, rows, fields, values: each as a whole, so 3 is in "row 3", not in "row 13".

    A tuple is what belongs together: a field and its value, near each other in any order.
    """
    if absent := _absent(text, named):
        raise AssertionError(f"{absent} are not named in: {text}")


def _absent(text: str, named: tuple[object, ...]) -> list[object]:
    return [thing for thing in named if not any(re.search(form, text) for form in _forms(thing))]


def _forms(thing: object) -> list[str]:
    if not isinstance(thing, tuple):
        return [_whole(str(thing))]
    return [r"[^;]{0,60}?".join(order) for order in permutations(_whole(str(part)) for part in thing)]


def _whole(thing: str) -> str:
    before = r"(?<!\w)(?<!\d\.)" if re.match(r"\w", thing) else ""
    after = r"(?!\w|\.\d)" if re.search(r"\w\Z", thing) else ""
    return before + re.escape(thing) + after
