"""A raw row in any layout -> rows with prompt, chosen and rejected, which :mod:`madpo.data.rows` reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from madpo.core.columns import MARGIN, PAIR_COLUMNS, SCORES
from madpo.core.errors import RowError
from madpo.core.layout import Layout, layout_table, value_at
from madpo.data.layouts import plain_name
from madpo.data.messages import ASSISTANT, alike, decoded, is_blank, said, shared_prefix
from madpo.data.raw import as_number, described, lacks, null

Raw = Mapping[str, Any]
_INSIDE = {kind: tuple(names) for kind, names in layout_table()["inside"].items()}


class Completion(NamedTuple):
    """One of several: what says that it is better, and the system prompt it was written under."""

    value: float
    text: Any
    system: str = ""
    scored: bool = False
    """The value is a score, on the data set's own scale."""


@dataclass
class Arranged:
    """A row as it is read: ``prompt``, ``chosen``, ``rejected`` and the columns that took no part; how strongly the
    chosen side is preferred, by the layout's own measure; and kinds of findings with details.
    """

    row: dict[str, Any]
    strength: float | None = None
    flags: list[tuple[str, str]] = field(default_factory=list)


class LeftOut(Exception):
    """A row that holds no preference; its text is a kind of :data:`madpo.data.findings.KINDS`."""


