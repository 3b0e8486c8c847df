"""Options of the practitioner's commands: what they stand for, and mistakes in one sentence. No model is loaded."""

import argparse
import dataclasses
import enum
import subprocess
import sys
import types
import typing

import pytest

from madpo.commands import train as commands_train
from madpo.commands.cli import main
from madpo.commands.options import spelled_out
from practice_cases import text_pairs, write


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
        (
            ["train", "d.jsonl", "--output_dir", "o", "--model_name_or_path", "m", "--loss.tua", "7"],
            "'loss.tua'; did you mean 'tau'?",
        ),
        (
            ["train", "d.jsonl", "--output_dir", "o", "--model_name_or_path", "m", "--loss.tau", "0"],
            "loss: tau is 0.0, but must be above 0",
        ),
        (
            ["train", "d.jsonl", "--output_dir", "o", "--model_name_or_path", "m", "--loss", "mdpo"],
            "did you mean 'madpo'?",
        ),
        (["train", "d.jsonl", "--model_name_or_path", "m"], "the key 'output_dir' is missing; add --output_dir"),
        (["train", "d.jsonl", "--output_dir", "o"], "the key 'model' is missing; add --model_name_or_path"),
        (["reward", "d", "--output_dir", "o", "--epochs", "many"], "'many'"),
        (["evaluate", "p", "--output_dir", "o", "--reward", "r"], "the key 'prompts_data' is missing; add --prompts"),
        (
            ["tune", "d.jsonl", "--output_dir", "o", "--model_name_or_path", "m", "--criterion", "loss"],
            "never selected on",
        ),
    ],
)
def test_a_mistake_in_the_options_is_one_sentence_and_status_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", text_pairs(1))
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


