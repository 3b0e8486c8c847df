"""One prompt, two completions: the tokens of a batch of pairs, each computed once, without padding.

The rows of a preference batch hold every prompt twice and padding behind every shorter row. Here the tokens that
matter are laid end to end in one row: the prompt, then the chosen completion, then the rejected one, pair after pair.
Every linear layer and norm then works on real tokens only. In attention a token sees its own prompt and its own
completion, by position and not by index, so that sliding windows are right as well. The last token of a completion
predicts nothing and is left out, unless the states of the tokens themselves are wanted, as reward models want them.

The model is not changed: its attention is switched (:mod:`madpo.models.engine.packed_attention`) for the time of one
call. Architectures that mix tokens in another way (recurrent layers, convolutions, ALiBi, own attention code) keep
their padded rows: :mod:`madpo.models.engine.packable` finds out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PROMPT, FIRST, SECOND = 0, 1, 2


@dataclass(frozen=True)
class HostRows:
    """A batch of rows as the collator made it, on the host: what decides the packing without asking the device.

    It has no method ``to``, so that what moves a batch to a device leaves it where it is.

    Attributes:
        input_ids, attention_mask, completion_mask: as for :func:`pack`.
    """

    input_ids: Int[Tensor, "rows length"]
    attention_mask: Int[Tensor, "rows length"]
    completion_mask: Int[Tensor, "rows length"]

    def differs(self, *rows: Tensor) -> Bool[Tensor, ""] | None:
        """Whether a batch on the device is another one by now; None where it is this one. Nothing is waited for."""
        own = tuple(vars(self).values())
        if all(a is b for a, b in zip(own, rows, strict=True)):
            return None
        there = torch.stack(rows)
        return (torch.stack(own).to(there.device, non_blocking=True) != there).any()


@dataclass
class Packing:
    """Where each token of a batch of rows lies in one packed row.

    A group is a set of tokens that may see one another: a prompt and its two completions, or a single row.

    Attributes:
        input_ids, position_ids: the packed row.
        branch: whether a token belongs to the prompt or to the first or second completion of its group.
        slots: packed index of the j-th token of each group (0 where the group is shorter), ``groups x longest``.
        filled: whether a slot holds a token.
        places: position of each packed token in the flattened slots; None where every slot is filled.
        predictors: packed index of the token that predicts each scored token, in row order; of that token itself
            where nothing is predicted.
        probes: the row is one that tests the model: attention takes the kernel of padded rows even for short groups,
            since that rounds in the same way.
        attended: how often attention has been computed.
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
    probes: bool = False
    attended: int = 0

    def to(self, device: torch.device) -> Packing:
        """The same with its tensors on a device, which need not be waited for."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        there: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **there)

    def split(self, states: Tensor) -> Tensor:
        """``1 x heads x tokens x width`` to ``groups x heads x longest x width``."""
        heads, _, width = states.shape[1:]
        if self.places is None:
            return states[0].view(heads, *self.slots.shape, width).transpose(0, 1)
        return states[0].index_select(1, self.slots.flatten()).view(heads, *self.slots.shape, width).transpose(0, 1)

    def join(self, states: Tensor) -> Tensor:
        """``groups x longest x heads x width`` to ``1 x tokens x heads x width``, in this order in memory."""
        flat = states.reshape(-1, *states.shape[2:])
        return (flat.contiguous() if self.places is None else flat.index_select(0, self.places))[None]


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
