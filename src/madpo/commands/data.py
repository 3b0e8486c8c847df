"""``madpo check``, ``inspect`` and ``trim-vocab``: preference data before training, and smaller vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from madpo.commands.from_settings import Configurable
from madpo.commands.shared import Data, Result, finished, loading, show_next, show_page
from madpo.core.config import part
from madpo.core.layout import Reading
from madpo.core.options import Cli
from madpo.core.progress import show
from madpo.models.hyperparameters import Truncation
from madpo.operations.settings import TrimSettings


class Check(Configurable, Reading, Data):
    eval_data: str | None = None
    """Evaluation pairs, to look for leakage."""
    tokenizer: Annotated[str | None, Cli(also=("model", "model_name_or_path"))] = None
    """Count tokens and check the chat template of this model: packaged name, folder or hub id."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of prompt and completion together; none is no limit."""
    truncation: Truncation = "drop"
    """What happens to longer pairs: drop them, cut the completion, or refuse the data."""
    output_dir: Path | None = None
    """Write check.json and dropped.jsonl into this folder."""
    strict: bool = False
    """Treat a warning as an error."""


def check(options: Check) -> int:
    """Print what is in preference data, and what training would stumble over.

    Example:
        madpo check pairs.jsonl --model_name_or_path gemma-3-270m --max_length 512 --output_dir checked
    """
    from madpo.data import check

    given = options.model_dump(exclude={"config", "set", "output_dir", "columns", "layout"})
    show(check(**given, columns=options.reading, output=options.output_dir).text())
    heldout = () if options.eval_data is None else ("--eval_data", options.eval_data)
    model = ("--model_name_or_path", options.tokenizer or "MODEL")
    show_next("train", options.data, *heldout, *options.reading.as_options, *model, "--output_dir", "policy")
    return 0


class Inspect(Configurable, Reading, Data):
    margin_temperature: float | None = Field(default=None, gt=0)
    """Divide the margins by this; none fits it to the labels."""
    output: Path | None = None
    """Write one HTML page with the margins, to look at and play with."""


def inspect(options: Inspect) -> int:
    """Print what reward margins look like; the data have a column reward_margin, or scores.

    Example:
        madpo inspect scored/scored.jsonl --output margins.html
    """
    from madpo.operations import inspect

    o = options
    report = inspect(o.data, columns=o.reading, margin_temperature=o.margin_temperature, output=o.output)
    show(report.text())
    if options.output is not None:
        show_page(options.output)
    # What a training left of its held-out pairs is not for training, and margins without texts are no pairs.
    if report.tau is not None and report.share is None and all(suspect.chosen for suspect in report.suspects):
        found = {"tau": report.tau, "c_max": report.c_max, "margin_temperature": report.margin_temperature}
        how = [word for name, value in found.items() for word in (f"--loss.{name}", f"{value:.3g}")]
        model = ("--model_name_or_path", "MODEL", "--loss", "madpo")
        show_next("train", o.data, *o.reading.as_options, *model, *how, "--output_dir", "policy")
    return 0


class TrimVocab(Configurable, TrimSettings, Result):
    model: Annotated[str, Cli(positional=True)]
    """Packaged name, folder or hub id."""
    corpus: tuple[str, ...]
    """What the model will read and write: files, hub data sets OWNER/NAME[:SPLIT], or imdb."""
    eval_data: Annotated[str | None, Cli(also=("eval",))] = None
    """Held-out text to measure on; without it a share of the corpus is held out."""


def trim_vocab(options: TrimVocab) -> int:
    """Write a smaller copy of a model and print what it costs.

    Example:
        madpo trim-vocab gemma-3-270m --corpus pairs.jsonl reviews.csv --size 32000 --output_dir trimmed
    """
    o = options
    texts = [text for text in (*o.corpus, o.eval_data) if text != "imdb"]
    with loading(o, data=texts, models=[o.model]):
        from madpo.operations.trimming.trim import trim_vocab
    settings = part(o, TrimSettings)
    report = trim_vocab(o.model, o.corpus, o.output_dir, settings, eval_data=o.eval_data, overwrite=o.overwrite)
    return finished(report, o)
