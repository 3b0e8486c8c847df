"""A study while it runs: after every evaluation a row on the terminal, and the page written again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from madpo.core.errors import MadpoError
from madpo.core.metrics import Estimate
from madpo.core.progress import duration, say
from madpo.report.numbers import DASH, short
from madpo.report.sources import MEASURES
from madpo.runner.record import Record

_SHARE = 0.1  # of the run's time that writing the page again may take
_WHOLE = 8  # rows up to which the table is shown whole every time
_WIDTHS = {"policy": 15, "pairs": 7, "reward": 22, "minus DPO": 23, "KL": 6, "after": 11}


class LiveReport:
    """Called with every record that a run finishes; evaluations are shown.

    Args:
        root: the folder of the run, which holds ``run.json``.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.begun = root, time.monotonic()
        self._rows: list[tuple[Record, float]] = []
        self._not_before, self._linked = 0.0, False

    def __call__(self, record: Record) -> None:
        """Show an evaluation. Whatever hinders the page is left to the report at the end, which says it."""
        if not record.name.startswith(MEASURES):
            return
        page = self._page()
        if page and not self._linked:
            self._linked = True
            say(f"The page grows with every result: {page.resolve().as_uri()}")
        if record.name.startswith("heldout/"):
            right, loss = _estimates(record, "heldout_accuracy", "heldout_log_loss")
            over_dpo = self._over_dpo(record, "log_loss_difference")
            gap = "" if over_dpo is None else f", {short(-over_dpo, 'signed', 3)} gained over DPO"
            say(
                f"{record.config.get('method')}: {short(right, 'share')} of held-out pairs are ordered as labelled, "
                f"log loss {short(loss, digits=3)} nats{gap}"
            )
            return
        self._rows.append((record, time.monotonic() - self.begun))
        # A difference to DPO is known from the first page after the evaluation.
        lines = table_lines([table_row(done, self._over_dpo(done), seconds) for done, seconds in self._rows])
        say("\n".join(lines if len(self._rows) <= _WHOLE else lines[-1:]))

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
        self._not_before = ended + (ended - started) * (1 / _SHARE - 1) if self._linked else 0.0
        return page

    def _over_dpo(self, record: Record, name: str = "difference") -> Estimate | None:
        """The paired difference to DPO on the same prompts, from the page that was just written."""
        try:
            tiers = json.loads((self.root / "results.json").read_bytes())["tiers"]
        except (OSError, ValueError, KeyError):
            return None
        _, tier, key, *_ = [*record.name.split("/"), ""]
        methods = tiers.get(tier, {}).get("methods", [])
        found: Any = next((row[name] for row in methods if row["key"] == key), None)
        return Estimate(**found) if isinstance(found, dict) else None


def table_row(record: Record, over_dpo: Estimate | None, seconds: float) -> tuple[str, ...]:
    """An evaluation ``seconds`` after the run began, in the columns of the table; the SFT model has no pairs and no KL.

    Args:
        over_dpo: the paired difference of the reward to DPO.
    """
    reward, kl = _estimates(record, "oracle_reward", "kl")
    sft = record.name.startswith("evaluation/sft/")
    name = str(record.config.get("method", record.name.removeprefix("evaluation/")))
    pairs, distance = (DASH, DASH) if sft else (record.name.split("/")[1], DASH if kl is None else f"{kl.mean:.2f}")
    return name, pairs, short(reward), short(over_dpo, "signed"), distance, duration(seconds)


def _estimates(record: Record, *names: str) -> list[Estimate | None]:
    return [value if isinstance(value := record.metrics.get(name), Estimate) else None for name in names]


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Results as a table in plain text, in columns that stay where they are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, width in _WIDTHS.items():
        table.add_column(name, width=width, no_wrap=True, justify="left" if name in ("policy", "pairs") else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=sum(_WIDTHS.values()) + 3 * len(_WIDTHS), color_system=None)
    with console.capture() as drawn:
        console.print(table)
    return [line.rstrip() for line in drawn.get().splitlines() if line.strip()]
