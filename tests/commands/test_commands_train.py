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
from refusals import names, refused


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("train d --output_dir o --loss.beta", ["--loss.beta"]),
        ("train d --output_dir o --loss.beta --merge", ["--loss.beta"]),
        ("train d --output_dir o --mege", ["'--mege'", "'--merge'"]),
        ("train d --output_dri o", ["'--output_dri'", "'--output_dir'"]),
        ("train --output_dir o --model m", ["data", "madpo train DATA"]),
        ("train d.jsonl --output_dir o --model_name_or_path m --loss.tua 7", ["'--loss.tua'", "'--loss.tau'"]),
        ("train d.jsonl --output_dir o --model_name_or_path m --loss madpo --loss.tau 0", [("tau", "0.0")]),
        ("train d.jsonl --output_dir o --model_name_or_path m --loss mdpo", ["'mdpo'", "'madpo'"]),
        ("train d.jsonl --model_name_or_path m", ["--output_dir"]),
        ("train d.jsonl --output_dir o", ["--model"]),
        ("reward d --output_dir o --model m --epochs many", [("epochs", "'many'")]),
        ("evaluate p --output_dir o --reward r", ["--prompts"]),
        ("tune d.jsonl --output_dir o --model_name_or_path m --criterion loss", ["log_loss", "accuracy", "reward"]),
    ],
)
def test_a_mistake_in_the_options_is_one_sentence_and_status_2(argv, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", text_pairs(1))
    assert main(argv.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("madpo: ")
    assert err.count("\n") == 1
    names(err, *named)


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
    used, model = " --output_dir used", " --model_name_or_path"
    cases = {
        "train d.jsonl --output_dir o --mege": ["'--mege'"],
        f"train nope.jsonl{model} m --output_dir o": ["nope.jsonl"],
        f"tune nope.jsonl{model} m --output_dir o": ["nope.jsonl"],
        "train d.jsonl --config nope.toml --output_dir o": ["nope.toml"],
        "train d.jsonl --config bad.toml --output_dir o": ["bad.toml", "TOML"],
        "reward d.jsonl --output_dir o": ["--model"],
        f"reward d.jsonl{model} ./nope --output_dir o": ["nope"],
        f"reward d.jsonl{model} m{used}": ["used", "--output_dir"],
        f"reward d.jsonl{model} m --output_dir o --eval_data n.csv": ["n.csv"],
        f"reward d.jsonl{model} m --output_dir o --set optimisation.lr=1": ["'optimisation.lr'"],
        "score d.jsonl --output_dir o": [("reward_model", "score_columns", "probe", "folds")],
        "evaluate lm --reference lm --prompts nope.jsonl --reward r --output_dir o": ["nope.jsonl"],
        "evaluate p --prompts d.jsonl --reward r --output_dir o --top_p 2": [("top_p", "2")],
        f"train d.jsonl{model} m{used}": ["used", "--output_dir"],
        f"train d.jsonl{model} ./nope --output_dir o": ["nope"],
        f"train d.jsonl{model} m --output_dir o --loss.tua 7": ["'--loss.tua'", "'--loss.tau'"],
        f"train d.jsonl{model} m --output_dir o --args.lerning_rate 1": ["'--args.learning_rate'"],
        f"train d.jsonl{model} m --output_dir o --args.bf16=maybe": [("args.bf16", "'maybe'")],
        f"tune d.jsonl{model} m --output_dir o --space.loss.tau '[0]'": [("tau", "0")],
        f"train e.jsonl{model} lm --output_dir o": ["e.jsonl", "line 1", "'chosen'"],
        f"train r.jsonl --loss madpo{model} lm --output_dir o": ["r.jsonl", "'reward_margin'"],
        f"tune d.jsonl{model} lm --output_dir o": ["d.jsonl", "'reward_margin'"],
        f"train d.jsonl{model} rm --output_dir o --loss dpo": ["rm"],
        "score d.jsonl --score_columns a b --output_dir o": ["d.jsonl", "'a'", "'prompt'"],
        "score d.jsonl --reward_model lm --output_dir o": [("lm", "LlamaForCausalLM")],
        "score d.jsonl --reward_model rm/adapter --output_dir o": ["rm/adapter", "folder rm"],
        f"score d.jsonl --reward_model rm{used}": ["used", "--output_dir"],
        "evaluate lm --reference lm --prompts d.jsonl --reward lm --output_dir o": [("lm", "LlamaForCausalLM")],
        "evaluate lm --prompts d.jsonl --reward rm --output_dir o": ["lm", "--reference"],
        "evaluate rm --prompts d.jsonl --reward rm --output_dir o": ["rm"],
        "evaluate lm --reference lm --prompts q.jsonl --reward rm --output_dir o": ["q.jsonl", "'prompt'", "'words'"],
        "evaluate lm --reference lm --prompts d.jsonl --reward rm --max_prompts 9 --output_dir o": [
            ("1 different", "9")
        ],
        "trim-vocab lm --corpus nope.jsonl --output_dir o": ["nope.jsonl"],
        "trim-vocab ./nope --corpus d.jsonl --output_dir o": ["nope"],
    }
    code = (
        "import shlex, sys\nfrom madpo.commands.cli import main\n"
        f"for line in {list(cases)!r}:\n"
        "    print(line, file=sys.stderr, flush=True)\n"
        "    assert main(shlex.split(line)) == 2\n"
        "    assert not {'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules), line\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    for asked, answer in zip(said[::2], said[1::2], strict=True):
        assert answer.startswith("madpo: ")
        names(answer, *cases[asked])
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
