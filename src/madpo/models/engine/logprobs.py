"""Completion log-probabilities, fast and exact.

A preference loss needs one number per completion: its summed log-probability. A causal language model spends most
of its time on the way there in the output head, since the vocabulary is large. Three things make that cheap, none
of them an approximation:

1. The head is applied to positions that predict a completion token, never to prompts or padding.
2. The vocabulary is walked in tiles with a running softmax, so that logits of more than one tile never exist.
3. Where the head is frozen (LoRA), d logp / d hidden = W[y] - sum_v p_v W[v] is computed while the tile is at hand
   and kept: one vector per token. Backward then scales it: two matrix products instead of three, and no logits.

(2 and 3 are :mod:`madpo.models.engine.head`.)

``install_completion_head`` teaches a model's ``forward`` to answer with these numbers, so that wrappers that must
see the call (PEFT, DDP, FSDP) do. The functions below it are what training, reference columns and evaluation share.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from madpo.core.errors import ConfigError
from madpo.models.engine import memory_efficient as lean
from madpo.models.engine.head import Head, token_logps
from madpo.models.engine.packing import pack, packed_states, packs
from madpo.models.modes import evaluating


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


def install_completion_head(model: nn.Module) -> None:
    """Teach a transformers causal language model to answer ``model(..., completion_mask=m)`` with its scores.

    With ``completion_mask`` the forward runs the backbone, then the head on completion positions alone, and returns
    :class:`CompletionScores`; without it the forward is the one it had. Idempotent. Install before wrapping with DDP.
    """
    if getattr(model, "_madpo_completion_head", False):
        return
    check_reading(model)
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


@torch.no_grad()
def check_reading(model: nn.Module) -> None:
    """Compare the logits that are read off a model's states and head with its own, once a model, on a few tokens.

    Some architectures have layers between the backbone and the head, or cap their logits in a way of their own, and
    encoders look ahead: their log-probabilities would be wrong without a word.

    Raises:
        ConfigError: they differ, or a state depends on a later token.
    """
    if getattr(model, "_madpo_reading", False):
        return
    name = type(model).__name__
    if model.base_model is model:
        raise ConfigError(f"{name} has no backbone apart from its output head, so it is not supported")
    if not any(p.is_meta or hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters()):
        head = Head.of(model)
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=head.weight.device) % head.weight.shape[0]
        with evaluating(model):
            states = hidden_states(model, ids, torch.ones_like(ids), takes_positions=takes_positions(model))
            theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        found = head.logits(states.to(head.weight.dtype).flatten(0, 1))[0].float().view_as(theirs)
        half = head.weight.dtype in (torch.bfloat16, torch.float16)
        bound = (0.05 if half else 1e-3) * (1 + float(theirs.abs().max()))
        if float((found - theirs).abs().max()) > bound:  # not with weights that are not numbers: others tell
            raise ConfigError(f"{name} makes its logits otherwise than by one linear head, so it is not supported")
        if float((theirs[0, :-1] - theirs[1, :-1]).abs().max()) > bound:
            raise ConfigError(
                f"{name} looks at later tokens, so it is no causal language model; give a decoder (for BERT and its "
                "like: is_decoder in its config.json)"
            )
    model._madpo_reading = True  # type: ignore[assignment]


def position_limit(model: nn.Module) -> int | None:
    """Tokens that a model with learned positions (GPT-2, OPT, BERT) can read; None where positions are computed."""
    if not hasattr(model, "_madpo_positions"):
        tables = ("wpe", "embed_positions", "position_embeddings")
        found = (m for name, m in model.named_modules() if name.rpartition(".")[2] in tables)
        table = next((m for m in found if isinstance(m, nn.Embedding)), None)
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        limit = getattr(config, "max_position_embeddings", None) if table is not None else None
        if limit is not None and table is not None and table.padding_idx is not None:
            limit -= table.padding_idx + 1  # RoBERTa counts from behind the padding's
        model._madpo_positions = limit  # type: ignore[assignment]
    return model._madpo_positions  # type: ignore[return-value]


def check_positions(model: nn.Module, length: int, remedy: str) -> None:
    """Refuse texts of more tokens than the model has positions for.

    Raises:
        ConfigError: with the model's positions, and ``remedy``.
    """
    limit = position_limit(model)
    if limit is not None and length > limit:
        raise ConfigError(f"{type(model).__name__} has {limit} positions, but a text takes {length}; {remedy}")


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
            that a pair's prompt is computed once (:mod:`madpo.models.engine.packing`). Same numbers, fewer tokens.
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
    _check_length(model, attention_mask)
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


def _check_length(model: nn.Module, attention_mask: Tensor) -> None:
    limit = position_limit(model)
    if limit is not None and attention_mask.shape[1] > limit:
        check_positions(model, int(attention_mask.sum(-1).max()), "lower max_length, or drop the longest pairs")


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
    _check_length(model, attention_mask)
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
    _check_length(model, attention_mask)
    with_positions = takes_positions(model)
    plain = functools.partial(hidden_states, model, takes_positions=with_positions)
    rows = (input_ids, attention_mask, completion_mask)
    if not with_positions or not packs(model, *rows, plain):
        return plain(input_ids, attention_mask)
    packing = pack(*rows, predict=False)
    states = packed_states(model, packing)
    return states.new_zeros(*input_ids.shape, states.shape[-1]).masked_scatter(packing.scored[..., None], states)
