"""Command lines out of configurations: the option ``--loss.tau`` is the field ``loss.tau``, and the key of a TOML file.

A command is a function of one configuration, whose class says all: names, types, defaults and, by the docstrings of
its fields, the help. :class:`madpo.core.options.Cli` adds what a dotted name cannot say. Words on the command line take
precedence over ``--config FILE.toml``, and ``--set key=value`` over both.

pydantic-settings has such a parser too. It was not taken: it lists the fields of all losses at once, refuses a wrong
name without a suggestion, and has no free tables such as ``--args.NAME VALUE``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from madpo.core.config import Frozen, key_values, load_config, read_toml, toml_value
from madpo.core.errors import ConfigError
from madpo.core.options import Cli
from madpo.core.storage import expanded, stays_inside
from madpo.core.suggestions import did_you_mean


class Configurable(Frozen):
    """A command whose settings may come from a file."""

    config: Path | None = None
    """TOML file with settings; options take precedence over it."""
    set: Annotated[tuple[str, ...], Cli()] = ()
    """KEY=VALUE: a setting with its value as in TOML; takes precedence over all others."""


def configuration(function: Callable[..., int]) -> type[BaseModel]:
    """The class of the one argument of a command's function."""
    hints = get_type_hints(function)
    found: type[BaseModel] = next(kind for name, kind in hints.items() if name != "return")
    return found


class Option(NamedTuple):
    """One option of a command."""

    key: str
    annotation: Any
    about: str
    default: Any
    """``PydanticUndefined`` where it must be given; ``...`` where only ``about`` says it."""
    cli: Cli
    shorter: tuple[str, ...]
    """Spellings without the names of tables."""
    table: str
    """What the table is that holds it: a heading of the help."""

    @property
    def kinds(self) -> list[Any]:
        """The types of the values that it takes, None left out."""
        return [kind for kind in _alternatives(self.annotation) if kind is not NoneType]

    @property
    def flag(self) -> bool:
        """Whether it needs no value."""
        return self.kinds == [bool]

    @property
    def words(self) -> int:
        """How many words it takes at most; 0 is any number."""
        tuples = [get_args(kind) for kind in self.kinds if get_origin(kind) is tuple]
        return 1 if not tuples else 0 if Ellipsis in tuples[0] else len(tuples[0])

    @property
    def choices(self) -> list[str]:
        """The words that a ``Literal`` allows."""
        return [str(word) for kind in self.kinds if get_origin(kind) is Literal for word in get_args(kind)]

    @property
    def free(self) -> bool:
        """Whether it is a table with keys of the user's choice."""
        return any((get_origin(kind) or kind) is dict for kind in self.kinds)

    @property
    def metavar(self) -> str:
        """What its value is, for the help."""
        shown = {float: "X", int: "N", Path: "PATH", datetime: "DATE", bool: "true|false"}
        if self.free or not self.kinds:
            return "VALUE"
        if self.choices and self.words == 1:
            return "{" + ",".join(self.choices) + "}"
        each = [shown.get(kind, "TEXT") for kind in _inner(self.kinds) or self.kinds[:1]]
        return " ".join(each) + (" ..." if self.words == 0 else "")

    def value(self, given: list[str]) -> Any:
        """What the words mean: text where the field takes text only, else as in TOML."""
        if self.words != 1 and given[0] not in self.choices and not given[0].startswith("["):
            return [_read(word, _inner(self.kinds)) for word in given]
        return _read(given[0], self.kinds, optional=NoneType in _alternatives(self.annotation))


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _inner(kinds: Sequence[Any]) -> list[Any]:
    found = [inside for kind in kinds if get_origin(kind) is tuple for inside in get_args(kind) if inside is not ...]
    return [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in found]


def _read(word: str, kinds: Sequence[Any], *, optional: bool = False) -> Any:
    if bool in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    if all(kind in (str, Path, datetime) or get_origin(kind) is Literal for kind in kinds):
        return word
    return None if optional and str not in kinds and word == "none" else toml_value(word)


