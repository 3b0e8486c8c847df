"""Running out of memory, reported in one sentence with the setting that makes the work smaller."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from madpo.core.errors import MadpoError, MemoryShortage

# How the allocators of torch (CPU, CUDA), C++ and the system word it; torch's errors have no type of their own on CPU.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc", "cannot allocate memory")


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
