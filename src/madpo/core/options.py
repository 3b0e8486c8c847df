"""How a field of a configuration is spelled on the command line, where its dotted name does not say all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cli:
    """A note for ``Annotated[TYPE, Cli(...)]``; without one, the field ``a.b`` is the option ``--a.b``.

    Attributes:
        also: further names of the option, next to the field's own.
        bare: further names of the option, without the names of tables.
        positional: the value is also taken without the option's name.
        short: of a table: the fields in it are options without the table's name as well.
        keys: of a free table: key -> the type of its value; empty where any key may be given.
        about: of a free table: key -> what the help says of it.
        names: of a free table: further option -> the key that it sets.
        refused: of a free table: key -> why it cannot be set.
    """

    also: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    positional: bool = False
    short: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
