"""Features of responses: states of several decoder layers, averaged over each response's tokens.

They come with a forward pass that computes log-probabilities and cost one small matrix product a layer. The mean is
over the response's own tokens but its last, whose state no log-probability needs; a response of one token is read at
the token before it. Sums are in float32 or wider.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from madpo.models.engine.dependence import sharded
from madpo.models.engine.head import backbone
from madpo.models.modes import evaluating

POOLING = "mean of all but the last"
"""Name of the average, for identities."""
LAYERS = 10
WIDTH = 8192
"""Features of a response at most: wide models give fewer layers."""


def feature_layers(model: nn.Module) -> tuple[int, ...]:
    """Numbers of up to ten decoder layers, evenly spread from the first to the last, counted from 1.

    The last one is read after the final norm. It is the only one where others cannot be read.

    Args:
        model: a transformers model, without wrappers.
    """
    config, blocks = _config(model), _layers(model)
    depth = int(config.num_hidden_layers)
    count = max(1, min(LAYERS, depth, WIDTH // config.hidden_size))
    spread = tuple(round(depth * (i + 1) / count) for i in range(count))
    if blocks is None or not (sharded(model) or _readable(model, blocks)):
        return (depth,)
    return spread


def _readable(model: nn.Module, blocks: nn.ModuleList) -> bool:
    """Whether every layer gives one state per token, tried on a few tokens: some keep several streams of states."""
    shapes: list[bool] = []
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=next(model.parameters()).device)

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        states = _first(output)
        shapes.append(isinstance(states, Tensor) and states.shape[:-1] == ids.shape)

    hooks = [block.register_forward_hook(look) for block in blocks]
    try:
        with torch.no_grad(), evaluating(model):
            backbone(model)(input_ids=ids, attention_mask=None, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return len(shapes) == len(blocks) and all(shapes)


def _first(output: Any) -> Any:
    return output if isinstance(output, Tensor) else output[0]


def feature_width(model: nn.Module, layers: Sequence[int]) -> int:
    """Features of a response."""
    config = _config(model)
    last: Any = getattr(model.get_output_embeddings(), "in_features", config.hidden_size)  # type: ignore[operator]
    return (len(layers) - 1) * int(config.hidden_size) + int(last)


def _config(model: nn.Module) -> Any:
    return model.config.get_text_config()  # type: ignore[operator, union-attr]


def _layers(model: nn.Module) -> nn.ModuleList | None:
    depth = _config(model).num_hidden_layers
    lists = (m for m in backbone(model).modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return next(lists, None)


class LayerMeans:
    """Gathers features while a backbone runs.

    Args:
        model: a transformers model, without wrappers.
        layers: as :func:`feature_layers` gives them; none gathers nothing.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        self.model, self.layers = model, tuple(layers)
        self._found: dict[int, Tensor] = {}

    def features(self) -> Float[Tensor, "rows features"] | None:
        """Layer after layer, detached; None without layers."""
        return torch.cat([self._found[layer] for layer in self.layers], dim=1) if self.layers else None

    def take(self, parts: Sequence[LayerMeans], order: Tensor) -> None:
        """Gather what several runs of some rows each have gathered; ``order`` is that of the rows in all of them."""
        self._found = {layer: torch.cat([part._found[layer] for part in parts])[order] for layer in self.layers}

    @contextmanager
    def running(self, weights: Float[Tensor, "rows tokens"] | None) -> Iterator[None]:
        """The context in which the backbone runs; ``weights`` of each of its tokens in a row's mean."""
        if weights is None or not self.layers:
            yield
            return
        last, blocks = int(_config(self.model).num_hidden_layers), _layers(self.model)
        places: dict[int, nn.Module] = {last: backbone(self.model)}
        places |= {n: blocks[n - 1] for n in self.layers if blocks is not None and n != last}
        hooks = [places[n].register_forward_hook(functools.partial(self._read, n, weights)) for n in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _read(self, layer: int, weights: Tensor, module: nn.Module, inputs: Any, output: Any) -> None:
        states = _first(output)
        with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
            wide = states.detach().to(torch.promote_types(states.dtype, torch.float32))
            own = weights.to(device=wide.device, dtype=wide.dtype)
            # One packed row holds the tokens of all rows.
            mean = own @ wide[0] if len(wide) == 1 else torch.bmm(own[:, None], wide)[:, 0]
            self._found[layer] = mean.to(weights.device)


def padded_weights(scored: Bool[Tensor, "rows places"]) -> Float[Tensor, "rows length"]:
    """Weights of the tokens of padded rows.

    Args:
        scored: whether the token **after** each place is one of the response; the last token of a row has no place.
    """
    first = scored & (scored.cumsum(1) == 1)  # the end of the prompt, which says nothing of the response
    read = scored & ~(first & (scored.sum(1, keepdim=True) > 1))
    weights = read.float() / read.sum(1, keepdim=True).clamp(min=1)
    return nn.functional.pad(weights, (0, 1))


def packed_weights(
    scored: Bool[Tensor, "rows places"], predictors: Int[Tensor, " scored"], tokens: int
) -> Float[Tensor, "rows tokens"]:
    """The same for the tokens of one packed row.

    Args:
        predictors: packed index of each place in ``scored``, row after row.
    """
    weights = padded_weights(scored)
    packed = weights.new_zeros(len(scored), tokens)
    packed[scored.nonzero()[:, 0], predictors] = weights[:, :-1][scored]
    return packed
