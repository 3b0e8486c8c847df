"""Fuzzers for the loaders, called as the commands call them: weights, adapters, tokenizers, configurations."""

import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fuzz_cases import Reader, fuzzed
from madpo.data.rows import Pair
from madpo.data.tokens import Encoder
from madpo.models.engine.responses import end_tokens
from madpo.models.load import LoRA, build_tiny, load_classifier, load_config, load_model, load_tokenizer
from madpo.models.locate import light_tokenizer
from madpo.operations.evaluation import find_policy
from madpo.operations.pair_scorer import load_scorer
from madpo.operations.trimming.trim import _Whole

TEXT = Pair(0, 0, "A film", " is good.", " is <s> bad \u00e9\n\U0001f600", {})
SAID = (("user", "a"), ("assistant", "b"), ("assistant", ""))
CHAT = Pair(0, 0, *([{"role": role, "content": text}] for role, text in SAID), {})
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@cache
def home() -> Path:
    """Good models, for as long as the tests run."""
    made = tempfile.TemporaryDirectory()
    _KEPT.append(made)
    return Path(made.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@cache
def base(family: str = "llama") -> Path:
    return build_tiny(family, home() / family, seed=1)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "README.md"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@cache
def model(family: str = "llama") -> dict[str, bytes]:
    return contents(base(family))


@cache
def sharded() -> dict[str, bytes]:
    AutoModelForCausalLM.from_pretrained(base()).save_pretrained(home() / "sharded", max_shard_size="40KB")
    return contents(home() / "sharded")


@cache
def adapter() -> dict[str, bytes]:
    plain = load_model(base(), dtype=torch.float32)
    get_peft_model(plain, LoRA(rank=2).peft_config("CAUSAL_LM", plain)).save_pretrained(home() / "adapter")
    return contents(home() / "adapter")


@cache
def classifier() -> dict[str, bytes]:
    AutoModelForSequenceClassification.from_pretrained(base(), num_labels=1).save_pretrained(home() / "classifier")
    return contents(home() / "classifier") | {name: model()[name] for name in TOKENIZER}


@cache
def reward_model() -> dict[str, bytes]:
    plain = load_classifier(base(), num_labels=1, new_head=True, dtype=torch.float32)
    made = home() / "reward"
    get_peft_model(plain, LoRA(rank=2).peft_config("SEQ_CLS", plain)).save_pretrained(made / "adapter")
    (made / "reward_model.json").write_text(json.dumps({"base": str(base()), "pooling": "mean", "steps": 3}))
    return contents(made)


def policy() -> dict[str, bytes]:
    inside = {f"adapter/{name}": content for name, content in adapter().items()}
    return inside | {"config.toml": f'model = "{base()}"\nseed = 3\n'.encode()}


def encoded(load):
    """A tokenizer is used as the commands use it: for text, for messages, and back."""

    def read(folder):
        tokenizer = load(folder)
        encoder = Encoder(tokenizer)
        for pair in (TEXT, CHAT):
            encoder.encode([pair], str)
        encoder.prompt_ids("a prompt")

    return read


def scored(folder):
    load_scorer(folder).score_pairs([TEXT], "data", "row")


def evaluated(folder):
    place = find_policy(folder, None)
    load_model(place.base, adapter=place.adapter, dtype=torch.float32)


def generated(folder):
    end_tokens(load_model(folder, dtype=torch.float32), load_tokenizer(base()))


def weights(folder):
    load_model(folder, dtype=torch.float32)


READERS = [
    Reader("weights", model, weights, ("model.safetensors",)),
    Reader("weights in shards", sharded, weights),
    Reader("config.json", model, weights, ("config.json",)),
    Reader("config.json (gemma3)", lambda: model("gemma3"), weights, ("config.json",)),
    Reader("config.json (qwen3)", lambda: model("qwen3"), load_config, ("config.json",)),
    Reader("generation_config.json", model, generated, ("generation_config.json",)),
    Reader("adapter", adapter, lambda folder: load_model(base(), adapter=folder, dtype=torch.float32)),
    Reader("tokenizer", model, encoded(load_tokenizer), TOKENIZER),
    Reader("tokenizer (check)", model, encoded(light_tokenizer), (*TOKENIZER, "config.json")),
    Reader("tokenizer (gemma3)", lambda: model("gemma3"), encoded(light_tokenizer), TOKENIZER),
    Reader("reward model", reward_model, scored),
    Reader("reward model (classifier)", classifier, scored),
    Reader("policy", policy, evaluated),
    Reader("model to trim", model, lambda folder: _Whole.load(folder, str(folder))),
]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
@fuzzed(5)  # in the suite: each loader has some of the other inputs
@given(data=st.data())
def test_any_folder_of_a_loader(reader, data, tmp_path):
    reader.tried(data, tmp_path)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_every_loader_takes_the_good_folder(reader, tmp_path):
    """Otherwise the fuzzer would see one refusal, whatever it changes."""
    for name, content in reader.files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    reader.read(tmp_path)
