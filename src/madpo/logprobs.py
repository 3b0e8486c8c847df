"""Completion log-probabilities, fast and exact.

A preference loss needs one number per completion: its summed log-probability. A causal language model spends most
of its time on the way there in the output head, since the vocabulary is large. Three things make that cheap, none
of them an approximation:

1. The head is applied to positions that predict a completion token, never to prompts or padding.
2. The vocabulary is walked in tiles with a running softmax, so that logits of more than one tile never exist.
3. Where the head is frozen (LoRA), d logp / d hidden = W[y] - sum_v p_v W[v] is computed while the tile is at hand
   and kept: one vector per token. Backward then scales it: two matrix products instead of three, and no logits.

``install_completion_head`` teaches a model's ``forward`` to answer with these numbers, so that wrappers that must
see the call (PEFT, DDP, FSDP) do. The functions below it are what training, reference columns and evaluation share.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from madpo import lean
from madpo.packing import pack, packed_states, packs

TILE = 8_192
"""Vocabulary entries per tile: small enough for a processor's cache at a few hundred tokens."""
TOKENS = 512
"""Tokens per pass over the vocabulary: bounds the memory of one tile (4 Mi entries)."""


class CompletionScores(NamedTuple):
    """One row per sequence. All but ``logps`` are detached, and all but the first two None unless asked for.

    Attributes:
        logps: log pi(completion | prompt), nats, **summed** over completion tokens; float32 or wider.
        lengths: numbers of completion tokens.
        log_sum_sq: **mean** over completion tokens of log sum_v pi(v)^2 (WPO's alignment).
        entropy: **mean** over completion tokens of the entropy, nats.
        mean_logit: **mean** over completion tokens of the mean logit of the vocabulary.
        top1: share of completion tokens that were the most likely one.
    """

    logps: Tensor
    lengths: Tensor
    log_sum_sq: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    top1: Tensor | None = None


