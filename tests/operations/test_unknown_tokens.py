"""A token id that the model has no embedding for is named, by every command, before it reaches the model."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from madpo import DPO, PreferenceConfig, PreferenceTrainer
from madpo.commands.cli import main
from madpo.core.errors import DataError
from madpo.data import check, load_preferences
from madpo.losses import SimPO
from madpo.models.load import LoRA, load_classifier, load_model, load_tokenizer
from madpo.models.vocabulary import configured_rows, refuse_unknown
from madpo.rewards.reward_model import RewardModel
from practice_cases import text_pairs, write
from refusals import names, refused

pytestmark = pytest.mark.usefixtures("own_cache")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMED = (("chat.jsonl", "line 1"), ("401", "'<|im_end|>'"), "400 rows", "resize_token_embeddings")


@pytest.fixture
def large(llama, tmp_path):
    """A model with the tokens of ChatML added to its tokenizer only."""
    folder = shutil.copytree(llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == configured_rows(folder) + 2 == 402
    return folder


def messages(rows):
    def said(role, text):
        return [{"role": role, "content": text}]

    return [
        {"prompt": said("user", r["prompt"]), **{s: said("assistant", r[s]) for s in ("chosen", "rejected")}}
        for r in rows
    ]


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "chat.jsonl", messages(text_pairs(16)))


COMMANDS = {
    "check": ["check", "{data}", "--model_name_or_path", "{model}"],
    "train": ["train", "{data}", "--model_name_or_path", "{model}", "--loss", "dpo"],
    "reward": ["reward", "{data}", "--model_name_or_path", "{model}"],
    "tune": ["tune", "{data}", "--model_name_or_path", "{model}", "--loss", "dpo", "--folds", "2"],
    "score by folds": ["score", "{data}", "--model_name_or_path", "{model}", "--folds", "2"],
    "score": ["score", "{data}", "--reward_model", "{reward}"],
    "score by a classifier": ["score", "{data}", "--reward_model", "{classifier}"],
    "evaluate": ["evaluate", "{model}", "--reference", "{model}", "--prompts", "{data}", "--reward", "{reward}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_row_and_the_token(command, data, large, tmp_path, capsys):
    reward, classifier = tmp_path / "reward", tmp_path / "classifier"
    base = load_classifier(large, num_labels=1, new_head=True, dtype=torch.float32)
    get_peft_model(base, LoRA(rank=2).peft_config("SEQ_CLS", base)).save_pretrained(reward / "adapter")
    (reward / "reward_model.json").write_text(json.dumps({"base": str(large)}))
    AutoModelForSequenceClassification.from_pretrained(large, num_labels=1).save_pretrained(classifier)
    AutoTokenizer.from_pretrained(large).save_pretrained(classifier)
    places = {"data": data, "model": large, "reward": reward, "classifier": classifier}
    words = [word.format(**places) for word in COMMANDS[command]]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("madpo: ")
    names(line, *NAMED)


def test_one_row_with_such_a_token_is_named(large, tmp_path):
    """Among rows whose tokens the model knows, and among other mistakes."""
    rows = text_pairs(6)
    rows[3]["chosen"] += " <|im_end|>"
    path = write(tmp_path / "d.jsonl", rows)
    for read in (check, load_preferences):
        with refused(DataError, "d.jsonl", "line 4", "401", "'<|im_end|>'"):
            read(path, tokenizer=str(large))
    rows[3]["chosen"] = "so"
    assert check(write(path, rows), tokenizer=str(large)).pairs == 6  # only a larger tokenizer is no mistake


def test_the_number_of_rows_is_that_of_the_embedding(llama, large, tmp_path):
    for folder in (llama, large):
        assert configured_rows(folder) == len(
            AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
        )
    config = json.loads((llama / "config.json").read_text())
    for nested in ("text_config", "llm_config"):
        (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"vocab_size": 3}, nested: config}))
        assert configured_rows(tmp_path) == 400
    (tmp_path / "config.json").write_text("{}")
    assert configured_rows(tmp_path) is None
    assert configured_rows(tmp_path / "nowhere") is None


def test_a_padding_token_without_an_embedding_is_not_used(large):
    tokenizer = AutoTokenizer.from_pretrained(large)
    tokenizer.pad_token = "[PAD]"
    tokenizer.add_tokens(["[PAD]"], special_tokens=True)
    tokenizer.save_pretrained(large)
    assert AutoTokenizer.from_pretrained(large).pad_token_id == 402
    assert load_tokenizer(large).pad_token_id == load_tokenizer(large).eos_token_id < 400


IDS = {"prompt_ids": [[1, 5]] * 6, "chosen_ids": [[6, 2]] * 6, "rejected_ids": [[7, 2]] * 6}


def trainer(model, out, data, loss):
    args = PreferenceConfig(output_dir=str(out), report_to="none", max_steps=2, per_device_train_batch_size=2)
    return PreferenceTrainer(model, args=args, loss=loss, train_dataset=data)


@pytest.mark.parametrize("loss", [DPO(), SimPO()], ids=["dpo", "simpo"])
@pytest.mark.parametrize(("column", "token"), [("prompt_ids", 400), ("chosen_ids", 10**6), ("rejected_ids", -1)])
def test_the_trainer_refuses_such_ids_before_the_first_step(llama, tmp_path, loss, column, token):
    rows = {name: [list(ids) for ids in value] for name, value in IDS.items()}
    rows[column][4][0] = token
    with refused(DataError, ("train", "pair 4", column), token, "400 rows"):
        trainer(str(llama), tmp_path, Dataset.from_dict(rows), loss)
    rows[column][4][0] = 399
    trainer(str(llama), tmp_path, Dataset.from_dict(rows), loss)


def test_a_stream_is_refused_at_the_batch(llama, tmp_path):
    rows = [{name: value[i] for name, value in IDS.items()} | {"pair_id": 7 + i} for i in range(6)]
    rows[3]["chosen_ids"] = [400, 2]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with refused(DataError, "400", "400 rows"):
        trainer(str(llama), tmp_path, stream, SimPO()).train()


def test_a_reward_model_refuses_them_too(llama):
    base = load_classifier(llama, num_labels=1, new_head=True, dtype=torch.float32)
    model = RewardModel(base, load_tokenizer(llama))
    for score in (
        lambda ids: model.score_ids([[1, 2], ids]),
        lambda ids: model.score_pairs([[1, 2]], [ids], [1]),
        lambda ids: model.score_responses([[1, 2]], [ids]),
    ):
        assert np.isfinite(score([1, 399])).all()
        with refused(DataError, ("400", "400 rows")):
            score([1, 400])


def test_the_refusal_takes_any_ids():
    refuse_unknown([], 5, "x")
    refuse_unknown([0, 4], 5, "x")
    for ids in ([5], [0, 9, 3], [-1, 4]):
        with refused(DataError, "x", max(ids, key=abs) if min(ids) >= 0 else min(ids)):
            refuse_unknown(ids, 5, "x")


def test_a_tokenizer_that_breaks_at_a_text_is_one_sentence(llama, tmp_path, capsys):
    """What the tokenizers library raises then is a bare Exception."""
    folder = shutil.copytree(llama, tmp_path / "model")
    tree = json.loads((folder / "tokenizer.json").read_text())
    words = {word: i for i, word in enumerate(tree["model"]["vocab"])}
    tree["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "[none]"}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    data = str(write(tmp_path / "d.jsonl", text_pairs(6)))
    for command in (["check", data], ["train", data, "--loss", "dpo", "--output_dir", str(tmp_path / "out")]):
        assert main([*command, "--model_name_or_path", str(folder)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("madpo: ")
        names(line, f"tokenizer '{folder}'")
    assert load_model(folder)
