"""Where a data set has its prompt and its completions, and what orders them: a layout is a few fields.

The packaged layouts are in ``data/layouts.toml``, and :mod:`madpo.data.layouts` recognises them. A user gives one as
options (``--columns.chosen best``), as a table ``[layout]`` of a TOML file, or as a file of its own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Container, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_serializer, model_validator

from madpo.core.columns import PAIR_COLUMNS
from madpo.core.config import Frozen, added, read_toml, validate
from madpo.core.errors import ConfigError
from madpo.core.storage import expanded
from madpo.core.suggestions import did_you_mean


def _names(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str):  # a word of a command line
        value = value[0]
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",")) if value else ()
    return value if value is None or isinstance(value, list | tuple) else (value,)


def _name(value: Any) -> Any:
    """A name, also where it looks like a number or another value of TOML."""
    if value is None or isinstance(value, str | list | tuple | dict):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


Name = Annotated[str, BeforeValidator(_name)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_names)]


COMPLETIONS = ("chosen", "rejected", "sides", "completions", "completion", "replies")
"""Verbs that say where the completions are."""


class Layout(Frozen):
    """Where the parts of a pair are. A name may lead into an object or a list: ``question.full_text``, ``answers.0``.

    Completions are given in one of five ways: ``chosen`` and ``rejected``; ``sides``; ``completions``; ``completion``;
    ``replies``. All but the first need something that orders them.
    """

    name: Name = ""
    """Name of a packaged layout; without other keys, it takes that one."""

    prompt: Names = ()
    """Columns with the prompt, joined by a line break; none looks for the usual names."""
    system: Name | None = None
    """Column with the system prompt."""
    history: Name | None = None
    """Column with the turns before the prompt."""
    tools: Name | None = None
    """Column with the tools of a chat template."""
    ignore: Names = ()
    """Columns that are no part of the prompt although they are called like one."""

    chosen: Name | None = None
    """Column with the better completion."""
    rejected: Name | None = None
    """Column with the worse completion."""
    sides: Names = ()
    """Columns with one completion each, of which ``label`` or ``score`` says the order."""
    completions: Name | None = None
    """A column with a list of completions; the best and the worst make the pair."""
    text: Name | None = None
    """In each entry of ``completions``: the key of its text; None looks for the usual names."""
    completion: Name | None = None
    """A column with one completion; rows of the same prompt make pairs."""
    replies: Name | None = None
    """In each message of a tree in ``prompt``: the key of the messages that answer it."""

    label: Names = ()
    """A column that names the better side, or one flag for each side."""
    first: Names = ()
    """Values of ``label`` that prefer the first side; without ``second`` all others but ties prefer the second."""
    second: Names = ()
    """Values of ``label`` that prefer the second side."""
    tie: Names = ()
    """Values of ``label`` that prefer neither side."""
    positive: Literal["first", "second"] | None = None
    """``label`` is a number, and this is the side that a positive one prefers; 0 is a tie."""
    score: Names = ()
    """Higher is better: a column for each side, a key of each completion, or a column with a list of scores."""
    rank: Names = ()
    """The same, where lower is better."""
    order: Literal["best-first"] | None = None
    """The list of completions is in this order."""
    strength: Name | None = None
    """A column whose absolute value says how strongly the better side is preferred."""

    pair_id: Name | None = None
    """Column with a whole number for each pair."""
    chosen_score: Name | None = None
    """Column with the score of the better completion."""
    rejected_score: Name | None = None
    """Column with the score of the worse completion."""
    reward_margin: Name | None = None
    """A column with the margin, or the strength that ``madpo check`` names as a candidate."""
    weight: Name | None = None
    """Column with the weight of each pair."""
    decode: bool = False
    """Prompt and completions are JSON, or Python's lists, written as text."""
    chat: bool = False
    """For a chat model: a prompt of text is the user's message, and a completion of text the assistant's answer."""

    @model_validator(mode="after")
    def _fits(self) -> Layout:
        if (self.chosen is None) != (self.rejected is None):
            missing = "rejected" if self.rejected is None else "chosen"
            raise ValueError(f"columns.{missing} is missing; give chosen and rejected, or neither")
        if sum(bool(getattr(self, way)) for way in COMPLETIONS if way != "rejected") > 1:
            raise ValueError(
                "completions are given in two ways; give one of chosen and rejected, sides, completions, completion "
                "and replies"
            )
        if len(self.sides) == 1:
            raise ValueError(f"sides names one column, {self.sides[0]!r}; give two, such as response_a,response_b")
        return self

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return self.given

    @property
    def has_completions(self) -> bool:
        """Whether it says where the completions are."""
        return any(getattr(self, way) for way in COMPLETIONS)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        found = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return {name: value for name, value in found.items() if value not in (None, ())}

    @property
    def as_options(self) -> list[str]:
        """The fields that are set, as words of a command line."""
        return [word for name, value in self.given.items() for word in (f"--columns.{name}", _spelled(value))]

    def keeps_inside(self, field: str) -> bool:
        """Whether a field names a key of each completion, and no column."""
        inside = self.completions is not None or self.replies is not None
        return (
            inside and field in ("score", "rank") and not any(re.search(r"[{.]", name) for name in getattr(self, field))
        )

    def columns(self, names: Container[str]) -> dict[str, str]:
        """Column -> the field that reads it, of everything that leaves a row when its pair is made."""
        fields = ("prompt", "system", "history", "tools", *COMPLETIONS[:-1])
        found = {head(name, names): field for field in fields for name in each(getattr(self, field))}
        own = {"pair_id": self.pair_id, **self.numbers()}
        return found | {head(name, names): field for field, name in own.items() if name}

    def ordering(self, names: Container[str]) -> tuple[str, ...]:
        """Columns that order the completions or say how strongly; keys inside a list of completions are none."""
        found = (*self.label, *self.score, *self.rank, *each(self.strength))
        return tuple(dict.fromkeys(column for name in found if (column := head(name, names)) in names))

    def spelled(self, separator: str = ", ") -> dict[str, str]:
        """Where the completions are and what orders them, field by field."""
        fields = (*COMPLETIONS, "label", "score", "rank", "order")
        return {field: separator.join(each(value)) for field in fields if (value := getattr(self, field))}

    def numbers(self) -> dict[str, str]:
        """The columns of numbers that are named, field by field."""
        return {field: name for field in PAIR_COLUMNS if (name := getattr(self, field))}

    def strength_name(self) -> str | None:
        """What the strength of a preference is called as a candidate for ``reward_margin``."""
        if self.strength:
            return self.strength
        if self.score and not self.chosen:
            return " - ".join(self.score) if len(self.score) > 1 else self.score[0]
        if self.rank:
            return self.rank[0]
        return "rank" if self.completions and not self.label and not self.order else None


