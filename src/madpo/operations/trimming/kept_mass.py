"""What trimming costs on held-out text: nats, and the probability that the original gives to what was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from madpo.models.engine.batches import padded, similar_lengths
from madpo.models.engine.head import TILE, TOKENS, Head
from madpo.models.engine.logprobs import hidden_states


class TextScore(NamedTuple):
    """One text, **summed** over its tokens: -log p, and -log of the probability of the kept entries; nats."""

    nats: float
    outside: float
    tokens: int


@torch.no_grad()
def score_texts(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    kept: Bool[Tensor, " vocab"] | None = None,
    *,
    batch_size: int,
    description: str,
) -> list[TextScore]:
    """Score every token but the first of each sequence; the head's products and the softmax are in float32 or wider.

    Args:
        sequences: token ids, at least two each.
        kept: which entries of the vocabulary are kept; None is all of them.
    """
    lengths = [len(ids) for ids in sequences]
    found: dict[int, TextScore] = {}
    for rows in similar_lengths(lengths, batch_size, description, np.argsort(lengths, kind="stable")):
        ids, mask = padded([sequences[i] for i in rows], 0, model)
        states = hidden_states(model, ids, mask)[:, :-1]
        scored = mask[:, 1:].bool()
        sums = token_mass(Head.of(model), states[scored], ids[:, 1:][scored], kept)
        tokens = [lengths[i] - 1 for i in rows]
        for i, own, mass in zip(rows, *(torch.split(values, tokens) for values in sums), strict=True):
            found[i] = TextScore(-float(own.double().sum()), -float(mass.double().sum()), len(own))
    return [found[i] for i in range(len(sequences))]


def token_mass(
    head: Head,
    hidden: Float[Tensor, "tokens hidden"],
    labels: Int[Tensor, " tokens"],
    kept: Bool[Tensor, " vocab"] | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """log p(label), and log of the sum of p over the kept entries (0 where all are), nats."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logps, inside = [], []
    for rows, ids in zip(torch.split(hidden.to(wide), TOKENS), torch.split(labels, TOKENS), strict=True):
        total = rows.new_full((len(rows),), -torch.inf)
        mass = total.clone()
        for start in range(0, head.weight.shape[0], TILE):
            z = head.logits(rows, start, start + TILE)[0]
            total = torch.logaddexp(total, z.logsumexp(-1))
            if kept is not None and bool(kept[start : start + TILE].any()):
                mass = torch.logaddexp(mass, z[:, kept[start : start + TILE]].logsumexp(-1))
        logps.append(head.logits_of(rows, ids)[0] - total)
        # Rounding may put the part above the whole by a bit.
        inside.append((mass - total).clamp(max=0.0) if kept is not None else torch.zeros_like(total))
    return torch.cat(logps), torch.cat(inside)


class Probe(NamedTuple):
    """States and log-probabilities of one short sequence."""

    hidden: Float[Tensor, "tokens hidden"]
    logps: Float[Tensor, "tokens kept"]


@torch.no_grad()
def probe(model: nn.Module, ids: Sequence[int], kept: Sequence[int] | None = None) -> Probe:
    """The states of a sequence, and the log-probabilities over the kept entries, which sum to 1 there."""
    row = torch.tensor([list(ids)], device=model.device)  # type: ignore[arg-type]
    hidden = hidden_states(model, row, torch.ones_like(row))[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    head = Head.of(model)
    tiles = []
    for start in range(0, head.weight.shape[0], TILE):
        z = head.logits(hidden.to(wide), start, start + TILE)[0]
        tiles.append(z if kept is None else z[:, [i - start for i in kept if start <= i < start + TILE]])
    return Probe(hidden.cpu(), torch.cat(tiles, dim=-1).log_softmax(-1).cpu())
