"""Draws the pictures of README and docs: `make pictures`. Everything on them was computed or printed by a run.

weight.svg: MADPO's weight over the margins of the laptop study's Low pairs (docs/results/laptop). terminal.svg: `madpo
example` and `madpo check`, run in an empty folder. quickstart.svg: the table that `make quickstart` shows. Its numbers
are in quickstart.json, which a finished run in runs/quickstart takes the place of.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from madpo.core.metrics import Estimate
from madpo.report.charts import Chart, WeightPanel
from madpo.report.drawing import save_charts
from madpo.report.live import table_lines, table_row
from madpo.rewards.weight_counts import WeightParameters
from madpo.runner.record import run_status

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUICKSTART = HERE / "quickstart.json"
WIDTH = 104
COMMANDS = ("madpo example .", "madpo check pairs.jsonl --eval_data heldout.jsonl")
THEME = TerminalTheme(
    (27, 31, 36), (230, 230, 226), [(120, 124, 130)] * 8, [(150, 200, 170)] * 8
)  # dark in both colour schemes of a page


def weight() -> None:
    """The weight curve over measured margins."""
    margins = pd.read_parquet(ROOT / "docs/results/laptop/margins.parquet")
    own = margins[margins["folder"].str.startswith("margins/low/seed0") & margins["train"]]
    panel = WeightPanel("τ 7, c 4", own["reward_margin"].to_numpy(), WeightParameters(tau=7, c_max=4))
    save_charts([Chart("weight", "The weight of a pair", "", [panel])], HERE)


def terminal() -> None:
    """Two commands and what they print."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        for line in COMMANDS:
            done = subprocess.run(
                [sys.executable, "-m", "madpo", *line.split()[1:]],
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
            )
            show(console, line, done.stdout.replace(f"{folder}/", "").replace(str(Path(folder).resolve()) + "/", ""))
    save(console, "terminal", "first commands")


def quickstart() -> None:
    """The table of a quickstart: of the one in runs/quickstart, where it is finished, else of the one before."""
    folder = ROOT / "runs" / "quickstart"
    if (folder / "results.json").exists():
        rows = results_of(folder)
        QUICKSTART.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    show(console, "make quickstart", "\n".join(table_lines(json.loads(QUICKSTART.read_text()))))
    save(console, "quickstart", "quickstart")


def results_of(folder: Path) -> list[tuple[str, ...]]:
    """The evaluations of a finished run as rows of the table, in the order of their ends."""
    records = [record for record in run_status(folder).steps.values() if record is not None]
    begun = min(pd.Timestamp(record.provenance["started"]) for record in records)
    tiers = json.loads((folder / "results.json").read_bytes())["tiers"]
    differences = {row["name"]: row["difference"] for tier in tiers.values() for row in tier["methods"]}
    rows = []
    for record in records:
        if record.name.startswith("evaluation/"):
            gap = differences.get(str(record.config["method"]))
            ended = (pd.Timestamp(record.provenance["started"]) - begun).total_seconds() + record.seconds
            rows.append((ended, table_row(record, Estimate(**gap) if isinstance(gap, dict) else None, ended)))
    return [row for _, row in sorted(rows)]


def show(console: Console, command: str, output: str) -> None:
    """A command and its output on the recorded terminal."""
    console.print(Text(f"$ {command}", style="bright_green"))
    console.print(Text(output.rstrip()), soft_wrap=False)
    console.print()


def save(console: Console, name: str, title: str) -> None:
    """The recording as SVG, without the fonts that rich would fetch from another host."""
    text = console.export_svg(title=title, theme=THEME, unique_id=name)
    text = re.sub(r"@font-face\s*\{.*?\}\s*", "", text, flags=re.S)
    (HERE / f"{name}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    weight()
    terminal()
    quickstart()
