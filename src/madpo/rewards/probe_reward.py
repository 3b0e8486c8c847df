"""A frozen probe as a reward model: a folder with its weights, and rewards of any response."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from madpo.core.errors import DataError, first_line
from madpo.core.storage import write_atomically
from madpo.models.engine.features import POOLING, feature_width
from madpo.models.engine.logprobs import completion_features
from madpo.models.load import load_model, load_tokenizer, placed
from madpo.models.locate import lasting
from madpo.rewards.probe import ProbeWeights
from madpo.rewards.reward_model import PROBE, RewardModel, completion_tokens, over_pairs, reward_base
from madpo.runner.folder import final_folder


class ProbeReward(RewardModel):
    """A frozen probe on a causal language model: r(response) = weights . (features - centre), log-odds.

    Args:
        model: a transformers model, without wrappers.
        layers: whose states are the features.
        weights: of the probe.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, layers: Sequence[int], weights: ProbeWeights
    ) -> None:
        self.model = self.inner = model
        self.tokenizer, self.pooling = tokenizer, "mean"
        self.layers, self.weights = tuple(layers), weights

    @classmethod
    def load(cls, folder: Path) -> ProbeReward:
        """From a folder that :func:`save_probe` wrote.

        Raises:
            DataError: it holds none, or one for a model of another shape.
        """
        base, _ = reward_base(folder)
        try:
            about = json.loads((folder / "reward_model.json").read_bytes())["probe"]
            layers, penalty = tuple(int(layer) for layer in about["layers"]), float(about["penalty"])
            table = load_file(folder / PROBE)
            weights = ProbeWeights(table["weights"].astype(np.float64), table["centre"].astype(np.float64), penalty)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            reason = first_line(error, 160)
            raise DataError(f"{folder} holds no probe that can be read ({reason}); fit it again") from error
        model = placed(load_model(base))
        if about.get("pooling") != POOLING or weights.weights.shape != (feature_width(model, layers),):
            raise DataError(f"{folder} is a probe of another model, or of another version; fit it again")
        return cls(model, load_tokenizer(base), layers, weights)

    def _rewards(self, ids: Tensor, mask: Tensor, prompts: Tensor, *, pairs: bool) -> Tensor:
        features = completion_features(
            self.inner, ids, mask, completion_tokens(mask, prompts), self.layers, pairs=pairs
        )
        return torch.from_numpy(self.weights.rewards(features.cpu().numpy()))


def save_probe(
    folder: Path,
    model: str,
    layers: Sequence[int],
    weights: ProbeWeights,
    *,
    model_digest: str | None,
    made: bool = False,
) -> None:
    """Write ``probe.safetensors`` and ``reward_model.json``, which :meth:`RewardModel.load` reads.

    Args:
        model: packaged name, folder or hub id of the model that the features come from.
        model_digest: SHA-256 of the files of the model, where they are here.
        made: another step made the model, and both may move together: its place is kept as seen from here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"weights": weights.weights, "centre": weights.centre}
    contiguous = {name: np.ascontiguousarray(table) for name, table in tables.items()}  # safetensors ignores strides
    write_atomically(folder / PROBE, save(contiguous))
    probe = {"layers": list(layers), "pooling": POOLING, "penalty": weights.penalty, "model_digest": model_digest}
    about = {"base": lasting(model), "pooling": "mean", "probe": probe}
    if made:
        about["base_folder"] = os.path.relpath(model, final_folder(folder))
    write_atomically(folder / "reward_model.json", json.dumps(about, indent=1) + "\n")


@torch.inference_mode()
def pair_features(
    model: nn.Module,
    pad: int,
    layers: Sequence[int],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    batch_size: int,
) -> NDArray[np.float32]:
    """Features of both sides of pairs, ``2 x pairs x features``; the prompt of a pair is computed once.

    Args:
        model: a transformers model, without wrappers.
        chosen, rejected, prompt_lengths, batch_size: as in :meth:`RewardModel.score_pairs`.

    Raises:
        DataError: an empty sequence.
    """

    def read(ids: Tensor, mask: Tensor, prompts: Tensor) -> Tensor:
        return completion_features(model, ids, mask, completion_tokens(mask, prompts), layers, pairs=True)

    return over_pairs(model, pad, chosen, rejected, prompt_lengths, batch_size, read)
