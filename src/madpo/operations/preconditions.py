"""What operations refuse that can be seen without loading a library: their functions and the command line ask here."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from madpo.core.columns import MARGIN, NUMBERS, SCORES, probe_gives_margin
from madpo.core.errors import ConfigError, DataError, RowError, first_line, located
from madpo.core.layout import Layout
from madpo.core.storage import expanded
from madpo.core.suggestions import did_you_mean
from madpo.data.layouts import listed_columns
from madpo.data.load import PairStream
from madpo.data.rows import Pair
from madpo.data.sources import look_at
from madpo.losses import LossConfig
from madpo.models.locate import refuse_fetching, refuse_unreachable, resolve_model
from madpo.models.packaged import PACKAGED
from madpo.models.untrusted import adapter_base, read_object
from madpo.runner.folder import refuse_foreign


def refuse_missing(
    *,
    pairs: Sequence[str | None] = (),
    reading: Layout | None = None,
    loss: LossConfig | None = None,
    probe: bool | None = None,
    columns: Sequence[str] = (),
    data: Sequence[str | None] = (),
    models: Sequence[str | None] = (),
    rewards: Sequence[str | None] = (),
    output_dir: Path | None = None,
) -> None:
    """Refuse what the settings name and is not there or of another kind, and an output folder that is in use.

    Args:
        pairs: preference data, the training pairs first; the first good row of a file is read.
        reading: which of their columns are read as what.
        loss: what reads the pairs.
        probe: whether the trainer's probe gives margins also where the pairs have scores; None is no such trainer.
        columns: what the rows must have.
        data: other data.
        models: that will be loaded.
        rewards: reward models, ours or others'.

    Raises:
        ConfigError, DataError, StorageError: one sentence.
    """
    for place in (*pairs, *data):
        if place is not None:
            look_at(place)
    if output_dir is not None:
        refuse_foreign(expanded(output_dir))
    for reward in rewards:
        if reward is None or own_reward_model(reward) is not None:
            continue
        folder = expanded(reward)
        if not (folder / "config.json").is_file() and (folder.exists() or folder.is_absolute()):
            raise ConfigError(
                f"{reward} is no reward model; give a folder of madpo reward, the folder probe of madpo score --probe, "
                "or a sequence classifier with one output"
            )
        if isinstance(found := _found(reward), Path):
            config = read_object(found / "config.json")
            labels = config.get("id2label")
            outputs = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
            refuse_other_outputs(reward, config.get("architectures"), outputs)
    for model in models:
        _found(model)
    files = [place for place in pairs if place is not None and expanded(place).is_file()]
    first = [first_pair(place, reading, columns) for place in files]
    known = first[0].numbers.keys() if first and first[0] else set[str]()
    probed = probe is not None and probe_gives_margin(known, past_scores=probe)
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


def first_pair(data: str | Path, columns: Layout | None, names: Sequence[str] = ()) -> Pair | None:
    """The first good pair of a file; None where no row holds a preference.

    Args:
        columns: of the file, as far as the user names them.
        names: further columns that the row must have.

    Raises:
        DataError: as reading the whole file does, and as :func:`refuse_other_row`.
    """
    stream = PairStream(data, columns, every_column=bool(names))
    with closing(stream.source.rows):
        pair, raw = next(stream.with_rows(), (None, {}))
        if pair is not None:
            with located(stream.source.at(pair.number)):
                refuse_other_row(raw, names)
        return pair


def refuse_other_row(raw: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a row without some column.

    Raises:
        RowError: with the columns that there are.
    """
    for name in names:
        if name not in raw:
            numbers = [n for n, value in raw.items() if isinstance(value, int | float) and n != "pair_id"]
            give = " ".join(map(shlex.quote, numbers[:2])) if len(numbers) > 1 else "CHOSEN REJECTED"
            near = did_you_mean(name, list(raw)) or f"; give --score_columns {give}"
            raise RowError(f"has no column {name!r} (found {listed_columns(list(raw))}){near}")


