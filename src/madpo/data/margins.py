"""Reward margins out of a data set, with the texts of the pairs that the reward model likes least."""

from __future__ import annotations

import heapq
import shlex
from array import array
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

from madpo.core.columns import MARGIN
from madpo.core.config import Frozen
from madpo.core.errors import DataError, located
from madpo.core.layout import as_layout
from madpo.core.progress import track
from madpo.core.seeding import rng
from madpo.data.folds import PromptNumbers
from madpo.data.load import PairStream
from madpo.data.messages import Text, shown
from madpo.data.raw import RawRow, Source, as_number, null
from madpo.data.sources import open_source

SUSPICIOUS = 20


class Margins(Frozen):
    """Margins of a file: names, values, and the places and texts of some pairs by position."""

    pair_ids: tuple[int, ...]
    values: tuple[float, ...]
    prompts: tuple[int | str, ...]
    """The same for the same prompt. A row of a bare table that names none has one of its own."""
    texts: dict[int, dict[str, str]]
    implicit: tuple[float, ...] | None = None
    """DPO's implicit margins (column ``implicit_margin``, log-odds), where a bare table has them."""


def read_margins(data: str | Path, columns: Any = None, *, sampled: int = 0) -> Margins:
    """The column ``reward_margin`` of a data set, and the texts of the ``SUSPICIOUS`` pairs with the lowest margins.

    ``sampled`` further pairs, drawn evenly from all, keep their texts too.

    A table without chosen and rejected will do (then there are no texts), as ``heldout.jsonl`` of a training, which
    has DPO's implicit margins too. Without the column, the difference of chosen_score and rejected_score replaces it.

    Raises:
        DataError: neither is there, or as :func:`madpo.data.load_preferences`.
    """
    source = open_source(data, wanted=("pair_id", "prompt", MARGIN, "implicit_margin"))
    with closing(source.rows):
        first = next(source.rows, None)
        row = first[1] if first is not None and isinstance(first[1], dict) else {}
        names = source.columns or tuple(row)
        if MARGIN in names and "chosen" not in names and not as_layout(columns).has_completions:
            return _bare(source, first)
    stream = PairStream(data, columns)
    ids, values, prompts = array("q"), array("d"), array("q")
    numbered = PromptNumbers()
    lowest: list[tuple[float, int, dict[str, str]]] = []  # a heap whose first has the largest margin
    reservoir: dict[int, tuple[int, dict[str, str]]] = {}
    draws = rng(0, "inspect", "sampled")
    for i, pair in enumerate(track(stream, description=f"reading {source.name}")):
        margin = pair.numbers.get(MARGIN, pair.score_difference)
        if margin is None:
            command = shlex.join(["madpo", "score", str(data), *as_layout(columns).as_options])
            raise DataError(
                f"{source.name}: has no column 'reward_margin' and no scores; add it: {command} --probe MODEL "
                "--output_dir DIR"
            )
        ids.append(pair.pair_id)
        values.append(margin)
        prompts.append(numbered(pair.prompt))
        low = len(lowest) < SUSPICIOUS or margin < -lowest[0][0]
        # Reservoir sampling: every pair is kept with the same probability, in one pass.
        place = (i if i < sampled else int(draws.integers(i + 1))) if sampled else 0
        if low or place < sampled:
            text = {side: _flat(getattr(pair, side)) for side in ("prompt", "chosen", "rejected")}
            text["place"] = f"{stream.source.unit} {pair.number}"
            if low:
                (heapq.heappush if len(lowest) < SUSPICIOUS else heapq.heapreplace)(lowest, (-margin, -i, text))
            if place < sampled:
                reservoir[place] = (i, text)
    stream.refuse_no_pair(len(values))
    return Margins(
        pair_ids=tuple(ids),
        values=tuple(values),
        prompts=tuple(prompts),
        texts=dict(reservoir.values()) | {-i: text for _, i, text in lowest},
    )


def _bare(source: Source, first: RawRow | None) -> Margins:
    ids: list[int] = []
    values: list[float] = []
    implicit: list[float] = []
    prompts: list[str] = []
    text = source.unit == "line"
    for number, raw in chain([] if first is None else [first], source.rows):
        if isinstance(raw, DataError):
            raise raw
        with located(source.at(number)):
            if raw.get(MARGIN) is None:
                raise null(MARGIN)
            values.append(as_number(raw[MARGIN], MARGIN, from_text=text))
            ids.append(int(as_number(raw.get("pair_id", len(ids)), "pair_id", from_text=text)))
            if raw.get("implicit_margin") is not None:
                implicit.append(as_number(raw["implicit_margin"], "implicit_margin", from_text=text))
            prompts.append(str(raw.get("prompt", number)))
    return Margins(
        pair_ids=tuple(ids),
        values=tuple(values),
        prompts=tuple(prompts),
        texts={},
        implicit=tuple(implicit) if len(implicit) == len(values) else None,
    )


def _flat(text: Text, limit: int = 600) -> str:
    flat = shown(text)
    return flat if len(flat) <= limit else f"{flat[: limit // 2]} … {flat[-limit // 2 :]}"
