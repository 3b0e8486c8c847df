"""Options that several commands have, and what is refused before anything heavy is loaded.

The functions of the operations refuse the same, in the same words; here a person reads it within a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from madpo.core.config import Frozen
from madpo.core.options import Cli
from madpo.core.storage import expanded


class Data(Frozen):
    data: Annotated[str, Cli(positional=True)]
    """Preference pairs: a .jsonl, .json, .csv or .parquet file, or a hub data set OWNER/NAME[:SPLIT]."""


class Result(Frozen):
    output_dir: Path
    """Folder of the result; it is complete when record.json is in it."""
    overwrite: bool = False
    """Replace an earlier result in it."""


class HeldOut(Frozen):
    eval_data: str | None = None
    """Held-out pairs; without them eval_share of the pairs is held out."""


def refuse_missing(
    *,
    data: Sequence[str | Path | None] = (),
    models: Sequence[str | None] = (),
    rewards: Sequence[str | None] = (),
    output_dir: Path | None = None,
) -> None:
    """Refuse what the settings name and is not there, and an output folder that is in use.

    Args:
        models: of which a model is to be loaded.
        rewards: reward models, ours or others'.
        output_dir: of a command that begins with an empty folder.

    Raises:
        ConfigError, DataError, StorageError: one sentence.
    """
    from madpo.data.sources import look_at
    from madpo.models.locate import refuse_unreachable, resolve_model
    from madpo.models.packaged import PACKAGED
    from madpo.runner.folder import refuse_foreign

    for place in data:
        if place is not None:
            look_at(place)
    if output_dir is not None:
        refuse_foreign(expanded(output_dir))
    own = {reward for reward in rewards if reward and _ours(expanded(reward))}
    for model in (*models, *(reward for reward in rewards if reward not in own)):
        if model is not None and model not in PACKAGED and not model.startswith("tiny-"):
            found = resolve_model(model)
            if isinstance(found, str):
                refuse_unreachable(found)


def _ours(place: Path) -> bool:
    """Whether a folder is a reward model of ours, or a part of one, which loading it reports better."""
    return any((folder / "reward_model.json").is_file() for folder in (place, place.parent))
