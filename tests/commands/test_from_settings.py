"""Options are the fields of a configuration: names, spellings, values, precedence, suggestions for wrong names."""

import dataclasses
import sys
import typing
from pathlib import Path

import pytest
from pydantic import Field

from madpo.commands.cli import COMMANDS, command, main
from madpo.commands.compare import Compare
from madpo.commands.from_settings import CommandLine, Configurable, configuration
from madpo.commands.train import Evaluate, Reward, Score, Train, Tune
from madpo.core.config import Frozen
from madpo.core.errors import ConfigError
from madpo.losses import Loss
from madpo.operations.arguments import ARGUMENTS
from refusals import names, refused

KINDS = [member.model_fields["kind"].default for member in typing.get_args(typing.get_args(Loss)[0])]


def line(model, *words):
    return CommandLine("madpo x", model, words)


def given(model, *words):
    return line(model, *words).given()


def test_every_spelling_sets_the_key_of_its_field():
    words = "d --output_dir o --model-name-or-path m --loss dpo --merge --learning_rate 1e-5 --epochs 2 --batch-size 4"
    assert given(
        Train, *words.split(), *["--max_length", "64", "--seed=3", "--eval_share", "0.1", "--lora_r", "2"]
    ) == {
        "data": "d",
        "output_dir": "o",
        "model": "m",
        "loss.kind": "dpo",
        "merge": True,
        "args.learning_rate": 1e-5,
        "args.num_train_epochs": 2,
        "args.per_device_train_batch_size": 4,
        "args.max_length": 64,
        "args.seed": 3,
        "eval_share": 0.1,
        "lora.rank": 2,
    }
    words = ("d", "--folds", "3", "--model_name_or_path", "m", "--lora_rank", "4", "--epochs", "2", "--pooling", "mean")
    assert given(Score, *words, "--batch_size", "8", "--train_batch_size", "2", "--reward.lora.alpha", "1") == {
        "data": "d",
        "folds": 3,
        "reward.model": "m",
        "reward.lora.rank": 4,
        "reward.optimisation.epochs": 2,
        "reward.pooling": "mean",
        "batch_size": 8,
        "reward.optimisation.batch_size": 2,
        "reward.lora.alpha": 1,
    }
    for word in ("--reward", "--reward_model", "--reward-model"):
        found = given(Evaluate, "p", "--prompts", "f", word, "r", "--max_prompts", "3")
        assert found == {"policy": "p", "prompts": "f", "reward_model": "r", "max_prompts": 3}
    words = ("d", "--reward_model", "R", "--kl", "2", "--seed", "1", "--space.loss.tau", "[1, 2]")
    found = given(Tune, *words, "--batch_size", "4")
    assert found == {
        "data": "d",
        "reward.reward_model": "R",
        "reward.kl": 2,
        "args.seed": 1,
        "space.loss.tau": [1, 2],
        "args.per_device_train_batch_size": 4,
    }
    assert given(Reward, "--optimisation.betas", "0.8", "0.9", "d") == {"optimisation.betas": [0.8, 0.9], "data": "d"}
    assert given(Reward, "--optimisation-betas", "[0.8, 0.9]", "d") == {"optimisation.betas": [0.8, 0.9], "data": "d"}


@pytest.mark.parametrize("word", ["--batch_size", "--train_batch_size", "--per_device_train_batch_size"])
def test_every_command_that_trains_takes_the_usual_words_for_a_batch(word):
    for model, key in {Train: "args", Tune: "args", Reward: "optimisation", Compare: "optimisation"}.items():
        name = "per_device_train_batch_size" if key == "args" else "batch_size"
        assert given(model, word, "4") == {f"{key}.{name}": 4}
    assert given(Score, word, "4") == {"batch_size" if word == "--batch_size" else "reward.optimisation.batch_size": 4}


