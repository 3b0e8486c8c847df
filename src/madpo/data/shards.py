"""Folders of data files, as data sets are stored on the hub: shards of one split are read one after the other."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from madpo.core.errors import DataError, printable
from madpo.data.raw import RawRow, Source

_SHARD = re.compile(r"(?P<split>.*?)[-_.]?\d+([-_]of[-_]\d+)?", re.DOTALL)
_OF = re.compile(r"[-_](\d+)[-_]of[-_](\d+)\Z")
_NO_DATA = ("dataset_info", "dataset_infos", "dataset_dict", "state", "record", "report", "config", "tokenizer_config")
_MOST = 10_000  # files that are looked at


@dataclass(frozen=True)
class Shards(Source):
    """Several files as one data set. A row's number counts through all of them; its place names the file.

    ``files`` are those opened so far, and ``starts`` is what is added to the numbers of each.
    """

    files: list[Source]
    starts: list[int]

    def at(self, number: int) -> str:
        """The place of a row in its file."""
        i = max(0, bisect_right(self.starts, number) - 1)
        return self.files[i].at(number - self.starts[i])


def shards_of(name: str, folder: Path, split: str | None, endings: Sequence[str]) -> list[Path]:
    """The files of one split in their order.

    Without a split, the one that there is, or else ``train``. Raises DataError: there is no data file, or nothing says
    which of them are meant.
    """
    groups: dict[str, list[Path]] = {}
    for file in _data_files(name, folder, endings):
        place = file.relative_to(folder)
        stem = place.name.split(".")[0]
        shard = _SHARD.fullmatch(stem)
        parents = [part for part in place.parent.parts if part != "data"]
        group = "/".join([*parents, *filter(None, [shard["split"] if shard else stem])])
        groups.setdefault(group, []).append(file)
    if not groups:
        raise DataError(f"{name}: is a folder; give the path of a .jsonl, .parquet or .csv file in it")
    wanted = split if split is not None else next(iter(groups)) if len(groups) == 1 else "train"
    if wanted not in groups:
        listed = ", ".join(map(printable, sorted(groups)[:20]))
        first = printable(next(iter(sorted(groups))))
        raise DataError(f"{name}: is a folder with {listed}; give one of them, such as {name}:{first}")
    found = groups[wanted]
    if len(kinds := {_ending(file) for file in found}) > 1:
        raise DataError(
            f"{name}: is a folder with files that end in {' and '.join(sorted(kinds))}; give the path of a file in it"
        )
    _refuse_twins_and_gaps(name, found)
    return found


def _refuse_twins_and_gaps(name: str, found: Sequence[Path]) -> None:
    """Refuse a file that is there packed and unpacked, and shards that are not all of those that their names count."""
    plain: dict[str, Path] = {}
    for file in found:
        if (twin := plain.setdefault(file.name.removesuffix(".gz"), file)) is not file:
            raise DataError(
                f"{name}: {printable(twin.name)} and {printable(file.name)} have one name, so rows may be read twice; "
                "remove one of them, or give the path of a file"
            )
    numbered = [match for file in found if (match := _OF.search(file.name.split(".")[0])) is not None]
    counts, numbers = {int(match[2]) for match in numbered}, {int(match[1]) for match in numbered}
    if numbered and not any(counts == {len(found)} and numbers == {*range(i, i + len(found))} for i in (0, 1)):
        raise DataError(
            f"{name}: {len(found)} files are not all of the {' or '.join(map(str, sorted(counts)))} that their names "
            "count; put the missing ones there and remove others, or give the path of a file"
        )


def _data_files(name: str, folder: Path, endings: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for at, (place, folders, files) in enumerate(os.walk(folder)):
        folders[:] = sorted(folder for folder in folders if not folder.startswith((".", "_")))
        if at + len(found) > _MOST:
            raise DataError(f"{name}: is a folder with more than {_MOST} files; give the path of a file in it")
        for file in sorted(files):
            path = Path(place, file)
            known = _ending(path) in endings and not file.startswith((".", "_"))
            if known and path.name.split(".")[0] not in _NO_DATA and path.is_file():
                found.append(path)
    return found


def _ending(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return (suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes)[-1:][0] if suffixes else ""


def opened_shards(name: str, files: Sequence[Path], opened: Callable[[Path], Source]) -> Source:
    """Files as one data set.

    Raises DataError: the first cannot be opened; a later one raises while rows are read.
    """
    first = opened(files[0])
    sources, starts = [first], [0]

    def rows() -> Generator[RawRow, None, None]:
        start = 0
        for i, file in enumerate(files):
            source = first if i == 0 else opened(file)
            if i:
                if source.columns is not None and set(source.columns) != set(first.columns or ()):
                    other = next(iter(set(source.columns) ^ set(first.columns or ())))
                    raise DataError(
                        f"{source.name}: has other columns than {first.name} ({other!r} is in one of them only); put "
                        "files of one kind into the folder, or give the path of one"
                    )
                sources.append(source)
                starts.append(start)
            last = -1
            with closing(source.rows):
                for last, row in source.rows:
                    yield start + last, row
            start += last + 1

    return Shards(name, first.unit, first.columns, rows(), sources, starts)
