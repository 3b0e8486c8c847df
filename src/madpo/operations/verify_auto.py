"""``madpo verify-auto``: whether ``auto`` is better than DPO and than a searched MADPO, in worlds with a known reward.

A cell of the grid is a setting of :mod:`madpo.losses.simulation` with one kind of reward model. Methods are compared at
equal KL, by the true reward, paired by world.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from madpo.core.config import Frozen
from madpo.core.errors import MadpoError
from madpo.core.metrics import Estimate, Metrics
from madpo.core.reports import Report
from madpo.core.seeding import derived_seed
from madpo.core.statistics import bootstrap_mean, bootstrap_share, fit_temperature, paired_difference
from madpo.core.storage import expanded, write_atomically
from madpo.losses import DPO, MADPO, SoftDPO
from madpo.losses.simulation import (
    KNOWLEDGE,
    RELATIVE_BETAS,
    Margins,
    Method,
    Setting,
    Worlds,
    at_kl,
    draw,
    measure,
    reward_margins,
    train,
)
from madpo.operations.settings import VerifyAutoSettings
from madpo.report.command_pages import Section
from madpo.report.numbers import DASH, one, side
from madpo.report.pages import Cell as TableCell
from madpo.report.pages import Table, cell
from madpo.report.simulation_page import differences_table, write_simulation_page
from madpo.rewards.label_share import decide
from madpo.rewards.margins import PAPER_SETTINGS
from madpo.runner.executors import Executor
from madpo.runner.operation import operation
from madpo.runner.run import run
from madpo.runner.step import Step

FAST_SHARE = 0.75
"""The label's share of ``auto`` with one training."""
REDUCED = (
    Setting(pairs=200),
    Setting(reward_sd=0.5),
    Setting(),
    Setting(flips=0.2),
    Setting(tier="low"),
)
WHOLE = (
    *(Setting(pairs=n, reward_sd=s) for n in (200, 1000, 3000) for s in (0.5, 1.5, 4.0)),
    Setting(pairs=10_000),
    *(Setting(pairs=n, flips=0.2) for n in (1000, 3000)),
    *(Setting(pairs=n, tier="low") for n in (200, 1000)),
)
SEARCHED = "madpo, best of the paper's 6"
AVERAGED = "dpo, averaged with another seed"
AUTO = "auto"
ROWS = {
    AUTO: "auto, averaged with dpo",
    "auto, one policy": "auto's second training only",
    "fast": f"label_share {FAST_SHARE}, one training",
    SEARCHED: "chosen on half of the prompts, measured on the other",
    "madpo": "tau 7, c_max 4",
    "soft_dpo": "calibrated margins out of fold",
    AVERAGED: "the gain of an average, without margins",
}
"""Method -> what it is."""


class Cell(Frozen):
    """One setting, all kinds of reward model."""

    setting: Setting
    worlds: int
    kl: float
    seed: int


class Row(Frozen):
    """A method over the grid; differences in standard deviations of the true reward."""

    method: str
    about: str
    cells: int
    above: int
    """Cells where it is clearly above DPO: the 95 % interval over worlds excludes 0."""
    below: int
    worst: float | None
    """Smallest mean difference to DPO; None where the method reached the KL in no cell."""
    mean: float | None
    """Mean over cells of the difference to DPO."""
    above_searched: int
    """Cells where it is clearly above MADPO's best of 6."""
    below_searched: int
    above_averaged: int
    """Cells where it is clearly above the average of two DPO policies, which costs as much as ``auto``."""
    below_averaged: int


