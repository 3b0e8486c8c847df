"""Attention of one packed row, and the masks it uses.

transformers lets a model's attention be replaced by name, together with the function that makes its masks
(``AttentionInterface``, ``AttentionMaskInterface``). Under the name :data:`NAME` a model asks for its masks as usual:
causal, sliding, chunked, each as a predicate of two positions. :func:`packed_mask` evaluates that predicate on the
positions of the tokens in their own rows, and :func:`packed_attention` applies the result, group by group. So the model
itself says which token may look at which, and a window longer than any text seen so far is right as well. Blocks in
which no token may look at another are left out: later tokens, and the other completion. On a processor a kernel takes
each block of queries with the keys that they need; on an accelerator FlexAttention takes long groups.

Whatever a model asks for beyond that raises ``NotImplementedError``: its rows are then padded.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from madpo.models.engine import devices
from madpo.models.engine.head import backbone
from madpo.models.engine.packing import PROMPT, Packing
from madpo.models.modes import around_checkpoints

NAME = "madpo_packed"
SHORT = 192
"""Longest group for which products of half-precision matrices and a softmax beat the fused kernel on a processor."""
QUERIES = 64
"""Side of the blocks of which a processor leaves out those without a pair of tokens that may look at one another."""
BLOCK = 128
"""The same for FlexAttention."""
FLEX = ("cuda", "xpu")
"""Kinds of devices with a fused kernel of FlexAttention and of its backward pass; elsewhere masks are dense."""
ATTENTION = "MADPO_ATTENTION"
"""Environment variable that chooses between ``flex`` and ``dense`` in place of the device."""
_HARMLESS = {
    *("is_causal", "sliding_window"),  # the mask says both
    *("position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "layer_idx"),
}
"""Arguments of attention functions that change nothing here; any other one that is not None is refused."""

_row: ContextVar[Packing | None] = ContextVar("packed row", default=None)


class PackedMask:
    """Which tokens of a packed row may look at which, for layers of one kind.

    Not a tensor: a model that computes with its masks must fail and not compute something else.

    Attributes:
        packing: the row.
        allowed: ``groups x 1 x longest x longest``.
    """

    def __init__(self, packing: Packing, function: Callable[..., Tensor]) -> None:
        position, branch = packing.position_ids[0][packing.slots], packing.branch[packing.slots]
        query, key = position[:, :, None], position[:, None, :]
        zero = position.new_zeros(1, 1, 1)
        asked = function(zero, zero, query, key).expand(-1, *query.shape[1:2], -1)
        seen = (branch[:, None, :] == PROMPT) | (branch[:, :, None] == branch[:, None, :])
        seen &= packing.filled[:, None, :]
        if packing.probes and bool((asked & seen & (key > query)).any()):
            raise NotImplementedError("its attention looks at later tokens")
        seen &= asked & (key <= query)
        # An empty slot looks at itself: a row without any key would be not a number.
        itself = torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
        self.packing = packing
        self.allowed: Bool[Tensor, "groups 1 longest longest"] = (seen | itself)[:, None]
        self._bias: dict[torch.dtype, Tensor] = {}
        self._biases: dict[torch.dtype, list[Tensor]] = {}

    def bias(self, dtype: torch.dtype) -> Tensor:
        """The same, as what is added to attention scores."""
        if dtype not in self._bias:
            self._bias[dtype] = _bias(self.allowed, dtype)
        return self._bias[dtype]

    @functools.cached_property
    def spans(self) -> list[tuple[slice, list[slice]]]:
        """Slots of each block of queries, and of the keys at which any of them may look."""
        longest = self.allowed.shape[-1]
        count = -(-longest // QUERIES)
        seen = F.pad(self.allowed.any(0)[0], (0, count * QUERIES - longest) * 2)
        seen = seen.view(count, QUERIES, count, QUERIES).any(3).any(1)
        places = [slice(start, min(start + QUERIES, longest)) for start in range(0, longest, QUERIES)]
        found: list[tuple[slice, list[slice]]] = []
        for queries, looks in zip(places, seen.tolist(), strict=True):
            keys: list[slice] = []
            for block in itertools.compress(places, looks):
                start = keys.pop().start if keys and keys[-1].stop == block.start else block.start
                keys.append(slice(start, block.stop))
            found.append((queries, keys))
        return found

    def biases(self, dtype: torch.dtype) -> list[Tensor]:
        """What is added to the scores of each of the :attr:`spans`."""
        if dtype not in self._biases:
            cut = (_cut(self.allowed[:, :, queries].transpose(2, 3), keys) for queries, keys in self.spans)
            self._biases[dtype] = [_bias(allowed.transpose(2, 3), dtype) for allowed in cut]
        return self._biases[dtype]

    @functools.cached_property
    def blocks(self) -> BlockMask:
        """The same, in blocks."""
        allowed = self.allowed[:, 0]

        def looks(group: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return allowed[group, query, key]

        groups, longest, _ = allowed.shape
        return create_block_mask(looks, groups, None, longest, longest, allowed.device, BLOCK)


def packed_mask(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], **rest: Any
) -> PackedMask:
    """Masks of the row that :func:`packed_row` announced. Registered with transformers."""
    packing = _row.get()
    if packing is None or (batch_size, q_length, kv_length) != (1, *2 * packing.input_ids.shape[1:]):
        raise NotImplementedError("packed masks are those of one packed row")
    if rest.get("use_vmap"):
        raise NotImplementedError("its attention mask depends on more than positions")
    return PackedMask(packing, mask_function)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, group by group. Registered with transformers.

    Args:
        attention_mask: a :class:`PackedMask`.
        s_aux: attention sinks, one logit per head that takes part in the softmax and has no value.

    Raises:
        NotImplementedError: the model asks for something else.
    """
    unknown = sorted(name for name, given in rest.items() if given is not None and name not in _HARMLESS)
    if unknown:
        raise NotImplementedError(f"its attention takes {', '.join(unknown)}")
    if not isinstance(attention_mask, PackedMask):
        raise NotImplementedError("its attention does not use the masks of transformers")
    if (
        "arange" in inspect.unwrap(type(module).forward).__code__.co_names
    ):  # Llama 4 scales queries, from token 8,192 on
        raise NotImplementedError("its attention counts tokens by their index")
    mask, packing = attention_mask, attention_mask.packing
    packing.attended += 1
    q, k, v = (packing.split(states) for states in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    longest, groups = q.shape[2], q.shape[1] // k.shape[1]
    kernel = os.environ.get(ATTENTION, "flex" if devices.kind(q) in FLEX else "dense")
    if longest > BLOCK and kernel == "flex" and not (dropout or packing.probes):
        return packing.join(_flex_attention(q, k, v, mask.blocks, scale, softcap, s_aux).transpose(1, 2)), None
    plain = softcap is None and s_aux is None and not (dropout or packing.probes)
    if plain and devices.kind(q) == "cpu" and q.shape[-1] == v.shape[-1]:
        if v.dtype.itemsize < 4 and longest <= SHORT:
            out = _ShortAttention.apply(q, k, v, mask.bias(_wide(q)), scale)  # type: ignore[no-untyped-call]
        else:
            out = _BlockAttention.apply(*_alike(q, k, v), mask, scale)  # type: ignore[no-untyped-call]
        return packing.join(out.transpose(1, 2)), None
    if softcap is None:
        allowed = mask.allowed
        if s_aux is not None:
            q, k, v, allowed = _with_sinks(q, k, v, allowed, s_aux, scale)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=dropout, scale=scale, enable_gqa=groups > 1
        )
        return packing.join(out.transpose(1, 2)), None
    scores = torch.tanh(_scores(q, k, scale) / softcap) * softcap
    scores = scores.view(*q.shape[:3], longest) + mask.bias(scores.dtype)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = F.dropout(scores.softmax(-1)[..., :longest].to(v.dtype), dropout, training=dropout > 0)
    out = _folded(weights, k.shape[1]) @ _folded(v, k.shape[1])
    return packing.join(out.view(*q.shape[:3], -1).transpose(1, 2)), None


