"""``madpo`` as a program: what the process does with signals, around the command line."""

import os
import signal
import sys

from madpo.core import processes


def main() -> int:
    """Run the command line as the whole work of this process, and return its exit status."""
    # Libraries' own bars would tear ours; tqdm reads this when it is first imported. "0" brings them back.
    os.environ.setdefault("TQDM_DISABLE", "1")
    _complete_streams()
    try:
        processes.end_in_order()
        from madpo.commands.cli import main as command

        return command()
    except KeyboardInterrupt as interrupt:  # while the command line itself was being loaded
        return 143 if isinstance(interrupt, processes.Terminated) else 130
    finally:
        # All has been said: what still comes in, while libraries are taken down, ends the process without a traceback.
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


def _complete_streams() -> None:
    """Let standard streams that are closed (``2>&-``) lead nowhere.

    Else a file that is opened later gets their number, and what a library prints is written into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # the lowest free number is the closed one's
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


if __name__ == "__main__":
    raise SystemExit(main())
