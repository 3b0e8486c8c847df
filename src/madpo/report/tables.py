"""Tables for programs, spreadsheets and papers: CSV, JSON and LaTeX from one description."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madpo.records import Estimate
from madpo.report import published
from madpo.report.claims import Claim
from madpo.report.families import Choice, family_of
from madpo.report.frontier import frontiers, less_dpo
from madpo.results import SFT, Row, Tier
from madpo.storage import write_atomically
from madpo.summary import no_formula, one

Cell = str | int | float | Estimate | None

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "β": r"$\beta$", "τ": r"$\tau$", "λ": r"$\lambda$", "\N{GREEK SMALL LETTER ALPHA}": r"$\alpha$",
    "\N{MINUS SIGN}": "$-$", "\N{EN DASH}": "--", "≥": r"$\geq$",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Named columns and their rows; ``name`` is the stem of its files."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def csv(self) -> str:
        """An estimate takes four columns: itself, its interval, and how many units it is over."""
        wide = [any(isinstance(row[k], Estimate) for row in self.rows) for k in range(len(self.columns))]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        head = []
        for name, is_estimate in zip(self.columns, wide, strict=True):
            head += [name, f"{name}_low", f"{name}_high", f"{name}_n"] if is_estimate else [name]
        writer.writerow(head)
        for row in self.rows:
            cells: list[Any] = []
            for cell, is_estimate in zip(row, wide, strict=True):
                if isinstance(cell, Estimate):
                    cells += cell
                else:
                    value = no_formula(cell) if isinstance(cell, str) else cell
                    cells += [value, "", "", ""] if is_estimate else [value]
            writer.writerow(cells)
        return out.getvalue()

    def json(self) -> str:
        """One object per row."""
        rows = [dict(zip(self.columns, map(_plain, row), strict=True)) for row in self.rows]
        return json.dumps({"caption": self.caption, "rows": rows}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def latex(self) -> str:
        """A ``table`` environment that needs no package; names in other scripts need a Unicode engine."""
        kinds = "".join("l" if all(isinstance(row[k], str | None) for row in self.rows) else "r" for k in self._span)
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{tex(self.caption)}}}",
            rf"\begin{{tabular}}{{{kinds}}}",
            r"\hline",
            f"{' & '.join(tex(name.replace('_', ' ')) for name in self.columns)} \\\\",
            r"\hline",
            *(f"{' & '.join(_tex_cell(cell) for cell in row)} \\\\" for row in self.rows),
            r"\hline",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    @property
    def _span(self) -> range:
        return range(len(self.columns))


def tex(text: str) -> str:
    """Text in which LaTeX finds nothing to obey."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _tex_cell(cell: Cell) -> str:
    if isinstance(cell, Estimate):
        return tex(f"{one(cell.mean)} [{one(cell.low)}, {one(cell.high)}]")
    if isinstance(cell, float):
        return tex(one(cell))
    return "" if cell is None else tex(str(cell))