class VerifyAutoReport(Report):
    """What :func:`verify_auto` found."""

    settings: VerifyAutoSettings
    rows: tuple[Row, ...]
    cells: dict[str, dict[str, Estimate]]
    """Cell -> measured quantity -> estimate; "auto - dpo" is a difference at equal KL."""

    def text(self) -> str:
        """A table for a person."""
        lines = [
            f"true reward at KL {self.settings.kl:g}, {self.settings.worlds} worlds a setting; differences to DPO in "
            "standard deviations of the reward; clearly: the 95 % interval excludes 0",
            "",
            f"{'':<31}         clearly vs dpo                   searched madpo  averaged dpo",
            f"{'method':<31}  cells  above  below    mean   worst   above  below   above  below",
        ]
        for row in self.rows:
            lines.append(
                f"{row.method:<31}  {row.cells:5d}  {row.above:5d}  {row.below:5d}  {_signed(row.mean)}  "
                f"{_signed(row.worst)}   {row.above_searched:5d}  {row.below_searched:5d}   {row.above_averaged:5d}  "
                f"{row.below_averaged:5d}"
            )
        lines.append("auto minus dpo, cell by cell, and the deciding number (unseen labels' log loss, margins - dpo):")
        for name, found in self.cells.items():
            gain, deciding, share = found["auto - dpo"], found["deciding"], found["label_share"]
            lines.append(
                f"    {name:<44}  {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})  deciding "
                f"{deciding.mean:+.3f}, label share {share.mean:.2f}"
            )
        return "\n".join(lines)


def verify_auto(
    settings: VerifyAutoSettings, output_dir: str | Path, *, executor: Executor | None = None
) -> VerifyAutoReport:
    """Compare ``auto`` with DPO, MADPO and its relatives in simulated worlds.

    Args:
        output_dir: gets ``report.html``, ``report.json``, and a folder for every setting, from which an interrupted run
            continues.
        executor: where settings are simulated; one after another by default.
    """
    root = expanded(output_dir)
    root.mkdir(parents=True, exist_ok=True)
    steps = {
        setting: Step(
            f"cell/{_name(setting)}",
            simulate,
            Cell(setting=setting, worlds=settings.worlds, kl=settings.kl, seed=settings.seed),
            says=f"{setting.pairs} pairs, {settings.worlds} worlds",
            light=True,
        )
        for setting in _grid(settings)
    }
    result = run(steps.values(), root, executor, about={"title": "verify-auto"})
    if result.failed:
        raise MadpoError("; ".join(f"{name}: {sentence}" for name, sentence in result.failed.items()))
    cells: dict[str, dict[str, Estimate]] = {}
    for setting, step in steps.items():
        for key, value in result.records[step.name].metrics.items():
            kind, _, quantity = key.partition(": ")
            assert isinstance(value, Estimate)
            cells.setdefault(cell_name(setting, kind), {})[quantity] = value
    report = summed_up(settings, cells)
    report.write(root / "report.json")
    write_gains(report, root / "report.html")
    return report


def _grid(settings: VerifyAutoSettings) -> Sequence[Setting]:
    return WHOLE if settings.whole else REDUCED


def cell_name(setting: Setting, kind: str) -> str:
    """The name of a setting with one kind of reward model, in a report."""
    return f"{_name(setting)} {kind}"


def summed_up(settings: VerifyAutoSettings, cells: dict[str, dict[str, Estimate]]) -> VerifyAutoReport:
    """The report on all cells, which are named by :func:`cell_name`."""
    return VerifyAutoReport(settings=settings, rows=tuple(_row(name, cells) for name in ROWS), cells=cells)


def _name(setting: Setting) -> str:
    return f"{setting.tier}-n{setting.pairs}-sd{setting.reward_sd:g}-flips{setting.flips:g}"


def write_gains(report: VerifyAutoReport, path: Path) -> None:
    """A page: what ``auto`` gains in every setting, the methods over all cells, and every setting in numbers."""
    s = report.settings
    found = {setting: {kind: report.cells[cell_name(setting, kind)] for kind in KNOWLEDGE} for setting in _grid(s)}
    methods = {f"{name} - dpo": (name, about) for name, about in ROWS.items()}
    auto = next(row for row in report.rows if row.method == AUTO)
    write_simulation_page(
        path,
        title="Is auto better than DPO and than a searched MADPO?",
        says=[
            f"Of {auto.cells} cells, auto is clearly above plain DPO in {auto.above} and below it in "
            f"{auto.below}. Against the best of MADPO's six settings it is above in {auto.above_searched} and below in "
            f"{auto.below_searched}; against two averaged DPO policies, which cost as much, above in "
            f"{auto.above_averaged} and below in {auto.below_averaged}."
        ],
        note=(
            f"auto minus DPO at KL {s.kl:g} (nats), 95 % intervals over {s.worlds} worlds. n: training pairs; sd: "
            "standard deviation of the true reward in log-odds, 1.5 where it is not named; flipped: one label in five "
            "is turned around; Low: the better of two responses against a worse text of another style."
        ),
        lines={
            kind: [(_words(setting), 3, of[kind].get(f"{AUTO} - dpo")) for setting, of in found.items()]
            for kind in KNOWLEDGE
        },
        verdicts={kind: _verdict([of[kind] for of in found.values()]) for kind in KNOWLEDGE},
        table=Table("Methods over all cells", _HEAD, [_table_row(row) for row in report.rows], plain=True),
        sections=[
            Section(label, "every method", table=differences_table(label, methods, of), folded=True)
            for setting, of in found.items()
            if (label := _words(setting))
        ],
        worlds="Labels follow Bradley-Terry.",
        settings=s.model_dump(),
    )


