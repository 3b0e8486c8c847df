"""Which models may share prompts is decided by structure and by exact tests, in every precision."""

import warnings

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.masking_utils import causal_mask_function

from engine_cases import PAIRS, brute_force, build, pair_batch
from families import tiny
from madpo.models.engine.logprobs import completion_logps, completion_states, hidden_states
from madpo.models.engine.packed_attention import PackedMask, packed_attention
from madpo.models.engine.packing import PROMPT, pack


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leak", [1.0, 1e-6])
def test_a_layer_that_mixes_tokens_faintly_keeps_padded_rows_and_says_so_once(dtype, leak):
    """Far below the rounding of bfloat16: nothing in a state moves, and its gradient tells all the same."""
    model = build("llama").to(dtype)
    mlp = model.model.layers[1].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x) + leak * x.cumsum(1)  # as a recurrence would
    rows = pair_batch(PAIRS[:3], "right")
    with pytest.warns(UserWarning, match="LlamaForCausalLM"):
        found = completion_logps(model, **rows, pairs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = completion_logps(model, **rows, pairs=True)
    assert found.logps.equal(again.logps)
    assert found.logps.equal(completion_logps(model, **rows).logps)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6, 8])
def test_memory_that_runs_out_in_a_check_says_nothing_of_the_model(call):
    """On a processor it is a RuntimeError as any other, by which a model would count as one that cannot be read or
    packed."""
    model, calls = build("llama"), 0
    original = model.model.layers[1].mlp.forward

    def scarce(x):
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return original(x)

    model.model.layers[1].mlp.forward = scarce
    rows = pair_batch(PAIRS[:3], "right")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="allocate memory"):
            completion_logps(model, **rows, pairs=True)
        found = completion_logps(model, **rows, pairs=True)
    torch.testing.assert_close(found.logps, completion_logps(build("llama"), **rows, pairs=True).logps)


def test_a_leak_without_a_gradient_is_found():
    """Such as a router with a capacity: each token counts those before it."""
    model = build("llama")
    mlp = model.model.layers[1].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x) * (1 + 0.5 * (x.detach().sum(-1, keepdim=True) > 0).double().cumsum(1).fmod(2))
    with pytest.warns(UserWarning, match="LlamaForCausalLM"):
        completion_logps(model, **pair_batch(PAIRS[:3], "right"), pairs=True)


def test_positions_by_index_keep_padded_rows():
    model = build("llama")
    rotary = model.model.rotary_emb
    original = rotary.forward
    rotary.forward = lambda x, position_ids: original(x, torch.arange(x.shape[1])[None])
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM .*\d"):  # how far apart the states are
        completion_logps(model, **pair_batch(PAIRS[:3], "right"), pairs=True)


@pytest.mark.parametrize("name", ["indices", "another_one"])
def test_an_argument_that_packed_attention_does_not_know_means_padded_rows(name):
    model = build("llama")
    for layer in model.model.layers:
        original = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, _original=original, **kw: _original(
            *args, **kw, **{name: torch.zeros(1)}
        )
    rows = pair_batch(PAIRS[:3], "right")
    with pytest.warns(UserWarning, match=rf"LlamaForCausalLM .*\b{name}\b"):
        found = completion_logps(model, **rows, pairs=True)
    torch.testing.assert_close(found.logps, brute_force(model, rows), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("longest", [4, 40])
@pytest.mark.parametrize("fused", [False, True])
def test_attention_sinks_and_their_gradients_equal_an_explicit_softmax(longest, fused):
    """One more logit per head in every softmax, without a value; heads share keys, and groups have unlike lengths."""
    generator = torch.Generator().manual_seed(0)
    rows = pair_batch([(longest // 2, longest, 3), (2, 1, 4)], "right")
    packing = pack(*rows.values(), predict=False)
    packing.probes = fused
    tokens = packing.input_ids.shape[1]
    q, k, v = (torch.randn(1, h, tokens, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    sinks = torch.randn(4, generator=generator, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v, sinks)]
    mask = PackedMask(packing, causal_mask_function)
    found, _ = packed_attention(build("llama").model.layers[0].self_attn, q, k, v, mask, scaling=0.3, s_aux=sinks)
    group = torch.bucketize(torch.arange(tokens), (packing.slots[:, 0])[1:], right=True)
    branch, position = packing.branch, packing.position_ids[0]
    seen = (group[:, None] == group) & ((branch == PROMPT) | (branch[:, None] == branch))
    seen &= position[:, None] >= position
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3).masked_fill(~seen, -torch.inf)
    scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(1, 4, tokens, 1)], -1)
    wanted = (scores.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), leaves) for out in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_mask_that_no_short_text_shows_is_applied():
    """A window of 30 tokens: longer than the test of the model, shorter than the texts."""
    model = build("mistral")
    model.config.sliding_window = 30
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None  # the mask says it, and attention does not
        layer.self_attn.config.sliding_window = 30
    rows = pair_batch([(40, 20, 9), (3, 35, 30)], "right")
    found = completion_logps(model, **rows, pairs=True)
    assert model._madpo_packs
    torch.testing.assert_close(found.logps, brute_force(model, rows), rtol=1e-10, atol=1e-10)


def test_one_pair_packs_for_models_that_need_their_states_in_order():
    model = tiny("jetmoe", loud=3)
    rows = pair_batch([(5, 6, 4)], "right")
    rows["input_ids"] %= 60
    found = completion_logps(model, **rows, pairs=True)
    assert model._madpo_packs
    torch.testing.assert_close(found.logps, completion_logps(model, **rows).logps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "shares"), [("qwen3_next", False), ("jamba", False), ("gpt_oss", True)])
def test_reward_models_share_the_decision(family, shares):
    """Within inference mode, as scores are computed."""
    model = tiny(family, auto=AutoModelForSequenceClassification, num_labels=1).bfloat16()
    rows = pair_batch(PAIRS, "right")
    rows["input_ids"] %= 60
    scored = rows["completion_mask"].bool()
    with warnings.catch_warnings(record=True) as said, torch.inference_mode():
        warnings.simplefilter("always")
        found = completion_states(model, **rows)[scored]
        wanted = hidden_states(model, rows["input_ids"], rows["attention_mask"])[scored]
    assert model._madpo_packs == shares
    assert any(type(model).__name__ in str(warning.message) for warning in said) != shares
    if shares:
        assert float((found - wanted).norm() / wanted.norm()) < 0.02
    else:
        assert found.equal(wanted)
