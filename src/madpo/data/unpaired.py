"""Rows with one completion each -> pairs of the rows of one prompt, wherever they are in the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

from madpo.core.errors import DataError, RowError, located
from madpo.core.layout import layout_table, value_at
from madpo.data.arrange import Arranged, Arranger, Completion, LeftOut
from madpo.data.messages import ASSISTANT, role_of
from madpo.data.prompts import PromptColumns
from madpo.data.raw import Source, described, null

GOOD, BAD = (tuple(layout_table()["inside"][kind]) for kind in ("good", "bad"))


def paired_rows(
    opened: Callable[[], Source], arranger: Arranger
) -> Iterator[tuple[int, int, Arranged | LeftOut | DataError]]:
    """(number, index of the row, a pair, or why there is none), in the order in which pairs become whole.

    The data are read twice: 16 bytes and a number for each row say which rows make a pair, so that only rows whose
    partner is yet to come are in memory. Of scored rows the best and the worst of a prompt make its pair; of labelled
    ones the first good and the first bad, the second and the second, and so on.
    """
    values: dict[bytes, list[tuple[float, int]]] = {}
    for index, _, _, found in _each(opened(), arranger):
        if not isinstance(found, DataError):
            values.setdefault(found[0], []).append((found[1], index))
    partner: dict[int, int] = {}
    for rows in values.values():
        if arranger.layout.label:
            good, bad = ([index for value, index in rows if value == side] for side in (1.0, 0.0))
            partner.update(zip(good, bad, strict=False))
        elif len({value for value, _ in rows}) > 1:
            partner[max(rows, key=lambda row: row[0])[1]] = min(rows, key=lambda row: row[0])[1]
    values.clear()
    partner |= {second: first for first, second in partner.items()}
    waiting: dict[int, tuple[Mapping[str, Any], Completion]] = {}
    source = opened()
    for index, number, raw, found in _each(source, arranger):
        if isinstance(found, DataError):
            yield number, index, found
        elif index not in partner:
            yield number, index, LeftOut("unpaired")
        else:
            try:
                with located(source.at(number)):
                    own = (raw, _completion(arranger, raw, found[1]))
                    if (other := waiting.pop(partner[index], None)) is None:
                        waiting[index] = own
                        continue
                    (row, best), (_, worst) = (other, own) if other[1].value > own[1].value else (own, other)
                    pair = arranger.pair(row, best, worst)
                    arranger.measure(pair, row, best, worst)
            except DataError as mistake:
                yield number, index, mistake
            else:
                yield number, index, pair


def _each(
    source: Source, arranger: Arranger
) -> Iterator[tuple[int, int, Mapping[str, Any], DataError | tuple[bytes, float]]]:
    """(index, number, row, what is wrong with it or the key of its prompt and what orders it)."""
    with closing(source.rows):
        for index, (number, raw) in enumerate(source.rows):
            if isinstance(raw, DataError):
                yield index, number, {}, raw
                continue
            try:
                with located(source.at(number)):
                    found = _key(arranger, raw), _value(arranger, raw)
            except DataError as mistake:
                yield index, number, raw, mistake
            else:
                yield index, number, raw, found


def _key(arranger: Arranger, raw: Mapping[str, Any]) -> bytes:
    """A hash of everything that makes the prompt."""
    row = arranger.rest(raw)
    said = [row.get(name) for name in PromptColumns.found_in(row).joined]
    completion = value_at(raw, str(arranger.layout.completion))
    if isinstance(completion, list) and len(completion) > 1:
        said.append(completion[:-1])
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).digest()


def _value(arranger: Arranger, raw: Mapping[str, Any]) -> float:
    layout = arranger.layout
    if not layout.label:
        name = (layout.score or layout.rank)[0]
        value = value_at(raw, name)
        if value is None:
            raise null(name)
        return arranger.number(value, name) * (-1 if layout.rank else 1)
    value = value_at(raw, layout.label[0])
    said = str(value).strip().lower()
    if said in map(str.lower, layout.first) or (not layout.first and said in GOOD):
        return 1.0
    if said in map(str.lower, layout.second) or (not layout.second and said in BAD) or (layout.first and said):
        return 0.0
    raise RowError(
        f"{layout.label[0]} is {described(value)}, which says neither good nor bad; correct it, or say which "
        f"value is good: --columns.first VALUE"
    )


def _completion(arranger: Arranger, raw: Mapping[str, Any], value: float) -> Completion:
    name = str(arranger.layout.completion)
    text = arranger.side(raw, name)
    if isinstance(text, list) and text and isinstance(text[-1], dict) and role_of(text[-1]) not in ASSISTANT:
        raise RowError(f"{name} ends with {described(role_of(text[-1]))}, not with the assistant; correct the row")
    return Completion(value, text, scored=not arranger.layout.label and not arranger.layout.rank)
