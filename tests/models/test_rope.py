"""Positions whose frequencies follow the length: each text has those of its own length, whatever its neighbours are."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from engine_cases import SMALL, WINDOWS, pair_batch
from madpo.core.errors import ConfigError
from madpo.models.engine.features import feature_layers
from madpo.models.engine.logprobs import completion_logps, completion_states
from madpo.models.engine.sampling import generate
from quick import quick
from refusals import refused

LIMIT = 12  # more than the rows that decide about packing have
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": LIMIT},
    **{"short_factor": [1.0] * 8, "long_factor": [3.0 + i for i in range(8)]},
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
MODELS = {
    "dynamic": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=LIMIT, rope_parameters=DYNAMIC)),
    "longrope": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=LONG)),
    "one kind of layer": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SMALL,
            sliding_window=4,
            layer_types=WINDOWS,
            max_position_embeddings=LIMIT,
            rope_parameters={"sliding_attention": PLAIN, "full_attention": DYNAMIC},
        )
    ),
}
# Both sides below, at and above the limit, and one on each side of it.
PAIRS = [(3, 4, 2), (5, 7, 8), (6, 3, 9), (8, 7, 5), (4, 8, 9)]


@pytest.fixture(params=quick(MODELS, next(iter(MODELS))))
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    found = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(4)
    return found


def each_by_itself(model: nn.Module, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probabilities, their gradient with respect to the embeddings, and states, each row by a fresh copy."""
    sums, grads, states = [], [], []
    for ids, attended, scored in zip(*rows.values(), strict=True):
        fresh = copy.deepcopy(model)
        ids, scored = ids[attended.bool()], scored[attended.bool()]
        out = fresh(input_ids=ids[None], output_hidden_states=True)
        tokens = out.logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        sums.append((tokens * scored[1:]).sum())
        grads.append(torch.autograd.grad(sums[-1], fresh.get_input_embeddings().weight)[0])
        states.append(out.hidden_states[-1][0])
    return torch.stack(sums).detach(), torch.stack(grads).sum(0), states


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pairs", [True, False])
def test_log_probabilities_gradients_and_features_are_those_of_each_text(
    model: nn.Module, side: str, pairs: bool
) -> None:
    rows = pair_batch(PAIRS, side)
    wanted, gradient, states = each_by_itself(model, rows)
    layers = feature_layers(model)
    for _ in range(2):  # nothing is left of the longest text
        found = completion_logps(model, **rows, pairs=pairs, features=layers)
        torch.testing.assert_close(found.logps, wanted, rtol=0, atol=2e-4)
        weight = model.get_input_embeddings().weight
        torch.testing.assert_close(
            torch.autograd.grad(found.logps.sum(), weight)[0], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max()
        )
    counts = rows["completion_mask"].sum(-1).tolist()
    last = [own[-count:-1].mean(0) for own, count in zip(states, counts, strict=True)]
    torch.testing.assert_close(found.features[:, -len(last[0]) :], torch.stack(last), rtol=1e-3, atol=1e-3)
    own = completion_states(model, **rows)
    for i, scored in enumerate(rows["completion_mask"].bool()):
        torch.testing.assert_close(own[i][scored], states[i][-counts[i] :], rtol=1e-3, atol=1e-3)


def test_short_texts_are_still_packed_and_have_the_same_numbers(model: nn.Module) -> None:
    rows = pair_batch([(3, 4, 2), (2, 10, 3)], "right")
    found = completion_logps(model, **rows, pairs=True).logps
    torch.testing.assert_close(found, each_by_itself(model, rows)[0], rtol=0, atol=2e-4)
    assert model._madpo_packs


def test_responses_are_those_of_recomputed_texts_and_others_are_refused(model: nn.Module) -> None:
    long = "longrope" in str(model.config.rope_parameters)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], *([[*range(3, 16)], [*range(20, 35)]] if long else [])]
    how = {"draw": 0, "seed": 0, "eos_token_ids": [-1], "temperature": 0.0}
    found = generate(model, prompts, keys=[*range(len(prompts))], max_new_tokens=5, **how)
    for prompt, ids in zip(prompts, found, strict=True):
        logits = copy.deepcopy(model)(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(chosen, logits.max(-1).values, rtol=0, atol=1e-3)
    with refused(ConfigError, type(model).__name__, "7 tokens", "max_new_tokens"):
        generate(model, prompts, keys=[*range(len(prompts))], max_new_tokens=6, **how)