def options_of(model: type[BaseModel], kinds: Mapping[str, str]) -> list[Option]:
    """All options of a configuration: what needs no option's name, what must be given, the rest, then the tables in it,
    that of columns last.

    Args:
        kinds: key of a field that is one of several classes -> the kind that was chosen; without it, the default's.

    Raises:
        ConfigError: the kind does not exist.
    """
    found = list(_options(model, "", (), kinds, None))

    def place(option: Option) -> tuple[bool, ...]:
        required = not option.table and option.default is PydanticUndefined
        return not option.cli.positional, not required, bool(option.table), "columns." in option.key

    return sorted(found, key=place)


def _options(
    model: type[BaseModel], place: str, droppable: tuple[str, ...], kinds: Mapping[str, str], default: Any
) -> Iterator[Option]:
    """Those of the table at ``place``; ``droppable`` are the beginnings of their names that may be left out."""
    table = f"{place.rstrip('.')}: {sentence(model.__doc__ or '').rstrip('.')}" if place else ""
    for name, field in model.model_fields.items():
        cli = next((note for note in field.metadata if isinstance(note, Cli)), Cli())
        key, inside = place + name, {} if field.discriminator is None else _members(field.annotation)
        value = field.get_default(call_default_factory=True) if default is None else getattr(default, name)
        plain = Option(key, field.annotation, field.description or "", value, cli, (), table)
        if inside:
            chosen = kinds.get(key, getattr(value, "kind", ""))
            if chosen not in inside:
                hint = did_you_mean(chosen, inside) or f"; there are {', '.join(inside)}"
                raise ConfigError(f"{key}.kind = {chosen!r} is not known{hint}")
            about = f"{plain.about} One of {', '.join(inside)}."
            kind = getattr(value, "kind", value)
            yield plain._replace(key=f"{key}.kind", annotation=str, about=about, default=kind, shorter=(key,))
            of = value if isinstance(value, inside[chosen]) else None
            yield from _options(inside[chosen], f"{key}.", droppable, kinds, of)
        elif tables := _models(plain.kinds):
            dropped = (*droppable, f"{key}.") if cli.short and (not place or place in droppable) else droppable
            of = value if isinstance(value, BaseModel) else None
            yield from _options(tables[0], f"{key}.", dropped, kinds, of)
        elif name != "kind":
            names = [place + each for each in (name, *cli.also)]
            shorter = [each.removeprefix(start) for start in droppable for each in names if each.startswith(start)]
            within = f"{key}: {sentence(plain.about).rstrip('.')}" if cli.keys else table
            for each, kind in cli.keys.items():
                short = (each,) if cli.short else ()
                yield Option(f"{key}.{each}", kind, cli.about.get(each, ""), ..., Cli(), short, within)
            yield plain._replace(shorter=tuple(dict.fromkeys((*names[1:], *shorter, *cli.bare))), table=within)


def _models(kinds: Sequence[Any]) -> list[type[BaseModel]]:
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _members(annotation: Any) -> dict[str, type[BaseModel]]:
    """Kind -> class, of a union that may hold another one with a note."""
    found: dict[str, type[BaseModel]] = {}
    for kind in _alternatives(annotation):
        if get_origin(kind) is Annotated:
            found |= _members(get_args(kind)[0])
        elif _models([kind]):
            found[kind.model_fields["kind"].default] = kind
    return found


def sentence(text: str) -> str:
    """The first paragraph of a docstring on one line, without its marks; None is ``none`` on a command line."""
    plain = re.sub(r"\s*\(:\w+:`[^`]*`\)|``", "", text.split("\n\n")[0])
    return " ".join(re.sub(r"\bNone\b", "none", plain).split())


