"""What the engine does by the kind of device: products, and on a processor which memory it keeps."""

import ctypes
import itertools
import math
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PLAIN = (Tensor, nn.Parameter)
"""Types of matrices that are neither sharded, quantised nor on paper."""
_EVERY = 8
"""Training steps between two returns. One takes a tenth of a step, since the next step touches its pages anew."""
_steps = itertools.count()


def kind(tensor: Tensor) -> str:
    """``cpu``, ``cuda``, ``xpu``, ``mps``. A count on paper says another one here."""
    return tensor.device.type


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x W^T + b of two matrices, written to ``out`` where that is given.

    On a processor and in float32 by oneDNN, which lays its factors out faster than the library that torch asks: 1.1 to
    1.3 times as fast for a layer's products forward and backward, up to 2 times for an adapter's.
    """
    if _by_onednn(x, weight):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y if out is None else out.copy_(y)
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def add_product(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``total`` + x W^T, in place."""
    return total.add_(product(x, weight)) if _by_onednn(x, weight) else total.addmm_(x, weight.T)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Plain float32 matrices on a processor, where no gradient is asked for: oneDNN's product has none."""
    return (
        kind(x) == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and 0 not in (*x.shape, *weight.shape)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


def memory_for(like: Tensor, *shape: int) -> Tensor | None:
    """On a processor, where a result goes that a layer keeps for the backward pass: a tensor of the type of ``like``.

    Python asks for its memory (a bytearray without a value). torch asks glibc for an aligned place, which looks for a
    larger hole than it fills, so that no freed block serves the next one of its size, and the heap grows by holes.
    numpy asks for huge pages, which cost three times as much when first touched. None: torch finds a place.
    """
    if kind(like) != "cpu" or type(like) is not Tensor or 0 in shape:
        return None
    memory = _bytes_to_fill()(None, math.prod(shape) * like.dtype.itemsize)
    place = torch.frombuffer(memory, dtype=like.dtype).untyped_storage()
    # No view, since models write into results.
    result: Tensor = like.new_empty(0).set_(place, 0, shape)  # type: ignore[call-overload]
    return result


@cache
def _bytes_to_fill() -> Callable[[None, int], bytearray]:
    asked = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)
    return asked(("PyByteArray_FromStringAndSize", ctypes.pythonapi))


def return_freed_memory() -> None:
    """Before every eighth training step on a processor, give the pages of freed blocks back to the system.

    A step's activations have many sizes, and glibc's heap fills with holes between them: without this a process holds
    up to twice what its step needs. Accelerators have allocators of torch's own, and other C libraries no such call.
    """
    if next(_steps) % _EVERY == 0 and (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux" or torch.accelerator.is_available():
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
