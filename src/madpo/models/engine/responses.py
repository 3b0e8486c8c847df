"""What a model writes to prompts: token ids with their text, and how far they are from the reference."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from madpo.core.errors import ConfigError
from madpo.core.progress import say_once
from madpo.models.engine.batches import padded, similar_lengths
from madpo.models.engine.inference import Inference
from madpo.models.engine.kl import completion_kl
from madpo.models.engine.logprobs import completion_logps, unwrapped
from madpo.models.engine.sampling import generate
from madpo.models.loading import loading
from madpo.models.packaged import quiet_transformers

_DECODING = {
    *("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "num_beams"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("min_length", "min_new_tokens", "length_penalty", "exponential_decay_length_penalty", "penalty_alpha"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "stop_strings", "guidance_scale"),
}
"""Fields of a model's generation settings that would change what it writes."""


class Drawing(Protocol):
    """How responses are drawn: what every configuration that samples has."""

    @property
    def seed(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...


class Response(NamedTuple):
    """One sampled response: its tokens (the end token included), their text, and whether it ended by itself."""

    ids: list[int]
    text: str
    ended: bool


def respond(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    config: Drawing,
    *,
    keys: Sequence[int],
    draw: int,
    ends: Collection[int],
    description: str,
    samples: int = 1,
    temperature: float | None = None,
) -> list[list[Response]]:
    """Responses to every prompt: ``samples`` lists, each with one response per prompt in their order.

    Args:
        keys, draw: name the prompt and which of its responses the first one is, for the random numbers.
        temperature: in place of the configuration's.
        ends: token ids that end a response (:func:`end_tokens`).
    """
    used = {"temperature": config.temperature if temperature is None else temperature}
    _say_unused(model, used | {"top_p": config.top_p, "top_k": config.top_k})
    found = generate(
        model,
        prompt_ids,
        keys=keys,
        draw=draw,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        eos_token_ids=ends,
        temperature=used["temperature"],
        top_p=config.top_p,
        top_k=config.top_k,
        samples=samples,
        batch_size=config.batch_size,
        description=f"{description}, tokens",
    )
    responses = [Response(ids, decode(tokenizer, ids), ids[-1] in ends) for ids in found]
    return [responses[k::samples] for k in range(samples)]


def _say_unused(model: nn.Module, used: Mapping[str, Any]) -> None:
    """Say once which of a model's own generation settings have no effect, since only ours and its end tokens have."""
    settings = getattr(unwrapped(model), "generation_config", None)
    named = {} if settings is None else settings.to_diff_dict()
    unused = [f"{name} {named[name]}" for name in sorted(_DECODING & named.keys()) if named[name] != used.get(name)]
    if unused:
        say_once(
            f"{getattr(model, 'name_or_path', 'the model')}: generation_config.json names {', '.join(unused)}, which "
            "are not used; temperature, top_p and top_k of the settings say how responses are drawn."
        )


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those that the model's generation settings name.

    Raises:
        ConfigError: these settings name something else than token ids.
    """
    ids = _named(getattr(model, "generation_config", None), getattr(model, "name_or_path", "the model"))
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def refuse_end_tokens(place: Path | str) -> None:
    """Refuse the generation settings of a model that :func:`end_tokens` would, before the model is loaded
    (ConfigError).
    """
    with loading(place), quiet_transformers():
        try:
            settings = GenerationConfig.from_pretrained(place)
        except OSError:
            return  # as loading the model, which takes those of config.json
        _named(settings, place)


def _named(settings: GenerationConfig | None, place: Path | str) -> list[int | None]:
    named = getattr(settings, "eos_token_id", None)
    ids = [*named] if isinstance(named, list | tuple) else [named]
    if any(i is not None and type(i) is not int for i in ids):
        raise ConfigError(
            f"{place}: eos_token_id is {named!r} in its generation_config.json, and must be a token id or a list of "
            "them; correct it there, or in config.json"
        )
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ``ids`` without special tokens, white space as it is."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Divergence(NamedTuple):
    """Of each response, summed over its tokens, nats: log-probability under the policy, KL(policy || reference), and
    log-probability under the reference."""

    logps: NDArray[np.float64]
    kl: NDArray[np.float64]
    ref_logps: NDArray[np.float64]


@torch.no_grad()
def divergence(
    policy: nn.Module | None,
    reference: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad: int,
    batch_size: int,
    description: str = "KL",
) -> Divergence:
    """How far each response's policy is from its reference, by one pass of either.

    Responses to one prompt are scored as pairs, so that half of its copies are left out.

    Args:
        policy: None gives the log-probability under the reference only.
    """
    found = np.zeros((3, len(responses)))
    models = [model for model in (policy, reference) if model is not None]
    batches = _batches(prompt_ids, responses, reference, pad, batch_size, description)
    with Inference(*models, tokens=sum(map(len, [*prompt_ids, *responses]))):
        for rows, given in batches:
            if policy is None:
                found[2, rows] = completion_logps(reference, **given).logps.double().cpu().numpy()
            else:
                parts = completion_kl(policy, reference, **given)
                found[:, rows] = torch.stack(parts).double().cpu().numpy()
    return Divergence(*found)


def _batches(
    prompt_ids: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    model: nn.Module,
    pad: int,
    batch_size: int,
    description: str,
) -> Iterator[tuple[NDArray[np.int64], dict[str, Any]]]:
    """(rows, arguments of :func:`madpo.models.engine.logprobs.completion_logps`) on the model's device.

    Rows of like length share a batch. Where a prompt has several responses, these do, as pairs.
    """
    whole = [[*prompt, *response] for prompt, response in zip(prompt_ids, responses, strict=True)]
    # Packed rows have no padding, so that pairs need not be of like length.
    pairs = batch_size > 1 and 2 * len(set(map(tuple, prompt_ids))) <= len(whole)
    order = sorted(range(len(whole)), key=lambda row: tuple(prompt_ids[row])) if pairs else None
    size = batch_size - batch_size % 2 if pairs else batch_size
    for batch in similar_lengths([len(ids) for ids in whole], size, description, order):
        even = pairs and len(batch) % 2 == 0
        rows = np.concatenate([batch[::2], batch[1::2]]) if even else batch
        ids, mask = padded([whole[row] for row in rows], pad, model)
        completion = mask.clone()
        for i, row in enumerate(rows):
            completion[i, : len(prompt_ids[row])] = 0
        given = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion, "pairs": even}
        yield rows, given
