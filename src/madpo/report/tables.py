"""Tables for programs, spreadsheets and papers: CSV, JSON, LaTeX and Markdown from one description."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from madpo.core.metrics import Estimate
from madpo.core.storage import write_atomically
from madpo.report import published
from madpo.report.charts import captions
from madpo.report.claims import Claim
from madpo.report.compare import Choice
from madpo.report.equal_kl import at_equal_kl
from madpo.report.numbers import by_seed, one, short
from madpo.report.results import Tier

# Column of the table of a tier -> (heading, how it is written).
COLUMNS = {
    "oracle_reward": ("oracle reward", "number"),
    "difference": ("difference to DPO", "signed"),
    "win_rate": ("wins against SFT", "share"),
    "kl": ("KL to reference, nats", "number"),
    "length": ("length, tokens", "number"),
    "distinct_2": ("distinct-2", "number"),
    "ended": ("ended by itself", "share"),
    "heldout_accuracy": ("held-out pairs right", "share"),
    "heldout_log_loss": ("held-out log loss, nats", "number"),
    "log_loss_difference": ("log loss minus DPO's", "signed"),
}
OF_TEXTS = ("length", "distinct_2", "ended")
HELDOUT = ("heldout_accuracy", "heldout_log_loss", "log_loss_difference")
UNEVEN = (
    "Rows have different training seeds. A difference is over the seeds that a row shares with DPO, so it need not be "
    "the difference of the two means; means of different seeds differ by what the seeds differ in."
)
_TEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "β": r"$\beta$", "τ": r"$\tau$", "λ": r"$\lambda$", "\N{GREEK SMALL LETTER ALPHA}": r"$\alpha$",
    "\N{MINUS SIGN}": "$-$", "\N{EN DASH}": "--", "≥": r"$\geq$",
})  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Named columns and their rows; cells are text, numbers, estimates or None. ``name`` is the stem of its files."""

    name: str
    caption: str
    rows: list[dict[str, Any]]

    @property
    def frame(self) -> pd.DataFrame:
        """The rows, every estimate in four columns: itself, its interval, and how many units it is over."""
        wide = [name for name in self.rows[0] if any(isinstance(row[name], Estimate) for row in self.rows)]
        ends = ("", "_low", "_high", "_n")
        flat = []
        for row in self.rows:
            cells: dict[str, Any] = {}
            for name, cell in row.items():
                values = cell if isinstance(cell, Estimate) else (cell, None, None, None)
                cells |= (
                    {f"{name}{end}": v for end, v in zip(ends, values, strict=True)} if name in wide else {name: cell}
                )
            flat.append(cells)
        return pd.DataFrame(flat, dtype=object)

    def csv(self) -> str:
        """Names that a spreadsheet would run as a formula begin with an apostrophe."""

        def no_formula(cell: Any) -> Any:
            return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell

        return self.frame.map(no_formula).to_csv(index=False, lineterminator="\n")

    def json(self) -> str:
        """One object per row."""
        rows = [{name: plain(cell) for name, cell in row.items()} for row in self.rows]
        return json.dumps({"caption": self.caption, "rows": rows}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def latex(self) -> str:
        """A ``table`` environment that needs the package booktabs; names in other scripts need a Unicode engine."""
        text = [all(isinstance(row[name], str | None) for row in self.rows) for name in self.rows[0]]
        cells = pd.DataFrame([{tex(n.replace("_", " ")): _tex_cell(c) for n, c in row.items()} for row in self.rows])
        kinds = "".join("l" if is_text else "r" for is_text in text)
        return cells.to_latex(index=False, escape=False, column_format=kinds, caption=tex(self.caption))


def tex(text: str) -> str:
    """Text in which LaTeX finds nothing to obey."""
    return " ".join(text.split()).translate(_TEX)


def _tex_cell(cell: Any) -> str:
    if isinstance(cell, Estimate):
        return tex(f"{one(cell.mean)} [{one(cell.low)}, {one(cell.high)}]")
    return tex(one(cell)) if isinstance(cell, float) else "" if cell is None else tex(str(cell))


def plain(cell: Any) -> Any:
    """The cell for JSON, which has no infinities."""
    if isinstance(cell, Estimate):
        return cell._asdict()
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def save_tables(tables: Iterable[Table], folder: Path) -> None:
    """Write every table as CSV, JSON and LaTeX into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        for kind, content in (("csv", table.csv()), ("json", table.json()), ("tex", table.latex())):
            write_atomically(folder / f"{table.name}.{kind}", content)


_VALUES = (
    *("oracle_reward", "difference", "win_rate", "kl", "length"),
    *("distinct_1", "distinct_2", "repeated", "ended", "perplexity"),
)


def study_tables(
    tiers: Sequence[Tier],
    choices: Mapping[tuple[str, str], Choice],
    claims: Sequence[Claim],
    beta: float,
    selections: Mapping[str, Sequence[Choice]],
) -> list[Table]:
    """Every table of the report; one without rows is left out."""
    heldout = [name for name in HELDOUT if any(row[name] is not None for tier in tiers for row in tier.rows)]
    measures = ("heldout_pairs", "heldout_accuracy", "heldout_log_loss", "temperature", "calibrated_log_loss")
    found = {
        "table1": [
            {"tier": tier.label, "method": name, **_chosen(choice), "best_on_all": choice.best.name}
            | {"its_reward": choice.best_value}
            | dict(
                zip(("paper", "paper_se"), published.TABLE_1.get(name, {}).get(tier.name, (None, None)), strict=True)
            )
            for tier in tiers
            for (of, name), choice in choices.items()
            if of == tier.name
        ],
        "selections": [
            {"tier": choice.tier.label, "choice": name, **_chosen(choice)}
            for name, own in selections.items()
            for choice in own
        ],
        "methods": [
            {"tier": tier.label, "method": row.name, "group": row.group, "seeds": ", ".join(row.seeds)}
            | {name: row[name] for name in (*_VALUES, *heldout)}
            for tier in tiers
            for row in tier.rows
        ],
        "frontier": [
            {"tier": tier.label, "method": row.method, "setting": row.name, "beta": row.beta}
            | {"seeds": ", ".join(row.seeds), "kl": row["kl"], "reward": row["oracle_reward"]}
            | {f"less_{base.lower()}_at_equal_kl": less.value for base, less in compared.items()}
            for tier in tiers
            for row, compared in at_equal_kl(tier, beta)
        ],
        "claims": [
            {"claim": claim.key, "text": claim.text, "verdict": claim.verdict, "stands_on": claim.shown}
            | {"comparison": c.shown, "difference": c.value, "must_exceed": c.bound}
            | {"per_seed_or_why_not": by_seed(c.per_seed, "signed") or c.missing}
            | {"left_out": "; ".join(f"{seed}: {why}" for seed, why in c.left_out.items())}
            for claim in claims
            for c in claim.comparisons
        ],
        "reward_models": [
            {"tier": tier.label, "seed": seed, **{name: model.metrics.get(name) for name in measures}}
            for tier in tiers
            for seed, model in tier.reward_models.items()
        ],
    }
    return [Table(name, captions()["tables"][name], rows) for name, rows in found.items() if rows]


def _chosen(choice: Choice) -> dict[str, Any]:
    seeds = ", ".join(choice.seeds)
    return {"setting": choice.row.name, "settings": choice.settings, "seeds": seeds, "reward": choice.value}


# Tables next to the page


def results_json(
    tiers: Sequence[Tier], title: str, summary: Sequence[str], experiment: dict[str, Any]
) -> dict[str, Any]:
    """Every number of the page, for programs. Independent of times and machines."""
    return {
        "title": title,
        "summary": list(summary),
        "experiment": experiment,
        "tiers": {
            tier.name: {
                "methods": [
                    {"key": row.key, "name": row.name, "loss": row.loss, "seeds": list(row.seeds)}
                    | {"oracle_reward_per_seed": {seed: plain(value) for seed, value in row.per_seed.items()}}
                    | {name: plain(row[name]) for name in COLUMNS}
                    for row in tier.rows
                ],
                "reward_models": {
                    seed or "seed": {name: plain(value) for name, value in model.metrics.items()}
                    for seed, model in tier.reward_models.items()
                },
                "training_margins": len(tier.margins),
            }
            for tier in tiers
        },
    }


def claim_json(claim: Claim) -> dict[str, Any]:
    """A claim with its comparisons, for programs."""
    names = ("key", "section", "text", "reading", "paper", "verdict", "shown", "partly")
    comparisons = [
        {"what": c.shown, "difference": plain(c.value), "per_seed": dict(c.per_seed), "left_out": dict(c.left_out)}
        | {"same": c.same, "must_exceed": c.bound, "missing": c.missing}
        for c in claim.comparisons
    ]
    return {**{name: getattr(claim, name) for name in names}, "comparisons": comparisons}


def headings(tier: Tier) -> dict[str, tuple[str, str]]:
    """``COLUMNS`` with the tier's own name of the reward."""
    return {**COLUMNS, "oracle_reward": (tier.reward, "number")}


def report_markdown_table(tier: Tier) -> str:
    """The tier's table in Markdown; with a column of seeds where they differ."""
    columns = [name for name in COLUMNS if any(row[name] is not None for row in tier.rows)]
    head = ["method", *(["seeds"] if tier.uneven else []), *(headings(tier)[c][0] for c in columns)]
    lines = [head, ["---"] * len(head)]
    for row in tier.rows:
        seeds = [", ".join(row.seeds)] if tier.uneven else []
        lines.append([*map(markdown_cell, [row.name, *seeds]), *(short(row[c], COLUMNS[c][1]) for c in columns)])
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"{text}\n{UNEVEN}\n" if tier.uneven else text


def markdown_cell(text: str) -> str:
    """Text on one line in which Markdown finds neither a table's bar nor a tag."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
