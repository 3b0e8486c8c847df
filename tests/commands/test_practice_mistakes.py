"""Mistakes that a newcomer makes: each is one sentence that says what to do, and nothing is left behind."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from madpo.commands.cli import main
from madpo.core.errors import ConfigError
from madpo.models.locate import refuse_unreachable
from practice_cases import conversation, run, text_pairs, write
from refusals import refused


@pytest.fixture(scope="module")
def place(llama: Path, module_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data of all kinds, a model, models without an end token or a template, a policy, a reward model."""
    place = tmp_path_factory.mktemp("mistakes")
    rows = text_pairs(16)
    scored = [row | {"reward_margin": 1.0} for row in rows]
    write(place / "pairs.jsonl", rows)
    write(place / "scored.jsonl", scored)
    write(place / "rated.jsonl", [row | {"chosen_score": 3.0, "rejected_score": 1.0} for row in rows])
    write(place / "chat.jsonl", [conversation(row) for row in rows])
    write(place / "other.jsonl", [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in rows])
    write(place / "words.jsonl", [row | {"reward_margin": "high"} for row in rows])
    write(place / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    write(place / "questions.jsonl", [{"text": row["prompt"]} for row in rows])
    (place / "folder").mkdir()
    write(place / "folder" / "scored.jsonl", scored)
    shutil.copytree(llama, place / "model")
    for name, without in (("endless", ("eos_token", "pad_token")), ("plain", ("pad_token",))):
        shutil.copytree(llama, place / name)
        settings = json.loads((place / name / "tokenizer_config.json").read_text())
        kept = {key: value for key, value in settings.items() if key not in (*without, "chat_template")}
        (place / name / "tokenizer_config.json").write_text(json.dumps(kept))
        (place / name / "chat_template.jinja").unlink()
    few = ("--model_name_or_path", place / "model", "--output_dir")
    one = ("--loss", "madpo", "--args.max_steps", 1)
    run("train", place / "scored.jsonl", *few, place / "policy", *one)
    run("train", place / "scored.jsonl", *few, place / "whole", *one, "--merge")
    run("reward", place / "pairs.jsonl", *few, place / "rm", "--eval_share", 0.5, "--epochs", 0.5)
    return place


TRAIN = "train scored.jsonl --output_dir out --loss madpo --model_name_or_path"
AUTO = "train scored.jsonl --output_dir out --model_name_or_path"
MISTAKES = {
    f"{AUTO} model --eval_data pairs.jsonl": "pairs.jsonl: has no column 'reward_margin', which the loss auto",
    f"{AUTO} model --loss.tau 3": "--loss.tau is a field of madpo, soft_madpo; add --loss madpo",
    f"{AUTO} endless": "the tokenizer 'endless' has neither a padding token nor an end token",
    f"{AUTO} model --report_to wandbb": "report_to names 'wandbb', which is no tracker; did you mean 'wandb'?",
    f"{AUTO} model --lora.targets '[\"q_prj\"]'": "lora.targets",
    f"{AUTO} model --max_length 2": "no pair fits into max_length 2; raise it",
    f"{AUTO} model --qlora": "weights of 4 bits need a GPU",
    "train words.jsonl --output_dir out --model_name_or_path model": "reward_margin is 'high' (text), not a number",
    "train chat.jsonl --output_dir out --model_name_or_path plain": "the tokenizer of plain has no chat template",
    "train rated.jsonl --loss madpo --model_name_or_path model --output_dir out": "has no column 'reward_margin', "
    "which the loss madpo reads; add it: madpo score rated.jsonl",
    f"{TRAIN} model --eval_data pairs.jsonl": "pairs.jsonl: has no column 'reward_margin'",
    f"{TRAIN} model --eval_data other.jsonl": "other.jsonl, line 1: has no column 'chosen' (found 'question', 'good'",
    "train words.jsonl --output_dir out --loss madpo --model_name_or_path model": "reward_margin is 'high' (text)",
    "train folder --output_dir out --model_name_or_path model": "is a folder; give the file in it, folder/scored.jsonl",
    f"{TRAIN} policy": "holds only an adapter; train again with --merge, and give policy/merged",
    f"{TRAIN} whole": "give the model in it, whole/merged",
    f"{TRAIN} policy/adapter": "holds an adapter, which names a base model of its own; give the folder of a whole",
    f"{TRAIN} rm": "is a reward model, which rewards and cannot write",
    f"{TRAIN} mdel": "there is no folder 'mdel', and no model of that name could be had from the hub",
    f"{TRAIN} mode": "did you mean 'model'?",
    f"{TRAIN} gemma-3-270": "did you mean 'gemma-3-270m'?",
    f"{TRAIN} whole/mergd": "did you mean 'whole/merged'?",
    "check pairs.jsonl --model_name_or_path mode": "did you mean 'model'?",
    "evaluate policy --prompts prompts.jsonl --reward rmm --output_dir out": "did you mean 'rm'?",
    "score pairs.jsonl --output_dir out --reward_model a..b": "no model of that name could be had",
    f"{TRAIN} a/b/c": "a/b/c is no folder",
    f"{TRAIN} scored.jsonl": "is a file; give the folder of a model",
    f"{TRAIN} endless": "the tokenizer 'endless' has neither a padding token nor an end token",
    "train chat.jsonl --loss dpo --output_dir out --model_name_or_path plain": "the data holds messages but the "
    "tokenizer of plain has no chat template; take an instruction-tuned model's",
    f"{TRAIN} model --loss.tau 0": "loss: tau is 0.0, but must be above 0",
    f"{TRAIN} model --loss.tau -7": "loss: tau is -7.0, but must be above 0",
    f"{TRAIN} model --loss.c_max 1": "for plain DPO use",
    f"{TRAIN} model --loss.beta 0": "loss.beta = 0: must be greater than 0",
    f"{TRAIN} model --args.beta 0.2": "did you mean '--loss.beta'?",
    f"{TRAIN} model --batch_size 0": "args.per_device_train_batch_size (--batch_size) = 0: must be at least 1",
    f"{TRAIN} model --epochs 0": "args.num_train_epochs (--epochs) = 0: must be greater than 0",
    f"{TRAIN} model --report_to wandbb": "report_to names 'wandbb', which is no tracker; did you mean 'wandb'?",
    f"{TRAIN} model --lora.targets '[\"q_prj\"]'": "name other target_modules (lora.targets)",
    f"{TRAIN} model --max_length 2": "no pair fits into max_length 2; raise it",
    f"{TRAIN} model --qlora": "weights of 4 bits need a GPU",
    f"{TRAIN} model --full --merge": "full training has no adapter to merge",
    f"{TRAIN} model --output_dir policy": "policy holds the result of other settings",
    f"{TRAIN} model --output_dir model --overwrite": "model is not empty and holds no result",
    f"{TRAIN} model --output_dir pairs.jsonl": "pairs.jsonl is a file",
    "check chat.jsonl --model_name_or_path plain": "the tokenizer of plain has no chat template",
    "check pairs.jsonl --model_name_or_path endless": "set eos_token in its tokenizer_config.json",
    "check pairs.jsonl --max_length 64": "max_length counts tokens, so it needs a tokenizer",
    "inspect pairs.jsonl": "has no column 'reward_margin' and no scores; add it: madpo score pairs.jsonl --probe",
    "inspect folder": "give the file in it, folder/scored.jsonl",
    "score pairs.jsonl --output_dir out --reward_model model": "is no reward model",
    "score pairs.jsonl --output_dir out --reward_model rm/adapter": "a part of a reward model; give the folder rm",
    "score pairs.jsonl --output_dir out --reward_model rmm": "did you mean 'rm'?",
    "score pairs.jsonl --output_dir out --reward_model ./rmm": "rmm is no folder",
    "score pairs.jsonl --output_dir out --score_columns good bad": "has no column 'good'",
    "score pairs.jsonl --output_dir out --folds 3": "it needs the base model (--model_name_or_path)",
    "score pairs.jsonl --output_dir policy --reward_model rm": "the operation is score_pairs",
    "reward pairs.jsonl --output_dir out --model_name_or_path model --eval_share 0.01": "raise eval_share or give",
    "reward pairs.jsonl --output_dir out --model_name_or_path rm": "is a reward model, which rewards and cannot write",
    "reward pairs.jsonl --output_dir out --model_name_or_path model --set 'lora.targets=[\"x\"]'": "lora.targets",
    "tune pairs.jsonl --output_dir out --model_name_or_path model": "has no column 'reward_margin'",
    "tune scored.jsonl --output_dir out --model_name_or_path model --folds 99": "use fewer folds",
    "evaluate polcy --prompts prompts.jsonl --reward rm --output_dir out": "there is no folder 'polcy'",
    "evaluate model --prompts prompts.jsonl --reward rm --output_dir out": "give it with --reference",
    "evaluate rm --prompts prompts.jsonl --reward rm --output_dir out": "is a reward model, which rewards and cannot",
    "evaluate policy --prompts questions.jsonl --reward rm --output_dir out": "has no 'prompt' (found 'text'); name",
    "evaluate policy --prompts prompts.jsonl --reward model --output_dir out": "is no reward model",
    "evaluate policy --prompts prompts.jsonl --reward rm --output_dir out --max_prompts 99": "has only 16 different",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sorted(str(path) for path in place.rglob("*"))
    assert main(shlex.split(line)) == 2
    said = [row for row in capsys.readouterr().err.splitlines() if row.startswith("madpo: ")]
    assert len(said) == 1
    assert MISTAKES[line] in said[0]
    assert sorted(str(path) for path in place.rglob("*")) == before


def test_a_model_without_a_padding_token_trains_to_the_same_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    run(*shlex.split(f"{TRAIN} plain --output_dir unpadded --args.max_steps 1"))
    weights = [place / name / "adapter" / "adapter_model.safetensors" for name in ("unpadded", "policy")]
    assert weights[0].read_bytes() == weights[1].read_bytes(), "the padding token is never seen"
    shutil.rmtree(place / "unpadded")


def test_a_name_is_refused_at_once_where_the_hub_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries would try again for most of a minute."""

    def unknown(*_: object) -> None:
        raise OSError("Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("madpo.models.locate.socket.getaddrinfo", unknown)
    with refused(ConfigError, "'owner/name'"):
        refuse_unreachable("owner/name")
    kept = tmp_path / "hub" / "models--owner--name"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    write((kept / "snapshots" / "abc").mkdir(parents=True) or kept / "snapshots" / "abc" / "config.json", [{}])
    refuse_unreachable("owner/name")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    refuse_unreachable("owner/other")


def test_margins_that_say_nothing_are_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of almost nothing the head stays at 0, as it does where no look is better than a coin."""
    monkeypatch.chdir(place)
    few = "--model_name_or_path model --folds 2 --learning_rate 1e-30 --eval_share 0.5"
    run(*shlex.split(f"score pairs.jsonl {few} --output_dir {tmp_path / 'scored'}"))
    assert (
        "16 margins are exactly 0: equal scores, or a reward model that has learned nothing" in capsys.readouterr().out
    )