def _flex_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention by FlexAttention. A sink takes its share of each query's softmax away: sigmoid(logsumexp - sink)."""
    cap = softcap or 1.0

    def capped(score: Tensor, group: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    out: Tensor
    out, aux = _compiled_flex(q.device.type)(
        *(q, k, v, None if softcap is None else capped, blocks, scale),
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is not None:
        out = out * torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])[..., None].to(out.dtype)
    return out


@functools.cache
def _compiled_flex(device: str) -> Callable[..., Any]:
    """Compiled once for all lengths; on a processor, where torch fails at that, once for each."""
    return torch.compile(flex_attention, dynamic=device in FLEX)


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, sinks: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One more key without a value, at which every token looks: its score is the sink of the query's head.

    Queries carry sink / scale in one more dimension, in which that key is 1 and every other one 0. So fused kernels
    compute sinks and their gradients; seven empty dimensions keep the alignment that those kernels need.
    """
    own = (sinks.to(_wide(q)) / scale).to(q.dtype).view(1, -1, 1, 1).expand(*q.shape[:3], 1)
    extra = k.new_zeros(*k.shape[:2], 1, k.shape[-1] + 8)
    extra[..., k.shape[-1]] = 1
    q = torch.cat([q, own, q.new_zeros(*q.shape[:3], 7)], dim=-1)
    return q, torch.cat([F.pad(k, (0, 8)), extra], dim=2), F.pad(v, (0, 0, 0, 1)), F.pad(allowed, (0, 1), value=True)


def _wide(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _folded(states: Tensor, key_heads: int) -> Tensor:
    """Query heads that share a key head, laid under one another: one product per group and key head."""
    groups, _, _, width = states.shape
    return states.reshape(groups * key_heads, -1, width)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention scores in float32: rounded to bfloat16 they would be 2 % off where they matter."""
    with torch.autocast(q.device.type, enabled=False):
        wide, heads = _wide(q), k.shape[1]
        return (_folded(q, heads).to(wide) @ _folded(k, heads).to(wide).transpose(1, 2)).mul_(scale)


