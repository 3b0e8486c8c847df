"""Two processes against one: the same trajectory, columns and scores, and one sentence when something is wrong."""

import json
import os
import re
import socket
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

import launch_cases
from madpo.losses import Loss
from madpo.models import build_tiny, load_tokenizer
from madpo.practice import scoring
from practice_cases import read, text_pairs, write

TESTS = Path(__file__).parent


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(*words, cache, cwd, processes=2, timeout=280):
    """``torchrun`` on this machine; the launcher that ``accelerate launch`` calls as well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MADPO_CACHE": str(cache)}
    where = ("--nproc-per-node", processes, "--master-addr", "127.0.0.1", "--master-port", free_port())
    command = [sys.executable, "-m", "torch.distributed.run", *where, *words]
    return subprocess.run(
        list(map(str, command)),
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_tiny("llama", tmp_path_factory.mktemp("models") / "llama", seed=1)


def prepare(root, llama):
    """Pairs of text, and a reward model with a random head."""
    root.mkdir()
    write(root / "pairs.jsonl", text_pairs(29))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, dtype=torch.float32)
    model.save_pretrained(root / "reward")
    load_tokenizer(llama).save_pretrained(root / "reward")
    return root


@pytest.fixture(scope="module")
def both(llama, tmp_path_factory):
    """(one process's folder and results, two processes' folder, their results, what the launcher said)."""
    root = tmp_path_factory.mktemp("both")
    one, two = prepare(root / "one", llama), prepare(root / "two", llama)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MADPO_CACHE", str(one / "cache"))
        patch.setattr(scoring, "PART", launch_cases.PART)
        alone = {"columns": launch_cases.columns(llama, one)}
        alone["trajectories"] = launch_cases.trajectories(llama, one, 1)
        patch.chdir(one)
        assert launch_cases.score(Path(), "scored") == 0
        # An interrupted run of which the second part is there, with values that only it can have.
        patch.chdir(two)
        patch.setattr(scoring, "_finish", lambda *args: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception):
            launch_cases.score(Path(), "continued")
        for path in (two / "continued" / "parts").iterdir():
            if path.name.endswith("08.safetensors"):
                save_file({side: values + 100 for side, values in load_file(path).items()}, path)
            else:
                path.unlink()
    done = launch(TESTS / "launch_cases.py", llama, ".", cache=two / "cache", cwd=two)
    assert (two / "1.json").exists(), done.stderr[-4000:]
    return one, alone, two, [json.loads((two / f"{rank}.json").read_text()) for rank in range(2)], done


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
    one, two, other = (found["trajectories"][name] for found in (both[1], *both[3]))
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


def test_reference_columns_have_the_bytes_of_one_process(both):
    one, alone, two, found, _ = both
    assert found[0]["columns"] == found[1]["columns"] == alone["columns"]
    (first,), (second,) = (list((root / "cache" / "columns").iterdir()) for root in (one, two))
    assert first.name == second.name, "a column made by two processes serves one, and the other way round"
    assert first.read_bytes() == second.read_bytes()


def test_scores_have_the_bytes_of_one_process(both):
    one, _, two, _, done = both
    for name in ("scored.jsonl", "report.json", "settings.json"):
        assert (one / "scored" / name).read_bytes() == (two / "scored" / name).read_bytes(), name
    assert sorted(p.name for p in (two / "scored").iterdir()) == [
        ".lock",
        "report.json",
        "scored.jsonl",
        "settings.json",
    ]
    said = done.stdout.splitlines()
    assert sum("pairs scored" in line for line in said) == 3, "scored, continued, and the report of what is complete"
    assert done.stderr.count("scored is complete; nothing to do") == 1


def test_scoring_continues_from_the_parts_that_are_there(both):
    one, _, two, _, _ = both
    shift = [100.0 if 8 <= i < 16 else 0.0 for i in range(29)]
    for a, b, more in zip(
        read(one / "scored" / "scored.jsonl"), read(two / "continued" / "scored.jsonl"), shift, strict=True
    ):
        assert b["chosen_score"] == a["chosen_score"] + more
        assert b["rejected_score"] == a["rejected_score"] + more


def test_a_mistake_that_one_process_meets_ends_all_with_one_sentence(both):
    *_, done = both
    assert done.returncode == 1, "the launcher's, which lists its processes' own"
    sentences = [line for line in done.stderr.splitlines() if line.startswith("madpo: ")]
    assert sentences == [
        "madpo: the reward of pair 8 is not finite; the reward model has diverged, train it with a lower learning rate"
    ]
    assert "RuntimeError" not in done.stderr
    assert set(re.findall(r"exitcode *: (-?[0-9]+)", done.stderr)) <= {"2", "-15"}
