"""Rows of any shape, with the columns that the user's data has, into JSON Lines and Parquet."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from madpo.core.errors import DataError, first_line

Raw = dict[str, Any]
Placed = tuple[str, Raw]
"""A row, and its place for messages."""


def write_parquet(path: Path, rows: Iterator[Placed], group_size: int) -> None:
    """Write rows as Parquet, whose columns are those of the first ``group_size`` rows.

    Raises:
        DataError: a column cannot be written, or a later row has one that the first rows lack.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        while group := list(islice(rows, group_size)):
            schema: Any = None if writer is None else writer.schema
            if schema is None:
                names = list(dict.fromkeys(name for _, row in group for name in row))
            for place, row in group:
                if late := [name for name in row if schema is not None and name not in names]:
                    raise DataError(
                        f"{place}: has the column {late[0]!r}, which none of the rows before has, and Parquet cannot "
                        "add it; use --format jsonl, or give it in the first row"
                    )
            kinds = {name: None if schema is None else schema.field(name).type for name in names}
            table = pa.table({name: _column(group, name, kind) for name, kind in kinds.items()}, schema=schema)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise DataError(
            f"a column cannot be written as Parquet ({first_line(error, 120)}); use --format jsonl"
        ) from None
    finally:
        if writer is not None:
            writer.close()


def _column(group: Sequence[Placed], name: str, kind: Any) -> Any:
    """A column of some rows as Arrow holds it, null where a row lacks it."""
    import pyarrow as pa

    try:
        return pa.array([row.get(name) for _, row in group], type=kind)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{group[0][0]}, or after it: the column {name!r} cannot be written as Parquet "
            f"({first_line(error, 120)}); use --format jsonl, or drop the column"
        ) from None


def json_line(place: str, row: Raw) -> bytes:
    """A row as a line of JSON, which has no word for a number that is not finite: null."""
    try:
        line = _dumped(row)
    except (TypeError, ValueError, RecursionError):
        parts = []
        for name, value in row.items():
            try:
                parts.append(f"{_dumped(name)}: {_dumped(_finite(value))}")
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(
                    f"{place}: the column {name!r} cannot be written as JSON ({first_line(error, 120)}); use --format "
                    "parquet, or drop the column"
                ) from None
        line = f"{{{', '.join(parts)}}}"
    try:
        return line.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in a column that nothing reads: as it came, escaped
        return json.dumps(json.loads(line)).encode() + b"\n"


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_json, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float | np.floating) and not math.isfinite(value) else value


def _json(value: object) -> Any:
    if isinstance(value, datetime.date | datetime.datetime):
        return value.isoformat()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"it holds a value of type {type(value).__name__}")