class TokenScores(NamedTuple):
    """One value per token, as in :class:`CompletionScores`; what was not asked for is None."""

    logps: Tensor
    log_sum_sq: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    top1: Tensor | None = None


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap * tanh(scale * (W h + b) / softcap), the cap left out where there is none."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a transformers causal language model, with the conventions of its architecture."""
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        head = model.get_output_embeddings()  # type: ignore[operator]
        weight, bias = head.weight, getattr(head, "bias", None)
        if hasattr(weight, "full_tensor"):  # FSDP2 shards parameters as DTensors; the tiles need the whole
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        return cls(weight, bias, getattr(config, "final_logit_softcapping", None), _logit_scale(config))

    @property
    def trains(self) -> bool:
        """Whether a gradient must reach the head itself."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of a tile of the vocabulary, and d logits / d (W h + b) where that is not constant."""
        weight = self.weight[start:stop].to(hidden.dtype)
        if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
            raw = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        else:
            raw = hidden @ weight.T
        if self.bias is not None:
            raw = raw + self.bias[start:stop].to(raw.dtype)
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap is None:
            return raw, None
        squashed = torch.tanh(raw / self.softcap)
        return squashed * self.softcap, 1 - squashed.square()

    def logits_of(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logit of one vocabulary entry per row, and its derivative, in float32 or wider."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        raw = (hidden.to(wide) * self.weight[ids].to(wide)).sum(-1)
        if self.bias is not None:
            raw = raw + self.bias[ids].to(wide)
        raw = raw * self.scale
        if self.softcap is None:
            return raw, None
        squashed = torch.tanh(raw / self.softcap)
        return squashed * self.softcap, 1 - squashed.square()


def token_logps(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    labels: Int[Tensor, " tokens"],
    *,
    log_sum_sq: bool = False,
    details: bool = False,
    tile: int = TILE,
) -> TokenScores:
    """log p(label | hidden) of each token, nats, without the logits of the whole vocabulary.

    Args:
        hidden: states after the last norm, one row per scored token.
        head: the output head. If it trains, tokens are taken in blocks whose logits are recomputed in backward.
        labels: the token that each row predicts.
        log_sum_sq: also return log sum_v p_v^2.
        details: also return entropy, mean logit and whether the label was the most likely token.
        tile: vocabulary entries per tile.
    """
    half = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.get_autocast_dtype(hidden.device.type) if half else head.weight.dtype
    hidden = hidden.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if head.trains and torch.is_grad_enabled():
            parts = [
                checkpoint(_block_scores, head, rows, ids, use_reentrant=False, preserve_rng_state=False)
                for rows, ids in _blocks(hidden, labels, 256)
            ]
        else:
            parts = [
                _FrozenHeadLogps.apply(rows, head, ids, tile, log_sum_sq, details)  # type: ignore[no-untyped-call]
                for rows, ids in _blocks(hidden, labels, TOKENS)
            ]
    logps, squares, *rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenScores(logps, squares if log_sum_sq else None, *(rest if details else ()))


def _blocks(hidden: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(hidden, size), torch.split(labels, size), strict=True)


def _block_scores(head: Head, hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Plain scores of a block of tokens; checkpointed, so that its logits live only while they are used."""
    z = head.logits(hidden)[0]
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    logp = F.log_softmax(z, dim=-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
        top1 = (z.argmax(-1) == labels).to(z.dtype)
        extras = (torch.logsumexp(2 * logp, dim=-1), entropy, z.mean(-1), top1)
    return logp.gather(-1, labels[:, None]).squeeze(-1), *extras


class _FrozenHeadLogps(torch.autograd.Function):
    """Running softmax over vocabulary tiles that keeps d logp / d hidden, one vector per token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, labels: Tensor, tile: int, log_sum_sq: bool, details: bool
    ) -> tuple[Tensor, ...]:
        sums = _Softmax.of(hidden, stash=ctx.needs_input_grad[0])
        for start in range(0, head.weight.shape[0], tile):
            sums.add_tile(head, hidden, labels, start, tile, log_sum_sq=log_sum_sq, details=details)
        label_logit, label_slope = head.logits_of(hidden, labels)
        if sums.rounds:
            sums.exchange(labels, label_logit, head.logits_of(hidden, sums.arg)[0])
        logps = label_logit - (sums.top + sums.total.log())
        if sums.stash is not None:
            own = head.weight[labels].to(sums.stash.dtype)
            own = own if label_slope is None else own * label_slope[:, None]
            ctx.save_for_backward((own - sums.stash / sums.total[:, None]).mul_(head.scale).to(hidden.dtype))
        extras = (
            sums.total_sq.log() - 2 * sums.total.log(),
            sums.total.log() - sums.weighted / sums.total,
            sums.plain / head.weight.shape[0],
            (sums.own == sums.top).to(logps.dtype),
        )
        ctx.mark_non_differentiable(*extras)
        return logps, *extras

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (stash,) = ctx.saved_tensors
        return (grads[0][:, None] * stash).to(stash.dtype), None, None, None, None, None


@dataclass
class _Softmax:
    """Sums over the vocabulary tiles seen so far, one row per token.

    Attributes:
        top, arg: the largest logit, and its entry (followed only where products are rounded).
        own: the label's logit as the tile's product gave it.
        total, total_sq, weighted: sums of e, e^2 and e (z - top), where e = exp(z - top).
        plain: sum of z.
        stash: sum of e W[v], less the label's own row d logp / d hidden once divided by ``total``.
        rounds: whether a product of half-precision matrices comes back in half precision.
    """

    top: Tensor
    arg: Tensor
    own: Tensor
    total: Tensor
    total_sq: Tensor
    weighted: Tensor
    plain: Tensor
    stash: Tensor | None
    rounds: bool

    @classmethod
    def of(cls, hidden: Tensor, *, stash: bool) -> _Softmax:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        own, total, total_sq, weighted, plain = (hidden.new_zeros(len(hidden), dtype=wide) for _ in range(5))
        return cls(
            top=torch.full_like(own, -torch.inf),
            arg=torch.zeros_like(own, dtype=torch.long),
            own=own,
            total=total,
            total_sq=total_sq,
            weighted=weighted,
            plain=plain,
            stash=hidden.new_zeros(hidden.shape, dtype=wide) if stash else None,
            rounds=hidden.dtype in (torch.bfloat16, torch.float16) and not hidden.is_cuda,
        )

    def add_tile(
        self, head: Head, hidden: Tensor, labels: Tensor, start: int, tile: int, *, log_sum_sq: bool, details: bool
    ) -> None:
        """Take in vocabulary entries ``start`` to ``start + tile``."""
        stop, wide = min(start + tile, head.weight.shape[0]), self.top.dtype
        z, slope = head.logits(hidden, start, stop)
        peak = z.amax(-1).to(wide)
        if self.rounds:
            rows = (peak > self.top).nonzero().squeeze(-1)
            self.arg[rows] = start + z[rows].max(-1).indices
        here = (labels >= start) & (labels < stop)
        column = (labels - start).clamp(0, stop - start - 1)
        self.own = torch.where(here, z.gather(-1, column[:, None]).squeeze(-1).to(wide), self.own)
        if details:
            self.plain += z.to(wide).sum(-1)
        self._rescale(torch.maximum(self.top, peak))
        z = z.sub_(self.top.to(z.dtype)[:, None])
        if details:
            self.weighted += (z.exp() * z).to(wide).sum(-1)
        e = z.exp_()
        self.total += _row_sums(e, wide)
        if log_sum_sq:
            self.total_sq += e.to(wide).square().sum(-1)
        if self.stash is not None:
            e = e if slope is None else e * slope
            self.stash += (e.to(hidden.dtype) @ head.weight[start:stop].to(hidden.dtype)).to(wide)

    def _rescale(self, top: Tensor) -> None:
        shift = (self.top - top).exp()
        # weighted = sum e (z - top): a moved top changes the factor as well as the exponent.
        moved = torch.where(self.total > 0, self.total * (self.top - top), torch.zeros_like(self.total))
        self.weighted = (self.weighted + moved) * shift
        self.total = self.total * shift
        self.total_sq = self.total_sq * shift.square()
        if self.stash is not None:
            self.stash *= shift[:, None]
        self.top = top

    def exchange(self, labels: Tensor, label_logit: Tensor, top_logit: Tensor) -> None:
        """Put the exact logits of the label and of the most likely token in place of their rounded ones.

        A bfloat16 product rounds a logit of 20 to steps of 1/8. Over a quarter of a million entries that averages
        out in the softmax sum; for the two entries that carry the result it does not.
        """
        change = (top_logit - self.top).exp() - 1
        apart = (label_logit - self.top).exp() - (self.own - self.top).exp()
        self.total = self.total + change + torch.where(labels == self.arg, 0.0, apart)


def _row_sums(values: Tensor, wide: torch.dtype) -> Tensor:
    """Sums of rows in a wider type, some rows at a time: the copy stays in a processor's cache."""
    size = 64 if values.device.type == "cpu" else len(values)
    return torch.cat([part.to(wide).sum(-1) for part in torch.split(values, max(size, 1))])


def install_completion_head(model: nn.Module) -> None:
    """Teach a transformers causal language model to answer ``model(..., completion_mask=m)`` with its scores.

    With ``completion_mask`` the forward runs the backbone, then the head on completion positions alone, and returns
    :class:`CompletionScores`; without it the forward is the one it had. Idempotent. Install before wrapping with DDP.
    """
    if getattr(model, "_madpo_completion_head", False):
        return
    plain: Callable[..., Any] = model.forward
    with_positions = takes_positions(model)

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(self: nn.Module, *args: Any, completion_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if completion_mask is None:
            return plain(*args, **kwargs)
        return _score(self, completion_mask, with_positions, **kwargs)

    model.forward = types.MethodType(forward, model)
    model._madpo_completion_head = True  # type: ignore[assignment]
    lean.install(model)


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward has ``position_ids``."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def completion_logps(
    model: nn.Module,
    input_ids: Int[Tensor, "rows length"],
    attention_mask: Int[Tensor, "rows length"],
    completion_mask: Int[Tensor, "rows length"],
    *,
    pairs: bool = False,
    log_sum_sq: bool = False,
    details: bool = False,
) -> CompletionScores:
    """Summed log-probabilities of completions.

    Args:
        model: a causal language model, or a PEFT, DDP or FSDP wrapper of one, with the completion head installed
            (:func:`install_completion_head`; installed here where it is missing and the model is not wrapped).
        input_ids: prompt and completion, padded on either side.
        attention_mask: 1 for tokens, 0 for padding.
        completion_mask: 1 for completion tokens. The first token of a row cannot be scored (nothing predicts it).
        pairs: the first half of the rows are the chosen completions of pairs and the second half the rejected ones, so
            that a pair's prompt is computed once (:mod:`madpo.packing`). Same numbers, fewer tokens.
        log_sum_sq: also compute WPO's alignment term.
        details: also compute entropy, mean logit and top-1 share.

    Returns:
        :class:`CompletionScores`; a row without completion tokens has the log-probability 0 and the length 0.
    """
    install_completion_head(unwrapped(model))
    scores: CompletionScores = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_mask=completion_mask,
        pairs=pairs,
        log_sum_sq=log_sum_sq,
        details=details,
    )
    return scores


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT and data-parallel wrappers."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model


