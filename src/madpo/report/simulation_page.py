"""Pages of ``madpo demo`` and ``verify-auto``: gains over DPO in simulated worlds, by what the reward model knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from madpo.core.metrics import Estimate
from madpo.losses.simulation import CANDIDATES, KNOWLEDGE, PROMPTS, Knowledge
from madpo.report.charts import Chart, levels
from madpo.report.command_pages import Section, command_page, settings_section
from madpo.report.drawing import draw
from madpo.report.pages import Card, Cell, Table, cell, write_page

SEES: dict[Knowledge, str] = {
    "good": "knows the reward's terms",
    "same": "sees what the policy sees",
    "poor": "sees half of the response",
}
"""Kind of reward model -> in words."""
DECIDING = "deciding"
SHARE = "label_share"
_BELOW = {
    DECIDING: ("log loss on unseen labels, margins minus DPO", "nats; below 0: they know more"),
    SHARE: ("auto's share of the label", "the rest is the margin's"),
}
_SIMULATED = (
    "A simulation: no language model, no human labels. The true reward is known, and what is shown was measured by it."
)
_AXIS = "gain over DPO, standard deviations"


def differences_table(
    label: str, methods: Mapping[str, tuple[str, str]], found: Mapping[Knowledge, Mapping[str, Estimate | None]]
) -> Table:
    """A row for every method and for what decides, a column for every kind of reward model.

    Args:
        methods: name in ``found`` -> name on the page, and what it is.
    """
    rows = [
        [Cell(label, (what,)), *(cell(values.get(name), "signed", digits=3) for values in found.values())]
        for name, (label, what) in {**methods, **_BELOW}.items()
        if name in methods or any(values.get(name) for values in found.values())
    ]
    return Table(label, ("method", *(f"it {SEES[kind]}" for kind in found)), rows, plain=True)


def write_simulation_page(
    path: Path,
    *,
    title: str,
    says: Sequence[str],
    note: str,
    lines: Mapping[Knowledge, Iterable[tuple[str, int, Estimate | None]]],
    verdicts: Mapping[Knowledge, tuple[str, str, tuple[str, ...]]],
    table: Table,
    sections: Sequence[Section] = (),
    worlds: str,
    settings: Mapping[str, Any],
) -> None:
    """A chart and a verdict for every kind of reward model, a table, ``sections``, the worlds and the settings.

    Args:
        path: of the page.
        title: of the page.
        says: sentences that open it, after the one that it is a simulation.
        note: what the charts show.
        lines: (name, colour, difference to DPO) of every row of a chart.
        verdicts: a sentence, its side ("above", "below", "open"), and remarks.
        table: the main numbers.
        sections: what follows.
        worlds: how large the true reward is and how many pairs there are, in a sentence.
        settings: of the command.
    """
    heads = {kind: f"The reward model {SEES[kind]}" for kind in KNOWLEDGE}
    drawn = [
        levels(heads[kind], _AXIS, ((*line, None) for line in of), reference=("DPO", 0.0)) for kind, of in lines.items()
    ]
    figures = draw(Chart("gain", "Gain over DPO", "", drawn)).panels
    cards = [Card(heads[kind], figure, *verdicts[kind]) for kind, figure in zip(lines, figures, strict=True)]
    world = (
        f"A prompt and a response are vectors. The true reward is quadratic in the response and depends on the prompt. "
        f"{worlds} Policies are log-linear in 150 features, so none can express the reward. They start at the "
        "reference and are trained by the losses of madpo.losses. Reward models are linear in what they see, and are "
        f"trained on the same pairs. Reward and KL are exact sums over {CANDIDATES} candidates for each of "
        f"{PROMPTS} new prompts. It tells which way the effects go, and not how large they are in language models."
    )
    parts = [
        Section("Gain over DPO", note=note, cards=cards, table=table),
        *sections,
        Section("How the worlds are made", "true reward, labels, policies, measures", note=world, folded=True),
        settings_section(settings, "what repeats this page"),
    ]
    write_page(path, command_page("simulation", title, [_SIMULATED, *says], {}, parts))
