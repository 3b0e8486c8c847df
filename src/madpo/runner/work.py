"""Making the result of one step: its function runs in the folder's ``unfinished`` and the record makes it exist."""

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from madpo.core import processes
from madpo.core.errors import MadpoError, StorageError, first_line, memory_errors
from madpo.core.locks import locked
from madpo.core.metrics import plain_metrics
from madpo.core.progress import say
from madpo.core.storage import expanded, now, stays_inside, storage_errors, write_atomically
from madpo.runner.folder import ERROR, UNFINISHED, abandon, clear, files_of, finish, prepare
from madpo.runner.record import Record, conditions, load_record
from madpo.runner.step import OperationFn, Step


class Job(NamedTuple):
    """What travels to the worker: a step without its graph."""

    name: str
    fn: OperationFn
    config: BaseModel
    inputs: dict[str, Path]
    out: Path
    identity: str
    decisive: dict[str, Any]
    memory: str
    """What to do when the memory is used up."""
    protected: tuple[Path, ...] = ()
    """Read as well, and never removed."""


def job(step: Step, out: Path, root: Path, memory: str) -> Job:
    """The job that makes ``step`` in the folder ``out`` of the run ``root``."""
    # Absolute, since a worker may start in another directory.
    inputs = {role: given.folder(root.absolute()) for role, given in step.inputs.items()}
    return Job(step.name, step.fn, step.config, inputs, out.absolute(), step.identity, step.decisive, memory)


def make(job: Job, *, overwrite: bool = False) -> tuple[Record, bool]:
    """Bring a job to its finished record, and say whether it was there before. The caller holds the lock of
    ``job.out``.

    In a launch of several processes all of them call this; the first one writes. Raises MadpoError: a mistake in the
    input, or the folder cannot be written. What the job left is then removed, unless it holds a checkpoint.
    """
    started, clock = now(), time.perf_counter()
    work = job.out / UNFINISHED

    def begin() -> dict[str, Any] | None:
        with storage_errors(job.out):
            found = prepare(job.out, job.decisive, overwrite=overwrite, inputs=[*job.inputs.values(), *job.protected])
        return None if found is None else found.model_dump(mode="json")

    if (done := processes.on_main_process(begin)) is not None:
        return Record.model_validate(done), True
    try:
        with storage_errors(work), memory_errors(job.memory):
            metrics = plain_metrics(job.fn(job.config, job.inputs, work), job.name)
    except Exception as error:
        # A process that was killed breaks the others' connections; what they made so far is still good.
        ours = processes.is_main_process() and (processes.world_size() == 1 or isinstance(error, MadpoError))
        if ours and (kept := abandon(job.out)) is not None:
            say(f"{job.out} is not finished; what it has is in {kept}, and the same command continues from there.")
        raise

    def end() -> dict[str, Any]:
        with storage_errors(work):
            provenance = {
                "seconds": round(time.perf_counter() - clock, 3),
                "peak_memory": _peak_memory(),
                "host": socket.gethostname(),
                "started": started,
                "madpo": version("madpo"),
                "argv": sys.argv,
                **conditions(),
                "files": files_of(work),
            }
            record = Record(
                name=job.name,
                identity=job.identity,
                **job.decisive,
                metrics=metrics,
                threads=_threads(),
                provenance=provenance,
            )
            finish(job.out, record)
        return record.model_dump(mode="json")

    return Record.model_validate(processes.on_main_process(end)), False


def run_step(
    step: Step, out: Path, *, memory: str, overwrite: bool = False, protected: Sequence[Path] = ()
) -> tuple[Record, bool]:
    """Make one step in a folder that the user names; see :func:`make`.

    Args:
        overwrite: replace an earlier result in ``out``; its files stay until the new one is finished.
        memory: what to do when the memory is used up, for the sentence.
        protected: further files and folders that the step reads, which must not be removed.

    Raises StorageError: another run writes into ``out``, or it holds something else.
    """
    out = expanded(out)
    there = out.exists()
    with contextlib.ExitStack() as stack:
        with storage_errors(out):
            processes.on_main_process(lambda: stack.enter_context(locked(out)))
        try:
            return make(job(step, out, out, memory)._replace(out=out, protected=tuple(protected)), overwrite=overwrite)
        finally:
            stack.close()
            if processes.is_main_process() and not there:
                with contextlib.suppress(OSError):  # something is in it, a result or a checkpoint
                    out.rmdir()


def attempt(job: Job, root: Path) -> Record | tuple[str, MadpoError | None]:
    """:func:`make` for a run of many steps: the record, or one sentence and the user's mistake behind it."""
    if not stays_inside(job.out, root):  # nothing is written there, not even a traceback
        refusal = StorageError(f"{job.out} leads out of the run's folder by a link; remove the link")
        return str(refusal), refusal
    try:
        if not (root / "run.json").exists():
            raise StorageError(
                f"{root} does not exist on {socket.gethostname()}: put the run's folder on a file system shared by all "
                "nodes"
            )
        job.out.mkdir(parents=True, exist_ok=True)
        old = load_record(job.out)
        if old is None:
            clear(job.out)
        return make(job, overwrite=old is not None and old.stripped)[0]
    except MadpoError as error:
        _keep_traceback(job.out)
        return str(error), error
    except Exception as error:
        _keep_traceback(job.out)
        message = first_line(error) or "no message"
        return f"{type(error).__name__}: {message} (traceback: {job.out / ERROR})", None


def _keep_traceback(out: Path) -> None:
    # On a full or read-only disk this fails too; the sentence still reaches the person.
    with contextlib.suppress(OSError, StorageError):
        write_atomically(out / ERROR, traceback.format_exc().encode("utf-8", "backslashreplace"))


def _peak_memory() -> int | None:
    """Bytes that this process has held at most so far, earlier steps in it included; None on Windows."""
    with contextlib.suppress(ModuleNotFoundError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def _threads() -> int:
    torch = sys.modules.get("torch")  # asked only where the step has loaded it
    if torch is not None:
        return int(torch.get_num_threads())
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
