"""What the doctor says holds on this machine."""

from importlib.metadata import version

import psutil
import torch

from madpo import __version__
from madpo.study import doctor
from madpo.study.estimates import TWO_CORES, Machine
from refusals import names


def test_every_line_is_of_this_machine(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MADPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_rate", lambda dtype: f"10 GFLOP/s in {dtype}")
    monkeypatch.setattr(doctor, "this_machine", lambda: Machine(TWO_CORES, "this machine"))
    found = {line.name: line.found for line in doctor.diagnose()}
    assert found["madpo"].startswith(f"{__version__}, Python 3.")
    assert f"torch {version('torch')}" in found["libraries"]
    assert "missing" not in found["libraries"]
    assert f"{psutil.virtual_memory().total / 1e9:.1f} GB" in found["memory"]
    names(found["cache"], tmp_path / "cache", "no models", "0 B")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert found["accelerator"].startswith("none")
        assert found["speed"].startswith("1.00 ")
        assert found["run quickstart"].startswith("about ")


def test_a_measured_rate_is_positive(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_SIDE", 64)
    rate, unit, *_ = doctor._rate(torch.float32).split()
    assert float(rate.replace(",", "")) >= 0
    assert unit == "GFLOP/s"
