"""The completion head against brute force: values, gradients, every padding side, and half precision."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine_cases import MODELS, VOCAB, brute_force, build
from madpo.core.errors import DataError
from madpo.models.engine import devices
from madpo.models.engine import head as engine_head
from madpo.models.engine.head import Head, _WideProduct, token_logps
from madpo.models.engine.kl import completion_kl
from madpo.models.engine.logprobs import completion_logps, install_completion_head
from madpo.models.engine.responses import divergence
from quick import quick
from refusals import refused


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request):
    return build(request.param)


def batch(rows: list[tuple[int, int]], side: str, seed: int = 0) -> dict[str, Tensor]:
    """Random rows of (prompt, completion) lengths, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    length = max(prompt + completion for prompt, completion in rows)
    ids = torch.randint(1, VOCAB, (len(rows), length), generator=generator)
    attention, completion_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        start = 0 if side == "right" else length - prompt - completion
        attention[row, start : start + prompt + completion] = 1
        completion_mask[row, start + prompt : start + prompt + completion] = 1
    return {"input_ids": ids * attention, "attention_mask": attention, "completion_mask": completion_mask}


ROWS = [(5, 6), (3, 1), (7, 9), (1, 4), (4, 0)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("frozen", [True, False])
def test_values_and_gradients_equal_a_token_loop(model, side, frozen):
    rows = batch(ROWS, side)
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0], dtype=model.dtype)
    inside = next(
        p for n, p in model.named_parameters() if n.endswith(("layers.0.mlp.up_proj.weight", "h.0.mlp.c_fc.weight"))
    )

    expected = brute_force(model, rows)
    scores = completion_logps(model, **rows)
    tight = {"rtol": 1e-10, "atol": 1e-10} if expected.dtype is torch.float64 else {"rtol": 2e-5, "atol": 1e-4}
    torch.testing.assert_close(scores.logps, expected, **tight)
    assert scores.lengths.tolist() == [completion for _, completion in ROWS]
    wanted = [inside] if frozen else [inside, model.get_output_embeddings().weight]
    ours = torch.autograd.grad((scores.logps * weight).sum(), wanted)
    theirs = torch.autograd.grad((expected * weight).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        # Gemma's norms compute in float32 even in float64 models, so the last digits differ.
        bound = 1e-6 if b.dtype is torch.float64 else 1e-4
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * float(b.abs().max()))


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_row_does_not_depend_on_its_batch(rows, seed):
    model = build("gemma3")
    together = batch(rows, "right", seed)
    scores = completion_logps(model, **together).logps
    for row, (prompt, completion) in enumerate(rows):
        single = {name: value[row : row + 1, : prompt + completion] for name, value in together.items()}
        torch.testing.assert_close(completion_logps(model, **single).logps[0], scores[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tile", [1, 7, 50, VOCAB, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("frozen", [True, False])
def test_details_equal_the_full_softmax_for_every_tile(tile, softcap, frozen):
    torch.manual_seed(1)
    hidden = torch.randn(9, 16, dtype=torch.float64) * 2
    head = Head(torch.randn(VOCAB, 16, dtype=torch.float64), torch.randn(VOCAB, dtype=torch.float64), softcap, 0.5)
    head.weight.requires_grad_(not frozen)
    z = 0.5 * (hidden @ head.weight.T + head.bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    labels = torch.randint(0, VOCAB, (9,))
    labels[:3] = z[:3].argmax(-1)
    logp = z.log_softmax(-1)

    found = token_logps(hidden, head, labels, log_sum_sq=True, details=True, tile=tile)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(found.logps, logp.gather(-1, labels[:, None])[:, 0], **close)
    torch.testing.assert_close(found.log_sum_sq, logp.exp().square().sum(-1).log(), **close)
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1), **close)
    torch.testing.assert_close(found.mean_logit, z.mean(-1), **close)
    assert found.top1.tolist() == (z.argmax(-1) == labels).double().tolist()


@pytest.mark.parametrize("frozen", [True, False])
def test_tiles_of_an_accelerator_give_the_same(frozen, monkeypatch):
    draw = torch.Generator().manual_seed(1)
    weight, hidden = (torch.randn(n, 16, generator=draw, dtype=torch.float64) for n in (1_700, 33))
    head = Head(weight.requires_grad_(not frozen), None, 5.0, 0.5)
    hidden, labels = hidden.requires_grad_(), torch.randint(0, 1_700, (33,), generator=draw)

    def found():
        scores = token_logps(hidden, head, labels, log_sum_sq=True, details=True)
        return *scores, *torch.autograd.grad(scores.logps.sum(), hidden)

    here = found()
    monkeypatch.setattr(devices, "kind", lambda tensor: "cuda")
    monkeypatch.setattr(engine_head, "ACCELERATOR_TOKENS", 20)
    for rows in (1, 700, 4_096):
        for size in (2**28, 4 * 20 * 512):
            monkeypatch.setattr(engine_head, "ACCELERATOR_BYTES", size)
            assert head.tile(rows) == 512 or 4 * rows * head.tile(rows) <= size
        torch.testing.assert_close(found(), here, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_the_stash(softcap):
    torch.manual_seed(2)
    head = Head(torch.randn(23, 5, dtype=torch.float64), torch.randn(23, dtype=torch.float64), softcap, 1.5)
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 22, 7, 7])
    assert torch.autograd.gradcheck(lambda h: token_logps(h, head, labels, tile=6).logps, hidden)


