"""``madpo example``, ``doctor`` and ``demo``: what a newcomer runs first. Thin calls, nothing heavy at import."""

from __future__ import annotations

import argparse

from madpo.core.libraries import loading_libraries
from madpo.core.progress import show
from madpo.core.storage import expanded

EXAMPLE = "write twenty preference pairs, held-out pairs and prompts to begin with"
DOCTOR = "say what is installed, what this machine can do, and how fast"


def example_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo example``."""
    parser.add_argument("folder", type=expanded, metavar="DIR", help="where pairs.jsonl and the others are written")


def example_command(arguments: argparse.Namespace) -> int:
    """Write the files and name the next command."""
    from madpo.data.example import write_example

    paths = write_example(arguments.folder)
    show("\n".join(f"written: {path}" for path in paths))
    show(f"next: madpo check {paths[0]} --eval_data {paths[1]}")
    return 0


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def doctor_command(arguments: argparse.Namespace) -> int:
    """Print every line as it is known."""
    with loading_libraries():
        from madpo.study.doctor import diagnose

    for name, found in diagnose():
        show(f"{name:<15} {found}")
    return 0
