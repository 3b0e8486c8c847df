"""Margins before training: the report against closed forms, and the recommendation where each of its parts decides."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

import madpo
from madpo.commands.cli import main
from madpo.core.errors import ConfigError, DataError
from madpo.core.seeding import rng
from madpo.data.margins import read_margins
from madpo.operations.inspection import inspect as inspect_data
from madpo.rewards.label_share import better_than_coin
from madpo.rewards.margins import ENOUGH, PAPER_SETTINGS, SURE, inspect
from madpo.rewards.weight_counts import WeightParameters, log_weight
from practice_cases import read, write
from refusals import names, refused

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028&amp;{{data}}"


def bradley_terry(n: int, scale: float, *, temperature: float = 1.0, seed: int = 0) -> np.ndarray:
    """Signed margins of n pairs labelled with probability sigma(margin): calibrated, then made ``temperature`` wide."""
    draws = rng(seed, "margins")
    h = draws.normal(0, scale, n)
    chosen_first = draws.random(n) < expit(h)
    return np.where(chosen_first, h, -h) * temperature


@given(
    h=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30),
    tau=st.floats(0.1, 20),
    c_max=st.floats(1.001, 20),
    c_min=st.none() | st.floats(0, 0.99),
    lam=st.floats(0.05, 10),
)
def test_weight_without_torch_is_the_weight(
    h: list[float], tau: float, c_max: float, c_min: float | None, lam: float
) -> None:
    ours = np.exp(log_weight(np.array(h), WeightParameters(tau=tau, c_max=c_max, c_min=c_min, lam=lam)))
    theirs = madpo.margin_weight(torch.tensor(h, dtype=torch.float64), tau=tau, c_max=c_max, c_min=c_min, lam=lam)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-12)


def test_numbers_of_a_small_column() -> None:
    h = [-2.0, -0.5, 0.5, 1.0, 3.0]
    report = inspect(h, margin_temperature=2.0, pair_ids=[5, 6, 7, 8, 9])
    assert (report.pairs, report.mean, report.median, report.smallest, report.largest) == (5, 0.4, 0.5, -2.0, 3.0)
    assert report.deviation == pytest.approx(np.std(h))
    assert report.contradicted.mean == 0.4
    assert report.log_loss == pytest.approx(np.mean([math.log1p(math.exp(-x)) for x in h]))
    assert report.calibrated_log_loss == pytest.approx(np.mean([math.log1p(math.exp(-x / 2)) for x in h]))
    assert not report.suspects, "five pairs show nothing"
    suspects = inspect([*h, *[1.0] * 20], margin_temperature=2.0).suspects
    assert [s.pair_id for s in suspects] == [0, 1]
    assert suspects[0].probability == pytest.approx(expit(-1.0))


@pytest.mark.parametrize("pairs", [60, 400])
def test_few_pairs_in_a_bin_are_off_by_chance(pairs: int) -> None:
    """Calibrated margins: their mean calibration error is what the report says that chance makes."""
    generator, found = np.random.default_rng(3), []
    for _ in range(150):
        size = np.abs(generator.normal(size=pairs)) * 2
        found.append(inspect(np.where(generator.random(pairs) < expit(size), size, -size), margin_temperature=1.0))
    expected = np.mean([one.calibration_chance for one in found])
    assert np.mean([one.calibration_error for one in found]) == pytest.approx(expected, rel=0.05)
    assert expected > 0.02


@pytest.mark.parametrize(("tau", "c_max"), PAPER_SETTINGS)
def test_settings_are_those_of_the_weight(tau: float, c_max: float) -> None:
    h = bradley_terry(500, 3.0)
    (setting,) = (s for s in inspect(h, margin_temperature=1.0).settings[:6] if (s.tau, s.c_max) == (tau, c_max))
    w = madpo.margin_weight(torch.tensor(h), tau=tau, c_max=c_max).numpy()
    assert setting.mean_weight == pytest.approx(w.mean())
    assert setting.effective_share == pytest.approx(w.sum() ** 2 / (w**2).sum() / 500)
    shares = ((w > 1).mean(), ((w < 1) & (h > 0)).mean(), ((w < 1) & (h < 0)).mean())
    assert (setting.amplified, setting.dampened, setting.turned_down) == pytest.approx(shares)


def test_temperature_of_a_reward_model_that_is_three_times_too_sure() -> None:
    report = inspect(bradley_terry(20_000, 2.0, temperature=3.0))
    assert report.margin_temperature == pytest.approx(3.0, rel=0.06)
    assert report.calibration_error < 0.01
    assert inspect(bradley_terry(20_000, 2.0, temperature=3.0), margin_temperature=1.0).calibration_error > 0.08
    assert any(
        "margin_temperature = 3" in warning or "margin_temperature = 2.9" in warning for warning in report.warnings
    )
    for row in report.reliability:
        assert row.observed.low - 0.02 < row.predicted < row.observed.high + 0.02
    assert sum(row.pairs for row in report.reliability) == 20_000


def test_recommendation_where_logit_0_999_decides() -> None:
    report = inspect(np.r_[bradley_terry(4000, 6.0)], margin_temperature=1.0)
    assert report.tau == SURE == pytest.approx(6.9067548)
    assert "logit(0.999)" in report.reasons[0]


def test_recommendation_where_the_99th_percentile_decides() -> None:
    h = bradley_terry(4000, 1.0)
    report = inspect(h, margin_temperature=1.0)
    assert report.tau == pytest.approx(np.percentile(np.abs(h), 99))
    assert report.tau < SURE
    assert "99" in report.reasons[0]
    # Half as sure, half the tau: the rule counts calibrated margins.
    assert inspect(h, margin_temperature=2.0).tau == pytest.approx(report.tau / 2)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_mildest_c_max_is_recommended_and_too_few_effective_pairs_are_told(share: float) -> None:
    # Contradicted pairs at -3 lose nearly all weight.
    contradicted = round(1000 * share)
    h = np.r_[np.full(1000 - contradicted, 4.0), np.full(contradicted, -3.0), [9.0] * 20]
    report = inspect(h, margin_temperature=1.0)
    assert report.c_max == 2
    kept = _effective(h, report.tau, 2.0)
    assert any("c_max = 2" in warning for warning in report.warnings) == (kept < ENOUGH) == (share > 0)


def test_no_temperature_is_fitted_to_pairs_that_the_reward_model_was_trained_on() -> None:
    h = bradley_terry(500, 2.0) * 50
    assert inspect(h).margin_temperature == pytest.approx(50, rel=0.3)
    report = inspect(h, trained_on=True)
    assert report.margin_temperature == 1
    assert not report.temperature_fitted
    assert report.tau is None, "they cannot show what it has learned"
    assert any("--probe" in reason for reason in report.reasons)
    assert inspect(h, margin_temperature=3.0, trained_on=True).margin_temperature == 3


def _effective(h: np.ndarray, tau: float, c_max: float) -> float:
    w = madpo.margin_weight(torch.tensor(h), tau=tau, c_max=c_max).numpy()
    return float(w.sum() ** 2 / (w**2).sum() / len(h))


@pytest.mark.parametrize(
    ("h", "temperature", "warning"),
    [
        (np.zeros(10), 1.0, "DPO"),
        (np.full(300, 2.0), 1.0, "negative"),
        (1 / (1 + np.exp(-bradley_terry(300, 2.0))), 1.0, "log(p / (1 - p))"),
        (100 / (1 + np.exp(-bradley_terry(300, 2.0))), 1.0, "log(p / (100 - p))"),
        (np.linspace(-3, 3, 400), 1.0, "coin"),
        (-np.linspace(1, 3, 400), 1.0, "swapped"),
        (np.r_[np.full(19, 1.0), -0.5], None, "20 pairs"),
        (np.r_[np.full(180, 0.1), np.full(120, -0.1)] * 100, None, "margin_temperature = "),
    ],
)
def test_doubtful_columns_are_named(h: np.ndarray, temperature: float | None, warning: str) -> None:
    report = inspect(h)
    assert any(warning in found for found in (*report.warnings, *report.reasons))
    sound = inspect(bradley_terry(900, 2.0))
    assert not any(warning in found for found in (*sound.warnings, *sound.reasons))
    if temperature is not None:
        assert report.margin_temperature == temperature
    assert (report.tau is None) == (report.c_max is None) == (warning in ("coin", "DPO", "swapped"))
    assert all(math.isfinite(x) for x in (report.tau or 0, report.calibration_error, report.log_loss))
    assert report.text()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_any_margins_give_a_report(h: list[float]) -> None:
    report = inspect(h)
    assert (report.tau is None) == (not better_than_coin(h))
    assert report.tau is None or (report.tau > 0 and report.c_max == 2.0)
    assert sum(row.pairs for row in report.reliability) == len(h)
    # At a given temperature the order of the pairs does not matter (the fit is flat where nothing decides it).
    one, other = inspect(h, margin_temperature=1.0), inspect(h[::-1], margin_temperature=1.0)
    assert (other.tau is None) == (one.tau is None)
    assert other.tau is None or other.tau == pytest.approx(one.tau)
    assert other.contradicted == one.contradicted
    assert other.calibration_error == pytest.approx(one.calibration_error)


@pytest.mark.parametrize(
    ("h", "options", "error", "named"),
    [
        ([], {}, DataError, "margins"),
        ([1.0, float("nan")], {}, DataError, ("row 1", "nan")),
        ([1.0, float("inf")], {}, DataError, ("row 1", "inf")),
        ([1.0, -1e300], {}, DataError, ("row 1", "-1e+300")),
        ([1.0], {"margin_temperature": 0.0}, ConfigError, ("margin_temperature", "0.0")),
        ([1.0], {"margin_temperature": float("nan")}, ConfigError, ("margin_temperature", "nan")),
        ([1.0], {"pair_ids": [1, 2]}, DataError, ("1 margins", "2 pair")),
    ],
)
def test_mistakes(h: list[float], options: dict[str, Any], error: type[Exception], named: Any) -> None:
    with refused(error, named):
        inspect(h, **options)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    margins = bradley_terry(900, 2.0)
    rows = [
        {
            "pair_id": 1000 + i,
            "prompt": f"p{i} {HOSTILE}",
            "chosen": f"c{i}",
            "rejected": f"r{i}",
            "reward_margin": float(h),
        }
        for i, h in enumerate(margins)
    ]
    return write(path, rows)


def test_suspects_are_the_20_lowest_with_their_texts(pairs: Path) -> None:
    rows = read(pairs)
    lowest = sorted(rows, key=lambda row: row["reward_margin"])[:20]
    report = inspect_data(pairs)
    assert [s.pair_id for s in report.suspects] == [row["pair_id"] for row in lowest]
    assert [(s.prompt, s.chosen, s.rejected) for s in report.suspects] == [
        (row["prompt"], row["chosen"], row["rejected"]) for row in lowest
    ]


def test_margins_come_from_every_shape(tmp_path: Path) -> None:
    table = pa.table({"pair_id": [4, 2], "reward_margin": [0.5, -1.5]})
    pq.write_table(table, tmp_path / "margins.parquet")
    bare = read_margins(tmp_path / "margins.parquet")
    assert (bare.pair_ids, bare.values, bare.texts) == ((4, 2), (0.5, -1.5), {})
    lines = [{"pair_id": i, "prompt": i // 2, "implicit_margin": i - 1, "reward_margin": 2 - i} for i in range(4)]
    path = write(tmp_path / "heldout.jsonl", lines)
    heldout = read_margins(path)
    assert (bare.prompts, heldout.prompts) == (("0", "1"), ("0", "0", "1", "1"))
    assert (heldout.implicit, heldout.values) == ((-1, 0, 1, 2), (2, 1, 0, -1))
    assert inspect_data(path).share.difference.n == 2
    del lines[2]["implicit_margin"]
    assert read_margins(write(path, lines)).implicit is None
    del lines[3]["reward_margin"]
    with refused(DataError, "heldout.jsonl", "line 4", ("reward_margin", "null")):
        read_margins(write(path, lines))
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "scores.jsonl").write_text(json.dumps(row | {"chosen_score": 3, "rejected_score": 1.5}))
    assert read_margins(tmp_path / "scores.jsonl").values == (1.5,)
    rows = [row | {"prompt": prompt, "reward_margin": 1.0} for prompt in ("a b", "b", " b", "a  b")]
    read = read_margins(write(tmp_path / "pairs.jsonl", rows))
    assert read.prompts == (0, 1, 1, 0), "no reader can tell them apart"
    assert inspect_data(tmp_path / "pairs.jsonl").contradicted.n == 2
    (tmp_path / "none.jsonl").write_text(json.dumps(row))
    with refused(DataError, "none.jsonl", "'reward_margin'", "scores"):
        read_margins(tmp_path / "none.jsonl")
    (tmp_path / "bad.csv").write_text("reward_margin\nhigh\n")
    with refused(DataError, "bad.csv", "line 2", ("reward_margin", "'high'")):
        read_margins(tmp_path / "bad.csv")


def test_the_page_needs_no_other_file_and_escapes(pairs: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "margins.html"
    report = inspect_data(pairs, output=page)
    html = page.read_text()
    assert HOSTILE not in html
    assert len(re.findall(r"<script", html)) == 2, "the data block and the one script"
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])  # type: ignore[index]
    assert data["of"] == 900
    assert 500 <= len(data["pairs"]) <= 520
    assert data["parameters"]["tau"] == round(report.tau, 2)
    given = {row["pair_id"]: row for row in read(pairs)}
    for pair in data["pairs"]:
        assert pair["prompt"] == given[pair["id"]]["prompt"]
        assert pair["h"] * report.margin_temperature == pytest.approx(given[pair["id"]]["reward_margin"])
    inspect_data(pairs, output=tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == html, "the same data gives the same page"


def test_commands(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(pairs), "--eval-data", str(pairs), "--output-dir", str(tmp_path / "out")]) == 0
    names(capsys.readouterr().out, "900 pairs")
    assert (tmp_path / "out/check.json").exists()
    assert main(["inspect", str(pairs), "--output", str(tmp_path / "p.html")]) == 0
    assert main(["inspect", str(pairs), "--output", str(tmp_path / "p.html")]) == 0, "a page may be written again"
    before = pairs.read_bytes()
    assert main(["inspect", str(pairs), "--output", str(pairs)]) == 2
    assert pairs.read_bytes() == before
    out = capsys.readouterr().out
    assert "recommended: tau = " in out
    assert "p.html" in out
    assert "\u2028" not in out


def test_commands_take_their_options_from_a_file(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "check.toml"
    given.write_text(f'eval_data = "{pairs}"\noutput_dir = "{tmp_path / "out"}"\ntruncation = "cut"\n')
    assert main(["check", str(pairs), "--config", str(given)]) == 0
    names(capsys.readouterr().out, "900 evaluation")
    assert (tmp_path / "out/check.json").exists()
    given.write_text(f'margin_temperature = 2.5\noutput = "{tmp_path / "p.html"}"\n')
    assert main(["inspect", str(pairs), "--config", str(given)]) == 0
    names(capsys.readouterr().out, "temperature 2.5")
    assert (tmp_path / "p.html").exists()
    assert main(["inspect", str(pairs), "--config", str(given), "--margin_temperature", "3"]) == 0
    names(capsys.readouterr().out, "temperature 3")  # an option goes before the file
    for text, named in (("max_lenght = 3", ["'max_lenght'", "'max_length'"]), ("strict = 3", [("strict", "3")])):
        given.write_text(text)
        assert main(["check", str(pairs), "--config", str(given)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"madpo: {given}: ")
        names(err, *named)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1.0, 40.0])
def test_margins_that_know_nothing_recommend_nothing(size):
    coin = rng(3, "coin").normal(size=200)
    nothing = inspect(size * coin)
    assert nothing.tau is nothing.c_max is None
    assert "recommended" not in nothing.text()
    assert [(s.tau, s.c_max) for s in nothing.settings] == [*PAPER_SETTINGS]
    assert not nothing.suspects
    swapped = inspect(-size * np.abs(coin))
    assert swapped.tau is None
    assert ("swapped" in swapped.text()) == bool(swapped.suspects) == (size > 0)
    signal = inspect(coin + 1)
    assert signal.tau is not None
    assert "recommended: tau = " in signal.text()
