"""Which difference between two rows a run can tell, before it runs: from finished evaluations, of this run or a pilot.

A prompt's difference between two rows varies from prompt to prompt (``between``), and from response to response of one
prompt (``within``). Over P prompts with R responses each (samples times training seeds), the mean of the difference has
the standard error sqrt((between + within / R) / P), and a true difference of 2.8 standard errors is found in 80 % of
runs of one seed by a two-sided test at 5 %. Intervals of several seeds hold what their means differ by, so they ask
for more (:func:`errors`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import gammaincinv, ndtri

from madpo.core.errors import ConfigError
from madpo.core.statistics import t_quantile
from madpo.operations.study_evaluation import EvaluationStage
from madpo.report.collect import collect
from madpo.report.results import Row, Tier
from madpo.runner.record import run_status
from madpo.runner.step import Step
from madpo.study.estimates import heldout_prompts

POWER, LEVEL = 0.8, 0.05
ERRORS = float(ndtri(1 - LEVEL / 2) + ndtri(POWER))
"""Standard errors that a difference of one seed must have."""
SAMPLES = 12  # responses to a prompt that the lines look ahead to


class Spread(NamedTuple):
    """Variances of a difference of rewards, in the oracle's unit squared; None where one response a prompt is known,
    and then ``within`` is the whole of it."""

    between: float | None
    within: float

    def detectable(self, prompts: int, samples: int, seeds: int = 1) -> tuple[float, float]:
        """Least difference that is found with the power, at best and at worst (equal where both parts are known)."""
        parts = [(self.between or 0.0, self.within / (samples * seeds))]
        parts += [(self.within, 0.0)] * (self.between is None)  # all of it from prompt to prompt
        found = [
            errors(prompts, seeds, within / (between + within or 1.0)) * math.sqrt((between + within) / prompts)
            for between, within in parts
        ]
        return min(found), max(found)


def errors(prompts: int, seeds: int, share: float) -> float:
    """Standard errors over prompts that a difference must have to be found with the power.

    Where trainings differ in their responses only, the variance of K seeds' means over K is ``share`` (of the squared
    error, what varies from response to response) times a chi-square variable over its K - 1 degrees of freedom.
    That is the interval of two rows; with more, whose spread is pooled, fewer errors are enough.
    """
    if seeds == 1:
        return ERRORS
    grid = (np.arange(400) + 0.5) / 400
    spread = share * 2 * gammaincinv((seeds - 1) / 2, grid) / (seeds - 1)
    half_widths = t_quantile(1.0, spread, prompts, seeds - 1) * np.sqrt(1 + spread)
    return float(np.quantile(half_widths[:, None] + ndtri(grid), POWER))


def spread(differences: pd.DataFrame) -> Spread:
    """The two variances, of prompts by responses; prompts that lack one are left out.

    Between prompts: the variance of a prompt's mean less what the responses' own variance adds to it, at least 0.
    """
    values = differences.dropna().to_numpy(dtype=float)
    responses = values.shape[1]
    if responses == 1:
        return Spread(None, float(values.var(ddof=1)))
    within = float(values.var(axis=1, ddof=1).mean())
    return Spread(max(0.0, float(values.mean(axis=1).var(ddof=1)) - within / responses), within)


def spread_of(tier: Tier) -> tuple[Spread, int] | None:
    """The medians over the tier's rows of their differences to plain DPO, and how many rows there are; None without."""
    found = [s for row in tier.policies if (s := _against(tier, row)) is not None]
    if not found:
        return None
    known = [s for s in found if s.between is not None] or found
    between = None if known[0].between is None else float(np.median([s.between for s in known]))
    return Spread(between, float(np.median([s.within for s in known]))), len(known)


def _against(tier: Tier, row: Row) -> Spread | None:
    base = tier.baseline
    if base is None or row.key == base.key:
        return None
    sides = [tier.samples[tier.samples["key"] == one.key] for one in (row, base)]
    tables = [side.pivot_table(index="prompt_id", columns=["seed", "sample"], values="reward") for side in sides]
    difference = (tables[0] - tables[1]).dropna(axis=1, how="all").dropna()
    return spread(difference) if len(difference) > 2 and difference.shape[1] else None


def detectable_lines(graph: Iterable[Step], root: Path, pilot: Path | None = None) -> list[str]:
    """What ``--dry-run`` says: per tier, the least difference between two rows that the run can tell.

    Args:
        graph: the steps of the run; root: its folder, whose finished evaluations are read.
        pilot: a run's folder or an export to read them from instead.

    Raises:
        ConfigError: ``pilot`` is not a run.
    """
    planned = _planned(graph)
    folder = root if pilot is None else pilot
    if not (folder / "run.json").is_file():
        if pilot is not None:
            raise ConfigError(f"--pilot {pilot}: there is no run.json; give the folder of a run, or of an export")
        return ["Which differences it can tell is known from the first finished rows, or by --pilot FOLDER."]
    status = run_status(folder)
    records = {name: record for name, record in status.steps.items() if record is not None}
    lines = []
    for tier in collect(folder, records, status.about.get("rows", ())):
        if tier.name not in planned or (found := spread_of(tier)) is None:
            continue
        variance, rows = found
        prompts, samples, seeds = planned[tier.name]
        now = _words(*variance.detectable(prompts, samples, seeds))
        more = _words(*variance.detectable(prompts, SAMPLES, seeds))
        lines.append(
            f"{tier.label}: {prompts} prompts x {samples} response{'s' * (samples > 1)} x {seeds} "
            f"seed{'s' * (seeds > 1)} can tell a difference of {now} between two rows"
            + (f"; with {SAMPLES} responses to a prompt {more}" if samples < SAMPLES else "")
            + f" (from {rows} finished row{'s' * (rows > 1)})"
        )
    if lines:
        lines.append(
            f"(in the oracle's unit, found in {POWER:.0%} of runs at a level of {LEVEL:.0%}; what another training "
            "would change is not in it; intervals of several seeds allow for it, and ask for more than one seed's)"
        )
    return lines or ["Which differences it can tell is known when DPO and another row are finished, or by --pilot."]


def _planned(graph: Iterable[Step]) -> Mapping[str, tuple[int, int, int]]:
    """Tier -> prompts, samples and seeds of its evaluations: the median row's samples, the most seeds of a row."""
    steps = [s for s in graph if isinstance(s.config, EvaluationStage) and s.name.split("/")[1] != "sft"]
    by_tier: dict[str, list[Step]] = {}
    for step in steps:
        by_tier.setdefault(step.name.split("/")[1], []).append(step)
    found = {}
    for tier, own in by_tier.items():
        configs = [step.config for step in own if isinstance(step.config, EvaluationStage)]
        seeds = pd.Series([step.name.rsplit("/", 1)[0] for step in own]).value_counts().max()
        samples = int(np.median([config.samples_per_prompt for config in configs]))
        found[tier] = (heldout_prompts(own[0]), samples, int(seeds))
    return found


def _words(best: float, worst: float) -> str:
    low, high = f"{best:.2g}", f"{worst:.2g}"
    return low if low == high else f"{low} to {high}"
