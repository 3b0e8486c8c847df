"""Which weights a LoRA adapter changes: chosen by the model's structure, and described in one line.

``all-linear`` is every linear layer of the language model but its output head. Left out are

- towers for images and audio: text never reaches them;
- routers of mixtures of experts and gates of shared experts: the load-balancing loss that keeps them even is not
  computed here;
- layers whose forward is not x W^T + b, and layers whose weight is read past their forward, as the fused kernels of
  state-space models do: there an adapter fails, or has no effect.

Experts are stacked parameters without a linear layer of their own; PEFT adapts them as ``target_parameters``.
"""

from __future__ import annotations

import functools
import inspect
import re
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from peft import LoraConfig, TaskType
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from madpo.core.errors import ConfigError, MadpoError, first_line
from madpo.core.progress import say_once
from madpo.models.engine.dependence import sharded
from madpo.models.engine.head import text_model
from madpo.models.modes import evaluating

if TYPE_CHECKING:
    from madpo.models.hyperparameters import LoRA

# ``self.layer.weight`` as a value. Its dtype or shape does not say how it is used, and a slice is Bloom's imitation of
# tensor parallelism, which is off.
_READ = re.compile(r"\bself\.(\w+)\.(\w+)\b(?!\s*\(|\[|\.(?:dtype|device|shape|size|ndim|numel|is_\w+)\b)")
_PROBE = 8  # tokens


def language_model(model: nn.Module) -> nn.Module:
    """The part of a transformers model that reads text; the model itself where it has no other part."""
    decoder = getattr(model, "get_decoder", None)
    found = model if decoder is None else decoder()
    return found if isinstance(found, PreTrainedModel) else model


def adapter_config(lora: LoRA, model: nn.Module, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> LoraConfig:
    """PEFT's configuration of an adapter on ``model``; a reward model's head trains in full and is saved with it."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type=TaskType[task],
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    if lora.targets == "all-linear":
        _choose(config, model)
    return config


@contextmanager
def adapting() -> Iterator[None]:
    """Turn what PEFT raises while it puts an adapter on a model into one sentence; other errors pass through.

    Raises ConfigError: in place of PEFT's error.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RuntimeError) as error:
        raised = list(traceback.walk_tb(error.__traceback__))
        if isinstance(error, MadpoError) or not raised[-1][0].f_globals.get("__name__", "").startswith("peft."):
            raise
        raise ConfigError(
            f"PEFT cannot put this adapter on the model ({first_line(error, 300).rstrip(' .')}); name other "
            'target_modules (lora.targets), or leave them at "all-linear", which takes the layers that can be adapted'
        ) from error


def _choose(config: LoraConfig, model: nn.Module) -> None:
    modules = {name: module for name, module in model.named_modules() if name}
    inside = set(language_model(model).modules())
    probe = _probe(model)
    if probe is not None:
        inside &= probe.called
    experts, gates = _mixtures(modules, inside, probe)
    heads = [getattr(model, "get_output_embeddings", lambda: None)(), getattr(model, "score", None)]
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and module in inside
        and module not in gates
        and not any(module is head for head in heads)
        and not _read_past_forward(modules, name, "weight")
        and _is_linear(module)
    ]
    as_modules = [name for name in linear if _kept(name.rpartition(".")[2], config, model)]
    floating = {name for name, p in model.named_parameters() if p.is_floating_point()}
    as_parameters = floating & {*(f"{name}.weight" for name in set(linear) - set(as_modules)), *experts}
    if config.lora_dropout:  # PEFT cannot put it before the adapter of a parameter
        as_parameters = set()
    lost = _lost([*as_modules, *(name.rpartition(".")[0] for name in as_parameters)], config, model)
    as_modules = [name for name in as_modules if name not in lost]
    as_parameters = {name for name in as_parameters if name.rpartition(".")[0] not in lost}
    config.target_modules = set(_shortened(as_modules, set(modules) - set(as_modules)))
    # PEFT sets this itself for each layer, with a warning where it was the other one.
    config.fan_in_fan_out = bool(as_modules) and all(isinstance(modules[name], Conv1D) for name in as_modules)
    config.target_parameters = _shortened(as_parameters, floating - as_parameters, parts=2) or None


class _Probe(NamedTuple):
    """What a forward pass of a few tokens showed.

    Attributes:
        called: modules that it went through and that return more than indices; text does not reach the others.
        choosing: modules that return indices, with or without other tensors.
    """

    called: set[nn.Module]
    choosing: set[nn.Module]


