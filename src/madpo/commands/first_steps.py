"""``madpo example``, ``doctor``, ``demo``, ``verify-theory`` and ``verify-auto``: commands that need no data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from madpo.commands.from_settings import Configurable
from madpo.commands.shared import show_next, show_page
from madpo.core.config import Frozen, part
from madpo.core.libraries import loading_libraries
from madpo.core.options import Cli
from madpo.core.progress import show
from madpo.operations.settings import DemoSettings, VerifyAutoSettings


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
    show_next("check", paths[0], "--eval_data", paths[1])
    return 0


class Nothing(Frozen):
    pass


def doctor(options: Nothing) -> int:
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
    show_page(options.output_dir / "report.html")
    return 0


def verify_theory(options: Nothing) -> int:
    """Print a table of the claims; the status is 1 where one that the code relies on does not hold."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    with loading_libraries():
        from madpo.losses.theory import verify_theory

    table = Table(title="The paper's claims, numerically", expand=True, show_lines=True)
    table.add_column("claim", ratio=2)
    table.add_column("statement", ratio=5)
    for name in ("deviation", "tolerance", "holds"):
        table.add_column(name, no_wrap=True)
    broken = []
    for claim in verify_theory():
        verdict = "yes" if claim.holds else "NO" if claim.relied_on else "no*"
        table.add_row(
            escape(claim.name), escape(claim.statement), f"{claim.deviation:.1e}", f"{claim.tolerance:.0e}", verdict
        )
        if claim.relied_on and not claim.holds:
            broken.append(claim.name)
    console = Console(color_system=None)  # which also draws no lines that the terminal's encoding lacks
    with console.capture() as drawn:
        console.print(table)
    show(drawn.get().rstrip())
    show("* known not to hold as stated, and not relied on; docs/method.md says what holds instead")
    if broken:
        show(f"madpo: claims that the code relies on do not hold: {', '.join(broken)}", sys.stderr)
    return 1 if broken else 0


class VerifyAuto(Configurable, VerifyAutoSettings):
    output_dir: Path = Path("verify-auto")
    """Where report.html is written, and a folder for every setting, from which the same command continues."""
    processes: int = Field(default=1, ge=1)
    """Settings at once, each in a process of its own."""


def verify_auto(options: VerifyAuto) -> int:
    """Simulate, and print a table and where its page is.

    Example:
        madpo verify-auto --worlds 16 --processes 2
    """
    with loading_libraries():
        from madpo.operations.verify_auto import verify_auto
    from madpo.runner.executors import Processes

    executor = Processes(options.processes) if options.processes > 1 else None
    show(verify_auto(part(options, VerifyAutoSettings), options.output_dir, executor=executor).text())
    show_page(options.output_dir / "report.html")
    return 0
