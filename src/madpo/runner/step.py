"""A step: an operation with its configuration and inputs, and the identity that follows from them.

The identity (:attr:`Step.decisive`) decides whether a result is done, or an unfinished one may go on. It needs no
library and is the same on every machine.

``madpo run`` compares it step by step: a step whose identity changed is made in a folder of its own, with all that
follow from it, and the others are kept. May change: where and how steps run (executor, ``--jobs``, machine, threads),
which are chosen, and fields that say how and not what (``exclude=True``, such as micro-batches and ``report_to``).
A command of one operation, such as ``madpo train``, refuses a folder with another identity, with the first difference.

A checkpoint inside a step has an identity of its own, which also holds the weights, the device, the precision and the
number of processes: ``training/digests.py``, which says what may change in ``madpo train``.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from madpo.core.config import identity_settings
from madpo.core.errors import ConfigError
from madpo.core.metrics import Metrics
from madpo.core.storage import expanded
from madpo.runner.operation import operation_name
from madpo.runner.record import NAME, libraries

OperationFn = Callable[[Any, Mapping[str, Path], Path], Metrics]


@dataclass(frozen=True)
class Source:
    """An input that no step makes: a file or a folder of the user, or a name on the hub.

    Attributes:
        place: where it is, as the user named it.
        identity: what its content is: a digest, or the name on the hub.
    """

    place: str
    identity: str

    def folder(self, root: Path) -> Path:
        """Where it is; the same for every ``root``."""
        return expanded(self.place)


@dataclass(frozen=True, eq=False)
class Step:
    """One unit of work: ``fn(config, inputs, out) -> metrics``.

    Attributes:
        name: readable and unique, the path of its folder ("policy/high/madpo/seed0").
        fn: a module-level function decorated with :func:`madpo.runner.operation.operation`; it reads ``config`` and its
            inputs' folders and writes only into ``out``.
        config: every literal that bears on the result, the seed included.
        inputs: role -> upstream step, or what the user gave.
        says: plain words for the person who watches; outside the identity.
        groups: names that ``only`` can choose the step by; outside the identity.
        light: it needs a core and no accelerator; outside the identity.
    """

    name: str
    fn: OperationFn
    config: BaseModel
    inputs: Mapping[str, "Step | Source"] = field(default_factory=dict)
    says: str = ""
    groups: tuple[str, ...] = ()
    light: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name) or ".." in self.name.split("/"):
            raise ValueError(f"step name {self.name!r}: letters, digits and _.+=- between slashes only")
        if "<" in self.fn.__qualname__:
            raise ValueError(f"step {self.name}: {self.fn.__qualname__} must be a function at module level")
        operation_name(self.fn)

    @property
    def operation(self) -> str:
        """The stable name of the function, with its version: "train_policy/1"."""
        return operation_name(self.fn)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration as it enters the identity; see :func:`madpo.core.config.identity_settings`."""
        _refuse_paths(self.config.model_dump(), self.name)
        return identity_settings(self.config)

    @property
    def decisive(self) -> dict[str, Any]:
        """Everything that bears on the result, as plain values.

        The operation's name with its version; the configuration, resolved, without fields of ``exclude=True`` and
        without :func:`madpo.core.config.added` ones at their default; the content of every input; the versions of
        torch, transformers, TRL and PEFT. Other libraries, the processor and its threads go into the record only.
        """
        return {
            "operation": self.operation,
            "config": self.settings,
            "inputs": {role: given.identity for role, given in self.inputs.items()},
            "libraries": libraries(),
        }

    @property
    def upstream(self) -> "dict[str, Step]":
        """The inputs that other steps make."""
        return {role: given for role, given in self.inputs.items() if isinstance(given, Step)}

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of everything that bears on the result."""
        text = json.dumps(self.decisive, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def folder(self, root: Path) -> Path:
        """Where the step works."""
        return root / f"{self.name}-{self.identity[:8]}"


def ordered(steps: Iterable[Step]) -> list[Step]:
    """All steps with their upstreams, upstreams first, otherwise in the given order; each name once.

    Raises ConfigError: two different steps have one name.
    """
    order: dict[str, Step] = {}

    def visit(step: Step) -> None:
        known = order.get(step.name)
        if known is not None:
            if known.identity != step.identity:
                raise ConfigError(f"two different steps are both called {step.name!r}; give each its own name")
            return
        for upstream in step.upstream.values():
            visit(upstream)
        order.setdefault(step.name, step)

    for step in steps:
        visit(step)
    return list(order.values())


def needed_by(chosen: Iterable[Step], steps: Iterable[Step]) -> list[Step]:
    """The chosen steps and their upstreams, in the order that they have in ``steps``."""
    names = {step.name for step in ordered(chosen)}
    return [step for step in steps if step.name in names]


def _refuse_paths(value: object, name: str, key: str = "config") -> None:
    if isinstance(value, os.PathLike):
        raise TypeError(f"step {name}: {key} is a path, and paths bear no identity: exclude it and add a digest")
    if isinstance(value, Mapping):
        for inner, item in value.items():
            _refuse_paths(item, name, f"{key}.{inner}")
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _refuse_paths(item, name, key)
