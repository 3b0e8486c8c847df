"""What a sentence about a mistake must name: the place, the value and the remedy. How it is worded is free."""

import contextlib
import re
from collections.abc import Iterator

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
    """Check that a text names files, rows, fields, values: each as a whole, so 3 is in "row 3", not in "row 13"."""
    absent = [str(thing) for thing in named if not _whole(str(thing)).search(text)]
    if absent:
        raise AssertionError(f"{absent} are not named in: {text}")


def _whole(thing: str) -> re.Pattern[str]:
    before = r"(?<!\w)(?<!\d\.)" if re.match(r"\w", thing) else ""
    after = r"(?!\w|\.\d)" if re.search(r"\w\Z", thing) else ""
    return re.compile(before + re.escape(thing) + after)
