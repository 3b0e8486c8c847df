"""Options of the practitioner's commands: what they mean, and mistakes in one sentence. No model is loaded."""

import dataclasses
import enum
import subprocess
import sys
import types
import typing

import pytest

from madpo.commands.cli import main
from practice_cases import text_pairs, write
from refusals import refused


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "d", "--output_dir", "o", "--loss.beta"], "the option --loss.beta has no value"),
        (["train", "d", "--output_dir", "o", "--loss.beta", "--merge"], "the option --loss.beta has no value"),
        (["train", "d", "--output_dir", "o", "--mege"], "no option '--mege'; did you mean '--merge'?"),
        (["train", "d", "--output_dri", "o"], "did you mean '--output_dir'?"),
        (["train", "--output_dir", "o", "--model", "m"], "data is missing; add --data"),
        (
            ["train", "d.jsonl", "--output_dir", "o", "--model_name_or_path", "m", "--loss.tua", "7"],
            "'--loss.tua'; did you mean '--loss.tau'?",
        ),
        (
            [
                "train",
                "d.jsonl",
                "--output_dir",
                "o",
                "--model_name_or_path",
                "m",
                "--loss",
                "madpo",
                "--loss.tau",
                "0",
            ],
            "loss: tau is 0.0, but must be above 0",
        ),
        (
            ["train", "d.jsonl", "--output_dir", "o", "--model_name_or_path", "m", "--loss", "mdpo"],
            "did you mean 'madpo'?",
        ),
        (["train", "d.jsonl", "--model_name_or_path", "m"], "output_dir is missing; add --output_dir"),
        (["train", "d.jsonl", "--output_dir", "o"], "model is missing; add --model"),
        (["reward", "d", "--output_dir", "o", "--model", "m", "--epochs", "many"], "'many'"),
        (["evaluate", "p", "--output_dir", "o", "--reward", "r"], "prompts is missing; add --prompts"),
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


