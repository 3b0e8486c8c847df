"""A user's pairs for reward model and policy: token ids, and a split that no prompt crosses."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from madpo.core.errors import DataError, StorageError
from madpo.core.progress import say
from madpo.core.seeding import rng
from madpo.data import load_preferences
from madpo.data.folds import prompt_key
from madpo.data.load import TooLong
from madpo.data.survey import Survey
from madpo.data.templates import Clock
from madpo.models.hyperparameters import CHECKPOINTS
from madpo.models.locate import load_tokenizer, resolve_model
from madpo.operations.settings import Training
from madpo.runner.first_start import FILE, since_first_start

Row = dict[str, Any]


def tell_findings(survey: Survey, data: str, model: str | None, *, strict: bool) -> None:
    """Say in one line what a check would warn of.

    Raises:
        DataError: with ``strict``, the first finding.
    """
    if strict:
        survey.refuse_findings()
    if (line := survey.line(data, model)) is not None:
        say(line)


def started_clock(folder: Path, fixed: datetime | None = None) -> Clock:
    """The date that chat templates print in the texts of a result: that of its first start, whenever it continues.

    Args:
        folder: what the first start fixes is kept there; it must outlive a kill.
        fixed: a date of the user's choice.

    Raises:
        StorageError: the file that holds the date of the first start is damaged.
    """
    if fixed is not None:
        return Clock(fixed)
    started = since_first_start(folder, "started", lambda: Clock().now.isoformat())
    try:
        return Clock(datetime.fromisoformat(started))
    except ValueError as error:
        raise StorageError(f"{folder / FILE} is damaged ({error}); add --overwrite to begin anew") from error


def tell_date(clock: Clock) -> None:
    """Say which date is in the texts, where the chat template prints one."""
    if (date := clock.text()) is not None:
        say(
            f"The chat template prints the date: {date} is in all texts, whenever this is continued (another result "
            f"has it with --set date={date})"
        )


class Loaded(NamedTuple):
    """A base model's place, its tokenizer, the pairs of both sides, what truncation did to them, and their date."""

    base: Path | str
    tokenizer: Any
    train: list[Row]
    heldout: list[Row]
    too_long: TooLong
    clock: Clock


def load_training(
    settings: Training, data: str | Path, eval_data: str | Path | None, out: Path, *, seed: int, max_length: int | None
) -> Loaded:
    """Find the base model, and read pairs for training and for evaluation; one line says what a check would warn of.

    Args:
        eval_data: evaluation pairs of their own; else ``settings.eval_share`` of the prompts of ``data`` is held out.
        out: the folder in which the result is made.
        seed: of the split.

    Raises:
        ConfigError: the model cannot be loaded.
        DataError: as :func:`madpo.data.load_preferences`, or too few prompts to hold one out.
    """
    base = resolve_model(settings.model)
    tokenizer, too_long = load_tokenizer(base), TooLong()
    clock = started_clock(out / CHECKPOINTS, settings.date)
    how: dict[str, Any] = {"columns": settings.reading, "tokenizer": tokenizer, "too_long": too_long, "clock": clock}
    how |= {"max_length": max_length, "truncation": settings.truncation}
    survey, evaluation = Survey(), Survey()
    rows, heldout = load_preferences(data, survey=survey, **how), list[Row]()
    if eval_data is not None:
        heldout = load_preferences(eval_data, survey=evaluation, **how)
        survey.add_leaks(evaluation)
    tell_findings(survey, str(data), settings.model, strict=settings.strict)
    survey.refuse_nothing_to_learn(str(data))
    if eval_data is not None:
        tell_findings(evaluation, str(eval_data), settings.model, strict=settings.strict)
    elif settings.eval_share > 0:
        rows, heldout = split_by_prompt(rows, settings.eval_share, seed, str(data))
    tell_date(clock)
    return Loaded(base, tokenizer, rows, heldout, too_long, clock)


def split_by_prompt(rows: Sequence[Row], share: float, seed: int, name: str) -> tuple[list[Row], list[Row]]:
    """Hold out about ``share`` of the rows, whole prompts at a time: (the others, held out), each in its order.

    Raises:
        DataError: all rows have one prompt.
    """
    keys = [prompt_key(row["prompt"]) for row in rows]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise DataError(f"{name}: all pairs have one prompt, so none can be held out; give eval_data")
    counts = dict.fromkeys(prompts, 0)
    for key in keys:
        counts[key] += 1
    aside: set[str] = set()
    taken = 0
    for i in rng(seed, "split").permutation(len(prompts)):
        if aside and (taken >= share * len(rows) or len(aside) == len(prompts) - 1):
            break
        aside.add(prompts[i])
        taken += counts[prompts[i]]
    kept = [row for row, key in zip(rows, keys, strict=True) if key not in aside]
    return kept, [row for row, key in zip(rows, keys, strict=True) if key in aside]
