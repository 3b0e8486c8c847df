"""Processes of one launch (``accelerate launch``, ``torchrun``): rank 0, gathering, broadcasting, shared errors.

In a single process, every function here works in place and loads nothing. In a launch, values travel as JSON in
tensors, so that no object is unpickled; all processes must call the same functions in the same order.
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
_REPORTED = "madpo/reported"


def end_in_order() -> None:
    """Make SIGTERM raise :class:`Terminated` in this process, which must be outside a launch to do so.

    In a launch, a process may wait inside a library for one that has ended. The launcher ends it by this signal, and
    Python would see that only when the library returns.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
        raise Terminated

    if world_size() == 1:
        signal.signal(signal.SIGTERM, terminate)


def world_size() -> int:
    """Processes of this launch; 1 outside one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return rank() == 0


def all_gather_object(value: Any) -> list[Any]:
    """A plain value of each process, in their order."""
    if world_size() == 1:
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


def on_main_process(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and broadcast what it returns (a plain value); the others wait.

    Raises MadpoError: that of rank 0, on all ranks.
    """
    if world_size() == 1:
        return work()
    return all_gather_object(on_every_process(lambda: work() if is_main_process() else None))[0]  # type: ignore[no-any-return]


def on_every_process(work: Callable[[], T]) -> T:
    """Run ``work`` on every rank, and return this rank's result once all have ended.

    Raises MadpoError: this rank's own, or else that of another.
    """
    value, error = None, None
    try:
        value = work()
    except MadpoError as found:
        error = found
    fates = all_gather_object(None if error is None else [type(error).__name__, str(error)])
    if error is not None:
        raise error
    for name, sentence in filter(None, fates):
        raise getattr(errors, name, MadpoError)(sentence)
    return value  # type: ignore[return-value]


# One sentence for all: a mistake is often met by every process at once, and one process's end breaks the others'
# connections, which must not bury the reason under tracebacks. The launcher keeps a store that outlives them.


def may_report_error() -> bool:
    """Whether this process is the first to report an error; each process that has one asks once."""
    store = _store()
    return is_main_process() if store is None else bool(store.add(_key(), 1) == 1)


def error_was_reported() -> bool:
    """Whether another process of the launch has reported an error."""
    store = _store()
    return store is not None and bool(store.add(_key(), 0) > 0)


def _key() -> str:
    return f"{_REPORTED}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store() -> Any:
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from datetime import timedelta

    import torch.distributed as dist

    with suppress(RuntimeError, OSError):  # the launcher itself has gone
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=10))  # type: ignore[attr-defined]
    return None
