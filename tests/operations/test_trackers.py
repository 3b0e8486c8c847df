"""``report_to``: what a tracker wrote stays with the result; pages of trainings that run."""

import importlib.util
import os
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from madpo.core.errors import ConfigError
from madpo.models.hyperparameters import REPORT_TO, Optimisation
from madpo.operations import RewardSettings, reward
from madpo.operations.trackers import reporting_to
from madpo.training import run as running
from practice_cases import read, run, text_pairs, write
from refusals import names, refused


def scalars(folder):
    """(tag, step) -> value of TensorBoard's files: records of a length, its checksum, an event, its checksum."""
    found = {}
    for path in folder.rglob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += length + 16
    return found


def test_tensorboards_files_stay_with_the_result(llama, tmp_path, own_cache):
    data = write(tmp_path / "pairs.jsonl", text_pairs(12))
    run("train", data, "--model_name_or_path", llama, "--loss", "dpo", "--output_dir", tmp_path / "P", "--batch_size",
        "4", "--epochs", "1", "--args.logging_steps", "1", "--report_to", "tensorboard")  # fmt: skip
    logged = {("train/loss", row["step"]): row["loss"] for row in read(tmp_path / "P" / "log.jsonl") if "loss" in row}
    found = scalars(tmp_path / "P" / "runs")
    assert len(logged) == 3
    for key, value in logged.items():
        assert abs(found[key] - value) < 1e-6
    assert not (tmp_path / "P" / "checkpoints").exists()


def test_a_reward_models_training_is_tracked_and_its_page_is_written_while_it_runs(
    llama, tmp_path, own_cache, monkeypatch
):
    pages, write_text = [], running._Watch.on_log

    def look(self, *args, **kwargs):
        write_text(self, *args, **kwargs)
        pages.extend(page.read_text() for page in tmp_path.rglob("report.html"))

    monkeypatch.setattr(running._Watch, "on_log", look)
    data = write(tmp_path / "pairs.jsonl", text_pairs(24))
    settings = RewardSettings(model=str(llama), eval_share=0.5, report_to=("tensorboard",))
    reward(data, tmp_path / "RM", settings)
    logged = {
        (f"{kind}/loss", row["step"]): row[name]
        for row in read(tmp_path / "RM" / "log.jsonl")
        for kind, name in (("train", "loss"), ("eval", "eval_loss"))
        if name in row
    }
    found = scalars(tmp_path / "RM" / "runs")
    assert logged
    for key, value in logged.items():
        assert found[key] == pytest.approx(value, abs=1e-6)
    assert 'http-equiv="refresh"' in pages[0]
    names(pages[0], ("Reward model", "step 1"))
    done = (tmp_path / "RM" / "report.html").read_text()
    assert "refresh" not in done.split("<title>")[0]
    assert REPORT_TO not in os.environ
    # Trackers are no part of a result: without them it is the same, and done.
    reward(data, tmp_path / "RM", settings.model_copy(update={"report_to": ()}))


def test_every_fold_of_a_search_is_tracked(llama, tmp_path, own_cache):
    data = write(tmp_path / "pairs.jsonl", text_pairs(16))
    run("tune", data, "--model_name_or_path", llama, "--loss", "dpo", "--trials", "1", "--folds", "2", "--epochs", "1",
        "--space.loss.beta", "[0.2]", "--set", "baseline=false", "--args.logging_steps", "1",
        "--args.report_to", "tensorboard", "--output_dir", tmp_path / "T")  # fmt: skip
    folds = sorted((tmp_path / "T" / "search" / "runs").iterdir())
    assert [folder.name[-7:] for folder in folds] == ["-fold-0", "-fold-1"]
    assert all(("train/loss", 1) in scalars(folder) for folder in folds)


def test_trainings_without_an_option_take_trackers_from_the_environment(tmp_path, monkeypatch):
    optimisation = Optimisation(learning_rate=1e-3, epochs=1, batch_size=2)
    assert optimisation.arguments(tmp_path, 0)["report_to"] == ["none"]
    with reporting_to(("tensorboard",)):
        assert optimisation.arguments(tmp_path, 0)["report_to"] == ["tensorboard"]
    with refused(ConfigError, "'tensorbord'"), reporting_to(("tensorbord",)):
        pass
    monkeypatch.setenv(REPORT_TO, "wandbb")
    with refused(ConfigError, "'wandb'"), reporting_to(()):
        pass


def test_the_page_of_a_training_has_its_curves(llama, tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(running, "PAGE_SECONDS", 0.0)
    data = write(tmp_path / "<b>pairs.jsonl", [row | {"reward_margin": 1.0} for row in text_pairs(12)])
    run("train", data, "--model_name_or_path", llama, "--loss", "dpo", "--eval_share", "0.3",
        "--output_dir", tmp_path / "P", "--batch_size", "4", "--args.logging_steps", "1")  # fmt: skip
    page = (tmp_path / "P" / "report.html").read_text()
    assert "held-out" in page
    assert "<b>pairs" not in page
    assert "refresh" not in page.split("<title>")[0]


@pytest.mark.slow
def test_a_study_reports_every_training(command, tmp_path):
    asked = ("--only", "policy/low/dpo/*", "--report_to", "tensorboard")
    assert command("run", "smoke", "--output_dir", tmp_path / "S", *asked).end().status == 0
    tracked = {path.parents[2] for path in tmp_path.rglob("runs/*/events*")}
    assert len(tracked) == 2, "SFT and the policy"


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_with_runs_of_their_own_get_one_for_each_training(llama, tmp_path, own_cache, monkeypatch, tracker):
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is absent")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    data = write(tmp_path / "pairs.jsonl", text_pairs(16))
    run("tune", data, "--model_name_or_path", llama, "--loss", "dpo", "--trials", "1", "--folds", "2", "--epochs", "1",
        "--space.loss.beta", "[0.2]", "--set", "baseline=false", "--args.logging_steps", "1",
        "--args.report_to", tracker, "--output_dir", tmp_path / "T")  # fmt: skip
    if tracker == "wandb":
        assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    else:
        assert list((tmp_path / "trackio").rglob("*.db"))
