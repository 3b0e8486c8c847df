"""Sampling: the right law, and draws that do not depend on the batch."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from families import tiny
from madpo.core.errors import ConfigError, DataError
from madpo.models.engine.head import Head
from madpo.models.engine.responses import respond
from madpo.models.engine.sampling import Sampling, generate, sample, sample_by_tiles, uniforms
from madpo.models.load import build_tiny, load_tokenizer
from quick import quick
from refusals import names, refused


@pytest.fixture(scope="module", params=quick(["gemma3", "llama", "qwen3"], "gemma3"))
def model(request, tmp_path_factory):
    folder = build_tiny(request.param, tmp_path_factory.mktemp("models") / request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def prompts(count, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(3, 200, size=draw.integers(1, 12)).tolist() for _ in range(count)]


def run(model, ids, keys, **changes):
    settings = {"draw": 0, "seed": 1, "max_new_tokens": 14, "eos_token_ids": [2, 7, 40, 41, 42], "batch_size": 64}
    return generate(model, ids, keys=keys, **{**settings, **changes})


@pytest.fixture(scope="module")
def one_by_one(model):
    """Draws 2 to 5 of five prompts."""
    return [run(model, prompts(5), range(100, 105), draw=draw) for draw in (2, 3, 4, 5)]


def test_tokens_do_not_depend_on_batch_size_or_order(model):
    ids, keys = prompts(11), list(range(100, 111))
    together = run(model, ids, keys)
    assert any(len(completion) < 14 for completion in together), "some rows should end early"
    for size in (1, 4):
        assert run(model, ids, keys, batch_size=size) == together
    assert run(model, ids[::-1], keys[::-1]) == together[::-1]
    assert run(model, ids, keys, draw=1) != together
    assert run(model, ids, keys, seed=2) != together


@pytest.mark.parametrize("size", quick([64, 9, 3, 1], 64, 3))
def test_samples_of_a_prompt_share_it_and_are_the_draws_one_by_one(model, one_by_one, size):
    together = run(model, prompts(5), range(100, 105), draw=2, samples=4, batch_size=size)
    assert [together[k::4] for k in range(4)] == one_by_one
    assert len({len(completion) for completion in together}) > 1, "rows should end at different places"


def test_greedy_equals_transformers(model):
    ids = torch.randint(3, 200, (3, 6), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)[:, 6:]
    found = run(model, ids.tolist(), [0, 1, 2], temperature=0, max_new_tokens=12, eos_token_ids=[2])
    for row, completion in zip(expected.tolist(), found, strict=True):
        assert row[: len(completion)] == completion


def test_a_models_own_generation_settings_are_not_used_and_said(llama, capsys):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), load_tokenizer(llama)
    how = {"keys": range(4), "draw": 0, "ends": [2], "description": "Responses"}
    before = respond(model, tokenizer, prompts(4), DecodingSettings(), **how)
    assert "generation_config" not in capsys.readouterr().err
    own = {"repetition_penalty": 5.0, "temperature": 0.1, "top_p": 0.9, "suppress_tokens": list(range(3, 200))}
    model.generation_config = GenerationConfig(**own)
    assert respond(model, tokenizer, prompts(4), DecodingSettings(), **how) == before
    assert respond(model, tokenizer, prompts(4), DecodingSettings(), temperature=0.1, **how) != before
    first, second = (line for line in capsys.readouterr().err.splitlines() if "generation_config" in line)
    names(first, "repetition_penalty 5.0", "temperature 0.1", "suppress_tokens")
    assert "temperature 0.1" not in second


class DecodingSettings(NamedTuple):
    seed: int = 1
    max_new_tokens: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    batch_size: int = 4


def test_an_end_token_is_kept_and_nothing_follows(model):
    for completion in run(model, prompts(20), list(range(20))):
        ends = [token in (2, 7, 40, 41, 42) for token in completion]
        assert not any(ends[:-1])
        assert ends[-1] or len(completion) == 14


@pytest.mark.parametrize("vocabulary", quick([5, 512, 513, 3000], 513))
def test_the_law_is_the_softmax(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(1, vocabulary, generator=generator, dtype=torch.float64) * 2
    uniform = torch.from_numpy(np.random.default_rng(3).random(min(50_000, 30_000_000 // vocabulary)))
    tokens = torch.cat([sample(logits.expand(len(u), -1).clone(), u) for u in uniform.split(10_000)])
    expected = (logits.softmax(-1)[0] * len(uniform)).numpy()
    found = np.bincount(tokens.numpy(), minlength=vocabulary)
    common = expected >= 5
    observed = np.append(found[common], found[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep]).pvalue > 1e-3


def test_the_draw_is_inverse_transform_sampling():
    """u picks the first token whose cumulative probability exceeds it, also at the ends."""
    logits = torch.randn(1, 1500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cumulative = logits.softmax(-1)[0].cumsum(-1)
    uniform = torch.linspace(0, 1 - 1e-9, 777, dtype=torch.float64)
    expected = torch.searchsorted(cumulative, uniform, right=True).clamp(max=1499)
    assert sample(logits.expand(777, -1).clone(), uniform).equal(expected)


def test_tokens_without_probability_are_never_drawn():
    logits = torch.full((4, 1300), -torch.inf)
    logits[:, 700] = 0.0
    uniform = torch.tensor([0.0, 0.3, 0.999999, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, uniform).tolist() == [700] * 4


def test_half_precision_logits_of_a_large_vocabulary_are_drawn_as_wide_ones():
    """Blocks are summed in float32 and rows are taken a few at a time: the tokens are those of float64."""
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(9, 262_144, generator=generator) * 3).bfloat16()
    uniform = torch.rand(9, generator=generator, dtype=torch.float64)
    assert sample(logits, uniform).equal(sample(logits.double(), uniform))


def head_of(vocabulary, hidden, *, bias=False, softcap=None, scale=1.0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(vocabulary)
    weight = torch.randn(vocabulary, hidden, generator=draw, dtype=torch.float64) * 0.7
    offset = torch.randn(vocabulary, generator=draw, dtype=torch.float64) if bias else None
    return Head(weight.to(dtype), offset if offset is None else offset.to(dtype), softcap, scale)


@pytest.mark.parametrize("vocabulary", quick([5, 512, 513, 4096, 4097, 9000], 5, 513, 9000))
@pytest.mark.parametrize("form", [{}, {"bias": True, "scale": 0.3}, {"softcap": 4.0}])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_walk_over_tiles_draws_the_tokens_of_whole_logits(vocabulary, form, temperature):
    head = head_of(vocabulary, 16, **form)
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(60, 16, generator=draw, dtype=torch.float64) * torch.linspace(0.1, 4, 60)[:, None]
    uniform = torch.rand(60, generator=draw, dtype=torch.float64)
    whole = sample(head.logits(states)[0] / temperature, uniform)
    assert sample_by_tiles(head, states, uniform, temperature).equal(whole)
    assert Sampling(temperature).draw_from(head, states, uniform).equal(whole)
    single = [sample_by_tiles(head, states[i : i + 1], uniform[i : i + 1], temperature) for i in range(60)]
    assert torch.cat(single).equal(whole)


CUTS = [
    *({"temperature": 0}, {"top_k": 1}, {"top_k": 7}, {"top_k": 300}, {"top_k": 100_000}),
    *({"top_p": 0.3}, {"top_p": 0.95, "temperature": 0.6}, {"top_p": 0.9999}, {"top_p": 0.6, "top_k": 20}),
]


@pytest.mark.parametrize("vocabulary", [5, 64, 4097, 9000])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_walk_over_tiles_cuts_as_whole_logits_are_cut(vocabulary, cut):
    head = head_of(vocabulary, 16, bias=True)
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(30, 16, generator=draw, dtype=torch.float64) * torch.linspace(0, 4, 30)[:, None]
    uniform = torch.rand(30, generator=draw, dtype=torch.float64)
    whole = Sampling(**cut).draw(head.logits(states)[0].contiguous(), uniform)
    assert Sampling(**cut).draw_from(head, states, uniform).equal(whole)
    if "top_p" not in cut:  # which of some equal logits are in a nucleus is nobody's choice
        even = Head(head.weight.round(), None, None, 1.0)
        states = states.round()
        whole = Sampling(**cut).draw(even.logits(states)[0].contiguous(), uniform)
        assert Sampling(**cut).draw_from(even, states, uniform).equal(whole)


def test_a_walk_over_tiles_reaches_both_ends_and_skips_entries_without_probability():
    head = head_of(9000, 4, bias=True)
    head.bias[:4200] = head.bias[8000:] = -torch.inf  # whole tiles and parts of some
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    states = torch.zeros(3, 4, dtype=torch.float64)
    found = sample_by_tiles(head, states, uniform)
    assert found.tolist() == sample(head.bias.expand(3, -1), uniform).tolist()
    assert found[[0, -1]].tolist() == [4200, 7999]


def test_half_precision_states_are_drawn_with_exact_probabilities_inside_a_block():
    head = head_of(1500, 64, dtype=torch.bfloat16)
    state = torch.randn(1, 64, generator=torch.Generator().manual_seed(4)).mul(1.5).bfloat16()
    count = 6000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # even: shares are the law, without noise
    tokens = torch.cat([sample_by_tiles(head, state.expand(len(part), -1), part) for part in uniform.split(1000)])
    shares = torch.bincount(tokens, minlength=1500).double() / count
    rounded = head.logits(state)[0][0].double().softmax(-1)
    exact = (state.double() @ head.weight.double().T)[0].softmax(-1)
    for drawn, known, law in zip(shares.split(512), rounded.split(512), exact.split(512), strict=True):
        assert float(drawn.sum()) == pytest.approx(float(known.sum()), abs=2e-3)
        wanted = drawn.sum() * law / law.sum()
        assert float((drawn - wanted).abs().max()) < 1.1 / count
    assert float((rounded - exact).abs().max()) > 5 / count, "the two laws should be distinguishable"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_an_error_not_a_token(value):
    with refused(DataError):
        sample(torch.tensor([[0.0, value, 1.0]]), torch.tensor([0.5]))
    head = head_of(700, 4, bias=True)
    head.bias[3] = value
    with refused(DataError):
        sample_by_tiles(head, torch.zeros(2, 4, dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64))
    for cut in ({"top_k": 3}, {"top_p": 0.5}):
        with refused(DataError):
            Sampling(**cut).draw_from(head, torch.zeros(1, 4, dtype=torch.float64), torch.tensor([0.5]))


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_a_recurrent_model_is_refused(family):
    shape = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "attention_hidden_size": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    with refused(ConfigError, type(model).__name__, "cache"):
        run(model, [[3, 4]], [0])


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_read_the_keys_of_another_layer_go_on_as_a_whole_text_would(family):
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    shared |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    model, prompts = tiny(family, loud=3, **shared), [[5, 6, 7], [*range(4, 18)], [*range(20, 29)]]
    how = {"eos_token_ids": [-1], "max_new_tokens": 10, "temperature": 0.0, "samples": 2}
    found = generate(model, prompts, keys=[0, 1, 2], draw=0, seed=0, **how)
    for i, ids in enumerate(found):
        prompt = prompts[i // 2]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(chosen, logits.max(-1).values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["git", "dory", "xlstm"])
def test_a_model_that_cannot_go_on_from_texts_of_unlike_lengths_is_refused(family):
    """git counts the padding in silence; the others break."""
    model = tiny(family, loud=3)
    with refused(ConfigError, type(model).__name__, "lengths"):
        run(model, [[3, 4]], [0])


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    uniform = torch.linspace(0, 0.9999, 1000, dtype=torch.float64)
    many = logits.expand(1000, -1)
    assert set(Sampling(top_p=0.75).draw(many, uniform).tolist()) == {0, 1}
    assert set(Sampling(top_p=0.8001).draw(many, uniform).tolist()) == {0, 1, 2}
    assert set(Sampling(top_k=3).draw(many, uniform).tolist()) == {0, 1, 2}
    shares = np.bincount(Sampling(top_k=2).draw(many, uniform).numpy()) / 1000
    assert shares == pytest.approx([0.625, 0.375], abs=2e-3)
    hot = np.bincount(Sampling(temperature=2.0).draw(many, uniform).numpy()) / 1000
    assert hot == pytest.approx(torch.softmax(logits[0] / 2, 0).numpy(), abs=2e-3)


def test_uniform_numbers_belong_to_seed_prompt_and_draw():
    assert (uniforms(0, 5, 1, 10)[:4] == uniforms(0, 5, 1, 4)).all(), "a longer completion begins the same"
    different = {tuple(uniforms(*which, 3)) for which in [(0, 5, 1), (1, 5, 1), (0, 6, 1), (0, 5, 0)]}
    assert len(different) == 4


def test_bad_settings_are_refused_with_the_value():
    for setting in (("top_p", 0.0), ("temperature", -1), ("top_k", 0)):
        with refused(ConfigError, setting):
            Sampling(**dict([setting]))
