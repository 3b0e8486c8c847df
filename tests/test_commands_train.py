"""Options of the practitioner's commands: what they stand for, and mistakes in one sentence. No model is loaded."""

import argparse
import subprocess
import sys

import pytest

from madpo import commands_train
from madpo.cli import main
from madpo.options import spelled_out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "d", "--loss.tau", "7"], ["train", "d", "--set=loss.tau=7"]),
        (["train", "d", "--loss.tau=7", "--merge"], ["train", "d", "--set=loss.tau=7", "--merge"]),
        (["train", "--args.num_train_epochs", "-1", "d"], ["train", "--set=args.num_train_epochs=-1", "d"]),
        (["score", "--reward.lora.rank", "2"], ["score", "--set=reward.lora.rank=2"]),
        (["run", "--loss.tau", "7"], ["run", "--loss.tau", "7"]),
        (["train", "--loss", "dpo"], ["train", "--loss", "dpo"]),
        ([], []),
    ],
)
def test_dotted_options_are_settings(argv, expected):
    assert spelled_out(argv) == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "d", "--output_dir", "o", "--loss.tau"], "the option --loss.tau has no value"),
        (["train", "d", "--output_dir", "o", "--loss.tau", "--merge"], "the option --loss.tau has no value"),
        (["train", "d", "--output_dir", "o", "--mege"], "no option '--mege'; did you mean '--merge'?"),
        (["train", "d", "--output_dri", "o"], "did you mean '--output_dir'?"),
        (["train", "--output_dir", "o"], "DATA"),
        (["train", "d", "--model_name_or_path", "m"], "the key 'output_dir' is missing; add --output_dir"),
        (["train", "d", "--output_dir", "o"], "the key 'model' is missing; add --model_name_or_path"),
        (["reward", "d", "--output_dir", "o", "--epochs", "many"], "'many'"),
        (["evaluate", "p", "--output_dir", "o", "--reward", "r"], "the key 'prompts_data' is missing; add --prompts"),
        (["tune", "d", "--output_dir", "o", "--model_name_or_path", "m", "--criterion", "loss"], "never selected on"),
    ],
)
def test_a_mistake_in_the_options_is_one_sentence_and_status_2(argv, words, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("madpo: ")
    assert err.count("\n") == 1
    assert words in err


def parsed(arguments, *words):
    parser = argparse.ArgumentParser()
    arguments(parser)
    found = vars(parser.parse_args(words))
    del found["key:output_dir"]
    return {
        key.removeprefix("key:"): value for key, value in found.items() if key.startswith("key:") and value is not None
    }


def test_every_option_stands_for_a_key():
    found = parsed(
        commands_train.train_arguments,
        *("d", "--output_dir", "o", "--model-name-or-path", "m", "--loss", "dpo", "--merge", "--learning_rate", "1e-5"),
        *("--epochs", "2", "--batch-size", "4", "--max_length", "64", "--seed", "3", "--eval_share", "0.1"),
    )
    assert found == {
        "model": "m",
        "loss.kind": "dpo",
        "merge": True,
        "args.learning_rate": 1e-5,
        "args.num_train_epochs": 2.0,
        "args.per_device_train_batch_size": 4,
        "args.max_length": 64,
        "args.seed": 3,
        "eval_share": 0.1,
    }
    found = parsed(
        commands_train.score_arguments,
        *("d", "--output_dir", "o", "--folds", "3", "--model_name_or_path", "m", "--lora_rank", "4", "--epochs", "2"),
        *("--batch_size", "8", "--train_batch_size", "2"),
    )
    assert found == {
        "folds": 3,
        "reward.model": "m",
        "reward.lora.rank": 4,
        "reward.optimisation.epochs": 2.0,
        "batch_size": 8,
        "reward.optimisation.batch_size": 2,
    }
    for word in ("--reward", "--reward_model", "--reward-model"):
        found = parsed(commands_train.evaluate_arguments, "p", "--output_dir", "o", "--prompts", "f", word, "r")
        assert found == {"prompts_data": "f", "reward_model": "r"}


def test_the_commands_load_no_torch_to_parse():
    code = (
        "import sys\nfrom madpo.cli import main\n"
        "assert main(['train', 'd', '--output_dir', 'o', '--mege']) == 2\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_every_option_may_stand_in_a_file(tmp_path):
    from madpo.options import asked
    from madpo.practice import EvaluateSettings, TrainSettings
    from madpo.tuning import TuneSettings

    given = tmp_path / "given.toml"
    given.write_text(
        'output_dir = "out"\noverwrite = true\neval_data = "e"\nmodel = "m"\nmerge = true\ntruncation = "cut"\n'
        '[loss]\nkind = "dpo"\nbeta = 0.3\n[args]\nlearning_rate = 2e-5\n[lora]\nrank = 2\n'
    )
    parser = argparse.ArgumentParser()
    commands_train.train_arguments(parser)
    parsed_words = parser.parse_args(["d", "--config", str(given), "--learning_rate", "1e-3", "--set", "lora.rank=3"])
    beside = {"output_dir": (str, ...), "overwrite": (bool, False), "eval_data": (str | None, None)}
    where, settings = asked(parsed_words, TrainSettings, **beside)
    assert where == {"output_dir": "out", "overwrite": True, "eval_data": "e"}
    assert (settings.model, settings.merge, settings.truncation, settings.loss.beta) == ("m", True, "cut", 0.3)
    assert settings.args == {"learning_rate": 1e-3}, "an option goes before the file"
    assert settings.lora.rank == 3, "--set goes before both"
    given.write_text('prompts_data = "f"\noutput_dir = "o"\nreward_model = "r"\ntop_p = 0.5\n')
    parser = argparse.ArgumentParser()
    commands_train.evaluate_arguments(parser)
    where, settings = asked(
        parser.parse_args(["p", "--config", str(given)]),
        EvaluateSettings,
        prompts_data=(str, ...),
        output_dir=(str, ...),
    )
    assert (where["prompts_data"], settings.reward_model, settings.top_p) == ("f", "r", 0.5)
    given.write_text('model = "m"\noutput_dir = "o"\nfolds = 4\n[space]\n"loss.tau" = { values = [1, 2] }\n')
    parser = argparse.ArgumentParser()
    commands_train.tune_arguments(parser)
    _, settings = asked(parser.parse_args(["d", "--config", str(given)]), TuneSettings, output_dir=(str, ...))
    assert settings.folds == 4
    assert settings.searched["loss.tau"].values == (1, 2)


@pytest.mark.parametrize("name", ["reward", "score", "train", "tune", "evaluate"])
def test_every_declared_option_is_a_key_of_the_configuration(name):
    """What an option stands for exists, so that a file can hold it too."""
    from madpo.practice import EvaluateSettings, RewardSettings, ScoreSettings, TrainSettings
    from madpo.tuning import TuneSettings

    beside = {"output_dir", "overwrite", "eval_data", "prompts_data"}
    model = {"reward": RewardSettings, "score": ScoreSettings, "train": TrainSettings, "tune": TuneSettings}.get(
        name, EvaluateSettings
    )
    parser = argparse.ArgumentParser()
    getattr(commands_train, f"{name}_arguments")(parser)
    keys = [a.dest.removeprefix("key:") for a in parser._actions if a.dest.startswith("key:")]
    assert len(keys) > 8
    for key in set(keys) - beside:
        assert key.split(".")[0] in model.model_fields, key
