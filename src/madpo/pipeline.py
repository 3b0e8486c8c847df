"""Steps, their identity, and running them: nothing twice, nothing stale, nothing half-done.

A step is a plain function with a configuration and upstream steps; building one runs nothing. Its identity is
what bears on the result (operation, resolved configuration, inputs, library versions), never where or how it
runs. Each identity has its own folder, and ``record.json``, written last and atomically, is what makes a result
exist. This file knows nothing of machine learning.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from madpo.config import did_you_mean, identity_settings
from madpo.errors import ConfigError, MadpoError, StorageError
from madpo.executors import Executor, Inline
from madpo.locks import locked
from madpo.memory import memory_errors
from madpo.operation import operation_name
from madpo.progress import duration, say
from madpo.records import Estimate, Metric, Metrics, Record, conditions, libraries, load_record, plain_metrics
from madpo.storage import now, storage_errors, write_atomically
from madpo.uploads import Upload

__all__ = [
    "Estimate",
    "Metric",
    "Metrics",
    "Planned",
    "Record",
    "RunResult",
    "StageFn",
    "Step",
    "finished",
    "libraries",
    "load_record",
    "ordered",
    "plan",
    "run",
]

StageFn = Callable[[Any, Mapping[str, Path], Path], Metrics]

_LESS_MEMORY = "use a smaller batch size, or run fewer steps at once (--jobs), and run the same command again"
AGAIN = "to run again"
_NAME = re.compile(r"[A-Za-z0-9_.+=-]+(/[A-Za-z0-9_.+=-]+)*")


@dataclass(frozen=True, eq=False)
class Step:
    """One unit of work: ``fn(config, inputs, out) -> metrics``.

    Attributes:
        name: readable and unique, the path of its folder ("policy/high/madpo/seed0").
        fn: a module-level function decorated with :func:`madpo.operation.operation`; it reads ``config`` and its
            inputs' folders and writes only into ``out``.
        config: every literal that bears on the result, the seed included.
        inputs: role -> upstream step.
        says: plain words for the person who watches; outside the identity.
        groups: names that ``only`` can choose the step by; outside the identity.
        light: it needs a core and no accelerator; outside the identity.
    """

    name: str
    fn: StageFn
    config: BaseModel
    inputs: Mapping[str, "Step"] = field(default_factory=dict)
    says: str = ""
    groups: tuple[str, ...] = ()
    light: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or ".." in self.name.split("/"):
            raise ValueError(f"step name {self.name!r}: letters, digits and _.+=- between slashes only")
        if "<" in self.fn.__qualname__:
            raise ValueError(f"step {self.name}: {self.fn.__qualname__} must be a function at module level")
        operation_name(self.fn)

    @property
    def operation(self) -> str:
        """The stable name of the function, with its version: "train_policy/1"."""
        return operation_name(self.fn)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration as it enters the identity; see :func:`madpo.config.identity_settings`."""
        _refuse_paths(self.config.model_dump(), self.name)
        return identity_settings(self.config)

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of everything that bears on the result."""
        parts = {
            "operation": self.operation,
            "config": self.settings,
            "inputs": {role: step.identity for role, step in self.inputs.items()},
            "libraries": libraries(),
        }
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def folder(self, root: Path) -> Path:
        """Where the step works."""
        return root / f"{self.name}-{self.identity[:8]}"


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
    record = load_record(step.folder(root))
    return record if record is not None and record.identity == step.identity else None


def ordered(steps: Iterable[Step]) -> list[Step]:
    """All steps with their upstreams, upstreams first, otherwise in the given order; each name once.

    Raises:
        ConfigError: two different steps have one name.
    """
    order: dict[str, Step] = {}

    def visit(step: Step) -> None:
        known = order.get(step.name)
        if known is not None:
            if known.identity != step.identity:
                raise ConfigError(f"two different steps are both called {step.name!r}; give each its own name")
            return
        for upstream in step.inputs.values():
            visit(upstream)
        order.setdefault(step.name, step)

    for step in steps:
        visit(step)
    return list(order.values())


def needed_by(chosen: Iterable[Step], steps: Iterable[Step]) -> list[Step]:
    """Of ``steps``, those that are chosen and their upstreams, in the order that they have there."""
    names = {step.name for step in ordered(chosen)}
    return [step for step in steps if step.name in names]


def plan(steps: Iterable[Step], root: Path) -> list[Planned]:
    """What a run would do with every step. Writes nothing.

    A step of an export has its record and little more. It is done as long as no step that is to run reads its files.
    """
    order = ordered(steps)
    records = {step.name: finished(step, root) for step in order}
    status = {step.name: "done" if records[step.name] else _status(step, root) for step in order}
    for step in reversed(order):
        if status[step.name] != "done":
            for upstream in step.inputs.values():
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
) -> RunResult:
    """Bring every step to a finished record; what is finished already is left alone.

    Args:
        steps: the graph's steps; upstream steps come along by themselves.
        root: the folder of the run.
        executor: where steps run; Inline by default.
        only: groups ("core"), patterns on step names ("policy/high/*") or on both ("ablation/policy/low/*"); their
            upstream steps are included. Empty is everything.
        dry_run: say what would run, and write nothing.
        about: what the run is (title, experiment), kept in ``run.json`` beside the list of its steps.
        upload: where finished steps are copied to as well, those that were finished before among them.

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
    with storage_errors(root), locked(root):
        listing = {
            s.name: {
                "folder": str(s.folder(root).relative_to(root)),
                "identity": s.identity,
                "groups": list(s.groups),
            }
            for s in everything
        }
        write_atomically(root / "run.json", json.dumps({"about": dict(about or {}), "steps": listing}, indent=1))
        # The plan was made before the lock; another run may have finished steps since.
        result.plan = plan(chosen, root)
        _run_all(result, executor or Inline(), upload)
    # In the graph's order, whichever step happened to finish first.
    result.records = {p.step.name: result.records[p.step.name] for p in result.plan if p.step.name in result.records}
    return result


