"""A run as a small folder: what goes along, what stays, and that the report can be made again from it."""

import io
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from madpo.commands import study as study_commands
from madpo.commands.cli import main
from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.core.metrics import Estimate
from madpo.report import export, export_report, rebuild_report
from madpo.report.collect import collect
from madpo.report.sources import folder_of
from madpo.report.study_sections import temperature_table
from madpo.runner.record import run_status
from practice_cases import read, write
from refusals import names, refused
from report_cases import PROMPTS, Study, make_study


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small_study(root: Path) -> Study:
    """One tier and seed of the core methods."""
    return make_study(root, tiers=("low",), seeds=1, groups=("core",))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A part of a study with a failed step, and its export."""
    root = tmp_path_factory.mktemp("study")
    study = make_study(root, tiers=("high",), seeds=2, groups=("core", "ablation", "frontier"))
    study.unfinished("policy/high/later/seed0", f"OSError: {root}/data, {Path.home()}/x")
    study.unfinished("evaluation/high/later/seed0")
    policy = next(path for path in root.glob("policy/high/*/*"))
    (policy / "adapter").mkdir()
    (policy / "adapter" / "adapter_model.safetensors").write_bytes(b"w" * 1_000_000)
    study.write("A part")
    target = root.parent / f"{root.name}-results" / "deep"
    assert export_report(root, target) == target / "report.html"
    return root, target


def test_what_goes_along(exported: tuple[Path, Path]) -> None:
    root, target = exported
    files = contents(target)
    assert {name for name in files if not name.startswith(("figures/", "tables/"))} == {
        *("run.json", "records.json", "samples.parquet", "curves.parquet", "margins.parquet"),
        *("report.html", "README.md"),
    }
    assert {Path(name).suffix for name in files if name.startswith("figures/")} == {".svg"}
    assert {Path(name).suffix for name in files if name.startswith("tables/")} == {".csv"}
    assert sum(map(len, files.values())) < export.LIMIT
    everything = b"".join(files.values())
    for place in (str(root), str(Path.home())):
        assert place.encode() not in everything
    assert b'"argv"' not in everything
    texts = (target / "report.html").read_text(encoding="utf-8")
    assert "number 11" in texts
    assert "number 12" not in texts
    assert "1 failed" in texts
    status = run_status(target)
    assert status.unfinished["policy/high/later/seed0"] == "failed: OSError: ./data, ~/x"
    assert not status.unfinished["evaluation/high/later/seed0"].startswith("failed")
    for name, record in run_status(root).steps.items():
        kept = status.steps[name]
        assert (kept is None) == (record is None)
        if kept is not None and record is not None:
            assert kept.model_dump(exclude={"provenance"}) == record.model_dump(exclude={"provenance"})
            assert kept.stripped


def test_the_tables_hold_every_number_and_few_texts(exported: tuple[Path, Path]) -> None:
    root, target = exported
    samples = pd.read_parquet(target / "samples.parquet")
    for folder, own in samples.groupby("folder"):
        rows = pd.read_json(root / str(folder) / "samples.jsonl", lines=True, precise_float=True)
        assert own["reward"].tolist() == rows["oracle_reward"].tolist()
        assert own["kl"].tolist() == rows["kl"].tolist()
        assert own["response"].notna().sum() == export.TEXTS
        assert own["response"].iloc[5] == rows["response"][5]
    assert len(samples) == PROMPTS * samples["folder"].nunique()
    margins = pd.read_parquet(target / "margins.parquet")
    own = margins[margins["folder"].str.startswith("margins/high/seed0")]
    given = pd.read_parquet(next(root.glob("margins/high/seed0-*/margins.parquet")))
    assert own["reward_margin"].tolist() == given["reward_margin"].tolist()
    assert own["train"].sum() == 30
    curves = pd.read_parquet(target / "curves.parquet")
    log = pd.read_json(next(root.glob("policy/high/method0/seed0-*/log.jsonl")), lines=True, precise_float=True)
    own = curves[curves["folder"].str.startswith("policy/high/method0/seed0")]
    assert own["loss"].tolist() == log["loss"].tolist()


def test_the_numbers_are_those_of_the_run(exported: tuple[Path, Path], tmp_path: Path) -> None:
    root, target = exported
    copy = tmp_path / "copy"
    shutil.copytree(target, copy)
    for folder in (root, copy):
        rebuild_report(folder, figures=False)
    for name in ("results.md", "tables/claims.csv", "tables/methods.csv", "tables/frontier.json", "results.json"):
        assert (root / name).read_bytes() == (copy / name).read_bytes(), name


def test_the_report_is_made_again_from_the_export(exported: tuple[Path, Path], tmp_path: Path) -> None:
    _, target = exported
    again = tmp_path / "again"
    export_report(target, again)
    assert contents(again) == contents(target)
    page = (again / "report.html").read_bytes()
    rebuild_report(again, figures=False)
    assert (again / "report.html").read_bytes() == page
    assert main(["status", str(again)]) == 0


def test_steps_that_are_run_after_an_export_take_the_place_of_its_lines(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    root, target = exported
    copy = tmp_path / "copy"
    shutil.copytree(target, copy)
    folder = next(path.relative_to(root) for path in root.glob("evaluation/high/method0/seed0-*"))
    shutil.copytree(root / folder, copy / folder)
    path = copy / folder / "samples.jsonl"
    rows = [row | {"oracle_reward": 3.0} for row in read(path)]
    write(path, rows)
    status = run_status(copy)
    assert not status.steps["evaluation/high/method0/seed0"].stripped  # type: ignore[union-attr]
    records = {name: record for name, record in status.steps.items() if record is not None}
    dpo = next(row for row in collect(copy, records)[0].rows if row.key == "method0")
    assert dpo.mean("oracle_reward") == pytest.approx((3.0 + 1.0) / 2)
    assert export_report(copy, tmp_path / "again").exists()


def test_a_smaller_vocabulary_is_said(tmp_path: Path) -> None:
    study = small_study(tmp_path / "run")
    folder, entries = study.write("Plain"), "32,768"
    assert entries not in rebuild_report(folder, figures=False).read_text(encoding="utf-8")
    costs = {"kl": Estimate(0.0266, 0.02, 0.03, 128), "nats_per_byte_before": Estimate(0.8163, 0.8, 0.9, 128)}
    costs["nats_per_byte"] = Estimate(0.8610, 0.8, 0.9, 128)
    study.add("base", {"entries": 32768, "entries_before": 262144, "covered": 0.9763, **costs})
    rebuild_report(study.write("Trimmed"), figures=False)
    (said,) = [text for text in json.loads((folder / "results.json").read_text())["summary"] if entries in text]
    names(said, (entries, "262,144"), "97.6 %", "0.027 nats", ("0.816", "0.861 nats"))


def test_the_command_prints_what_the_report_says_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small_study(tmp_path / "run")
    study.write("one")
    assert main(["report", str(study.root)]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    summary = json.loads((study.root / "results.json").read_text(encoding="utf-8"))["summary"]
    assert len(summary) > 1
    assert said == ["".join(c if c.isprintable() else repr(c)[1:-1] for c in text) for text in summary]
    assert last == f"Report: {(study.root / 'report.html').as_uri()}"


def test_a_name_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small_study(tmp_path / "run")
    page = rebuild_report(study.write("one"), figures=False)
    results = study.root / "results.json"
    changed = json.loads(results.read_text(encoding="utf-8")) | {"summary": ["a\x1b[2Jb\u202ec\nd"]}
    results.write_text(json.dumps(changed), encoding="utf-8")
    study_commands._print_results(page)
    assert capsys.readouterr().out.splitlines()[0] == r"a\x1b[2Jb\u202ec\nd"


def test_a_page_without_results_and_a_terminal_of_few_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study_commands._print_results(tmp_path / "report.html")
    assert capsys.readouterr().out == f"Report: {(tmp_path / 'report.html').as_uri()}\n"
    (tmp_path / "results.json").write_text(json.dumps({"summary": ["MADPO τ=7"]}), encoding="utf-8")
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    study_commands._print_results(tmp_path / "report.html")
    narrow.seek(0)
    assert narrow.read().startswith(r"MADPO \u03c4=7")


def test_decoding_temperatures_are_a_table_of_their_own_and_go_along(tmp_path: Path) -> None:
    study = small_study(tmp_path / "run")
    plain = collect(study.root, study.records)[0]
    for name in ("evaluation/sft/seed0", next(n for n in study.records if n.startswith("evaluation/low/"))):
        file = folder_of(study.root, study.records[name]) / "samples.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        shift = 0.0 if "sft" in name else 2.0
        swept = [row | {"temperature": 0.5, "oracle_reward": shift + row["prompt_id"] / 100} for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*rows, *swept])
        file.write_text(text, encoding="utf-8")
    study.write("Swept")
    export_report(study.root, tmp_path / "export")
    records = {name: record for name, record in run_status(tmp_path / "export").steps.items() if record is not None}
    for root, found in ((study.root, study.records), (tmp_path / "export", records)):
        (tier,) = collect(root, found)
        assert [row.values["oracle_reward"] for row in tier.rows] == [r.values["oracle_reward"] for r in plain.rows]
        (temperature, other), *more = tier.at_temperatures().items()
        assert (temperature, more) == (0.5, [])
        assert [row.name for row in other.rows] == ["SFT", "DPO"]
        assert other.rows[1].mean("oracle_reward") - other.rows[0].mean("oracle_reward") == pytest.approx(2.0)
        assert other.rows[1].mean("win_rate") == 1.0
        table = temperature_table(tier)
        assert table is not None
        assert [cells[0].text for cells in table.rows] == ["SFT", "DPO"]
    table = temperature_table(collect(tmp_path / "export", records)[0])
    assert table is not None
    assert table.label in (tmp_path / "export" / "report.html").read_text(encoding="utf-8")


def test_what_a_kill_between_two_renames_left_is_the_earlier_export(tmp_path: Path) -> None:
    study = small_study(tmp_path / "run")
    study.write("one")
    export_report(study.root, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_bytes()
    (tmp_path / "out").rename(tmp_path / ".out.old")

    def fails() -> None:
        with export._replacing(tmp_path / "out"):
            raise DataError("too large")

    with pytest.raises(DataError):
        fails()
    assert (tmp_path / "out" / "report.html").read_bytes() == page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_an_earlier_export_is_replaced_as_a_whole_and_nothing_else_is(tmp_path: Path) -> None:
    study = small_study(tmp_path / "run")
    study.write("one")
    target = tmp_path / "out"
    assert main(["report", str(study.root), "--export", str(target)]) == 0
    (target / "tables" / "left.csv").write_text("over")
    for killed in (".out.tmp", ".out.old"):  # a kill leaves a part of an export
        (tmp_path / killed / "policy").mkdir(parents=True)
        (tmp_path / killed / "run.json").write_bytes((target / "run.json").read_bytes())
    assert main(["report", str(study.root), "--export", str(target)]) == 0
    assert not (target / "tables" / "left.csv").exists()
    (target / "notes.md").write_text("mine")
    with refused(StorageError, "notes.md"):
        export_report(study.root, target)
    assert (target / "notes.md").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    for place in (other, study.root, study.root / "x"):
        with refused(StorageError, place):
            export_report(study.root, place)
    assert (other / "thesis.tex").read_text() == "x"
    with refused(ConfigError, tmp_path):
        export_report(other, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_too_large_or_damaged_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small_study(tmp_path / "run")
    study.write("one")
    monkeypatch.setattr(export, "rebuild_report", lambda place: rebuild_report(place, figures=False))
    monkeypatch.setattr(export, "LIMIT", 10_000)
    with refused(DataError, ("limit", "0.01")):
        export_report(study.root, tmp_path / "out")
    damaged = next(study.root.glob("evaluation/low/*/*/samples.jsonl"))
    damaged.write_text(damaged.read_text(encoding="utf-8") + "{", encoding="utf-8")
    rows = PROMPTS + 1
    with refused(DataError, "samples.jsonl", f"row {rows}"):
        export_report(study.root, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_repeated_texts_are_counted_without_texts(tmp_path: Path) -> None:
    """From an export, which keeps few texts."""
    study = small_study(tmp_path / "run")
    for path in study.root.glob("evaluation/low/method0/*/samples.jsonl"):
        write(path, [row | {"response": "the same"} for row in read(path)])
    study.write("one")
    export_report(study.root, tmp_path / "out")
    records = {name: record for name, record in run_status(tmp_path / "out").steps.items() if record is not None}
    for folder in (study.root, tmp_path / "out"):
        row = next(row for row in collect(folder, records)[0].rows if row.key == "method0")
        assert row["repeated"] == 1.0
