"""A study as its report sees it: what was read from a run, compared and chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from madpo.report import published
from madpo.report.charts import Chart
from madpo.report.claims import EQUAL_KL, Claim, claims
from madpo.report.collect import collect
from madpo.report.compare import Choice, base_beta, chosen, selection_json, selections
from madpo.report.own import own_opening, own_verdict
from madpo.report.results import Tier
from madpo.report.study_charts import study_charts
from madpo.report.summary import Verdict, opening, verdict
from madpo.runner.record import Record

CORE = ("core", "auto")  # groups whose methods the first screen shows


@dataclass(frozen=True, eq=False)
class Study:
    """What was read from a run and compared.

    Attributes:
        paper: whether the study makes its own pairs and an oracle judges, as in the paper: then it has the paper's
            Table 1 and claims. Others compare losses on pairs that are there.
        beta: that methods share in Table 1; choices: (tier, method of Table 1) -> its chosen setting.
        selections: the experiment's own choices; selection: the same for programs.
        planned: the experiment's rows; experiment: its settings.
    """

    paper: bool
    tiers: list[Tier]
    beta: float
    choices: dict[tuple[str, str], Choice]
    claims: list[Claim]
    selections: dict[str, list[Choice]]
    selection: dict[str, Any]
    planned: Sequence[Mapping[str, Any]]
    experiment: dict[str, Any]

    @classmethod
    def of(cls, root: Path, records: Mapping[str, Record], experiment: Mapping[str, Any]) -> Study:
        """Read the records and what their steps wrote."""
        # "rows" has the sweeps of "method" spelled out.
        rows = experiment.get("rows") or experiment.get("method", [])
        rows = [row for row in rows if isinstance(row, Mapping) and "name" in row]
        seed = int(experiment.get("selection_seed", 0))
        pairs = experiment.get("pairs")
        planned = pairs.get("tiers", ()) if isinstance(pairs, Mapping) else ()
        tiers = collect(root, records, rows, seed, map(str, planned))
        beta = base_beta(tiers)
        wanted = {str(s["name"]): s["among"] for s in experiment.get("selection", [])}
        found = selections(tiers, wanted)
        keys = {str(row["name"]): str(row.get("key", row["name"])) for row in rows}
        chosen = selection_json(found, wanted, keys, seed)
        settings = {name: value for name, value in experiment.items() if name != "rows"}
        paper = "data" not in experiment
        choices, tested = choices_of(tiers, beta) if paper else {}, claims(tiers)
        tested = tested if paper else [claim for claim in tested if claim.section == EQUAL_KL]
        return cls(paper, tiers, beta, choices, tested, found, chosen, rows, settings)

    @property
    def judged(self) -> list[Tier]:
        """The tiers with a trained policy."""
        return [tier for tier in self.tiers if tier.policies]

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """Name of a tier with a trained policy -> its result."""
        return {tier.name: verdict(tier) if self.paper else own_verdict(tier) for tier in self.judged}

    @property
    def opening(self) -> str:
        """What was compared, on what."""
        return opening(self.tiers) if self.paper or not self.judged else own_opening(self.judged[0])

    @property
    def summary(self) -> list[str]:
        """What was done and what came of it, one paragraph per entry."""
        return [self.opening, *(found.text for found in self.verdicts.values())]

    @property
    def seeds(self) -> int:
        """Training seeds of the method that has the most."""
        return max((len(row.seeds) for tier in self.tiers for row in tier.policies), default=0)

    @cached_property
    def charts(self) -> list[Chart]:
        """Every figure that can be drawn."""
        return study_charts(self.tiers, self.beta, self.choices)


def choices_of(tiers: Sequence[Tier], beta: float) -> dict[tuple[str, str], Choice]:
    """(tier, method) -> its chosen setting: the paper's methods that were run, then the others of the core."""
    core = (row.method for tier in tiers for row in tier.policies if row.group in CORE)
    names = dict.fromkeys([*published.METHODS, *core])
    found = {(tier.name, name): chosen(tier, name, beta) for tier in tiers for name in names}
    return {key: choice for key, choice in found.items() if choice is not None}
