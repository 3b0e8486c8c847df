"""The stable name of an operation: what a step's identity calls its function by."""

import re
from collections.abc import Callable
from typing import TypeVar

_Fn = TypeVar("_Fn", bound=Callable[..., object])
_STABLE = re.compile(r"[a-z][a-z0-9_]*/[0-9]+")


def operation(name: str) -> Callable[[_Fn], _Fn]:
    """Declare a function as an operation with a stable name and a version, such as ``"train_policy/2"``.

    The name enters the identity of every step that runs the function, so code can move without making finished results
    stale. Raise the version when the meaning of the function changes. Raises ValueError: the name has another form.
    """
    if not _STABLE.fullmatch(name):
        raise ValueError(f"operation {name!r}: write a name and a version, such as 'train_policy/1'")

    def declare(fn: _Fn) -> _Fn:
        fn.operation = name  # type: ignore[attr-defined]
        return fn

    return declare


def operation_name(fn: Callable[..., object]) -> str:
    """The name that :func:`operation` gave to the function. Raises ValueError: it has none."""
    name = getattr(fn, "operation", None)
    if not isinstance(name, str):
        raise ValueError(f"{fn.__module__}.{fn.__qualname__} has no stable name; decorate it with @operation('name/1')")
    return name
