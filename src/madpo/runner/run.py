"""Running a graph of steps: nothing twice, nothing stale, nothing half-done.

Each identity has its own folder, and ``record.json`` in it, moved there last, is what makes a result exist. This file
knows nothing of machine learning.
"""

import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from madpo.core.errors import ConfigError, MadpoError, StorageError
from madpo.core.locks import locked
from madpo.core.progress import duration, say
from madpo.core.storage import storage_errors, write_atomically
from madpo.core.suggestions import did_you_mean
from madpo.runner.executors import Executor, Inline
from madpo.runner.folder import UNFINISHED, what_changed
from madpo.runner.record import RECORD, Record, exported_records, find_record, load_record
from madpo.runner.step import Step, needed_by, ordered
from madpo.runner.uploads import Upload
from madpo.runner.work import attempt, job

_LESS_MEMORY = "use a smaller batch size, or run fewer steps at once (--jobs), and run the same command again"
AGAIN = "to run again"
_REPLACED = (RECORD, UNFINISHED, "report.html", "report.json", "results.json", "results.md", "tables", "figures")
"""What a result of a command holds, and what the report of a run would replace."""


class Planned(NamedTuple):
    """A step and what a run would do with it: "done", "to run", "to run again: <why>" or "stale: <what changed>"."""

    step: Step
    status: str


@dataclass
class RunResult:
    """What a run did.

    Attributes:
        root: the folder of the run.
        plan: every step of the graph with its status before the run.
        records: finished records by step name.
        done: steps that were finished before; ran: steps finished now.
        failed: step -> what went wrong, one sentence; skipped: step -> the failed step it waits for.
        not_uploaded: step, or "report" -> why the store does not have it.
        graph: every step of the graph, chosen or not.
    """

    root: Path
    plan: list[Planned]
    records: dict[str, Record] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    not_uploaded: dict[str, str] = field(default_factory=dict)
    graph: list[Step] = field(default_factory=list)


def finished(step: Step, root: Path) -> Record | None:
    """The step's record, if it is finished."""
    record = find_record(step.folder(root), root)
    return record if record is not None and record.identity == step.identity else None


def plan(steps: Iterable[Step], root: Path) -> list[Planned]:
    """What a run would do with every step. Writes nothing.

    A step of an export has its record and little more. It is done as long as no step that is to run reads its files.
    """
    order = ordered(steps)
    records = {step.name: finished(step, root) for step in order}
    status = {step.name: "done" if records[step.name] else _status(step, root) for step in order}
    for step in reversed(order):
        if status[step.name] != "done":
            for upstream in step.upstream.values():
                record = records[upstream.name]
                if status[upstream.name] == "done" and record is not None and record.stripped:
                    status[upstream.name] = f"{AGAIN}: {step.name} reads its files, which the export left out"
    return [Planned(step, status[step.name]) for step in order]


def run(
    steps: Iterable[Step],
    root: Path,
    executor: Executor | None = None,
    *,
    only: Sequence[str] = (),
    dry_run: bool = False,
    about: Mapping[str, Any] | None = None,
    upload: Upload | None = None,
    on_finished: Callable[[Record], None] | None = None,
) -> RunResult:
    """Bring every step to a finished record; what is finished already is kept.

    Args:
        steps: the graph's steps; upstream steps come along by themselves.
        root: the folder of the run.
        executor: where steps run; Inline by default.
        only: groups ("core"), patterns on step names ("policy/high/*") or on both ("ablation/policy/low/*"); their
            upstream steps are included. Empty is everything.
        dry_run: say what would run, and write nothing.
        about: what the run is (title, experiment), kept in ``run.json`` with the list of its steps.
        upload: where finished steps are copied to as well, those that were finished before among them.
        on_finished: called in this process with the record of every step that this run finishes.

    Raises:
        ConfigError: ``only`` matches no step, or two steps share a name.
        StorageError: the folder cannot be written, or another run holds it.
        MadpoError: the first step that failed by a mistake in its input, if no step could be finished.
    """
    everything = ordered(steps)
    chosen = _matching(everything, only) if only else everything
    result = RunResult(root, plan(chosen, root), graph=everything)
    if dry_run:
        for planned in result.plan:
            _already_done(planned, result)
        return result
    _refuse_foreign(root)
    with storage_errors(root), locked(root):
        listing = {
            s.name: {"folder": f"{s.folder(root).relative_to(root)}", "identity": s.identity, "groups": list(s.groups)}
            for s in everything
        }
        write_atomically(root / "run.json", json.dumps({"about": dict(about or {}), "steps": listing}, indent=1))
        # The plan was made before the lock; another run may have finished steps since.
        result.plan = plan(chosen, root)
        _run_all(result, executor or Inline(), upload, on_finished)
    # In the graph's order, whichever step happened to finish first.
    result.records = {p.step.name: result.records[p.step.name] for p in result.plan if p.step.name in result.records}
    return result


