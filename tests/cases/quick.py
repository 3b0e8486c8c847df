"""Which of many parameters ``make test`` takes; ``make check`` takes all."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], *fast: Any) -> list[Any]:
    """The values as parameters, all but ``fast`` marked slow; a tuple has a value for each of several names."""
    values = list(values)
    assert all(value in values for value in fast), fast
    mark = {True: (), False: pytest.mark.slow}
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=mark[v in fast]) for v in values]
