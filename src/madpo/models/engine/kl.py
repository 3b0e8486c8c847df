"""KL divergence between two models along given completions, from the full vocabulary, without its logits."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from madpo.core.errors import ConfigError
from madpo.models.engine.head import Head
from madpo.models.engine.logprobs import check_reading, scored_states, unwrapped


@torch.no_grad()
def completion_kl(
    policy: nn.Module,
    reference: nn.Module,
    input_ids: Int[Tensor, "rows length"],
    attention_mask: Int[Tensor, "rows length"],
    completion_mask: Int[Tensor, "rows length"],
    *,
    pairs: bool = False,
    block: int = 256,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """KL(policy || reference) along each completion, and its log-probabilities under both.

    The KL is the sum over completion positions of sum_v p(v) (log p(v) - log q(v)), nats, from the full vocabulary:
    an unbiased estimate of the sequence KL when the completions are samples of the policy at temperature 1, and of
    far smaller variance than the log-ratio of the sampled tokens.

    Args:
        pairs: the two halves of the rows are pairs, as for :func:`madpo.models.engine.logprobs.completion_logps`.

    Returns:
        (logps, kl, ref_logps), one per row, all summed, float32 or wider. A model has KL 0 to itself, exactly.

    Raises:
        ConfigError: the models have unlike numbers of vocabulary entries.
    """
    heads, states = [], []
    for model in (policy, reference):
        inner = unwrapped(model)
        check_reading(inner)
        heads.append(Head.of(inner))
        own, labels, mask, _ = scored_states(inner, input_ids, attention_mask, completion_mask, pairs)
        states.append(own)
    entries = [head.weight.shape[0] for head in heads]
    if entries[0] != entries[1]:
        raise ConfigError(
            f"the policy has {entries[0]} vocabulary entries and its reference {entries[1]}, so there is no KL between "
            "them; resize one of them (model.resize_token_embeddings) and save it"
        )
    parts = [
        _token_kl(heads, [x[start : start + block] for x in states], labels[start : start + block])
        for start in range(0, len(labels), block)
    ]

    def per_row(k: int) -> Tensor:
        values = torch.cat([part[k] for part in parts]) if parts else states[0].new_zeros(0, dtype=torch.float32)
        return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(-1)

    return per_row(0), per_row(1), per_row(2)


def _token_kl(heads: list[Head], states: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(label), sum_v p (log p - log q) and log q(label) of each token, by one walk over the vocabulary.

    With running sums of e^z_p, e^z_q and e^z_p (z_p - z_q), the KL is the mean of z_p - z_q under p, minus the
    difference of the two log-normalisers.
    """
    hidden = [x.to(head.weight.dtype) for x, head in zip(states, heads, strict=True)]
    wide = torch.promote_types(hidden[0].dtype, torch.float32)
    zeros = [hidden[0].new_zeros(len(labels), dtype=wide) for _ in range(5)]
    own, other, gap, total_p, total_q = zeros
    top_p, top_q = (torch.full_like(own, -torch.inf) for _ in range(2))
    vocabulary, tile = heads[0].weight.shape[0], heads[0].tile(len(labels))
    for start in range(0, vocabulary, tile):
        stop = min(start + tile, vocabulary)
        z_p, z_q = (head.logits(x, start, stop)[0].to(wide) for head, x in zip(heads, hidden, strict=True))
        here = (labels >= start) & (labels < stop)
        column = (labels - start).clamp(0, stop - start - 1)
        own = torch.where(here, z_p.gather(-1, column[:, None]).squeeze(-1), own)
        other = torch.where(here, z_q.gather(-1, column[:, None]).squeeze(-1), other)
        peak_p, peak_q = torch.maximum(top_p, z_p.amax(-1)), torch.maximum(top_q, z_q.amax(-1))
        shift_p, shift_q = (top_p - peak_p).exp(), (top_q - peak_q).exp()
        top_p, top_q = peak_p, peak_q
        apart = z_p - z_q
        e_p = z_p.sub_(top_p[:, None]).exp_()
        total_p = total_p * shift_p + e_p.sum(-1)
        gap = gap * shift_p + apart.mul_(e_p).sum(-1)
        total_q = total_q * shift_q + z_q.sub_(top_q[:, None]).exp_().sum(-1)
    normaliser, ref_normaliser = top_p + total_p.log(), top_q + total_q.log()
    return own - normaliser, gap / total_p - normaliser + ref_normaliser, other - ref_normaliser
