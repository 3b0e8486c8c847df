"""The softmax over a vocabulary, tile by tile: what each tile adds, and what the whole gives.

:class:`Sums` is for exact products. :class:`RoundedSums` is for processors' products of
half-precision matrices, whose logits are rounded: it puts the exact ones in place of the two that matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from madpo.models.engine import devices

if TYPE_CHECKING:
    from madpo.models.engine.head import Head


Found = tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]
"""Of each token: log sum e^z; sum_v p_v d z_v / d (W h); and log sum p^2, entropy, mean logit, top 1 where asked."""


@dataclass
class Sums:
    """Sums over the vocabulary tiles seen so far, one row per token; what nobody asked for is None.

    Attributes:
        top: the largest logit.
        total, total_sq, weighted: sums of e, e^2 and e z, where e = exp(z - top).
        stash: sum of e W[v], times the slope of z where it has one.
        plain, own: sum of z, and the label's logit as the tile's product gave it.
    """

    top: Tensor
    total: Tensor
    total_sq: Tensor | None
    weighted: Tensor | None
    plain: Tensor | None
    own: Tensor | None
    stash: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, *, stash: bool, log_sum_sq: bool, details: bool) -> Sums:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total, total_sq, weighted, plain, own = hidden.new_zeros((5, len(hidden)), dtype=wide)
        return cls(
            top=torch.full_like(total, -torch.inf),
            total=total,
            total_sq=total_sq if log_sum_sq else None,
            weighted=weighted if details else None,
            plain=plain if details else None,
            own=own if details else None,
            stash=hidden.new_zeros(hidden.shape, dtype=wide) if stash else None,
        )

    def add_tile(self, head: Head, hidden: Tensor, labels: Tensor, start: int, stop: int) -> None:
        """Take in vocabulary entries ``start`` to ``stop``.

        On a processor e is computed in place. An accelerator has one kernel for p, the softmax of a tile, so that
        e = factor p.
        """
        z, slope = head.logits(hidden, start, stop)
        walked = self.weighted is not None and not self._by_states(head)
        if self.own is not None and self.plain is not None:
            self.own = _label_entries(z, labels, start, stop, self.own)
            self.plain += z.sum(-1)
        if head.on_processor:
            before = self._rescaled(z.amax(-1))
            e = (z - self.top[:, None] if walked else z.sub_(self.top[:, None])).exp_()
            factor = None
            self.total.mul_(before).add_(e.sum(-1))
        else:
            highest, place = z.max(-1)
            before, e = self._rescaled(highest), z.softmax(-1)
            peak = e.gather(-1, place[:, None]).squeeze(-1)
            factor = (highest - self.top).exp_().div_(peak)
            self.total.mul_(before).add_(factor)
        if self.weighted is not None and walked:
            self.weighted.mul_(before).add_(_times(z.mul_(e).sum(-1), factor))
        if self.total_sq is not None:
            norm = _times(torch.linalg.vector_norm(e, dim=-1), factor)
            self.total_sq.mul_(before.square()).addcmul_(norm, norm)
        if self.stash is None:
            return
        e = e if slope is None else e.mul_(slope)
        weight = head.weight[start:stop].to(hidden.dtype)
        self.stash *= before[:, None]
        if factor is None:
            devices.add_product(self.stash, e, weight.T)
        elif hidden.dtype == e.dtype:
            self.stash.addcmul_(e @ weight, factor[:, None])
        else:  # half precision on a GPU; the largest p becomes 1, so that its row is not rounded
            rows = torch.div(e, peak[:, None], out=torch.empty_like(e, dtype=hidden.dtype))
            product = torch.mm(rows, weight, out_dtype=e.dtype)
            self.stash.addcmul_(product, factor.mul_(peak)[:, None])

    def _rescaled(self, highest: Tensor) -> Tensor:
        """The factor of all sums so far, once the tile's largest logit is known."""
        top = torch.maximum(self.top, highest)
        before = (self.top - top).exp_()
        self.top = top
        return before

    def _by_states(self, head: Head) -> bool:
        """Whether sum e z is the state's product with sum e W."""
        return self.stash is not None and head.softcap is None and head.bias is None

    def result(self, head: Head, hidden: Tensor, labels: Tensor, label: tuple[Tensor, Tensor | None]) -> Found:
        """What the whole vocabulary gives.

        Args:
            label: the label's logit and its slope, as :meth:`Head.logits_of` gives them.
        """
        weighted = self.weighted
        if weighted is not None and self.stash is not None and self._by_states(head):
            weighted = (hidden * self.stash).sum(-1).mul_(head.scale)
        return self._found(
            head, self.own, None if weighted is None else self.top + self.total.log() - weighted / self.total
        )

    def _found(self, head: Head, own: Tensor | None, entropy: Tensor | None) -> Found:
        log_total = self.total.log()
        stash = None if self.stash is None else self.stash.div_(self.total[:, None])
        squares = None if self.total_sq is None else self.total_sq.log() - 2 * log_total
        mean = None if self.plain is None else self.plain / head.weight.shape[0]
        top1 = None if self.plain is None or own is None else (own == self.top).to(log_total.dtype)
        return self.top + log_total, stash, (squares, entropy, mean, top1)