@torch.no_grad()
def _probe(model: nn.Module) -> _Probe | None:
    """None where the weights are not all here."""
    if sharded(model):
        return None
    found = _Probe(set(), set())

    def note(module: nn.Module, _: Any, output: Any) -> None:
        kinds = [leaf.is_floating_point() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not all(kinds):
            found.choosing.add(module)
        if any(kinds):
            found.called.add(module)
        else:  # no gradient comes back through indices
            found.called.difference_update(module.modules())

    device = next(model.parameters()).device
    handle = register_module_forward_hook(note)
    try:
        with evaluating(model):
            ids = torch.arange(1, 1 + _PROBE, device=device)[None] % model.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
            text_model(model)(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return found


def _shortened(names: Iterable[str], others: Iterable[str], parts: int = 1) -> list[str]:
    """The shortest suffixes, of at least ``parts`` parts, that match ``names`` and none of ``others``; sorted."""
    taken = {suffix for other in others for suffix in _suffixes(other)}
    return sorted({next(s for s in [*_suffixes(n)][parts - 1 :] if s not in taken or s == n) for n in names})


def _suffixes(name: str) -> Iterator[str]:
    """Ends of a dotted name, the shortest first; none begins with a layer's number."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in reversed(range(len(parts))) if not parts[start].isdigit())


def _kept(leaf: str, config: LoraConfig, model: nn.Module) -> bool:
    """Whether PEFT takes a layer of this name as it is.

    In families whose experts were separate layers in transformers 4 it takes ``gate_proj`` for the experts', and leaves
    dense layers and shared experts of that name out.
    """
    trial = LoraConfig(r=config.r, target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError:  # the name of one of two layers that were fused
        return False
    return leaf in trial.target_modules


def _lost(names: Iterable[str], config: LoraConfig, model: nn.Module) -> set[str]:
    """Layers whose adapter PEFT would not find again in the file that it saved.

    It renames what it reads as transformers renames the weights of checkpoints, and some of those patterns match an
    adapter's names by accident.
    """
    saved = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    states = {key: torch.empty(config.r, 1, device="meta") for key in saved}
    found = convert_peft_adapter_state_dict_for_transformers(model, config, states)
    return {name for key, name in saved.items() if key not in found}


def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer maps rows to rows as its shape says; some subclasses return a tuple, or split their input."""
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward) or "transformers" not in type(layer).__module__:
        return True  # of other libraries: quantised layers, which PEFT knows
    assert isinstance(layer, nn.Linear)
    try:
        found = layer(layer.weight.new_zeros((2, layer.in_features)))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(found, Tensor) and found.shape == (2, layer.out_features)


@functools.cache
def _reads(kind: Any) -> frozenset[tuple[str, str]]:
    """(child, attribute) of every ``self.child.attribute`` in a module's code."""
    try:
        return frozenset(_READ.findall(inspect.getsource(kind)))
    except (OSError, TypeError):  # no source at hand
        return frozenset()


def _read_past_forward(modules: dict[str, nn.Module], name: str, parameter: str) -> bool:
    """Whether a module's parent takes the parameter itself rather than calling the module."""
    parent, _, child = name.rpartition(".")
    kind: Any = type(modules.get(parent))
    return (child, parameter) in _reads(kind)


def _mixtures(
    modules: dict[str, nn.Module], inside: set[nn.Module], probe: _Probe | None
) -> tuple[list[str], set[nn.Module]]:
    """Names of the experts' weights that can be adapted, and the modules that choose or weigh experts.

    A mixture's weights are stacked over its E experts. Its router is the nearest module next to them whose last matrix
    has E rows, or that returns indices; a matrix of one row next to them weighs a shared expert.
    """
    stacks = {name: found for name, module in modules.items() if module in inside and (found := _stacks(module))}
    holders = {ancestor for name in stacks for ancestor in _ancestors(name)} | set(stacks)
    children: dict[str, list[str]] = {}
    for name in modules:
        children.setdefault(name.rpartition(".")[0], []).append(name)
    experts: list[str] = []
    gates: set[nn.Module] = set()
    for name, found in stacks.items():
        for block in _ancestors(name):
            if isinstance(modules[block], nn.ModuleList):  # the stack of layers
                break
            around = {}  # child -> rows of its last matrix, 0 where it has none
            for child in children[block]:
                if child not in holders:
                    shapes = [getattr(p, "ds_shape", p.shape) for p in modules[child].parameters()]
                    around[child] = next((int(shape[0]) for shape in reversed(shapes) if len(shape) == 2), 0)
            choosing = {child for child in around if probe is not None and modules[child] in probe.choosing}
            routers = choosing | {child for child, rows in around.items() if rows in found.values()}
            if not routers:
                continue
            chosen = routers | {child for child, rows in around.items() if rows == 1}
            gates.update(part for child in chosen for part in modules[child].modules())
            experts += [f"{name}.{p}" for p in found if not _read_past_forward(modules, name, p)]
            break
    return experts, gates


def _ancestors(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _stacks(module: nn.Module) -> dict[str, int]:
    """Matrices of a module's own that may be stacked over experts, with their number."""
    if isinstance(module, nn.Linear | Conv1D | nn.Embedding | _ConvNd):
        return {}
    count = next((n for name, n in vars(module).items() if name.endswith("num_experts") and isinstance(n, int)), 0)
    found = {}
    for name, parameter in module.named_parameters(recurse=False):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) == 3:
            found[name] = int(shape[0])
        elif len(shape) == 2 and count and shape[0] > count and shape[0] % count == 0:  # laid one under another
            found[name] = count
    return found


def announce(model: nn.Module) -> None:
    """Say what the adapter of a model that is about to be trained changes, once a process."""
    if (text := adapter_text(model)) is not None:
        say_once(text)


class AdapterSummary(NamedTuple):
    """Which of a model's weights an adapter changes.

    Attributes:
        changed: last parts of their names.
        share: of the model's parameters that those weights are.
        parameters: of the model without its adapter.
        frozen: part of the model -> its share, the largest first.
    """

    changed: list[str]
    share: float
    parameters: int
    frozen: dict[str, float]

    def text(self) -> str:
        """One line for a person; parts below 1 % are taken together."""
        large = {name: share for name, share in self.frozen.items() if share >= 0.01}
        rest = sum(self.frozen.values()) - sum(large.values())
        parts = [f"{name} {share:.1%}" for name, share in large.items()]
        if rest > 0:
            parts.append(f"{'others' if parts else 'all others'} {rest:.2%}")
        units = ((10**9, " billion"), (10**6, " million"), (10**3, " thousand"), (1, ""))
        unit, word = next((unit for unit in units if self.parameters >= unit[0]), units[-1])
        return (
            f"the adapter changes {', '.join(self.changed)}: {self.share:.1%} of the model's "
            f"{self.parameters / unit:.3g}{word} parameters; frozen: {', '.join(parts) or 'nothing'}"
        )


def adapter_text(model: nn.Module) -> str | None:
    """One line on what an adapter changes; None where the model has none that changes weights."""
    summary = adapter_summary(model)
    return None if summary is None else summary.text()


def adapter_summary(model: nn.Module) -> AdapterSummary | None:
    """What an adapter of any kind changes; None where the model has none that changes weights."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        return None
    changed: dict[int, str] = {}
    added: set[int] = set()
    for name, layer in layers:
        for part in (*layer.adapter_layer_names, *layer.other_param_names):
            found = getattr(layer, part, None)
            added.update(id(p) for p in (found.parameters() if isinstance(found, nn.Module) else ()))
        base, short = layer.get_base_layer(), _plain(name)
        weight, label = getattr(base, "weight", None), short.rpartition(".")[2]
        if isinstance(layer, ParamWrapper):
            weight = layer.get_param()
            label = label if layer.parameter_name == "weight" else f"{label}.{layer.parameter_name}"
        if isinstance(weight, Tensor):
            changed[id(weight)] = label
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # heads and embeddings that train in full
            whole = {id(p): _plain(name).rpartition(".")[2] for p in module.original_module.parameters()}
            added.update({id(p) for p in module.parameters()} - whole.keys())
            changed.update(whole)
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    text = {id(p) for p in language_model(inner).parameters()}
    sizes: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    for name, parameter in inner.named_parameters():
        size = _size(parameter)
        if id(parameter) in changed:
            sizes[changed[id(parameter)]] += size
        elif id(parameter) not in added:
            path = _plain(name).removeprefix("model.").split(".")
            frozen[path[-2] if id(parameter) in text and len(path) > 1 else path[0]] += size
    total = sizes.total() + frozen.total()
    return AdapterSummary(
        sorted(sizes), sizes.total() / total, total, {name: size / total for name, size in frozen.most_common()}
    )


def _plain(name: str) -> str:
    """A name in the model without its adapter."""
    return re.sub(r"\.(?:base_layer|original_module)(?=\.|$)", "", name)


def _size(parameter: Tensor) -> int:
    """Numbers in a parameter, also where it is split over processes or packed into 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return int(
        getattr(parameter, "ds_numel", 0)
        or (parameter if state is None else torch.empty(state.shape, device="meta")).numel()
    )
