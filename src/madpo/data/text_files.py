"""Rows of text files: JSON Lines, JSON arrays and CSV, one at a time in constant memory."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from madpo.core.errors import DataError
from madpo.data.raw import MAX_ROW, RawRow, Source, described, described_name, refuse_repeats, repeated

_BOM = b"\xef\xbb\xbf"
_CHUNK = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")
_OBJECT = "an object with prompt, chosen and rejected"


def json_source(name: str, path: Path, zipped: bool) -> Source:
    """A file of JSON Lines, or of one JSON array."""
    with _broken_off(name, "at its beginning"), _opened(path, zipped) as file:
        beginning = file.read(4096).removeprefix(_BOM).lstrip()
    if beginning.startswith(b"["):
        return Source(name, "row", None, _Array(name, path, zipped).rows())
    return Source(name, "line", None, _json_rows(name, _lines(name, path, zipped)))


def _opened(path: Path, zipped: bool) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if zipped else path.open("rb")


@contextmanager
def _broken_off(name: str, where: str | Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        place = where if isinstance(where, str) else where()
        raise DataError(
            f"{name}: reading broke off {place} ({error}); the file is truncated or damaged, copy it again"
        ) from None


def _lines(name: str, path: Path, zipped: bool) -> Generator[tuple[int, bytes], None, None]:
    """(line number from 1, bytes with the line end), a UTF-8 byte-order mark taken off."""
    number = 0
    with _broken_off(name, lambda: f"after line {number}"), _opened(path, zipped) as file:
        while line := file.readline(MAX_ROW + 1):
            number += 1
            if number == 1 and b"\r" in line.rstrip(b"\r") and not line.endswith(b"\n"):
                raise DataError(
                    f"{name}: its lines end in a carriage return without a line feed, as on old Macs; save it with the "
                    "line ends of Unix or Windows"
                )
            if len(line) > MAX_ROW:
                raise DataError(f"{name}, line {number}: is longer than {MAX_ROW // 2**20} MB; write one pair per line")
            yield number, line.removeprefix(_BOM) if number == 1 else line


def _decoded(name: str, number: int, line: bytes) -> str:
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


# JSON


class _RepeatedKey(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs) and (key := repeated([key for key, _ in pairs])) is not None:
        raise _RepeatedKey(key)
    return row


def _row(place: str, value: object) -> dict[str, Any] | DataError:
    return value if isinstance(value, dict) else DataError(f"{place}: is {described(value)}, not {_OBJECT}")


def _mistake(place: str, error: ValueError | RecursionError) -> DataError:
    """What is wrong with one value although its JSON may be well formed."""
    if isinstance(error, _RepeatedKey):
        return DataError(f"{place}: the key {described_name(error.args[0])} is there twice; keep one of the two")
    if isinstance(error, RecursionError):
        return DataError(f"{place}: is nested too deeply to read; give prompt, chosen and rejected as text or messages")
    return DataError(f"{place}: cannot be read ({error}); correct the number or drop the row")  # of thousands of digits


def _json_rows(name: str, lines: Generator[tuple[int, bytes], None, None]) -> Generator[RawRow, None, None]:
    with closing(lines):
        for number, line in lines:
            place = f"{name}, line {number}"
            try:
                text = _decoded(name, number, line)
            except DataError as mistake:
                yield number, mistake
                continue
            if not text.strip():
                continue
            try:
                yield number, _row(place, json.loads(text, object_pairs_hook=_unique_keys))
            except json.JSONDecodeError as error:
                if text.endswith("\n"):
                    where = f"{error.msg}, character {error.pos + 1}"
                    why = f"is not valid JSON ({where}); each line must be one whole object"
                else:
                    why = "the file ends inside this row; it is truncated, copy it again or drop the row"
                yield number, DataError(f"{place}: {why}")
            except (ValueError, RecursionError) as error:
                yield number, _mistake(place, error)


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys)
_SKIPPING = json.JSONDecoder(parse_int=str)  # takes all that is well formed


class _Array:
    """A file that holds one JSON array; only the part that is being read is in memory."""

    def __init__(self, name: str, path: Path, zipped: bool) -> None:
        self.name, self.row = name, 0
        self._file = _opened(path, zipped)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._bytes = self._lines = 0  # before the text in memory

    @property
    def place(self) -> str:
        return f"{self.name}, row {self.row}"

    def rows(self) -> Generator[RawRow, None, None]:
        with closing(self._file):
            self._next()
            self._at += 1
            after = self._next()
            while after != "]":
                value = self._value()
                yield self.row, value if isinstance(value, DataError) else _row(self.place, value)
                after = self._next()
                if after == ",":
                    self._at += 1
                    self.row += 1
                elif after != "]":
                    self._refuse("is not valid JSON (a comma or the end of the array must follow)", self._at)
            self._at += 1
            if self._next():
                why = "the array has ended, and more follows; write one array, or one object on each line"
                self._refuse(why, self._at)

    def _next(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _value(self) -> Any:
        """The value that begins at the next character, or a DataError in its place.

        Raises DataError: it is not valid JSON, so nobody knows where the next one begins.
        """
        self._next()
        while True:
            found: Any
            try:
                try:
                    found, end = _JSON.raw_decode(self._text, self._at)
                except json.JSONDecodeError:
                    raise
                except ValueError as error:
                    found = _mistake(self.place, error)
                    _, end = _SKIPPING.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Where the text in memory ends inside the value, the parser stumbles over that end. Strings apart, the
                # longest thing that it does not name before is "-Infinity".
                in_string = error.msg.startswith("Unterminated string")
                offset = error.pos - self._at
                if (in_string or error.pos >= len(self._text) - len("-Infinity")) and self._more():
                    continue
                at = len(self._text) if in_string else self._at + offset
                self._refuse(f"is not valid JSON ({error.msg})", at)
            except RecursionError as error:
                raise _mistake(self.place, error) from None
            if end == len(self._text) and self._more():
                continue  # a number may go on
            self._at = end
            return found

    def _refuse(self, why: str, at: int) -> NoReturn:
        if at >= len(self._text):
            why = "the file ends inside this row; it is truncated, copy it again"
        line = self._lines + self._text.count("\n", 0, at) + 1
        raise DataError(f"{self.place} (line {line}): {why}")

    def _more(self) -> bool:
        """Read on; what lies behind is dropped. Reads double, so that a long value is not parsed too often."""
        kept = len(self._text) - self._at
        if kept > MAX_ROW:
            raise DataError(f"{self.place}: is longer than {MAX_ROW // 2**20} MB; drop the row")
        with _broken_off(self.name, lambda: f"in row {self.row}"):
            chunk = self._file.read(max(_CHUNK, kept))
        waiting = len(self._decoder.getstate()[0])  # bytes of a character that is not whole
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.place}: byte {self._bytes - waiting + error.start} of the file "
                f"(0x{error.object[error.start]:02x}) is not UTF-8; save the file as UTF-8 text"
            ) from None
        self._bytes += len(chunk)
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(chunk)


# CSV


def csv_source(name: str, path: Path, zipped: bool, delimiter: str) -> Source:
    """A CSV file with a header.

    Where the header has no ``delimiter``, what the header shows takes its place: spreadsheets write semicolons and tabs
    into files that end in .csv.
    """
    lines = _lines(name, path, zipped)
    pending = 0  # bytes since the last row ended: a row may go over many lines

    def text() -> Iterator[str]:
        nonlocal pending
        for number, line in lines:
            pending += len(line)
            if pending > MAX_ROW:
                raise DataError(
                    f"{name}, line {number}: its row is longer than {MAX_ROW // 2**20} MB; check the quotes before it"
                )
            yield _decoded(name, number, line)

    decoded = text()
    first = next(decoded, "")
    if delimiter not in first:
        with suppress(csv.Error):  # it has one column
            delimiter = csv.Sniffer().sniff(first[:2000], delimiters="".join(_NAMES)).delimiter or delimiter
    # Strict: otherwise a quote that is never closed swallows the rest of the file without a word.
    reader = csv.reader(chain([first], decoded), delimiter=delimiter, strict=True)
    with _long_fields():
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{name}, line 1: the header is not valid CSV ({error}); correct the quotes") from None
    if not header:
        raise DataError(f"{name}: has no header; the first line must name the columns prompt, chosen and rejected")
    columns = tuple(column.strip() for column in header)
    refuse_repeats(name, columns)

    def rows() -> Generator[RawRow, None, None]:
        nonlocal pending
        with closing(lines), _long_fields():
            try:
                for row in reader:
                    pending, number = 0, reader.line_num
                    if len(row) == len(columns):
                        yield number, dict(zip(columns, row, strict=True))
                    elif row:
                        counts = f"has {len(row)} fields where the header has {len(columns)}"
                        remedy = f"quote fields that hold {_NAMES[delimiter]}, a quote or a line break"
                        yield number, DataError(f"{name}, line {number}: {counts}; {remedy}")
            except csv.Error as error:
                raise DataError(
                    f"{name}, line {reader.line_num}: is not valid CSV ({error}); check the quotes, and whether "
                    "the file is whole"
                ) from None

    return Source(name, "line", columns, rows())


_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}


@contextmanager
def _long_fields() -> Iterator[None]:
    previous = csv.field_size_limit(MAX_ROW)
    try:
        yield
    finally:
        csv.field_size_limit(previous)