def test_bfloat16_is_three_times_closer_than_bfloat16_logits():
    """The label's and the top token's logits are exact; the rest of the softmax averages its rounding."""
    torch.manual_seed(3)
    weight = (torch.randn(20_000, 64) * 0.2).bfloat16()
    hidden = (torch.randn(200, 64) * 2).bfloat16()
    labels = torch.randint(0, 20_000, (200,))
    hidden[:100] += 2 * weight[:100] / weight[:100].float().square().sum(-1, keepdim=True).sqrt()
    hidden[:50] += (14 * weight[:50].float() / weight[:50].float().norm(dim=-1, keepdim=True)).bfloat16()
    labels[:50] = torch.arange(50)
    exact = (hidden.float() @ weight.float().T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    plain = (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    ours = token_logps(hidden, Head(weight, None, None, 1.0), labels, tile=4096).logps
    assert (ours - exact).abs().mean() < (plain - exact).abs().mean() / 3
    assert (ours - exact).abs().max() < 0.02
    assert float(ours.max()) <= 0


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("boost", quick([0, 11, 14, 17], 0, 14))
def test_bfloat16_gradients_and_sums_follow_the_exact_logits(boost, softcap):
    """The likelier the label, the smaller its gradient and the larger the terms that it is the difference of."""
    torch.manual_seed(3)
    weight = (torch.randn(20_000, 64) * 0.2).bfloat16()
    hidden, labels = torch.randn(200, 64) * 2, torch.arange(200)
    hidden += boost * weight[:200].float() / weight[:200].float().norm(dim=-1, keepdim=True)
    hidden = hidden.bfloat16().requires_grad_()
    head = Head(weight, None, softcap, 1.0)
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ weight.double().T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = logits.log_softmax(-1)
    own = logp.gather(-1, labels[:, None]).squeeze(-1)
    (wanted,) = torch.autograd.grad(own.sum(), exact)
    found = token_logps(hidden, head, labels, log_sum_sq=True, details=True, tile=4096)
    (ours,) = torch.autograd.grad(found.logps.sum(), hidden)
    (plain,) = torch.autograd.grad(
        head.logits(hidden)[0].float().log_softmax(-1).gather(-1, labels[:, None]).sum(), hidden
    )

    def error(gradient):
        return ((gradient.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median()

    assert error(ours) < 0.03
    assert error(ours) < 1.1 * error(plain)
    # A logit of 16 to 32 is rounded by up to 1 / 16.
    torch.testing.assert_close(found.log_sum_sq.double(), torch.logsumexp(2 * logp, -1), rtol=0, atol=0.05)
    torch.testing.assert_close(found.entropy.double(), -(logp.exp() * logp).sum(-1), rtol=0, atol=0.05)
    assert float(found.log_sum_sq.max()) < 0.01
    assert float(found.entropy.min()) > -0.01


def test_the_gradient_of_a_product_that_leaves_half_precision():
    torch.manual_seed(4)
    x, weight = (torch.randn(7, 16).bfloat16().requires_grad_(), torch.randn(30, 16).bfloat16().requires_grad_())
    found = _WideProduct.apply(x, weight)
    assert found.dtype == torch.float32
    wanted = x.float() @ weight.float().T
    assert found.equal(wanted)
    grad = torch.randn(7, 30)
    ours = torch.autograd.grad(found, (x, weight), grad)
    theirs = torch.autograd.grad(wanted, (x, weight), grad)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "bias and scale", "softcap"])
def test_the_logits_of_a_tile_are_its_product_in_every_layout(rows, dtype, form):
    draw = torch.Generator().manual_seed(rows)
    weight, hidden = (torch.randn(count, 24, generator=draw).to(dtype) for count in (77, rows))
    bias = torch.randn(77, generator=draw).to(dtype) if form == "bias and scale" else None
    head = Head(weight, bias, 3.0 if form == "softcap" else None, 0.5 if form == "bias and scale" else 1.0)
    wide = hidden.double() @ weight.double().T
    if bias is not None:
        wide = (wide + bias.double()) * 0.5
    wanted = 3 * torch.tanh(wide / 3) if form == "softcap" else wide
    bound = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.1}[dtype]
    turned = hidden.T.contiguous().T  # the same numbers, column by column
    with torch.no_grad():
        for states in (hidden, turned):
            found = torch.cat([head.logits(states, start, start + 30)[0] for start in range(0, 77, 30)], dim=-1)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


def test_no_completion_token_at_all_gives_zero_and_a_gradient():
    model = build("llama")
    rows = batch([(4, 0), (3, 0)], "right")
    scores = completion_logps(model, **rows)
    assert scores.logps.tolist() == [0.0, 0.0]
    scores.logps.sum().backward()


def test_kl_is_zero_to_itself_and_equals_the_definition():
    policy, reference = build("gemma3", 0), build("gemma3", 5)
    rows = batch(ROWS[:4], "right")
    logps, kl, ref_logps = completion_kl(policy, policy, **rows)
    assert kl.tolist() == [0.0] * 4
    assert ref_logps.equal(logps)
    torch.testing.assert_close(logps, completion_logps(policy, **rows).logps.detach(), rtol=1e-6, atol=1e-6)
    _, kl, ref_logps = completion_kl(policy, reference, **rows, block=5)
    torch.testing.assert_close(ref_logps, completion_logps(reference, **rows).logps.detach(), rtol=1e-6, atol=1e-6)
    p = policy(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.log_softmax(-1)
    q = reference(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.log_softmax(-1)
    per_position = (p.exp() * (p - q)).sum(-1)[:, :-1] * rows["completion_mask"][:, 1:]
    torch.testing.assert_close(kl, per_position.sum(-1), rtol=1e-6, atol=1e-6)


def test_plain_forward_and_generate_are_unchanged():
    model = build("llama")
    ids = torch.randint(1, VOCAB, (2, 6))
    before, tokens = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    completion_logps(model, ids, torch.ones_like(ids), torch.ones_like(ids))
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).equal(tokens)


def test_a_copy_computes_with_its_own_weights():
    model, rows = build("llama"), batch(ROWS, "right")
    install_completion_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
        assert other(input_ids=rows["input_ids"]).logits.equal(2 * model(input_ids=rows["input_ids"]).logits)
        found = completion_logps(other, **rows).logps
        torch.testing.assert_close(found, brute_force(other, rows))


def test_responses_of_one_prompt_are_scored_as_each_by_itself():
    policy, reference = build("gemma3", 0), build("gemma3", 5)
    prompts = [[3, 4, 5], [6, 7], [3, 4, 5], [6, 7], [3, 4, 5], [8], [8]]
    said = [[9, 10], [11], [12, 13, 14, 15], [16, 17], [18], [19, 20, 21], [22]]
    wanted = [divergence(policy, reference, [p], [r], pad=0, batch_size=1) for p, r in zip(prompts, said, strict=True)]
    for size in (2, 3, 4, 16):
        found = divergence(policy, reference, prompts, said, pad=0, batch_size=size)
        for values, own in zip(found, zip(*wanted, strict=True), strict=True):
            np.testing.assert_allclose(values, np.concatenate(own), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_response_without_any_token_is_refused(copies):
    model = build("gemma3", 0)
    with refused(DataError, "text 0"):
        divergence(model, model, [[]] * copies, [[]] * copies, pad=0, batch_size=4)
