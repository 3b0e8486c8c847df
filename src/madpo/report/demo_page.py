"""The page of ``madpo demo``: how much each method gains over DPO, by what its reward model knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from madpo.core.metrics import Estimate
from madpo.report.charts import Chart, levels
from madpo.report.command_pages import Section, command_page, settings_section
from madpo.report.drawing import draw
from madpo.report.pages import Card, Cell, Table, cell, write_page

_SIMULATED = (
    "A simulation: no language model, no human labels. The true reward is known, and what is shown was measured by it."
)


def write_demo_page(
    path: Path,
    *,
    settings: Mapping[str, Any],
    prompts: tuple[int, int],
    names: Mapping[str, tuple[str, str]],
    panels: Mapping[str, tuple[Mapping[str, Estimate | None], Estimate | None]],
    verdicts: Mapping[str, tuple[str, str, tuple[str, ...]]],
) -> None:
    """Write the page.

    Args:
        settings: of the simulation.
        prompts: how many prompts a policy is measured on, and candidates for each.
        names: method -> what it is called, and what it is.
        panels: what the reward model knows -> each method's difference to DPO, and the number that decides.
        verdicts: what the reward model knows -> a sentence, its kind, and remarks (:class:`madpo.report.pages.Card`).
    """
    colours = {name: (2, 5, 6, 3, 7)[place % 5] for place, name in enumerate(names)}
    label = "gain over DPO, standard deviations"
    lines = [
        [(names[name][0], colours[name], value, None) for name, value in found.items()] for found, _ in panels.values()
    ]
    drawn = [levels(f"It {knows}", label, of, ("DPO", 0.0)) for knows, of in zip(panels, lines, strict=True)]
    chart = draw(Chart("gain", "Gain over DPO", "", drawn))
    cards = [Card(f"It {knows}", figure, *verdicts[knows]) for knows, figure in zip(panels, chart.panels, strict=True)]
    note = (
        f"By what the reward model knows. At a KL of {settings['kl']:g} nats from the reference, 95 % intervals over "
        f"{settings['worlds']} worlds. Right of the line a method is better than plain DPO with the same pairs and "
        "batches."
    )
    rows = [
        [Cell(said, (what,)), *(cell(found.get(name), "signed", digits=3) for found, _ in panels.values())]
        for name, (said, what) in names.items()
    ]
    rows.append(
        [
            Cell("held-out log loss, margins less DPO", ("nats; below 0 the margins know more than DPO has learned",)),
            *(cell(deciding, "signed", digits=3) for _, deciding in panels.values()),
        ]
    )
    table = Table("Differences to DPO", ("method", *(f"it {knows}" for knows in panels)), rows, plain=True)
    world = (
        f"A prompt and a response are vectors. The true reward is quadratic in the response and depends on the prompt, "
        f"with a standard deviation of {settings['reward_sd']:g} log-odds; labels of {settings['pairs']} pairs follow "
        "Bradley-Terry. Policies are log-linear in 150 features, so none can express the reward. They start at the "
        "reference and are trained by the losses of madpo.losses. Reward models are linear in what they see, and are "
        f"trained on the same pairs. Reward and KL are exact sums over {prompts[1]} candidates for each of "
        f"{prompts[0]} new prompts. It tells which way the effects go, and not how large they are in language models."
    )
    sections = [
        Section("Gain over DPO", note=note, cards=cards),
        Section("The same in numbers", table=table),
        Section("How the worlds are made", "true reward, labels, policies, measures", note=world, folded=True),
        settings_section(settings, "what repeats this page"),
    ]
    write_page(path, command_page("simulation", "When do reward margins help?", [_SIMULATED], {}, sections))
