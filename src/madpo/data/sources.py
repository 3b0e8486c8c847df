"""Raw rows out of files, one at a time: JSON Lines or arrays, CSV, Parquet, saved data sets, data sets of the hub.

Nothing is kept: a million rows pass through in constant memory. A mistake of one row is yielded with its
number, so that the reader can count them all; a mistake of the file ends the reading with a DataError.
"""

from __future__ import annotations

import copy
import os
import re
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Any

from madpo.core.errors import DataError, is_shortage, printable
from madpo.core.storage import expanded, json_object, stays_inside
from madpo.data.parquet import parquet_source
from madpo.data.raw import RawRow, Source, Wanted, described_name, short, without_filled_nulls
from madpo.data.shards import opened_shards, shards_of
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
    b"\xd0\xcf\x11\xe0": "is a file of an older Excel; save it as .csv",
    b"ARROW1": "is an Arrow file; give the folder that save_to_disk wrote, or save it as .parquet",
    b"\xff\xff\xff\xff": "is an Arrow stream; give the folder that save_to_disk wrote, or save it as .parquet",
    b"\xff\xfe\x00\x00": "is UTF-32 text; save it as UTF-8",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
    b"\x00\x00\xfe\xff": "is UTF-32 text; save it as UTF-8",
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.+-]+){0,2}")


def open_source(data: str | Path, *, wanted: Wanted = None) -> Source:
    """Open a file, a folder of files or one written by ``save_to_disk``, or a data set of the hub.

    Args:
        data: path ("folder:split" for a part of a folder), or hub name ("owner/name", "owner/name:split" or
            "owner/name:configuration:split"). A path that exists wins.
        wanted: columns to read from Parquet, where each costs time.

    Raises DataError: there is no such file, it cannot be read, or it is not what its name says.
    """
    name = printable(str(data))
    if not str(data) or "\0" in str(data):
        raise DataError(f"{name!r} is no path; give a .jsonl, .parquet or .csv file or a hub data set owner/name")
    path = expanded(data)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if (part := split_of_folder(data)) is not None:
            return _folder(name, *part, wanted)
        if is_hub_name(data):
            return _hub(name)
        raise DataError(f"{name}: there is no such file; check the path, or give a hub data set owner/name") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be opened ({error.strerror}); give the path of a readable file") from None
    except UnicodeEncodeError:
        raise DataError(f"{name}: is no name that a file can have; give the path of a readable file") from None
    if stat.S_ISDIR(mode):
        return _folder(name, path, None, wanted)
    if not stat.S_ISREG(mode):
        raise DataError(f"{name}: is not a regular file (a pipe or a device); write the data to a file first")
    return _file(name, path, wanted)


def look_at(data: str | Path) -> None:
    """Refuse a file that :func:`open_source` would refuse at once, without reading rows or loading what reads the hub.

    Raises DataError: as :func:`open_source`.
    """
    path = expanded(data)
    if os.path.isdir(path):
        if not _is_saved(path):
            _shards(printable(str(data)), path, None)
    elif not is_hub_name(data) or split_of_folder(data) is not None:
        open_source(data).rows.close()


def split_of_folder(data: str | Path) -> tuple[Path, str] | None:
    """The folder and the split of "folder:split"; None for anything else."""
    folder, colon, split = str(data).rpartition(":")
    path = expanded(folder) if colon and folder else None
    return (path, split) if path is not None and os.path.isdir(path) and not os.path.exists(expanded(data)) else None


def is_hub_name(data: str | Path) -> bool:
    """Whether this names a data set of the hub, and no file that is here or could be."""
    path = expanded(data)
    known = path.suffix in {*FORMATS, ".gz"} or os.path.exists(path)
    return isinstance(data, str) and _HUB_NAME.fullmatch(data) is not None and not known


def _file(name: str, path: Path, wanted: Wanted) -> Source:
    suffixes = [s.lower() for s in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if zipped else suffixes)[-1:] or [""]
    kind = FORMATS.get(suffix[0])
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); make it readable for you") from None
    if not head:
        raise DataError(f"{name}: the file is empty; give a file with at least one pair")
    if kind == "parquet" and head.startswith(b"PAR1"):
        return parquet_source(name, path, wanted)
    for magic, remedy in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{name}: {remedy}")
    if kind is None:
        raise DataError(f"{name}: the ending {suffix[0]!r} says no format; rename it to .jsonl, .parquet or .csv")
    if kind == "parquet":
        raise DataError(f"{name}: is no Parquet file (it does not begin with PAR1); write it again or rename it")
    if zipped != head.startswith(b"\x1f\x8b"):
        remedy = "ends in .gz but is no gzip; rename it" if zipped else "is compressed with gzip; let it end in .gz"
        raise DataError(f"{name}: {remedy}")
    if kind == "jsonl":
        return json_source(name, path, zipped)
    return csv_source(name, path, zipped, "\t" if suffix[0] == ".tsv" else ",")


