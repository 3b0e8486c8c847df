"""Checkpoints that read images as well, trained on text: they stay whole, and only their language model moves."""

import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from families import VOCABULARY, tiny, values
from madpo.core.errors import ConfigError
from madpo.losses import DPO
from madpo.models.engine.head import text_model
from madpo.models.hyperparameters import LoRA
from madpo.models.load import load_classifier, load_model, load_tokenizer, resolve_model
from madpo.operations import TrainSettings, train
from practice_cases import write
from quick import quick

PROCESSORS = {
    "preprocessor_config.json": '{"do_resize": true}',
    "processor_config.json": '{"image_seq_length": 4}',
    "video_preprocessor_config.json": '{"fps": 2}',
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "tekken.json": '{"config": {}}',
}
PAIRS = [
    {"prompt": f"Is film {i} good?", "chosen": f" Film {i} is wonderful.", "rejected": f" It is a waste of {i} hours."}
    for i in range(8)
]
TEXT = "The film begins slowly, but the story grows on you."


def checkpoint(family, folder):
    """A model folder as the hub has it, with a tokenizer of text and special tokens for images behind it."""
    tokenizer = load_tokenizer(resolve_model("tiny-llama"))
    size = len(tokenizer) + 8
    found = values(CONFIG_MAPPING[family])
    ids = {name: tokenizer_id for name, tokenizer_id in vars(tokenizer).items() if name.endswith("_token_id")}
    for name, value in found.items():
        if isinstance(value, int) and 50 < value < VOCABULARY and ("token" in name or name.endswith("_id")):
            found[name] = value + size - VOCABULARY
    found["text_config"] |= ids | {name: size for name in found["text_config"] if name.startswith("vocab_size")}
    model = tiny(family, auto=AutoModelForImageTextToText, **found)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, text in PROCESSORS.items():
        (folder / name).write_text(text)
    return folder


def test_a_reward_model_without_a_classifier_in_transformers_is_refused_before_its_weights_are_read(tmp_path):
    base = checkpoint("qwen2_5_vl", tmp_path / "base")
    with pytest.raises(ConfigError, match=r"base.*qwen2_5_vl.*text"):
        load_classifier(base, num_labels=1, new_head=True)


FAMILIES = ("gemma3", "gemma4", "qwen2_5_vl", "qwen3_5", "mistral3", "llama4")


@pytest.mark.parametrize("family", quick(FAMILIES, "gemma3", "qwen3_5"))
def test_a_checkpoint_of_images_and_text_is_trained_on_text_and_stays_whole(family, tmp_path):
    base = checkpoint(family, tmp_path / "base")
    write(tmp_path / "pairs.jsonl", PAIRS)
    args = {"learning_rate": 1e-2, "num_train_epochs": 2, "per_device_train_batch_size": 4, "bf16": False}
    settings = TrainSettings(model=str(base), loss=DPO(), args=args, lora=LoRA(rank=2), merge=True, dtype="float32")
    out = tmp_path / "out"
    report = train(tmp_path / "pairs.jsonl", out, settings)
    assert report.steps == 4

    config = json.loads((base / "config.json").read_text())
    own = getattr(transformers, config["architectures"][0])
    assert type(load_model(base)) is own
    assert json.loads((out / "merged" / "config.json").read_text())["architectures"] == config["architectures"]
    for name, text in PROCESSORS.items():
        assert (out / "merged" / name).read_text() == text
    before, after = load_file(base / "model.safetensors"), load_file(out / "merged" / "model.safetensors")
    assert before.keys() == after.keys(), "the checkpoint's own names"
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(moved) == len(trained) // 2, "every adapter moved, and nothing else"
    assert not [name for name in {*moved, *trained} if "vis" in name]

    ids = load_tokenizer(base)(TEXT, return_tensors="pt")["input_ids"]
    plain = own.from_pretrained(base, dtype=torch.float32).eval()
    merged = own.from_pretrained(out / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        # Llama 4's own class cannot read text without images in transformers 5.24.
        first = text_model(plain)(input_ids=ids).logits
        PeftModel.from_pretrained(plain, out / "adapter").eval()
        found = text_model(plain)(input_ids=ids).logits
        torch.testing.assert_close(found, text_model(merged)(input_ids=ids).logits, rtol=0, atol=1e-4)
    assert (found - first).abs().max() > 1e-2