def _words(setting: Setting) -> str:
    """A setting in the 18 letters that a chart has room for."""
    about = "flipped" if setting.flips else "Low" if setting.tier == "low" else f"sd {setting.reward_sd:g}"
    return f"n {setting.pairs:,}, {about}"


def _verdict(cells: Sequence[Mapping[str, Estimate]]) -> tuple[str, str, tuple[str, ...]]:
    """Of the settings with one kind of reward model: in how many ``auto`` is above DPO, and what decides there."""
    gains = [side(of[key]) for of in cells if (key := f"{AUTO} - dpo") in of]
    above, below = gains.count("above"), gains.count("below")
    deciding = [one(end(of["deciding"].mean for of in cells), "signed", 3) for end in (min, max)]
    return (
        f"auto is clearly above DPO in {above} of {len(gains)} settings, clearly below in {below or 'none'}.",
        "above" if above and not below else "below" if below and not above else "open",
        (f"Log loss of the margins on unseen labels minus DPO's, nats: {' to '.join(deciding)}.",),
    )


_HEAD = ("cells clearly above / below", "plain DPO", "searched MADPO", "averaged DPO", "mean gain", "worst cell")


def _table_row(row: Row) -> list[TableCell]:
    searched = DASH if row.method == SEARCHED else f"{row.above_searched} / {row.below_searched}"
    averaged = DASH if row.method == AVERAGED else f"{row.above_averaged} / {row.below_averaged}"
    return [
        TableCell(row.method, (row.about,)),
        *(cell(words) for words in (f"{row.above} / {row.below}", searched, averaged)),
        *(cell(value, "signed", digits=3) for value in (row.mean, row.worst)),
    ]


def _signed(value: float | None) -> str:
    return f"{DASH:>6}" if value is None else f"{value:+.3f}"


def _row(method: str, cells: Mapping[str, Mapping[str, Estimate]]) -> Row:
    counts: dict[str, int] = {}
    for other, name in ((SEARCHED, "_searched"), (AVERAGED, "_averaged"), ("dpo", "")):
        found = [of[key] for of in cells.values() if (key := f"{method} - {other}") in of]
        sides = [side(value) for value in found]
        counts |= {f"{where}{name}": sides.count(where) for where in ("above", "below")}
    means = [value.mean for value in found]  # of the differences to DPO
    mean = float(np.mean(means)) if means else None
    return Row(method=method, about=ROWS[method], cells=len(means), worst=min(means, default=None), mean=mean, **counts)


