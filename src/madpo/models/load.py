"""Loading models: the hub, a folder, a packaged file, or a tiny random one for tests and smoke runs."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from madpo.core.errors import ConfigError
from madpo.models.hyperparameters import LoRA as LoRA
from madpo.models.loading import loading
from madpo.models.locate import TINY_FAMILIES
from madpo.models.locate import load_tokenizer as load_tokenizer
from madpo.models.locate import resolve_model as resolve_model
from madpo.models.packaged import made_at_once, quiet_transformers
from madpo.models.untrusted import check_model
from madpo.models.weights import pretrained

# The last two are SentencePiece's and Mistral's own, which llama.cpp and vLLM read.
_COMPANIONS = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"),
    *("audio_tokenizer_config.json", "tokenizer.model", "tekken.json"),
)


def compute_dtype(device: str | None = None) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively (AVX-512 BF16 or AMX; a GPU with bf16), else float32."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device == "mps" or (device is None and torch.backends.mps.is_available()):
        return torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return torch.bfloat16 if native else torch.float32


def load_config(path: Path | str) -> PreTrainedConfig:
    """The configuration of a model: a folder or a hub id.

    Raises:
        ConfigError, StorageError: as :func:`madpo.models.loading.loading`.
    """
    check_model(path)
    with loading(path), quiet_transformers():
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    named = config.architectures
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ConfigError(
            f"{path}: architectures is {named!r} in its config.json, and must be a list of names; copy the file again"
        )
    return config


def load_model(
    path: Path | str, *, dtype: torch.dtype | Literal["auto"] | None = None, adapter: Path | None = None
) -> PreTrainedModel | PeftModel:
    """A causal language model from safetensors, with an adapter on top where one is given.

    A model that reads images or sound as well is loaded whole, by the class that its configuration names.

    Args:
        dtype: of the weights; None is :func:`compute_dtype`, "auto" is as stored. Adapters stay in float32.
        adapter: folder of a PEFT adapter.

    Raises ConfigError, StorageError, MemoryShortage: as :func:`madpo.models.weights.pretrained`.
    """
    return placed(pretrained(language_class(path), path, dtype=dtype or compute_dtype(), adapter=adapter))


def language_class(path: Path | str) -> Any:
    """The class to load a model with that writes text. Raises ConfigError: an encoder-decoder."""
    config = load_config(path)
    if config.is_encoder_decoder:
        raise ConfigError(f"{path} is an encoder-decoder model; give a decoder-only model")
    named = (config.architectures or [None])[0]
    text, multimodal = AutoModelForCausalLM._model_mapping, AutoModelForMultimodalLM._model_mapping
    # Some configurations have both: Qwen3.5's text model is a part of what its checkpoints hold.
    if type(config) in multimodal and (type(config) not in text or multimodal[type(config)].__name__ == named):
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def load_classifier(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    adapter: Path | None = None,
    new_head: bool = False,
    **settings: Any,
) -> PreTrainedModel | PeftModel:
    """A sequence classifier from safetensors; ``settings`` such as ``num_labels`` go to its configuration.

    With ``new_head`` the caller initialises the head itself, so ``path`` may be a language model. Otherwise as
    :func:`load_model`.
    """
    config = load_config(path)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ConfigError(
            f"{path} cannot be a reward model: transformers has no sequence classifier for {config.model_type}; give a "
            "model of text"
        )
    settings |= {"dtype": dtype or compute_dtype(), "adapter": adapter, "new_head": new_head}
    return pretrained(AutoModelForSequenceClassification, path, **settings)


def load_quantised(path: Path | str) -> PreTrainedModel:
    """A causal language model with its weights in 4 bits (NF4, double quantisation), ready for an adapter: QLoRA.

    No GPU has run this yet. Raises ConfigError: there is no GPU, or bitsandbytes is not installed.
    """
    if not torch.cuda.is_available():
        raise ConfigError("weights of 4 bits need a GPU, and there is none; leave qlora out: LoRA runs everywhere")
    if find_spec("bitsandbytes") is None:
        raise ConfigError("weights of 4 bits need the package bitsandbytes; pip install bitsandbytes")
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    dtype, device = compute_dtype(), {"": torch.cuda.current_device()}
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = pretrained(language_class(path), path, quantization_config=how, dtype=dtype, device_map=device)
    prepared: PreTrainedModel = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return prepared


def merged(model: nn.Module) -> PreTrainedModel:
    """The model with its PEFT adapter folded into the weights in place; the sum is taken in float32 or wider.

    Weights without an adapter keep their bits. A head that shares the weight of an adapted embedding gets a copy.
    """
    inner: Any = model.get_base_model()  # type: ignore[operator]
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    adapted = isinstance(embedding, BaseTunerLayer) and not isinstance(head, BaseTunerLayer)
    if adapted and embedding.get_base_layer().weight is getattr(head, "weight", None):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        weights = [(p, p.dtype) for p in layer.get_base_layer().parameters(recurse=False)]
        for weight, dtype in weights:
            weight.data = weight.data.to(torch.promote_types(dtype, torch.float32))
        layer.merge()
        for weight, dtype in weights:
            weight.data = weight.data.to(dtype)
    plain: Any = model.unload()  # type: ignore[operator]
    head = plain.get_output_embeddings()
    # Where they are two by now, loading what is saved must not tie them again.
    if head is not None and head.weight is not plain.get_input_embeddings().weight:
        plain.config.tie_word_embeddings = plain.config.get_text_config().tie_word_embeddings = False
    return cast(PreTrainedModel, plain)


def save_model(model: PreTrainedModel, out: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a whole model with its tokenizer, and the processors of images and sound that its base has.

    The tokenizer must be the base's own.
    """
    vars(model).pop("forward", None)  # an installed completion head belongs to the object, not to the weights
    with quiet_transformers():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    copy_companions(model.name_or_path, out)