class CommandLine:
    """The options of one command, with the kinds that were chosen.

    Args:
        command: ``madpo train``.
        model: the class of its configuration.
        words: the command line after the command's name.
    """

    def __init__(self, command: str, model: type[BaseModel], words: Sequence[str]) -> None:
        self.command, self.model, self.words = command, model, list(words)
        self.options = options_of(model, self._kinds())
        self.by_key = {option.key: option for option in self.options}
        self.names = self._spellings()

    def _kinds(self) -> dict[str, str]:
        """Which of several classes a field is, as the words or the file of ``--config`` say."""
        fields = {name for name, field in self.model.model_fields.items() if field.discriminator is not None}
        words = [word.partition("=") for word in self.words]
        given = [(name, value if equals else (*self.words, "")[i + 1]) for i, (name, equals, value) in enumerate(words)]
        found: dict[str, str] = {}
        for file in [expanded(value) for name, value in given if name == "--config" and fields]:
            tables = {field: read_toml(file).get(field) for field in fields}
            found |= {field: str(t["kind"]) for field, t in tables.items() if isinstance(t, dict) and "kind" in t}
        for name, value in given:
            field = name.removeprefix("--").removesuffix(".kind")
            if field in fields and (name.startswith("--") or name.endswith(".kind")):
                found[field] = value
        return found

    def _spellings(self) -> dict[str, str]:
        """Name -> key. A field's own name goes before names that a note adds, and those before shortened ones."""
        own = {option.key: option.key for option in self.options}
        added = {name: option.key for option in self.options for name in option.cli.bare}
        added |= {name: f"{option.key}.{key}" for option in self.options for name, key in option.cli.names.items()}
        shorter: dict[str, set[str]] = {}
        for option in self.options:
            for name in option.shorter:
                shorter.setdefault(name, set()).add(option.key)
        found = {name: next(iter(keys)) for name, keys in shorter.items() if len(keys) == 1} | added | own
        return {name.replace(".", "_"): key for name, key in found.items()} | found

    def find(self, name: str) -> Option:
        """The option of a name in any spelling.

        Raises:
            ConfigError: there is none; with the nearest one.
        """
        name = name.replace("-", "_")
        if name in self.names:
            return self.by_key[self.names[name]]
        for option in self.options:
            key = name.removeprefix(f"{option.key}.")
            if key in option.cli.refused:
                raise ConfigError(f"--{name} {option.cli.refused[key]}")
            if option.free and not option.cli.keys and key != name:
                return option._replace(key=name, annotation=Any)
        others = self._of_other_kinds()
        if name in others:
            table, kinds = others[name]
            raise ConfigError(f"--{name} is a field of {', '.join(kinds)}; give --{table} {kinds[0]}, or leave it out")
        hint = did_you_mean(name, [*self.names, *others], "--") or f"; {self.command} --help lists all"
        elsewhere = _commands_with_option().get(name)
        has = f" (it is an option of madpo {', '.join(elsewhere)})" if elsewhere else ""
        raise ConfigError(f"{self.command} has no option '--{name}'{has}{hint}")

    def _of_other_kinds(self) -> dict[str, tuple[str, list[str]]]:
        """Name of a field that the chosen kinds do not have -> the option of the kind, and the kinds that have it."""
        found: dict[str, tuple[str, list[str]]] = {}
        for name, field in self.model.model_fields.items():
            for kind, member in _members(field.annotation).items() if field.discriminator is not None else ():
                for inner, of in member.model_fields.items():
                    bare = [each for note in of.metadata if isinstance(note, Cli) for each in note.bare]
                    for spelling in (f"{name}.{inner}", *bare):
                        found.setdefault(spelling, (name, []))[1].append(kind)
        return found

    def given(self) -> dict[str, Any]:
        """Key -> value, of all that the command line gives.

        Raises:
            ConfigError: a word that belongs to no option, or an option without its value.
        """
        found: dict[str, Any] = {}
        rest, free = list(self.words), list[str]()
        while rest:
            word = rest.pop(0)
            if word == "--":
                free += rest
                break
            if not word.startswith("--"):
                free.append(word)
                continue
            name, equals, value = word[2:].partition("=")
            option = self.find(name)
            taken = [value] if equals else []
            while rest and not equals and not rest[0].startswith("--"):
                enough = (option.words and len(taken) == option.words) or (taken and taken[0].startswith("["))
                if enough or (option.flag and rest[0].lower() not in ("true", "false")):
                    break
                taken.append(rest.pop(0))
            if option.flag and not taken:
                taken = ["true"]
            if len(taken) < (option.words or 1) and not (taken and taken[0].startswith("[")):
                raise ConfigError(f"the option --{name} has no value; write --{name} {option.metavar}")
            several = option.words == 0 and option.key in found
            found[option.key] = [*found[option.key], *option.value(taken)] if several else option.value(taken)
        for option in (option for option in self.options if option.cli.positional):
            if option.key not in found and free:
                found[option.key] = free.pop(0)
        if free:
            raise ConfigError(f"{self.command} takes no further word: {free[0]!r}; see {self.command} --help")
        return found

    def read(self) -> BaseModel:
        """The configuration.

        Raises:
            ConfigError: one sentence with the file (if there is one), the key, the value and the remedy.
        """
        given, config = self.given(), None
        settings = key_values(given.get("set", ())) if issubclass(self.model, Configurable) else {}
        fields = self.model.model_fields
        settings = {key if key.split(".")[0] in fields else self.names.get(key, key): settings[key] for key in settings}
        if "config" in given:
            config = expanded(given["config"])
            _refuse_foreign_places(config, {*given, *settings})
        try:
            found = load_config(config, self.model, given | settings)
        except ConfigError as error:
            said = re.sub(r"the keys? ('.+') (?:is|are) missing; add (?:it|them)", self._missing, str(error))
            said = said.removeprefix("the command line: ")
            raise ConfigError(said if settings else said.replace(" with --set ", " with --", 1)) from None
        return found.model_copy(update={key: expanded(value) for key, value in found if isinstance(value, Path)})

    def _missing(self, found: re.Match[str]) -> str:
        keys = re.findall(r"'(\S+?)'", found[1])
        options = sorted((o for o in self.options if o.key in keys), key=lambda option: not option.cli.positional)
        words = " ".join(o.key.upper() if o.cli.positional else f"--{o.key} {o.metavar}" for o in options)
        if len(keys) > 1:
            return f"{', '.join(keys[:-1])} and {keys[-1]} are missing; write {self.command} {words}"
        if not options or options[0].cli.positional:
            return f"{keys[0]} is missing; {f'write {self.command} {words}' if words else f'add --{keys[0]}'}"
        about = sentence(options[0].about).rstrip(".")
        return f"{keys[0]} is missing; add {words}: {about[:1].lower()}{about[1:]}"


@cache
def _commands_with_option() -> dict[str, list[str]]:
    """Name of an option, in any spelling -> the commands that have it."""
    from madpo.commands.cli import COMMANDS, command

    found: dict[str, list[str]] = {}
    for each, (_, target) in COMMANDS.items():
        for name in CommandLine(each, configuration(command(target)), ()).names:
            found.setdefault(name, []).append(each)
    return found


def _refuse_foreign_places(config: Path, typed: Container[str]) -> None:
    """Refuse a file, maybe somebody else's, that writes elsewhere or replaces something, unless that is ``typed``."""
    found = read_toml(config)
    if found.get("overwrite") and "overwrite" not in typed:
        raise ConfigError(f"{config}: overwrite = true is obeyed on the command line only; give --overwrite there")
    for key in ("output_dir", "output"):
        place = found.get(key)
        if key in typed or not isinstance(place, str):
            continue
        if not any(stays_inside(expanded(place), folder) for folder in (config.absolute().parent, Path.cwd())):
            raise ConfigError(
                f"{config}: {key} = {place!r} leads out of the folder of the file and of the working directory; give "
                f"--{key} on the command line"
            )
