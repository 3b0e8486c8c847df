"""A trained Bradley-Terry reward model: differences of its rewards are log-odds."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from peft import PeftModel
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from madpo.core.errors import ConfigError, DataError, first_line
from madpo.models.engine.batches import padded, padded_batches, similar_lengths
from madpo.models.engine.logprobs import completion_states, hidden_states
from madpo.models.hyperparameters import Pooling
from madpo.models.load import load_classifier, load_tokenizer, placed, resolve_model
from madpo.runner.folder import final_folder

PROBE = "probe.safetensors"
"""Weights of a probe, in the place of an adapter."""


def reward_base(folder: Path) -> tuple[Path | str, Pooling]:
    """Where the base of a trained reward model lies, and which states its head reads.

    Raises:
        DataError: ``folder`` holds none.
    """
    try:
        about = json.loads((folder / "reward_model.json").read_bytes())
        if not isinstance(about, dict):
            raise TypeError("reward_model.json is no JSON object")
        relative = about.get("base_folder")  # of a step before the training, seen from here
        inside = None if relative is None else final_folder(folder.absolute()) / str(relative)
        base = resolve_model(str(inside or about["base"]))
        pooling: Pooling = TypeAdapter(Pooling).validate_python(about.get("pooling", "last"))
    except ConfigError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = first_line(error, 160)
        raise DataError(f"{folder} holds no reward model ({reason}); train one, or delete it and run again") from error
    if "probe" not in about and not (folder / "adapter" / "adapter_config.json").exists():
        raise DataError(f"{folder} has no adapter/adapter_config.json; delete the folder and train again")
    return base, pooling


class RewardModel:
    """A trained Bradley-Terry reward model: differences of its rewards are log-odds.

    Args:
        model: a sequence classifier with one output, with or without a PEFT adapter.
        tokenizer: for text; ids are scored as they are.
        pooling: which states the head reads; see :func:`pooled`.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, pooling: Pooling = "last") -> None:
        self.model, self.pooling = model, pooling
        self.inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.tokenizer = tokenizer
        self.inner.score.float()

    @classmethod
    def load(cls, folder: Path) -> RewardModel:
        """From ``reward_model.json`` (the base model's name, the pooling) and ``adapter`` (with the head), or a probe.

        Raises:
            DataError: ``folder`` holds none.
        """
        base, pooling = reward_base(folder)
        if (folder / PROBE).is_file():
            from madpo.rewards.probe_reward import ProbeReward

            return ProbeReward.load(folder)
        model = load_classifier(base, num_labels=1, adapter=folder / "adapter")
        return cls(placed(model), load_tokenizer(base), pooling)

    @torch.inference_mode()
    def score_ids(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int = 16,
        *,
        prompt_lengths: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """One reward per token sequence (prompt and response), in the order given.

        Real tokens are found by the attention mask: a padding token that doubles as end token, as many tokenizers have
        it, moves nothing.

        Args:
            prompt_lengths: tokens of each sequence that are its prompt's; without it a mean is over all tokens.

        Raises:
            DataError: an empty sequence.
        """
        lengths = np.zeros(len(sequences), dtype=np.int64) if prompt_lengths is None else np.asarray(prompt_lengths)
        found = np.zeros(len(sequences), dtype=np.float32)
        pad = self.tokenizer.pad_token_id
        for rows, ids, mask in padded_batches(sequences, batch_size, pad, self.inner, "Rewards"):
            rewards = self._rewards(ids, mask, torch.as_tensor(lengths[rows], device=ids.device), pairs=False)
            found[rows] = rewards.cpu().numpy()
        return found

    def _rewards(
        self,
        ids: Int[Tensor, "rows length"],
        mask: Int[Tensor, "rows length"],
        prompts: Int[Tensor, " rows"],
        *,
        pairs: bool,
    ) -> Float[Tensor, " rows"]:
        """Rewards of a batch; with ``pairs``, chosen rows come first, then rejected ones."""
        if pairs:
            states = completion_states(self.inner, ids, mask, completion_tokens(mask, prompts))
        else:
            states = hidden_states(self.inner, ids, mask)
        rewards: Tensor = self.inner.score(pooled(states, mask, self.pooling, prompts)).squeeze(-1)
        return rewards

    @torch.inference_mode()
    def score_pairs(
        self,
        chosen: Sequence[Sequence[int]],
        rejected: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        batch_size: int = 16,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Rewards of both sides of pairs; as :meth:`score_ids`, but the prompt of a pair is computed once.

        Equal sides get equal rewards, to the last bit.

        Args:
            chosen, rejected: token ids of prompt and completion.
            prompt_lengths: tokens of both sides of a pair that are the prompt's.
            batch_size: sequences at once, two a pair.

        Raises:
            DataError: an empty sequence.
        """
        pad, read = self.tokenizer.pad_token_id, functools.partial(self._rewards, pairs=True)
        found = over_pairs(self.inner, pad, chosen, rejected, prompt_lengths, batch_size, read)
        return found[0], found[1]

    def score_responses(
        self, prompt_ids: Iterable[Sequence[int]], response_ids: Iterable[Sequence[int]]
    ) -> NDArray[np.float32]:
        """One reward per response, given in token ids next to its prompt's.

        Raises:
            DataError: a prompt and a response that have no tokens together.
        """
        sequences, lengths = [], []
        for prompt, response in zip(prompt_ids, response_ids, strict=True):
            sequences.append([*map(int, prompt), *map(int, response)])
            lengths.append(len(prompt))
        return self.score_ids(sequences, prompt_lengths=lengths)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.float64]:
        """The same for text; prompt and response are tokenised each for itself, as in training."""
        if len(prompts) != len(completions):
            raise DataError(f"there are {len(prompts)} prompts but {len(completions)} responses; give one of each")
        before = []
        for prompt in prompts:
            ids = list(self.tokenizer(prompt)["input_ids"])
            if ids and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()  # the response goes on from here
            before.append(ids)
        after = [self.tokenizer(completion, add_special_tokens=False)["input_ids"] for completion in completions]
        return self.score_responses(before, after).astype(np.float64)


def over_pairs(
    model: nn.Module,
    pad: int,
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    batch_size: int,
    read: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> NDArray[np.float32]:
    """What ``read`` gives for both sides of pairs, ``2 x pairs x ...``, in batches of like lengths.

    Args:
        chosen, rejected, prompt_lengths, batch_size: as in :meth:`RewardModel.score_pairs`.
        read: (ids, mask, prompt lengths) of a batch, chosen rows first -> one value or row each.

    Raises:
        DataError: an empty sequence.
    """
    sides = [chosen, rejected]
    # By the longer side; a pair without tokens on one side has no reward to compare.
    sizes = [max(len(c), len(r)) if len(c) and len(r) else 0 for c, r in zip(chosen, rejected, strict=True)]
    lengths = np.asarray(prompt_lengths, dtype=np.int64)
    found = np.zeros((2, len(sizes)), dtype=np.float32)
    for rows in similar_lengths(sizes, max(1, batch_size // 2), "Rewards"):
        ids, mask = padded([side[row] for side in sides for row in rows], pad, model)
        values = read(ids, mask, torch.as_tensor(lengths[rows], device=ids.device).repeat(2)).float().cpu().numpy()
        if found.ndim != values.ndim + 1:
            found = np.zeros((2, len(sizes), *values.shape[1:]), dtype=np.float32)
        found[:, rows] = values.reshape(2, len(rows), *values.shape[1:])
    # Rows of one product may differ in the last bits, and rounding must not decide between equal texts.
    equal = [list(c) == list(r) for c, r in zip(chosen, rejected, strict=True)]
    found[1, equal] = found[0, equal]
    return found


def pooled(
    states: Float[Tensor, "rows length hidden"],
    mask: Int[Tensor, "rows length"],
    pooling: Pooling,
    prompt_lengths: Int[Tensor, " rows"],
) -> Float[Tensor, "rows hidden"]:
    """The state that a reward is read from, in float32; rows are padded on the right.

    ``last`` is the state of the last real token, the convention of sequence classifiers. ``mean`` is the mean over the
    completion's tokens. A base model's last state speaks of the next word; what a text is like is spread over its
    tokens, so a few hundred pairs teach a mean what they do not teach a last state (docs/log.md).
    """
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(-1) - 1].float()
    inside = completion_tokens(mask, prompt_lengths)
    total = states.float().masked_fill(~inside[..., None], 0.0).sum(1)
    return total / inside.sum(-1, keepdim=True)


def completion_tokens(
    mask: Int[Tensor, "rows length"], prompt_lengths: Int[Tensor, " rows"]
) -> Bool[Tensor, "rows length"]:
    """Which tokens are read; rows are padded on the right. A completion without tokens is read at the last one."""
    last = mask.sum(-1) - 1
    begin = torch.minimum(prompt_lengths.to(last), last)
    return mask.bool() & (torch.arange(mask.shape[-1], device=mask.device) >= begin[:, None])
