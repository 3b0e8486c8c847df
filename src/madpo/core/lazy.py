"""What loads on first use: the names of a package (PEP 562), and torch in modules that only describe computations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


def attach(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names load from other modules.

    Args:
        package: its ``__name__``.
        homes: public name -> "module", or "module:name" where the module calls it otherwise.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, inside = homes[name].partition(":")
        return getattr(import_module(module), inside or name)

    return load, lambda: sorted({*vars(import_module(package)), *homes})


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what tools ask of any module
            raise AttributeError(name)
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING:
    import torch as torch
    import torch.nn.functional as F
else:
    torch, F = _Lazy("torch"), _Lazy("torch.nn.functional")

__all__ = ["F", "attach", "torch"]
