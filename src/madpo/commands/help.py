"""The help of a command: every field of its configuration, with what its docstring says, and its default."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from functools import partial

from pydantic_core import PydanticUndefined

from madpo.commands.from_settings import CommandLine, sentence


def help_text(line: CommandLine, says: str, function: Callable[..., int]) -> str:
    """What ``madpo COMMAND --help`` prints.

    Args:
        says: what the command does.
        function: its docstring has what the help ends with.
    """
    positional = [option for option in line.options if option.cli.positional]
    usage = " ".join([line.command, *(option.key.upper() for option in positional), "[--OPTION VALUE ...]"])
    parser = argparse.ArgumentParser(
        line.command,
        usage=usage,
        description=f"{says[0].upper()}{says[1:]}.",
        epilog=(inspect.getdoc(function) or "").partition("\n\n")[2],
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32),
        add_help=False,
        allow_abbrev=False,
    )
    groups = {"": parser.add_argument_group("options")}
    for option in line.options:
        if ".columns." in option.key:
            continue  # of a step inside the command, which reads as the command does
        if option.table not in groups:
            groups[option.table] = parser.add_argument_group(option.table)
        if option.default is ... and not option.about:
            continue  # a key of a free table, which lists it
        short = [name for name in option.shorter if "." not in name and line.names.get(name) == option.key]
        names = [*short, option.key] if "." in option.key else [option.key, *short]
        first, *others = [option.key.upper()] if option.cli.positional else names
        about = " ".join(
            [
                sentence(option.about),
                *(["By NAME: " + ", ".join(option.cli.keys) + "."] if option.cli.keys else []),
                *([f"Also {', '.join(f'--{name}' for name in others)}."] if others else []),
                *([f"({_default(option.default)})"] if option.default is not ... else []),
            ]
        )
        keys = option.free and option.default is not None  # else it is given as a whole
        name = first if option.cli.positional else f"--{first}{'.NAME' if keys else ''}"
        metavar = None if option.cli.positional else f"[{option.metavar}]" if option.flag else option.metavar
        groups[option.table].add_argument(name, help=about.replace("%", "%%"), metavar=metavar)
    return parser.format_help().rstrip()


def _default(value: object) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or value in ((), {}, ""):
        return "default: none"
    if isinstance(value, bool):
        return f"default: {str(value).lower()}"
    return f"default: {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
