"""How a processor computes with a model whose weights do not change: sampling and scoring."""

from __future__ import annotations

import sys
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ROWS = {torch.float32: range(2, sys.maxsize), torch.bfloat16: range(1, 257)}
"""Rows of a product that is faster with a packed weight, in each precision that is packed."""
WORTH = 2_048
"""Tokens from which the products gain more time than packing takes."""
SHARE = 8
"""A model is packed if its weights take at most this part of the machine's memory, so that a copy decides no run."""
THIN = 64
"""Weights with a shorter side, as an adapter's, stay as they are."""


class Inference(TorchFunctionMode):
    """The mode of such computations. Nothing of a model is changed, and copies of weights end with the mode.

    - Linear layers multiply with copies of their weights, packed once in the layout of oneDNN's kernels. Otherwise a
      library lays a weight out anew at each product, which costs as much as the product of a few rows.
    - Query heads that share a key head lie under one another, as queries of one head, when one new token attends to a
      cache. The fused kernel walks over the keys once for each head that it is given.

    Args:
        models: whose weights may be packed; without an update of them inside the mode.
        tokens: how many the models will read; fewer than :data:`WORTH` are not worth a copy.
    """

    def __init__(self, *models: nn.Module, tokens: int = 0) -> None:
        super().__init__()
        self._weights = {id(weight): weight for model in models for weight in model.parameters()}
        fits = sum(weight.nbytes for weight in self._weights.values()) * SHARE <= psutil.virtual_memory().total
        packs = fits and tokens >= WORTH and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        keys = (key for key, weight in self._weights.items() if packs and _packable(weight))
        self._copies: dict[int, Tensor | None] = dict.fromkeys(keys)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and id(args[1]) in self._copies and self._faster(*args[:2]):
            return self._product(*args)
        if func is F.scaled_dot_product_attention and kwargs.get("enable_gqa") and kwargs.get("attn_mask") is None:
            query, key, value = args
            if query.shape[2] == 1 and not (query.is_cuda or kwargs.get("is_causal")):
                folded = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
                out: Tensor = func(folded, key, value, **{**kwargs, "enable_gqa": False})
                return out.reshape(*query.shape[:3], -1)
        return func(*args, **kwargs)

    @staticmethod
    def _faster(x: Tensor, weight: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or x.dtype != weight.dtype:
            return False
        return x.numel() // weight.shape[1] in ROWS[x.dtype]

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b, the weight packed at its first product: a model may have parts that nobody calls."""
        packed = self._copies[id(weight)]
        if packed is None:
            packed = self._copies[id(weight)] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return y


def _packable(weight: Tensor) -> bool:
    """A dense matrix on a processor that multiplies its precision; neither sharded nor quantised nor on paper."""
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dim() == 2
        and min(weight.shape) >= THIN
        and weight.dtype in ROWS
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
