"""``madpo run``, ``status`` and ``report``: experiments and the folders of their runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from madpo.commands.shared import DryRun
from madpo.core.config import Frozen, find_experiment
from madpo.core.errors import ConfigError, printable
from madpo.core.libraries import loading_libraries
from madpo.core.options import Cli
from madpo.core.progress import show

if TYPE_CHECKING:
    from madpo.runner.run import RunResult


class Graph(DryRun):
    """How a graph of steps is run."""

    only: tuple[str, ...] = ()
    """Only groups (core), or steps with such a name (policy/low/*), and what they need."""
    rate: tuple[str, ...] = ()
    """KIND=N: tokens of Gemma-3-270M a second, of the machine that --dry_run estimates for; KIND is sft, train, reward,
    score, judge or generate, and none is this machine."""
    pilot: Path | None = None
    """A run or an export from whose evaluations --dry_run says which difference this run could tell; none is what is
    finished of this run."""
    executor: Literal["local", "ray"] = "local"
    """Where steps run; local is this machine."""
    processes: Annotated[int, Cli(also=("jobs",))] = Field(default=1, ge=1)
    """Steps at once, each in a process of its own; without effect with --ray_address."""
    ray_address: str | None = None
    """HOST:PORT of a running Ray cluster; without it --executor ray starts one here."""
    step_cpus: float = Field(default=1.0, ge=0, lt=10_000)
    """Cores that a step asks Ray for."""
    step_gpus: float = Field(default=0.0, ge=0, lt=10_000)
    """Accelerators that a step asks Ray for."""
    upload: str | None = None
    """Copy finished steps, record last, and the report to a store (s3://..., file://...)."""

    def arguments(self) -> dict[str, Any]:
        """For the function that runs it."""
        from madpo.runner.executors import Cluster, Processes

        executor: Any = None
        if self.ray_address is not None and self.executor != "ray" and not self.dry_run:
            raise ConfigError(f"--ray_address {self.ray_address} needs --executor ray")
        if self.executor == "ray" and not self.dry_run:
            executor = Cluster(self.ray_address, slots=self.processes, cpus=self.step_cpus, gpus=self.step_gpus)
        elif self.processes > 1 and not self.dry_run:
            executor = Processes(self.processes)
        return {"only": list(self.only), "dry_run": self.dry_run, "executor": executor, "upload": self.upload}


class Run(Graph):
    experiment: Annotated[str, Cli(positional=True)]
    """A packaged experiment (quickstart, laptop, paper, summarize, smoke), or a TOML file."""
    output_dir: Path | None = None
    """Where results go; none is runs/NAME."""
    set: tuple[str, ...] = ()
    """KEY=VALUE: a setting of the experiment, for example policy.optimisation.learning_rate=1e-4."""
    report_to: tuple[str, ...] = ()
    """Trackers that are installed, such as tensorboard, trackio or wandb: every training is a run of them."""


def run(options: Run) -> int:
    """Run an experiment, or continue it, and write its report.

    Example:
        madpo run quickstart --dry_run
        madpo run laptop --set pairs.tiers='["low"]' --output_dir runs/low
    """
    output_dir = options.output_dir or Path("runs") / find_experiment(options.experiment).stem
    with loading_libraries():
        from madpo.study.experiment import run_experiment

    result = run_experiment(
        options.experiment,
        output_dir,
        overrides=[*options.set, *([f"report_to={json.dumps(options.report_to)}"] if options.report_to else [])],
        **options.arguments(),
    )
    return print_graph(result, options)


def print_graph(result: RunResult, options: Graph) -> int:
    """What a graph would run, or how it went and what its report says; the exit status."""
    if options.dry_run:
        with loading_libraries():
            from madpo.study.estimates import dry_run_lines, machine_of
            from madpo.study.power import detectable_lines

        detectable = detectable_lines(result.graph, result.root, options.pilot)
        show("\n".join([*dry_run_lines(result, machine_of(options.rate)), *detectable]))
        return 0
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
        _print_results(page)
    else:
        show(f"Results: {result.root.resolve()}")
    return 1 if result.failed or result.not_uploaded else 0


def _print_results(page: Path) -> None:
    results = page.parent / "results.json"  # an older page may be without it
    for sentences in json.loads(results.read_bytes()).get("summary", ()) if results.exists() else ():
        show(printable(sentences))
    show(f"Report: {page.resolve().as_uri()}")


class Folder(Frozen):
    folder: Annotated[Path, Cli(positional=True)]
    """The folder of a run."""


class Status(Folder):
    values: str | None = None
    """Key of a setting: compare the finished evaluations over all the values that it had in this folder."""


def status(options: Status) -> int:
    """Print which steps of a run are done."""
    from madpo.core.progress import duration
    from madpo.runner.record import run_status

    if options.values:
        return _values(options.folder, options.values)
    found = run_status(options.folder)
    width = max((len(name) for name in found.steps), default=0)
    for name, record in found.steps.items():
        state = f"done in {duration(record.seconds)}" if record else found.unfinished[name]
        show(f"{name:<{width}}  {state}")
    done = sum(record is not None for record in found.steps.values())
    active = f"a run is active ({found.holder})" if found.holder else "no run is active"
    show(f"{done} of {len(found.steps)} steps are done; {active}")
    return 0


def _values(folder: Path, key: str) -> int:
    from madpo.core.metrics import Estimate
    from madpo.report.numbers import write
    from madpo.runner.record import evaluations_by

    for value, name, record in evaluations_by(folder, key):
        found = {key: record.metrics.get(key) for key in ("oracle_reward", "kl")}
        words = [
            f"{key.replace('_', ' ')} {write(of if isinstance(of, Estimate | float) else None)}"
            for key, of in found.items()
        ]
        show(f"{value or 'any':<10}  {name}  {'  '.join(words)}")
    return 0


class Report(Folder):
    export: Path | None = None
    """Write the report, and what it is made from, into this small folder to commit: no weights, few texts."""


def report(options: Report) -> int:
    """Write the report page of a run again."""
    from madpo.report import export_report, rebuild_report

    page = export_report(options.folder, options.export) if options.export else rebuild_report(options.folder)
    _print_results(page)
    return 0