def _run_all(result: RunResult, executor: Executor, upload: Upload | None) -> None:
    running: dict[Future[Any], Step] = {}
    first_mistake: list[MadpoError] = []
    steps = [p.step for p in result.plan]
    waiting = [p.step for p in result.plan if not _already_done(p, result)]
    for step in steps:
        if upload is not None and step.name in result.records:
            upload.step(step.name, step.folder(result.root), result.root)
    if not waiting:
        say(f"All {len(steps)} steps are done already in {result.root}; nothing to run.")
        return
    if result.done:
        say(f"{len(result.done)} of {len(steps)} steps are done already; {len(waiting)} to run.")
    if again := sum(p.status.startswith(AGAIN) for p in result.plan):
        say(f"{again} of these were done before, but their files stayed behind when the run was exported.")
    total = len(steps)

    def collect(block: bool) -> None:
        finished_now = wait(running, timeout=None if block else 0, return_when=FIRST_COMPLETED).done
        for future in finished_now:
            step = running.pop(future)
            _take(step, future, result, total, first_mistake)
            if upload is not None and step.name in result.records:
                upload.step(step.name, step.folder(result.root), result.root)

    def has_room() -> bool:
        # No step is queued behind busy workers: whoever is free takes the first of the graph's order that is ready, so
        # one seed is whole before the next, and a step is not said to start before it does.
        return executor.slots is None or len(running) < executor.slots

    try:
        while waiting or running:
            for step in list(waiting):
                blocker = next((u.name for u in step.inputs.values() if u.name in result.failed | result.skipped), None)
                if blocker is not None:
                    result.skipped[step.name] = result.skipped.get(blocker, blocker)
                    waiting.remove(step)
                elif has_room() and all(u.name in result.records for u in step.inputs.values()):
                    say(f"{step.name}: {step.says or 'starts'}")
                    running[executor.submit(_work, _job(step, result.root), light=step.light)] = step
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


def _take(step: Step, future: Future[Any], result: RunResult, total: int, first_mistake: list[MadpoError]) -> None:
    error = future.exception()
    if error is None:
        outcome = future.result()
        if isinstance(outcome, Record):
            result.records[step.name] = outcome
            result.ran.append(step.name)
            say(f"{step.name}: done in {duration(outcome.seconds)} ({len(result.records)} of {total})")
            return
        sentence, mistake = outcome
        if mistake is not None:
            first_mistake.append(mistake)
    else:
        sentence = f"its worker process ended unexpectedly ({error or type(error).__name__}); was memory enough?"
    result.failed[step.name] = sentence
    say(f"{step.name}: FAILED: {sentence}")


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
    for word in only:
        found = [step for step in steps if _answers_to(step, word)]
        if not found:
            names = list(dict.fromkeys([*(group for step in steps for group in step.groups), *(s.name for s in steps)]))
            hint = did_you_mean(word, names) or f"; there are {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
            raise ConfigError(f"--only {word!r} matches none of the {len(steps)} steps{hint}")
        chosen += found
    return needed_by(chosen, steps)


def _answers_to(step: Step, word: str) -> bool:
    names = [step.name, *step.groups, *(f"{group}/{step.name}" for group in step.groups)]
    return any(fnmatch.fnmatchcase(name, word) for name in names)


