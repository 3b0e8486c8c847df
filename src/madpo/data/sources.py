"""Raw rows out of files, one at a time: JSON Lines, CSV, Parquet, saved data sets and data sets of the hub.

Nothing is kept: a million rows pass through in constant memory. A mistake of one row is yielded beside its
number, so that the reader can count them all; a mistake of the file ends the reading with a DataError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from madpo.core.errors import DataError, printable
from madpo.data.saved import refuse_files_outside, saved_splits, unopened

MAX_LINE = 64 * 2**20  # bytes of one row: more is a file without line ends, not a preference pair
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_MAGIC = {
    b"PAR1": "is a Parquet file; rename it to end in .parquet",
    b"PK\x03\x04": "is a ZIP archive (or an Excel file); unpack it or save it as .csv or .jsonl",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it first (zstd -d)",
    b"BZh": "is compressed with bzip2; unpack it first (bunzip2)",
    b"\xfd7zXZ": "is compressed with xz; unpack it first (unxz)",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
    b"\x00\x00\xfe\xff": "is UTF-32 text; save it as UTF-8",
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.+-]+)?")

RawRow = tuple[int, "dict[str, Any] | DataError"]


@dataclass(frozen=True)
class Source:
    """An opened data set.

    Attributes:
        name: as the user wrote it, printable; begins every message.
        unit: "line" (text files, the first is 1, as in an editor) or "row" (tables, the first is 0, as in an index).
        columns: names of a table's columns; None where every row brings its own keys.
        rows: (number in ``unit``, the row or what is wrong with it).
    """

    name: str
    unit: Literal["line", "row"]
    columns: tuple[str, ...] | None
    rows: Generator[RawRow, None, None]

    def at(self, number: int) -> str:
        """The place of a row, as messages begin: ``pairs.jsonl, line 7``."""
        return f"{self.name}, {self.unit} {number}"


def open_source(data: str | Path, *, wanted: Sequence[str] | None = None) -> Source:
    """Open a file, a folder written by ``save_to_disk``, or a hub data set ("owner/name" or "owner/name:split").

    Args:
        data: path or hub name. A path that exists wins.
        wanted: columns to read from Parquet, where each costs time; None reads all.

    Raises:
        DataError: there is no such file, it cannot be read, or it is not what its name says.
    """
    name = printable(str(data))
    if not str(data) or "\0" in str(data):
        raise DataError(
            f"{name!r} is no path; give a .jsonl, .parquet or .csv file or a hub data set such as owner/name"
        )
    path = Path(data).expanduser()
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if _is_hub_name(data):
            return _hub(name)
        raise DataError(
            f"{name}: there is no such file; check the path, or give a hub data set as owner/name"
        ) from None
    except OSError as error:
        raise DataError(f"{name}: cannot be opened ({error.strerror}); give the path of a readable file") from None
    if stat.S_ISDIR(mode):
        return _saved(name, path)
    if not stat.S_ISREG(mode):
        raise DataError(f"{name}: is not a regular file (a pipe or a device); write the data to a file first")
    return _file(name, path, wanted)


def look_at(data: str | Path) -> None:
    """Refuse a file that :func:`open_source` would refuse at once, without reading rows or loading what reads the hub.

    Raises:
        DataError: as :func:`open_source`.
    """
    path = Path(data).expanduser()
    if os.path.isdir(path):
        _refuse_other_folders(printable(str(data)), path)
    elif not _is_hub_name(data):
        open_source(data).rows.close()


def _is_hub_name(data: str | Path) -> bool:
    path = Path(data).expanduser()
    known = path.suffix in {*FORMATS, ".gz"} or os.path.exists(path)
    return isinstance(data, str) and _HUB_NAME.fullmatch(data) is not None and not known


def _file(name: str, path: Path, wanted: Sequence[str] | None) -> Source:
    suffixes = [s.lower() for s in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if zipped else suffixes)[-1:] or [""]
    kind = FORMATS.get(suffix[0])
    if kind is None:
        raise DataError(f"{name}: the ending {suffix[0]!r} says no format; rename it to .jsonl, .parquet or .csv")
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); make it readable for you") from None
    if not head:
        raise DataError(f"{name}: the file is empty; give a file with at least one pair")
    if kind == "parquet":
        if not head.startswith(b"PAR1"):
            raise DataError(f"{name}: is no Parquet file (it does not begin with PAR1); write it again or rename it")
        return _parquet(name, path, wanted)
    for magic, remedy in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{name}: {remedy}")
    if zipped != head.startswith(b"\x1f\x8b"):
        remedy = (
            "ends in .gz but is not gzip; rename it" if zipped else "is compressed with gzip; rename it to end in .gz"
        )
        raise DataError(f"{name}: {remedy}")
    lines = _lines(name, path, zipped)
    if kind == "jsonl":
        return Source(name, "line", None, _json_rows(name, lines))
    return _csv(name, lines, "\t" if suffix[0] == ".tsv" else ",")


def _lines(name: str, path: Path, zipped: bool) -> Generator[tuple[int, bytes], None, None]:
    """(line number from 1, bytes with the line end), a UTF-8 byte-order mark taken off."""
    number = 0
    try:
        with gzip.open(path, "rb") if zipped else path.open("rb") as file:
            assert isinstance(file, io.BufferedIOBase)
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise DataError(
                        f"{name}, line {number}: is longer than {MAX_LINE // 2**20} MB; write one pair on each line"
                    )
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{name}: reading broke off after line {number} ({error}); the file is truncated or damaged, copy it again"
        ) from None


def decoded(name: str, number: int, line: bytes) -> str:
    """The line as text, or a DataError that names the byte."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}, line {number}: byte {error.start} (0x{line[error.start]:02x}) is not UTF-8; "
            "save the file as UTF-8 text"
        ) from None
    if "\0" in text:
        raise DataError(f"{name}, line {number}: holds a NUL byte; the file is binary or UTF-16, save it as UTF-8 text")
    return text


