"""A configuration that does not fit its weights is refused before memory is taken, or before anything is computed."""

import json
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from families import tiny
from madpo.core.errors import ConfigError, MemoryShortage
from madpo.models.fitting import bounded
from madpo.models.load import LoRA, load_classifier, load_model
from refusals import refused

HUGE = 10**9
FIELDS = [
    *({"num_hidden_layers": HUGE}, {"hidden_size": HUGE}, {"intermediate_size": HUGE}),
    *({"vocab_size": HUGE}, {"head_dim": HUGE}, {"num_key_value_heads": HUGE}),
]


def changed(good: Path, folder: Path, file: str = "config.json", **fields: object) -> Path:
    """A copy with other fields in a JSON file."""
    shutil.copytree(good, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))
    return folder


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("load", [load_model, load_classifier])
def test_a_model_that_is_larger_than_its_weights_takes_no_memory(load, fields, llama, tmp_path):
    folder = changed(llama, tmp_path / "m", **fields)
    held, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with refused(ConfigError, folder, "20 tensors"):
        load(folder, dtype=torch.float32)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024 < 2**28
    assert time.process_time() - began < 20


@pytest.mark.parametrize("fields", [{"r": HUGE}, {"r": 10**6}, {"rank_pattern": {"q_proj": 10**7}}], ids=str)
def test_an_adapter_of_a_huge_rank_takes_no_memory(fields, llama, tmp_path):
    plain = load_model(llama, dtype=torch.float32)
    get_peft_model(plain, LoRA(rank=2).peft_config("CAUSAL_LM", plain)).save_pretrained(tmp_path / "good")
    assert load_model(llama, adapter=tmp_path / "good").num_parameters()
    folder = changed(tmp_path / "good", tmp_path / "a", "adapter_config.json", **fields)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused((ConfigError, MemoryShortage), folder):
        load_model(llama, adapter=folder)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024 < 2**28


def test_a_model_that_computes_nothing_is_refused_when_it_is_loaded(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path / "good")
    assert load_model(tmp_path / "good")
    bad = changed(tmp_path / "good", tmp_path / "bad", num_experts_per_tok=99)
    assert AutoModelForCausalLM.from_pretrained(bad)
    with refused(ConfigError, bad):
        load_model(bad)


def test_what_fits_is_built_as_ever(llama):
    for layers in (1, 2, 20):  # more than the file has: refused by the names of its weights, as before
        config = AutoModelForCausalLM.from_pretrained(llama).config
        config.num_hidden_layers = layers
        with bounded(llama):
            assert AutoModelForCausalLM.from_config(config).config.num_hidden_layers == layers