class Arranger:
    """Rows of one layout."""

    def __init__(self, layout: Layout, names: Sequence[str], *, from_text: bool = False) -> None:
        """``from_text``: numbers come as text (CSV)."""
        self.layout, self.from_text = layout, from_text
        self.taken = set(layout.columns(names))
        self.suffixes = _suffixes(layout.sides)
        scores = [name for name in (layout.chosen_score, layout.rejected_score) if name]
        if len(scores) == 2 and (remedy := scores_of_sides(layout, scores)):
            raise RowError(f"columns.chosen_score and columns.rejected_score are {' and '.join(scores)}: {remedy}")

    def pairs(self, raw: Raw) -> Iterator[Arranged]:
        """The pairs of a row: one, or several of a tree. Raises RowError, or LeftOut: the row holds no preference."""
        layout = self.layout
        if layout.replies:
            yield from self._tree(raw)
        elif layout.chosen and layout.rejected:
            sides = [self.side(raw, name) for name in (layout.chosen, layout.rejected)]
            yield self.pair(raw, Completion(1, sides[0]), Completion(0, sides[1]))
        else:
            found = self._sides(raw) if layout.sides else self._listed(raw)
            if (ends := _ends(found)) is None:
                raise LeftOut("tie" if layout.label else "unranked")
            pair = self.pair(raw, *ends)
            self.measure(pair, raw, *ends)
            yield pair

    def pair(self, raw: Raw, best: Completion, worst: Completion) -> Arranged:
        """A row with these two sides."""
        row = self.rest(raw)
        chosen, rejected = best.text, worst.text
        if isinstance(row.get("prompt"), list) and _texts(row["prompt"]) and _texts(chosen) and _texts(rejected):
            turns = row.pop("prompt")  # one text for each turn: the sides are conversations
            chosen, rejected = (_interleaved(turns, side) for side in (chosen, rejected))
        row["chosen"], row["rejected"] = alike(chosen, rejected)
        found = Arranged(row)
        if best.system != worst.system:
            found.flags.append(("system_prompts", ""))
        elif best.system.strip() and is_blank(row.get("system")):
            row["system"] = best.system
        for name in PAIR_COLUMNS:
            if (column := getattr(self.layout, name)) and column != self.layout.strength_name():
                row[name] = value_at(raw, column)
        return found

    def rest(self, raw: Raw) -> dict[str, Any]:
        """The columns that make no completion, those of the prompt under their usual names."""
        layout = self.layout
        row = {name: value for name, value in raw.items() if name not in self.taken and name not in layout.ignore}
        if layout.prompt and not layout.replies:
            row["prompt"] = self._prompt(raw)
        for own in ("system", "history", "tools", "pair_id"):
            if (name := getattr(layout, own)) is not None:
                row[own] = value_at(raw, name)
        if layout.decode and "prompt" in row:
            row["prompt"] = decoded(row["prompt"], "prompt")
        return row

    def _prompt(self, raw: Raw) -> Any:
        found = [(name, value_at(raw, name)) for name in self.layout.prompt]
        there = [(name, value) for name, value in found if value is not None and value != ""]
        if not there:
            return None
        if len(there) == 1:
            return there[0][1]
        if not all(isinstance(value, str) for _, value in there):
            names = " and ".join(name for name, _ in there)
            raise RowError(f"{names} are not all text, so they cannot be joined; name one of them as prompt")
        return "\n".join(value for _, value in there)

    def side(self, raw: Raw, name: str, inside: str = "") -> Any:
        """A completion in a column, or in an entry that is itself at ``inside``. Raises RowError: there is none."""
        value, whole = value_at(raw, name), inside + name
        if value is None:
            raise null(whole) if name in raw or name.partition(".")[0] in raw else lacks(whole)
        return decoded(value, whole) if self.layout.decode else value

    # What orders the completions

    def number(self, value: Any, name: str) -> float:
        """What orders a completion: a finite number, or true or false. Raises RowError: it is none."""
        if isinstance(value, bool):
            return float(value)
        return as_number(value, name, from_text=self.from_text)

    def _sides(self, raw: Raw) -> list[Completion]:
        layout = self.layout
        texts = [self._text(self.side(raw, name), name) for name in layout.sides]
        if len(layout.label) == 1:
            better = self._better(value_at(raw, layout.label[0]))
            values = [float(i == better) for i in range(len(texts))]
        else:
            names, sign = (layout.rank, -1) if layout.rank else (layout.label or layout.score, 1)
            if len(names) != len(texts):
                raise RowError(
                    f"{len(texts)} sides and {len(names)} columns that order them; name one for each side, or "
                    "one label: --columns.label NAME"
                )
            numbers = [value_at(raw, name) for name in names]
            if any(number is None for number in numbers):
                raise LeftOut("no_winner")
            values = [sign * self.number(n, name) for n, name in zip(numbers, names, strict=True)]
        scored = not layout.label and not layout.rank
        return [Completion(value, text, scored=scored) for value, text in zip(values, texts, strict=True)]

    def _better(self, value: Any) -> int:
        """The side that a label names. Raises LeftOut: it names none."""
        layout, name = self.layout, self.layout.label[0]
        if value is None or value == "":
            raise LeftOut("no_winner")
        if layout.positive:
            preference = as_number(value, name, from_text=True)
            if preference == 0:
                raise LeftOut("tie")
            return int((preference > 0) == (layout.positive == "second"))
        word = _spelled(value)
        if word in map(_spelled, layout.first):
            return 0
        if word in map(_spelled, layout.second):
            return 1
        if word in map(_spelled, layout.tie):
            raise LeftOut("tie")
        # The sign of a number is part of it: -1 is no name of a side 1.
        tokens = re.findall(r"[a-z]+|\A-\d+(?:\.\d+)?\Z|\d+(?:\.\d+)?|[<>=]+", word)
        ties = _INSIDE["ties"]
        if not tokens or "".join(tokens) in ties or tokens[0] in ties or any("=" in t for t in tokens):
            raise LeftOut("tie")
        if layout.first and not layout.second:
            return 1
        if len(tokens) == 3 and tokens[1][0] in "<>":
            tokens = [tokens[0] if tokens[1][0] == ">" else tokens[2]]
        # "b is better than a" and "not a" end in the side that they do not prefer.
        before = {*tokens[:-1]}
        plain = before.isdisjoint(self.suffixes) and before.isdisjoint(layout_table()["words"]["worse"])
        for i, (side, suffix) in enumerate(zip(layout.sides, self.suffixes, strict=True)):
            if (plain and tokens[-1] == suffix) or word == _spelled(side):
                return i
        if self.suffixes == ("1", "2") and tokens[-1][0].isdigit():  # a mean of annotators, from 1 to 2
            number = float(tokens[-1])
            if number == 1.5:
                raise LeftOut("tie")
            if 1 < number < 2:
                return int(number > 1.5)
        one, two = layout.sides[:2]
        word = shlex.quote(str(value))
        raise RowError(
            f"{name} is {described(value)}, which names neither {one} nor {two}; say what it means: "
            f"--columns.first {word} if it prefers {one}, or --columns.second {word} if it prefers {two}, or "
            f"--columns.tie {word} if it prefers neither"
        )

    def _listed(self, raw: Raw) -> list[Completion]:
        assert self.layout.completions is not None
        name = self.layout.completions
        entries = _rows_of(self.side(raw, name), name)
        values, scored = self._orders(raw, name, len(entries))
        if values is None:
            return [self._entry(entry, f"{name}[{i}]") for i, entry in enumerate(entries)]
        return [
            Completion(value, self._text(entry, f"{name}[{i}]"), scored=scored)
            for i, (entry, value) in enumerate(zip(entries, values, strict=True))
            if value is not None
        ]

    def _orders(self, raw: Raw, name: str, count: int) -> tuple[list[float | None] | None, bool]:
        """What orders ``count`` entries from outside of them, and whether it is a score; None where they say it."""
        layout = self.layout
        if layout.order:
            return [-float(i) for i in range(count)], False
        if layout.label:
            if (label := value_at(raw, layout.label[0])) is None:
                raise LeftOut("no_winner")
            index = as_number(label, layout.label[0], from_text=True)
            if index not in range(count):
                raise RowError(
                    f"{layout.label[0]} is {described(label)}, but {name} has {count} entries, counted from 0; correct "
                    "it or drop the row"
                )
            return [float(i == index) for i in range(count)], False
        for ordering, sign in ((layout.score, 1), (layout.rank, -1)):
            if not ordering or (numbers := value_at(raw, ordering[0])) is None:
                continue
            if not isinstance(numbers, list | tuple):
                raise RowError(f"{ordering[0]} is {described(numbers)}, not a list; give a list")
            if len(numbers) != count:
                counts = f"{name} holds {count} entries and {ordering[0]} {len(numbers)}"
                raise RowError(f"{counts}; give a score for each response")
            found = enumerate(numbers)
            return [None if n is None else sign * self.number(n, f"{ordering[0]}[{i}]") for i, n in found], sign > 0
        return None, False

    def _text(self, entry: Any, name: str) -> Any:
        """The text of an entry of a list: the entry, or what its key for texts holds."""
        if not isinstance(entry, dict):
            return entry
        given = {key for key, found in entry.items() if found is not None}
        if self.layout.text is not None:
            return self.side(entry, self.layout.text, f"{name}.")
        text = next((key for key in _INSIDE["texts"] if key in given), None)
        return entry if text is None or "role" in given else entry[text]

    def _entry(self, entry: Any, name: str) -> Completion:
        layout = self.layout
        # A table gives every object all keys, with null where it had none.
        given = {key for key, found in entry.items() if found is not None} if isinstance(entry, dict) else set()
        text = next((key for key in ((layout.text,) if layout.text else _INSIDE["texts"]) if key in given), None)
        value, scored = (None, False) if text is None else self._value(entry, name)
        if text is None or value is None:
            remedy = "give both, add chosen and rejected, or name its keys with --columns.text KEY --columns.score KEY"
            if not isinstance(entry, dict):
                remedy = (
                    "name what orders the list: --columns.score NAME or --columns.label NAME, or give "
                    "--columns.order best-first if the best comes first"
                )
            raise RowError(f"{name} lacks response or overall_score; {remedy}")
        system = next((entry[key] for key in _INSIDE["system"] if isinstance(entry.get(key), str)), "")
        return Completion(value, self.side(entry, text, f"{name}."), system, scored)

    def _value(self, entry: Raw, name: str) -> tuple[float | None, bool]:
        """What orders an entry, and whether it is a score: its score, its rank, or the mean rating of its aspects."""
        layout = self.layout
        for names, sign in ((layout.score or _INSIDE["scores"], 1), (layout.rank or _INSIDE["ranks"], -1)):
            if (names is _INSIDE["scores"] and layout.rank) or (names is _INSIDE["ranks"] and layout.score):
                continue
            key = next((key for key in names if value_at(entry, key) is not None), None)
            if key is not None:
                return sign * self.number(value_at(entry, key), f"{name}.{key}"), sign > 0
        aspects = entry.get("annotations")
        ratings = []
        for aspect in aspects.values() if isinstance(aspects, dict) else ():
            rating = aspect.get("Rating") if isinstance(aspect, dict) else None
            if isinstance(rating, str) and rating.strip() in ("N/A", ""):  # an aspect that does not apply
                continue
            if rating is not None:
                ratings.append(as_number(rating, f"{name}.annotations.Rating", from_text=True))
        return (sum(ratings) / len(ratings) if ratings else None), True

    def measure(self, pair: Arranged, raw: Raw, best: Completion, worst: Completion) -> None:
        """Add the strength of a preference and, where they order the sides, the scores of both."""
        layout = self.layout
        if layout.strength is not None:
            strength = value_at(raw, layout.strength)
            pair.strength = None if strength is None else abs(as_number(strength, layout.strength, from_text=True))
        elif layout.label and len(layout.score) == len(layout.sides) == 2:
            scores = [value_at(raw, name) for name in layout.score]
            if None not in scores:
                one, two = (self.number(s, name) for s, name in zip(scores, layout.score, strict=True))
                pair.strength = abs(one - two)
        elif not layout.label and not layout.order:
            pair.strength = best.value - worst.value
            if best.scored:
                pair.row |= dict(zip(SCORES, (best.value, worst.value), strict=True))
        self._take_margin(pair)

    def _take_margin(self, pair: Arranged) -> None:
        layout = self.layout
        if layout.reward_margin is not None and layout.reward_margin == layout.strength_name():
            pair.row[MARGIN] = pair.strength

    # Trees

    def _tree(self, raw: Raw) -> Iterator[Arranged]:
        layout = self.layout
        assert layout.replies is not None
        name = (layout.prompt or ("prompt",))[0]
        root = value_at(raw, name)
        if not isinstance(root, Mapping):
            raise RowError(f"{name} is {described(root)}, not a tree of messages")
        rest, found = self.rest(raw), 0
        left: list[tuple[Raw, list[Any]]] = [(root, [])]
        while left:
            message, before = left.pop()
            path = [*before, {"role": message.get("role"), "content": self._text_of(message)}]
            replies = message.get(layout.replies) or []
            if not isinstance(replies, list | tuple) or not all(isinstance(reply, Mapping) for reply in replies):
                raise RowError(f"{layout.replies} is {described(replies)}, no list of messages; correct it")
            left += [(reply, path) for reply in reversed(replies)]
            key = (layout.rank or _INSIDE["ranks"])[0]
            ranked = [
                Completion(-self.number(reply[key], key), self._text_of(reply))
                for reply in replies
                if reply.get(key) is not None and reply.get("role") in ASSISTANT and not reply.get("deleted")
            ]
            if (ends := _ends(ranked)) is not None:
                sides = (said("assistant", side.text) for side in ends)
                row = rest | dict(zip(("prompt", "chosen", "rejected"), (path, *sides), strict=True))
                pair = Arranged(row, strength=ends[0].value - ends[1].value)
                self._take_margin(pair)
                yield pair
                found += 1
        if not found:
            raise LeftOut("unranked")

    def _text_of(self, message: Raw) -> str:
        text = next((message[key] for key in ("text", "content", "value") if message.get(key) is not None), None)
        if not isinstance(text, str):
            raise RowError(f"a message of the tree has the text {described(text)}; fill it in or drop it")
        return text