def test_a_mistake_is_told_before_what_trains_is_loaded(tmp_path):
    """Torch alone where a loss is read (1.7 s of a processor), else not even that (0.3 s); TRL takes 5 more."""
    write(tmp_path / "d.jsonl", text_pairs(1))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "bad.toml").write_text("a = ")
    without_torch = [
        ("train d.jsonl --output_dir o --mege", "no option '--mege'"),
        ("train nope.jsonl --model_name_or_path m --output_dir o", "nope.jsonl: there is no such file"),
        ("tune nope.jsonl --model_name_or_path m --output_dir o", "nope.jsonl: there is no such file"),
        ("train d.jsonl --config nope.toml --output_dir o", "nope.toml: there is no such file"),
        ("train d.jsonl --config bad.toml --output_dir o", "bad.toml: is not valid TOML"),
        ("reward d.jsonl --output_dir o", "the key 'model' is missing"),
        ("reward d.jsonl --model_name_or_path ./nope --output_dir o", "nope is no folder"),
        ("reward d.jsonl --model_name_or_path m --output_dir used", "is not empty and holds no result"),
        ("reward d.jsonl --model_name_or_path m --output_dir o --eval_data n.csv", "n.csv: there is no such file"),
        (
            "reward d.jsonl --model_name_or_path m --output_dir o --set optimisation.lr=1",
            "unknown key 'optimisation.lr'",
        ),
        ("score d.jsonl --output_dir o", "give one of reward_model, score_columns and folds"),
        ("evaluate p --prompts nope.jsonl --reward r --output_dir o", "nope.jsonl: there is no such file"),
        ("evaluate p --prompts d.jsonl --reward r --output_dir o --top_p 2", "top_p = 2.0: must be less than"),
    ]
    without_trl = [
        ("train d.jsonl --model_name_or_path m --output_dir used", "is not empty and holds no result"),
        ("train d.jsonl --model_name_or_path ./nope --output_dir o", "nope is no folder"),
        ("train d.jsonl --model_name_or_path m --output_dir o --loss.tua 7", "did you mean 'tau'?"),
        ("train d.jsonl --model_name_or_path m --output_dir o --args.lerning_rate 1", "did you mean 'learning_rate'?"),
        ("train d.jsonl --model_name_or_path m --output_dir o --args.bf16 maybe", "must be a valid boolean"),
        (
            "tune d.jsonl --model_name_or_path m --output_dir o --space.loss.tau '[0]'",
            "tau is 0.0, but must be above 0",
        ),
    ]
    code = (
        "import shlex, sys\nfrom madpo.commands.cli import main\n"
        f"for cases, absent in (({without_torch!r}, 'torch'), ({without_trl!r}, 'trl')):\n"
        "    for line, words in cases:\n"
        "        print(line, '->', words, file=sys.stderr, flush=True)\n"
        "        assert main(shlex.split(line)) == 2\n"
        "        assert not {absent, 'trl', 'peft'} & set(sys.modules), line\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    for asked, answer in zip(said[::2], said[1::2], strict=True):
        assert answer.startswith("madpo: ")
        assert asked.split(" -> ")[1] in answer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.toml", "d.jsonl", "used"]


def test_the_arguments_of_the_trainer_are_those_of_its_class():
    from madpo.operations.arguments import TYPES
    from madpo.training import PreferenceConfig

    def kinds(hint):
        """The members of a union; an enumeration is given as text, a class of settings as a table."""
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            return {kind for part in typing.get_args(hint) for kind in kinds(part)}
        if typing.get_origin(hint) is list and issubclass(typing.get_args(hint)[0], enum.Enum):
            return {list[str]}
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return {str}
        return {dict[str, typing.Any]} if hint is dict or hint.__name__ == "ParallelismConfig" else {hint}

    hints = typing.get_type_hints(PreferenceConfig)
    expected = {f.name: kinds(hints[f.name]) for f in dataclasses.fields(PreferenceConfig) if f.init}
    assert {name: kinds(kind) for name, kind in TYPES.items()} == expected


def test_none_is_none_where_no_other_text_may_stand(tmp_path):
    from madpo.core.config import load_config
    from madpo.operations import TrainSettings
    from madpo.operations.policy import resolved

    given = {"max_length": "none", "gradient_checkpointing": "none", "report_to": "none", "optim": "adamw_torch"}
    base = {"model": "m", "loss": {"kind": "dpo"}}
    settings = TrainSettings.model_validate({**base, "args": given})
    assert settings.args == {**given, "max_length": None, "gradient_checkpointing": None}
    path = tmp_path / "config.toml"
    path.write_text(resolved("d", settings))
    again = load_config(path, TrainSettings)
    assert {name: again.args[name] for name in given} == settings.args
    path.write_text("")
    said = load_config(path, TrainSettings, ["model=m", "loss.kind=dpo", "args.max_length=none"])
    assert said.args == {"max_length": None}
    with pytest.raises(ValueError, match=r"args.learning_rate = 'none': must be a valid number"):
        TrainSettings.model_validate({**base, "args": {"learning_rate": "none"}})


def test_a_resolved_configuration_finds_its_model_from_elsewhere(llama, tmp_path, monkeypatch):
    from madpo.operations import TrainSettings
    from madpo.operations.policy import resolved

    monkeypatch.chdir(llama.parent)
    for given, kept in ((llama.name, str(llama.resolve())), ("owner/name", "owner/name"), ("tiny-llama", "tiny-llama")):
        settings = TrainSettings.model_validate({"model": given, "loss": {"kind": "dpo"}})
        assert f'model = "{kept}"' in resolved("d", settings)


def test_every_option_may_stand_in_a_file(tmp_path):
    from madpo.commands.options import asked
    from madpo.operations import EvaluateSettings, TrainSettings
    from madpo.operations.tuning import TuneSettings

    given = tmp_path / "given.toml"
    given.write_text(
        'output_dir = "out"\neval_data = "e"\nmodel = "m"\nmerge = true\ntruncation = "cut"\n'
        '[loss]\nkind = "dpo"\nbeta = 0.3\n[args]\nlearning_rate = 2e-5\n[lora]\nrank = 2\n'
    )
    parser = argparse.ArgumentParser()
    commands_train.train_arguments(parser)
    words = ["d", "--config", str(given), "--learning_rate", "1e-3", "--set", "lora.rank=3", "--overwrite"]
    parsed_words = parser.parse_args(words)
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
    from madpo.operations import EvaluateSettings, RewardSettings, ScoreSettings, TrainSettings
    from madpo.operations.tuning import TuneSettings

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
