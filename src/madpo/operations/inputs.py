"""A user's pairs for reward model and policy (token ids, and a split that no prompt crosses), and a user's prompts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from madpo.core.errors import DataError, RowError, StorageError, located
from madpo.core.layout import Layout, as_layout
from madpo.core.progress import say_once
from madpo.core.seeding import rng
from madpo.data import load_preferences
from madpo.data.arrange import Arranger
from madpo.data.conversation import Conversation
from madpo.data.findings import Survey
from madpo.data.folds import Beginnings, prompt_key, prompt_keys
from madpo.data.layouts import listed_columns
from madpo.data.load import TooLong
from madpo.data.messages import Text
from madpo.data.prompts import PromptColumns, whole_prompt
from madpo.data.raw import described
from madpo.data.sources import open_source
from madpo.data.templates import UNUSED_TEMPLATE, Clock
from madpo.models.hyperparameters import CHECKPOINTS
from madpo.models.locate import load_tokenizer, resolve_model
from madpo.operations.settings import Training
from madpo.runner.first_start import FILE, since_first_start

Row = dict[str, Any]


def tell_findings(survey: Survey, data: str, model: str | None, *, reading: Layout, strict: bool) -> None:
    """Say in one line what a check would warn of; ``reading`` is what the user says of the columns.

    Raises:
        DataError: with ``strict``, the first finding.
    """
    if strict:
        survey.refuse_findings()
    if (line := survey.line(data, model, reading.as_options)) is not None:
        say_once(line)


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
        raise StorageError(f"{folder / FILE} is damaged ({error}); add --overwrite to start over") from error


def tell_date(clock: Clock) -> None:
    """Say which date is in the texts, where the chat template prints one."""
    if (date := clock.text()) is not None:
        say_once(
            f"The chat template prints the date: {date} is in all texts, whenever this is continued (another result "
            f"has it with --set date={date})"
        )


def tell_unused_template(tokenizer: Any, prompt: Text) -> None:
    """Say that a model's chat template is not used, where the prompts are text."""
    if isinstance(prompt, str) and getattr(tokenizer, "chat_template", None):
        say_once(UNUSED_TEMPLATE)


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
        evaluation.refuse_repeated_ids()
    survey.refuse_repeated_ids()
    tell_findings(survey, str(data), settings.model, reading=settings.reading, strict=settings.strict)
    survey.refuse_nothing_to_learn(str(data))
    if eval_data is not None:
        tell_findings(evaluation, str(eval_data), settings.model, reading=settings.reading, strict=settings.strict)
    elif settings.eval_share > 0:
        rows, heldout = split_by_prompt(rows, settings.eval_share, seed, str(data))
        train, aside = (Beginnings(row["prompt"] for row in part) for part in (rows, heldout))
        if parted := int(aside.parted(train).sum()):
            say_once(
                f"{parted} of {len(heldout)} held-out pairs have a prompt that continues a training prompt or is "
                "continued by one, which flatters; eval_data of other conversations does not."
            )
    tell_unused_template(tokenizer, rows[0]["prompt"])
    tell_date(clock)
    return Loaded(base, tokenizer, rows, heldout, too_long, clock)


def split_by_prompt(rows: Sequence[Row], share: float, seed: int, name: str) -> tuple[list[Row], list[Row]]:
    """Hold out about ``share`` of the rows, whole prompts at a time: (the others, held out), each in its order.

    A prompt of so many rows that the part would be twice as large, or take half of the others as well, is not held out
    unless nothing else can be.

    Raises:
        DataError: all rows have one prompt.
    """
    keys = prompt_keys([row["prompt"] for row in rows])
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise DataError(f"{name}: all pairs have one prompt, so none can be held out; give eval_data")
    counts = dict.fromkeys(prompts, 0)
    for key in keys:
        counts[key] += 1
    wanted, most = share * len(rows), min(2 * share, (1 + share) / 2) * len(rows)
    order = [prompts[i] for i in rng(seed, "split").permutation(len(prompts))]
    aside: set[str] = set()
    taken = 0
    for prompt in order:
        if aside and (taken >= wanted or len(aside) == len(prompts) - 1):
            break
        if taken + counts[prompt] <= max(most, 1):
            aside.add(prompt)
            taken += counts[prompt]
    aside = aside or {min(order, key=counts.__getitem__)}
    kept = [row for row, key in zip(rows, keys, strict=True) if key not in aside]
    return kept, [row for row, key in zip(rows, keys, strict=True) if key in aside]


class Prompt(NamedTuple):
    """A prompt, and where it is."""

    prompt_id: int
    """Index of its row, from 0."""
    content: Text
    place: str
    """For messages, such as ``prompts.jsonl, line 7``."""


def read_prompts(data: str | Path, count: int | None = None, columns: Any = None) -> list[Prompt]:
    """The prompts of a data set, or its first ``count``; of equal ones the first.

    Args:
        columns: as in :func:`madpo.data.load_preferences`; of it what makes the prompt.

    Raises:
        DataError: a row without a prompt, or fewer prompts than asked for.
    """
    source, given = open_source(data), as_layout(columns)
    found: dict[str, Prompt] = {}
    with closing(source.rows):
        for index, (number, raw) in enumerate(source.rows):
            if isinstance(raw, DataError):
                raise raw
            with located(place := source.at(number)):
                content = _prompt(Arranger(given, tuple(raw)).rest(raw) if given.given else raw, chat=given.chat)
                first = next(iter(found.values()), None)
                if first is not None and isinstance(content, str) != isinstance(first.content, str):
                    raise RowError("text and messages are mixed; use one form in the whole file")
            found.setdefault(prompt_key(content), Prompt(index, content, place))
            if count is not None and len(found) == count:
                break
    if not found:
        raise DataError(f"{source.name}: has no rows; give at least one prompt")
    if count is not None and len(found) < count:
        raise DataError(f"{source.name}: has only {len(found)} different prompts, but {count} are asked for")
    return list(found.values())


def _prompt(raw: Row, *, chat: bool) -> Text:
    names = PromptColumns.found_in(raw).question
    if not names:
        column = shlex.quote(next(iter(raw))) if raw else "NAME"
        raise RowError(
            f"has no 'prompt' (found {listed_columns(list(raw))}); name the column that holds it: "
            f"--columns.prompt {column}"
        )
    content = whole_prompt(raw, chat=chat)
    if not content:
        raise RowError(f"{names[0]} is {described(raw[names[0]])}; fill it in or drop the row")
    return Conversation.of(content, raw) if isinstance(content, list) else content