def _ends(found: Sequence[Completion]) -> tuple[Completion, Completion] | None:
    """The best and the worst; None where all are equal."""
    if len({completion.value for completion in found}) < 2:
        return None
    return max(found, key=lambda c: c.value), min(found, key=lambda c: c.value)


def scores_of_sides(layout: Layout, names: Sequence[str]) -> str:
    """Why columns are no scores of the chosen and the rejected, and what to do; empty where they may be.

    They are called like the sides, of which a label says the order.
    """
    if not layout.sides or {plain_name(name).split("_")[-1] for name in names} != {*_suffixes(layout.sides)}:
        return ""
    return (
        f"these are scores of {' and '.join(layout.sides)}, either of which can be the chosen one; --columns.sides "
        f"{','.join(layout.sides)} --columns.score {','.join(names)} orders the sides by them, under the names "
        f"{' and '.join(SCORES)}"
    )


def _suffixes(sides: Sequence[str]) -> tuple[str, ...]:
    """What is different in the names of the sides, in lower case: "1" and "2", "a" and "b"."""
    if len(sides) < 2:
        return ()
    words = [plain_name(side).split("_") for side in sides]
    for end in (0, -1):
        while all(len(word) > 1 for word in words) and len({word[end] for word in words}) == 1:
            words = [word[1:] if end == 0 else word[:-1] for word in words]
    rests = ["_".join(word) for word in words]
    begin = shared_prefix(min(rests), max(rests))
    return tuple(rest[begin:] for rest in rests)


def _spelled(value: Any) -> str:
    """A label's value in lower case; a whole number without its fraction."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    said = str(value).strip().lower()
    return said.removesuffix(".0") if re.fullmatch(r"-?\d+\.0", said) else said


def _rows_of(value: Any, name: str) -> Sequence[Any]:
    """The entries of a list, or of an object of lists, as some writers turn a list of objects around."""
    if isinstance(value, dict):
        lengths = {len(entry) for entry in value.values() if isinstance(entry, list | tuple)}
        if len(lengths) != 1 or not all(isinstance(entry, list | tuple) for entry in value.values()):
            raise RowError(f"{name} is {described(value)}, not a list of responses; give a list")
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} is {described(value)}, not a list; a pair needs two completions, give a list")
    return value


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(t, str | None) for t in value)


def _interleaved(turns: Sequence[Any], answers: Sequence[Any]) -> list[dict[str, Any]]:
    if len(turns) != len(answers):
        raise RowError(f"there are {len(turns)} prompts and {len(answers)} answers; give one for each turn")
    if any(text is None for text in (*turns, *answers)):
        raise LeftOut("no_completion")
    pairs = zip(turns, answers, strict=True)
    return [message for turn, answer in pairs for message in (*said("user", turn), *said("assistant", answer))]
