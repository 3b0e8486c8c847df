"""What the page of a study shows: the answer first, and everything else in sections that open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from madpo.core.metrics import Estimate
from madpo.report import published
from madpo.report.charts import Panel, WeightPanel
from madpo.report.collect import planned_row
from madpo.report.compare import NOT_RUN
from madpo.report.drawing import Drawn, draw
from madpo.report.methods import SFT
from madpo.report.numbers import DASH, by_seed, count, one, short
from madpo.report.own import own_table
from madpo.report.pages import Card, Cell, Table, cell, render
from madpo.report.provenance import differences, provenance
from madpo.report.results import Tier
from madpo.report.samples import sample_data, static
from madpo.report.study import Study
from madpo.report.study_sections import (
    claims_view,
    degeneration_table,
    equal_kl_table,
    reward_models_table,
    sided,
    temperature_table,
    tier_results,
    weights_view,
)
from madpo.report.summary import accuracies, empty_cells, idle_parts, near_chance, weights_from
from madpo.runner.record import Record

QUESTION = "Does MADPO earn more reward than DPO when the preference pairs differ in quality?"
OWN_QUESTION = "Does preference training help on these pairs, and which loss?"
SCRIPTS = ("weight.js", "samples.js", "page.js")


def study_page(
    root: Path, study: Study, records: Mapping[str, Record], unfinished: Mapping[str, str], title: str, notes: list[str]
) -> str:
    """The page as HTML; ``notes`` are the sentences of the summary that no verdict holds."""
    tiers = study.tiers
    charts = {c.name: draw(c) for c in study.charts if not any(isinstance(p, WeightPanel) for p in c.panels)}
    reasons = empty_cells(tiers, study.planned, unfinished)
    weights = [weights_view(tier) for tier in tiers if len(tier.margins)]
    sliders = {f"weight-{w['tier'].name}": w["data"] for w in weights}
    data = {
        "weights": sliders,
        "samples": (samples := sample_data(tiers)),
        "unit": f"the {tiers[0].reward}" if tiers else "",
    }
    return render(
        "report",
        title,
        SCRIPTS,
        data,
        paper=study.paper,
        reference="the SFT model" if study.paper or "sft" in study.experiment else "the model as it is",
        question=QUESTION if study.paper else OWN_QUESTION,
        opening=study.opening,
        progress=progress(records, unfinished),
        notes=notes,
        untrained=str(study.experiment.get("model", "")).startswith("tiny-"),
        verdicts=tier_verdicts(study, charts),
        beta=study.beta,
        main=main_table(study, reasons) if study.paper else next(map(own_table, study.judged), None),
        chosen=chosen_table(study),
        selections=selections_table(study),
        charts=charts,
        choosing=any(choice.chosen for choice in study.choices.values()),
        claims=claims_view(study.claims, tiers, study.seeds),
        equal_kl=equal_kl_table(tiers, study.beta),
        temperatures=[table for tier in tiers if (table := temperature_table(tier))],
        results=[tier_results(tier, reasons) for tier in tiers if tier.rows],
        idle=idle_parts(tiers),
        weights=weights,
        reward_models=reward_models_table(tiers),
        reward_model_notes=weights_from(tiers)[1:],
        degeneration=[table for tier in tiers if (table := degeneration_table(tier))],
        samples=static(next(iter(samples.values()))) if samples else [],
        differences=differences(study.experiment) if study.paper else None,
        provenance=provenance(root, records, unfinished),
        experiment=json.dumps(study.experiment, indent=2, ensure_ascii=False, default=str),
    )


def progress(records: Mapping[str, Record], unfinished: Mapping[str, str]) -> tuple[str, str]:
    """How far the run is: its state ("done", "open", "failed") and the words for it."""
    total, failed = len(records) + len(unfinished), sum(why.startswith("failed") for why in unfinished.values())
    if not unfinished:
        return "done", f"all {total} steps done"
    words = f"{len(records)} of {total} steps done"
    return ("failed", f"{words}, {failed} failed") if failed else ("open", words)


# The first screen


def tier_verdicts(study: Study, charts: Mapping[str, Drawn]) -> list[Card]:
    """A figure and a sentence per tier."""
    if study.paper:  # whose marks have names
        main, legend = charts.get("figure1_main"), []
    else:  # reward against KL where some method has a curve, else held-out pairs
        panels = charts["frontier"].chart.panels if "frontier" in charts else ()
        curves = [s for panel in panels if isinstance(panel, Panel) for s in panel.series if len(s.marks) > 1]
        main = charts.get("frontier" if curves else "own")
        legend = main.legend if main else []
    drawn = zip(main.chart.panels, main.panels, strict=True) if main else ()
    figures = {panel.title.split(",")[0].removesuffix(" pairs"): figure for panel, figure in drawn}
    found = []
    for tier in study.judged:
        verdict, figure = study.verdicts[tier.name], figures.get(tier.label.removesuffix(" pairs"))
        aside = at_same_distance(study, tier) if study.paper else verdict.left
        doubt = "The reward model is near chance." if near_chance(tier) else ""
        text = verdict.gap or verdict.level
        found.append(Card(tier.label, figure, text, verdict.kind, (aside,), doubt, legend))
    return found


def at_same_distance(study: Study, tier: Tier) -> str:
    """What MADPO earns more than DPO at the same KL."""
    made = (c for claim in study.claims if claim.key == "madpo-at-equal-kl" for c in claim.made)
    at = (c for c in made if c.what.endswith(f", {tier.label}"))
    return "".join(f"At the same KL, MADPO minus DPO is {short(c.value, 'signed')}: {sided(c)}." for c in at)


def main_table(study: Study, reasons: Mapping[tuple[str, str], str]) -> Table | None:
    """Table 1: methods by tiers, with the paper's values; and how often the reward models are right."""
    if not study.choices:
        return None
    # Of a method without a choice the reason of its first planned row that says more than "not run".
    why, methods = dict[tuple[str, str], str](), {str(row["name"]): planned_row(row).method for row in study.planned}
    for (tier_name, row), reason in reasons.items():
        key = tier_name, methods.get(row, row)
        why[key] = reason if why.get(key, NOT_RUN) == NOT_RUN else why[key]
    rows = [[Cell(SFT), *(cell(tier.sft["oracle_reward"] if tier.sft else None) for tier in study.tiers)]]
    planned = set(methods.values()) or set(published.METHODS)
    for name in dict.fromkeys([*published.METHODS, *(name for _, name in study.choices)]):
        if name not in planned and not any((tier.name, name) in study.choices for tier in study.tiers):
            continue
        cells = [Cell(name)]
        for tier in study.tiers:
            choice, paper = study.choices.get((tier.name, name)), published.TABLE_1.get(name, {}).get(tier.name)
            theirs = f"paper {paper[0]:.2f}" if paper else ""
            if choice is None:
                cells.append(cell(None, more=[why.get((tier.name, name), NOT_RUN), theirs]))
                continue
            setting = [f"{choice.row.name}, of {choice.settings}"] * choice.chosen
            setting += [f"{len(choice.seeds)} of {study.seeds} seeds"] * (len(choice.seeds) < study.seeds)
            cells.append(cell(choice.value, more=[theirs, ", ".join(setting)]))
        rows.append(cells)
    if any(tier.reward_models for tier in study.tiers):
        right = [
            cell(", ".join(one(v.mean, "share") for v in accuracies(tier).values()) or DASH) for tier in study.tiers
        ]
        rows.append([Cell("reward model accuracy", plain=True), *right])
    return Table("Table 1", ["mean oracle reward", *(tier.label for tier in study.tiers)], rows)