def _bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill_(~allowed, torch.finfo(dtype).min)


def _cut(states: Tensor, spans: list[slice]) -> Tensor:
    """These slots of ``groups x heads x slots x width``; one span is a view."""
    cut = [states[:, :, span] for span in spans]
    return cut[0] if len(cut) == 1 else torch.cat(cut, dim=2)


def _alike(*states: Tensor) -> list[Tensor]:
    """In one precision: autocast's, which knows nothing of the kernel, or the widest."""
    kind = states[0].device.type
    if torch.is_autocast_enabled(kind):
        return [x.to(torch.get_autocast_dtype(kind)) for x in states]
    wide = functools.reduce(torch.promote_types, (x.dtype for x in states))
    return [x.to(wide) for x in states]


class _BlockAttention(torch.autograd.Function):
    """A processor's fused attention kernel, block of queries by block, each with the keys that it needs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: PackedMask, scale: float) -> Tensor:
        parts = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, queries], _cut(k, keys), _cut(v, keys), attn_mask=bias, scale=scale
            )
            for (queries, keys), bias in zip(mask.spans, mask.biases(q.dtype), strict=True)
        ]
        outs, totals = zip(*parts, strict=True)
        groups, heads, longest, width = q.shape
        place = devices.memory_for(q, groups, longest, heads, width)
        out = torch.cat([part.transpose(1, 2) for part in outs], dim=1, out=place).transpose(1, 2)
        ctx.mask, ctx.scale = mask, scale
        ctx.save_for_backward(q, k, v, out, *totals)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *totals = ctx.saved_tensors
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, keys), bias, total in zip(ctx.mask.spans, ctx.mask.biases(q.dtype), totals, strict=True):
            given, asking, gave = (x[:, :, queries] for x in (grad, q, out))
            of_q, *of_keys = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(given, asking, _cut(k, keys), _cut(v, keys), gave, total, 0.0, False),
                attn_mask=bias,
                scale=ctx.scale,
            )
            d_q[:, :, queries] = of_q
            for whole, found in zip((d_k, d_v), of_keys, strict=True):
                for span, part in zip(keys, found.split([span.stop - span.start for span in keys], 2), strict=True):
                    whole[:, :, span] += part
        return d_q, d_k, d_v, None, None


class _ShortAttention(torch.autograd.Function):
    """softmax(scale q k^T + bias) v that keeps its inputs and the weights in their own precision."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            scores = _scores(q, k, scale).view(*q.shape[:3], -1).add_(bias)
            weights = scores.softmax(-1).to(v.dtype)
            out = _folded(weights, k.shape[1]) @ _folded(v, k.shape[1])
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, weights)
        return out.view(*q.shape[:3], v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        heads = k.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            grad, weights = _folded(grad.to(v.dtype), heads), _folded(weights, heads)
            d_v = weights.transpose(1, 2) @ grad
            d_weights = (grad @ _folded(v, heads).transpose(1, 2)).to(_wide(q))
            wide = weights.to(d_weights.dtype)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, wide, -1, wide.dtype)
            d_scores = d_scores.mul_(ctx.scale).to(q.dtype)
            d_q = d_scores @ _folded(k, heads)
            d_k = d_scores.transpose(1, 2) @ _folded(q, heads)
        return d_q.view(q.shape), d_k.view(k.shape), d_v.view(v.shape), None, None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)


@contextmanager
def packed_row(model: nn.Module, packing: Packing) -> Iterator[None]:
    """Switch the model's attention and masks to those of one packed row.

    Layers whose activations are checkpointed run again in backward, when this context is over: they enter it anew.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]

    @contextmanager
    def switched(_: nn.Module) -> Iterator[None]:
        before = config._attn_implementation
        config._attn_implementation = NAME
        token = _row.set(packing)
        try:
            yield
        finally:
            _row.reset(token)
            config._attn_implementation = before

    with switched(model), around_checkpoints(model, switched):
        yield


@contextmanager
def _noise_of_rows(model: nn.Module, packing: Packing) -> Iterator[None]:
    """Let NEFTune draw noise of the size that padded rows get: alpha / sqrt(length x hidden), by the rows' length."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    alpha = getattr(embedding, "neftune_noise_alpha", None)
    if alpha is None:
        yield
        return
    embedding.neftune_noise_alpha = alpha * (packing.input_ids.shape[1] / packing.scored.shape[1]) ** 0.5
    try:
        yield
    finally:
        embedding.neftune_noise_alpha = alpha


def row_states(model: nn.Module, packing: Packing) -> Tensor:
    """States after the last norm of all tokens of a packed row, ``1 x tokens x hidden``."""
    with packed_row(model, packing), _noise_of_rows(model, packing):
        # A mask of ones: without any, transformers looks for packed rows in jumps of the positions.
        states: Tensor = backbone(model)(
            input_ids=packing.input_ids,
            position_ids=packing.position_ids,
            attention_mask=torch.ones_like(packing.input_ids),
            use_cache=False,
        ).last_hidden_state
    return states
