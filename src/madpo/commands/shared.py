"""Options that several commands have, and how a command calls its operation."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from madpo.commands.from_settings import T, part
from madpo.core import processes
from madpo.core.config import Frozen
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


class HeldOut(Frozen):
    eval_data: str | None = None
    """Held-out pairs; without them eval_share of the pairs is held out."""


def call(
    name: str, options: Any, settings: type[T], *inputs: Any, refused: dict[str, Any], page: str = "", **given: Any
) -> int:
    """Refuse what is missing, call the function of a command, and print its report and where its page is.

    Args:
        inputs: what comes before the folder of the result.
        refused: as for :func:`madpo.operations.preconditions.refuse_missing`.
        given: further arguments of the function.
    """
    from madpo.operations.preconditions import refuse_missing

    place: Path = options.output_dir
    refuse_missing(output_dir=place, **refused)
    with loading_libraries():
        function = getattr(import_module("madpo.operations.tuning" if name == "tune" else "madpo.operations"), name)
    report = function(*inputs, place, part(options, settings), overwrite=options.overwrite, **given)
    if processes.is_main_process():
        show(f"{report.text()}\nwritten to {place / getattr(report, 'file', '')}")
        if page and (place / page).is_file():
            show_page(place / page)
    return 0


def show_page(path: Path) -> None:
    """Say where a page is."""
    show(f"Page: {path.resolve().as_uri()}")