def chosen_table(study: Study) -> Table | None:
    """How each value of Table 1 came about: setting, seeds, and the mean of the paper's own way of choosing."""
    rows = []
    for tier in study.tiers:
        for (of, name), choice in study.choices.items():
            if of == tier.name:
                seeds = by_seed({seed: v for seed, v in choice.row.per_seed.items() if seed in choice.seeds})
                settings = f"{choice.row.name}, of {count(choice.settings, 'setting')}"
                texts = settings, seeds or DASH, choice.best_value
                rows.append([Cell(f"{tier.label}: {name}"), *map(cell, texts)])
    head = ["method", "setting", "each seed, all prompts", "the paper's way: the best on all prompts"]
    return Table("How Table 1 was made", head, rows, plain=True) if rows else None


def selections_table(study: Study) -> Table | None:
    """The experiment's own choices: what was chosen in each tier, among how many, and what it is worth."""
    rows = []
    for name, choices in study.selections.items():
        cells = dict.fromkeys((tier.name for tier in study.tiers), Cell(DASH, (NOT_RUN,)))
        for choice in choices:
            prompts = f", {choice.value.n} prompts" if isinstance(choice.value, Estimate) else ""
            notes = f"{choice.row.name}, of {choice.settings}", f"{', '.join(choice.seeds)}{prompts}"
            cells[choice.tier.name] = cell(choice.value, more=notes)
        rows.append([Cell(name), *cells.values()])
    return Table("Other choices", ["choice", *(tier.label for tier in study.tiers)], rows) if rows else None
