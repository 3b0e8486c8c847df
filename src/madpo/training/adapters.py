"""Adapter configurations that are written in the same bytes by every process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


class SortedSet(set[str]):
    """A set that is iterated in order.

    PEFT keeps target modules in a set and writes it as a list. The order of a plain set of strings follows the hash
    seed of the process, so that equal trainings would leave different bytes in ``adapter_config.json``.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))


def sort_sets(adapter: Any) -> None:
    """Give an adapter's configuration (a ``PeftConfig``) sorted sets, in place."""
    for field in dataclasses.fields(adapter):
        value = getattr(adapter, field.name)
        if isinstance(value, set) and all(isinstance(item, str) for item in value):
            setattr(adapter, field.name, SortedSet(value))
