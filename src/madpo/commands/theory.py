"""``madpo verify-theory`` and ``verify-auto``: claims of the paper, and of auto, checked numerically."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field

from madpo.commands.from_settings import Configurable, part
from madpo.core.config import Frozen
from madpo.core.libraries import loading_libraries
from madpo.core.progress import show
from madpo.operations.settings import VerifyAutoSettings


class VerifyTheory(Frozen):
    pass


def verify_theory(options: VerifyTheory) -> int:
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
    output_dir: Path | None = None
    """Keep the results in this folder, and continue from them."""
    processes: int = Field(default=1, ge=1)
    """Settings at once, each in a process of its own."""


def verify_auto(options: VerifyAuto) -> int:
    """Simulate, and print a table."""
    with loading_libraries():
        from madpo.operations.verify_auto import verify_auto
    from madpo.runner.executors import Processes

    executor = Processes(options.processes) if options.processes > 1 else None
    show(verify_auto(part(options, VerifyAutoSettings), options.output_dir, executor=executor).text())
    if options.output_dir:
        show(f"written to {options.output_dir / 'report.json'}")
    return 0
