"""The processes of one launch (``accelerate launch``, ``torchrun``): who leads, what one tells all, shared errors.

Alone, every function here does its work in place and loads nothing. In a launch, values travel as JSON in tensors, so
that no object is unpickled; all processes must call the same functions in the same order.
"""

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

from madpo.core import errors
from madpo.core.errors import MadpoError


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a cluster's scheduler sends before it kills. It ends a command as Ctrl-C does."""


T = TypeVar("T")
_TOLD = "madpo/told"


def end_in_order() -> None:
    """Make SIGTERM raise :class:`Terminated` in this process, which must be outside a launch to do so.

    In a launch, a process may wait inside a library for one that has ended. The launcher ends it by this signal, and
    Python would see that only when the library returns.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
        raise Terminated

    if count() == 1:
        signal.signal(signal.SIGTERM, terminate)


def count() -> int:
    """Processes of this launch; 1 outside one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK") or 0) if count() > 1 else 0


def leads() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def everyone(value: Any) -> list[Any]:
    """A plain value of each process, in their order."""
    if count() == 1:
        return [value]
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather

    device = PartialState(cpu=not torch.accelerator.is_available()).device
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    longest = int(gather(torch.tensor([len(text)], device=device)).max())
    padded = torch.full((1, longest), ord(" "), dtype=torch.uint8, device=device)
    padded[0, : len(text)] = text
    return [json.loads(bytes(row.tolist())) for row in gather(padded).cpu()]


def first(work: Callable[[], T]) -> T:
    """What ``work`` gives on the leading process (a plain value), known to all; the others wait.

    Raises:
        MadpoError: the leading process's, on all of them.
    """
    if count() == 1:
        return work()
    value, error = None, None
    if leads():
        try:
            value = work()
        except MadpoError as found:
            error = found
    told, failed = everyone([value, _plain(error)])[0]
    _raise(error, [failed])
    return told  # type: ignore[no-any-return]


def together(work: Callable[[], T]) -> T:
    """What ``work`` gives here, once it has ended everywhere.

    Raises:
        MadpoError: this process's own, or else that of another.
    """
    value, error = None, None
    try:
        value = work()
    except MadpoError as found:
        error = found
    _raise(error, everyone(_plain(error)))
    return value  # type: ignore[return-value]


def _plain(error: MadpoError | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, str(error)]


def _raise(own: MadpoError | None, fates: list[list[str] | None]) -> None:
    if own is not None:
        raise own
    for fate in fates:
        if fate is not None:
            raise getattr(errors, fate[0], MadpoError)(fate[1])


# One sentence for all: a mistake is often met by every process at once, and one process's end breaks the others'
# connections, which must not bury the reason under tracebacks. The launcher keeps a store that outlives them.


def first_to_tell() -> bool:
    """Whether this process is the one that says what went wrong; asked once, by each that knows."""
    store = _store()
    return leads() if store is None else bool(store.add(_key(), 1) == 1)


def told() -> bool:
    """Whether another process of the launch has said what went wrong."""
    store = _store()
    return store is not None and bool(store.add(_key(), 0) > 0)


def _key() -> str:
    return f"{_TOLD}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store() -> Any:
    if count() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from datetime import timedelta

    import torch.distributed as dist

    with suppress(RuntimeError, OSError):  # the launcher itself has gone
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=10))  # type: ignore[attr-defined]
    return None
