"""What commands report: text for a terminal, tables for pandas, HTML for a notebook."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from madpo.core.config import Frozen
from madpo.core.errors import ConfigError
from madpo.core.metrics import Estimate
from madpo.core.storage import write_atomically

if TYPE_CHECKING:
    import pandas as pd


class Report(Frozen):
    """Base of every command's report."""

    def text(self) -> str:
        """The report for a person."""
        raise NotImplementedError

    def frame(self, part: str | None = None) -> pd.DataFrame:
        """The numbers as a table.

        Args:
            part: a field with several entries, such as ``"trials"`` or ``"findings"``: one row each. None is a row for
                every number, with its 95 % interval where it has one.

        Raises:
            ConfigError: there is no such field.
        """
        import pandas as pd

        if part is None:
            rows = {
                name: (value.mean, value.low, value.high) if isinstance(value, Estimate) else (value, nan, nan)
                for name, value in _flat(self)
                if isinstance(value, Estimate | int | float) and not isinstance(value, bool)
            }
            return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"])
        entries = getattr(self, part, None)
        if not isinstance(entries, tuple) or not all(isinstance(entry, BaseModel) for entry in entries):
            parts = [
                name for name, value in self if isinstance(value, tuple) and value and isinstance(value[0], BaseModel)
            ]
            raise ConfigError(f"the report has no table {part!r}; it has {', '.join(parts) or 'none'}")
        return pd.DataFrame([_columns(entry) for entry in entries])

    def plain(self) -> dict[str, Any]:
        """All of it as JSON holds it; an estimate has its numbers by name."""
        return {name: _plain(value) for name, value in self}

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_atomically(path, json.dumps(self.plain(), indent=1, default=str) + "\n")

    def _repr_html_(self) -> str:
        table = self.frame().to_html(na_rep="", float_format="{:.4g}".format)
        return f"<pre>{escape(self.text())}</pre><details><summary>all numbers</summary>{table}</details>"


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted names; ``settings`` are what was asked for, and no result."""
    if isinstance(value, BaseModel):
        value = {name: entry for name, entry in value if name != "settings"}
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _flat(entry, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, BaseModel):
        return {name: _plain(entry) for name, entry in value}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _columns(entry: BaseModel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in _flat(entry):
        if isinstance(value, Estimate):
            found |= {name: value.mean, f"{name}.low": value.low, f"{name}.high": value.high}
        else:
            found[name] = value
    return found
