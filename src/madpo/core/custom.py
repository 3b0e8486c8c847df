"""Classes of the user, named by where they are: "package.module:Class" or "path/to/file.py:Class".

The file that defines the class enters a configuration by its SHA-256, so that a changed class is another experiment.
The named code is imported and run when the configuration is made.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, Field, JsonValue, ValidationInfo, model_validator

from madpo.core.config import FOLDERS, Frozen
from madpo.core.errors import ConfigError

T = TypeVar("T", bound=BaseModel)


class NamedClass(Frozen):
    """The part of a configuration that names a class of the user, with its parameters."""

    target: str
    """"package.module:Class" or "path/to/file.py:Class"; a relative path starts at the working directory."""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of the class."""
    source_digest: str = ""
    """SHA-256 of the source file, filled in; a given one must match, so an old record is not rerun on new code."""
    base: ClassVar[type[BaseModel]]
    """What the class must be a subclass of, a configuration."""

    @model_validator(mode="before")
    @classmethod
    def _fill_digest(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("target"), str):
            return data
        target, given = data["target"], data.get("source_digest", "")
        where = target.rpartition(":")[0]
        # A configuration of others may not name files elsewhere.
        if info.context and FOLDERS in info.context and where.endswith(".py"):
            path, folders = Path(where).resolve(), info.context[FOLDERS]
            if not any(path.is_relative_to(folder.resolve()) for folder in folders):
                raise ConfigError(
                    f"target is {target!r}, which is neither next to the configuration nor in the working directory; "
                    "copy the file there, or name it on the command line (--set loss.target=...) where you trust it"
                )
        digest = hashlib.sha256(source_file(target).read_bytes()).hexdigest()
        if given and given != digest:
            raise ConfigError(
                f"the source of {target!r} has changed: its SHA-256 is {digest}, but source_digest is {given}; "
                "remove source_digest to use the present file"
            )
        return {**data, "source_digest": digest}

    @model_validator(mode="after")
    def _build(self) -> Self:
        self.built()  # so that bad parameters fail with the configuration
        return self

    def built(self) -> Any:
        """The named class with its parameters."""
        return named_class(self.target, self.source_digest, self.base).model_validate(self.parameters)


def source_file(target: str) -> Path:
    """The file that ``target`` names; its module is found, and not yet imported.

    Raises ConfigError: the target has no ":", or there is no such file or module.
    """
    where, colon, name = target.rpartition(":")
    if not (colon and where and name.isidentifier()):
        raise ConfigError(f'target is {target!r}, but must read "package.module:Class" or "path/to/file.py:Class"')
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise ConfigError(f"target is {target!r}, but there is no file {str(path.resolve())!r}")
        return path
    try:
        spec = importlib.util.find_spec(where)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"target is {target!r}, but module {where!r} cannot be found: {error}") from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(f"target is {target!r}, but there is no source file of a module {where!r}")
    return Path(spec.origin)


@lru_cache
def named_class(target: str, digest: str, base: type[T]) -> type[T]:
    """The subclass of ``base`` that ``target`` names; cached by the file's digest, so an edited file is loaded anew."""
    where, _, name = target.rpartition(":")
    module = load_file(Path(where), digest) if where.endswith(".py") else importlib.import_module(where)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"target is {target!r}, but {name!r} is no subclass of {base.__module__}.{base.__qualname__}")
    return found


def load_file(path: Path, digest: str) -> ModuleType:
    """Run a Python file as a module under a name of its own, known to sys.modules (pydantic looks there).

    Compiled anew: Python's own cache takes a file that was edited within a second for the one before.
    """
    module = ModuleType(f"madpo_custom_{digest[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(path.read_bytes(), path, "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module
