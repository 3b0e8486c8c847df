"""Options that several commands have, and what a command does before and after its operation."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import model_validator

from madpo.core import processes
from madpo.core.config import Frozen, changed
from madpo.core.libraries import loading_libraries
from madpo.core.options import Cli
from madpo.core.progress import show


class Data(Frozen):
    data: Annotated[str, Cli(positional=True)]
    """Preference pairs: a .jsonl, .json, .csv or .parquet file, a folder of them, or a hub data set
    OWNER/NAME[:CONFIGURATION][:SPLIT]."""


class Result(Frozen):
    output_dir: Path
    """Folder of the result; it is complete when record.json is in it."""
    overwrite: bool = False
    """Replace an earlier result in it."""


class DryRun(Frozen):
    """A command with a dry run, for which nothing must be given that it neither reads nor writes."""

    dry_run: bool = False
    """Say what would run and what it needs (time, memory), and write nothing."""

    @model_validator(mode="before")
    @classmethod
    def _unused(cls, given: dict[str, Any]) -> dict[str, Any]:
        unused = ["output_dir", *(["data"] if given.get("lengths") else [])] if given.get("dry_run") else []
        return dict.fromkeys((name for name in unused if cls.model_fields[name].is_required()), os.devnull) | given


class HeldOut(Frozen):
    eval_data: str | None = None
    """Held-out pairs; without them eval_share of the pairs is held out."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        if self.eval_data is not None and "eval_share" in changed(self):
            raise ValueError("eval_data takes the place of eval_share, which has no effect; leave one of them out")
        return self


@contextmanager
def loading(options: Any, **named: Any) -> Iterator[None]:
    """Refuse what the options name and is not there, then load the libraries of the operation that is imported in here.

    Args:
        options: of a command with :class:`Result`; a dry run asks nothing of its output folder.
        named: as for :func:`madpo.operations.preconditions.refuse_missing`.
    """
    from madpo.operations.preconditions import refuse_missing

    refuse_missing(output_dir=None if getattr(options, "dry_run", False) else options.output_dir, **named)
    with loading_libraries():
        yield


def finished(report: Any, options: Any, page: str = "", following: Sequence[object] = ()) -> int:
    """Print a report, where it is, where its page is, and the command that comes next; the exit status."""
    place: Path = options.output_dir
    if processes.is_main_process():
        show(f"{report.text()}\nwritten to {place / getattr(report, 'file', '')}")
        if page and (place / page).is_file():
            show_page(place / page)
        if following:
            show_next(*following)
    return 0


def show_next(*words: object) -> None:
    """Say which command comes next."""
    show(f"next: {shlex.join(['madpo', *map(str, words)])}")


def show_page(path: Path) -> None:
    """Say where a page is."""
    show(f"Page: {path.resolve().as_uri()}")