def _status(step: Step, root: Path) -> str:
    """Of a step that is not finished: what has changed since one of its name was, if one was."""
    own = step.folder(root)
    others = own.parent.glob(f"{own.name[:-8]}[0-9a-f]*/record.json") if own.parent.is_dir() else []
    records = [(path.stat().st_mtime, path.parent) for path in others if path.parent != own]
    for _, folder in sorted(records, reverse=True):
        old = load_record(folder)
        if old is not None and old.name == step.name and old.identity != step.identity:
            return f"stale: {_what_changed(old, step)}"
    return "to run"


def _what_changed(old: Record, step: Step) -> str:
    if old.operation != step.operation:
        return f"the operation is {step.operation}, was {old.operation}"
    key = _first_difference(old.config, step.settings)
    if key is not None:
        return key
    inputs = {role: upstream.identity for role, upstream in step.inputs.items()}
    for role in sorted(inputs.keys() | old.inputs.keys()):
        if inputs.get(role) != old.inputs.get(role):
            upstream = step.inputs.get(role)
            return f"its input {role} changed{f' ({upstream.name})' if upstream else ''}"
    for name, found in libraries().items():
        if old.libraries.get(name) != found:
            return f"{name} is {found}, was {old.libraries.get(name)}"
    return "its identity changed"


def _first_difference(old: Any, new: Any, key: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*new, *(k for k in old if k not in new)]:
            path = f"{key}.{name}" if key else name
            if name not in old or name not in new:
                return f"{path} is {'new' if name in new else 'gone'}"
            found = _first_difference(old[name], new[name], path)
            if found:
                return found
        return None
    return None if old == new else f"{key} is {new!r}, was {old!r}"


def _refuse_paths(value: object, name: str, key: str = "config") -> None:
    if isinstance(value, os.PathLike):
        raise TypeError(f"step {name}: {key} is a path, and paths bear no identity: exclude it and add a digest")
    if isinstance(value, Mapping):
        for inner, item in value.items():
            _refuse_paths(item, name, f"{key}.{inner}")
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _refuse_paths(item, name, key)


class _Job(NamedTuple):
    """What travels to the worker: a step without its graph."""

    root: Path
    name: str
    fn: StageFn
    config: BaseModel
    inputs: dict[str, Path]
    out: Path
    record: dict[str, Any]


def _job(step: Step, root: Path) -> _Job:
    record = {
        "name": step.name,
        "identity": step.identity,
        "operation": step.operation,
        "config": step.settings,
        "inputs": {role: upstream.identity for role, upstream in step.inputs.items()},
        "libraries": libraries(),
    }
    # Absolute, since a worker may start in another directory.
    inputs = {role: upstream.folder(root.absolute()) for role, upstream in step.inputs.items()}
    return _Job(root.absolute(), step.name, step.fn, step.config, inputs, step.folder(root.absolute()), record)


def _work(job: _Job) -> Record | tuple[str, MadpoError | None]:
    """Runs where the executor puts it. Returns the record, or one sentence and the user's mistake behind it."""
    started, clock = now(), time.perf_counter()
    try:
        if not (job.root / "run.json").exists():
            raise StorageError(
                f"{job.root} is not to be seen on {socket.gethostname()}; every node must see the run's folder there"
            )
        with storage_errors(job.out), memory_errors(_LESS_MEMORY):
            job.out.mkdir(parents=True, exist_ok=True)
            metrics = plain_metrics(job.fn(job.config, job.inputs, job.out), job.name)
            provenance = {
                "seconds": round(time.perf_counter() - clock, 3),
                "peak_memory": _peak_memory(),
                "host": socket.gethostname(),
                "started": started,
                "madpo": version("madpo"),
                "argv": sys.argv,
                **conditions(),
            }
            record = Record(**job.record, metrics=metrics, threads=_threads(), provenance=provenance)
            (job.out / "error.txt").unlink(missing_ok=True)
            write_atomically(job.out / "record.json", record.model_dump_json(indent=1) + "\n")
            return record
    except MadpoError as error:
        _keep_traceback(job.out)
        return str(error), error
    except Exception as error:
        _keep_traceback(job.out)
        first_line = (str(error).splitlines() or ["no message"])[0]
        return f"{type(error).__name__}: {first_line} (traceback: {job.out / 'error.txt'})", None


def _keep_traceback(out: Path) -> None:
    # On a full or read-only disk this fails too; the sentence still reaches the person.
    with contextlib.suppress(OSError):
        (out / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")


def _peak_memory() -> int | None:
    """Bytes that this process has held at most so far, earlier steps in it included; None on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _threads() -> int:
    torch = sys.modules.get("torch")  # asked only where the step has loaded it
    if torch is not None:
        return int(torch.get_num_threads())
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
