"""Which layout a data set has, by the names of its columns; and what to say where none or two fit."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from madpo.core import errors
from madpo.core.columns import PAIR_COLUMNS
from madpo.core.errors import RowError
from madpo.core.layout import COMPLETIONS, Layout, Packaged, each, layout_table, packaged_layouts
from madpo.core.suggestions import did_you_mean
from madpo.data.prompts import QUESTIONS
from madpo.data.raw import described_name

LISTED = 60  # columns that a refusal names
USUAL = tuple(name for names in QUESTIONS for name in names[:1])


_WORD = re.compile(r"\{(\w+)\}")
_FIELDS = ("prompt", "system", "history", *COMPLETIONS[:-1], "label", "score", "rank", "strength", "requires")


def plain_name(name: str) -> str:
    """A name in lower case, its words joined by underscores."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()).strip("_")


class _Columns:
    """The names of a data set, found by their plain form."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.plain: dict[str, str] = {}
        for name in names:
            self.plain.setdefault(plain_name(name), name)
        self.exact = set(names)

    def find(self, name: str) -> str | None:
        """The column that a name of the table leads into, with the rest of the way."""
        column, dot, rest = name.partition(".")
        found = column if column in self.exact else self.plain.get(plain_name(column))
        return None if found is None else found + dot + rest

    def usual_prompt(self) -> tuple[str, ...] | None:
        """The columns of the prompt where their names are spelled otherwise; None where they are not."""
        for names in QUESTIONS:
            if names[0] in self.exact:
                return None
            if names[0] in self.plain:
                return tuple(self.plain[name] for name in names if name in self.plain)
        return None

    def with_prompt(self, layout: Layout) -> Layout:
        """A layout that also says where the prompt is, if that is not found by its name."""
        taken = layout.columns(self.exact)
        prompt = tuple(name for name in self.usual_prompt() or () if name not in taken)
        return layout if layout.prompt or not prompt else Layout.model_validate(layout.given | {"prompt": prompt})

    def filled(self, entry: Packaged) -> Iterator[tuple[Layout, tuple[str, ...]]]:
        """An entry with every choice of its words that fits, and the labels that would fit too."""
        fields = {field: each(getattr(entry, field)) for field in _FIELDS}
        prompts = fields.pop("prompt")
        if prompts and not any(self.find(name) for name in prompts):  # one of several is enough
            return
        needed = [name for field, names in fields.items() if not entry.keeps_inside(field) for name in names]
        words = dict.fromkeys(word for name in needed for word in _WORD.findall(name))
        fitting = {
            word: [
                choice
                for choice in layout_table()["words"][word]
                if all(self.find(name.replace(f"{{{word}}}", choice)) for name in needed if f"{{{word}}}" in name)
            ]
            for word in words
        }
        if not all(fitting.values()) or not all(self.find(name) for name in needed if not _WORD.search(name)):
            return
        others = tuple(str(self.find(choice)) for choice in fitting.get("label", [])[1:])
        orders = ("label", "score", "good", "scores", "ranks")
        for chosen in product(*(found[:1] if word in orders else found for word, found in fitting.items())):
            names = dict(zip(words, chosen, strict=True))
            filled = {
                field: [self.find(_put(name, names)) or _put(name, names) for name in found]
                for field, found in (fields | {"prompt": prompts}).items()
                if found
            }
            single = {field: filled[field][0] for field in filled if not isinstance(getattr(entry, field), tuple)}
            said = entry.given | filled | single
            yield Layout.model_validate({field: said[field] for field in said.keys() & Layout.model_fields}), others


def _put(name: str, words: Mapping[str, str]) -> str:
    return _WORD.sub(lambda match: words[match[1]], name)


def recognise(names: Sequence[str], given: Layout) -> tuple[Layout, tuple[str, ...]] | None:
    """The layout of a data set by its columns, and columns that could have ordered the completions as well; None where
    it has ``chosen`` and ``rejected`` and nothing is ``given`` by the user.

    Raises RowError: no layout fits, or two do; with all columns and the option that decides.
    """
    for column, field in given.columns(names).items():
        # A strength that a layout computes is named as one, and is no column.
        if column not in names and (given.has_completions or field not in PAIR_COLUMNS):
            near = did_you_mean(column, names)
            raise RowError(f"no column {column!r}, which columns.{field} names (found {listed_columns(names)}){near}")
    columns = _Columns(names)
    if given.name and not given.has_completions:
        entry = next(entry for entry in packaged_layouts() if entry.name == given.name)
        found = next(columns.filled(entry), None)
        if found is None:
            raise RowError(
                f"the layout {given.name!r} does not fit the columns {listed_columns(names)}; leave --layout out, or "
                "give the columns: --columns.chosen NAME --columns.rejected NAME"
            )
        return columns.with_prompt(_joined(found[0], given)), found[1]
    if given.has_completions:
        return columns.with_prompt(_ordered(given, columns)), ()
    if {"chosen", "rejected"} <= columns.exact and not given.given and columns.usual_prompt() is None:
        return None
    if {"chosen", "rejected"} <= columns.plain.keys():
        plain = Layout(chosen=columns.find("chosen"), rejected=columns.find("rejected"))
        return columns.with_prompt(_joined(plain, given)), ()
    fitting = [found for entry in packaged_layouts() for found in columns.filled(entry)]
    if not fitting:
        missing = "rejected" if "chosen" in columns.exact else "chosen"
        raise RowError(f"has no column {missing!r} (found {listed_columns(names)}); {_proposal(columns, given)}")
    first = fitting[0][0]
    for other, _ in fitting[1:]:
        if _completions(other) != _completions(first) and not _inside(other, first):
            one, two = (_as_options(layout) for layout in (first, other))
            raise RowError(f"two layouts fit the columns {listed_columns(names)}; say which: {one}, or {two}")
    return columns.with_prompt(_joined(first, given)), fitting[0][1]


def _joined(found: Layout, given: Layout) -> Layout:
    taken = given.given
    if "label" in taken:  # another label has its own values
        found = found.model_copy(update={"first": (), "second": (), "positive": None, "strength": None, "score": ()})
    return Layout.model_validate(found.given | taken)


def _completions(layout: Layout) -> tuple[str, ...]:
    return tuple(name for way in COMPLETIONS for name in each(getattr(layout, way)))


def _inside(other: Layout, first: Layout) -> bool:
    """Whether the first of two layouts says more: it has more sides, or a column for each."""
    if other.order:
        return True
    if first.sides and other.sides:
        return {*other.sides} <= {*first.sides}
    return bool(first.chosen or first.sides) and bool(other.completion or other.completions)


def _ordered(given: Layout, columns: _Columns) -> Layout:
    """What a user gives, and something that orders the completions."""
    names = columns.names
    if given.chosen or given.label or given.score or given.rank or given.order:
        return given
    words = layout_table()["words"]
    if given.completions or given.replies:
        for field, kind in (("score", "scores"), ("rank", "ranks")):
            if given.completions and (found := next(filter(None, map(columns.find, words[kind])), None)):
                return given.model_copy(update={field: (found,)})
        return given
    if label := next(filter(None, map(columns.find, words["good" if given.completion else "label"])), None):
        return given.model_copy(update={"label": (label,)})
    says = "columns.sides" if given.sides else "columns.completion"
    left = [name for name in names if name not in given.columns(names)]
    raise RowError(
        f"{says} is given and nothing that says which is better (found {listed_columns(names)}); add "
        f"--columns.label {shlex.quote(left[-1]) if left else 'NAME'}"
    )


def listed_columns(names: Sequence[str]) -> str:
    """All columns, for a sentence; of very many the first."""
    return errors.listed([described_name(name) for name in names], LISTED) or "none"


def _as_options(layout: Layout) -> str:
    return " ".join(f"--columns.{field} {shlex.quote(names)}" for field, names in layout.spelled(",").items())


def _proposal(columns: _Columns, given: Layout) -> str:
    """The options that would make a pair of the columns, as far as their names say."""
    words = {kind: set(found) for kind, found in layout_table()["words"].items()}
    tokens = {name: {*plain_name(name).split("_")} for name in columns.names[:1000]}
    better = [name for name, said in tokens.items() if said & words["better"] and not said & words["worse"]]
    worse = [name for name, said in tokens.items() if said & words["worse"]]
    near = [difflib.get_close_matches(side, list(tokens), n=1, cutoff=0.6) for side in ("chosen", "rejected")]
    left = [name for name, said in tokens.items() if not said & words["about"]]
    asks = [name for name in left if tokens[name] & words["asks"]]
    others = [name for name in left if name not in asks]
    alike = next(((one, two) for i, one in enumerate(others) for two in others[i + 1 :] if _alike(one, two)), None)
    label = ""
    if near[0] and near[1] and near[0] != near[1]:
        sides = (near[0][0], near[1][0])
    elif better and worse:
        sides = (better[0], worse[0])
    elif alike:
        sides = alike
        rest = [name for name in others if name not in sides]
        flags = next(((one, two) for i, one in enumerate(rest) for two in rest[i + 1 :] if _alike(one, two)), None)
        label = ",".join(flags or rest[:1])
    elif len(others) >= (2 if asks or given.prompt else 3):
        sides = (others[-2], others[-1]) if asks or given.prompt else (others[1], others[2])
    elif len(others) == 1 and asks:
        return (
            f"a pair needs two completions: give --columns.completions {shlex.quote(others[0])} if that is a list of "
            "them, or name their columns with --columns.chosen NAME --columns.rejected NAME"
        )
    else:
        return (
            "a pair needs two completions: name their columns with --columns.chosen NAME --columns.rejected NAME, a "
            "list of them with --columns.completions NAME, or one for each row with --columns.completion NAME and "
            "--columns.label NAME"
        )
    prompt = next((name for name in (*asks, *others) if name not in (*sides, label)), None)
    usual = prompt is None or given.prompt or not columns.exact.isdisjoint(USUAL)
    start = "" if usual else f"--columns.prompt {shlex.quote(str(prompt))} "
    plain = f"{start}{_as_options(Layout(chosen=sides[0], rejected=sides[1]))}"
    if sides == alike:
        plain += " if the first is always the better one"
    if label:
        return f"name the columns: {start}{_as_options(Layout(sides=sides, label=tuple(label.split(','))))}, or {plain}"
    return f"name the columns: {plain}"


def _alike(one: str, other: str) -> bool:
    """Whether two names differ in their last letter only, as those of two sides do."""
    return len(one) == len(other) > 1 and one[:-1] == other[:-1] and one[-1].isalnum() and other[-1].isalnum()