class Packaged(Layout):
    """A layout of ``layouts.toml``, its words not yet filled in."""

    of: tuple[str, ...] = ()
    """Data sets that have it, for the documentation."""
    requires: tuple[str, ...] = ()
    """Further columns by which it is recognised."""


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else ",".join(each(value))


def each(value: Any) -> tuple[str, ...]:
    """The names that a field gives."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def head(name: str, names: Container[str]) -> str:
    """The column that a name leads into."""
    return name if name in names else name.partition(".")[0]


def value_at(raw: Mapping[str, Any], name: str) -> Any:
    """What a name leads to; None where there is nothing."""
    if name in raw:
        return raw[name]
    found: Any = raw
    for part in name.split("."):
        if isinstance(found, list | tuple) and part.isdecimal():
            found = found[int(part)] if int(part) < len(found) else None
        else:
            found = found.get(part) if isinstance(found, Mapping) else None
    return found


class Reading(Frozen):
    """Which columns of a data set are read as what, for the settings of every command that reads one."""

    columns: Layout = added(Layout())
    """Names of columns, field by field; where nothing is given, they are recognised."""
    layout: Annotated[
        dict[str, Any] | None, BeforeValidator(lambda value: None if value is None else as_layout(value).given)
    ] = added(None)
    """A packaged layout by name, a TOML file with one, or a table of fields; columns take precedence."""

    @property
    def reading(self) -> Layout:
        """Both together. Raises ConfigError: they give the completions in two ways."""
        if self.layout is None:
            return self.columns
        return validate(self.layout | self.columns.given, Layout, place="columns and layout together")


def as_layout(value: Any) -> Layout:
    """What a caller gives for ``columns``: a layout, a table of its fields, a packaged name or a TOML file.

    Raises ConfigError: an unknown field or name.
    """
    if value is None:
        return Layout()
    if isinstance(value, Layout):
        return value
    if not isinstance(value, str | Path):
        return validate(dict(value), Layout, place="columns")
    packaged = [entry["name"] for entry in layout_table()["layout"]]
    if str(value) in packaged:
        return Layout(name=str(value))
    if Path(value).suffix != ".toml":
        hint = did_you_mean(str(value), packaged) or f"; known are {', '.join(packaged)}"
        raise ConfigError(f"layout = {str(value)!r} is no layout and no .toml file{hint}")
    found = read_toml(expanded(value))
    return validate(found.get("layout", found), Layout, place=str(value))


@cache
def layout_table() -> dict[str, Any]:
    """The packaged layouts, and the words in their names."""
    return tomllib.loads((files("madpo") / "data" / "layouts.toml").read_text(encoding="utf-8"))


@cache
def packaged_layouts() -> tuple[Packaged, ...]:
    """The table of layouts."""
    return tuple(Packaged.model_validate(entry) for entry in layout_table()["layout"])
