"""Whether a configuration fits its weights, checked before memory is taken and before hours of work begin.

A model is built as its ``config.json`` says, and only then filled from its files. A damaged field makes a model of a
million layers, or one whose layers do not fit one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers.utils import cached_file

from madpo.core.errors import ConfigError
from madpo.models.engine.dependence import sharded
from madpo.models.engine.head import text_model
from madpo.models.loading import loading
from madpo.models.modes import evaluating
from madpo.models.untrusted import MODEL_WEIGHTS, read_object

# For each byte or tensor of the files: weights of 2 bits unpack to 4 numbers a byte, a tensor is registered before and
# after it is read, and fused ones are split.
_TIMES = 16
_NUMBERS = 2**25  # also: buffers, and what a tiny model computes itself
_PARTS = 2**12


@contextmanager
def bounded(place: Path | str, *names: str) -> Iterator[None]:
    """Context in which modules made for the weights of ``place`` may not be many times larger than these weights.

    Modules register a tensor before they write to it, so what is refused has taken no memory. ``names`` are files of
    weights, by default the usual ones of a model. What is not on this machine yet is not bounded. Raises ConfigError.
    """
    stored: list[int] = []  # bytes and tensors, once they are needed
    made = [0, 0]

    def registered(module: nn.Module, name: str, value: Any) -> None:
        made[0] += value.numel() if isinstance(value, Tensor) else 0
        made[1] += 1
        if made[0] <= _NUMBERS and made[1] <= _PARTS:
            return
        if not stored:
            stored.extend(_stored(place, names or MODEL_WEIGHTS))
        if stored[1] and (made[0] > _TIMES * stored[0] + _NUMBERS or made[1] > _TIMES * stored[1] + _PARTS):
            raise ConfigError(
                f"{place}: its configuration asks for a model that is many times larger than its weights "
                f"({stored[1]} tensors, {stored[0]} bytes), such as too many layers or too high a rank; give the "
                "configuration that belongs to these weights"
            )

    registers: tuple[Any, ...] = (
        register_module_parameter_registration_hook,
        register_module_buffer_registration_hook,
        register_module_module_registration_hook,
    )
    handles = [register(registered) for register in registers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stored(place: Path | str, names: tuple[str, ...]) -> tuple[int, int]:
    """Bytes and tensors of the safetensors files next to the first of ``names`` that is there; zeros where none is."""
    if (found := _found(place, names)) is None:
        return 0, 0
    size = tensors = 0
    for file in found.parent.glob("*.safetensors"):
        size += file.stat().st_size
        with loading(file, "file"), safe_open(file, framework="numpy") as opened:
            tensors += len(opened.keys())
    return size, tensors


def _found(place: Path | str, names: tuple[str, ...]) -> Path | None:
    """The first of ``names`` that is there."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    files = (cached_file(str(place), name, local_files_only=True, **quiet) for name in names)
    found = next(filter(None, files), None)
    return None if found is None else Path(found)


def packed_weight(place: Path | str, *, scaled: bool) -> str | None:
    """The first weight in a model's files that means nothing without a scale: whole numbers, and where there are scales
    (``scaled``) numbers of 8 bits."""
    kinds = ("I", "U", "F8") if scaled else ("I", "U")
    for file in _files(place):
        with loading(file, "file"), safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.endswith(".weight") and opened.get_slice(name).get_dtype().startswith(kinds):
                    return str(name)
    return None


def refuse_two_values(place: Path | str) -> None:
    """Refuse a tensor that two files of a model hold with different values.

    transformers reads all tensors of every file that the index names, so the last one wins. Raises ConfigError.
    """
    files: dict[str, Path] = {}
    for file in _files(place):
        with loading(file, "file"), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if (first := files.setdefault(name, file)) == file:
                    continue
                with safe_open(first, framework="pt") as other:
                    one, two = (part.get_tensor(name) for part in (other, opened))
                if one.dtype != two.dtype or not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, two))):
                    raise ConfigError(
                        f"{place}: {name} has one value in {first.name} and another one in {file.name}, so these files "
                        "do not belong together; copy or download them again"
                    )


def _files(place: Path | str) -> list[Path]:
    """The files that a model's weights are read from."""
    if (found := _found(place, MODEL_WEIGHTS)) is None:
        return []
    if found.suffix != ".json":
        return [found]
    return [found.with_name(name) for name in sorted({*read_object(found)["weight_map"].values()})]


@torch.no_grad()
def refuse_uncomputable(place: Path | str, model: nn.Module) -> None:
    """Let a model read two tokens, so that a configuration that fits its weights and computes nothing is refused.

    Raises ConfigError, MemoryShortage: in place of what the forward pass raised.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # The kernels of a quantised model may need the accelerator that it moves to later.
    if sharded(model) or getattr(inner, "hf_quantizer", None) is not None:
        return
    with loading(place), evaluating(model):
        inner = text_model(inner)
        rows, device = inner.get_input_embeddings().weight.shape[0], next(inner.parameters()).device
        inner(input_ids=torch.arange(1, 3, device=device)[None] % rows, use_cache=False)
