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
from refusals import names, refused


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
    (place / "broken").mkdir()
    (place / "broken" / "config.json").write_text("{}")
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
    f"{AUTO} model --eval_data pairs.jsonl": ["pairs.jsonl", "'reward_margin'", "auto"],
    f"{AUTO} model --loss.tau 3": ["--loss.tau", "--loss madpo"],
    f"{AUTO} model --max_length 2": ["max_length 2"],
    "train chat.jsonl --output_dir out --model_name_or_path plain": ["plain", "chat_template"],
    "train rated.jsonl --loss madpo --model_name_or_path model --output_dir out": [
        *("rated.jsonl", "'reward_margin'", "madpo score rated.jsonl"),
    ],
    f"{TRAIN} model --eval_data pairs.jsonl": ["pairs.jsonl", "'reward_margin'"],
    f"{TRAIN} model --eval_data other.jsonl": ["other.jsonl", "line 1", "'chosen'", "'question', 'good'"],
    "train words.jsonl --output_dir out --loss madpo --model_name_or_path model": [
        *("words.jsonl", "line 1", ("reward_margin", "'high'")),
    ],
    "train folder --output_dir out --model_name_or_path model": ["folder/scored.jsonl"],
    f"{TRAIN} policy": ["--merge", "policy/merged"],
    f"{TRAIN} whole": ["whole/merged"],
    f"{TRAIN} policy/adapter": ["policy/adapter"],
    f"{TRAIN} rm": ["rm"],
    f"{TRAIN} mdel": ["'mdel'", "'model'"],
    f"{TRAIN} gemma-3-270": ["'gemma-3-270'", "'gemma-3-270m'"],
    f"{TRAIN} whole/mergd": ["'whole/mergd'", "'whole/merged'"],
    "check pairs.jsonl --model_name_or_path mode": ["'mode'", "'model'"],
    "evaluate policy --prompts prompts.jsonl --reward rmm --output_dir out": ["'rmm'", "'rm'"],
    "score pairs.jsonl --output_dir out --reward_model a..b": ["'a..b'"],
    f"{TRAIN} a/b/c": ["a/b/c"],
    f"{TRAIN} scored.jsonl": ["scored.jsonl"],
    f"{TRAIN} broken": ["broken"],
    f"{TRAIN} endless": ["'endless'", "tokenizer_config.json"],
    f"{TRAIN} model --loss.tau 0": [("tau", "0.0")],
    f"{TRAIN} model --loss.tau -7": [("tau", "-7.0")],
    f"{TRAIN} model --loss.c_max 1": [("c_max", "1.0"), "DPO"],
    f"{TRAIN} model --loss.beta 0": [("loss.beta", "0")],
    f"{TRAIN} model --args.beta 0.2": ["--args.beta", "'--loss.beta'"],
    f"{TRAIN} model --args.learning_rate abc": [("args.learning_rate", "'abc'")],
    f"{TRAIN} model --args.output_dir x": ["args.output_dir", "--output_dir"],
    f"{TRAIN} model --args.eval_strategy steps": [("args.eval_strategy", "'steps'"), ("eval_data", "eval_share")],
    f"{TRAIN} model --batch_size 0": [("args.per_device_train_batch_size", "--batch_size", "0")],
    f"{TRAIN} model --epochs 0": [("args.num_train_epochs", "--epochs", "0")],
    f"{TRAIN} model --seed -1": [("args.seed", "--seed", "-1")],
    f"{TRAIN} model --seed 4294967296": [("args.seed", "4294967296")],
    f"{TRAIN} model --learning_rate inf": [("args.learning_rate", "inf")],
    f"{TRAIN} model --args.weight_decay nan": [("args.weight_decay", "nan")],
    f"{TRAIN} model --learning_rate true": [("args.learning_rate", "True")],
    f"{TRAIN} model --lora.rank true": [("lora", "rank", "True")],
    f"{TRAIN} model --loss.beta true": [("loss", "beta", "True")],
    f"{AUTO} model --kl false": [("loss", "kl", "False")],
    f"{TRAIN} model --args.adam_beta2 1": [("args.adam_beta2", "1")],
    f"{TRAIN} model --args.dataloader_num_workers -1": [("args.dataloader_num_workers", "-1")],
    f"{TRAIN} model --eval_data pairs.jsonl --eval_share 0.3": ["eval_data", "eval_share"],
    f"{TRAIN} model --full --lora.rank 4": ["lora.rank", "--full"],
    f"{AUTO} model --loss dpo --probe": ["probe", "dpo"],
    f"{AUTO} model --loss dpo --kl 3": ["--kl", "--loss auto"],
    f"{AUTO} model --loss dpo --set eval_shar=3": ["'eval_shar'", "'eval_share'"],
    f"{TRAIN} model --report_to wandbb": [("report_to", "'wandbb'"), "'wandb'"],
    f"{TRAIN} model --lora.targets '[\"q_prj\"]'": ["q_prj", "lora.targets"],
    f"{TRAIN} model --max_length 2": ["max_length 2"],
    f"{TRAIN} model --qlora": ["4 bits", "GPU", "qlora"],
    f"{TRAIN} model --full --merge": ["--merge"],
    f"{TRAIN} model --output_dir policy": ["policy", "--overwrite"],
    f"{TRAIN} model --output_dir model --overwrite": ["model", "--output_dir"],
    f"{TRAIN} model --output_dir pairs.jsonl": ["pairs.jsonl"],
    "check chat.jsonl --model_name_or_path plain": ["plain", "chat_template"],
    "check pairs.jsonl --model_name_or_path endless": ["endless", "eos_token", "tokenizer_config.json"],
    "check pairs.jsonl --max_length 64": ["max_length", "tokenizer"],
    "inspect pairs.jsonl": ["'reward_margin'", "madpo score pairs.jsonl --probe"],
    "inspect folder": ["folder/scored.jsonl"],
    "score pairs.jsonl --output_dir out --reward_model model": ["model", "LlamaForCausalLM"],
    "score pairs.jsonl --output_dir out --reward_model rm/adapter": ["rm/adapter", "folder rm"],
    "score pairs.jsonl --output_dir out --reward_model ./rmm": ["rmm"],
    "score pairs.jsonl --output_dir out --score_columns good bad": ["pairs.jsonl", "'good'"],
    "score pairs.jsonl --output_dir out --folds 3": [("folds", "--model_name_or_path")],
    "score pairs.jsonl --output_dir out --reward_model rm --probe_seed 1": ["probe_seed"],
    "score pairs.jsonl --output_dir out --reward_model rm --model_name_or_path model": ["folds"],
    "score pairs.jsonl --output_dir policy --reward_model rm": ["policy", "score_pairs", "--overwrite"],
    "reward pairs.jsonl --output_dir out --model_name_or_path model --eval_share 0.01": ["eval_share"],
    "reward pairs.jsonl --output_dir out --model_name_or_path rm": ["rm"],
    "reward pairs.jsonl --output_dir out --model_name_or_path model --set 'lora.targets=[\"x\"]'": ["lora.targets"],
    "compare pairs.jsonl --output_dir out --model model --eval_data chat.jsonl --eval_share 0.3": ["eval_share"],
    "compare pairs.jsonl --output_dir out --model model --top_k 3 --samples_per_prompt 2": [
        *("top_k", "samples_per_prompt", "--judge"),
    ],
    "compare pairs.jsonl --output_dir out --model model --judge rm --judge_share 0.3": ["judge_share", "--judge probe"],
    "compare pairs.jsonl --output_dir out --model model --judge policy": ["policy", "madpo reward", "--probe"],
    "compare pairs.jsonl --output_dir out --model model --judge pairs.jsonl": ["pairs.jsonl", "madpo reward"],
    "compare pairs.jsonl --output_dir out --model model --judge /no/such/folder": ["/no/such/folder", "madpo reward"],
    "compare pairs.jsonl --output_dir out --model model --seeds 4294967296": [("seeds.0", "4294967296")],
    "tune pairs.jsonl --output_dir out --model_name_or_path model": ["pairs.jsonl", "'reward_margin'"],
    "tune scored.jsonl --output_dir out --model_name_or_path model --folds 99": [("folds", "99")],
    "evaluate polcy --prompts prompts.jsonl --reward rm --output_dir out": ["'polcy'"],
    "evaluate model --prompts prompts.jsonl --reward rm --output_dir out": ["model", "--reference"],
    "evaluate rm --prompts prompts.jsonl --reward rm --output_dir out": ["rm"],
    "evaluate policy --prompts questions.jsonl --reward rm --output_dir out": ["questions.jsonl", "'prompt'", "'text'"],
    "evaluate policy --prompts prompts.jsonl --reward model --output_dir out": ["model", "LlamaForCausalLM"],
    "evaluate policy --prompts prompts.jsonl --reward rm --output_dir out --max_prompts 99": [("16 different", "99")],
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
    names(said[0], *MISTAKES[line])
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
    names(capsys.readouterr().out, ("16 margins", "0"))
