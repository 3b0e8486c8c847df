"""A cache of keys and values that grows in place.

The dynamic layers of transformers copy all that they hold at every token, in every layer: of a completion of n tokens,
n squared. Here the new token is written behind the others, into room that is made ahead of it.
"""

from __future__ import annotations

import inspect

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from madpo.core.errors import ConfigError
from madpo.models.engine.head import backbone

ROOM = 64
"""Tokens for which a layer makes room at least, ahead of their coming."""


class _Growing:
    """Tensors along the second last axis, the last ``held`` positions of a buffer with room behind them."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.end = 0

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """``held`` with ``new`` behind it, a view. Nothing is copied where ``held`` is the end of what the last call
        returned, and there is room.
        """
        length = held.shape[-2] if held.numel() else 0  # a layer without tokens holds a tensor without axes
        own = self.buffer is not None and held.untyped_storage().data_ptr() == self.buffer.untyped_storage().data_ptr()
        if self.buffer is None or not own or self.end + new.shape[-2] > self.buffer.shape[-2]:
            room = max(ROOM, length // 2)
            self.buffer = new.new_empty((*new.shape[:-2], length + new.shape[-2] + room, new.shape[-1]))
            if length:
                self.buffer[..., :length, :] = held
            self.end = length
        begin, self.end = self.end - length, self.end + new.shape[-2]
        self.buffer[..., self.end - new.shape[-2] : self.end, :] = new
        return self.buffer[..., begin : self.end, :]


class _InPlace:
    """What both kinds of layers override in those of transformers."""

    keys: Tensor
    values: Tensor

    def _both(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:  # type: ignore[attr-defined]
            self.lazy_initialization(keys, values)  # type: ignore[attr-defined]
            self._grown = _Growing(), _Growing()
        return self._grown[0].append(self.keys, keys), self._grown[1].append(self.values, values)


class _InPlaceLayer(_InPlace, DynamicLayer):  # type: ignore[misc]
    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._both(keys, values)
        return self.keys, self.values


class _InPlaceSlidingLayer(_InPlace, DynamicSlidingWindowLayer):  # type: ignore[misc]
    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.cumulative_length += keys.shape[-2]
        keys, values = self._both(keys, values)
        # What the next token still sees; this one's queries see all that is returned, through their mask.
        self.keys, self.values = (x[:, :, -self.sliding_window + 1 :] for x in (keys, values))
        return keys, values


def growing_cache(model: nn.Module) -> DynamicCache:
    """An empty cache, for a model that will use it.

    Raises:
        ConfigError: the model keeps another state. A recurrent state cannot be padded on the left, and a model that
            knows no ``cache`` would take the argument without a word and see one token at a time.
    """
    cache = DynamicCache(config=model.config)
    takes = "cache" in inspect.signature(backbone(model).forward).parameters
    kinds = {type(layer) for layer in cache.layers}
    if not takes or kinds - {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}:
        raise ConfigError(
            f"{type(model).__name__} keeps a state that is not attention over a cache, so responses cannot be sampled "
            "from it in batches; use a transformer, with transformers 5.24 or later"
        )
    for i, layer in enumerate(cache.layers):  # a dummy holds nothing: its layer reads what another one holds
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[i] = _InPlaceSlidingLayer(layer.sliding_window)
        elif isinstance(layer, DynamicLayer):
            cache.layers[i] = _InPlaceLayer()
    return cache
