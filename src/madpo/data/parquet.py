"""Rows of Parquet files, in bounded memory.

A Parquet file stores a repeated value once: 1.5 kB can unpack to gigabytes in one batch of 256 rows. So for each row
group it is found out first how long a stored value and how long a list can be, which takes little memory, and then as
many rows are unpacked at once as fit.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo.core.errors import DataError, RowError, located
from madpo.data.raw import MAX_ROW, RawRow, Source, Wanted, refuse_repeats, short, without_filled_nulls

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_AT_ONCE = 64
UNPACKED = 256 * 2**20
"""Bytes that the rows which are unpacked at once may take; one row may take four times as much before it is refused."""
_MAX_VALUES = 2**26  # of one column in a row group; their positions are in memory at once
_MAX_RATIO = 1000  # of unpacked to packed bytes, beyond which long values are a bomb and no text
_LONG = 2**20


def parquet_source(name: str, path: Path, wanted: Wanted) -> Source:
    """A Parquet file, its ``wanted`` columns or all where that is None. Raises DataError: it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, pre_buffer=False)
        columns = tuple(file.schema_arrow.names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{name}: cannot be read as Parquet ({short(error)}); it is truncated or damaged, copy it again"
        ) from None
    refuse_repeats(name, columns)
    keep = wanted(columns) if callable(wanted) else wanted
    read = [column for column in columns if keep is None or column in keep]

    def rows() -> Generator[RawRow, None, None]:
        number = 0
        try:
            for group in range(file.num_row_groups):
                with located(f"{name}, row {number}"):
                    at_once = _rows_at_once(path, file, group, read)
                for batch in file.iter_batches(batch_size=at_once, row_groups=[group], columns=read):
                    for row in _plain(name, number, batch):
                        yield number, without_filled_nulls(row)
                        number += 1
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{name}, row {number}: reading broke off ({short(error)}); the file is damaged, copy it again"
            ) from None
        finally:
            file.close()

    return Source(name, "row", columns, rows())


def _plain(name: str, number: int, batch: pa.RecordBatch) -> Iterator[dict[str, Any] | DataError]:
    """The rows as Python values; a DataError in place of one that has none (a date after the year 9999)."""
    import pyarrow as pa

    if batch.nbytes <= MAX_ROW:
        try:
            yield from batch.to_pylist()
            return
        except (pa.ArrowException, ValueError, OverflowError):
            pass  # which row is it?
    for i in range(batch.num_rows):
        one = batch.slice(i, 1)
        if one.nbytes > MAX_ROW:
            yield DataError(f"{name}, row {number + i}: is longer than {MAX_ROW // 2**20} MB; drop the row")
            continue
        try:
            yield one.to_pylist()[0]
        except (pa.ArrowException, ValueError, OverflowError) as error:
            yield DataError(f"{name}, row {number + i}: a value cannot be read ({short(error)}); drop the row")


def _rows_at_once(path: Path, file: pq.ParquetFile, group: int, columns: Sequence[str]) -> int:
    """How many rows of a row group fit into the memory that unpacking may take.

    Raises RowError: a single row may not fit.
    """
    found = file.metadata.row_group(group)
    row = 0  # bytes that one row may unpack to, beyond what the file holds for it
    held = 0  # bytes that the file holds for all rows, unpacked
    most = ROWS_AT_ONCE
    for column in columns:
        own = [i for i in range(found.num_columns) if f"{found.column(i).path_in_schema}.".startswith(f"{column}.")]
        for leaf in (found.column(i) for i in own):
            packed, unpacked = leaf.total_compressed_size, leaf.total_uncompressed_size
            held += unpacked
            if unpacked > max(UNPACKED, _MAX_RATIO * packed, _LONG * leaf.num_values):
                raise RowError(
                    f"its column {column!r} unpacks {packed} bytes to {unpacked}, which is no text; do not use the file"
                )
            if leaf.num_values > max(_MAX_VALUES, found.num_rows):
                raise RowError(f"a row group has {leaf.num_values} values; write the file in smaller ones")
            if "DELTA_BYTE_ARRAY" in leaf.encodings:  # a value may repeat the beginning of one before it, at any length
                most = 1
        longest = sum(_longest_repeated(path, file, group, i) for i in own)
        if any(file.metadata.schema.column(i).max_repetition_level for i in own):
            values = max(found.column(i).num_values for i in own)
            if longest * values > UNPACKED // 4:  # otherwise all rows together fit, and need no closer look
                values = _most_values(
                    path, file, group, min(own, key=lambda i: found.column(i).total_uncompressed_size)
                )
            longest *= values
        row += longest
    if row > 4 * UNPACKED:
        raise RowError(
            f"one of the next {found.num_rows} rows may unpack to {row / 1e9:.1f} GB; write the file as JSON Lines if "
            "it is yours, or do not use it"
        )
    return max(1, min(most, UNPACKED // int(row + held // max(1, found.num_rows) + 1)))


def _longest_repeated(path: Path, file: pq.ParquetFile, group: int, leaf: int) -> int:
    """Bytes of the longest value that is stored once and may be in many places; 0 where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column, schema = file.metadata.row_group(group).column(leaf), file.metadata.schema.column(leaf)
    if not any("DICTIONARY" in encoding for encoding in column.encodings):
        return 0
    if schema.physical_type == "FIXED_LEN_BYTE_ARRAY":
        return int(schema.length)
    if schema.physical_type != "BYTE_ARRAY":
        return 0
    for _, values in _leaves(path, file, group, leaf, ROWS_AT_ONCE):
        if not pa.types.is_dictionary(values.type):
            return 0  # a number of many digits
        if len(values.dictionary):  # until then all are null or lists without entries
            return int(pc.max(pc.binary_length(values.dictionary)).as_py() or 0)
    return 0


def _most_values(path: Path, file: pq.ParquetFile, group: int, leaf: int) -> int:
    """The most values of a list column that one row of a row group has."""
    import numpy as np

    batches = _leaves(path, file, group, leaf, 4096)
    return max((int(np.bincount(rows).max(initial=0)) for rows, _ in batches), default=0)


def _leaves(path: Path, file: pq.ParquetFile, group: int, leaf: int, at_once: int) -> Iterator[tuple[Any, pa.Array]]:
    """The row of each value of one leaf, and the values; one that is stored once takes its place in memory once."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    name = file.metadata.schema.column(leaf).path
    with pq.ParquetFile(path, pre_buffer=False, read_dictionary=[name], metadata=file.metadata) as own:
        for batch in own.iter_batches(batch_size=at_once, row_groups=[group], columns=[name]):
            rows, values = np.arange(batch.num_rows), batch.column(0)
            while values.type.num_fields:  # into lists and structs
                if pa.types.is_struct(values.type):
                    values = values.field(0)
                    continue
                if pa.types.is_map(values.type):
                    values = values.cast(pa.list_(pa.struct([values.type.key_field, values.type.item_field])))
                rows = np.repeat(rows, pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False))
                values = values.flatten()
            yield rows, values
