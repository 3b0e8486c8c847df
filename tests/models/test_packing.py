"""Packed rows against padded rows: every architecture, every padding side, ragged and degenerate pairs."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_cases import PAIRS, VOCAB, brute_force, build, pair_batch
from madpo.models.engine import packed_attention
from madpo.models.engine.logprobs import completion_logps, completion_states, hidden_states
from madpo.models.engine.packing import PROMPT, pack

FAMILIES = ["gemma3", "llama", "qwen3", "mistral", "gpt2"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build(request.param)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("unshared", "queries"), [((), 2), ((0, 3), 3), ((0, 3), 64)])
def test_values_and_gradients_equal_a_token_loop(model, side, unshared, queries, monkeypatch):
    """By attention in several blocks and in one."""
    monkeypatch.setattr(packed_attention, "QUERIES", queries)
    rows = pair_batch(PAIRS, side, unshared=unshared)
    weight = torch.linspace(-2, 3, len(rows["input_ids"]), dtype=torch.float64)
    inside = [p for n, p in model.named_parameters() if "layers.0." in n or "h.0." in n]
    expected = brute_force(model, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = completion_logps(model, **rows, pairs=True)
    assert model._madpo_packs
    torch.testing.assert_close(scores.logps, expected, rtol=1e-10, atol=1e-10)
    assert scores.lengths.tolist() == rows["completion_mask"].sum(1).tolist()
    ours = torch.autograd.grad((scores.logps * weight).sum(), inside, allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), inside, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            # Norms that compute in float32 even in float64 models round the last digits.
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["gemma3", "llama", "gpt2"])
def test_checkpointed_layers_recompute_what_they_computed(family, reentrant):
    """Backward runs when the attention has been switched back; packed layers must not see the model's own then."""
    model = build(family)
    rows = pair_batch(PAIRS, "right")
    weight = torch.linspace(-2, 3, len(rows["input_ids"]), dtype=torch.float64)
    inside = [p for n, p in model.named_parameters() if "layers." in n or ".h." in n]

    def gradients():
        loss = (completion_logps(model, **rows, pairs=True).logps * weight).sum()
        return torch.autograd.grad(loss, inside, allow_unused=True) if not reentrant else collected(loss)

    def collected(loss):  # reentrant checkpoints know only ``backward``
        model.zero_grad()
        loss.backward()
        return [None if p.grad is None else p.grad.clone() for p in inside]

    wanted = gradients()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients()
    assert model._madpo_packs
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_lengths_pack_to_the_numbers_of_padded_rows(pairs, side, seed, data):
    unshared = tuple(data.draw(st.sets(st.integers(0, len(pairs) - 1), max_size=2)))
    model = SLIDING
    rows = pair_batch(pairs, side, seed, unshared)
    packed, padded = (completion_logps(model, **rows, pairs=pairs) for pairs in (True, False))
    torch.testing.assert_close(packed.logps, padded.logps, rtol=1e-6, atol=1e-6)
    assert packed.lengths.equal(padded.lengths)


SLIDING = build("gemma3")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("unshared", [(), (0, 3)])
def test_states_of_completions_and_their_gradients_equal_those_of_padded_rows(model, side, unshared):
    rows = pair_batch(PAIRS, side, unshared=unshared)
    scored = rows["completion_mask"].bool()
    inside = [p for n, p in model.named_parameters() if "layers.0." in n or "h.0." in n]
    found = completion_states(model, **rows)[scored]
    assert model._madpo_packs
    wanted = hidden_states(model, rows["input_ids"], rows["attention_mask"])[scored]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-2, 3, wanted.numel(), dtype=torch.float64).view_as(wanted)
    ours = torch.autograd.grad((found * weight).sum(), inside, allow_unused=True)
    theirs = torch.autograd.grad((wanted * weight).sum(), inside, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_lengths_pack_to_the_states_of_padded_rows(pairs, seed):
    pairs = [(prompt, chosen or 1, rejected or 1) for prompt, chosen, rejected in pairs]
    rows = pair_batch(pairs, "right", seed)
    scored = rows["completion_mask"].bool()
    wanted = hidden_states(SLIDING, rows["input_ids"], rows["attention_mask"])[scored]
    torch.testing.assert_close(completion_states(SLIDING, **rows)[scored], wanted, rtol=1e-6, atol=1e-6)


def test_each_token_that_is_read_is_computed_once():
    rows = pair_batch([(5, 6, 4), (7, 9, 2), (0, 3, 1)], "right")
    packing = pack(*rows.values(), predict=False)
    assert packing.input_ids.shape[1] == (5 + 6 + 4) + (7 + 9 + 2) + (3 + 1)
    assert packing.scored.equal(rows["completion_mask"].bool())
    assert packing.labels.equal(rows["input_ids"][packing.scored])
    assert packing.input_ids[0, packing.predictors].equal(packing.labels)


def test_each_needed_token_is_computed_once():
    rows = pair_batch([(5, 6, 4), (7, 9, 2)], "left")
    packing = pack(*rows.values())
    # A completion's last token predicts nothing.
    assert packing.input_ids.shape[1] == (5 + 5 + 3) + (7 + 8 + 1)
    assert int((packing.branch == PROMPT).sum()) == 5 + 7
    assert packing.labels.equal(rows["input_ids"][rows["completion_mask"].bool()])
    assert packing.position_ids[0].tolist() == [*range(10), *range(5, 8), *range(15), 7]


def test_attention_leaves_out_blocks_of_later_tokens_and_of_the_sibling(monkeypatch):
    monkeypatch.setattr(packed_attention, "QUERIES", 4)
    packing = pack(**pair_batch([(4, 9, 9), (3, 8, 7)], "right"))  # the last token of each completion is left out
    mask = packed_attention.PackedMask(packing, lambda batch, head, query, key: key <= query)
    looks = {(q.start, q.stop): [(k.start, k.stop) for k in keys] for q, keys in mask.spans}
    first = {(0, 4): [(0, 4)], (4, 8): [(0, 8)], (8, 12): [(0, 12)]}
    # The second completions begin at 12 and, of the shorter group, which has 16 tokens, at 10.
    assert looks == first | {(12, 16): [(0, 4), (8, 16)], (16, 20): [(0, 4), (12, 20)]}
    for (queries, keys), bias in zip(mask.spans, mask.biases(torch.float32), strict=True):
        dense = torch.cat([mask.allowed[:, :, queries, span] for span in keys], dim=-1)
        assert torch.equal(bias == 0, dense)


def test_a_completion_sees_neither_its_sibling_nor_another_pair():
    """Exactly: other tokens in the rejected rows leave the chosen rows' bits as they are."""
    rows = pair_batch(PAIRS, "right")
    before = completion_logps(SLIDING, **rows, pairs=True).logps[: len(PAIRS)]
    rejected = rows["completion_mask"].bool().clone()
    rejected[: len(PAIRS)] = False
    rows["input_ids"][rejected] = (rows["input_ids"][rejected] + 17) % VOCAB
    after = completion_logps(SLIDING, **rows, pairs=True).logps
    assert after[: len(PAIRS)].equal(before)
