"""``madpo score --probe MODEL``: margins out of fold from states of a model that nothing was trained for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from madpo.core.feature_file import FeatureFile, FeatureWriter
from madpo.data.folds import prompt_keys
from madpo.data.rows import Pair
from madpo.data.templates import Clock
from madpo.models.engine.features import feature_layers
from madpo.models.hyperparameters import CHECKPOINTS
from madpo.models.load import load_model, load_tokenizer, placed, resolve_model
from madpo.operations.pair_scorer import PairEncoder, remember_pairs
from madpo.operations.running import digest
from madpo.operations.settings import ScoreSettings
from madpo.rewards.probe import FOLDS, FittedProbe, fit_probe
from madpo.rewards.probe_reward import pair_features, save_probe

FOLDER = "probe"
"""Folder of the frozen probe, inside the result."""


def feature_reader(
    source: str, name: str, *, batch_size: int, clock: Clock | None = None
) -> Callable[[Sequence[Pair]], dict[str, NDArray[Any]]]:
    """Load a model that gives features of pairs of text or messages, in the place of rewards.

    Args:
        source: packaged name, folder or hub id of a causal language model.
        name: of the data.
        batch_size: sequences per forward pass.
        clock: the date that the chat template prints.

    Returns:
        Pairs -> ``chosen`` and ``rejected`` (float32, ``pairs x features``), and ``layers``.
        It raises what :meth:`PairEncoder.ids` raises.
    """
    base = resolve_model(source)
    model, encoder = placed(load_model(base)), PairEncoder(load_tokenizer(base), own=True, clock=clock)
    layers = feature_layers(model)

    def read(pairs: Sequence[Pair]) -> dict[str, NDArray[Any]]:
        ids = encoder.ids(pairs, name, "row")
        chosen, rejected = pair_features(model, encoder.tokenizer.pad_token_id, layers, *ids, batch_size)
        return {"chosen": chosen, "rejected": rejected, "layers": np.array(layers)}

    return read


def fit_from_parts(
    pairs: Sequence[Pair], parts: Iterable[Mapping[str, NDArray[Any]]], settings: ScoreSettings, name: str, out: Path
) -> FittedProbe:
    """Fit a probe to features that were kept in parts, and leave it frozen in ``out``.

    Args:
        parts: rows of ``chosen`` and ``rejected``, and ``layers``; read one after the other, into a file.
        name: of the data, their file or hub id.

    Raises:
        DataError: as :func:`fit_probe`.
    """
    assert settings.probe is not None
    scratch = out / CHECKPOINTS / "features.safetensors"
    with ExitStack() as opened:
        writer, start, width = None, 0, 0
        layers: tuple[int, ...] = ()
        for part in parts:
            if writer is None:
                layers, width = tuple(map(int, part["layers"])), part["chosen"].shape[1]
                writer = opened.enter_context(FeatureWriter(scratch, len(pairs), width))
            writer.write(start, part["chosen"], part["rejected"])
            start += len(part["chosen"])
    features = FeatureFile.read(scratch, len(pairs), width)
    folds, prompts = settings.folds or FOLDS, prompt_keys([pair.prompt for pair in pairs])
    fitted = fit_probe(features.chosen, features.rejected, prompts, folds=folds, seed=settings.probe_seed, name=name)
    save_probe(out / FOLDER, settings.probe, layers, fitted.weights, model_digest=digest(resolve_model(settings.probe)))
    remember_pairs(out / FOLDER, pairs)
    return fitted