def test_a_mistake_is_told_before_what_trains_is_loaded(tmp_path):
    """A person waits half a second for it, not ten."""
    write(tmp_path / "d.jsonl", text_pairs(1))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "bad.toml").write_text("a = ")
    write(tmp_path / "e.jsonl", [{"question": "q", "good": "g", "bad": "b"}])
    write(tmp_path / "r.jsonl", [row | {"chosen_score": 2.0, "rejected_score": 1.0} for row in text_pairs(1)])
    write(tmp_path / "q.jsonl", [{"words": "w"}])
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "rm" / "adapter").mkdir(parents=True)
    (tmp_path / "rm" / "reward_model.json").write_text('{"base": "lm"}')
    left = sorted(str(path) for path in tmp_path.rglob("*"))
    cases = [
        ("train d.jsonl --output_dir o --mege", "no option '--mege'"),
        ("train nope.jsonl --model_name_or_path m --output_dir o", "nope.jsonl: there is no such file"),
        ("tune nope.jsonl --model_name_or_path m --output_dir o", "nope.jsonl: there is no such file"),
        ("train d.jsonl --config nope.toml --output_dir o", "nope.toml: there is no such file"),
        ("train d.jsonl --config bad.toml --output_dir o", "bad.toml: is not valid TOML"),
        ("reward d.jsonl --output_dir o", "model is missing"),
        ("reward d.jsonl --model_name_or_path ./nope --output_dir o", "nope is no folder"),
        ("reward d.jsonl --model_name_or_path m --output_dir used", "is not empty and holds no result"),
        ("reward d.jsonl --model_name_or_path m --output_dir o --eval_data n.csv", "n.csv: there is no such file"),
        (
            "reward d.jsonl --model_name_or_path m --output_dir o --set optimisation.lr=1",
            "unknown key 'optimisation.lr'",
        ),
        ("score d.jsonl --output_dir o", "give one of reward_model, score_columns, probe and folds"),
        (
            "evaluate lm --reference lm --prompts nope.jsonl --reward r --output_dir o",
            "nope.jsonl: there is no such file",
        ),
        ("evaluate p --prompts d.jsonl --reward r --output_dir o --top_p 2", "top_p = 2: must be less than"),
        ("train d.jsonl --model_name_or_path m --output_dir used", "is not empty and holds no result"),
        ("train d.jsonl --model_name_or_path ./nope --output_dir o", "nope is no folder"),
        ("train d.jsonl --model_name_or_path m --output_dir o --loss.tua 7", "did you mean '--loss.tau'?"),
        (
            "train d.jsonl --model_name_or_path m --output_dir o --args.lerning_rate 1",
            "did you mean '--args.learning_rate'?",
        ),
        ("train d.jsonl --model_name_or_path m --output_dir o --args.bf16=maybe", "must be a valid boolean"),
        (
            "tune d.jsonl --model_name_or_path m --output_dir o --space.loss.tau '[0]'",
            "tau is 0.0, but must be above 0",
        ),
        ("train e.jsonl --model_name_or_path lm --output_dir o", "has no column 'chosen'"),
        (
            "train r.jsonl --loss madpo --model_name_or_path lm --output_dir o",
            "has no column 'reward_margin', which the loss madpo",
        ),
        ("tune d.jsonl --model_name_or_path lm --output_dir o", "has no column 'reward_margin', which the loss madpo"),
        ("train d.jsonl --model_name_or_path rm --output_dir o --loss dpo", "is a reward model, which rewards"),
        ("score d.jsonl --score_columns a b --output_dir o", "has no column 'a' (found 'prompt'"),
        ("score d.jsonl --reward_model lm --output_dir o", "lm is no reward model: it has the architecture Llama"),
        ("score d.jsonl --reward_model rm/adapter --output_dir o", "is a part of a reward model; give the folder rm"),
        ("score d.jsonl --reward_model rm --output_dir used", "is not empty and holds no result"),
        ("evaluate lm --reference lm --prompts d.jsonl --reward lm --output_dir o", "lm is no reward model"),
        ("evaluate lm --prompts d.jsonl --reward rm --output_dir o", "give it with --reference"),
        ("evaluate rm --prompts d.jsonl --reward rm --output_dir o", "is a reward model, which rewards"),
        ("evaluate lm --reference lm --prompts q.jsonl --reward rm --output_dir o", "has no 'prompt' (found 'words')"),
        ("evaluate lm --reference lm --prompts d.jsonl --reward rm --max_prompts 9 --output_dir o", "has only 1"),
        ("trim-vocab lm --corpus nope.jsonl --output_dir o", "nope.jsonl: there is no such file"),
        ("trim-vocab ./nope --corpus d.jsonl --output_dir o", "nope is no folder"),
    ]
    code = (
        "import shlex, sys\nfrom madpo.commands.cli import main\n"
        f"for line, words in {cases!r}:\n"
        "    print(line, '->', words, file=sys.stderr, flush=True)\n"
        "    assert main(shlex.split(line)) == 2\n"
        "    assert not {'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules), line\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    for asked, answer in zip(said[::2], said[1::2], strict=True):
        assert answer.startswith("madpo: ")
        assert asked.split(" -> ")[1] in answer
    assert sorted(str(path) for path in tmp_path.rglob("*")) == left


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
    from madpo.operations.train_report import resolved

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
    with refused(ValueError, "args.learning_rate", "'none'"):
        TrainSettings.model_validate({**base, "args": {"learning_rate": "none"}})


def test_a_resolved_configuration_finds_its_model_from_elsewhere(llama, tmp_path, monkeypatch):
    from madpo.operations import TrainSettings
    from madpo.operations.train_report import resolved

    monkeypatch.chdir(llama.parent)
    for given, kept in ((llama.name, str(llama.resolve())), ("owner/name", "owner/name"), ("tiny-llama", "tiny-llama")):
        settings = TrainSettings.model_validate({"model": given, "loss": {"kind": "dpo"}})
        assert f'model = "{kept}"' in resolved("d", settings)
