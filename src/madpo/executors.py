"""Where a step runs. An executor knows futures and nothing of steps.

The shape is that of ``concurrent.futures``: ``submit`` takes a function and its arguments and gives a future.
A cluster executor is one more class with that method.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from types import TracebackType
from typing import Protocol, Self, TypeVar

from madpo.errors import ConfigError

R = TypeVar("R")


class Executor(Protocol):
    """Anything that runs a function somewhere and gives a future of its result."""

    def submit(self, fn: Callable[..., R], /, *args: object) -> Future[R]:
        """Start ``fn(*args)``. The function and its arguments must be picklable for anything but Inline."""
        ...


class Inline:
    """In this process, at once: ``submit`` returns when the work is done."""

    def submit(self, fn: Callable[..., R], /, *args: object) -> Future[R]:
        """Run ``fn(*args)`` now. An exception is kept in the future; an interrupt passes through."""
        future: Future[R] = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Processes:
    """``n`` worker processes on this machine, started afresh (spawn), since a forked torch can hang.

    The machine's cores are shared out among the workers unless OMP_NUM_THREADS is set already. Workers end
    with their parent, even if it is killed: an orphan would write into a folder that the next run continues.
    """

    def __init__(self, n: int) -> None:
        if n < 1:
            raise ConfigError(f"{n} worker processes: must be at least 1")
        self.n = n
        self._context = multiprocessing.get_context("spawn")
        self._stop = self._context.Event()
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        threads = max(1, (os.cpu_count() or 1) // self.n)
        return ProcessPoolExecutor(
            self.n, mp_context=self._context, initializer=_start_worker, initargs=(self._stop, threads)
        )

    def submit(self, fn: Callable[..., R], /, *args: object) -> Future[R]:
        """Queue ``fn(*args)``. After a worker died (out of memory), a new pool takes over."""
        try:
            return self._pool.submit(fn, *args)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = self._new_pool()
            return self._pool.submit(fn, *args)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(stop: Event, threads: int) -> None:
    # The terminal sends its interrupt to every process; a worker then ends without a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["MADPO_PROGRESS"] = "plain"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    def leave_when_stopped() -> None:
        stop.wait()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    threading.Thread(target=leave_when_stopped, daemon=True).start()
