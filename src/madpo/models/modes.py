"""Training and evaluation mode of a model's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in its own mode again.

    The model's own flag is not enough: a fresh adapter trains inside a model that does not.
    """
    with _set_training(dict.fromkeys(model.modules(), False)):
        yield


@contextmanager
def without_own_noise(model: nn.Module) -> Iterator[None]:
    """Compute with the model, one of transformers without wrappers, as in evaluation while its adapters train.

    A model adds noise to its training in many ways: modules and functions of dropout, whole layers left out, jitter in
    routers, sampled experts. All of them read the training mode of a module of the model. Adapters keep theirs, and
    with it their dropout, and so does an embedding that adds NEFTune's noise. A decoder layer recomputes its
    activations only while it trains, so it is switched inside its checkpoint.
    """
    with _set_training({m: _checkpointed(m) and m.training for m in _own(model)}), around_checkpoints(model, _silent):
        yield


@contextmanager
def _silent(layer: nn.Module) -> Iterator[None]:
    with _set_training(dict.fromkeys(_own(layer), False)):
        yield


@contextmanager
def _set_training(modes: dict[nn.Module, bool]) -> Iterator[None]:
    before = {module: module.training for module in modes}
    try:
        for module, training in modes.items():
            module.training = training
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _own(model: nn.Module) -> list[nn.Module]:
    """The modules of the model itself, without those of adapters and those that compute otherwise while they train."""
    others: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            others.update(set(module.modules()) - set(module.get_base_layer().modules()))
        elif hasattr(module, "neftune_noise_alpha"):
            others.add(module)
        elif not type(module).__module__.startswith(("torch.", "transformers.models.")):
            # Some layers of quantisation libraries have a gradient only while they train.
            others.update([module] if hasattr(module, "in_features") else [])
    return [module for module in model.modules() if module not in others]


def _checkpointed(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing


@contextmanager
def around_checkpoints(
    model: nn.Module, context: Callable[[nn.Module], AbstractContextManager[None]]
) -> Iterator[None]:
    """Let layers that recompute their activations run in ``context(layer)``, in both passes.

    The second pass runs in backward, when whatever was set for the first one is over.
    """
    found: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        name = "checkpoint_fn" if isinstance(module, CheckpointWrapper) else "_gradient_checkpointing_func"
        if isinstance(module, CheckpointWrapper) or _checkpointed(module):
            found.append((module, name, getattr(module, name)))
    for module, name, checkpoint in found:
        setattr(module, name, partial(_run_within, module, context, checkpoint))
    try:
        yield
    finally:
        for module, name, checkpoint in found:
            setattr(module, name, checkpoint)


def _run_within(layer: nn.Module, context: Any, checkpoint: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    def inside(*inputs: Any, **named: Any) -> Any:
        with context(layer):
            return forward(*inputs, **named)

    return checkpoint(inside, *args, **kwargs)
