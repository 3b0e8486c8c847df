"""One prompt, two completions: the tokens of a batch of pairs, each computed once, without padding.

The rows of a preference batch hold every prompt twice and padding behind every shorter row. Here the tokens that
matter are laid end to end in one row: the prompt, then the chosen completion, then the rejected one, pair after pair.
Every linear layer and norm then works on real tokens alone. In attention a token sees its own prompt and its own
completion, by position and not by index, so that sliding windows are right as well. The last token of a completion
predicts nothing and is left out, unless the states of the tokens themselves are wanted, as reward models want them.

The model is not changed: its attention is switched to :func:`packed_attention` for the time of one call, through
transformers' registry of attention functions. Architectures that do not go through it (recurrent layers, ALiBi, own
attention code) keep their padded rows: :func:`packs` finds out by computing a few pairs both ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface

from madpo.models.modes import evaluating

NAME = "madpo_packed"
SHORT = 192
"""Longest group for which two matrix products and a softmax beat the fused attention kernel on a processor."""
PROMPT, FIRST, SECOND = 0, 1, 2


@dataclass
class Packing:
    """Where each token of a batch of rows lies in one packed row.

    A group is a set of tokens that may see one another: a prompt and its two completions, or one row alone.

    Attributes:
        input_ids, position_ids: the packed row.
        branch: whether a token belongs to the prompt or to the first or second completion of its group.
        slots: packed index of the j-th token of each group (0 where the group is shorter), ``groups x longest``.
        filled: whether a slot holds a token.
        places: position of each packed token in the flattened slots; None where every slot is filled.
        predictors: packed index of the token that predicts each scored token, in row order; of that token itself
            where nothing is predicted.
        fused: take the fused attention kernel even for short groups: it rounds as the kernel of padded rows does.
        windows: the sliding windows that attention asked for, None for layers without one.
    """

    input_ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    branch: Int[Tensor, " tokens"]
    slots: Int[Tensor, "groups longest"]
    filled: Bool[Tensor, "groups longest"]
    places: Int[Tensor, " tokens"] | None
    predictors: Int[Tensor, " scored"]
    labels: Int[Tensor, " scored"]
    scored: Bool[Tensor, "rows length"]
    fused: bool = False
    windows: set[int | None] = field(default_factory=set)
    _allowed: dict[int | None, Tensor] = field(default_factory=dict)
    _bias: dict[int | None, Tensor] = field(default_factory=dict)

    def allowed(self, window: int | None) -> Bool[Tensor, "groups 1 longest longest"]:
        """Which token may look at which: its prompt and its own completion, behind it, inside the window."""
        self.windows.add(window)
        if window not in self._allowed:
            position, branch = self.position_ids[0][self.slots], self.branch[self.slots]
            apart = position[:, :, None] - position[:, None, :]
            seen = (branch[:, None, :] == PROMPT) | (branch[:, :, None] == branch[:, None, :])
            seen &= (apart >= 0) & self.filled[:, None, :]
            if window is not None:
                seen &= apart < window
            # An empty slot looks at itself: a row without any key would be not a number.
            itself = torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
            self._allowed[window] = (seen | itself)[:, None]
        return self._allowed[window]

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """The same, as what is added to attention scores."""
        if window not in self._bias:
            allowed = self.allowed(window)
            self._bias[window] = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
                ~allowed, torch.finfo(dtype).min
            )
        return self._bias[window]

    def split(self, states: Tensor) -> Tensor:
        """``1 x heads x tokens x width`` to ``groups x heads x longest x width``."""
        heads, _, width = states.shape[1:]
        if self.places is None:
            return states[0].view(heads, *self.slots.shape, width).transpose(0, 1)
        return states[0].index_select(1, self.slots.flatten()).view(heads, *self.slots.shape, width).transpose(0, 1)

    def join(self, states: Tensor) -> Tensor:
        """``groups x longest x heads x width`` to ``1 x tokens x heads x width``."""
        flat = states.reshape(-1, *states.shape[2:])
        return (flat if self.places is None else flat.index_select(0, self.places))[None]


def pack(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, *, predict: bool = True) -> Packing:
    """Lay the tokens of a batch of pairs end to end.

    Args:
        input_ids, attention_mask, completion_mask: ``rows x length``, padded on either side. The first half of the
            rows are the chosen completions, the second half the rejected ones. A prompt is shared where both rows of a
            pair have the same prompt tokens.
        predict: the states before the scored tokens are wanted, which predict them, so that a row's last token is left
            out; otherwise the states of the scored tokens themselves.
    """
    rows, length = input_ids.shape
    attended = attention_mask.bool()
    order = (~attended).to(torch.int8).argsort(dim=1, stable=True)  # real tokens to the front, in their order
    ids, attended = input_ids.gather(1, order), attended.gather(1, order)
    scored = completion_mask.bool().gather(1, order) & attended
    prompt = attended & (scored.cumsum(1) == 0)
    if predict:
        scored[:, 0] = False
    steps = torch.arange(length, device=ids.device)
    # The state of a row's last scored token predicts nothing, and what follows it is read by none.
    last = (scored * steps).amax(1, keepdim=True)
    needed = prompt | (attended & (steps < last if predict else steps <= last))
    needed[:, 0] |= attended[:, 0]
    half = rows // 2
    first, second = prompt[:half], prompt[half:]
    same = (first == second).all(1) & ((ids[:half] == ids[half:]) | ~first).all(1) & first.any(1)
    shared = torch.cat([torch.zeros_like(same), same])
    kept = needed & ~(prompt & shared[:, None])
    branch = torch.cat([torch.where(first, PROMPT, FIRST), torch.where(second, PROMPT, SECOND)])
    interleaved = torch.arange(rows, device=ids.device).view(2, half).T.flatten()

    # Packed indices, counted pair by pair; a rejected row finds its prompt in the chosen one.
    ordered = kept[interleaved]
    counted = (ordered.flatten().cumsum(0) - 1).view(rows, length)
    index = torch.empty_like(counted)
    index[interleaved] = counted
    index[half:] = torch.where(second & same[:, None], index[:half], index[half:])
    group = (~shared[interleaved]).cumsum(0) - 1
    token_group = group[:, None].expand(rows, length)[ordered]
    sizes = torch.bincount(token_group)
    starts = sizes.cumsum(0) - sizes
    longest = int(sizes.max())
    slots = starts[:, None] + torch.arange(longest, device=ids.device)
    filled = slots < (starts + sizes)[:, None]
    places = None
    if not bool(filled.all()):
        inside = torch.arange(len(token_group), device=ids.device) - starts[token_group]
        places = token_group * longest + inside

    def flat(values: Tensor) -> Tensor:
        return values[interleaved][ordered]

    ahead = int(predict)
    read = scored[:, ahead:]
    placed = torch.zeros_like(attended).scatter(1, order, scored)  # back where the caller's rows have them
    return Packing(
        input_ids=flat(ids)[None],
        position_ids=flat(steps.expand(rows, length))[None],
        branch=flat(branch),
        slots=torch.where(filled, slots, 0),
        filled=filled,
        places=places,
        predictors=index[:, : length - ahead][read],
        labels=ids[:, ahead:][read],
        scored=placed,
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packing: Packing | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, group by group. Registered with transformers; see :func:`pack`."""
    if packing is None or query.shape[0] != 1:
        raise NotImplementedError("packed attention takes one packed row and its packing")
    q, k, v = (packing.split(states) for states in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    longest = q.shape[2]
    if softcap is None and (q.device.type != "cpu" or longest > SHORT or packing.fused):
        allowed = packing.allowed(sliding_window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return packing.join(out.transpose(1, 2)), None
    if softcap is None and not dropout:
        out = _ShortAttention.apply(q, k, v, packing.bias(sliding_window, _wide(q)), scale)  # type: ignore[no-untyped-call]
        return packing.join(out.transpose(1, 2)), None
    scores = _scores(q, k, scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(*q.shape[:3], longest) + packing.bias(sliding_window, scores.dtype)
    weights = F.dropout(scores.softmax(-1).to(v.dtype), dropout, training=dropout > 0)
    out = weights.view(-1, q.shape[1] // k.shape[1] * longest, longest) @ v.reshape(-1, longest, v.shape[-1])
    return packing.join(out.view(*q.shape[:3], -1).transpose(1, 2)), None


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


@contextmanager
def _attention_switched(model: nn.Module) -> Iterator[None]:
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    before = config._attn_implementation
    config._attn_implementation = NAME  # unknown to transformers' mask functions, so that no mask is built
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def _recomputed_alike(model: nn.Module) -> Iterator[None]:
    """Let layers whose activations are checkpointed take packed attention in their second pass as well.

    That pass runs in backward, when the model's attention has long been switched back.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    found = [(layer, layer._gradient_checkpointing_func) for layer in layers]
    for layer, checkpoint in found:
        layer._gradient_checkpointing_func = partial(_checkpointed, model, checkpoint)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, checkpoint in found:
            layer._gradient_checkpointing_func = checkpoint


def _checkpointed(model: nn.Module, checkpoint: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    def switched(*inputs: Any, **named: Any) -> Any:
        with _attention_switched(model):
            return forward(*inputs, **named)

    return checkpoint(switched, *args, **kwargs)


def packed_states(model: nn.Module, packing: Packing) -> Tensor:
    """States after the last norm that predict the scored tokens, or are theirs (:func:`pack`), ``scored x hidden``."""
    backbone: nn.Module = model.base_model  # type: ignore[assignment]
    with _attention_switched(model), _recomputed_alike(model):
        states = backbone(
            input_ids=packing.input_ids,
            position_ids=packing.position_ids,
            attention_mask=None,
            use_cache=False,
            packing=packing,
        ).last_hidden_state
    found: Tensor = states[0].index_select(0, packing.predictors)
    return found


@torch.no_grad()
def packs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, plain: Any) -> bool:
    """Whether the model gives the same states packed as in rows; found on the first two pairs of a batch, once.

    Args:
        plain: function of (input_ids, attention_mask) that gives the states of padded rows.
    """
    known: bool | None = getattr(model, "_madpo_packs", None)
    if known is None:
        half = len(input_ids) // 2
        rows = [i for i in (0, 1, half, half + 1) if i < len(input_ids)] if half > 1 else list(range(len(input_ids)))
        batch = (input_ids[rows], attention_mask[rows], completion_mask[rows])
        with evaluating(model):
            reason = _difference(model, batch, plain)
        if reason is not None:
            warnings.warn(
                f"{type(model).__name__} cannot share prompts ({reason}); its rows are padded instead, which is slower",
                stacklevel=2,
            )
        known = reason is None
        model._madpo_packs = known  # type: ignore[assignment]
    return known


def _difference(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], plain: Any) -> str | None:
    """Why the packed path is not the plain one; None where it is."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if getattr(config, "attention_chunk_size", None) or getattr(config, "use_bidirectional_attention", False):
        return "its attention is chunked or bidirectional"
    packing = pack(*batch)
    packing.fused = True
    try:
        found = packed_states(model, packing)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        return f"its forward does not take packed rows: {error}"
    windows = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not packing.windows:
        return "its attention does not go through transformers' attention functions"
    if window and "sliding_attention" in windows and window not in packing.windows:
        return "its attention does not say its sliding window"
    wanted = plain(batch[0], batch[1])[:, :-1][packing.scored[:, 1:]]
    apart = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1).clamp(min=1e-6)
    worst = float(apart.max()) if len(apart) else 0.0
    # Measured in bfloat16 on real and on random tokens: Gemma-3-270M 0.05 at most, SmolLM2-135M 0.02. A mask that lets
    # five tokens through gives 0.3 to 1.4, positions by index 0.5 to 1.5. In float32 the right path stays below 5e-5.
    bound = 0.15 if torch.finfo(found.dtype).bits == 16 or torch.is_autocast_enabled(found.device.type) else 1e-3
    return None if worst <= bound else f"its states differ by {worst:.2g} from those of padded rows"
