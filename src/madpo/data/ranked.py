"""Several scored responses to one prompt -> the best and the worst of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from madpo.core.errors import DataError
from madpo.data.numbers import as_number
from madpo.data.raw import described

_TEXTS = ("response", "completion", "text", "content")
_SYSTEM = ("custom_system_prompt", "system_prompt", "system")
_SCORES = ("overall_score", "score", "rating", "fine-grained_score")


def best_and_worst_of(columns: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    """chosen, rejected, their scores, and the system prompts of both; None where no two scores differ.

    Of equal scores the first counts.

    Args:
        columns: ``completions`` as a list of objects or an object of lists, or a list of responses and, after it, one
            of scores.

    Raises:
        DataError: the columns do not fit together, or a response has no score.
    """
    scored = list(_side_by_side(columns, place) if len(columns) == 2 else _objects(columns, place))
    if len({score for score, *_ in scored}) < 2:
        return None
    best, worst = max(scored, key=lambda s: s[0]), min(scored, key=lambda s: s[0])
    scores = {"chosen_score": best[0], "rejected_score": worst[0]}
    return {"chosen": best[1], "rejected": worst[1], "system": (best[2], worst[2]), **scores}


def _side_by_side(columns: Mapping[str, Any], place: str) -> Iterator[tuple[float, Any, str]]:
    (texts, responses), (name, scores) = columns.items()
    for column, value in columns.items():
        if not isinstance(value, list | tuple):
            raise DataError(f"{place}: {column} is {described(value)}, not a list; give a list")
    if len(responses) != len(scores):
        raise DataError(
            f"{place}: {texts} holds {len(responses)} entries and {name} {len(scores)}; give a score for each response"
        )
    for i, (response, score) in enumerate(zip(responses, scores, strict=True)):
        yield as_number(score, f"{name}[{i}]", place), response, ""


def _objects(columns: Mapping[str, Any], place: str) -> Iterator[tuple[float, Any, str]]:
    ((column, value),) = columns.items()
    if isinstance(value, dict):  # one object of lists, as some writers turn a list of objects around
        lengths = {len(entry) for entry in value.values() if isinstance(entry, list | tuple)}
        if len(lengths) != 1 or not all(isinstance(entry, list | tuple) for entry in value.values()):
            raise DataError(f"{place}: {column} is {described(value)}, not a list of responses; give a list")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise DataError(f"{place}: {column} is {described(value)}, not a list of responses; give a list")
    for i, entry in enumerate(value):
        name = f"{column}[{i}]"
        # A table gives every object all keys, with null where it had none.
        given = {key for key, found in entry.items() if found is not None} if isinstance(entry, dict) else set()
        text = next((key for key in _TEXTS if key in given), None)
        score = None if text is None else _score(entry, name, place)
        if text is None or score is None:
            raise DataError(f"{place}: {name} lacks response or overall_score; give both or add chosen and rejected")
        yield score, entry[text], next((entry[key] for key in _SYSTEM if isinstance(entry.get(key), str)), "")


def _score(entry: Mapping[str, Any], name: str, place: str) -> float | None:
    """The score that the response has, or the mean of the ratings of its aspects."""
    key = next((key for key in _SCORES if entry.get(key) is not None), None)
    if key is not None:
        return as_number(entry[key], f"{name}.{key}", place)
    aspects = entry.get("annotations")
    ratings = []
    for aspect in aspects.values() if isinstance(aspects, dict) else ():
        rating = aspect.get("Rating") if isinstance(aspect, dict) else None
        if isinstance(rating, str) and rating.strip() in ("N/A", ""):  # an aspect that does not apply
            continue
        if rating is not None:
            ratings.append(as_number(rating, f"{name}.annotations.Rating", place, from_text=True))
    return sum(ratings) / len(ratings) if ratings else None
