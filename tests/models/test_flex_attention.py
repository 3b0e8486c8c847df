"""FlexAttention on packed rows against dense masks; on a processor it runs eager, and compiled without gradients."""

import pytest
import torch
from torch.nn.attention import flex_attention as library
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from engine_cases import MODELS, SMALL, WINDOWS, pair_batch
from madpo.models.engine import packed_attention
from madpo.models.engine.logprobs import completion_logps
from quick import quick

LONG = [(70, 90, 60), (20, 150, 3), (140, 5, 44), (30, 8, 8)]
"""Pairs of which two are longer than a block."""
FAMILIES = {
    "gemma3": MODELS["gemma3"],
    "llama": MODELS["llama"],
    "capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, sliding_window=40, layer_types=WINDOWS, attn_logit_softcapping=2.0)
    ),
    "sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**SMALL, sliding_window=40, layer_types=WINDOWS, num_local_experts=2, num_experts_per_tok=1)
    ),
}


@pytest.fixture(params=quick(FAMILIES, "capped", "sinks"))
def model(request):
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture
def flexed(monkeypatch):
    """How often FlexAttention computed; it is chosen once this fixture is called with a form of it."""
    calls = []

    def choose(form):
        def counted(*args, **kwargs):
            calls.append(args[0].shape)
            return form(*args, **kwargs)

        monkeypatch.setattr(packed_attention, "_compiled_flex", lambda device: counted)
        monkeypatch.setenv(packed_attention.ATTENTION, "flex")
        return calls

    return choose


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_values_and_gradients_equal_those_of_dense_masks(model, side, flexed, monkeypatch):
    rows = pair_batch(LONG, side, unshared=(3,))
    weight = torch.linspace(-2, 3, len(rows["input_ids"]))

    def computed():
        model.zero_grad()
        logps = completion_logps(model, **rows, pairs=True).logps
        (logps * weight).sum().backward()
        return logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    dense, wanted = computed()
    assert model._madpo_packs
    # The public function refuses gradients on a processor, though the operator behind it has them.
    monkeypatch.setattr(library, "_validate_device", lambda *tensors: None)
    calls = flexed(library.flex_attention)
    flex, found = computed()
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5 * float(wanted[name].abs().max()))


@pytest.mark.slow  # a C++ compiler works for half a minute
def test_compiled_values_equal_those_of_dense_masks(flexed):
    torch.manual_seed(0)
    model = FAMILIES["gemma3"]().eval().requires_grad_(False)
    rows = pair_batch(LONG, "right")
    dense = completion_logps(model, **rows, pairs=True).logps
    calls = flexed(packed_attention._compiled_flex("cpu"))
    torch.testing.assert_close(completion_logps(model, **rows, pairs=True).logps, dense, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3


def test_blocks_without_a_pair_that_may_look_are_left_out():
    """Completions do not look at one another, and none looks ahead."""
    from madpo.models.engine.packing import pack

    rows = pair_batch([(128, 129, 129)], "right")
    mask = packed_attention.PackedMask(pack(**rows), lambda group, head, query, key: key <= query)
    kept = mask.blocks.to_dense()[0, 0]
    assert kept.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