def _json_rows(name: str, lines: Generator[tuple[int, bytes], None, None]) -> Generator[RawRow, None, None]:
    first = True
    with closing(lines):
        for number, line in lines:
            try:
                text = decoded(name, number, line)
            except DataError as mistake:
                yield number, mistake
                continue
            if not text.strip():
                continue
            if first and text.lstrip().startswith("["):
                raise DataError(
                    f"{name}: is a JSON array; write one object on each line (jq -c '.[]' old.json > new.jsonl)"
                )
            first = False
            yield number, _json_row(f"{name}, line {number}", text)


class _RepeatedKey(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in names if names.count(key) > 1))
    return row


def _json_row(place: str, text: str) -> dict[str, Any] | DataError:
    try:
        row = json.loads(text, object_pairs_hook=_unique_keys)
    except _RepeatedKey as error:
        return DataError(f"{place}: the key {error.args[0]!r} is there twice; keep one of the two")
    except json.JSONDecodeError as error:
        if not text.endswith("\n"):
            return DataError(f"{place}: the file ends inside this row; it is truncated, copy it again or drop the row")
        return DataError(
            f"{place}: is not valid JSON ({error.msg}, character {error.pos + 1}); each line must be one whole object"
        )
    except RecursionError:
        return DataError(f"{place}: is nested too deeply to read; give prompt, chosen and rejected as text or messages")
    except ValueError as error:  # a whole number of thousands of digits
        return DataError(f"{place}: cannot be read ({error}); correct the number or drop the row")
    if not isinstance(row, dict):
        return DataError(f"{place}: is {described(row)}, not an object with prompt, chosen and rejected")
    return row


def _csv(name: str, lines: Iterator[tuple[int, bytes]], delimiter: str) -> Source:
    # Strict: otherwise a quote that is never closed swallows the rest of the file without a word.
    previous = csv.field_size_limit(MAX_LINE)
    try:
        reader = csv.reader((decoded(name, *line) for line in lines), delimiter=delimiter, strict=True)
        header = next(reader, None)
    except csv.Error as error:
        raise DataError(f"{name}, line 1: the header is not valid CSV ({error}); correct the quotes") from None
    finally:
        csv.field_size_limit(previous)
    if not header:
        raise DataError(f"{name}: has no header; the first line must name the columns prompt, chosen and rejected")
    columns = tuple(column.strip() for column in header)
    _refuse_repeats(name, columns)

    def rows() -> Generator[RawRow, None, None]:
        previous = csv.field_size_limit(MAX_LINE)
        try:
            for row in reader:
                number = reader.line_num
                if not row:
                    continue
                if len(row) != len(columns):
                    yield (
                        number,
                        DataError(
                            f"{name}, line {number}: has {len(row)} fields where the header has {len(columns)}; "
                            "quote fields that hold a comma, a quote or a line break"
                        ),
                    )
                else:
                    yield number, dict(zip(columns, row, strict=True))
        except csv.Error as error:
            raise DataError(
                f"{name}, line {reader.line_num}: is not valid CSV ({error}); check the quotes, and whether "
                "the file is whole"
            ) from None
        finally:
            csv.field_size_limit(previous)

    return Source(name, "line", columns, rows())


