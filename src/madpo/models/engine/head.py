"""An output head whose logits are never all there: log-probabilities of tokens, walking over the vocabulary in tiles.

Where the head is frozen, d logp / d hidden is kept in the forward pass, one vector per token; where it trains, tokens
are taken in blocks whose logits are computed again in backward. Sums over the vocabulary are in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from madpo.core.errors import ConfigError

TILE = 4_096
"""Vocabulary entries per tile: small enough for a processor's cache at a few hundred tokens."""
TOKENS = 1_024
"""Tokens per pass over the vocabulary: bounds the memory of one tile (4 Mi entries)."""
FEW = 128
"""Rows up to which a half-precision product is taken with the vocabulary's entries as its rows, on a processor."""


class TokenScores(NamedTuple):
    """One value per token, as in ``CompletionScores``; what was not asked for is None."""

    logps: Tensor
    log_sum_sq: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    top1: Tensor | None = None


def text_model(model: nn.Module) -> nn.Module:
    """The language model with its head: a transformers model, or the part of it that has the head (Llama 4, BLIP-2)."""
    head = model.get_output_embeddings() if model.base_model is model else None  # type: ignore[operator]
    for part in model.children() if head is not None else ():
        if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is head:
            return text_model(part)
    return model


def backbone(model: nn.Module) -> nn.Module:
    """The part of a transformers model that computes states: all but its head; the model itself where there is none."""
    model = text_model(model)
    found: nn.Module = model.base_model  # type: ignore[assignment]
    if found is model:  # Llama 4's text model has its backbone under a name that its class does not say
        parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
        found = parts[0] if len(parts) == 1 else model
    return found


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
        if isinstance(head, BaseTunerLayer):  # whose weight is that of the base
            raise ConfigError(
                f"the adapter changes the output head ({type(head).__name__}); merge it into its base model and give "
                "the merged folder, or train one that leaves the head alone"
            )
        weight, bias = head.weight, getattr(head, "bias", None)
        if hasattr(weight, "full_tensor"):  # FSDP2 shards parameters as DTensors; the tiles need the whole
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        caps = (getattr(config, name, None) for name in names)
        entries = getattr(config, "unpadded_vocab_size", None)
        if entries is not None:
            weight, bias = weight[:entries], None if bias is None else bias[:entries]
        return cls(weight, bias, next((cap for cap in caps if cap is not None), None), _logit_scale(config))

    @property
    def trains(self) -> bool:
        """Whether a gradient must reach the head itself."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of a tile of the vocabulary, and d logits / d (W h + b) where that is not constant."""
        weight = self.weight[start:stop].to(hidden.dtype)
        half = hidden.dtype in (torch.bfloat16, torch.float16)
        if half and hidden.is_cuda:
            raw = _WideProduct.apply(hidden, weight)  # type: ignore[no-untyped-call]
        elif hidden.device.type != "cpu" or (self.trains and torch.is_grad_enabled()) or (half and len(hidden) > FEW):
            raw = hidden @ weight.T
        else:
            raw = _entries_first(hidden, weight)
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


