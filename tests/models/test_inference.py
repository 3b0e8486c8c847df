"""Computing with weights that do not change: the same values, nothing left behind, bounded memory."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from madpo.models.engine import inference, sampling
from madpo.models.engine.inference import Inference
from madpo.models.engine.responses import divergence


@functools.cache
def llama(dtype=torch.float32):
    shape = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape, **heads), dtype=dtype).eval()


def states(model, mode, rows=3):
    ids = torch.arange(rows * 7).view(rows, 7)
    with torch.no_grad(), mode:
        return model.model(ids).last_hidden_state


def packed(mode):
    return [weight for weight in mode._copies.values() if weight is not None]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_packed_weights_give_the_same_states(dtype, bound):
    model, mode = llama(dtype), Inference(llama(dtype), tokens=10_000)
    apart = (states(model, mode) - states(model, Inference())).float().norm(dim=-1)
    assert (apart <= bound * states(model, Inference()).float().norm(dim=-1)).all()
    native = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert len(packed(mode)) == 14 * native, "seven linear layers in each of two"


def test_samples_and_their_number_do_not_depend_on_packing(monkeypatch):
    model, prompts = llama(), [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]] * 4
    given = {"keys": range(16), "draw": 0, "seed": 3, "max_new_tokens": 12, "eos_token_ids": {2}}
    products = []
    monkeypatch.setattr(Inference, "_product", lambda *args, own=Inference._product: products.append(1) or own(*args))
    plain = sampling.generate(model, prompts, **given)
    assert not products, "so few tokens are not worth a copy"
    monkeypatch.setattr(inference, "WORTH", 0)
    assert sampling.generate(model, prompts, **given) == plain
    assert products


def test_scores_with_packed_weights_are_the_same(monkeypatch):
    policy, reference = llama(), copy.deepcopy(llama())
    with torch.no_grad():
        reference.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    prompts, responses = [[5, 6, 7], [8, 9]] * 2, [[11, 12], [13], [14, 15, 16], [17, 18]]
    given = {"pad": 0, "batch_size": 2}
    plain = divergence(policy, reference, prompts, responses, **given)
    monkeypatch.setattr(inference, "WORTH", 0)
    for found, wanted in zip(divergence(policy, reference, prompts, responses, **given), plain, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_the_model_is_as_it_was():
    model = llama()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    attributes = [set(vars(module)) for module in model.modules()]
    states(model, Inference(model, tokens=10_000))
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert [set(vars(module)) for module in model.modules()] == attributes
    model(torch.arange(14)[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


def test_other_computations_are_plain():
    model = llama()
    weight, x = model.model.layers[0].mlp.up_proj.weight, torch.randn(16, 128)
    with Inference(model, tokens=10_000) as mode:
        F.linear(x, weight).sum().backward()
        with torch.no_grad():
            F.linear(x[:1], weight)
            F.linear(x.double(), weight.double())
            with torch.autocast("cpu", torch.bfloat16):
                assert F.linear(x, weight).dtype == torch.bfloat16
            assert not packed(mode), "gradients, one row, another precision, autocast"
            F.linear(x, weight)
            assert len(packed(mode)) == 1
    weight.grad = None


def test_what_copies_take_is_bounded(monkeypatch):
    model = llama()
    mode = Inference(model, tokens=10_000)
    states(model, mode)
    body = sum(p.nbytes for p in model.model.layers.parameters())
    assert sum(weight.numel() * weight.element_size() for weight in packed(mode)) <= body
    size = sum(p.nbytes for p in model.parameters())
    for total, packs in ((inference.SHARE * size, True), (inference.SHARE * size - 1, False)):
        monkeypatch.setattr(inference.psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=total))
        mode = Inference(model, tokens=10_000)
        states(model, mode)
        assert bool(packed(mode)) == packs
    assert not Inference(torch.nn.Linear(128, inference.THIN - 1), tokens=10_000)._copies, "as thin as an adapter"


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 1), (6, 2), (3, 3)])
def test_heads_that_share_keys_attend_from_one_token_as_they_do_apart(heads, key_heads):
    query = torch.randn(3, heads, 1, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 3, key_heads, 5, 8, dtype=torch.float64)
    apart = (torch.softmax(query[:, h] @ keys[:, h * key_heads // heads].mT * 0.3, -1) for h in range(heads))
    expected = torch.stack([share @ values[:, h * key_heads // heads] for h, share in enumerate(apart)], dim=1)
    with Inference():
        found = F.scaled_dot_product_attention(query, keys, values, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected)
