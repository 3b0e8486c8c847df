"""Rotary positions whose frequencies follow the length of the text: dynamic NTK, and LongRoPE (Phi-3 and Phi-4).

transformers takes them from the longest row of a batch, and with dynamic NTK from the longest text so far. So a text's
numbers would depend on its neighbours, and policy and reference would see it differently. Rows of like frequencies are
therefore computed together, each time from the frequencies of the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Turning(NamedTuple):
    """Frequencies of a module that change with the length.

    Attributes:
        prefix: of the names of its buffers.
        limit: tokens of the longest text with the frequencies of the start.
        dynamic: every longer length has its own; otherwise all of them have the same.
    """

    module: Any
    prefix: str
    limit: int
    dynamic: bool


def _turning(model: nn.Module) -> Iterator[_Turning]:
    module: Any
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            prefix = "" if layer is None else f"{layer}_"
            if kind == "longrope":
                settings = module.config.rope_parameters
                settings = settings if layer is None else settings[layer]
                yield _Turning(module, prefix, int(settings["original_max_position_embeddings"]), False)
            elif "dynamic" in (kind or ""):
                yield _Turning(module, prefix, int(module.original_max_seq_len), True)


def rope_keys(model: nn.Module, lengths: Tensor) -> Tensor | None:
    """One number a text, the same for texts with the same frequencies, 0 for those of the start; None where the model
    has no others. Frequencies that an earlier text has left are forgotten.

    Args:
        model: of transformers, without wrappers.
        lengths: tokens of each text.
    """
    if not hasattr(model, "_madpo_turning"):
        model._madpo_turning = list(_turning(model))  # type: ignore[assignment]
    keys = None
    for module, prefix, limit, dynamic in model._madpo_turning:  # type: ignore[union-attr]
        longer = (lengths - limit).clamp(min=0, max=None if dynamic else 1)
        keys = longer if keys is None else keys + longer  # each grows with the length, so equal sums have equal parts
        if dynamic:
            getattr(module, f"{prefix}inv_freq").copy_(getattr(module, f"{prefix}original_inv_freq"))
            setattr(module, f"{prefix}max_seq_len_cached", limit)
    return keys


def rope_groups(keys: Tensor) -> list[Tensor]:
    """Indices of the texts of each key."""
    return [torch.nonzero(keys == key).squeeze(1) for key in torch.unique(keys)]