@operation("simulate_auto/5")
def simulate(cell: Cell, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """All methods in the worlds of one setting; writes ``gains.json``, the true reward of each world at the KL."""
    worlds = draw(cell.setting, [derived_seed(cell.seed, "verify-auto", k) for k in range(cell.worlds)])
    seed = derived_seed(cell.seed, "verify-auto", "reward models")
    found = {kind: gains(worlds, cell, reward_margins(worlds, kind, seed=seed)) for kind in KNOWLEDGE}
    metrics: Metrics = {}
    for kind, compared in found.items():
        for name, values in compared.gains.items():
            for other in ("dpo", SEARCHED, AVERAGED):
                both = np.isfinite(values).all(1) & np.isfinite(compared.gains[other]).all(1)
                if name != other and both.sum() >= 3:
                    pair = (values[both].mean(1), compared.gains[other][both].mean(1))
                    metrics[f"{kind}: {name} - {other}"] = paired_difference(*pair, seed=cell.seed)
        metrics[f"{kind}: deciding"] = bootstrap_mean(compared.deciding, seed=cell.seed)
        metrics[f"{kind}: label_share"] = bootstrap_share(compared.shares, seed=cell.seed)
    plain = {  # JSON has no NaN: None is a KL that was not reached
        kind: {
            name: [[v if np.isfinite(v) else None for v in row] for row in values.tolist()]
            for name, values in compared.gains.items()
        }
        for kind, compared in found.items()
    }
    write_atomically(out / "gains.json", json.dumps(plain, indent=1) + "\n")
    return metrics


class Compared(NamedTuple):
    """Gains in true reward at the KL, standard deviations, (worlds, halves of the prompts); and what decided."""

    gains: dict[str, np.ndarray]
    shares: np.ndarray
    """The label's share, a world."""
    deciding: np.ndarray
    """Calibrated log loss of the margins minus that of DPO's implicit margins before its steps, nats, a world."""


def gains(worlds: Worlds, cell: Cell, margins: Margins) -> Compared:
    """Train all methods with one kind of reward model, and measure them at equal KL."""
    setting = cell.setting
    betas = [setting.reward_sd * beta for beta in RELATIVE_BETAS]
    seeds = [derived_seed(cell.seed, "verify-auto", "training", k) for k in (1, 2)]
    temperatures = [fit_temperature(row.numpy())[0] for row in margins.outside]
    calibrated = margins.outside / torch.tensor(temperatures, dtype=torch.float32)[:, None]
    dpo = Method((DPO(beta=1.0),))
    methods = {"dpo": dpo, "soft_dpo": Method((SoftDPO(beta=1.0),), calibrated)}
    methods["fast"] = Method((SoftDPO(beta=1.0, label_share=FAST_SHARE),), calibrated)
    searched = {f"madpo {tau:g} {c:g}": MADPO(beta=1.0, tau=tau, c_max=c) for tau, c in PAPER_SETTINGS}
    methods |= {name: Method((loss,), margins.inside) for name, loss in searched.items()}
    middle = RELATIVE_BETAS.index(0.35)
    batches: list[tuple[Tensor, Tensor]] = []

    def note(rows: Tensor, found: Tensor) -> None:
        batches.append((rows, betas[middle] * found[:, :, 0, middle]))

    (first,) = train(worlds.train.policy, list(methods.values()), betas, seed=seeds[0], note=note)
    trained = {name: first[:, :, k] for k, name in enumerate(methods)}

    # As the product: DPO's margins of the second half of the first epoch, from before the pairs were trained on.
    rows, looked = (torch.cat(parts, dim)[..., : setting.pairs] for dim, parts in enumerate(zip(*batches, strict=True)))
    late = slice(setting.pairs // 2, None)
    parts = zip(looked[:, late], margins.outside[:, rows[late]], margins.outside, strict=True)
    decided = [decide(m0.numpy(), m1.numpy(), every.numpy()) for m0, m1, every in parts]
    mixed = Method([SoftDPO(beta=1.0, label_share=decision.share) for decision in decided], calibrated)
    (second,) = train(worlds.train.policy, [mixed, dpo], betas, seed=seeds[1])
    trained["auto, one policy"] = second[:, :, 0]
    trained[AUTO] = (trained["dpo"] + second[:, :, 0]) / 2  # a log-linear policy is linear in its parameters
    trained[AVERAGED] = (trained["dpo"] + second[:, :, 1]) / 2

    measured = {name: at_kl(*measure(worlds, theta), cell.kl) / setting.reward_sd for name, theta in trained.items()}
    six = np.stack([measured.pop(name) for name in searched])
    measured["madpo"] = six[list(searched).index("madpo 7 4")]
    # The best on one half of the prompts is measured on the other half.
    reached = np.where(np.isfinite(six), six, -np.inf)
    best = reached.argmax(0)[:, ::-1]
    measured[SEARCHED] = np.take_along_axis(six, best[None], 0)[0]
    shares, deciding = [d.share for d in decided], [d.found.difference.mean for d in decided]
    return Compared(measured, np.array(shares), np.array(deciding))