def copy_companions(base: str | Path, out: Path) -> None:
    """Copy what a base model has next to its weights and transformers' tokenizer, and a server of it asks for."""
    for name in _COMPANIONS:
        source = cached_file(
            str(base), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if source is not None and not (out / name).exists():
            shutil.copyfile(source, out / name)


_TEXT = """The film begins slowly, but the story grows on you. A good cast, a bad script, and a wonderful ending.
I watched this movie with my family and we all loved every minute of it. The acting is terrible and the plot is
worse. What a waste of time! The music was beautiful, the pictures were great, and the jokes made me laugh. Nobody
should ever have to see this boring, awful, stupid picture. It is one of the best films of the year, and I would
gladly see it again. The director has no idea what to do with the actors, and neither have they. Funny, warm and
full of life: this is what cinema is for. Do not believe the critics; it is simply dull.
"""

_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def build_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a random model of two layers with a byte-level tokenizer; the same bytes for the same seed.

    The family is "gemma3" (with a sliding window of 8 tokens), "llama" or "qwen3". The folder appears at once and
    complete.
    """
    if family not in TINY_FAMILIES:
        raise ConfigError(f"there is no tiny model {family!r}; known are {', '.join(TINY_FAMILIES)}")
    tokenizer = small_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    if family == "gemma3":
        shape |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = AutoConfig.for_model({"gemma3": "gemma3_text"}.get(family, family), **shape)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.random.set_rng_state(state)
    with made_at_once(folder) as workspace, quiet_transformers():
        model.save_pretrained(workspace / "out")
        tokenizer.save_pretrained(workspace / "out")
    return folder


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 400 entries at most."""
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=_CHAT
    )


def placed(model: nn.Module) -> Any:
    """The model ready to score: on the GPU where there is one, dropout off."""
    return (model.to("cuda") if torch.cuda.is_available() else model).eval()
