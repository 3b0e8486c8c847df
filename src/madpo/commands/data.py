"""``madpo check``, ``inspect`` and ``trim-vocab``: thin calls of functions of ``data``, ``diagnostics``, ``practice``.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from madpo.commands.options import DATA, asked, example, from_file, option
from madpo.core.libraries import loading_libraries
from madpo.core.progress import show

CHECK = "look for mistakes in preference data before training with it"
INSPECT = "show what reward margins look like and which tau and c_max suit them"
TRIM = "write a smaller copy of a model, whose vocabulary keeps what a corpus uses"


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo check``."""
    parser.add_argument("data", metavar="DATA", help=DATA)
    from_file(parser)
    option(parser, "eval_data", "eval_data", "evaluation pairs, to look for leakage", metavar="DATA")
    says = "count tokens and check the chat template of this model"
    option(parser, "model_name_or_path", "tokenizer", says, "tokenizer", metavar="M")
    option(parser, "max_length", "max_length", "tokens of prompt and completion together", type=int, metavar="N")
    says = "what happens to longer pairs: drop them, cut the completion, or refuse the data (default: drop)"
    option(parser, "truncation", "truncation", says, choices=("drop", "cut", "refuse"), metavar="POLICY")
    option(parser, "output_dir", "output_dir", "write check.json and dropped.jsonl there", metavar="DIR")
    option(parser, "strict", "strict", "treat a warning as an error", action="store_true")
    example(parser, "madpo check pairs.jsonl --model_name_or_path gemma-3-270m --max_length 512 --output_dir checked")


def check_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo check`` and print its report."""
    from madpo.data import check
    from madpo.data.check import CheckSettings

    where, settings = asked(arguments, CheckSettings, output_dir=(Path | None, None))
    show(check(arguments.data, **settings.model_dump(), output=where["output_dir"]).text())
    return 0


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo inspect``."""
    parser.add_argument("data", metavar="DATA", help=f"{DATA}, with a column reward_margin")
    from_file(parser)
    says = "divide the margins by this; fitted when left out"
    option(parser, "margin_temperature", "margin_temperature", says, type=float, metavar="T")
    option(parser, "output", "output", "write one page to look at and play with", metavar="FILE.html")
    example(parser, "madpo inspect scored/scored.jsonl --output margins.html")


def inspect_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo inspect`` and print its report."""
    from madpo.operations.inspection import InspectSettings, inspect_data

    where, settings = asked(arguments, InspectSettings, output=(Path | None, None))
    output = where["output"]
    show(inspect_data(arguments.data, **settings.model_dump(), output=output).text())
    if output is not None:
        show(f"Page: {output.resolve().as_uri()}")
    return 0


def trim_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo trim-vocab``."""
    parser.add_argument("model", metavar="MODEL", help="packaged name, folder or hub id")
    says = f"what the model will read and write: {DATA}, or imdb"
    option(parser, "corpus", "corpus", says, nargs="+", metavar="DATA")
    option(parser, "output_dir", "output_dir", "folder of the result; it appears when all is done", metavar="DIR")
    option(parser, "overwrite", "overwrite", "replace what is in it", action="store_true")
    from_file(parser)
    option(parser, "size", "size", "entries to keep at most (default: all that the corpus uses)", type=int, metavar="N")
    says = "leave out added tokens that are called unused or reserved, unless the corpus has them"
    option(parser, "drop_reserved", "drop_reserved", says, action="store_true")
    option(parser, "eval", "eval_data", "held-out text to measure on", "eval_data", metavar="DATA")
    says = "or the share of the corpus's texts to hold out (default: 0.05)"
    option(parser, "held_out_share", "held_out_share", says, type=float)
    option(parser, "eval_texts", "eval_texts", "held-out texts to measure on (default: 128)", type=int, metavar="N")
    option(parser, "eval_characters", "eval_characters", "of each, the first so many (default: 1000)", type=int)
    option(parser, "batch_size", "batch_size", "texts per forward pass (default: 8)", type=int)
    example(parser, "madpo trim-vocab gemma-3-270m --corpus pairs.jsonl reviews.csv --size 32000 --output_dir trimmed")


def trim_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo trim-vocab`` and print its report."""
    with loading_libraries():
        from madpo.operations import TrimSettings, trim_vocab

    beside, settings = asked(
        arguments,
        TrimSettings,
        output_dir=(Path, ...),
        overwrite=(bool, False),
        corpus=(tuple[str, ...], ...),
        eval_data=(str | None, None),
    )
    show(trim_vocab(arguments.model, settings=settings, **beside).text())
    show(f"written to {beside['output_dir']}")
    return 0