def _score(
    model: nn.Module,
    completion_mask: Tensor,
    with_positions: bool,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    pairs: bool = False,
    log_sum_sq: bool = False,
    details: bool = False,
    **kwargs: Any,
) -> CompletionScores:
    plain = functools.partial(hidden_states, model, takes_positions=with_positions)
    rows = (input_ids, attention_mask, completion_mask)
    # A prompt-learning adapter hands over states of its own, which belong to rows.
    if pairs and with_positions and not _given(kwargs) and packs(model, *rows, plain):
        packing = pack(*rows)
        mask, labels = packing.scored[:, 1:], packing.labels
        selected = packed_states(model, packing)
    else:
        mask = (completion_mask[:, 1:] * attention_mask[:, 1:]).bool()
        labels = input_ids[:, 1:][mask]
        # Prompt-learning adapters put virtual tokens in front: keep the positions of the real ones.
        selected = plain(input_ids, attention_mask, **kwargs)[:, -input_ids.shape[1] :][:, :-1][mask]
    tokens = token_logps(selected, Head.of(model), labels, log_sum_sq=log_sum_sq, details=details)
    lengths = mask.sum(-1)

    def per_row(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(-1)

    means = (None if v is None else per_row(v) / lengths.clamp(min=1) for v in tokens[1:])
    return CompletionScores(per_row(tokens.logps), lengths, *means)


def _given(kwargs: dict[str, Any]) -> bool:
    """Whether a wrapper set anything: PEFT passes every argument on, most of them None."""
    return any(value is not None for value in kwargs.values())


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    takes_positions: bool = True,
    **kwargs: Any,
) -> Float[Tensor, "rows length hidden"]:
    """States after the last norm of a transformers causal language model, for either padding side.

    Without padding in front, a causal model needs no mask: no real token looks at the padding behind it. Attention
    is faster that way, and the states of real tokens are the same.
    """
    mask: Tensor | None = attention_mask
    if bool(attention_mask[:, 0].all()):
        mask = None
    elif takes_positions:
        kwargs.setdefault("position_ids", (attention_mask.cumsum(-1) - 1).clamp(min=0))
    backbone: nn.Module = model.base_model  # type: ignore[assignment]
    states: Tensor = backbone(input_ids=input_ids, attention_mask=mask, use_cache=False, **kwargs).last_hidden_state
    return states


def completion_states(
    model: nn.Module,
    input_ids: Int[Tensor, "rows length"],
    attention_mask: Int[Tensor, "rows length"],
    completion_mask: Int[Tensor, "rows length"],
) -> Float[Tensor, "rows length hidden"]:
    """States of the completions' own tokens, for what reads texts and predicts nothing; any value elsewhere.

    Args:
        model: a transformers model with a backbone, without wrappers.
        input_ids, attention_mask, completion_mask: as in :func:`completion_logps` with ``pairs``: the prompt of a pair
            is computed once.
    """
    with_positions = takes_positions(model)
    plain = functools.partial(hidden_states, model, takes_positions=with_positions)
    rows = (input_ids, attention_mask, completion_mask)
    if not with_positions or not packs(model, *rows, plain):
        return plain(input_ids, attention_mask)
    packing = pack(*rows, predict=False)
    states = packed_states(model, packing)
    return states.new_zeros(*input_ids.shape, states.shape[-1]).masked_scatter(packing.scored[..., None], states)


def _logit_scale(config: Any) -> float:
    """The constant that an architecture multiplies its logits by; each family has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)