class _WideProduct(torch.autograd.Function):
    """x W^T of half-precision matrices in float32, which ``torch.mm`` gives without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.is_cuda:
            return torch.mm(x, weight.T, out_dtype=torch.float32)
        return x.float() @ weight.float().T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            grad.T @ x if ctx.needs_input_grad[1] else None,
        )


def _entries_first(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden weight^T by a product whose rows are the vocabulary's entries, on a processor.

    Its library lays the second factor out anew at each call, and of the two the states are the smaller. In float32
    the convolution of oneDNN with a kernel of one pixel, the entries as its pixels, is the faster product.
    """
    if hidden.dtype == torch.float32 and len(hidden) and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pixels = weight[None, :, None].permute(0, 3, 1, 2)
        return F.conv2d(pixels, hidden[:, :, None, None]).view(len(hidden), len(weight))
    return (weight @ hidden.T).T


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
                checkpoint(
                    *(_block_scores, head, rows, ids, log_sum_sq, details),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
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


def _block_scores(head: Head, hidden: Tensor, labels: Tensor, log_sum_sq: bool, details: bool) -> tuple[Tensor, ...]:
    """Plain scores of a block of tokens; checkpointed, so that its logits live only while they are used."""
    z = head.logits(hidden)[0]
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    logp = F.log_softmax(z, dim=-1)
    own = logp.gather(-1, labels[:, None]).squeeze(-1)
    none = torch.zeros_like(own)
    with torch.no_grad():
        squares = torch.logsumexp(2 * logp, dim=-1) if log_sum_sq else none
        if not details:
            return own, squares, none, none, none
        top1 = (z.argmax(-1) == labels).to(z.dtype)
        return own, squares, -(logp.exp() * logp).sum(-1), z.mean(-1), top1


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
            sums.exchange(head, labels, (label_logit, label_slope), head.logits_of(hidden, sums.arg))
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
        share: the label's e, where products are rounded.
        total, total_sq, weighted: sums of e, e^2 and e (z - top), where e = exp(z - top).
        plain: sum of z.
        stash: sum of e W[v], less the label's own row d logp / d hidden once divided by ``total``. Where products are
            rounded it lacks the label's term until :meth:`exchange`.
        rounds: whether a product of half-precision matrices comes back in half precision.
    """

    top: Tensor
    arg: Tensor
    own: Tensor
    share: Tensor
    total: Tensor
    total_sq: Tensor
    weighted: Tensor
    plain: Tensor
    stash: Tensor | None
    rounds: bool

    @classmethod
    def of(cls, hidden: Tensor, *, stash: bool) -> _Softmax:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        own, share, total, total_sq, weighted, plain = (hidden.new_zeros(len(hidden), dtype=wide) for _ in range(6))
        return cls(
            top=torch.full_like(own, -torch.inf),
            arg=torch.zeros_like(own, dtype=torch.long),
            own=own,
            share=share,
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
        if self.rounds:
            self.share += torch.where(here, e.gather(-1, column[:, None]).squeeze(-1).to(wide), 0.0)
        if self.stash is not None:
            e = e if slope is None else e * slope
            if self.rounds:  # a likely label's row would be rounded in the product by more than the gradient's size
                e.scatter_(-1, column[:, None], e.gather(-1, column[:, None]).masked_fill_(here[:, None], 0.0))
            self.stash += (e.to(hidden.dtype) @ head.weight[start:stop].to(hidden.dtype)).to(wide)

    def _rescale(self, top: Tensor) -> None:
        shift = (self.top - top).exp()
        # weighted = sum e (z - top): a moved top changes the factor as well as the exponent.
        moved = torch.where(self.total > 0, self.total * (self.top - top), torch.zeros_like(self.total))
        self.weighted = (self.weighted + moved) * shift
        self.total = self.total * shift
        self.total_sq = self.total_sq * shift.square()
        self.share = self.share * shift
        if self.stash is not None:
            self.stash *= shift[:, None]
        self.top = top

    def exchange(
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
        self.total_sq = self.total_sq + (new.square() - self.share.square()) + (highest.square() - 1)
        self.weighted = self.weighted + (new * own - self.share * (self.own - self.top))
        self.weighted = self.weighted + torch.where(alike, 0.0, highest * peak)
        if self.stash is not None:
            for entries, change, slope in ((labels, new, label[1]), (self.arg, highest - 1, top[1])):
                change = change if slope is None else change * slope
                self.stash += change[:, None] * head.weight[entries].to(self.stash.dtype)


def _row_sums(values: Tensor, wide: torch.dtype) -> Tensor:
    """Sums of rows in a wider type, some rows at a time: the copy stays in a processor's cache."""
    if values.dtype == wide:
        return values.sum(-1)
    size = 64 if values.device.type == "cpu" else len(values)
    return torch.cat([part.to(wide).sum(-1) for part in torch.split(values, max(size, 1))])


def _logit_scale(config: Any) -> float:
    """The constant that an architecture multiplies its logits by; each family has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    for name in ("logits_scaling", "logits_mup_width_multiplier"):
        divisor = getattr(config, name, None)
        if divisor is not None:
            return float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)
    return 1.0
