"""RMS norms whose backward pass keeps little, and what they gave as something to compute again.

A projection that reads what a norm gave keeps the norm's input in its place (:func:`keep`), which is there anyway, and
has the rows computed again in the backward pass (:func:`read`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from madpo.models.engine import devices

_ORIGIN = "_madpo_origin"
"""Attribute of what a norm gave, an ``Origin``. Whatever computes with it makes a tensor without."""


class RMSNorm(torch.autograd.Function):
    """x / rms(x) * (offset + weight), the offset 0 or 1, computed in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        normed, factor = _normed(x, weight, eps, offset)
        ctx.offset = offset
        ctx.save_for_backward(x, weight, factor)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        of_norm = _layer_norm_gradients if devices.kind(x) == "cpu" else _norm_gradients
        scale, wanted = weight.to(factor.dtype), ctx.needs_input_grad[1]
        scale = scale + ctx.offset if ctx.offset else scale
        swapped = x.dim() == 4 and not x.is_contiguous()  # heads before tokens, in a layout of tokens before heads
        if swapped:
            x, grad, factor = (t.transpose(1, 2) for t in (x, grad, factor))
        dx, d_weight = of_norm(grad, x, factor, scale, wanted)
        dx = dx.to(x.dtype)
        return (
            dx.transpose(1, 2) if swapped else dx,
            None if d_weight is None else d_weight.to(weight.dtype),
            None,
            None,
        )


def _normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """What a norm gives, and 1 / rms(x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_().div_(x.shape[-1])
    factor = mean.add_(eps).rsqrt_()
    normed = torch.mul(x, factor)
    return (normed.addcmul_(normed, weight) if offset else normed.mul_(weight)).to(x.dtype), factor


class _Normed:
    """Rows that a norm gave, computed again in the backward pass: once for all projections that read them.

    A reader keeps the norm's input, which is there anyway, in place of the rows.
    """

    def __init__(self, eps: float, offset: float, version: int) -> None:
        self.constants, self.version = (eps, offset), version
        self.readers = self.left = 0
        self.value: Tensor | None = None

    def rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """For the next reader; the last one lets them go."""
        if self.value is None:
            self.value, self.left = _normed(x, weight, *self.constants)[0].flatten(0, -2), self.readers
        rows, self.left = self.value, self.left - 1
        if self.left == 0:
            self.value = None
        return rows


Origin = tuple[Tensor, Tensor, _Normed]
"""Of what a norm gave: its input and its weight."""


def note_origin(y: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> None:
    """Say of what a norm gave what it is computed from."""
    setattr(y, _ORIGIN, (x, weight, _Normed(eps, offset, y._version)))


def origin_of(x: Tensor) -> Origin | None:
    """Where ``x`` is what a norm gave, unchanged: what it is computed from."""
    origin: Origin | None = getattr(x, _ORIGIN, None)
    return origin if origin is not None and origin[2].version == x._version else None


def keep(ctx: Any, rows: Tensor, origin: Origin | None) -> tuple[Tensor | None, Tensor | None]:
    """What a reader of ``rows`` saves for :func:`read`."""
    if origin is None:
        ctx.normed = None
        return rows, None
    x, weight, ctx.normed = origin
    ctx.normed.readers += 1
    return x, weight


def read(ctx: Any, x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows in a reader's backward pass."""
    rows: Tensor = x if ctx.normed is None else ctx.normed.rows(x, weight).to(dtype)
    return rows


def _norm_gradients(
    grad: Tensor, x: Tensor, factor: Tensor, scale: Tensor, weight_too: bool
) -> tuple[Tensor, Tensor | None]:
    """d x and d scale of n scale, n = x factor, factor = 1 / rms(x); d x = factor (h - n mean(h n)), h = grad scale."""
    normed, inner = x * factor, grad * scale
    along = (inner * normed).sum(-1, keepdim=True)
    d_scale = (grad * normed).flatten(0, -2).sum(0) if weight_too else None
    return inner.addcmul_(normed, along, value=-1 / x.shape[-1]).mul_(factor), d_scale


def _layer_norm_gradients(
    grad: Tensor, x: Tensor, factor: Tensor, scale: Tensor, weight_too: bool
) -> tuple[Tensor, Tensor | None]:
    """The same by torch's kernel for layer norms, which walks once over its inputs on a processor.

    Where it is given a mean of 0, it differs only by the derivative through that mean, - factor mean(grad scale).
    """
    grad, x, factor = grad.to(factor.dtype), x.to(factor.dtype), factor.contiguous()  # the kernel reads it as it lies
    dx, d_scale, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], torch.zeros_like(factor), factor, scale, None, [True, weight_too, False]
    )
    return dx.add_((grad @ scale)[..., None].div_(x.shape[-1]).mul_(factor)), d_scale if weight_too else None
