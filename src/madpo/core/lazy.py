"""What loads on first use: the names of a package (PEP 562), and torch in modules that only describe computations."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names load on first use.

    The names are those that its ``__init__.py`` imports under ``TYPE_CHECKING``: written once, where type checkers read
    them.
    """
    tree = ast.parse(inspect.getsource(sys.modules[package]))
    imports = (node for branch in tree.body if isinstance(branch, ast.If) for node in branch.body)
    homes = {
        name.asname or name.name: (str(node.module), name.name)
        for node in imports
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, inside = homes[name]
        return getattr(import_module(module), inside)

    return load, lambda: sorted({*vars(sys.modules[package]), *homes}), sorted(homes)


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
