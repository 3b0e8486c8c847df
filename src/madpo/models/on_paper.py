"""Models and training steps without numbers: what a step would hold in memory, before a weight is loaded.

The weights are fake tensors of torch: they have a shape, a type and a device, and no memory. Every operator tells what
shape its result has, so a step runs as it would, autograd included, in seconds for billions of parameters.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from madpo.models.load import language_class, load_config

LARGE = 2**16
"""Numbers from which on a buffer of a step on paper is on paper itself."""


def paper_model(path: Path | str, *, dtype: torch.dtype, mode: FakeTensorMode) -> PreTrainedModel:
    """The language model of a ``config.json`` with weights on paper, on the device where it would be.

    It is taken for one that the engine reads and packs, which otherwise its first states tell
    (:func:`madpo.models.engine.dependence.without_numbers`).

    Args:
        path: as for :func:`madpo.models.load.load_model`; only its configuration is read.
    """
    with mode, torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: PreTrainedModel = language_class(path).from_config(load_config(path), dtype=dtype)
    return model.eval()


@contextmanager
def on_paper(mode: FakeTensorMode) -> Iterator[None]:
    """Whatever is made inside is on paper. Models can be moved, and have no weights to save or to hash."""
    with mode, Answers(), mock.patch.multiple(nn.Module, _apply=_moved, state_dict=lambda *args, **kwargs: {}):  # type: ignore[no-untyped-call]
        yield


def _moved(module: nn.Module, move: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for child in module.children() if recurse else ():
        child._apply(move)  # type: ignore[no-untyped-call]
    for name, weight in module._parameters.items():
        if weight is not None and (there := move(weight)) is not weight:
            module._parameters[name] = nn.Parameter(there, weight.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else move(buffer)
    return module


class Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What the host asks of tensors on paper is answered: a number is 1, a condition true, a selection everything.

    So a check of the numbers finds nothing wrong, and what depends on them is as large as it can be. Large buffers are
    on paper as well, or what fills them would be computed.
    """

    _mode: FakeTensorMode | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.empty.memory_format and self._mode and math.prod(args[0]) >= LARGE:
            with self._mode:
                return func(*args, **(kwargs or {}))
        if args and isinstance(args[0], FakeTensor):
            self._mode = args[0].fake_mode
            if func is torch.ops.aten._local_scalar_dense.default and args[0].constant is None:
                return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
            if func is torch.ops.aten.nonzero.default:
                return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
            if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
                args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        return func(*args, **(kwargs or {}))


def _places(index: Tensor | None) -> Iterable[Tensor | None]:
    """What a mask selects, in numbers: everything where the mask is on paper."""
    if index is None or index.dtype != torch.bool:
        return [index]
    known = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, FakeTensor) else index
    return known.nonzero().unbind(1)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors that are alive: those given and those made inside, each storage once.

    Attributes:
        now: at the moment.
        peak: the most since it was last set.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in given:
            self._take(tensor)

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._take(leaf)
        return out
