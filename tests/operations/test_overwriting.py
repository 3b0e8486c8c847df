"""What ``--overwrite`` and a kill can cost a command: nothing that it reads, and no finished work."""

import shutil
from pathlib import Path

import pytest

import soak
from madpo.commands.cli import main
from madpo.core.config import Frozen
from madpo.operations import RewardSettings, reward
from madpo.operations import reward_model as reward_module
from madpo.operations import study_training as stages
from madpo.operations.running import digest
from madpo.runner.operation import operation
from madpo.runner.step import Source, Step
from madpo.runner.work import run_step
from madpo.training.checkpoints import newest
from madpo.training.reward import RewardModelTrainer
from practice_cases import classifier, everything, text_pairs, write
from refusals import names


class Base(Frozen):
    """Nothing to set."""


@operation("copy_inputs/1")
def copy_inputs(config: Base, inputs: dict[str, Path], out: Path) -> dict[str, float]:
    for role, place in inputs.items():
        (shutil.copytree if place.is_dir() else shutil.copy)(place, out / role)
    return {}


# Every input of every command; all of them are in P, which is the result that is to be replaced.
READ = [
    "train P/scored.jsonl --model_name_or_path m",
    "train pairs.jsonl --model_name_or_path m --loss dpo --eval_data P/scored.jsonl",
    "train pairs.jsonl --model_name_or_path P/merged",
    "reward P/scored.jsonl --model_name_or_path m",
    "reward pairs.jsonl --model_name_or_path m --eval_data P/scored.jsonl",
    "reward pairs.jsonl --model_name_or_path P/merged",
    "evaluate P/adapter --reference m --prompts pairs.jsonl --reward rm",
    "evaluate m --reference P/merged --prompts pairs.jsonl --reward rm",
    "evaluate m --reference m --prompts P/scored.jsonl --reward rm",
    "evaluate m --reference m --prompts pairs.jsonl --reward P/classifier",
    "evaluate m --reference m --prompts pairs.jsonl --reward reward",
    "score P/scored.jsonl --score_columns a b",
    "score pairs.jsonl --reward_model P/classifier",
    "score pairs.jsonl --reward_model reward",
    "score pairs.jsonl --folds 2 --model_name_or_path P/merged",
    "tune P/scored.jsonl --model_name_or_path m",
    "tune pairs.jsonl --model_name_or_path P/merged",
    "tune pairs.jsonl --model_name_or_path m --criterion reward --reward_model P/classifier --kl 1",
    "trim-vocab P/merged --corpus pairs.jsonl",
    "trim-vocab m --corpus pairs.jsonl P/scored.jsonl",
    "trim-vocab m --corpus pairs.jsonl --eval P/scored.jsonl",
]


@pytest.fixture(scope="module")
def with_inputs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``P``, a result that holds what each command may be asked to read."""
    place = tmp_path_factory.mktemp("inputs")
    rows = [row | {"reward_margin": 1.0, "a": 2.0, "b": 1.0} for row in text_pairs(8)]
    data = write(place / "pairs.jsonl", rows)
    shutil.copytree(llama, place / "m")
    classifier(llama, place / "rm")
    for folder in (place / "adapter", place / "reward" / "adapter"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "P/merged"}')
    (place / "reward" / "reward_model.json").write_text('{"base": "P/merged"}')
    given = {"scored.jsonl": data, "merged": llama, "adapter": place / "adapter", "classifier": place / "rm"}
    inputs = {role: Source(str(path), "0") for role, path in given.items()}
    run_step(Step("P", copy_inputs, Base(), inputs), place / "P", memory="")
    return place


@pytest.mark.parametrize("line", READ)
def test_no_command_removes_what_it_reads(
    line: str, with_inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(with_inputs)
    before = everything(with_inputs)
    assert main([*line.split(), "--output_dir", "P", "--overwrite"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    place = next((p for p in ("P/scored.jsonl", "P/adapter", "P/classifier") if p in line), "P/merged")
    assert said.startswith("madpo: ")
    names(said, (place, "in P"))
    assert everything(with_inputs) == before


def test_records_and_locks_do_not_change_a_digest(tmp_path: Path) -> None:
    (tmp_path / "P").mkdir()
    (tmp_path / "P" / "adapter").write_text("x")
    before = digest(tmp_path / "P")
    (tmp_path / "P" / ".lock").write_text("")
    (tmp_path / "P" / "record.json").write_text("{}")
    assert digest(tmp_path / "P") == before
    (tmp_path / "P" / "README.md").write_text("")
    assert digest(tmp_path / "P") != before


@pytest.mark.slow
def test_a_reward_model_that_is_trained_outlives_a_kill_of_its_measurement(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "pairs.jsonl", text_pairs(60))
    settings = RewardSettings.model_validate(
        {
            "model": str(llama),
            "optimisation": {"batch_size": 2, "epochs": 4, "learning_rate": 1e-2},
            "eval_share": 0.4,
            "eval_every": 9,
            "patience": 2,
        }
    )
    whole = reward(data, tmp_path / "whole", settings)
    steps, step, measure = [], RewardModelTrainer.training_step, reward_module._measure

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        RewardModelTrainer,
        "training_step",
        lambda self, *a, **k: (steps.append(self.state.global_step), step(self, *a, **k))[1],
    )
    monkeypatch.setattr(reward_module, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        reward(data, tmp_path / "R", settings)
    taken = len(steps)
    assert 25 < taken < 68, "it stopped early, after a checkpoint"
    monkeypatch.setattr(reward_module, "_measure", measure)
    assert reward(data, tmp_path / "R", settings) == whole
    assert steps[taken:] == steps[25:taken], "only what is after the checkpoint"
    for name in ("adapter/adapter_model.safetensors", "log.jsonl", "report.json"):
        assert (tmp_path / "R" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path / "R").iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


SHORT = {"epochs": 1}  # a checkpoint, and two steps more


def test_a_studys_reward_model_keeps_its_checkpoints_until_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soak.prepare(tmp_path / "made")
    soak.train("reward_model", tmp_path / "made", tmp_path / "whole", SHORT)
    measured = stages.margin_table

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "margin_table", killed)
    with pytest.raises(KeyboardInterrupt):
        soak.train("reward_model", tmp_path / "made", tmp_path / "out", SHORT)
    assert newest(tmp_path / "out" / "checkpoints") is not None
    monkeypatch.setattr(stages, "margin_table", measured)
    soak.train("reward_model", tmp_path / "made", tmp_path / "out", SHORT)
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert soak.result(tmp_path / "out") == soak.result(tmp_path / "whole")


def test_a_result_may_be_made_again_from_its_own_configuration(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: None
) -> None:
    data, out = write(tmp_path / "pairs.jsonl", text_pairs(8)), tmp_path / "P"
    few = ["--loss", "dpo", "--args.max_steps", "1", "--model_name_or_path", str(llama)]
    assert main(["train", str(data), *few, "--output_dir", str(out)]) == 0
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (
        main(["train", str(data), "--config", str(out / "config.toml"), "--output_dir", str(out), "--overwrite"]) == 0
    )
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == weights
