"""``madpo example``, ``doctor`` and ``demo``: what a newcomer runs first. Thin calls, nothing heavy at import."""

from __future__ import annotations

import argparse
from pathlib import Path

from madpo.commands.options import asked, from_file, option
from madpo.core.libraries import loading_libraries
from madpo.core.progress import show
from madpo.core.storage import expanded

EXAMPLE = "write twenty preference pairs, held-out pairs and prompts to begin with"
DEMO = "simulate when reward margins help, in a minute, without a model or a download"
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


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``madpo demo``."""
    option(parser, "output_dir", "output_dir", "where report.html is written (default: demo)", metavar="DIR")
    option(parser, "pairs", "pairs", "training pairs in every world (default: 600)", type=int, metavar="N")
    option(parser, "reward_sd", "reward_sd", "of the true reward, log-odds (default: 1.5)", type=float, metavar="S")
    option(parser, "worlds", "worlds", "draws of everything (default: 12)", type=int, metavar="N")
    option(parser, "kl", "kl", "nats from the reference at which methods are compared (default: 1)", type=float)
    option(parser, "seed", "seed", "of worlds and trainings (default: 0)", type=int)
    says = "replace an earlier result in the folder"
    option(parser, "overwrite", "overwrite", says, action="store_true")
    from_file(parser)


def demo_command(arguments: argparse.Namespace) -> int:
    """Run ``madpo demo``, print its table and where its page is."""
    with loading_libraries():
        from madpo.operations.demo import DemoSettings, demo

    where, settings = asked(arguments, DemoSettings, output_dir=(Path, Path("demo")), overwrite=(bool, False))
    show(demo(where["output_dir"], settings, overwrite=where["overwrite"]).text())
    show(f"Page: {(where['output_dir'] / 'report.html').resolve().as_uri()}")
    return 0
