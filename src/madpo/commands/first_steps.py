"""``madpo example``, ``doctor`` and ``demo``: what a newcomer runs first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from madpo.commands.from_settings import Configurable, part
from madpo.core.config import Frozen
from madpo.core.libraries import loading_libraries
from madpo.core.options import Cli
from madpo.core.progress import show
from madpo.operations.settings import DemoSettings


class Example(Frozen):
    folder: Annotated[Path, Cli(positional=True)]
    """Where pairs.jsonl, heldout.jsonl and prompts.jsonl are written."""


def example(options: Example) -> int:
    """Write the files and name the next command.

    Example:
        madpo example data
    """
    from madpo.data.example import write_example

    paths = write_example(options.folder)
    show("\n".join(f"written: {path}" for path in paths))
    show(f"next: madpo check {paths[0]} --eval_data {paths[1]}")
    return 0


class Doctor(Frozen):
    pass


def doctor(options: Doctor) -> int:
    """Print every line as it is known."""
    with loading_libraries():
        from madpo.study.doctor import diagnose

    for name, found in diagnose():
        show(f"{name:<15} {found}")
    return 0


class Demo(Configurable, DemoSettings):
    output_dir: Path = Path("demo")
    """Where report.html is written."""
    overwrite: bool = False
    """Replace an earlier result in the folder."""


def demo(options: Demo) -> int:
    """Print the table and where its page is.

    Example:
        madpo demo --reward_sd 3 --output_dir demo
    """
    with loading_libraries():
        from madpo.operations.demo import demo

    show(demo(options.output_dir, part(options, DemoSettings), overwrite=options.overwrite).text())
    show(f"Page: {(options.output_dir / 'report.html').resolve().as_uri()}")
    return 0
