"""Training on from an adapter: its copy is the reference, whatever kind of adapter it is."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from engine_cases import brute_force
from madpo import PreferenceConfig, PreferenceTrainer
from madpo.core.errors import ConfigError
from madpo.models.load import load_tokenizer, merged, save_model
from madpo.operations.preconditions import find_policy
from quick import quick
from refusals import refused
from small_trainers import SETTINGS, pairs, weights

pytestmark = pytest.mark.usefixtures("own_cache")

TASK = {"task_type": "CAUSAL_LM"}
KINDS = {
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], **TASK),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=list(range(5, 60)), **TASK),
    "head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], **TASK),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "vera": VeraConfig(r=2, target_modules=["q_proj", "o_proj"], **TASK),
    "pissa": LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa", **TASK),
    "olora": LoraConfig(r=2, target_modules="all-linear", init_lora_weights="olora", **TASK),
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True, **TASK),
}


def adapted(folder, config, name="default"):
    """A model with an adapter that has been trained before."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, copy.deepcopy(config), adapter_name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * parameter.requires_grad)
    return model


def trainer_of(folder, out, model, **parts):
    settings = {**SETTINGS, "save_strategy": "no", "max_steps": 2, "bf16": False}
    args = PreferenceConfig(output_dir=str(out), **settings)
    given = {"train_dataset": pairs(8), "processing_class": load_tokenizer(folder), **parts}
    return PreferenceTrainer(model, args=args, **given)


def log_probabilities(trainer, model):
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        return brute_force(model.eval(), {n: batch[n] for n in ("input_ids", "attention_mask", "completion_mask")})


def reference_of(trainer):
    rows = trainer.train_dataset
    return torch.tensor([*rows["ref_chosen_logps"], *rows["ref_rejected_logps"]])


@pytest.mark.parametrize("kind", quick(list(KINDS), "embedding", "tokens", "olora"))
def test_the_reference_is_the_model_as_passed(llama, tmp_path, kind):
    model = adapted(llama, KINDS[kind])
    as_passed = copy.deepcopy(model)
    trainer = trainer_of(llama, tmp_path, model)
    before = log_probabilities(trainer, as_passed)
    torch.testing.assert_close(log_probabilities(trainer, trainer.model), before, atol=1e-4, rtol=0)
    torch.testing.assert_close(reference_of(trainer), before, atol=1e-4, rtol=0, check_dtype=False)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    late = trainer._prepared_late(Dataset.from_list(list(pairs(8))), "late")
    found = torch.tensor([*late["ref_chosen_logps"], *late["ref_rejected_logps"]])
    torch.testing.assert_close(found, before, atol=1e-4, rtol=0, check_dtype=False)


def test_a_scale_is_copied_too_and_what_is_frozen_stays(llama, tmp_path):
    model = adapted(llama, LoraConfig(r=2, target_modules="all-linear", **TASK))
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_B" in name)
    as_passed = copy.deepcopy(model)
    trainer = trainer_of(llama, tmp_path, model)
    torch.testing.assert_close(
        reference_of(trainer), log_probabilities(trainer, as_passed), atol=1e-4, rtol=0, check_dtype=False
    )
    assert weights(trainer)
    assert all(".lora_B.default." in name for name in weights(trainer))


def test_what_cannot_be_copied_is_refused_and_trains_with_a_reference(llama, tmp_path):
    plain = LoraConfig(r=2, target_modules="all-linear", **TASK)
    named, several, biased = (
        adapted(llama, plain, "mine"),
        adapted(llama, plain),
        adapted(llama, LoraConfig(r=2, target_modules="all-linear", bias="all", **TASK)),
    )
    several.add_adapter("other", plain)
    several.base_model.set_adapter(["default", "other"])
    for model, word in ((named, "mine"), (several, "other"), (biased, "bias")):
        reference = copy.deepcopy(model)
        with refused(ConfigError, word, "ref_model"):
            trainer_of(llama, tmp_path, model)
        trainer = trainer_of(llama, tmp_path, copy.deepcopy(reference), ref_model=reference)
        expected = log_probabilities(trainer, reference)
        torch.testing.assert_close(reference_of(trainer), expected, atol=1e-4, rtol=0, check_dtype=False)
        trainer.train()
        assert float((log_probabilities(trainer, trainer.model) - expected).abs().max()) > 1e-3


def test_a_policy_that_was_trained_on_from_an_adapter_says_so_where_it_is_measured(llama, tmp_path):
    trainer = trainer_of(llama, tmp_path / "o", adapted(llama, KINDS["dora"]))
    saved = tmp_path / "saved"
    trainer.save_model(str(saved))
    with refused(ConfigError, "saved", "ref", "--reference"):
        find_policy(saved, None)
    start = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), saved / "ref").merge_and_unload()
    torch.testing.assert_close(
        log_probabilities(trainer, start), reference_of(trainer), atol=1e-4, rtol=0, check_dtype=False
    )
    start.save_pretrained(tmp_path / "merged")
    place = find_policy(saved, str(tmp_path / "merged"))
    assert (place.base, place.reference) == (str(llama), str(tmp_path / "merged"))


@pytest.mark.parametrize("kind", quick(["embedding", "tokens", "head", "dora"], "embedding", "head"))
def test_a_merged_model_with_a_shared_embedding_is_its_adapter(llama, tmp_path, kind):
    model = adapted(llama, KINDS[kind])
    assert model.config.tie_word_embeddings
    trainer = trainer_of(llama, tmp_path / "o", copy.deepcopy(model))
    expected = log_probabilities(trainer, model)
    save_model(merged(model), tmp_path / "merged", load_tokenizer(llama))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(log_probabilities(trainer, found), expected, atol=1e-3, rtol=0)
