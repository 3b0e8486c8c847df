"""The growing cache holds what the layers of transformers hold, without copying it at every token."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from madpo.models.engine import kv_cache
from madpo.models.engine.kv_cache import growing_cache


@functools.cache
def gemma(window):
    shape = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 4}
    kinds = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        "gemma3_text",
        **shape,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
        layer_types=kinds,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


# A number of new tokens (the first is the prompt), or how many rows stay.
events = st.lists(st.one_of(st.integers(1, 3), st.sampled_from(["rows"])), max_size=25)


@given(window=st.integers(2, 9), prompt=st.integers(1, 12), then=events, room=st.integers(1, 5))
def test_every_update_gives_what_transformers_gives(window, prompt, then, room):
    sliding, full = growing_cache(gemma(window)).layers
    pairs = [(sliding, DynamicSlidingWindowLayer(window)), (full, DynamicLayer())]
    draw, rows = torch.Generator().manual_seed(0), 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "ROOM", room)
        for event in [prompt, *then]:
            if event == "rows":
                kept = torch.arange(0, rows, 2)
                rows = len(kept)
                for pair in pairs:
                    for layer in pair:
                        layer.batch_select_indices(kept)
                continue
            keys, values = torch.randn(2, rows, 3, event, 5, generator=draw)
            for ours, theirs in pairs:
                assert ours.get_mask_sizes(event) == theirs.get_mask_sizes(event)
                for found, expected in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
                    assert torch.equal(found, expected)
                assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("layer", [0, 1], ids=["sliding", "full"])
def test_a_token_is_written_behind_the_others_and_nothing_is_copied(layer):
    layer = growing_cache(gemma(window=500)).layers[layer]
    layer.update(*torch.randn(2, 2, 1, 20, 4))
    where = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(kv_cache.ROOM):
        layer.update(*torch.randn(2, 2, 1, 1, 4))
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == where
    layer.update(*torch.randn(2, 2, 1, 1, 4))
    assert layer.keys.data_ptr() != where[0]
    assert layer.keys.shape[-2] == 21 + kv_cache.ROOM


def test_room_grows_with_what_is_held_so_that_copies_stay_few():
    layer = growing_cache(gemma(window=5)).layers[1]
    layer.update(*torch.zeros(2, 1, 1, 1, 4))
    capacities = set()
    for _ in range(2000):
        layer.update(*torch.zeros(2, 1, 1, 1, 4))
        capacities.add(layer._grown[0].buffer.shape[-2])
    assert len(capacities) <= 12


def test_rows_that_left_free_their_memory():
    layer = growing_cache(gemma(window=5)).layers[1]
    layer.update(*torch.randn(2, 8, 1, 30, 4))
    layer.batch_select_indices(torch.tensor([1, 6]))
    layer.update(*torch.randn(2, 2, 1, 1, 4))
    assert layer.keys.untyped_storage().nbytes() == 2 * (31 + kv_cache.ROOM) * 4 * layer.keys.element_size()
