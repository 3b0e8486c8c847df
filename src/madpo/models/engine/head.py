"""Log-probabilities of tokens over tiles of the vocabulary, without materialising the full logits.

Where the head is frozen, d logp / d hidden is kept in the forward pass, one vector per token; where it trains, tokens
are taken in blocks whose logits are computed again in backward. Sums over the vocabulary are in float32 or wider.
"""

from __future__ import annotations

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
from madpo.models.engine import devices
from madpo.models.engine.tiles import RoundedSums, Sums

TILE = 4_096
"""Vocabulary entries per tile on a processor: small enough for its cache at a few hundred tokens."""
TOKENS = 1_024
"""Tokens per walk over the vocabulary on a processor: bounds the memory of one tile (4 Mi entries)."""
ACCELERATOR_TOKENS = 4_096
"""Tokens per walk on an accelerator, which reads the head's weights once more for each walk."""
ACCELERATOR_BYTES = 2**28
"""Memory of one tile's logits in float32 on an accelerator: launches cost time there, and its caches hold no tile."""
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


def in_half_precision(weight: Tensor) -> bool:
    """Whether products with a weight are rounded to half precision: it is stored so, or autocast computes so."""
    return weight.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(weight.device.type)


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
                "the merged folder, or train one that leaves the head unchanged"
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

    @property
    def on_processor(self) -> bool:
        """Whether the weights lie where small tiles are faster."""
        return devices.kind(self.weight) == "cpu"

    def tile(self, rows: int) -> int:
        """Vocabulary entries per tile of the logits of so many rows."""
        return TILE if self.on_processor else max(ACCELERATOR_BYTES // (4 * max(rows, 1)) // 512, 1) * 512

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of a tile of the vocabulary, and d logits / d (W h + b) where that is not constant."""
        weight = self.weight[start:stop].to(hidden.dtype)
        half = hidden.dtype in (torch.bfloat16, torch.float16)
        if half and devices.kind(hidden) == "cuda":
            raw = _WideProduct.apply(hidden, weight)  # type: ignore[no-untyped-call]
        elif not self.on_processor or (self.trains and torch.is_grad_enabled()) or (half and len(hidden) > FEW):
            raw = hidden @ weight.T
        else:
            # The vocabulary's entries as the rows: of the two factors, the states take less time to lay out anew.
            raw = devices.product(weight, hidden).T
        return self._finished(raw, None if self.bias is None else self.bias[start:stop])

    def logits_of(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logit of one vocabulary entry per row, and its derivative, in float32 or wider."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        raw = (hidden.to(wide) * self.weight[ids].to(wide)).sum(-1)
        return self._finished(raw, None if self.bias is None else self.bias[ids].to(wide))

    def _finished(self, raw: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if bias is not None:
            raw = raw.add_(bias)
        if self.scale != 1.0:
            raw = raw.mul_(self.scale)
        if self.softcap is None:
            return raw, None
        squashed = raw.div_(self.softcap).tanh_()
        return squashed * self.softcap, 1 - squashed.square()


class _WideProduct(torch.autograd.Function):
    """x W^T of half-precision matrices in float32, which ``torch.mm`` gives without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if devices.kind(x) == "cuda":
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


def token_logps(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    labels: Int[Tensor, " tokens"],
    *,
    log_sum_sq: bool = False,
    details: bool = False,
    tile: int | None = None,
) -> TokenScores:
    """log p(label | hidden) of each token, nats, without the logits of the whole vocabulary.

    Args:
        hidden: states after the last norm, one row per scored token.
        head: the output head. If it trains, tokens are taken in blocks whose logits are recomputed in backward.
        labels: the token that each row predicts.
        log_sum_sq: also return log sum_v p_v^2.
        details: also return entropy, mean logit and whether the label was the most likely token.
        tile: vocabulary entries per tile; by default those of :meth:`Head.tile`.
    """
    half = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.get_autocast_dtype(hidden.device.type) if half else head.weight.dtype
    hidden = hidden.to(dtype)
    size = TOKENS if head.on_processor else ACCELERATOR_TOKENS
    trains = head.trains and torch.is_grad_enabled()
    if trains:
        size = 256 if head.on_processor else max(ACCELERATOR_BYTES // (4 * head.weight.shape[0]), 1)
    parts: list[tuple[Tensor | None, ...]] = []
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, ids in zip(torch.split(hidden, size), torch.split(labels, size), strict=True):
            if trains:
                given = (_block_scores, head, rows, ids, log_sum_sq, details)
                parts.append(checkpoint(*given, use_reentrant=False, preserve_rng_state=False))
            else:
                entries = tile or head.tile(len(rows))
                parts.append(_FrozenHeadLogps.apply(rows, head, ids, entries, log_sum_sq, details))  # type: ignore[no-untyped-call]
    columns = ([part for part in column if part is not None] for column in zip(*parts, strict=True))
    return TokenScores(*(torch.cat(column) if column else None for column in columns))  # type: ignore[arg-type]


def _block_scores(
    head: Head, hidden: Tensor, labels: Tensor, log_sum_sq: bool, details: bool
) -> tuple[Tensor | None, ...]:
    """Plain scores of a block of tokens; checkpointed, so that its logits live only while they are used."""
    z = head.logits(hidden)[0]
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    logp = F.log_softmax(z, dim=-1)
    own = logp.gather(-1, labels[:, None]).squeeze(-1)
    with torch.no_grad():
        squares = torch.logsumexp(2 * logp, dim=-1) if log_sum_sq else None
        if not details:
            return own, squares, None, None, None
        top1 = (z.argmax(-1) == labels).to(z.dtype)
        return own, squares, -(logp.exp() * logp).sum(-1), z.mean(-1), top1


class _FrozenHeadLogps(torch.autograd.Function):
    """Running softmax over vocabulary tiles that keeps d logp / d hidden, one vector per token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, labels: Tensor, tile: int, log_sum_sq: bool, details: bool
    ) -> tuple[Tensor | None, ...]:
        half = hidden.dtype in (torch.bfloat16, torch.float16)
        sums = (RoundedSums if half and devices.kind(hidden) != "cuda" else Sums).of(
            hidden, stash=ctx.needs_input_grad[0], log_sum_sq=log_sum_sq, details=details
        )
        for start in range(0, head.weight.shape[0], tile):
            sums.add_tile(head, hidden, labels, start, min(start + tile, head.weight.shape[0]))
        label_logit, label_slope = head.logits_of(hidden, labels)
        norm, expected, extras = sums.result(head, hidden, labels, (label_logit, label_slope))
        if expected is not None:
            own = head.weight[labels].to(expected.dtype)
            own = own if label_slope is None else own * label_slope[:, None]
            stash = own.sub_(expected)
            ctx.save_for_backward((stash if head.scale == 1.0 else stash.mul_(head.scale)).to(hidden.dtype))
        ctx.mark_non_differentiable(*(extra for extra in extras if extra is not None))
        return label_logit - norm, *extras

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (stash,) = ctx.saved_tensors
        return (grads[0][:, None] * stash).to(stash.dtype), None, None, None, None, None


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
