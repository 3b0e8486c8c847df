"""Processes that take turns: each contender lives in its own, so that memory, allocator and caches are its own.

A worker answers one JSON line per request. The parent asks one worker at a time; the others wait and use no core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}


class Worker:
    """One contender: ``python script --worker SPEC``, asked through its standard input."""

    def __init__(self, script: str, spec: dict[str, Any], **variables: str) -> None:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore",
            **variables,
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


def held() -> float:
    """Memory that is held now, on the GPU where there is one, else resident; MiB."""
    import torch

    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else resident("VmRSS")


def forget_peak() -> None:
    """Let the peak of memory start again from what is held now."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def ready(trainer: Any) -> Any:
    """A trainer of transformers that can take single steps, silent."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = trainer.model
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def timed_step(trainer: Any, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """(loss, seconds) of a training step on these rows; collating them is not counted."""
    import torch

    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    count = torch.tensor(len(rows), device=trainer.accelerator.device)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = trainer.training_step(trainer.model, inputs, count)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return float(value), time.perf_counter() - start


def memory_above(loaded: float) -> float:
    """Most memory held since :func:`forget_peak`, less what was :func:`held` with only the model; MiB."""
    import torch

    most = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident("VmHWM")
    return most - loaded


def same_losses(script: str, base: dict[str, Any], **arguments: Any) -> float:
    """Relative gap between the float32 losses of "ours" and "trl" in two steps; SystemExit where it is large."""
    import torch

    losses = {}
    base = {**base, "batch": min(base["batch"], 2)}  # float32 steps are slow, and two pairs tell as much as eight
    for name in ("ours", "trl"):
        worker = Worker(script, {**base, "name": name, "dtype": "float32"})
        losses[name] = [worker.ask("step", index=i, **arguments)[0] for i in range(2)]
        worker.close()
    gap = max(abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["trl"], strict=True))
    print(
        f"float32 losses of two steps: ours {losses['ours']}, TRL {losses['trl']}, relative gap {gap:.1e}", flush=True
    )
    if gap > TOLERANCE["cuda" if torch.cuda.is_available() else "cpu"]:
        raise SystemExit("the losses differ: nothing is timed")
    return gap


def step_options(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark of training steps asks: model, tokens, batch, repeats, and where its JSON goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--prompt", type=int, default=20)
    parser.add_argument("--completion", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what commands use on this machine")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def step_spec(options: argparse.Namespace) -> dict[str, Any]:
    """What a worker of either contender is given."""
    from madpo.models.load import compute_dtype

    dtype = options.dtype or str(compute_dtype()).removeprefix("torch.")
    found = {key: getattr(options, key) for key in ("model", "prompt", "completion", "batch")}
    return found | {"batches": 2, "dtype": dtype}


def show_steps(seconds: dict[str, list[float]], memory: dict[str, float], batch: int) -> None:
    """A line for every contender."""
    for name, values in seconds.items():
        spread = f"steps of {min(values):.2f} to {max(values):.2f} s"
        print(f"  {name:12} {batch / statistics.median(values):6.2f} pairs/s ({spread}), {memory[name]:6.0f} MiB")


def show_ratio(seconds: dict[str, list[float]], memory: dict[str, float]) -> float:
    """Median of the ratios of steps that were taken in one turn, TRL's over ours."""
    ratio = statistics.median(t / o for t, o in zip(seconds["trl"], seconds["ours"], strict=True))
    print(f"  ours / TRL {ratio:.2f} x, memory above the model 1 / {memory['trl'] / memory['ours']:.1f}")
    return ratio


def write_steps(options: argparse.Namespace, **result: Any) -> None:
    """The run's JSON, where one was asked for."""
    if options.json:
        given = {key: value for key, value in vars(options).items() if key not in ("json", "worker")}
        whole = {"options": given, "machine": platform.processor() or platform.machine(), **result}
        options.json.write_text(json.dumps(whole, indent=1), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(
        "workers.py is the benchmarks' common part; run train_step.py, reward_step.py, generation.py or growth.py"
    )