def test_every_argument_of_the_trainer_is_an_option_under_trls_name():
    """A user of TRL's command line keeps typing what they know."""
    names = line(Train).names
    own = {"output_dir"}
    for name in ARGUMENTS.keys:
        assert names[f"args.{name}"] == f"args.{name}"
        assert name in own or names[name] == f"args.{name}", name


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (("--merge",), True),
        (("--merge", "true"), True),
        (("--merge", "False"), False),
        (("--merge=false",), False),
        (("--bf16",), True),
        (("--gradient_checkpointing", "True"), True),
        (("--model", "7"), "7"),
        (("--model", "true"), "true"),
        (("--loss.kl", "none"), None),
        (("--loss.beta", "-7"), -7),
        (("--fast",), True),
        (("--kl", "2"), 2),
        (("--args.max_length", "none"), None),
        (("--report_to", "none"), "none"),
        (("--args.lr_scheduler_kwargs", "{ num_cycles = 2 }"), {"num_cycles": 2}),
        (("--lora.targets", "all-linear"), "all-linear"),
        (("--lora.targets", "q_proj", "v_proj"), ["q_proj", "v_proj"]),
        (("--lora_target_modules", '["q_proj"]'), ["q_proj"]),
        (("--date", "2026-03-01"), "2026-03-01"),
        (("--set", "a=1", "b=2", "--set", "c=3"), ["a=1", "b=2", "c=3"]),
    ],
)
def test_words_mean_what_their_field_takes(words, value):
    found = given(Train, *words)
    assert list(found.values()) == [value]
    assert type(next(iter(found.values()))) is type(value)


def test_a_flag_takes_no_word_that_is_not_its_own():
    assert given(Train, "--merge", "pairs.jsonl") == {"merge": True, "data": "pairs.jsonl"}
    assert given(Score, "--score_columns", "a", "b", "pairs.jsonl")["data"] == "pairs.jsonl"


