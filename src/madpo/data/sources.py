"""Raw rows out of files, one at a time: JSON Lines or arrays, CSV, Parquet, saved data sets, data sets of the hub.

Nothing is kept: a million rows pass through in constant memory. A mistake of one row is yielded beside its
number, so that the reader can count them all; a mistake of the file ends the reading with a DataError.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Any

from madpo.core.errors import DataError, printable
from madpo.core.memory import is_shortage
from madpo.core.storage import expanded
from madpo.data.parquet import parquet_source
from madpo.data.raw import RawRow, Source, Wanted, short
from madpo.data.saved import refuse_files_outside, saved_splits, unopened
from madpo.data.template_keys import without_filled_nulls
from madpo.data.text_files import csv_source, json_source

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


def open_source(data: str | Path, *, wanted: Wanted = None) -> Source:
    """Open a file, a folder written by ``save_to_disk``, or a hub data set ("owner/name" or "owner/name:split").

    Args:
        data: path or hub name. A path that exists wins.
        wanted: columns to read from Parquet, where each costs time.

    Raises:
        DataError: there is no such file, it cannot be read, or it is not what its name says.
    """
    name = printable(str(data))
    if not str(data) or "\0" in str(data):
        raise DataError(
            f"{name!r} is no path; give a .jsonl, .parquet or .csv file or a hub data set such as owner/name"
        )
    path = expanded(data)
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
    except UnicodeEncodeError:
        raise DataError(f"{name}: is no name that a file can have; give the path of a readable file") from None
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
    path = expanded(data)
    if os.path.isdir(path):
        _refuse_other_folders(printable(str(data)), path)
    elif not _is_hub_name(data):
        open_source(data).rows.close()


def _is_hub_name(data: str | Path) -> bool:
    path = expanded(data)
    known = path.suffix in {*FORMATS, ".gz"} or os.path.exists(path)
    return isinstance(data, str) and _HUB_NAME.fullmatch(data) is not None and not known


def _file(name: str, path: Path, wanted: Wanted) -> Source:
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
        return parquet_source(name, path, wanted)
    for magic, remedy in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{name}: {remedy}")
    if zipped != head.startswith(b"\x1f\x8b"):
        remedy = (
            "ends in .gz but is not gzip; rename it" if zipped else "is compressed with gzip; rename it to end in .gz"
        )
        raise DataError(f"{name}: {remedy}")
    if kind == "jsonl":
        return json_source(name, path, zipped)
    return csv_source(name, path, zipped, "\t" if suffix[0] == ".tsv" else ",")


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
    except Exception as error:  # of any kind: the libraries trust what is in these files
        if is_shortage(error):
            raise
        raise DataError(f"{name}: cannot be read as a saved data set ({short(error)}); save it again") from None
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

    repository, _, split = name.partition(":")
    try:
        data = datasets.load_dataset(repository, split=split or "train", streaming=True)
        columns = data.column_names
        if data.features is not None and unopened(data.features) != data.features:
            data = data.decode(False).cast(unopened(data.features))
    except Exception as error:  # of the network, of the hub, of whatever the repository holds
        if is_shortage(error):
            raise
        raise DataError(
            f"{name}: cannot be loaded from the hub ({short(error)}); check the name, the split ({split or 'train'}) "
            "and the network, or give a local file"
        ) from None

    return Source(name, "row", tuple(columns) if columns else None, _numbered(name, data, "try again"))


def _numbered(name: str, data: Any, remedy: str) -> Generator[RawRow, None, None]:
    number = -1
    try:
        yield from ((number := i, without_filled_nulls(row)) for i, row in enumerate(data))
    except Exception as error:  # as above
        if is_shortage(error):
            raise
        raise DataError(f"{name}, row {number + 1}: reading broke off ({short(error)}); {remedy}") from None
