"""A trial that diverges costs only itself, and the output head is no target of an adapter."""

import csv

import pytest

from madpo.commands.cli import main
from madpo.core.errors import ConfigError, DataError, DivergedError
from madpo.losses import DPO
from madpo.operations import TrainSettings, train
from madpo.operations.tuning import TuneSettings, tune
from madpo.operations.tuning import search as study
from madpo.training import PreferenceTrainer
from practice_cases import text_pairs, write
from refusals import names, refused

pytestmark = pytest.mark.usefixtures("module_cache")
ARGS = {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [row | {"reward_margin": 1.0 + i % 3} for i, row in enumerate(text_pairs(10))]
    return write(tmp_path_factory.mktemp("data") / "scored.jsonl", rows)


def settings_for(llama, rates, **changes):
    shared = {"model": str(llama), "args": ARGS, "dtype": "float32", "lora": {"rank": 2}, "folds": 2}
    search = {"sampler": "grid", "baseline": False, "space": {"args.learning_rate": {"values": rates}}}
    return TuneSettings.model_validate({**shared, **search, **changes})


def test_a_diverged_trial_is_listed_and_the_others_are_chosen_from(llama, data, tmp_path, monkeypatch):
    settings = settings_for(llama, [1e-4, 3e37])
    end = study._end

    def dies(*trial, **found):
        if "diverged" in found:
            raise KeyboardInterrupt
        end(*trial, **found)

    monkeypatch.setattr(study, "_end", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(data, tmp_path / "T", settings)
    monkeypatch.setattr(study, "_end", end)
    report = tune(data, tmp_path / "T", settings)
    (lost,) = report.diverged
    assert lost.values == {"args.learning_rate": 3e37}
    assert [trial.values["args.learning_rate"] for trial in report.trials] == [1e-4]
    assert report.chosen == report.trials[0].number != lost.number
    names(report.text(), (f"trial {lost.number}", "args.learning_rate", "3e+37"), ("nan", "step 2"))
    rows = {row["trial"]: row for row in csv.DictReader((tmp_path / "T" / "trials.csv").read_text().splitlines())}
    assert rows[str(lost.number)]["diverged"] == lost.reason
    assert rows[str(lost.number)]["accuracy"] == ""
    assert rows[str(report.chosen)]["diverged"] == ""
    names((tmp_path / "T" / "tune.html").read_text(), (f"Trial {lost.number}", "nan"))
    assert not list((tmp_path / "T").rglob("training-*"))

    def trains(*_, **__):
        raise AssertionError("nothing is trained again")

    monkeypatch.setattr(PreferenceTrainer, "training_step", trains)
    assert tune(data, tmp_path / "T", settings) == report


def test_where_all_diverge_one_sentence_says_so_each_time(llama, data, tmp_path, monkeypatch):
    args = ARGS | {"max_steps": 1}  # the loss of the only step is good, what it leaves is not
    settings = settings_for(llama, [3e37], args=args)
    for _ in range(2):
        with refused(DivergedError, "1 trials", "5 of 5"):
            tune(data, tmp_path / "T", settings)


def test_other_errors_of_the_data_end_the_search(llama, data, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise DataError("d.jsonl")

    monkeypatch.setattr(study, "measure", broken)
    with refused(DataError, "d.jsonl"):
        tune(data, tmp_path / "T", settings_for(llama, [1e-4]))


def test_the_output_head_is_no_target(llama, data, tmp_path, capsys):
    targets = {"targets": ["q_proj", "lm_head"]}
    settings = TrainSettings(model=str(llama), loss=DPO(), args=ARGS, dtype="float32", lora=targets)
    possible = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or take all-linear"
    with refused(ConfigError, "lm_head", possible):
        train(data, tmp_path / "P", settings)
    words = ["--loss", "dpo", "--args.bf16", "false", "--lora.targets", '["lm_head"]', "--output_dir", tmp_path / "P"]
    assert main(["train", str(data), "--model_name_or_path", str(llama), *map(str, words)]) == 2
    names(capsys.readouterr().err, ("lora.targets", "'lm_head'"))
    assert not (tmp_path / "P").exists()
