"""Reading the weights of models and adapters so that no weight is left at random without a word.

transformers and PEFT initialise at random what a file lacks, and report it in a log. Every load of weights goes through
:func:`pretrained`, which reads that report and refuses what is missing by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from madpo.core.errors import ConfigError, listed
from madpo.core.progress import say_once
from madpo.models.fitting import bounded, packed_weight, refuse_two_values, refuse_uncomputable
from madpo.models.loading import loading
from madpo.models.packaged import quiet_transformers
from madpo.models.untrusted import ADAPTER_WEIGHTS, check_adapter, check_model

_SHOWN = 3
# What quantised layers have in the place of their weights, and next to them.
_PACKED = re.compile(r"\.(weight_packed|qweight|qzeros|SCB|absmax|quant_map)$")
_SCALE = re.compile(r"\.weight_scale(_inv|_2)?$")


def pretrained(
    auto: Any,
    place: Path | str,
    *,
    adapter: Path | None = None,
    new_head: bool = False,
    use_safetensors: bool | None = True,
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel | PeftModel:
    """A model with all of its weights from safetensors, and an adapter on it where one is given.

    Args:
        auto: the class whose ``from_pretrained`` is called, such as ``AutoModelForCausalLM``.
        adapter: folder of a PEFT adapter. A weight that it brings (the head of a reward model) may be missing in
            ``place``.
        new_head: the caller initialises everything outside the backbone itself, so this may be missing.
        use_safetensors, trust_remote_code: what else than the defaults a user of the trainer has asked for in so many
            words (``model_init_kwargs``); then the folder is not checked.
        settings: of ``from_pretrained``.

    Raises:
        ConfigError: a weight is missing, has another shape or two values, its configuration makes another model than
            its weights are of, a file is damaged or could run code.
        StorageError, MemoryShortage: as :func:`madpo.models.loading.loading`.
    """
    if use_safetensors and not trust_remote_code:
        check_model(place, settings.get("revision"))
    with loading(place), quiet_transformers(), bounded(place):
        model, found = auto.from_pretrained(
            place,
            use_safetensors=use_safetensors,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name, which transformers' own error does not give
            **settings,
        )
    made_later: set[str] = set()
    if new_head and (prefix := model.base_model_prefix):
        names = found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]}
        made_later = {name for name in names if not name.startswith(f"{prefix}.")}
    _refuse_quantised(str(place), model, found["unexpected_keys"])
    adapted = None
    if adapter is not None:
        adapted, brought = with_adapter(model, adapter)
        made_later |= brought
    _refuse_missing(str(place), model, found, made_later)
    refuse_two_values(place)
    _say_unused(str(place), model, found["unexpected_keys"])
    refuse_uncomputable(place, model)
    return model if adapted is None else adapted


class NamedArchitecture:
    """What ``create_model_from_path`` of TRL takes as an architecture: the class that config.json names.

    Args:
        auto: another class to load the model with.
    """

    def __init__(self, auto: Any = None) -> None:
        self.auto = auto

    def from_pretrained(self, place: str, **settings: Any) -> PreTrainedModel | PeftModel:
        """As :func:`pretrained`."""
        auto = self.auto
        if auto is None:
            code = {name: settings[name] for name in ("revision", "trust_remote_code") if name in settings}
            with loading(place):
                config = AutoConfig.from_pretrained(place, **code)
            auto = getattr(transformers, (config.architectures or ["none"])[0], None)
            if not (isinstance(auto, type) and issubclass(auto, PreTrainedModel)):
                remote = getattr(config, "auto_map", None) or {}
                image = AutoModelForImageTextToText
                auto = image if image.__name__ in remote else AutoModelForCausalLM
        return pretrained(auto, place, **settings)


def _refuse_quantised(place: str, model: PreTrainedModel, unexpected: Collection[str]) -> None:
    """Refuse packed or scaled weights that would be read as plain ones.

    transformers skips a method that it does not know, and without ``quantization_config`` nothing says how they are
    stored.
    """
    if getattr(model, "hf_quantizer", None) is not None or "is_quantized" in vars(model):
        return  # read by its method, or made plain by it
    named = getattr(model.config, "quantization_config", None)
    method = named.get("quant_method") if isinstance(named, dict) else getattr(named, "quant_method", named)
    if named is not None:
        raise ConfigError(
            f"{place} has weights that are quantised by {method}, which transformers {transformers.__version__} does "
            "not know; give the model with plain weights"
        )
    packed = next((name for name in unexpected if _PACKED.search(name)), None)
    if packed is None:
        packed = packed_weight(place, scaled=any(_SCALE.search(name) for name in unexpected))
    if packed is not None:
        raise ConfigError(
            f"{place} has quantised weights (its files hold {packed}), and its config.json does not say how they are "
            "stored (quantization_config); copy the config.json that belongs to them, or give the model with plain "
            "weights"
        )


def _refuse_missing(place: str, model: nn.Module, found: Mapping[str, Any], made_later: Collection[str]) -> None:
    shapes = {name: shapes for name, *shapes in found["mismatched_keys"]}
    missing = sorted({*found["missing_keys"], *shapes} - {*made_later})
    if not missing:
        return
    kind, first = type(model).__name__, missing[0]
    if absent := [name for name in missing if name not in shapes]:
        raise ConfigError(
            f"{place}: {len(absent)} of the {len(model.state_dict())} weights of {kind} are missing in its files "
            f"({listed(absent, _SHOWN)}), and would be random; {_remedy(absent, found['unexpected_keys'])}"
        )
    stored, expected = (tuple(shape) for shape in shapes[first])
    raise ConfigError(
        f"{place}: {first} has the shape {stored} in its files, but its config.json asks for {expected}; give the "
        "config.json that belongs to these weights, or copy the files again"
    )


def _remedy(absent: Sequence[str], unexpected: Collection[str]) -> str:
    """What may have happened, by the names that are there instead."""
    if any(".base_layer." in name or ".lora_" in name for name in unexpected):
        return "it was saved with an adapter in it: merge the adapter first (merge_and_unload), and save that model"
    ends = {name.split(".", 1)[-1]: name for name in sorted(absent)}  # without the first part, which wrappers change
    for name in sorted(unexpected):
        parts = name.split(".")
        tails = (".".join(parts[i:]) for i in range(len(parts) - 1))
        if (tail := next((tail for tail in tails if tail in ends), None)) is not None:
            return (
                f"it has {name} where {ends[tail]} is expected: rename its tensors, or save the model again without "
                "what was wrapped around it"
            )
    return "copy or download its files again, or save it again with save_pretrained"


def _say_unused(place: str, model: nn.Module, unexpected: Iterable[str]) -> None:
    """Warn of tensors that belong to modules which the model has: its configuration may not be theirs.

    Tensors of other modules (a vision tower, a head for another task) are left out as transformers does.
    """

    def numberless(name: str) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)

    modules = {numberless(name) for name, _ in model.named_modules() if name}
    unused = sorted(name for name in unexpected if numberless(name.rpartition(".")[0]) in modules)
    if unused:
        say_once(
            f"{place}: {len(unused)} tensors of its files are not used by {type(model).__name__} "
            f"({listed(unused, _SHOWN)}); its config.json may belong to another model (fewer layers, no biases, plain "
            "weights)."
        )


def with_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str = "default") -> tuple[PeftModel, set[str]]:
    """The model with the adapter of ``folder``, and the weights of the model itself that the adapter brings.

    As ``PeftModel.from_pretrained``, which keeps the result of loading for itself. The model may have adapters of other
    names. Raises ConfigError: the two do not fit, with the weights that are missing or left over.
    """
    check_adapter(folder)
    with loading(folder, "adapter"), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of them is refused here
        with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise ConfigError(
                f"{folder} is an adapter of virtual tokens ({PeftType(config.peft_type).value}), which sampling "
                "and scoring would leave out; give one that changes weights, such as LoRA"
            )
        config.inference_mode = True
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        with bounded(folder, ADAPTER_WEIGHTS):
            if isinstance(model, PeftModel):
                adapted = model
                adapted.add_adapter(name, config)
            else:
                adapted = kind(model, config, name)
        try:
            result = adapted.load_adapter(str(folder), name)
        except (KeyError, RuntimeError):  # a head or a token that is missing; a tensor of another shape
            _refuse_other_shapes(folder, adapted, stored)
            raise
    if result.missing_keys:
        raise _not_of_this_model(folder, "lacks", [key.replace(f".{name}", "") for key in result.missing_keys])
    if result.unexpected_keys:
        unused = [key.replace(f".{name}", "") for key in result.unexpected_keys]
        raise _not_of_this_model(folder, "has no place in this model for", unused)
    brought = {key.removeprefix("base_model.model.") for key in stored}
    return adapted, brought


def _refuse_other_shapes(folder: Path, adapted: PeftModel, stored: Mapping[str, tuple[int, ...]]) -> None:
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if absent := sorted(expected.keys() - stored.keys()):
        raise _not_of_this_model(folder, "lacks", absent)
    for name, tensor in expected.items():
        if tuple(tensor.shape) != stored[name]:
            raise ConfigError(
                f"{folder}: {name} has the shape {stored[name]}, but its adapter_config.json and this base model ask "
                f"for {tuple(tensor.shape)}; give the base model that it was trained on, or copy its folder again"
            )


def _not_of_this_model(folder: Path, how: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{folder}: the adapter {how} {len(names)} weights ({listed(sorted(names), _SHOWN)}); give the base model that "
        "it was trained on, or copy its folder again"
    )
