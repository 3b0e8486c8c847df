"""A study while it runs: after every evaluation a row on the terminal, and the page written again."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo.core.errors import MadpoError
from madpo.core.metrics import Estimate
from madpo.core.progress import duration, say
from madpo.report.numbers import DASH, short
from madpo.runner.record import Record

if TYPE_CHECKING:
    from rich.table import Table

_SHARE = 0.1  # of the run's time that writing the page again may take
_WIDTHS = {"policy": 20, "pairs": 8, "reward": 20, "less DPO": 22, "KL": 6, "after": 10}


class LiveReport:
    """Called with every record that a run finishes; evaluations are shown.

    Args:
        root: the folder of the run, which holds ``run.json``.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.begun = root, time.monotonic()
        self._shown = 0
        self._not_before = 0.0

    def __call__(self, record: Record) -> None:
        """Show an evaluation. Whatever hinders the page is left to the report at the end, which says it."""
        if not record.name.startswith("evaluation/"):
            return
        page = self._page()
        rows = self._table(record)
        say("\n".join(rows if not self._shown else rows[-1:]))
        if page and not self._shown:
            say(f"The page grows with every result: {page.resolve().as_uri()}")
        self._shown += 1

    def _page(self) -> Path | None:
        from madpo.report.build import rebuild_report

        started = time.monotonic()
        if started < self._not_before:
            return None
        try:
            page = rebuild_report(self.root, figures=False)
        except MadpoError:
            return None
        ended = time.monotonic()
        self._not_before = ended + (ended - started) * (1 / _SHARE - 1) if self._shown else 0.0
        return page

    def _table(self, record: Record) -> list[str]:
        """The lines of a table with this one row."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False)
        console.print(_row(record, self._less_dpo(record), time.monotonic() - self.begun))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return [line.rstrip() for line in text.splitlines() if line.strip()]

    def _less_dpo(self, record: Record) -> Estimate | None:
        """The paired difference to DPO on the same prompts, from the page that was just written."""
        try:
            tiers = json.loads((self.root / "results.json").read_bytes())["tiers"]
        except (OSError, ValueError, KeyError):
            return None
        methods = tiers.get(str(record.config.get("tier")), {}).get("methods", [])
        found: Any = next((row["difference"] for row in methods if row["name"] == record.config.get("method")), None)
        return Estimate(**found) if isinstance(found, dict) else None


def _row(record: Record, less_dpo: Estimate | None, seconds: float) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, width in _WIDTHS.items():
        table.add_column(name, width=width, no_wrap=True, justify="left" if width in (20, 8) else "right")
    reward, kl = (found if isinstance(found := record.metrics.get(key), Estimate) else None for key in _MEASURES)
    sft = record.name.startswith("evaluation/sft/")
    table.add_row(
        escape(str(record.config.get("method", record.name))),
        DASH if sft else str(record.config.get("tier", "")),
        short(reward),
        short(less_dpo, "signed"),
        DASH if kl is None or sft else f"{kl.mean:.2f}",
        duration(seconds),
    )
    return table


_MEASURES = ("oracle_reward", "kl")
