"""The main rows of the simulation keep their direction, in one small cell."""

import html
import json
from pathlib import Path

import numpy as np
import pytest

from madpo.core.metrics import Estimate
from madpo.core.seeding import derived_seed
from madpo.losses.simulation import Setting, draw, reward_margins
from madpo.operations.verify_auto import AUTO, ROWS, SEARCHED, Cell, VerifyAutoSettings, gains, simulate, verify_auto
from madpo.report.simulation_page import SEES


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Estimate]:
    out = tmp_path_factory.mktemp("cell")
    cell = Cell(setting=Setting(pairs=400), worlds=8, kl=1.0, seed=0)
    found = simulate(cell, {}, out)
    assert len(json.loads((out / "gains.json").read_bytes())["good"][AUTO]) == 8
    shares = [value for key, value in found.items() if key.endswith("label_share")]
    assert len(shares) == 3
    assert all(0 <= of.low <= of.mean <= of.high <= 1 for of in shares if isinstance(of, Estimate))
    return {key: value for key, value in found.items() if isinstance(value, Estimate)}


@pytest.mark.slow
def test_auto_is_above_dpo_whatever_the_reward_model_knows(metrics: dict[str, Estimate]) -> None:
    for kind in ("good", "same", "poor"):
        assert metrics[f"{kind}: {AUTO} - dpo"].low > 0
        assert metrics[f"{kind}: {AUTO} - {SEARCHED}"].high > 0


@pytest.mark.slow
def test_soft_labels_of_a_poor_reward_model_are_below_dpo(metrics: dict[str, Estimate]) -> None:
    assert metrics["poor: soft_dpo - dpo"].mean < -0.05
    assert metrics["poor: soft_dpo - dpo"].mean < metrics["good: soft_dpo - dpo"].mean


@pytest.mark.slow
def test_the_share_and_the_deciding_number_follow_the_reward_model(metrics: dict[str, Estimate]) -> None:
    for name in ("label_share", "deciding"):
        assert metrics[f"good: {name}"].high < metrics[f"poor: {name}"].mean
    assert metrics["good: deciding"].mean < -0.03


def test_labels_of_a_coin_leave_the_share_to_the_labels() -> None:
    setting = Setting(pairs=200, reward_sd=1e-3)
    worlds = draw(setting, [derived_seed(0, k) for k in range(4)])
    cell = Cell(setting=setting, worlds=4, kl=1e-3, seed=0)
    found = gains(worlds, cell, reward_margins(worlds, "poor", seed=0))
    assert np.mean(found.shares) > 0.8


def test_the_report_counts_cells_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("madpo.operations.verify_auto.REDUCED", (Setting(pairs=20),))
    settings = VerifyAutoSettings(worlds=3, kl=0.2)
    report = verify_auto(settings, tmp_path)
    assert all(0 <= of["label_share"].low <= of["label_share"].high <= 1 for of in report.cells.values())
    rows = {row.method: row for row in report.rows}
    assert rows[AUTO].cells == 3
    assert rows[SEARCHED].above_searched == 0
    assert rows[AUTO].above + rows[AUTO].below <= 3
    assert verify_auto(settings, tmp_path) == report
    assert json.loads((tmp_path / "report.json").read_bytes())["rows"][0]["method"] == AUTO
    assert len(report.text().splitlines()) == 4 + len(rows) + 1 + 3
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert all(words in page for words in (*ROWS.values(), *SEES.values(), "n 20, sd 1.5"))
