"""Errors that a user can act on.

Each is a ``ValueError`` whose text is one sentence that names what is wrong, where, the value found, and
the remedy. The command line prints that sentence and exits with status 2; programming errors stay ordinary
exceptions with a traceback.
"""


class MadpoError(ValueError):
    """A mistake in what the user gave us: one sentence with the place, the value and the remedy."""


class ConfigError(MadpoError):
    """A configuration that cannot run: an unknown key, a value out of range, a field that the loss replaces."""


class DataError(MadpoError):
    """A data set that cannot be used: a missing column, a row with a bad value, a corrupted file."""


class DivergedError(DataError):
    """A training whose numbers stopped being finite: other settings may not."""


class StorageError(MadpoError):
    """A folder that cannot be written, a full disk, or a folder that another run holds."""


class MemoryShortage(MadpoError):
    """Work that needs more memory than there is; the sentence says which setting makes it smaller."""


def first_line(error: BaseException, length: int | None = None) -> str:
    """What an error says first, at most ``length`` characters of it; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:length]
