"""Processes that take turns: each contender lives in its own, so that memory, allocator and caches are its own.

A worker answers one JSON line per request. The parent asks one worker at a time; the others wait and use no core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Worker:
    """One contender: ``python script --worker SPEC``, asked through its standard input."""

    def __init__(self, script: str, spec: dict[str, Any]) -> None:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [sys.executable, script, "--worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, request: str, **arguments: Any) -> Any:
        """The worker's answer to one request."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([request, arguments]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line[7:])
        raise SystemExit(f"a worker ended before it answered {request!r}")

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(requests: dict[str, Callable[..., Any]]) -> None:
    """Answer requests until the parent closes the pipe."""
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print("answer " + json.dumps(requests[name](**arguments)), flush=True)


def resident(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit("memory figures need Linux")


def forget_peak() -> None:
    """Let ``VmHWM`` start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    raise SystemExit("workers.py is the benchmarks' common part; run train_step.py, generation.py or growth.py")
