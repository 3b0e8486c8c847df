"""Where a step runs. An executor knows futures and nothing of steps.

The shape is that of ``concurrent.futures``: ``submit`` takes a function and its arguments and gives a future.
``light`` work needs a core and no accelerator; executors on one machine make no difference.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing.synchronize import Event
from typing import Any, Protocol, Self, TypeVar

from madpo.core.errors import ConfigError, first_line

R = TypeVar("R")


class Executor(Protocol):
    """Anything that runs a function somewhere and gives a future of its result.

    Attributes:
        slots: functions that run at once; None where only the executor knows. What is submitted beyond that waits.
    """

    slots: int | None

    def submit(self, fn: Callable[..., R], /, *args: object, light: bool = False) -> Future[R]:
        """Start ``fn(*args)``. The function and its arguments must be picklable for anything but Inline."""
        ...


class Inline(AbstractContextManager["Inline"]):
    """In this process, at once: ``submit`` returns when the work is done."""

    slots: int | None = 1

    def submit(self, fn: Callable[..., R], /, *args: object, light: bool = False) -> Future[R]:
        """Run ``fn(*args)`` now. An exception is kept in the future; an interrupt passes through."""
        future: Future[R] = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        return None


class Processes(AbstractContextManager["Processes"]):
    """``n`` worker processes on this machine, started afresh (spawn), since a forked torch can hang.

    The machine's cores are shared out among the workers unless OMP_NUM_THREADS is set already. Workers end
    with their parent, even if it is killed: an orphan would write into a folder that the next run continues.
    """

    def __init__(self, n: int) -> None:
        if n < 1:
            raise ConfigError(f"{n} worker processes: must be at least 1")
        self.slots: int | None = n
        self._threads = max(1, (os.cpu_count() or 1) // n)
        self._context = multiprocessing.get_context("spawn")
        self._stop = self._context.Event()
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.slots, mp_context=self._context, initializer=_start_worker, initargs=(self._stop, self._threads)
        )

    def submit(self, fn: Callable[..., R], /, *args: object, light: bool = False) -> Future[R]:
        """Queue ``fn(*args)``. After a worker died (out of memory), a new pool takes over."""
        try:
            return self._pool.submit(fn, *args)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = self._new_pool()
            return self._pool.submit(fn, *args)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


class Cluster:
    """Tasks on a Ray cluster. A task whose worker or node is lost is started again, up to three times.

    The folder that tasks work in must lie at the same path on every node, and the package must be installed there.

    Args:
        address: of a running cluster ("auto", "ray://head:10001", "10.0.0.1:6379"); None starts one on this machine,
            which ends with this process.
        slots: tasks at once on a cluster that is started here.
        cpus, gpus: what a task asks for, unless it is light; fractions share an accelerator.

    Raises:
        ConfigError: there is no cluster at ``address``.
    """

    def __init__(self, address: str | None = None, *, slots: int = 1, cpus: float = 1, gpus: float = 0) -> None:
        if slots < 1 or cpus <= 0 or gpus < 0:
            raise ConfigError(f"{slots} slots, {cpus} cpus and {gpus} gpus a task: the first two must be above 0")
        self.slots: int | None = None if address else slots
        self.address, self.cpus, self.gpus = address, cpus, gpus
        self._own_cpus = math.ceil(slots * cpus)
        self._ray: Any = None

    def submit(self, fn: Callable[..., R], /, *args: object, light: bool = False) -> Future[R]:
        """Queue ``fn(*args)`` on the cluster."""
        task = self._ray.remote(max_retries=3, retry_exceptions=False)(fn)
        wants = {"num_cpus": 1, "num_gpus": 0} if light else {"num_cpus": self.cpus, "num_gpus": self.gpus}
        inner: Future[R] = task.options(**wants).remote(*args).future()
        outer: Future[R] = Future()

        def hand_on(done: Future[R]) -> None:
            if (error := done.exception()) is None:
                outer.set_result(done.result())
            else:  # Ray wraps what the task raised in an error of its own
                outer.set_exception(getattr(error, "cause", None) or error)

        inner.add_done_callback(hand_on)
        return outer

    def __enter__(self) -> Self:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray's own 15 lets any other process of the machine starve a cluster that somebody waits for.
        os.environ.setdefault("RAY_worker_niceness", "0")
        import ray

        # Ray sets these for a task where they are not set.
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        on_sigterm = signal.getsignal(signal.SIGTERM)
        own: dict[str, Any] = {"num_cpus": self._own_cpus, "include_dashboard": False}
        try:
            ray.init(
                address=self.address or "local",
                runtime_env={"env_vars": {**kept, "MADPO_PROGRESS": "plain"}},
                configure_logging=False,
                **({} if self.address else own),
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = first_line(error)
            raise ConfigError(f"no Ray cluster can be used at {self.address or 'this machine'} ({first})") from error
        if threading.current_thread() is threading.main_thread():  # where Ray sets a handler of its own
            signal.signal(signal.SIGTERM, on_sigterm)
        self._ray = ray
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ray.shutdown()


_KEPT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "PYTHONWARNINGS", "MADPO_REPORT_TO")


def _start_worker(stop: Event, threads: int) -> None:
    # The terminal sends its interrupt to every process; a worker then ends without a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["MADPO_PROGRESS"] = "plain"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_after(wait: Callable[[], object]) -> None:
        wait()
        os._exit(1)

    for wait in (parent.join, stop.wait):
        threading.Thread(target=leave_after, args=(wait,), daemon=True).start()
