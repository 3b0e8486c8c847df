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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from madpo.core.errors import ConfigError, first_line, is_shortage
from madpo.models.engine import memory_efficient
from madpo.models.engine.dependence import depends, sharded, without_numbers
from madpo.models.engine.features import LayerMeans, packed_weights, padded_weights
from madpo.models.engine.head import Head, backbone, in_half_precision, text_model, token_logps
from madpo.models.engine.packable import packs
from madpo.models.engine.packed_attention import row_states
from madpo.models.engine.packing import HostRows, pack
from madpo.models.engine.rope import rope_groups, rope_keys
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
        features: ``rows x features``, of :mod:`madpo.models.engine.features`.
    """

    logps: Tensor
    lengths: Tensor
    log_sum_sq: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    top1: Tensor | None = None
    features: Tensor | None = None


def install_completion_head(model: nn.Module) -> None:
    """Teach a transformers causal language model to answer ``model(..., completion_mask=m)`` with its scores.

    With ``completion_mask`` the forward runs the backbone, then the head on completion positions only, and returns
    :class:`CompletionScores`; without it the forward is the one it had. Idempotent. Install before wrapping with DDP.
    """
    if getattr(model, "_madpo_completion_head", False):
        return
    check_reading(model)
    before: Callable[..., Any] | None = vars(model).get("forward")  # of a wrapper, such as accelerate's

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(self: nn.Module, *args: Any, completion_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if completion_mask is None:  # a copy of the model has its own weights
            return type(self).forward(self, *args, **kwargs) if before is None else before(*args, **kwargs)
        return _score(self, completion_mask, **kwargs)

    model.forward = types.MethodType(forward, model)
    model._madpo_completion_head = True  # type: ignore[assignment]
    memory_efficient.install(model)


@torch.inference_mode(False)
@torch.no_grad()
def check_reading(model: nn.Module) -> None:
    """Compare the logits that are read off a model's states and head with its own, once a model, on a few tokens.

    Some architectures have layers between the backbone and the head, or cap their logits in a way of their own, and
    encoders look ahead: their log-probabilities would be wrong without a word.

    Raises:
        ConfigError: they differ, a state depends on a later token, or the model cannot read four tokens.
    """
    if getattr(model, "_madpo_reading", False):
        return
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):  # it would read the text itself in its encoder
        raise ConfigError(f"{name} is an encoder-decoder model; give a decoder-only model")
    if backbone(model) is model:
        raise ConfigError(f"{name} has no backbone apart from its output head, so it is not supported")
    if not (sharded(model) or without_numbers(model)):
        head = Head.of(model)
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=head.weight.device) % head.weight.shape[0]
        ones, last = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True
        plain = functools.partial(hidden_states, model, ids, ones)
        half = in_half_precision(head.weight)
        with evaluating(model):
            try:
                states = plain()
                theirs = text_model(model)(input_ids=ids, attention_mask=ones, use_cache=False).logits.float()
                found = head.logits(states.to(head.weight.dtype).flatten(0, 1))[0].float().view_as(theirs)
                bound = (0.05 if half else 1e-3) * (1 + float(theirs.abs().max()))
                apart = float((found - theirs).abs().max())
                ahead = float((theirs[0, :-1] - theirs[1, :-1]).abs().max()) > bound
                ahead = ahead or bool(depends(model, plain, [(~last, last)]))
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
                if is_shortage(error):
                    raise
                raise ConfigError(
                    f"{name} cannot read a text of four tokens ({first_line(error)}), so it is not supported"
                ) from error
        if apart > bound:  # false for NaN, which the check of the weights reports
            raise ConfigError(f"{name} is not supported: its logits are not one linear layer of the last hidden state")
        if ahead:
            raise ConfigError(
                f"{name} looks at later tokens, so it is no causal language model; give a decoder (for BERT and its "
                "like: is_decoder in its config.json)"
            )
    model._madpo_reading = True  # type: ignore[assignment]


def position_limit(model: nn.Module) -> int | None:
    """Tokens that a model with a table of positions (GPT-2, OPT, GPT-J) can read; None where they are computed."""
    if not hasattr(model, "_madpo_positions"):
        tables = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "pos_encoding")
        text = backbone(model)
        held = [*text.named_modules(), *text.named_buffers()]
        found = (table for name, table in held if name.rpartition(".")[2] in tables)
        table = next((table for table in found if isinstance(table, nn.Embedding | Tensor)), None)
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        names = ["max_position_embeddings", "max_target_positions"] if table is not None else []
        names += ["max_seq_len"] if config.model_type == "mpt" else []  # its biases are a table of that size
        limit = next((size for name in names if (size := getattr(config, name, None)) is not None), None)
        padding = getattr(table, "padding_idx", None)
        if limit is not None and padding is not None:
            limit -= padding + 1  # RoBERTa counts from behind the padding's
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


def completion_logps(
    model: nn.Module,
    input_ids: Int[Tensor, "rows length"],
    attention_mask: Int[Tensor, "rows length"],
    completion_mask: Int[Tensor, "rows length"],
    *,
    pairs: bool = False,
    log_sum_sq: bool = False,
    details: bool = False,
    features: Sequence[int] = (),
    host: HostRows | None = None,
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
        features: layers whose states are averaged over each completion.
        host: the same rows on the host. Without them an accelerator is waited for to decide the packing.

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
        features=features,
        host=host,
    )
    return scores


def completion_features(
    model: nn.Module,
    input_ids: Int[Tensor, "rows length"],
    attention_mask: Int[Tensor, "rows length"],
    completion_mask: Int[Tensor, "rows length"],
    layers: Sequence[int],
    *,
    pairs: bool = False,
) -> Float[Tensor, "rows features"]:
    """The features of :func:`completion_logps` without log-probabilities, for a model without wrappers."""
    found = scored_states(model, input_ids, attention_mask, completion_mask, pairs, layers).features
    if found is None:
        raise ValueError("there are no features of no layers")
    return found


def embedding_rows(model: Any) -> int | None:
    """How many token ids a model has an embedding for, however its weights are split; None where it does not say."""
    embedding = model.get_input_embeddings()
    rows: int | None = getattr(getattr(embedding, "base_layer", embedding), "num_embeddings", None)
    return rows


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT and data-parallel wrappers."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model


def shares_prompts(model: nn.Module, attention_mask: Tensor) -> bool:
    """Whether the prompt of a pair is computed once; decided at the first call for a model, which warns if not."""
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
    if not takes_positions or not packs(model, functools.partial(hidden_states, model)):
        return False
    keys = rope_keys(model, attention_mask.sum(-1))
    return keys is None or not keys.any()  # two sides of unlike positions have no common prompt


def _score(
    model: nn.Module,
    completion_mask: Tensor,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor,
    pairs: bool = False,
    log_sum_sq: bool = False,
    details: bool = False,
    features: Sequence[int] = (),
    host: HostRows | None = None,
    **others: Any,
) -> CompletionScores:
    given = sorted(name for name, value in others.items() if value is not None)  # PEFT passes every argument on
    if input_ids is None or given:
        raise ConfigError(
            f"an adapter replaces the tokens of {type(model).__name__} by {', '.join(given) or 'states'}, so it is not "
            "supported; use LoRA or another adapter that changes layers"
        )
    read = scored_states(model, input_ids, attention_mask, completion_mask, pairs, features, host)
    tokens = token_logps(read.states, Head.of(model), read.labels, log_sum_sq=log_sum_sq, details=details)
    lengths = read.mask.sum(-1)

    def per_row(values: Tensor) -> Tensor:
        return values.new_zeros(read.mask.shape).masked_scatter(read.mask, values).sum(-1)

    means = (None if v is None else per_row(v) / lengths.clamp(min=1) for v in tokens[1:])
    return CompletionScores(per_row(tokens.logps), lengths, *means)._replace(features=read.features)


class ScoredStates(NamedTuple):
    """States that predict the scored tokens, ``scored x hidden``, these tokens, where they are, and rows' features."""

    states: Tensor
    labels: Tensor
    mask: Tensor
    features: Tensor | None