def _folder(name: str, path: Path, split: str | None, wanted: Wanted) -> Source:
    if _is_saved(path):
        return _saved(name, path if split is None else path / split)
    files = _shards(name, path, split)
    outer = name if split is None else name[: -len(split) - 1]
    return opened_shards(
        name, files, lambda file: _file(f"{outer}/{printable(str(file.relative_to(path)))}", file, wanted)
    )


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _shards(name: str, path: Path, split: str | None) -> list[Path]:
    scored = next((path / file for file in ("scored.jsonl", "scored.parquet") if (path / file).is_file()), None)
    if scored is not None:
        raise DataError(f"{name}: is a folder; give the file in it, {scored}")
    return shards_of(name, path, split, tuple(FORMATS))


def _saved(name: str, path: Path) -> Source:
    if not (path / "state.json").is_file():
        found = json_object(path / "dataset_dict.json", "save the data set again", DataError).get("splits")
        names = found[:12] if isinstance(found, list) else []
        splits = ", ".join(str(split) if str(split).isprintable() else repr(split) for split in names)
        raise DataError(f"{name}: holds the splits {splits}; give the folder of one of them, such as {name}/train")
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


def _hub(name: str) -> Source:
    import datasets

    repository, *parts = name.split(":")
    split = parts[-1] if parts else "train"
    try:
        data = datasets.load_dataset(repository, *parts[:-1], split=split, streaming=True)
        columns = data.column_names
        if data.features is not None and unopened(data.features) != data.features:
            data = data.decode(False).cast(unopened(data.features))
    except Exception as error:  # of the network, of the hub, of whatever the repository holds
        if is_shortage(error):
            raise
        said = re.sub(r"\s+", " ", str(error))
        remedy = f"check the name, the split ({split}) and the network, or give a local file"
        if (choices := re.search(r"available configs: \[(.*?)\]", said)) is not None:
            configuration = re.findall(r"'([^']*)'", choices[1])[0]
            remedy = f"give a configuration of {choices[0]}, such as {repository}:{configuration}:{split}"
        elif (choices := re.search(r"(?:[Aa]vailable splits:|nknown split .*?one of) \[(.*?)\]", said)) is not None:
            given = ":".join([repository, *parts[:-1], re.findall(r"'([^']*)'", choices[1])[0]])
            remedy = f"give one of the splits {choices[1]}, such as {given}"
        raise DataError(f"{name}: cannot be loaded from the hub ({short(error)}); {remedy}") from None

    return Source(name, "row", tuple(columns) if columns else None, _numbered(name, data, "try again"))


def _numbered(name: str, data: Any, remedy: str) -> Generator[RawRow, None, None]:
    number = -1
    try:
        yield from ((number := i, without_filled_nulls(row)) for i, row in enumerate(data))
    except Exception as error:  # as above
        if is_shortage(error):
            raise
        raise DataError(f"{name}, row {number + 1}: reading broke off ({short(error)}); {remedy}") from None


# Saved data sets: ``datasets.load_from_disk`` reads whatever ``state.json`` names, and decodes an image or a sound by
# opening the path, or the address, in the row. So no file may be elsewhere, and nothing is decoded.


def refuse_files_outside(name: str, folder: Path) -> None:
    """Refuse a saved data set whose files are not in its folder, by name or by a link (DataError)."""
    files = json_object(folder / "state.json", "save the data set again", DataError).get("_data_files")
    entries = files if isinstance(files, list) else []
    found = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    if not found or not all(isinstance(file, str) for file in found):
        raise DataError(f"{name}: state.json does not name its files; save the data set again")
    for file in map(str, found):
        if not stays_inside(folder / file, folder):
            raise DataError(
                f"{name}: state.json names the file {described_name(file)}, which is outside the folder; copy it there "
                "if it is yours, or do not use the data set"
            )


def unopened(feature: Any) -> Any:
    """Features of a data set, with images, sounds and the like left as they are stored. No loss reads one."""
    if isinstance(feature, dict):
        return type(feature)({key: unopened(inner) for key, inner in feature.items()})
    if isinstance(feature, list | tuple):
        return [unopened(inner) for inner in feature]
    found = copy.copy(feature)
    if hasattr(found, "feature"):  # a list of something
        found.feature = unopened(found.feature)
    elif hasattr(found, "decode") and type(found).__name__ != "Json":  # which is text in the row itself
        found.decode = False
    return found