def _refuse_foreign(root: Path) -> None:
    """Refuse a folder that is no run's and holds what a run's report would replace (StorageError)."""
    if not (root / "run.json").is_file() and (found := [name for name in _REPLACED if (root / name).exists()]):
        raise StorageError(f"{root} holds {found[0]!r} and is no folder of a run; choose another --output_dir")


def _run_all(
    result: RunResult, executor: Executor, upload: Upload | None, on_finished: Callable[[Record], None] | None
) -> None:
    running: dict[Future[Any], Step] = {}
    first_mistake: list[MadpoError] = []
    steps = [p.step for p in result.plan]
    waiting = [p.step for p in result.plan if not _already_done(p, result)]
    for step in steps:
        _hand_on(step, result, upload)
    _announce(result, len(waiting))
    if not waiting:
        return

    def collect(block: bool) -> None:
        for future in wait(running, timeout=None if block else 0, return_when=FIRST_COMPLETED).done:
            step, error = running.pop(future), future.exception()
            died = f"the worker process died ({error or type(error).__name__}); it may have run out of memory"
            outcome = future.result() if error is None else (died, None)
            if isinstance(outcome, Record):
                result.records[step.name] = outcome
                result.ran.append(step.name)
                say(f"{step.name}: done in {duration(outcome.seconds)} ({len(result.records)} of {len(steps)})")
            else:
                result.failed[step.name], mistake = outcome
                first_mistake.extend([] if mistake is None else [mistake])
                say(f"{step.name}: FAILED: {outcome[0]}")
            _hand_on(step, result, upload)
            if on_finished is not None and step.name in result.records:
                on_finished(result.records[step.name])

    try:
        while waiting or running:
            for step in list(waiting):
                upstream = [u.name for u in step.upstream.values()]
                blocker = next((name for name in upstream if name in result.failed | result.skipped), None)
                if blocker is not None:
                    result.skipped[step.name] = result.skipped.get(blocker, blocker)
                    waiting.remove(step)
                # No step is queued behind busy workers: a free worker takes the first of the graph's order that is
                # ready, so one seed is whole before the next, and a step is announced only when it starts.
                elif (executor.slots or math.inf) > len(running) and result.records.keys() >= set(upstream):
                    say(f"{step.name}: {step.says or 'starts'}")
                    work = job(step, step.folder(result.root), result.root, _LESS_MEMORY)
                    running[executor.submit(attempt, work, result.root.absolute(), light=step.light)] = step
                    waiting.remove(step)
                    collect(block=False)
            if running:
                collect(block=True)
    except BaseException:
        for future in running:
            future.cancel()
        raise
    if first_mistake and not result.ran:
        raise first_mistake[0]


def _announce(result: RunResult, waiting: int) -> None:
    steps = len(result.plan)
    if not waiting:
        say(f"All {steps} steps are done already in {result.root}; nothing to run.")
        return
    if result.done:
        say(f"{len(result.done)} of {steps} steps are done already; {waiting} to run.")
    if again := sum(p.status.startswith(AGAIN) for p in result.plan):
        say(f"{again} of these were done before, but their files stayed behind when the run was exported.")


def _hand_on(step: Step, result: RunResult, upload: Upload | None) -> None:
    if upload is not None and step.name in result.records:
        upload.step(step.name, step.folder(result.root), result.root)


def _already_done(planned: Planned, result: RunResult) -> bool:
    record = finished(planned.step, result.root) if planned.status == "done" else None
    if record is None:
        return False
    result.records[planned.step.name] = record
    result.done.append(planned.step.name)
    return True


def _matching(steps: list[Step], only: Sequence[str]) -> list[Step]:
    """The steps that ``only`` names and what they need, in the graph's order.

    The order is that of a whole run: a tier's reward model, which MADPO waits for longest, begins before the methods
    that need none, so that workers do not wait for it at the end.
    """
    chosen: list[Step] = []
    names_of = {s: [s.name, *s.groups, *(f"{group}/{s.name}" for group in s.groups)] for s in steps}
    for word in only:
        found = [step for step in steps if fnmatch.filter(names_of[step], word)]
        if not found:
            names = list(dict.fromkeys([*(group for step in steps for group in step.groups), *(s.name for s in steps)]))
            hint = did_you_mean(word, names) or f"; there are {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
            raise ConfigError(f"--only {word!r} matches none of the {len(steps)} steps{hint}")
        chosen += found
    return needed_by(chosen, steps)


def _status(step: Step, root: Path) -> str:
    """The status of a step that is not finished: what has changed since a step of its name was finished, if one was."""
    own = step.folder(root)
    others = own.parent.glob(f"{own.name[:-8]}[0-9a-f]*/{RECORD}") if own.parent.is_dir() else []
    folders = [(path.stat().st_mtime, path.parent) for path in others if path.parent != own]
    found = [load_record(folder) for _, folder in sorted(folders, reverse=True)]
    for old in [*found, *exported_records(root).values()]:
        if old is not None and old.name == step.name and old.identity != step.identity:
            names = {role: upstream.name for role, upstream in step.upstream.items()}
            return f"stale: {what_changed(old.model_dump(), step.decisive, names) or 'its identity changed'}"
    return "to run"
