"""Configuration: frozen pydantic models, hand-written TOML, and mistakes reported in one sentence.

A configuration says everything that bears on a result, so it cannot change after it is built and knows no
unknown keys: a typing error must never mean "the default, silently".
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic._internal._model_construction import ModelMetaclass

from madpo.core.errors import ConfigError, shortened
from madpo.core.suggestions import did_you_mean

T = TypeVar("T", bound=BaseModel)
MOST_SEED = 2**32 - 1
"""The largest seed that numpy takes, which the trainers of the libraries call."""
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
FOLDERS = "folders"
_ADDED = "added"


class _SaysIt(ModelMetaclass):
    """A mistake in a configuration that is made in Python is our sentence, as one in a file is."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            raise ConfigError(_sentence(error, fields, cls, cls.__name__, ())) from None  # type: ignore[arg-type]


class Frozen(BaseModel, metaclass=_SaysIt):
    """Base of every configuration: immutable, no unknown keys, no NaN or infinity.

    A field with ``Field(exclude=True)`` says how a step runs and not what it computes (a batch size at
    evaluation, a path): it stays outside the step's identity. A field made by :func:`added` enters it only where it
    differs from its default, so that results from before the field existed stay valid.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_flag_is_a_number(cls, data: Any) -> Any:
        given = data.items() if isinstance(data, dict) else ()
        for name in (name for name, value in given if isinstance(value, bool) and name in cls.model_fields):
            kinds = _kinds(cls.model_fields[name].annotation)
            if bool not in kinds and kinds & {int, float}:  # pydantic would read true as 1
                raise ValueError(f"{name} = {data[name]}: must be a number")
        return data


def _kinds(annotation: Any) -> set[Any]:
    """The types of a union, without notes."""
    inner = [each for each in get_args(annotation) if get_origin(annotation) in (Union, UnionType)]
    plain = get_args(annotation)[:1] if get_origin(annotation) is Annotated else inner
    return set().union(*map(_kinds, plain)) if plain else {annotation}


def added(default: Any, **limits: Any) -> Any:
    """A field that joins a configuration after results have been made with it.

    Its default must mean what the code did before the field existed: it enters a step's identity only where it
    differs from the default, and every finished result stays valid. So the default may never change; give the steps
    concerned a new version instead. Fields that were there from the start always enter, defaults included.

    Args:
        default: what the code did before.
        limits: as for pydantic's ``Field``.
    """
    return Field(default, json_schema_extra={_ADDED: True}, **limits)


def identity_settings(config: BaseModel) -> dict[str, Any]:
    """The configuration as it enters an identity: resolved, less excluded fields and added ones at their default."""
    own = getattr(config, "decisive", None)
    # A configuration with ``decisive`` knows by itself which of its values bear on the result. Warnings are errors,
    # since a subclass instance in a field of its base class would lose its own fields silently.
    found: dict[str, Any] = (
        own() if callable(own) else _without_added(config, config.model_dump(mode="json", warnings="error"))
    )
    return found


def _without_added(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        kept = {}
        for name, content in dumped.items():
            field, own = type(value).model_fields.get(name), getattr(value, name)
            extra = getattr(field, "json_schema_extra", None)
            if field is None or not (isinstance(extra, dict) and extra.get(_ADDED) and own == field.default):
                kept[name] = _without_added(own, content)
        return kept
    if isinstance(value, Mapping):
        return {key: _without_added(item, dumped[str(key)]) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_added(item, content) for item, content in zip(value, dumped, strict=True)]
    return dumped


def changed(config: BaseModel) -> list[str]:
    """Fields whose values are not the defaults."""
    fields = type(config).model_fields.items()
    return [name for name, field in fields if getattr(config, name) != field.get_default(call_default_factory=True)]


def first_difference(before: Any, after: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first field, by name, in which two plain values differ: its dotted key and both values.

    A field that one of them lacks is None there. None if there is no such field.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = ((name, before.get(name), after.get(name)) for name in sorted(before.keys() | after.keys()))
        inner = (first_difference(one, two, f"{key}.{name}" if key else name) for name, one, two in pairs)
        return next(filter(None, inner), None)
    return None if before == after else (key, before, after)


def part(whole: BaseModel, model: type[T]) -> T:
    """The fields of ``model`` out of a configuration that has more: a command's options, or a subclass."""
    return model.model_validate({name: getattr(whole, name) for name in model.model_fields})


