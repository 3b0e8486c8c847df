"""The table and the page that grow while a study runs."""

from pathlib import Path

import pytest

from madpo.core.metrics import Estimate
from madpo.report.collect import collect
from madpo.report.live import LiveReport, table_lines, table_row
from madpo.report.numbers import short
from madpo.runner.record import Record, run_status
from report_cases import make_study


def record(name: str, **config: str) -> Record:
    reward, kl = Estimate(0.5, -0.25, 1.25, 8), Estimate(2.0, 1.5, 2.5, 8)
    metrics = {"oracle_reward": reward, "kl": kl}
    left = {"inputs": {}, "libraries": {}, "threads": 1, "provenance": {}}
    return Record(name=name, identity="0" * 64, operation="x", config=config, metrics=metrics, **left)


def test_every_evaluation_is_a_row_below_the_earlier_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = LiveReport(tmp_path)  # no run is there, so no page can be written, and the table does without
    live(record("policy/low/dpo/seed0"))
    assert capsys.readouterr().err == "", "only evaluations are shown"
    live(record("evaluation/sft/seed0", method="SFT", tier="low"))
    first = capsys.readouterr().err
    assert first.split()[:3] == ["policy", "pairs", "reward"]
    assert "SFT" in first
    live(record("evaluation/low/dpo/seed0", method="DPO", tier="low"))
    both = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in both[-2:]] == ["SFT", "DPO"]
    assert short(Estimate(0.5, -0.25, 1.25, 8)) in both[-1]
    assert both[-1].split()[-3] == "2.00"
    assert not list(tmp_path.iterdir())


def test_columns_stay_where_they_are() -> None:
    names = ("DPO", "a method with a name that is far too long for its column", "[bold]x[/bold]")
    records = (record(f"evaluation/low/{k}/seed0", method=name, tier="low") for k, name in enumerate(names))
    rows = [table_row(evaluation, None, 3.0) for evaluation in records]
    head, _, *lines = table_lines(rows)
    assert [line.index("0.50 (") for line in lines] == [lines[0].index("0.50 (")] * 3
    assert all(len(line) <= 100 for line in (head, *lines))
    assert "[bold]x[/bold]" in lines[2], "names are text, not markup"


def test_the_page_is_written_and_the_difference_is_the_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(tmp_path, tiers=("low",), seeds=1, groups=("core",))
    study.write()
    records = {name: found for name, found in run_status(study.root).steps.items() if found is not None}
    (tier,) = collect(study.root, records, tiers=("low",))
    row = next(row for row in tier.rows if isinstance(row["difference"], Estimate))
    name = next(n for n in records if n.startswith(f"evaluation/low/{row.key}/"))
    LiveReport(study.root)(records[name])
    said = capsys.readouterr().err
    assert (study.root / "report.html").as_uri() in said
    assert short(row["difference"], "signed") in said