def _plain(cell: Cell) -> Any:
    if isinstance(cell, Estimate):
        return cell._asdict()
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def save_tables(tables: Iterable[Table], folder: Path) -> list[Path]:
    """Write every table as CSV, JSON and LaTeX into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        for kind, content in (("csv", table.csv()), ("json", table.json()), ("tex", table.latex())):
            path = folder / f"{table.name}.{kind}"
            write_atomically(path, content)
            written.append(path)
    return written


def study_tables(
    tiers: Sequence[Tier],
    choices: Mapping[tuple[str, str], Choice],
    found: Sequence[Claim],
    beta: float,
    selections: Mapping[str, Sequence[Choice]],
) -> list[Table]:
    """Every table of the report; one without rows is left out."""
    tables = [
        _main(tiers, choices),
        _selections(selections),
        _methods(tiers),
        _frontier(tiers, beta),
        _claims(found),
        _reward_models(tiers),
    ]
    return [table for table in tables if table.rows]


def _main(tiers: Sequence[Tier], choices: Mapping[tuple[str, str], Choice]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for tier in tiers:
        for name in published.METHODS:
            choice = choices.get((tier.name, name))
            if choice is None:
                continue
            mean, error = published.TABLE_1[name].get(tier.name, (None, None))
            value, best = choice.value, choice.best
            rows.append(
                (
                    *(tier.label, name, choice.row.name, choice.settings, ", ".join(choice.seeds), value),
                    *(best.name, choice.best_value, mean, error),
                )
            )
    columns = (
        *("tier", "method", "setting", "settings", "seeds", "reward"),
        *("best_on_all", "its_reward", "paper", "paper_se"),
    )
    caption = (
        "Mean oracle reward with 95 % intervals over prompts. Of several settings one is chosen on one half of the "
        "prompts and reported on the other; best_on_all is the setting with the highest mean on all prompts, as the "
        "paper chooses."
    )
    return Table("table1", caption, columns, tuple(rows))


def _selections(found: Mapping[str, Sequence[Choice]]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (choice.tier.capitalize(), name, choice.row.name, choice.settings, ", ".join(choice.seeds), choice.value)
        for name, choices in found.items()
        for choice in choices
    ]
    caption = "The experiment's choices, made on one half of the held-out prompts and reported on the other."
    return Table("selections", caption, ("tier", "choice", "setting", "settings", "seeds", "reward"), tuple(rows))


def _methods(tiers: Sequence[Tier]) -> Table:
    names = ["oracle_reward", "difference", "win_rate", "kl", "length", "distinct_1", "distinct_2", "repeated"]
    names += ["ended", "perplexity"]
    rows = [
        (tier.label, row.name, row.group, ", ".join(row.seeds), *(getattr(row, name) for name in names))
        for tier in tiers
        for row in tier.rows
    ]
    caption = "Every method of the run: means over held-out prompts with 95 % intervals."
    return Table("methods", caption, ("tier", "method", "group", "seeds", *names), tuple(rows))


def _frontier(tiers: Sequence[Tier], beta: float) -> Table:
    rows = [
        (
            *(tier.label, family, row.name, _number(row.loss.get("beta")), ", ".join(row.seeds)),
            *(row.kl, row.oracle_reward, less_dpo(tier, row).value),
        )
        for tier in tiers
        for family, line in frontiers(tier, beta).items()
        for row in line
        if family_of(row) != SFT
    ]
    columns = ("tier", "method", "setting", "beta", "seeds", "kl", "reward", "less_dpo_at_equal_kl")
    caption = (
        "Reward against KL to the reference, nats, over beta, in each tier over the seeds that its rows share; and the "
        "reward less that of DPO's curve at the same KL."
    )
    return Table("frontier", caption, columns, tuple(rows))


def _claims(found: Sequence[Claim]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for claim in found:
        for c in claim.comparisons:
            seeds = ", ".join(f"{seed} {one(value, 'signed')}".strip() for seed, value in c.per_seed.items())
            words = (claim.key, claim.text, claim.verdict, claim.shown)
            rows.append((*words, c.what, c.value, c.bound, seeds or c.missing))
    columns = (
        *("claim", "text", "verdict", "stands_on", "comparison"),
        *("difference", "must_exceed", "per_seed_or_why_not"),
    )
    caption = "The paper's claims, the comparisons that each is read as, and this run's differences."
    return Table("claims", caption, columns, tuple(rows))


def _reward_models(tiers: Sequence[Tier]) -> Table:
    names = ("heldout_pairs", "heldout_accuracy", "heldout_log_loss", "temperature", "calibrated_log_loss")
    rows: list[tuple[Cell, ...]] = [
        (tier.label, seed, *(model.metrics.get(name) for name in names))
        for tier in tiers
        for seed, model in tier.reward_models.items()
    ]
    caption = "Reward models on pairs that they were not trained on; log-losses in nats."
    return Table("reward_models", caption, ("tier", "seed", *names), tuple(rows))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


# What stands at a value that changes nothing is not worth a word.
_SILENT = {"lam": 1.0, "margin_temperature": 1.0, "label_smoothing": 0.0}
_SPOKEN = (
    *("beta", "tau", "c_max", "c_min", "lam", "margin_temperature", "batch_scale", "keep", "flip_rate", "alpha"),
    *("gamma", "gamma_beta_ratio", "eta", "label_smoothing"),
)


def settings_words(row: Row) -> str:
    """ "beta 0.1, tau 7, c max 4": the numbers that tell a row from others of its kind."""
    numbers = {name: value for name in _SPOKEN if isinstance(value := row.loss.get(name), int | float)}
    shown = {name: value for name, value in numbers.items() if _SILENT.get(name) != value}
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in shown.items())
