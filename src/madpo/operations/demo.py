"""``madpo demo``: when margins help and when not, in a minute, in simulated worlds with a known reward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from madpo.core.metrics import Estimate, Metrics
from madpo.core.reports import Report
from madpo.losses.simulation import KNOWLEDGE, Knowledge, Setting
from madpo.operations.running import load_report, run_in_folder
from madpo.operations.settings import DemoSettings
from madpo.operations.verify_auto import AUTO, AVERAGED, simulate
from madpo.operations.verify_auto import Cell as Worlds
from madpo.report.numbers import short, side
from madpo.report.simulation_page import DECIDING, SEES, differences_table, write_simulation_page
from madpo.runner.operation import operation

METHODS = {
    "madpo": ("MADPO", "tau 7, c_max 4"),
    "soft_dpo": ("soft labels", "the margins in the place of the labels"),
    "fast": ("mixed", "three parts label, one part margin"),
    AUTO: ("auto", "the share that labels support which DPO has not seen; averaged with DPO"),
    AVERAGED: ("two DPOs", "averaged over two seeds, without margins"),
}
"""Row of :func:`madpo.operations.verify_auto.simulate` -> its name here, and what it is."""


class DemoReport(Report):
    """True reward minus that of DPO at the same KL, in standard deviations of the reward, paired by world."""

    settings: DemoSettings
    differences: dict[Knowledge, dict[str, Estimate | None]]
    """Kind of reward model -> method -> difference; None where too few worlds reached the KL."""
    deciding: dict[Knowledge, Estimate]
    """Held-out log loss of the margins minus that of DPO's implicit margins, nats: below 0 the margins know more."""

    def verdict(self, kind: Knowledge) -> tuple[str, str, tuple[str, ...]]:
        """What came out with one kind of reward model: a sentence, MADPO's side ("above", "below", "open"), remarks."""
        found = {METHODS[name][0]: side(value) for name, value in self.differences[kind].items() if value is not None}
        above, below = ([name for name, at in found.items() if at == where] for where in ("above", "below"))
        less = f"; clearly below: {', '.join(below)}" if below else ""
        words = f"Clearly above DPO: {', '.join(above) or 'nothing'}{less}."
        deciding = short(self.deciding.get(kind), "signed", 3)
        remark = f"Log loss of the margins on unseen labels minus DPO's, nats: {deciding}."
        return words, found.get(METHODS["madpo"][0], "open"), (remark,)

    def text(self) -> str:
        """For a person."""
        s = self.settings
        lines = [
            f"A SIMULATION: {s.worlds} worlds with a known reward, {s.pairs} pairs each; log-linear policies by",
            f"madpo.losses. True reward minus DPO's at KL {s.kl:g} (nats), in standard deviations of the reward:",
        ]
        width = max(len(name) for name, _ in METHODS.values())
        for kind, found in self.differences.items():
            lines += ["", f"the reward model {SEES[kind]}"]
            lines += [f"    {METHODS[name][0]:<{width}}  {short(value, 'signed', 3)}" for name, value in found.items()]
            words, _, remarks = self.verdict(kind)
            lines += [f"    {text}" for text in (words, *remarks)]
        return "\n".join(lines)


def demo(output_dir: str | Path, settings: DemoSettings | None = None, *, overwrite: bool = False) -> DemoReport:
    """Simulate, and write ``demo.json`` and ``report.html``. Needs no model and no download.

    Raises:
        StorageError, ConfigError: ``output_dir`` holds something else.
    """
    given, worlds = settings or DemoSettings(), "give fewer --worlds"
    out = run_in_folder(run_demo, given, {}, output_dir, overwrite=overwrite, memory=worlds)
    return load_report(out / "demo.json", DemoReport)


@operation("demo/1")
def run_demo(settings: DemoSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The operation behind :func:`demo`."""
    setting = Setting(pairs=settings.pairs, reward_sd=settings.reward_sd)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are small: a second thread mostly waits
    try:
        metrics = simulate(Worlds(setting=setting, worlds=settings.worlds, kl=settings.kl, seed=settings.seed), {}, out)
    finally:
        torch.set_num_threads(threads)

    gains = {kind: {name: metrics.get(f"{kind}: {name} - dpo") for name in METHODS} for kind in KNOWLEDGE}
    decides = {kind: value for kind in KNOWLEDGE if (value := metrics.get(f"{kind}: {DECIDING}")) is not None}
    report = DemoReport.model_validate({"settings": settings, "differences": gains, "deciding": decides})
    report.write(out / "demo.json")
    colours = dict(zip(METHODS, (2, 5, 6, 3, 7), strict=True))
    write_simulation_page(
        out / "report.html",
        title="When do reward margins help?",
        says=(),
        note=(
            f"At KL {settings.kl:g} (nats) to the reference, 95 % intervals over {settings.worlds} worlds. Right "
            "of the line a method is better than plain DPO with the same pairs and batches."
        ),
        lines={
            kind: [(METHODS[name][0], colours[name], value) for name, value in of.items()]
            for kind, of in report.differences.items()
        },
        verdicts={kind: report.verdict(kind) for kind in KNOWLEDGE},
        table=differences_table(
            "Differences to DPO",
            METHODS,
            {kind: {**of, DECIDING: report.deciding.get(kind)} for kind, of in report.differences.items()},
        ),
        worlds=(
            f"Its standard deviation is {settings.reward_sd:g} log-odds, and labels of {settings.pairs} pairs follow "
            "Bradley-Terry."
        ),
        settings=settings.model_dump(),
    )
    return metrics
