"""The cached reference belongs to one model and one way to compute it; whatever disagrees is computed again."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from madpo import DPO, PreferenceConfig, PreferenceTrainer
from madpo.core.columns import REFERENCE_COLUMNS
from madpo.models.load import load_tokenizer
from madpo.training import reference
from madpo.training.digests import model_settings, reference_digest
from quick import quick
from refusals import names, refused
from trainer_settings import QUIET

pytestmark = pytest.mark.usefixtures("own_cache")

# Same weights, other numbers. Each field has changed log-probabilities in a model that people use.
CHANGES = {
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "norm": {"rms_norm_eps": 1e-2},
    "activation": {"hidden_act": "relu"},
}


def pairs(count=12, seed=0):
    generator = np.random.default_rng(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict(
        {name: [generator.integers(5, 200, generator.integers(6, 20)).tolist() for _ in range(count)] for name in names}
    )


def load(folder, dtype=torch.float32, **changes):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if not changes:
        return model
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = AutoModelForCausalLM.from_config(config, dtype=dtype)
    other.load_state_dict(model.state_dict())
    return other


def build(folder, out, model, data=None, **more):
    settings = {**QUIET, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-9, "max_steps": 2}
    return PreferenceTrainer(
        model,
        args=PreferenceConfig(output_dir=str(out), **settings),
        loss=DPO(),
        train_dataset=pairs() if data is None else data,
        processing_class=load_tokenizer(folder),
        **more,
    )


def columns(trainer):
    return np.stack([trainer.train_dataset[name] for name in ("ref_chosen_logps", "ref_rejected_logps")])


@pytest.fixture
def computed(monkeypatch):
    """One entry for each time that a reference is computed."""
    calls = []
    real = reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(reference, "say", lines.append)
    return lines


def cached(tmp_path):
    return sorted((tmp_path / "cache" / "columns").glob("reference-*.safetensors"))


@pytest.mark.parametrize(
    ("change", "dtype"), [*((change, torch.float32) for change in CHANGES), ("rope_theta", torch.bfloat16)]
)
def test_equal_weights_with_another_configuration_have_their_own_reference(llama, tmp_path, computed, dtype, change):
    plain = build(llama, tmp_path, load(llama, dtype))
    other = build(llama, tmp_path, load(llama, dtype, **CHANGES[change]))
    assert len(computed) == 2
    assert np.abs(columns(plain) - columns(other)).max() > 1e-4
    other.train()
    first = next(row for row in other.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=2e-3 if dtype is torch.bfloat16 else 1e-6)


def test_columns_of_another_reference_are_said_and_taken_and_one_of_two_is_computed_again(
    llama, tmp_path, computed, capsys
):
    own = build(llama, tmp_path, load(llama))
    both = own.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids", *REFERENCE_COLUMNS])
    assert columns(build(llama, tmp_path, load(llama), both)).tolist() == columns(own).tolist()
    assert "apart" not in capsys.readouterr().err
    other = both.remove_columns("ref_chosen_logps").add_column("ref_chosen_logps", [-5.0] * len(both))
    assert columns(build(llama, tmp_path, load(llama), other))[0].tolist() == [-5.0] * len(both)
    apart = np.abs(columns(own)[0][: own.args.per_device_train_batch_size] + 5).mean() / 2  # one batch, two columns
    names(capsys.readouterr().err, "ref_chosen_logps", f"{apart:.3g} nats")
    one = build(llama, tmp_path, load(llama), other.remove_columns("ref_rejected_logps"))
    assert columns(one).tolist() == columns(own).tolist()
    assert len(computed) == 1, "the cache has it"


def test_names_paths_and_memory_settings_do_not_change_the_reference(llama, tmp_path, computed):
    build(llama, tmp_path, load(llama))
    model = load(llama)
    model.config._name_or_path, model.config.use_cache = "elsewhere", False
    model.config.output_hidden_states = True
    build(llama, tmp_path, model)
    assert len(computed) == 1


def test_the_way_to_compute_enters_the_key(llama, tmp_path, computed, monkeypatch):
    build(llama, tmp_path, load(llama))
    eager = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager")
    build(llama, tmp_path, eager)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 64)
        build(llama, tmp_path, load(llama))
    frequencies = load(llama)
    frequencies.model.rotary_emb.inv_freq.mul_(0.5)  # a buffer that is in no state dict
    build(llama, tmp_path, frequencies)
    assert len(computed) == len(cached(tmp_path)) == 4


def test_the_active_adapter_of_a_given_reference_enters_the_key(llama, tmp_path, computed):
    def adapted(alpha, seed):
        torch.manual_seed(0)
        model = get_peft_model(load(llama), LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        return model

    found = [columns(build(llama, tmp_path, load(llama), ref_model=adapted(*s))) for s in ((2, 1), (4, 1), (2, 2))]
    assert len(computed) == 3, "other weights of an adapter, or another scale of the same ones"
    assert min(np.abs(found[0] - other).max() for other in found[1:]) > 1e-3
    model = adapted(2, 1)
    before = reference_digest(model)
    model.base_model.model.model.layers[0].self_attn.q_proj.scale_layer(0.5)
    assert reference_digest(model) != before
    with model.disable_adapter():
        assert reference_digest(model) == reference_digest(load(llama))


@pytest.mark.parametrize(
    ("damage", "dtype"),
    quick(
        [
            *((name, torch.float32) for name in ("shifted", "one value", "another column", "too short", "no tensors")),
            *(("forged", torch.float32), ("one value", torch.bfloat16), ("forged", torch.bfloat16)),
        ],
        ("shifted", torch.float32),
        ("forged", torch.float32),
        ("one value", torch.bfloat16),
    ),
)
def test_whatever_disagrees_is_computed_again_and_told(llama, tmp_path, computed, said, monkeypatch, dtype, damage):
    whole = columns(build(llama, tmp_path, load(llama, dtype)))
    (path,) = cached(tmp_path)
    content, held = path.read_bytes(), load_file(path)
    if damage == "shifted":
        save_file({name: values + 1e-3 for name, values in held.items()}, path)
    elif damage == "one value":
        held["ref_chosen_logps"][5] += 1
        save_file(held, path)
    elif damage == "another column":
        save_file({"ref_chosen_logps": held["ref_chosen_logps"]}, path)
    elif damage == "too short":
        save_file({name: values[:-1] for name, values in held.items()}, path)
    elif damage == "no tensors":
        path.write_bytes(b"nothing")
    else:  # whole, but of an engine with other numbers
        with monkeypatch.context() as patch:
            real = reference.batch_logps
            patch.setattr(reference, "batch_logps", lambda *a: [values + 1e-3 for values in real(*a)])
            path.unlink()
            build(llama, tmp_path, load(llama, dtype))
    del computed[:]
    again = build(llama, tmp_path, load(llama, dtype))
    assert np.array_equal(columns(again), whole)
    assert len(computed) == 1
    (line,) = said
    assert str(path) in line
    assert path.read_bytes() == content
    build(llama, tmp_path, load(llama, dtype))
    assert len(computed) == 1
    assert len(said) == 1


def test_a_model_that_does_not_repeat_its_bits_keeps_its_columns(llama, tmp_path, computed, said, monkeypatch):
    build(llama, tmp_path, load(llama))
    noise = iter([1e-6, -1e-6] * 10)
    real = reference.batch_logps

    def noisy(*arguments):
        shift = next(noise)
        return [values + shift for values in real(*arguments)]

    monkeypatch.setattr(reference, "batch_logps", noisy)
    build(llama, tmp_path, load(llama))
    assert len(computed) == 1
    assert not said


def test_a_checkpoint_of_another_configuration_is_refused_by_the_field(llama, tmp_path):
    from madpo.core.errors import DataError

    def trainer(model):
        built = build(llama, tmp_path, model, given)
        built.args.save_strategy, built.args.save_steps = "steps", 1
        return built

    given = pairs().add_column("ref_chosen_logps", [-9.0] * 12).add_column("ref_rejected_logps", [-9.0] * 12)
    trainer(load(llama)).train()
    other = trainer(load(llama, rms_norm_eps=1e-2))
    with refused(DataError, ("configuration.rms_norm_eps", "1e-06", "0.01")):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_settings_hold_no_address_of_an_object(llama):
    model = load(llama)
    model.config.strange = object()
    model.config.nested = {"dtype": "x", "sets": {"b", "a"}, "type": torch.float16}
    settings = model_settings(model)
    assert settings["strange"] == "builtins.object"
    assert settings["nested"] == {"sets": ["a", "b"], "type": "torch.float16"}