def require_columns(rows: Sequence[Mapping[str, Any]], loss: LossConfig, name: str, *, probed: bool = False) -> None:
    """Refuse pairs that lack a column which the loss reads.

    Args:
        probed: ``reward_margin`` may be missing, since the trainer's probe gives it.

    Raises:
        DataError: naming the command that adds it.
    """
    kind = getattr(loss, "kind", type(loss).__name__)
    for column in sorted(set(loss.needs) & set(NUMBERS)):
        if column in rows[0] or (column == MARGIN and probed):
            continue
        remedy = f"add it: madpo score {shlex.quote(name)} --probe MODEL --output_dir DIR"
        if column == MARGIN and SCORES[0] in rows[0]:
            remedy += f", or with the scores that are there: --score_columns {' '.join(SCORES)}"
        elif column == "weight":
            remedy = "add it to the data"
        raise DataError(f"{name}: has no column {column!r}, which the loss {kind} reads; {remedy}")


def own_reward_model(model: str | Path) -> Path | None:
    """The folder of a reward model that :func:`reward` wrote; None for any other."""
    folder = expanded(model)
    if (folder / "reward_model.json").is_file():
        return folder
    if (folder.parent / "reward_model.json").is_file():
        raise ConfigError(f"{model} is a part of a reward model; give the folder {folder.parent}")
    return None


def refuse_other_outputs(model: str | Path, architectures: Sequence[str] | None, outputs: int) -> None:
    """Refuse a model that is not a sequence classifier with one output.

    Raises:
        ConfigError: with its architecture.
    """
    if outputs != 1 or not any("SequenceClassification" in name for name in architectures or ()):
        raise ConfigError(
            f"{model} is no reward model: it has the architecture {', '.join(architectures or ['unknown'])} "
            f"with {outputs} outputs, where a sequence classifier with one output is needed"
        )


class PolicySource(NamedTuple):
    """Where a policy and its reference are loaded from."""

    name: str
    base: str
    adapter: Path | None
    reference: str


def find_policy(policy: str | Path, reference: str | None) -> PolicySource:
    """What to load for ``policy``.

    Raises:
        ConfigError: nothing says what the reference is, or it is not on this machine and only a folder names it.
    """
    folder = expanded(policy)
    if (folder / "reward_model.json").is_file() or (folder.parent / "reward_model.json").is_file():
        raise ConfigError(f"{policy} is a reward model, which rewards and cannot write; give a folder of madpo train")
    made = folder / "config.toml"
    started = _started_from(made) if made.is_file() else None
    adapter = next((f for f in (folder / "adapter", folder) if (f / "adapter_config.json").is_file()), None)
    if adapter is not None:
        if started is not None and _moved(started):
            recorded, started = started, adapter_base(adapter)
            if _moved(started):
                raise ConfigError(f"{made}: model is {recorded!r}, which no longer exists; write where it is now")
        base = started or adapter_base(adapter)
        if started is None and reference is None and (adapter / "ref" / "adapter_config.json").is_file():
            raise ConfigError(
                f"{policy} was trained on from the adapter {adapter / 'ref'}, so {base} is not what it started from; "
                "merge that adapter into its model and give the folder with --reference, or give --reference "
                f"{base} to measure the distance from there"
            )
        started = base
    else:
        base = str(folder / "model") if (folder / "model" / "config.json").is_file() else str(policy)
    for name in {base, reference or started or base} - {reference, str(policy)}:  # what only the folder names
        refuse_fetching(resolve_model(name), folder, f", or give --reference {name}")
    if (reference := reference or started) is None:
        if not folder.exists() and str(policy) not in PACKAGED:
            raise ConfigError(
                f"there is no folder {str(policy)!r}; give a folder of madpo train, or a hub id with --reference"
            )
        raise ConfigError(f"{policy} does not say which model it started from; give it with --reference")
    return PolicySource(str(policy), str(base), adapter, str(reference))


def _moved(model: str) -> bool:
    """Whether a model was a folder that no longer exists."""
    path = expanded(model)
    return path.is_absolute() and not path.exists()


def _started_from(made: Path) -> str | None:
    try:
        model = tomllib.loads(made.read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error, 120)
        raise ConfigError(f"{made} cannot be read ({reason}); copy the folder again, or delete the file") from error
    if model is not None and not isinstance(model, str):
        raise ConfigError(f"{made}: model is {model!r}, not text; copy the folder again, or delete the file")
    return model
