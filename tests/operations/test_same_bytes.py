"""Adapters are written in the same bytes whatever the hash seed of the process."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from madpo import PreferenceConfig, PreferenceTrainer
from madpo.core.errors import MadpoError
from madpo.models.load import load_tokenizer
from madpo.training.run import MEMORY_REMEDY
from madpo.training.saving import SortedSet, sort_sets
from refusals import refused
from small_trainers import SETTINGS, build, pairs, reward_trainer

pytestmark = pytest.mark.usefixtures("own_cache")


def lists(folder):
    """The lists of every adapter_config.json below a folder that PEFT keeps as sets."""
    found = [json.loads(path.read_text()) for path in sorted(folder.rglob("adapter_config.json"))]
    assert found
    return [config[name] for config in found for name in ("target_modules", "exclude_modules") if config[name]]


def test_every_adapter_of_a_trainer_is_written_with_sorted_lists(llama, tmp_path):
    trainer = build(llama, tmp_path / "policy", max_steps=1, save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "policy" / "saved"))
    trainer.model.save_pretrained(tmp_path / "policy" / "by_hand")
    reward = reward_trainer(llama, tmp_path / "reward")
    reward.model.save_pretrained(tmp_path / "reward" / "adapter")
    found = [*lists(tmp_path / "policy"), *lists(tmp_path / "reward")]
    assert len(found) == 4
    assert [names for names in found if names != sorted(names)] == []


def test_a_loaded_adapter_that_is_trained_on_has_sorted_lists_too(llama, tmp_path):
    build(llama, tmp_path, max_steps=1).model.save_pretrained(tmp_path / "first")
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    trainer = PreferenceTrainer(
        PeftModel.from_pretrained(base, tmp_path / "first", is_trainable=True),
        args=PreferenceConfig(output_dir=str(tmp_path / "out"), **SETTINGS),
        train_dataset=pairs(),
        processing_class=load_tokenizer(llama),
    )
    trainer.save_model(str(tmp_path / "second"))
    assert all(names == sorted(names) for names in lists(tmp_path / "second"))


def test_a_sorted_set_is_still_a_set():
    names = [f"layer{i}" for i in range(50)]
    config = LoraConfig(target_modules=names[::-1], exclude_modules=["b", "a"])
    sort_sets(config)
    assert list(config.to_dict()["target_modules"]) == sorted(names), "a deep copy is sorted as well"
    assert list(config.exclude_modules) == ["a", "b"]
    assert config.target_modules == set(names)
    assert SortedSet("ab") | {"c"} == {"a", "b", "c"}


def test_the_memory_remedy_holds_without_dropout_and_says_where_it_does_not(llama, tmp_path, monkeypatch):
    def trained(dropout, size):
        trainer = build(llama, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])

    gap = {dropout: float((trained(dropout, 4) - trained(dropout, 2)).abs().max()) for dropout in (0.0, 0.1)}
    assert gap[0.0] < 1e-4 < gap[0.1], gap
    trainer = build(llama, tmp_path)
    for remedy in (trainer.memory_remedy, MEMORY_REMEDY):
        assert "dropout" in remedy
    monkeypatch.setattr(type(trainer), "training_step", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
    with refused(MadpoError, "dropout"):
        trainer.train()
