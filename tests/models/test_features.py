"""Features of responses: the right tokens of the right layers, in any padding, packed or not."""

import pytest
import torch

from engine_cases import PAIRS, build, pair_batch
from madpo.models.engine.features import feature_layers, feature_width
from madpo.models.engine.logprobs import completion_features, completion_logps

FAMILIES = ["gemma3", "llama", "gpt2"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build(request.param)


def by_hand(model, rows, layers):
    """Row after row, without padding, by transformers' own hidden states."""
    found = []
    for ids, mask, completion in zip(
        *(rows[n] for n in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        own, inside = ids[mask.bool()], completion[mask.bool()].bool()
        states = model(input_ids=own[None], output_hidden_states=True).hidden_states
        scored = inside.nonzero().flatten()
        scored = scored[scored > 0]
        places = scored[:-1] if len(scored) > 1 else scored - 1
        found.append(torch.cat([states[n][0, places].sum(0) / max(1, len(places)) for n in layers]))
    return torch.stack(found)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("unshared", [(), (0, 3)])
def test_features_are_means_over_the_own_tokens(model, side, pairs, unshared):
    rows = pair_batch(PAIRS, side, unshared=unshared)
    layers = feature_layers(model)
    assert layers == tuple(range(1, model.config.num_hidden_layers + 1))
    with torch.no_grad():
        plain = completion_logps(model, **rows, pairs=pairs)
        scores = completion_logps(model, **rows, pairs=pairs, features=layers)
        expected = by_hand(model, rows, layers)
        again = completion_features(model, **rows, layers=layers, pairs=pairs)
    assert scores.features.shape[1] == feature_width(model, layers)
    torch.testing.assert_close(scores.features, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert scores.features.equal(again)
    assert scores.logps.equal(plain.logps), "log-probabilities keep their bits"
    assert plain.features is None


def test_layers_are_spread_and_few_where_states_are_wide(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(model.config, "num_hidden_layers", 24)
    monkeypatch.setattr("madpo.models.engine.features._layers", lambda model: [])
    monkeypatch.setattr("madpo.models.engine.features._readable", lambda model, blocks: True)
    assert feature_layers(model) == (2, 5, 7, 10, 12, 14, 17, 19, 22, 24)
    monkeypatch.setattr(model.config, "hidden_size", 4096)
    assert feature_layers(model) == (12, 24)
    monkeypatch.setattr("madpo.models.engine.features._readable", lambda model, blocks: False)
    assert feature_layers(model) == (24,)