def scored_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    pairs: bool,
    layers: Sequence[int] = (),
    host: HostRows | None = None,
) -> ScoredStates:
    """The states of a model without wrappers that predict completion tokens; arguments of :func:`completion_logps`."""
    _check_length(model, attention_mask)
    means = LayerMeans(model, layers)
    if pairs and shares_prompts(model, attention_mask):
        rows = host or HostRows(input_ids, attention_mask, completion_mask)
        packing = pack(**vars(rows)).to(input_ids.device)
        mask = packing.scored[:, 1:]
        weights = packed_weights(mask, packing.predictors, packing.input_ids.shape[1]) if layers else None
        with means.running(weights):
            states = row_states(model, packing)
        return ScoredStates(states[0].index_select(0, packing.predictors), packing.labels, mask, means.features())
    mask = (completion_mask[:, 1:] * attention_mask[:, 1:]).bool()
    states = hidden_states(model, input_ids, attention_mask, means, padded_weights(mask) if layers else None)
    return ScoredStates(states[:, :-1][mask], input_ids[:, 1:][mask], mask, means.features())


def _check_length(model: nn.Module, attention_mask: Tensor) -> None:
    limit = position_limit(model)
    if limit is not None and attention_mask.shape[1] > limit:
        check_positions(model, int(attention_mask.sum(-1).max()), "lower max_length, or drop the longest pairs")


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    means: LayerMeans | None = None,
    weights: Float[Tensor, "rows length"] | None = None,
) -> Float[Tensor, "rows length hidden"]:
    """States after the last norm of a transformers causal language model, for either padding side.

    A causal model needs no mask: no real token looks at the padding behind it. Rows with padding in front, or with more
    padding than the model has positions for, are moved to the left and cut for the time of the call: positions and
    recurrent states of some architectures would count the padding.

    Args:
        means, weights: gather features with these weights of the tokens, as they lie in ``input_ids``.
    """
    _check_length(model, attention_mask)
    means = means or LayerMeans(model, ())
    run = functools.partial(backbone(model), attention_mask=None, use_cache=False)
    length, limit = input_ids.shape[1], position_limit(model)
    keys = rope_keys(model, attention_mask.sum(-1))
    groups = [] if keys is None else rope_groups(keys)
    if len(groups) > 1:
        every, own = [LayerMeans(model, means.layers) for _ in groups], weights
        parts = [
            hidden_states(model, input_ids[rows], attention_mask[rows], part, None if own is None else own[rows])
            for rows, part in zip(groups, every, strict=True)
        ]
        order = torch.cat(groups).argsort()
        means.take(every, order)
        return torch.cat(parts)[order]
    if bool(attention_mask[:, 0].all()) and not (limit is not None and length > limit) and not groups:
        with means.running(weights):
            states: Tensor = run(input_ids=input_ids).last_hidden_state
        return states
    longest = max(int(attention_mask.sum(-1).max()), 1)
    order = (attention_mask == 0).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
    with means.running(None if weights is None else weights.gather(1, order)):
        states = run(input_ids=input_ids.gather(1, order)).last_hidden_state
    places = order[..., None].expand_as(states)
    return states.new_zeros(len(states), length, states.shape[-1]).scatter(1, places, states)


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
    if not shares_prompts(model, attention_mask):
        return hidden_states(model, input_ids, attention_mask)
    packing = pack(input_ids, attention_mask, completion_mask, predict=False)
    states = row_states(model, packing)[0].index_select(0, packing.predictors)
    return states.new_zeros(*input_ids.shape, states.shape[-1]).masked_scatter(packing.scored[..., None], states)
