"""What is refused before anything heavy is loaded, within a second or two of a command's start.

The operations refuse the same, by the same functions (:mod:`madpo.operations.preconditions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from madpo.core.layout import Layout
from madpo.core.storage import expanded
from madpo.data.sources import look_at
from madpo.losses import LossConfig
from madpo.models.locate import refuse_unreachable, resolve_model
from madpo.models.packaged import PACKAGED
from madpo.operations.preconditions import (
    first_pair,
    own_reward_model,
    refuse_other_config,
    require_columns,
)
from madpo.runner.folder import refuse_foreign


def refuse_missing(
    *,
    pairs: Sequence[str | None] = (),
    reading: Layout | None = None,
    loss: LossConfig | None = None,
    probe: bool = False,
    columns: Sequence[str] = (),
    data: Sequence[str | None] = (),
    models: Sequence[str | None] = (),
    rewards: Sequence[str | None] = (),
    output_dir: Path,
) -> None:
    """Refuse what the settings name and is not there or of another kind, and an output folder that is in use.

    Args:
        pairs: preference data, the training pairs first; the first good row of a file is read.
        reading: which of their columns are read as what.
        loss: what reads the pairs.
        probe: whether a probe gives the margins of pairs without any.
        columns: what the rows must have.
        data: other data.
        models: of which a model is to be loaded.
        rewards: reward models, ours or others'.

    Raises:
        ConfigError, DataError, StorageError: one sentence.
    """
    for place in (*pairs, *data):
        if place is not None:
            look_at(place)
    refuse_foreign(expanded(output_dir))
    for reward in rewards:
        if reward is not None and own_reward_model(reward) is None and isinstance(found := _found(reward), Path):
            refuse_other_config(reward, found)
    for model in models:
        _found(model)
    files = [place for place in pairs if place is not None and expanded(place).is_file()]
    first = [first_pair(place, reading, columns) for place in files]
    known = first[0].numbers.keys() if first and first[0] else set[str]()
    probed = probe and not {"reward_margin", "chosen_score"} & known
    for place, pair in zip(files, first, strict=True):
        if loss is not None and pair is not None:
            require_columns([pair.numbers], loss, place, probed=probed)


def _found(model: str | None) -> Path | None:
    """The folder of a model; None for a packaged one, which takes time to unpack, and for one of the hub."""
    if model is None or model in PACKAGED or model.startswith("tiny-"):
        return None
    found = resolve_model(model)
    if isinstance(found, Path):
        return found
    refuse_unreachable(found)
    return None
