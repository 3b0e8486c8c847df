"""``madpo check`` and ``madpo inspect``: what the command line declares, and thin calls of one public function each.

For ``cli.py``: either ``register(subparsers)``, which sets ``run`` as each parser's default, or two entries in its
table of commands, ``Command(CHECK, check_arguments, check_command)`` and ``Command(INSPECT, inspect_arguments,
inspect_command)``. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

CHECK = "look for mistakes in preference data before training with it"
INSPECT = "show what reward margins look like and which tau and c_max suit them"
_DATA = "a .jsonl, .csv or .parquet file, or a hub data set OWNER/NAME[:SPLIT]"


def register(subparsers: Subparsers) -> None:
    """Add both commands; the parsed arguments then hold ``run``, the function to call with them."""
    for name, says, arguments, run in (
        ("check", CHECK, check_arguments, check_command),
        ("inspect", INSPECT, inspect_arguments, inspect_command),
    ):
        parser = subparsers.add_parser(name, help=says, description=f"{says[0].upper()}{says[1:]}.")
        arguments(parser)
        parser.set_defaults(run=run)


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo check``."""
    parser.add_argument("data", metavar="DATA", help=_DATA)
    parser.add_argument("--eval-data", metavar="DATA", help="evaluation pairs, to look for leakage")
    parser.add_argument("--tokenizer", metavar="MODEL", help="count tokens and check the chat template of this model")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of prompt and completion together")
    parser.add_argument(
        "--truncation",
        choices=("drop", "cut", "refuse"),
        default="drop",
        help="what happens to longer pairs: drop them, cut the completion, or refuse the data (default: drop)",
    )
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="write check.json and dropped.jsonl there")
    parser.add_argument("--strict", action="store_true", help="treat a warning as an error")


def check_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo check`` and print its report."""
    from madpo.data import check

    report = check(
        arguments.data,
        eval_data=arguments.eval_data,
        tokenizer=arguments.tokenizer,
        max_length=arguments.max_length,
        truncation=arguments.truncation,
        output=arguments.output_dir,
        strict=arguments.strict,
    )
    print(report.text())
    return 0


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo inspect``."""
    parser.add_argument("data", metavar="DATA", help=f"{_DATA}, with a column reward_margin")
    parser.add_argument(
        "--margin-temperature", type=float, metavar="T", help="divide the margins by this; fitted when left out"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="write one page to look at and play with")


def inspect_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo inspect`` and print its report."""
    from madpo.diagnostics import inspect_data

    report = inspect_data(arguments.data, margin_temperature=arguments.margin_temperature, output=arguments.output)
    print(report.text())
    if arguments.output is not None:
        print(f"Page: {arguments.output.resolve().as_uri()}")
    return 0
