"""Options of the commands on a user's own data: each stands for a key of a configuration, which a TOML may hold too.

An option given on the command line goes before ``--config FILE.toml``, and ``--set key=value`` before both. What a
command takes beside its configuration (``output_dir``, ``eval_data`` and the like) may stand in the same file.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from madpo.core.errors import ConfigError
from madpo.core.storage import expanded, stays_inside

if TYPE_CHECKING:
    from madpo.core.config import Frozen

    T = TypeVar("T", bound=Frozen)

DATA = "a .jsonl, .json, .csv or .parquet file, or a hub data set OWNER/NAME[:SPLIT]"

# Command -> prefixes of options that stand for a key: `--loss.tau 7` is `--set loss.tau=7`.
DOTTED = {
    "reward": ("optimisation", "lora"),
    "score": ("reward",),
    "train": ("loss", "args", "lora"),
    "tune": ("loss", "args", "lora", "space", "reward"),
}
_KEY = "key:"

# Keys that must be there -> the option that gives them.
_SPELLED = {
    "model": "model_name_or_path",
    "reward.model": "model_name_or_path",
    "output_dir": "output_dir",
    "corpus": "corpus",
    "prompts_data": "prompts",
    "reward_model": "reward",
    "reward.reward_model": "reward_model",
    "reward.kl": "kl",
}


def spelled_out(argv: Sequence[str]) -> list[str]:
    """The words of a command line with ``--loss.tau 7`` and ``--loss.tau=7`` written as ``--set=loss.tau=7``.

    Raises:
        ConfigError: such an option has no value.
    """
    prefixes = tuple(f"--{prefix}." for prefix in DOTTED.get(argv[0] if argv else "", ()))
    words, found = iter(argv), []
    for word in words:
        if not prefixes or not word.startswith(prefixes):
            found.append(word)
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ConfigError(f"the option --{key} has no value; write --{key} VALUE")
        found.append(f"--set={key}={value}")
    return found


def option(parser: argparse.ArgumentParser, name: str, key: str, text: str, *others: str, **rest: Any) -> None:
    """An option in both spellings (a_b and a-b); its value goes to ``key`` of the configuration."""
    spelled = [spelling for n in (name, *others) for spelling in (f"--{n}", f"--{n.replace('_', '-')}")]
    rest.setdefault("default", None)
    if "action" not in rest:
        rest.setdefault("metavar", name.split("_")[-1].upper())
    parser.add_argument(*dict.fromkeys(spelled), dest=_KEY + key, help=text, **rest)


def _refuse_foreign_places(config: Path, typed: set[str]) -> None:
    """Refuse a file that would have a command write elsewhere, or replace something: it may be somebody else's.

    Args:
        typed: keys that the command line gives, which take precedence over the file.

    Raises:
        ConfigError: naming the key and the option.
    """
    from madpo.core.config import read_toml

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


def from_file(parser: argparse.ArgumentParser) -> None:
    """``--config`` and ``--set``."""
    says = "settings; options given here go before it"
    parser.add_argument("--config", type=expanded, metavar="FILE.toml", help=says)
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change a setting"
    )


def example(parser: argparse.ArgumentParser, command: str, *more: str) -> None:
    """What ``--help`` ends with."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n\n".join((*more, f"example:\n  {command}"))


def asked(arguments: argparse.Namespace, model: type[T], **beside: Any) -> tuple[dict[str, Any], T]:
    """(what the command takes beside its configuration, the configuration).

    Args:
        model: the configuration's class.
        beside: name -> (type, default) of what the command takes beside it; ``...`` as default makes it required.

    Raises:
        ConfigError: one sentence with the file (or "the command line"), the key, the value and the remedy.
        StorageError: ``overwrite`` would remove the file of ``--config``.
    """
    from pydantic import create_model

    from madpo.core.config import load_config

    # Notices from one library about another's names say nothing to the person who runs a command.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")
    options = {
        name.removeprefix(_KEY): value
        for name, value in vars(arguments).items()
        if name.startswith(_KEY) and value is not None
    }
    if arguments.config is not None:
        _refuse_foreign_places(arguments.config, {*options, *(text.partition("=")[0] for text in arguments.overrides)})
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in options.items()]
    both: type[T] = create_model(model.__name__, __base__=model, **beside)
    nothing = Path(os.devnull)
    try:
        found = load_config(arguments.config or nothing, both, [*overrides, *arguments.overrides])
    except ConfigError as error:
        text = str(error).replace(str(nothing), "the command line", 1)
        for key, word in _SPELLED.items():
            text = text.replace(f"the key '{key}' is missing; add it", f"the key '{key}' is missing; add --{word}")
        raise ConfigError(text) from None
    taken = {name: getattr(found, name) for name in beside}
    taken = {name: expanded(value) if isinstance(value, Path) else value for name, value in taken.items()}
    return taken, model.model_validate({name: getattr(found, name) for name in model.model_fields})
