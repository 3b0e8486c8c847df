"""From the records of a run to its report: one page, and its tables and figures as files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from madpo.core.errors import DataError, MadpoError
from madpo.core.storage import storage_errors, write_atomically
from madpo.report.caveats import empty_cells, idle_parts, trimmed_base, weights_from
from madpo.report.charts import (
    Chart,
    WeightPanel,
    ablation_chart,
    calibration_chart,
    choices_of,
    frontier_chart,
    main_chart,
    reward_model_chart,
    sensitivity_chart,
    training_chart,
)
from madpo.report.claims import Claim, claims, counts, ties
from madpo.report.compare import NOT_RUN, Choice, base_beta, selection_json, selections
from madpo.report.drawing import chart_html
from madpo.report.markup import details, nothing, page
from madpo.report.plots import save_charts
from madpo.report.provenance import differences_html, provenance_html, state
from madpo.report.results import Tier, collect, planned_row
from madpo.report.samples import sample_data, static_samples
from madpo.report.sections import (
    chart_or,
    claims_html,
    degeneration_html,
    equal_kl_html,
    main_table,
    reward_models_html,
    selections_html,
    tier_results,
    weight_data,
    weighting,
    weights_html,
)
from madpo.report.selection import FILE
from madpo.report.summary import headline
from madpo.report.tables import (
    claim_json,
    report_markdown_table,
    results_json,
    save_tables,
    study_tables,
)
from madpo.runner.record import Record, run_status

# Logged column -> (stem of the file, what it is).
CURVES = {
    "loss": ("training_loss", "training loss"),
    "rewards/margins": ("training_margins", "implicit reward margin β·h, nats"),
}
CORE = ("", "core")  # groups whose curves are shown at once; others are folded away


@dataclass(frozen=True)
class Report:
    """Everything that the page and the files show."""

    tiers: list[Tier]
    beta: float
    choices: dict[tuple[str, str], Choice]
    claims: list[Claim]
    selections: dict[str, list[Choice]]
    selection: dict[str, Any]
    planned: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, root: Path, records: Mapping[str, Record], experiment: Mapping[str, Any]) -> Report:
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
        return cls(tiers, beta, choices_of(tiers, beta), claims(tiers), found, chosen, rows)

    @property
    def seeds(self) -> int:
        """Training seeds of the method that has the most."""
        return max((len(row.seeds) for tier in self.tiers for row in tier.policies), default=0)


def build_report(
    root: Path,
    records: Mapping[str, Record],
    title: str,
    experiment: dict[str, Any],
    unfinished: Mapping[str, str] | None = None,
    *,
    figures: bool = True,
) -> Path:
    """Write ``report.html``, ``results.{json,md}``, ``selection.json``, ``tables/`` and ``figures/`` into ``root``.

    Args:
        root: the folder of the run; the records' samples, margins and logs are read from their steps' folders.
        records: finished records by step name. What is missing is said to be missing.
        title: of the page.
        experiment: the resolved experiment, which knows the methods that were planned.
        unfinished: step without a record -> "to run", "begun" or "failed: ...".
        figures: whether the page's figures are also written as files, which takes most of the time.

    Returns:
        The path of the page.

    Raises:
        DataError: a damaged samples or log file, with its row.
        StorageError: the folder cannot be written.
    """
    report = Report.of(root, records, experiment)
    experiment = {name: value for name, value in experiment.items() if name != "rows"}
    charts, folded = _charts(report)
    summary = _summary(report, records, unfinished or {})
    data = {
        **results_json(report.tiers, title, summary, experiment),
        "claims": [claim_json(c) for c in report.claims],
    }
    tables = "\n".join(f"## {tier.label}\n\n{report_markdown_table(tier)}" for tier in report.tiers if tier.rows)
    text = _html(root, records, report, charts, folded, title, summary, experiment, unfinished or {})
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / "results.json", json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        write_atomically(root / "results.md", tables)
        if experiment.get("selection"):
            write_atomically(root / FILE, json.dumps(report.selection, indent=1) + "\n")
        save_tables(
            study_tables(report.tiers, report.choices, report.claims, report.beta, report.selections), root / "tables"
        )
        if figures:
            save_charts([*filter(None, charts.values()), *_weight_charts(report)], root / "figures")
        write_atomically(root / "report.html", text)
    return root / "report.html"


_OF_OTHERS = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError, OSError)


def rebuild_report(root: Path, *, figures: bool = True) -> Path:
    """Write the report of the run in ``root`` again, from what is finished there; see :func:`build_report`."""
    status = run_status(root)
    records = {name: record for name, record in status.steps.items() if record is not None}
    title = str(status.about.get("title", root.name))
    try:
        experiment = {**status.about.get("experiment", {})}
        if rows := status.about.get("rows"):
            experiment["rows"] = rows
        return build_report(root, records, title, experiment, status.unfinished, figures=figures)
    except MadpoError:
        raise
    except _OF_OTHERS as error:  # the folder may be anybody's, and its files hold anything
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system; that of a damaged Parquet file has no number
        reason = (str(error).splitlines() or [""])[0][:160]
        raise DataError(
            f"{root} holds something that no run of madpo writes ({type(error).__name__}: {reason}); delete the folder "
            "of the step and run it again"
        ) from error


def _charts(report: Report) -> tuple[dict[str, Chart | None], list[Chart]]:
    """Charts by their place on the page, and those that are folded away there."""
    tiers, beta = report.tiers, report.beta
    shown = {
        "main": main_chart(tiers, report.choices),
        "sensitivity": sensitivity_chart(tiers, beta),
        "ablation": ablation_chart(tiers, beta),
        "frontier": frontier_chart(tiers, beta),
        "calibration": calibration_chart(tiers),
        "reward_model": reward_model_chart(tiers),
        **{column: training_chart(tiers, column, *names, CORE) for column, names in CURVES.items()},
    }
    others = list(dict.fromkeys(row.group for tier in tiers for row in tier.rows if row.group not in CORE))
    folded = [
        chart
        for group in others
        for column, (stem, words) in CURVES.items()
        if (chart := training_chart(tiers, column, f"{stem}_{group}", words, (group,)))
    ]
    return shown, folded


def _weight_charts(report: Report) -> list[Chart]:
    # The page draws these by a component of its own, with sliders.
    tiers = [tier for tier in report.tiers if len(tier.margins)]
    panels = tuple(
        WeightPanel(tier.label, margins, parameters)
        for tier, (parameters, margins) in zip(tiers, map(weighting, tiers), strict=True)
    )
    return [Chart("weights", "Margins and their weights", "", panels)] if panels else []


def _html(
    root: Path,
    records: Mapping[str, Record],
    report: Report,
    charts: Mapping[str, Chart | None],
    folded: Sequence[Chart],
    title: str,
    summary: Sequence[str],
    experiment: dict[str, Any],
    unfinished: Mapping[str, str],
) -> str:
    tiers = report.tiers
    with_margins = [tier for tier in tiers if len(tier.margins)]
    reasons = empty_cells(tiers, report.planned, unfinished)
    data = {
        "weights": {f"weight-{tier.name}": weight_data(tier) for tier in with_margins},
        "samples": sample_data(tiers),
    }
    curves = [chart_html(chart) for column in CURVES if (chart := charts[column])]
    if folded:
        curves.append(details("Training of the other groups", "".join(chart_html(chart) for chart in folded)))
    reward_curve = charts["reward_model"]
    return page(
        "report.html",
        ["weight.js", "page.js"],
        data,
        title=escape(title),
        summary="".join(f'<p dir="auto">{escape(text)}</p>' for text in summary),
        claims=claims_html(report.claims, report.seeds, tiers),
        main=main_table(tiers, report.choices, report.beta, _of_families(report, reasons))
        + (chart_html(charts["main"]) if charts["main"] else "")
        + selections_html(tiers, report.selections),
        results="".join(tier_results(tier, reasons) for tier in tiers if tier.rows)
        or nothing("No evaluation is finished yet."),
        sensitivity=chart_or(charts["sensitivity"], "Not run: no tier has MADPO at two values of τ or of c."),
        ablation="".join(f'<div class="caution"><p>{escape(text)}</p></div>' for text in idle_parts(tiers))
        + chart_or(charts["ablation"], "Not run: no tier has Amp-Only or Reg-Only."),
        frontier=chart_or(charts["frontier"], "Not run: no tier has two methods with a reward and a KL.")
        + equal_kl_html(tiers, report.beta),
        weights="".join(map(weights_html, with_margins)) or nothing("There are no margins."),
        reward_models=reward_models_html(tiers)
        + chart_or(charts["calibration"], "There are no held-out margins to draw a calibration of.")
        + (chart_html(reward_curve) if reward_curve else ""),
        training="".join(curves) or nothing("No training log is there."),
        degeneration=degeneration_html(tiers),
        samples=static_samples(tiers),
        differences=differences_html(experiment),
        provenance=provenance_html(root, records, unfinished),
        experiment=escape(json.dumps(experiment, indent=2, ensure_ascii=False, default=str)),
    )


def _of_families(report: Report, reasons: Mapping[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    """Why a cell of Table 1 is empty: the reason of the method's first planned row that says more than "not run"."""
    found: dict[tuple[str, str], str] = {}
    rows = {str(row["name"]): planned_row(row).method for row in report.planned}
    for (tier, name), why in reasons.items():
        family = rows.get(name, name)
        if found.get((tier, family), NOT_RUN) == NOT_RUN:
            found[tier, family] = why
    return found


def _summary(report: Report, records: Mapping[str, Record], unfinished: Mapping[str, str]) -> list[str]:
    texts = [state(records, unfinished), *headline(report.tiers), *trimmed_base(records)]
    if any(c.value is not None for claim in report.claims for c in claim.comparisons):
        texts += [*weights_from(report.tiers)[1:], *idle_parts(report.tiers), counts(report.claims)]
        texts += ties(report.claims)
    return [text for text in texts if text]
