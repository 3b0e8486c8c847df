"""Which weights a LoRA adapter changes: in many families each one learns, merges and loads, and no router has one."""

import re
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from families import tiny
from madpo.models.adapters import adapter_config, adapter_summary, adapter_text
from madpo.models.hyperparameters import LoRA
from quick import quick

IDS = torch.randint(3, 50, (4, 24), generator=torch.Generator().manual_seed(0))
TOLERANCE = 2e-3  # of logits in float32: two experts that are nearly tied may change places

# Family -> last parts of the names of the weights that are adapted.
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
FAMILIES = {
    "llama": ATTENTION | MLP,
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "falcon": {
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    },  # linear layers with a forward of their own
    "mixtral": ATTENTION | EXPERTS,
    "qwen2_moe": ATTENTION | MLP | EXPERTS,
    "qwen3_moe": ATTENTION | EXPERTS,
    "qwen3_next": None,
    "gpt_oss": ATTENTION | EXPERTS,
    "granitemoe": ATTENTION | EXPERTS,
    "granitemoehybrid": None,
    "jamba": None,
    "llama4_text": ATTENTION | MLP | EXPERTS,
    "phimoe": ATTENTION | EXPERTS,  # its router is a linear layer that returns a tuple
    "deepseek_v3": LATENT | MLP | EXPERTS,
    "glm_moe_dsa": LATENT | MLP | EXPERTS,  # an indexer, whose indices pass no gradient
    "dbrx": {"Wqkv", "out_proj"},  # experts' weights are read by another module
    "jetmoe": {"kv_proj", "input_linear", "output_linear"},
    "zaya": None,  # the router is a small network
    "falcon_h1": ATTENTION | MLP | {"in_proj"},
    "mamba": {"in_proj"},
    "mamba2": {"in_proj"},
    "nemotron_h": None,
    "recurrent_gemma": None,  # stacked weights that are no experts
    "laguna": None,  # PEFT loses the shared experts' names when it reads a file
    "gemma3": ATTENTION | MLP,
    "gemma4": None,
    "qwen3_5": None,
    "qwen2_5_vl": ATTENTION | MLP,
    "mistral3": ATTENTION | MLP,
    "llama4": ATTENTION | MLP | EXPERTS,
}
ROUTERS = re.compile(r"router|classifier|\.gate$|\.wg$|shared_expert_gate|vision|visual|lm_head|indexer")


def adapted(model, lora=None, seed=1):
    """The model with an adapter far from zero, and the warnings of making it."""
    config = adapter_config(lora or LoRA(rank=2), model, "CAUSAL_LM")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return adapted.eval(), [str(warning.message) for warning in said if "peft" in str(warning.filename)]


def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", quick(FAMILIES, "llama", "gpt2", "gpt_oss", "phimoe", "falcon_h1", "gemma3"))
def test_every_adapter_learns_merges_and_loads_and_no_router_has_one(family, tmp_path):
    base = tiny(family)
    model, said = adapted(tiny(family))
    assert said == []
    found = logits(model)
    found.log_softmax(-1)[..., 5].sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    layers = {name.split(".lora_")[0] for name in trained}
    assert [name for name in layers if ROUTERS.search(name)] == []
    if FAMILIES[family] is not None:
        assert set(adapter_summary(model).changed) == FAMILIES[family]

    plain = logits(base)
    assert (found - plain).abs().max() > 10 * TOLERANCE
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(family), tmp_path).eval()
    torch.testing.assert_close(logits(again), found, rtol=0, atol=TOLERANCE)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=TOLERANCE)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), found, rtol=0, atol=TOLERANCE)
    changed = {name for name, p in base.state_dict().items() if not torch.equal(p, merged.state_dict()[name])}
    assert len(changed) == len(layers), "as many weights as adapters, and no other"


def test_dropout_leaves_experts_frozen_and_a_line_says_what_is():
    model, _ = adapted(tiny("gpt_oss"), LoRA(rank=2, dropout=0.1))
    summary = adapter_summary(model)
    assert set(summary.changed) == ATTENTION
    base = tiny("gpt_oss")
    total = sum(p.numel() for p in base.parameters())
    experts = sum(p.numel() for name, p in base.named_parameters() if ".experts." in name)
    changed = sum(p.numel() for n, p in base.named_parameters() if n.split(".")[-2] in ATTENTION and p.dim() == 2)
    assert summary.parameters == total
    assert summary.frozen["experts"] == pytest.approx(experts / total)
    assert summary.share == pytest.approx(changed / total)
    assert sum(summary.frozen.values()) + summary.share == pytest.approx(1)
    assert f"{changed / total:.1%}" in summary.text()
    assert f"experts {experts / total:.1%}" in summary.text()


def test_a_users_own_layers_stay_their_choice():
    model = tiny("mixtral")
    config = adapter_config(LoRA(rank=2, targets=("q_proj", "v_proj")), model, "CAUSAL_LM")
    assert set(adapter_summary(get_peft_model(model, config)).changed) == {"q_proj", "v_proj"}


def test_a_head_that_trains_in_full_counts_as_changed():
    model = tiny("llama", auto=AutoModelForSequenceClassification, num_labels=1)
    total, head = sum(p.numel() for p in model.parameters()), model.score.weight.numel()
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    summary = adapter_summary(get_peft_model(model, adapter_config(LoRA(rank=2), model, "SEQ_CLS")))
    assert set(summary.changed) == ATTENTION | MLP | {"score"}
    assert (summary.parameters, summary.share) == (total, pytest.approx((linear + head) / total))


def test_no_adapter_has_no_line():
    assert adapter_text(tiny("llama")) is None


def test_short_names_match_what_was_chosen_and_nothing_else():
    model = tiny("gemma3")  # its vision tower has layers of the same names
    text = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "language_model" in name}
    found, _ = adapted(model)
    assert {name.removeprefix("base_model.model.") for name in found.targeted_module_names} == text


def test_a_probe_leaves_no_trace():
    model = tiny("granitemoehybrid").train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    state, weights = torch.random.get_rng_state(), {n: p.clone() for n, p in model.state_dict().items()}
    adapter_config(LoRA(), model, "CAUSAL_LM")
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_are_not_here_are_chosen_all_the_same():
    with torch.device("meta"):
        model = tiny("mixtral")
    config = adapter_config(LoRA(rank=2), model, "CAUSAL_LM")
    whole = adapter_config(LoRA(rank=2), tiny("mixtral"), "CAUSAL_LM")
    assert config.target_modules == whole.target_modules
    assert config.target_parameters == whole.target_parameters