def _parquet(name: str, path: Path, wanted: Sequence[str] | None) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, pre_buffer=False)
        columns = tuple(file.schema_arrow.names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise DataError(
            f"{name}: cannot be read as Parquet ({reason}); it is truncated or damaged, copy it again"
        ) from None
    _refuse_repeats(name, columns)
    read = [column for column in columns if wanted is None or column in wanted]

    def rows() -> Generator[RawRow, None, None]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=read):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0][:120]
            raise DataError(
                f"{name}, row {number}: reading broke off ({reason}); the file is damaged, copy it again"
            ) from None
        finally:
            file.close()

    return Source(name, "row", columns, rows())


def _saved(name: str, path: Path) -> Source:
    _refuse_other_folders(name, path)
    if not (path / "state.json").is_file():
        raise DataError(
            f"{name}: holds the splits {saved_splits(name, path)}; give the folder of one of them, such as {name}/train"
        )
    refuse_files_outside(name, path)
    import datasets

    try:
        data = datasets.Dataset.load_from_disk(str(path)).with_format(None)
        data.data.validate(full=True)  # Arrow follows damaged offsets out of the file, which ends the process
        data.info.features = unopened(data.features)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{name}: cannot be read as a saved data set ({_short(error)}); save it again") from None
    return Source(name, "row", tuple(data.column_names), _numbered(name, data, "save the data set again"))


def _refuse_other_folders(name: str, path: Path) -> None:
    """Refuse a folder that ``save_to_disk`` has not written."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return
    scored = next((path / file for file in ("scored.jsonl", "scored.parquet") if (path / file).is_file()), None)
    remedy = f"give the file in it, {scored}" if scored else "give the path of a .jsonl, .parquet or .csv file in it"
    raise DataError(f"{name}: is a folder; {remedy}")


def _hub(name: str) -> Source:
    import datasets
    from datasets.exceptions import DatasetsError

    repository, _, split = name.partition(":")
    try:
        data = datasets.load_dataset(repository, split=split or "train", streaming=True)
        columns = data.column_names
        if data.features is not None and unopened(data.features) != data.features:
            data = data.decode(False).cast(unopened(data.features))
    except (DatasetsError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"{name}: cannot be loaded from the hub ({_short(error)}); check the name, the split ({split or 'train'}) "
            "and the network, or give a local file"
        ) from None

    return Source(name, "row", tuple(columns) if columns else None, _numbered(name, data, "try again"))


def _numbered(name: str, data: Any, remedy: str) -> Generator[RawRow, None, None]:
    from datasets.exceptions import DatasetsError

    number = -1
    try:
        yield from ((number := i, row) for i, row in enumerate(data))
    except (DatasetsError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{name}, row {number + 1}: reading broke off ({_short(error)}); {remedy}") from None


def _refuse_repeats(name: str, columns: Sequence[str]) -> None:
    for column in columns:
        if list(columns).count(column) > 1:
            raise DataError(f"{name}: the column {column!r} is there twice; keep one of the two")


def described(value: object) -> str:
    """A value of the wrong type, for a message: what it is, and its beginning."""
    if value is None:
        return "null"
    kinds = ((bool, "true/false"), (int | float, "a number"), (str, "text"), (list | tuple, "a list"))
    kind = next((word for types, word in kinds if isinstance(value, types)), None)
    if kind is None:
        kind = "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"
    return f"{_short(value)} ({kind})"


def _short(value: object) -> str:
    # Only the beginning is rendered: a field may be megabytes long, and repr escapes what a terminal would obey.
    if isinstance(value, str):
        return repr(value[:40] + "…") if len(value) > 40 else repr(value)
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a whole number of more than 40 digits"
    if isinstance(value, list | tuple | dict):
        return f"{len(value)} entries" if value else "empty"
    text = str(value).splitlines()[0] if str(value) else type(value).__name__
    return text if len(text) <= 160 else f"{text[:157]}…"
