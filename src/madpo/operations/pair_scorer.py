"""Any reward model, ours or another's, ready to score pairs of text or messages; and which pairs it was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from madpo.core.errors import ConfigError, DataError, StorageError, first_line, located
from madpo.core.storage import expanded, write_atomically
from madpo.data.findings import Seen
from madpo.data.messages import Text
from madpo.data.rows import Pair
from madpo.data.templates import Clock, render
from madpo.data.tokens import Encoded, Encoder
from madpo.models.load import load_classifier, load_config, load_tokenizer, placed, resolve_model
from madpo.models.loading import loading
from madpo.models.locate import refuse_fetching
from madpo.operations.preconditions import own_reward_model, refuse_other_outputs
from madpo.operations.responses import response_pairs
from madpo.operations.running import digest
from madpo.rewards.reward_model import PROBE, RewardModel, reward_base

TRAINED_ON = "trained_on.safetensors"
"""In the folder of a reward model: keys of the pairs that decided its weights, or when to stop."""


class PairEncoder:
    """Tokenises pairs of text or messages as a reward model was trained.

    Args:
        own: trained by :func:`reward`: then a completion ends with its end token and nothing after it. Other models
            see the chat template's text as it is, as TRL's reward trainer tokenises it.
        clock: the date that the chat template prints; None is now.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, own: bool, clock: Clock | None = None) -> None:
        self.tokenizer, self.own = tokenizer, own
        self.encoder = Encoder(tokenizer, clock)

    def ids(self, pairs: Sequence[Pair], name: str, unit: str) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Token ids of prompt and completion, for both sides, and how many are the prompt's.

        Raises:
            ConfigError: the pairs are messages, and the reward model has no chat template.
            DataError: its chat template refuses a conversation.
        """
        encoded = self.encoder.encode(pairs, lambda number: f"{name}, {unit} {number}")
        for result in encoded:
            if isinstance(result, DataError):
                raise result
        good = [result for result in encoded if isinstance(result, Encoded)]
        if not self.own and pairs and isinstance(pairs[0].prompt, list):
            chosen, rejected = self._rendered(pairs, "chosen"), self._rendered(pairs, "rejected")
        else:
            chosen, rejected = ([[*e.prompt_ids, *getattr(e, s)] for e in good] for s in ("chosen_ids", "rejected_ids"))
        return chosen, rejected, [len(e.prompt_ids) for e in good]

    def _rendered(self, pairs: Sequence[Pair], side: str) -> list[list[int]]:
        texts = []
        for pair in pairs:
            with located(f"pair {pair.pair_id}"):
                texts.append(render(self.tokenizer, pair.prompt + getattr(pair, side), self.encoder.clock))
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]


class PairScorer:
    """A reward model that scores pairs of text or messages.

    Args:
        model: scores token ids.
        own: as for :class:`PairEncoder`.
        batch_size: sequences per forward pass; it decides the padding, and so the last digits.
        clock: as for :class:`PairEncoder`.
    """

    def __init__(self, model: RewardModel, *, own: bool, batch_size: int = 16, clock: Clock | None = None) -> None:
        self.model, self.batch_size = model, batch_size
        self.encoder = PairEncoder(model.tokenizer, own=own, clock=clock)
        self._pad = None if own else model.inner.config.get_text_config().pad_token_id

    def _read(self, sequences: Sequence[list[int]]) -> list[list[int]]:
        """The sequences up to where transformers reads another's classifier: its last token that is not the padding's,
        which may be the end token's."""
        ends = ([i for i, token in enumerate(ids, 1) if token != self._pad] or [1] for ids in sequences)
        return [ids[: end[-1]] for ids, end in zip(sequences, ends, strict=True)]

    def score_pairs(self, pairs: Sequence[Pair], name: str, unit: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """(rewards of the chosen, rewards of the rejected), float64, in the reward model's unit.

        Raises:
            ConfigError, DataError: as :meth:`PairEncoder.ids`.
        """
        one, other, lengths = self.encoder.ids(pairs, name, unit)
        chosen, rejected = self.model.score_pairs(self._read(one), self._read(other), lengths, self.batch_size)
        return chosen.astype(np.float64), rejected.astype(np.float64)

    def score_responses(self, prompts: Sequence[Text], responses: Sequence[str]) -> NDArray[np.float64]:
        """One reward per response, in the reward model's unit; messages are answered by a message.

        Raises:
            ConfigError, DataError: as :meth:`PairEncoder.ids`.
        """
        ids, _, lengths = self.encoder.ids(response_pairs(prompts, responses, responses), "the responses", "response")
        return self.model.score_ids(self._read(ids), self.batch_size, prompt_lengths=lengths).astype(np.float64)


def load_scorer(source: str | Path, *, batch_size: int = 16, clock: Clock | None = None) -> PairScorer:
    """The reward model of a folder that :func:`reward` wrote, or a sequence classifier with one output.

    Args:
        source: that folder, another model folder, or a hub id.

    Raises:
        ConfigError: it is no reward model, or cannot be loaded.
    """
    folder, base = _located(source)
    if folder is None:
        model = RewardModel(placed(load_classifier(base)), load_tokenizer(base))
        return PairScorer(model, own=False, batch_size=batch_size, clock=clock)
    about = json.loads((folder / "reward_model.json").read_bytes()).get("probe")
    if about is not None and isinstance(base, Path) and about.get("model_digest") not in (None, digest(base)):
        raise DataError(f"{folder} is a probe of another model than {base} holds now; fit it again with --probe {base}")
    return PairScorer(RewardModel.load(folder), own=True, batch_size=batch_size, clock=clock)


def load_pair_encoder(source: str | Path, clock: Clock | None = None) -> PairEncoder:
    """How a reward model reads pairs, without its weights: what is no reward model is refused before hours of work.

    Args:
        source: as for :func:`load_scorer`.

    Raises:
        ConfigError, DataError: as :func:`load_scorer`.
    """
    folder, base = _located(source)
    return PairEncoder(load_tokenizer(base), own=folder is not None, clock=clock)


def _located(source: str | Path) -> tuple[Path | None, Path | str]:
    """The folder of a reward model of ours, None for another's; and where its base or the whole model is."""
    if (folder := own_reward_model(source)) is not None:
        base, _ = reward_base(folder)
        refuse_fetching(base, folder)
        return folder, base
    base = resolve_model(str(source))
    config = load_config(base)
    refuse_other_outputs(source, config.architectures, config.num_labels)
    with loading(source), torch.device("meta"):  # its parts without their weights
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    if not hasattr(model, "score"):
        raise ConfigError(
            f"{source} does not read its score at the last token ({type(model).__name__}); score the pairs with its "
            "own code and give the columns with --score_columns"
        )
    return None, base


def reward_model_digest(source: str) -> str | None:
    """SHA-256 of a reward model's files (of one of ours, its adapter's or its probe's); None for one of the hub."""
    folder = expanded(source)
    if (folder / PROBE).is_file():
        return digest(folder / PROBE)
    own = (folder / "reward_model.json").is_file()
    return digest(folder / "adapter") if own else digest(folder)


def _keys(pairs: Iterable[Pair]) -> NDArray[np.bytes_]:
    seen = Seen()
    for pair in pairs:
        seen.add(pair)
    return seen.unordered()


def remember_pairs(folder: Path, pairs: Iterable[Pair]) -> None:
    """Keep which pairs a reward model was trained on, as keys, for :func:`seen_pairs`."""
    write_atomically(folder / TRAINED_ON, save({"pairs": _keys(pairs).view(np.uint8).reshape(-1, 16)}))


def seen_pairs(source: str | Path, pairs: Iterable[Pair]) -> int | None:
    """How many of the pairs, in either order, a reward model was trained on; None where its folder does not say."""
    path = expanded(source) / TRAINED_ON
    if not path.is_file():
        return None
    try:
        trained = load_file(path)["pairs"].view("S16").ravel()
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise StorageError(f"{path} is damaged ({first_line(error)}); copy the reward model again") from error
    return int(np.isin(_keys(pairs), trained).sum())
