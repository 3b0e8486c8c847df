"""A study with everything that its page, tables and figures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from madpo.report.charts import Chart, WeightPanel
from madpo.report.claims import Claim, claims
from madpo.report.compare import Choice, base_beta, selection_json, selections
from madpo.report.results import Tier, collect
from madpo.report.study_charts import (
    ablation_chart,
    calibration_chart,
    choices_of,
    frontier_chart,
    loss_chart,
    main_chart,
    margin_chart,
    reward_model_chart,
    sensitivity_chart,
)
from madpo.report.study_sections import weighting
from madpo.runner.record import Record

CORE = ("", "core")  # groups whose training curves are shown first


@dataclass(frozen=True, eq=False)
class Study:
    """What was read from a run and compared.

    Attributes:
        beta: that methods share in Table 1; choices: (tier, method of Table 1) -> its chosen setting.
        selections: the experiment's own choices; selection: the same for programs.
        planned: the experiment's rows; experiment: its settings.
    """

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
        return cls(tiers, beta, choices_of(tiers, beta), claims(tiers), found, chosen, rows, settings)

    @property
    def seeds(self) -> int:
        """Training seeds of the method that has the most."""
        return max((len(row.seeds) for tier in self.tiers for row in tier.policies), default=0)

    @cached_property
    def charts(self) -> list[Chart]:
        """Every figure that can be drawn."""
        tiers, beta = self.tiers, self.beta
        groups = list(dict.fromkeys(row.group for tier in tiers for row in tier.rows if row.group not in CORE))
        training = [("", CORE, ""), *((f"_{group}", (group,), f", {group}") for group in groups)]
        found = [
            main_chart(tiers, self.choices),
            sensitivity_chart(tiers, beta),
            ablation_chart(tiers, beta),
            frontier_chart(tiers, beta),
            calibration_chart(tiers),
            reward_model_chart(tiers),
            *(loss_chart(tiers, f"training_loss{end}", f"Training loss{words}", of) for end, of, words in training),
            *(
                margin_chart(tiers, f"training_margins{end}", f"Implicit margin{words}", of)
                for end, of, words in training
            ),
        ]
        panels = [
            WeightPanel(tier.label, margins, p)
            for tier in tiers
            if len(tier.margins)
            for p, margins in [weighting(tier)]
        ]
        weights = [Chart("weights", "Margins and their weights", "", panels)] if panels else []
        return [*(chart for chart in found if chart is not None), *weights]
