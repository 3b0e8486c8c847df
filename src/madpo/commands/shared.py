"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from madpo.core.config import Frozen
from madpo.core.options import Cli


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
