"""Layers of a LoRA model whose backward pass keeps less and walks over its activations less often.

Between the matrix products of a decoder layer lie many passes over activations, and each keeps its input for the
backward pass: a norm computes in float32 and keeps several float32 copies, PEFT adds the scaled output of an adapter
to that of its frozen layer in three passes, a gated MLP keeps both factors and their product. Here each of these is one
autograd function with the same formula in the same precision:

- :class:`_LoRALinear` adds the adapter inside a matrix product, y = x W^T + s (x A^T) B^T;
- :class:`_GatedMLP` keeps only the two factors before the activation and computes the rest again;
- :class:`~madpo.models.engine.norms.RMSNorm` keeps its input and one factor per row; what it gives is computed again.

:func:`install` puts them in place of the ``forward`` of the modules that it recognises; parameters, names and state
dictionaries stay as they are. Where a call is not the plain one (weights that train, dropout, DoRA, several
adapters, hooks, parameters that are sharded), the module's own ``forward`` answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from madpo.models.engine import devices
from madpo.models.engine.norms import Origin, RMSNorm, keep, note_origin, origin_of, read

_HALF = (torch.bfloat16, torch.float16)
_WHOLE = (nn.Parameter, FakeTensor)
"""Types of weights that are neither sharded nor quantised; the second one on paper (:mod:`madpo.models.on_paper`)."""


@dataclass(frozen=True)
class _Projection:
    """A frozen linear layer and its adapter: x W^T + b + scale (x A^T) B^T; ``a`` and ``b`` None without an adapter."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float

    def forward(self, x: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The layer's output for rows ``x``, and the adapter's inner states; ``a``, ``b`` in the dtype of ``x``."""
        y = devices.product(x, self.weight, self.bias, devices.memory_for(x, len(x), len(self.weight)))
        if a is None or b is None:
            return y, None
        inner = devices.product(x, a)
        return y.addmm_(inner, b.T, alpha=self.scale), inner

    def backward(
        self, grad: Tensor, x: Tensor, inner: Tensor | None, a: Tensor | None, b: Tensor | None, dx: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """d x (added to ``dx`` where that is given), d A and d B."""
        factors = (grad, self.weight.T)
        dx = devices.product(*factors) if dx is None else devices.add_product(dx, *factors)
        if inner is None or a is None or b is None:
            return dx, None, None
        through, d_a, d_b = self.of_adapter(grad, x, inner, b)
        return dx.addmm_(through, a, alpha=self.scale), d_a, d_b

    def of_adapter(self, grad: Tensor, x: Tensor, inner: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient behind B, d A and d B. The thin factor comes first: a processor multiplies this order faster."""
        through = devices.product(grad, b.T)
        d_a, d_b = devices.product(through.T, x.T), devices.product(inner.T, grad.T)
        return through, d_a.mul_(self.scale), d_b.mul_(self.scale).T


def _gradient(found: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight's gradient in its type and row by row, or autograd would lay it out once more."""
    return found.to(dtype, memory_format=torch.contiguous_format)


class _LoRALinear(torch.autograd.Function):
    """A linear layer with its adapter, on rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, origin: Origin | None, projection: _Projection, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            a_, b_ = a.to(x.dtype), b.to(x.dtype)
            y, inner = projection.forward(x, a_, b_)
        ctx.projection, ctx.dtypes = projection, (a.dtype, b.dtype)
        ctx.save_for_backward(*keep(ctx, x, origin), inner, a_, b_)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inner, a, b = ctx.saved_tensors
        grad, x = grad.to(a.dtype), read(ctx, x, weight, a.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx, d_a, d_b = ctx.projection.backward(grad, x, inner, a, b, None)
            else:  # the first layer's input
                dx, (_, d_a, d_b) = None, ctx.projection.of_adapter(grad, x, inner, b)
        return dx, None, None, _gradient(d_a, ctx.dtypes[0]), _gradient(d_b, ctx.dtypes[1])


# Activations, and their gradients as functions of (gradient of the value, input): torch.autograd.grad inside a custom
# backward fails while gradient hooks are registered.
_ACTIVATIONS: tuple[tuple[Callable[..., Tensor], Callable[..., Tensor]], ...] = (
    (F.silu, torch.ops.aten.silu_backward),
    *(
        (functools.partial(F.gelu, approximate=form), functools.partial(torch.ops.aten.gelu_backward, approximate=form))
        for form in ("tanh", "none")
    ),
)


class _GatedMLP(torch.autograd.Function):
    """down(act(gate(x)) * up(x)), on rows; keeps x and what gate and up gave."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        origin: Origin | None,
        act: int,
        parts: tuple[_Projection, _Projection, _Projection],
        *adapters: Tensor | None,
    ) -> Tensor:
        gate, up, down = parts
        with torch.autocast(x.device.type, enabled=False):
            ga, gb, ua, ub, da, db = (None if adapter is None else adapter.to(x.dtype) for adapter in adapters)
            before, gate_inner = gate.forward(x, ga, gb)
            factor, up_inner = up.forward(x, ua, ub)
            y, down_inner = down.forward(_ACTIVATIONS[act][0](before).mul_(factor), da, db)
        ctx.parts, ctx.act = parts, act
        ctx.dtypes = [None if adapter is None else adapter.dtype for adapter in adapters]
        inner = (gate_inner, up_inner, down_inner)
        ctx.save_for_backward(*keep(ctx, x, origin), before, factor, *inner, ga, gb, ua, ub, da, db)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, before, factor, gate_inner, up_inner, down_inner, ga, gb, ua, ub, da, db = ctx.saved_tensors
        gate, up, down = ctx.parts
        value, gradient = _ACTIVATIONS[ctx.act]
        grad, x = grad.to(before.dtype), read(ctx, x, weight, before.dtype)
        with torch.autocast(x.device.type, enabled=False):
            active = value(before)
            product = active * factor
            d_product, d_da, d_db = down.backward(grad, product, down_inner, da, db, None)
            d_factor = torch.mul(d_product, active, out=product)
            del active
            d_before = gradient(d_product.mul_(factor), before)
            dx, d_ga, d_gb = gate.backward(d_before, x, gate_inner, ga, gb, None)
            dx, d_ua, d_ub = up.backward(d_factor, x, up_inner, ua, ub, dx)
        grads = (d_ga, d_gb, d_ua, d_ub, d_da, d_db)
        cast = (None if g is None else _gradient(g, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return dx if ctx.needs_input_grad[0] else None, None, None, None, *cast


def install(model: nn.Module) -> None:
    """Replace the forward of every module of ``model`` that has a known form by one that keeps fewer activations.

    Idempotent.
    """
    forms: dict[type, Any] = {}
    for module in model.modules():
        if hasattr(module, "_madpo_plain") or "forward" in module.__dict__:
            continue
        kind = type(module)
        if kind is lora.Linear:
            _replace(module, _lora_linear)
            continue
        gated = all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
        norm = kind.__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), nn.Parameter)
        if not (gated or norm):
            continue
        if kind not in forms:
            forms[kind] = _gate_of(module) if gated else _norm_offset(module)
        if forms[kind] is not None:
            module._madpo_form = forms[kind]
            _replace(module, _gated_mlp if gated else _rms_norm)


def _replace(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    plain = module.forward
    module._madpo_plain = plain  # type: ignore[assignment]
    module.forward = functools.partial(forward, module, plain)


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _quiet(module: nn.Module) -> bool:
    """Whether nothing watches or changes the module's calls: hooks of users, offloading, FSDP and DeepSpeed."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _projection(layer: Any, dtype: torch.dtype) -> _Projection | None:
    """The parts of a frozen linear layer with at most one plain adapter; None where it is anything else."""
    if type(layer) is nn.Linear:
        base, a, b, scale = layer, None, None, 1.0
    elif type(layer) is lora.Linear and _quiet(layer):
        base, a, b, scale = layer.base_layer, None, None, 1.0
        if layer.merged or layer.lora_variant or getattr(layer, "fan_in_fan_out", False):
            return None
        active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
        if len(active) > 1:
            return None
        for name in active:
            inner, outer, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
            plain = type(inner) is nn.Linear and type(outer) is nn.Linear and _quiet(inner) and _quiet(outer)
            if not plain or inner.bias is not None or outer.bias is not None:
                return None
            drops = not isinstance(dropout, nn.Dropout) or (dropout.training and dropout.p > 0)
            if drops and not isinstance(dropout, nn.Identity):
                return None
            a, b, scale = inner.weight, outer.weight, float(layer.scaling[name])
    else:
        return None
    if type(base) is not nn.Linear or not _quiet(base) or base.weight.requires_grad or base.weight.dtype != dtype:
        return None
    if base.bias is not None and base.bias.requires_grad:
        return None
    if a is not None and not torch.is_autocast_enabled(a.device.type) and a.dtype != dtype:
        return None  # PEFT then computes the adapter in its own precision
    return _Projection(base.weight, base.bias, a, b, scale)


def _lora_linear(module: nn.Module, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dtype = _compute_dtype(x)
    projection = None if args or kwargs else _projection(module, dtype)
    if projection is None or projection.a is None or projection.b is None:
        return plain(x, *args, **kwargs)
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    given = (rows, origin_of(x), projection, projection.a, projection.b)
    y: Tensor = _LoRALinear.apply(*given)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def _gated_mlp(module: nn.Module, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dtype = _compute_dtype(x)
    parts = tuple(_projection(getattr(module, name), dtype) for name in ("gate_proj", "up_proj", "down_proj"))
    if args or kwargs or any(part is None for part in parts) or not _quiet(module.act_fn):  # type: ignore[arg-type]
        return plain(x, *args, **kwargs)
    adapters = [tensor for part in parts if part is not None for tensor in (part.a, part.b)]
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    given = (rows, origin_of(x), module._madpo_form, parts, *adapters)
    y: Tensor = _GatedMLP.apply(*given)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def _rms_norm(module: nn.Module, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    # Transformers' norms compute in float32 even for float64; a float64 model stays what it was to the last digit.
    if args or kwargs or x.dtype == torch.float64 or type(weight) not in _WHOLE:
        return plain(x, *args, **kwargs)
    constants = (_eps(module), module._madpo_form)
    y: Tensor = RMSNorm.apply(x, weight, *constants)  # type: ignore[no-untyped-call]
    if y.requires_grad:
        note_origin(y, x, weight, *constants)  # type: ignore[arg-type]
    return y


def _eps(module: nn.Module) -> float:
    return float(getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or 0.0)


@torch.no_grad()
def _norm_offset(module: nn.Module) -> float | None:
    """0 or 1: what the norm adds to its weight; None where it computes something else. Found on two rows."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dim() != 1 or weight.is_meta or type(weight) not in _WHOLE:
        return None
    rows = _probe(2, weight)
    rows[1] *= 1e-3  # where eps matters
    wanted = module(rows)
    for offset in (0.0, 1.0):
        if _same(RMSNorm.apply(rows, weight, _eps(module), offset), wanted):  # type: ignore[no-untyped-call]
            return offset
    return None


@torch.no_grad()
def _gate_of(module: nn.Module) -> int | None:
    """Which activation a module down(act(gate(x)) * up(x)) has; None where it is another one. Found on two rows."""
    gate = getattr(module.gate_proj, "base_layer", module.gate_proj)
    if type(gate) is not nn.Linear or gate.weight.is_meta or type(gate.weight) not in _WHOLE:
        return None
    steps = torch.linspace(-6, 6, 97, device=gate.weight.device)
    rows = _probe(2, gate.weight)
    for index, (value, _) in enumerate(_ACTIVATIONS):
        # Two kinds of GELU are 5e-4 apart, so in float32; the whole in the module's own precision.
        if bool(((module.act_fn(steps) - value(steps)).abs() < 1e-5).all()):  # type: ignore[operator]
            product = value(module.gate_proj(rows)) * module.up_proj(rows)  # type: ignore[operator]
            return index if _same(module.down_proj(product), module(rows)) else None  # type: ignore[operator]
    return None


def _probe(rows: int, weight: Tensor) -> Tensor:
    """Rows that are the same in every run, without a draw from the global generator."""
    steps = torch.arange(rows * weight.shape[-1], device=weight.device, dtype=torch.float32)
    return torch.sin(steps * 1.7 + 0.3).view(rows, -1).to(weight.dtype)


def _same(found: Tensor, wanted: Any) -> bool:
    if not isinstance(wanted, Tensor) or found.shape != wanted.shape:
        return False
    bound = 2e-2 if wanted.dtype in _HALF else 1e-5
    apart = (found.double() - wanted.double()).norm(dim=-1)
    return bool((apart <= bound * wanted.double().norm(dim=-1)).all())
