"""What can be refused before anything heavy is loaded: files that are not there, a folder that is in use.

The functions of the commands refuse the same, in the same words; here a person is told in a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from madpo.core.config import read_toml
from madpo.core.storage import expanded
from madpo.data.sources import look_at
from madpo.models.locate import refuse_unreachable, resolve_model
from madpo.models.packaged import PACKAGED
from madpo.runner.folder import refuse_foreign


def refuse_missing_files(data: str | Path | None, config: Path | None) -> None:
    """Refuse data or a configuration that cannot be opened.

    Raises:
        ConfigError, DataError: one sentence.
    """
    if config is not None:
        read_toml(config)
    if data is not None:
        look_at(data)


def refuse_missing_places(
    *,
    data: Sequence[str | Path | None] = (),
    models: Sequence[str | None] = (),
    rewards: Sequence[str | None] = (),
    output_dir: Path | None = None,
) -> None:
    """Refuse what the settings name and is not there, and an output folder that is in use.

    Args:
        data: data sets beside the first.
        models: of which a model is to be loaded.
        rewards: reward models, ours or others'.
        output_dir: of a command that begins with an empty folder.

    Raises:
        ConfigError, DataError, StorageError: one sentence.
    """
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
    """Whether a folder is a reward model of ours, or a part of one, which loading it tells better."""
    return any((folder / "reward_model.json").is_file() for folder in (place, place.parent))
