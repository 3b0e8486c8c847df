"""Programs as forks of a process that has loaded the libraries: they start in hundredths of a second, not in five.

The process is the fork server of :mod:`multiprocessing`. It runs no test and starts no thread, so a fork of it is as
good as a new interpreter: own environment, folder, standard streams and process group, and signals that are real.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from madpo.commands.cli import main

LIMIT = 60
"""Units of :func:`unit` that a program may take. Its purpose is that a program that hangs fails its test."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["libraries"])


class Ended(NamedTuple):
    """How a program ended: its exit status (negative: the signal), standard output and standard error."""

    status: int | None
    out: str
    err: str


@functools.cache
def unit() -> float:
    """Seconds that this machine, as busy as it is, takes to load the libraries; 4 to 5 on an idle one."""
    began = time.monotonic()
    process = _context.Process(target=_check)
    with pytest.MonkeyPatch.context() as patch:  # the server looks for them as a new interpreter does
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        process.start()  # returns when it has loaded them
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def _check() -> None:
    assert "libraries" in sys.modules, "the fork server has failed to import tests/cases/libraries.py"


class Program:
    """A function in a process of its own."""

    def __init__(
        self, work: Callable[..., Any], arguments: tuple[Any, ...], place: Path, folder: Path, env: Mapping[str, str]
    ) -> None:
        self._limit = LIMIT * unit()
        self._out, self._err = place / "stdout", place / "stderr"
        self._process = _context.Process(
            target=_enter, args=(work, arguments, str(folder), dict(env), str(self._out), str(self._err))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The process id, which is that of its group as well."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def err(self) -> str:
        """Standard error so far."""
        return self._err.read_text() if self._err.exists() else ""

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()

    def kill(self, how: int = signal.SIGKILL) -> None:
        """Send a signal to the program and to every process that it has started."""
        os.killpg(self.pid, how)

    def end(self) -> Ended:
        """Wait for its end."""
        self._process.join(self._limit)
        if self.running():
            self.kill()
            raise AssertionError(f"the program has not ended in {self._limit:.0f} s; {self.err[-4000:]}")
        out, err = (path.read_text() if path.exists() else "" for path in (self._out, self._err))
        return Ended(self._process.exitcode, out, err)


def command_line(*words: str) -> None:
    """``madpo WORD ...``, as its script does it."""
    sys.argv = ["madpo", *words]
    raise SystemExit(main())


def _enter(
    work: Callable[..., Any], arguments: tuple[Any, ...], folder: str, env: dict[str, str], out: str, err: str
) -> None:
    gc.freeze()  # as conftest.py does
    gc.enable()
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for path, stream in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, stream)
        os.close(opened)
    work(*arguments)
