"""What the engine does by the kind of device: tiles, products and attention; on a processor, which memory it keeps."""

import ctypes
import itertools
import math
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_EVERY = 8
"""Training steps between two returns. One takes a tenth of a step, since the next step touches its pages anew."""
_steps = itertools.count()


def kind(tensor: Tensor) -> str:
    """``cpu``, ``cuda``, ``xpu``, ``mps``. A count on paper says another one here."""
    return tensor.device.type


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