def load_config(source: Path | None, model: type[T], overrides: Mapping[str, object] | Sequence[str] = ()) -> T:
    """Read a TOML file into ``model``.

    Args:
        overrides: ``{"policy.learning_rate": 1e-4}`` or ``["policy.learning_rate=1e-4"]``. A dotted key names a
            field; a number in it, an entry of a list. The value in a text is read as TOML, and as plain text where
            it is none.

    Raises:
        ConfigError: one sentence with the file, the dotted key, the value and what is allowed; of several
            mistakes the first, and the count of the others.
    """
    data = {} if source is None else read_toml(source)
    given, place = key_values(overrides), "the command line" if source is None else str(source)
    for key, value in given.items():
        _put(data, key, value, place)
    # A path that the user typed goes anywhere; one in a file stays with the file, or where the user is.
    typed = source is None or any(key.split(".")[-1] == "target" for key in given)
    context = None if typed or source is None else {FOLDERS: (source.absolute().parent, Path.cwd())}
    return validate(data, model, place=place, overridden=() if source is None else given, context=context)


def validate(
    data: object,
    model: type[T],
    *,
    place: str,
    overridden: Iterable[str] = (),
    context: dict[str, Any] | None = None,
) -> T:
    """``data`` as ``model``, or a ConfigError that begins with ``place``.

    Args:
        overridden: dotted keys that were given by ``--set``, and not in ``place``.
        context: for the validators of ``model``: ``FOLDERS`` holds the folders that paths in ``data`` may not leave.
    """
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        raise ConfigError(_sentence(error, data, model, place, overridden)) from None


def read_toml(source: Path) -> dict[str, Any]:
    """What a TOML file says. Raises ConfigError: it is missing, cannot be read, or is no TOML."""
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{source}: there is no such file; give the path of a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error.strerror}); give a readable TOML file") from None
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:  # ValueError: a number of too many digits
        raise ConfigError(f"{source}: is not valid TOML: {error}; correct that line") from None


def key_values(overrides: Mapping[str, object] | Sequence[str]) -> dict[str, object]:
    """Dotted key -> value; text is split at its first "=". Raises ConfigError: a text is not key=value."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    pairs: dict[str, object] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r} is not key=value, such as --set lora.rank=8")
        pairs[key.strip()] = toml_value(value.strip())
    return pairs


def toml_value(text: str) -> object:
    """What a text means as a TOML value; the text itself where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return text
    # A line break in the text could smuggle in further keys; then it is text, not a TOML value.
    return parsed["value"] if list(parsed) == ["value"] else text


def _put(data: dict[str, Any], key: str, value: object, source: str) -> None:
    *parents, last = key.split(".")
    here: Any = data
    for depth, part in enumerate(parents):
        here = here[_index(here, part, key, source)] if isinstance(here, list) else here.setdefault(part, {})
        if not isinstance(here, dict | list):
            at = ".".join(parents[: depth + 1])
            raise ConfigError(f"{source}: --set {key} does not fit: {at} = {shortened(repr(here), 80)} has no fields")
    if isinstance(here, list):
        here[_index(here, last, key, source)] = value
    else:
        here[last] = value


def _index(entries: list[Any], part: str, key: str, source: str) -> int:
    if part.isascii() and part.isdigit() and int(part) < len(entries):
        return int(part)
    raise ConfigError(f"{source}: --set {key} does not fit: {part!r} must be a number from 0 to {len(entries) - 1}")


