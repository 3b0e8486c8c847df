"""A run of another process, which holds a folder until the block ends."""

import contextlib
import subprocess
import sys

HOLD = """
import sys, time
from pathlib import Path
from madpo.core.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def another_process_in(folder, system=""):
    """The process; ``system`` is code that it runs first."""
    command = [sys.executable, "-c", system + HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
