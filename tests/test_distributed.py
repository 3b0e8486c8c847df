"""Two processes against one: the same trajectory, columns and scores, and one sentence when something is wrong."""

import json
import os
import socket
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

import launch_cases
from madpo.losses import Loss
from madpo.models import build_tiny

TESTS = Path(__file__).parent


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(*words, cache, processes=2, timeout=280):
    """``torchrun`` on this machine; the launcher that ``accelerate launch`` calls as well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MADPO_CACHE": str(cache)}
    where = ("--nproc-per-node", processes, "--master-addr", "127.0.0.1", "--master-port", free_port())
    command = [sys.executable, "-m", "torch.distributed.run", *where, *words]
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_tiny("llama", tmp_path_factory.mktemp("models") / "llama", seed=1)


@pytest.fixture(scope="module")
def both(llama, tmp_path_factory):
    """(one process, rank 0 of two, rank 1 of two), everything that `launch_cases.trajectories` gives."""
    root = tmp_path_factory.mktemp("both")
    done = launch(TESTS / "launch_cases.py", llama, root, cache=root / "cache")
    assert done.returncode == 0, done.stderr[-4000:]
    two = [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]
    return launch_cases.trajectories(llama, root, 1), *two


def test_every_loss_of_the_union_is_among_the_cases():
    kinds = {
        typing.get_args(member.model_fields["kind"].annotation)[0]
        for member in typing.get_args(typing.get_args(Loss)[0])
    }
    assert {loss.kind for loss, _ in launch_cases.cases().values()} == kinds
    assert len(kinds) == 14


@pytest.mark.parametrize("name", launch_cases.cases())
def test_two_processes_follow_one_step_for_step(both, name):
    """Losses, gradient norms, logged means, running statistics and final weights; the last step has 5 of 8 pairs."""
    one, two, other = (found[name] for found in both)
    losses = [[row["loss"] for row in run["rows"] if "loss" in row] for run in (one, two)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-6)
    residual = np.subtract(*losses) / np.abs(losses[0])  # a factor that is missing shifts every step the same way
    assert abs(residual.mean()) < 2e-6
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"total_flos"}:  # which counts the repeated pairs' work
            assert b[key] == pytest.approx(a[key], rel=5e-5, abs=2e-5), key
    assert two["evaluation"] == pytest.approx(one["evaluation"], rel=5e-5, abs=2e-5)
    assert two["state"] == pytest.approx(one["state"], rel=1e-5, abs=1e-6)
    for key, values in one["weights"].items():
        np.testing.assert_allclose(two["weights"][key], values, rtol=0, atol=3e-5, err_msg=key)
    assert two["weights"] == other["weights"], "the processes hold the same weights, bit for bit"
    assert two["state"] == other["state"]