def _sentence(
    error: ValidationError, data: object, model: type[BaseModel], place: str, overridden: Iterable[str]
) -> str:
    first, *others = error.errors(include_url=False)
    kind, loc, ctx = first["type"], first["loc"], first.get("ctx", {})
    key = _dotted(loc, data, missing=kind == "missing")
    if not key and kind != "value_error":  # of a table that a validator reads by itself
        key = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        known = _known_fields(loc, model)
        hint = did_you_mean(str(loc[-1]), known) or f"; known are {', '.join(known)}"
        text = f"unknown key {key!r}{hint}"
    elif kind == "missing":
        keys = [key, *(_dotted(each["loc"], data, missing=True) for each in others if each["type"] == kind)]
        others = [each for each in others if each["type"] != kind]
        named = ", ".join(map(repr, keys))
        text = f"the key {named} is missing; add it" if len(keys) == 1 else f"the keys {named} are missing; add them"
    elif kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", ctx["expected_tags"])
        key = ".".join(filter(None, (key, ctx["discriminator"].strip("'"))))
        allowed = ", ".join(map(repr, tags))
        text = f"{key} = {ctx['tag']!r} must be one of {allowed}{did_you_mean(ctx['tag'], tags)}"
    elif kind == "union_tag_not_found":
        text = f"{key} needs the key {ctx['discriminator']} that says which kind it is"
    else:
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        # What a validator of the program says of a table names the field itself.
        of_table = isinstance(first["input"], dict) and kind == "value_error"
        named = key if of_table else f"{key} = {shortened(repr(first['input']), 80)}"
        text = f"{named}: {message}" if key and not message.startswith(f"{key}.") else message
        if kind == "literal_error":
            text += did_you_mean(str(first["input"]), re.findall(r"'([^']*)'", ctx["expected"]))
    if any(key == given or key.startswith(f"{given}.") for given in overridden):
        place = f"{place} with --set {key}"
    more = f" (and {len(others)} more mistake{'s' if len(others) > 1 else ''})" if others else ""
    return f"{place}: {text}{more}"


def _dotted(loc: tuple[int | str, ...], data: object, *, missing: bool) -> str:
    # pydantic's location also names union members ("loss.madpo.tau"); a key is what the file has.
    parts: list[str] = []
    here: Any = data
    for position, part in enumerate(loc):
        if isinstance(here, dict) and part in here:
            here = here[part]
        elif isinstance(here, list | tuple) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        elif not (missing and position == len(loc) - 1):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _known_fields(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    candidates = [model]
    for part in loc[:-1]:
        inside = [
            m for c in candidates if part in c.model_fields for m in _models(c.model_fields[str(part)].annotation)
        ]
        kinds = {c: [f.annotation for f in c.model_fields.values()] for c in candidates}
        tags = {c: [tag for k in kinds[c] if get_origin(k) is Literal for tag in get_args(k)] for c in candidates}
        tagged = [c for c in candidates if part in (c.__name__, *tags[c])]
        candidates = inside or tagged or candidates
    return sorted({name for c in candidates for name in c.model_fields})


def _models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and get_origin(annotation) is None:
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def packaged_experiments() -> list[str]:
    """Names of the experiments that come with madpo."""
    folder = files("madpo.study") / "experiments"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def find_experiment(name_or_path: str) -> Path:
    """The TOML file of a packaged experiment's name or of a path.

    Raises ConfigError: neither a name nor a file; with the nearest name.
    """
    names = packaged_experiments()
    if name_or_path in names:
        return Path(str(files("madpo.study") / "experiments" / f"{name_or_path}.toml"))
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return path
    hint = did_you_mean(name_or_path, names) or f"; packaged are {', '.join(names)}"
    raise ConfigError(f"{name_or_path!r} is neither a packaged experiment nor a TOML file{hint}")
