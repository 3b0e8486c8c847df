"""What a person sees while work is done: bars with the time left, and lines of plain words.

On a terminal a live bar; elsewhere (a log file, a job queue) a plain line at most every 15 seconds. Work that
ends within two seconds shows nothing. Everything goes to standard error, so that standard output stays data.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

if TYPE_CHECKING:
    from rich.progress import Progress

from madpo.core import processes
from madpo.core.errors import StorageError, printable

T = TypeVar("T")

SHOW_AFTER = 2.0  # seconds of work before anything is shown
LINE_EVERY = 15.0  # seconds between two plain lines, over all bars together

_lock = threading.RLock()
_live: "Progress | None" = None
_last_line = float("-inf")


Advance = Callable[..., None]
"""Called after every finished part, or several with numbers to show: ``advance(8, loss=0.61)``."""


def track(iterable: Iterable[T], *, description: str) -> Iterator[T]:
    """Go through ``iterable`` with a bar."""
    with bar(description, len(iterable) if isinstance(iterable, Sized) else None) as advance:
        for item in iterable:
            yield item
            advance()


@contextmanager
def bar(description: str, total: int | None) -> Iterator[Advance]:
    """A bar over ``total`` parts (None: unknown). Yields the function that advances it; no-op on all ranks but 0."""
    if not processes.is_main_process():
        yield lambda n=1, **fields: None
        return
    with _live_bar(description, total) if _on_terminal() else _plain_bar(description, total) as advance:
        yield advance


def say(text: str) -> None:
    """One line of plain words, above a live bar if there is one. No-op on all ranks but 0."""
    if not processes.is_main_process():
        return
    with _lock:
        if _live is not None:
            _live.console.print(_shown(text), markup=False, highlight=False, soft_wrap=True)
        else:
            show(text, sys.stderr)


def hint(text: str) -> None:
    """A line for a person who waits at a terminal, of no use in a log; once a process."""
    if _on_terminal():
        say_once(text)


def show(text: str, stream: TextIO | None = None) -> None:
    """Print lines on standard output, or on another stream. All output to a terminal goes through here or :func:`say`.

    Names, messages and texts of others may hold control characters, which a terminal obeys; they are shown as escapes,
    and so is what the stream's encoding lacks. A standard error that can no longer be written (a terminal that was
    closed, a log on a full disk) ends no work.

    Raises:
        StorageError: standard output cannot be written.
        BrokenPipeError: its reader has gone.
    """
    stream = stream or sys.stdout
    coding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(_shown(text).encode(coding, "backslashreplace").decode(coding), file=stream, flush=True)
    except OSError as error:
        if stream is sys.stdout and isinstance(error, BrokenPipeError):
            raise
        with suppress(OSError):  # else the interpreter tries once more at its end, and complains
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout:
            raise StorageError(
                f"standard output cannot be written ({error.strerror}); redirect it to another file (results in "
                "folders are kept)"
            ) from error


def _shown(text: str) -> str:
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


@cache
def say_once(text: str) -> None:
    """:func:`say`, but an equal line only once in a process: a search loads one model many times."""
    say(text)


LIBRARIES = 0.6e9
"""Bytes of a process that has loaded its libraries; the context of a GPU is about as large."""


def memory_text(size: float) -> str:
    """``12.3 GB``, ``4.5 MB``."""
    from pydantic import ByteSize  # madpo --help does without it

    return ByteSize(size).human_readable(decimal=True, separator=" ")


def duration(seconds: float) -> str:
    """``0.4 s``, ``41 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes < 2 * 1440 else f"{minutes / 1440:.0f} days"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _on_terminal() -> bool:
    # Worker processes share the terminal with their parent: two live displays would overwrite each other.
    return sys.stderr.isatty() and os.environ.get("MADPO_PROGRESS") != "plain" and os.environ.get("TERM") != "dumb"


@contextmanager
def _live_bar(description: str, total: int | None) -> Iterator[Advance]:
    global _live
    with _lock:
        outermost = _live is None
        if _live is None:
            _live = _new_display()
            _live.start()
        display = _live
        task = display.add_task(printable(description), total=total, note="")

    def advance(n: int = 1, **fields: object) -> None:
        display.update(task, advance=n, note=_note(fields))

    try:
        yield advance
    finally:
        with _lock:
            display.remove_task(task)
            if outermost:
                display.stop()
                _live = None


class _Lasting:
    """A stream that takes what can no longer be written, as :func:`show` does."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def _new_display() -> "Progress":
    # Imported here: rich costs a tenth of a second, and most processes never show a bar.
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Display(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table([t for t in self.tasks if (t.elapsed or 0.0) >= SHOW_AFTER])

    return Display(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(file=cast(TextIO, _Lasting(sys.stderr))),
        transient=True,
    )


@contextmanager
def _plain_bar(description: str, total: int | None) -> Iterator[Advance]:
    started = time.monotonic()
    done = 0

    def advance(n: int = 1, **fields: object) -> None:
        global _last_line
        nonlocal done
        done += n
        with _lock:
            now = time.monotonic()
            if now - started < SHOW_AFTER or now - _last_line < LINE_EVERY:
                return
            _last_line = now
        parts = [f"{done}/{total}" if total else f"{done}"]
        if total and 0 < done < total:
            parts.append(f"about {duration((now - started) * (total - done) / done)} left")
        if fields:
            parts.append(_note(fields))
        say(f"  {description}: {', '.join(parts)}")

    yield advance


def _note(fields: dict[str, object]) -> str:
    return printable(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items()))
