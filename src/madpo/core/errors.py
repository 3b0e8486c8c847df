"""Errors that a user can act on.

Each is a ``ValueError`` whose text is one sentence that names what is wrong, where, the value found, and
the remedy. The command line prints that sentence and exits with status 2; programming errors stay ordinary
exceptions with a traceback.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def printable(text: str) -> str:
    """Text with everything that a terminal would obey, or could not show, as an escape (``\\x1b``).

    For one line: line ends are escaped too. Text of data, file names and other libraries' messages may hold anything.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class MadpoError(ValueError):
    """A mistake in what the user gave us: one sentence with the place, the value and the remedy."""

    placed = True
    """False: the sentence does not say yet where the mistake is; see :func:`located`."""

    def __init__(self, sentence: str = "") -> None:
        super().__init__(printable(sentence))


class ConfigError(MadpoError):
    """A configuration that cannot run: an unknown key, a value out of range, a field that the loss replaces."""


class DataError(MadpoError):
    """A data set that cannot be used: a missing column, a row with a bad value, a corrupted file."""


class RowError(DataError):
    """A mistake in a row, found by code that does not know which row it reads; see :func:`located`."""

    placed = False


class DivergedError(DataError):
    """A training whose numbers stopped being finite: other settings may not."""


class StorageError(MadpoError):
    """A folder that cannot be written, a full disk, or a folder that another run holds."""


class MemoryShortage(MadpoError):
    """Work that needs more memory than there is; the sentence says which setting makes it smaller."""


@contextmanager
def located(place: str) -> Iterator[None]:
    """Where a row is read: its mistakes begin with its place, as in ``pairs.jsonl, line 7: chosen is null; ...``.

    What parses a row raises :class:`RowError` without a place, and the code that knows the place gives it
    once, here. An error that has its place passes unchanged.
    """
    try:
        yield
    except MadpoError as error:
        if not error.placed:
            error.args, error.placed = (f"{printable(place)}: {error}",), True
        raise


def first_line(error: BaseException, length: int | None = None) -> str:
    """What an error says first, at most ``length`` characters of it; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:length]


def shortened(text: str, most: int) -> str:
    """At most ``most`` characters of a text; "..." shows that it goes on."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(items: Sequence[object], most: int) -> str:
    """The first of several things, and how many more there are, for a sentence."""
    shown, more = ", ".join(map(str, items[:most])), len(items) - most
    return f"{shown} and {more} more" if more > 0 else shown


# How the allocators of torch (CPU, CUDA), C++ and the system word it; torch's errors have no type of their own on CPU.
_WORDS = (
    *("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc", "cannot allocate memory"),
    *("could not create a primitive", "could not create a memory"),  # oneDNN, whose scratch space found no room
)


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turn the many forms of running out of memory into a MemoryShortage; other errors pass through.

    Args:
        remedy: what makes the work smaller; the sentence ends with it.
    """
    try:
        yield
    except MadpoError:
        raise
    except Exception as error:
        if not is_shortage(error):
            raise
        said = str(error).partition("\n")[0].strip()[:160]
        raise MemoryShortage(f"the memory is used up{f' ({said})' if said else ''}; {remedy}") from error


def is_shortage(error: BaseException) -> bool:
    """Whether an error, or the one that it was raised from, is a shortage of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS):
        return True
    return error.__cause__ is not None and is_shortage(error.__cause__)