WRONG = {
    "--beta 1": "--loss.beta",
    "--tau 1": "--loss.tau",
    "--lr 1": "--learning_rate",
    "--loss.tua 1": "--loss.tau",
    "--loss_type ipo": "--loss",
    "--args.loss_type ipo": "--loss",
    "--loss sigmoid": "dpo",
    "--loss robust": "rdpo",
    "--loss mdpo": "madpo",
    "--ref_model x": "--model",
    "--dataset_name x": "--data",
    "--label_smoothing 0.1": "--loss.label_smoothing",
    "--load_in_4bit": "--qlora",
    "--use_peft": "--full",
    "--max_prompt_length 3": "--max_length",
    "--lerning_rate 3": "--learning_rate",
    "--args.lerning_rate 3": "learning_rate",
    "--lora_ranks 3": "--lora_rank",
    "--out x": "--output_dir",
    "--mege": "--merge",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_name_gets_the_right_suggestion(words, capsys):
    assert main(["train", "d.jsonl", *words.split()]) == 2
    said = capsys.readouterr().err
    assert f"'{WRONG[words]}'" in said or WRONG[words] in said.split("; ")[-1]


@pytest.mark.parametrize("model", [Train, Compare])
def test_a_dry_run_asks_for_nothing_that_it_does_not_use(model):
    assert line(model, "d", "--model", "m", "--dry_run").read().dry_run
    assert line(model, "d", "--model", "m", "--dry_run", "--output_dir", "o").read().output_dir == Path("o")
    with refused(ConfigError, "--output_dir"):
        line(model, "d", "--model", "m").read()
    with refused(ConfigError, "DATA"):
        line(model, "--model", "m", "--dry_run").read()


def test_a_dry_run_of_given_lengths_needs_no_data():
    assert line(Train, "--model", "m", "--dry_run", "--lengths", "512", "128").read().lengths == (512, 128)
    for words in (["--lengths", "5", "5"], ["--memory", "80GB"]):
        with refused(ConfigError, "dry_run"):
            line(Train, "d", "--model", "m", "--output_dir", "o", *words).read()


def test_a_field_of_another_loss_names_the_losses_that_have_it():
    with refused(ConfigError, "--loss.tau", "madpo", "soft_madpo"):
        given(Train, "--loss", "dpo", "--loss.tau", "3")
    assert given(Train, "--loss", "soft_madpo", "--loss.tau", "3")["loss.tau"] == 3


@pytest.mark.parametrize("words", ["--loss ipo", "--loss=ipo", "--loss.kind ipo", "--set loss.kind=ipo"])
def test_the_chosen_loss_decides_which_fields_there_are(words, tmp_path):
    assert "loss.reduction" in line(Train, *words.split()).by_key
    file = tmp_path / "c.toml"
    file.write_text('[loss]\nkind = "ipo"\n')
    assert "loss.reduction" in line(Train, "--config", str(file)).by_key
    assert "loss.tau" in line(Train, "--config", str(file), "--loss", "madpo").by_key


@pytest.mark.parametrize("kind", KINDS)
def test_help_lists_every_field_of_the_chosen_loss(kind, capsys):
    assert main(["train", "--loss", kind, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in line(Train, "--loss", kind).options:
        if option.key.startswith("loss.") and option.key != "loss.kind":
            assert f"--{option.key}" in text
            assert option.about


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name):
    for option in line(configuration(command(COMMANDS[name][1]))).options:
        assert option.about or option.default is ..., option.key


def test_what_the_help_says_of_the_trainers_defaults_is_true():
    from madpo.operations import TrainSettings
    from madpo.training import PreferenceConfig

    fields = {field.name: field.default for field in dataclasses.fields(PreferenceConfig)}
    fields |= TrainSettings(model="m").arguments()
    for name, says in ARGUMENTS.about.items():
        stated = says.split("(default: ")[1].split(")")[0].split(",")[0]
        value = fields[name]
        assert stated == str(value) or float(stated) == value, name


def test_the_command_line_goes_before_the_file_and_set_before_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "given.toml"
    file.write_text(
        'output_dir = "out"\neval_data = "e"\nmodel = "m"\nmerge = true\ntruncation = "cut"\n'
        '[loss]\nkind = "dpo"\nbeta = 0.3\n[args]\nlearning_rate = 2e-5\n[lora]\nrank = 2\n'
    )
    words = ("--learning_rate", "1e-3", "--set", "lora.rank=3", "--lora.rank", "4", "--overwrite")
    found = line(Train, "d", "--config", str(file), *words).read()
    assert (found.output_dir, found.overwrite, found.eval_data) == (Path("out"), True, "e")
    assert (found.model, found.merge, found.truncation, found.loss.beta) == ("m", True, "cut", 0.3)
    assert found.args == {"learning_rate": 1e-3}
    assert found.lora.rank == 3
    file.write_text('prompts = "f"\noutput_dir = "o"\nreward_model = "r"\ntop_p = 0.5\n')
    evaluated = line(Evaluate, "p", "--config", str(file)).read()
    assert (evaluated.prompts, evaluated.reward_model, evaluated.top_p) == ("f", "r", 0.5)
    file.write_text('model = "m"\noutput_dir = "o"\nfolds = 4\n[space]\n"loss.tau" = { values = [1, 2] }\n')
    tuned = line(Tune, "d", "--config", str(file)).read()
    assert tuned.folds == 4
    assert tuned.searched["loss.tau"].values == (1, 2)


def test_a_mistake_names_where_the_value_came_from(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\noutput_dir = "o"\n[loss]\nbeta = -1\n')
    for words, place in [
        ((), f"{file}: loss.beta"),
        (("--loss.beta", "-2"), f"{file} with --loss.beta: loss.beta = -2"),
        (("--set", "loss.beta=-3"), f"{file} with --set loss.beta: loss.beta = -3"),
    ]:
        with pytest.raises(ConfigError) as caught:
            line(Train, "d", "--config", str(file), *words).read()
        assert place in str(caught.value)


def test_set_takes_the_names_of_options_too():
    words = ("d", "--model", "m", "--output_dir", "o", "--set", "learning_rate=0.5", "--set", "loss={kind = 'ipo'}")
    found = line(Train, *words).read()
    assert (found.args, found.loss.kind) == ({"learning_rate": 0.5}, "ipo")
    assert line(Compare, *words[:7]).read().optimisation.learning_rate == 0.5


class Inner(Frozen):
    width: int = 2
    """How wide."""


class Own(Configurable):
    inner: Inner = Inner()
    share: float = Field(default=0.5, gt=0)
    """How much."""


def own(options: Own) -> int:
    """Do it."""
    return options.inner.width


def test_a_new_command_is_a_function_and_a_line(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "own", ("do it", "own:own"))
    monkeypatch.setitem(sys.modules, "madpo.commands.own", sys.modules[__name__])
    assert main(["own", "--inner.width", "7"]) == 7
    assert main(["own", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    names(text, ("--inner.width N", "How wide.", "2"), ("--share X", "How much.", "0.5"))
    assert main(["own", "--share", "0"]) == 2


def test_what_is_missing_is_named_as_it_is_written():
    given = {"DATA": ["d"], "--output_dir": ["--output_dir", "o"], "--model": ["--model", "m"]}
    for left_out in given:
        words = [word for name, pair in given.items() if name != left_out for word in pair]
        with pytest.raises(ConfigError, match=f"is missing; [a-z]+ (madpo x )?{left_out}"):
            line(Train, *words).read()
    with refused(ConfigError, "data", "output_dir", "model", "madpo x DATA --output_dir PATH --model TEXT"):
        line(Train).read()