def _times(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else values.mul_(factor)


class RoundedSums(Sums):
    """As :class:`Sums`, where a product of half-precision matrices comes back in half precision.

    ``weighted`` is the sum of e (z - top) here, ``own`` is always kept, and ``stash`` lacks the label's term until
    :meth:`_exchange`.

    Attributes:
        arg: the entry of the largest logit.
        share: the label's e.
    """

    arg: Tensor
    own: Tensor
    share: Tensor

    @classmethod
    def of(cls, hidden: Tensor, *, stash: bool, log_sum_sq: bool, details: bool) -> RoundedSums:
        sums = super().of(hidden, stash=stash, log_sum_sq=log_sum_sq, details=details)
        assert isinstance(sums, cls)
        sums.own, sums.share = torch.zeros_like(sums.total), torch.zeros_like(sums.total)
        sums.arg = torch.zeros_like(sums.total, dtype=torch.long)
        return sums

    def add_tile(self, head: Head, hidden: Tensor, labels: Tensor, start: int, stop: int) -> None:
        """Take in vocabulary entries ``start`` to ``stop``."""
        z, slope = head.logits(hidden, start, stop)
        peak = z.amax(-1).float()
        rows = (peak > self.top).nonzero().squeeze(-1)
        self.arg[rows] = start + z[rows].max(-1).indices
        here, column = (labels >= start) & (labels < stop), (labels - start).clamp(0, stop - start - 1)[:, None]
        self.own = _label_entries(z, labels, start, stop, self.own)
        if self.plain is not None:
            self.plain += _row_sums(z)
        self._rescale(torch.maximum(self.top, peak))
        z = z.sub_(self.top.to(z.dtype)[:, None])
        e = z.exp_() if self.weighted is None else z.exp()
        if self.weighted is not None:
            self.weighted += _row_sums(z.mul_(e))
        self.total += _row_sums(e)
        if self.total_sq is not None:
            self.total_sq += torch.linalg.vector_norm(e, dim=-1, dtype=torch.float32).square_()
        self.share = _label_entries(e, labels, start, stop, self.share)
        if self.stash is not None:
            e = e if slope is None else e.mul_(slope)
            # A likely label's row would be rounded in the product by more than the gradient's size.
            e.scatter_(-1, column, e.gather(-1, column).masked_fill_(here[:, None], 0.0))
            self.stash += e @ head.weight[start:stop].to(hidden.dtype)

    def _rescale(self, top: Tensor) -> None:
        apart = self.top - top
        shift = apart.exp()
        if self.weighted is not None:
            # weighted = sum e (z - top): a moved top changes the factor as well as the exponent.
            moved = torch.where(self.total > 0, self.total * apart, 0.0)
            self.weighted.add_(moved).mul_(shift)
        self.total *= shift
        if self.total_sq is not None:
            self.total_sq *= shift.square()
        self.share *= shift
        if self.stash is not None:
            self.stash *= shift[:, None]
        self.top = top

    def result(self, head: Head, hidden: Tensor, labels: Tensor, label: tuple[Tensor, Tensor | None]) -> Found:
        """As :meth:`Sums.result`, with the exact logits of the label and of the most likely token."""
        self._exchange(head, labels, label, head.logits_of(hidden, self.arg))
        return self._found(
            head, self.own, None if self.weighted is None else self.total.log() - self.weighted / self.total
        )

    def _exchange(
        self,
        head: Head,
        labels: Tensor,
        label: tuple[Tensor, Tensor | None],
        top: tuple[Tensor, Tensor | None],
    ) -> None:
        """Put the exact logits of the label and of the most likely token in place of their rounded ones, in every sum.

        A bfloat16 product rounds a logit of 20 to steps of 1/8. Over a quarter of a million entries that averages
        out in the softmax sum; for the two entries that carry the result it does not. The gradient has to follow:
        where the label is likely, it is a small difference of these terms.

        Args:
            label, top: logits and their slopes, as :meth:`Head.logits_of` gives them.
        """
        alike = labels == self.arg
        own, peak = label[0] - self.top, top[0] - self.top
        new, highest = own.exp(), torch.where(alike, 1.0, peak.exp())
        self.total = self.total + (new - self.share) + (highest - 1)
        if self.total_sq is not None:
            self.total_sq = self.total_sq + (new.square() - self.share.square()) + (highest.square() - 1)
        if self.weighted is not None:
            self.weighted += new * own - self.share * (self.own - self.top)
            self.weighted += torch.where(alike, 0.0, highest * peak)
        if self.stash is not None:
            for entries, change, slope in ((labels, new, label[1]), (self.arg, highest - 1, top[1])):
                change = change if slope is None else change * slope
                self.stash += change[:, None] * head.weight[entries].to(self.stash.dtype)


def _label_entries(tile: Tensor, labels: Tensor, start: int, stop: int, others: Tensor) -> Tensor:
    """The label's column of a tile of entries ``start`` to ``stop``; ``others`` where the label is none of these."""
    column = (labels - start).clamp(0, stop - start - 1)
    found = tile.gather(-1, column[:, None]).squeeze(-1).to(others.dtype)
    return torch.where((labels >= start) & (labels < stop), found, others)


def _row_sums(values: Tensor) -> Tensor:
    """Sums of rows in float32, some rows at a time: the copy stays in a processor's cache."""
    size = 64 if values.device.type == "cpu" else max(len(values), 1)
    return torch.cat([part.float().sum(-1) for part in torch.split(values, size)])
