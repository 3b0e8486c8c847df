"""Kill trainings at random points, start them again, and count whose bytes equal an undisturbed run's.

``make soak`` writes the counts to docs/reliability.md. The libraries are loaded once, and every run is a fork of that
process on one thread, so a kill costs a second and not ten. The tests use the same runs with kills at fixed steps.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sections import put_section

KINDS = ("sft", "sft_stopped", "reward_model", "dpo", "beta_dpo")
EVERY = 4  # optimiser steps between two checkpoints
SETTINGS = {"learning_rate": 5e-3, "epochs": 3, "batch_size": 8, "micro_batch_size": 4, "checkpoint_every": EVERY}
REAL = {"learning_rate": 1e-4, "epochs": 1, "batch_size": 2, "micro_batch_size": 1, "checkpoint_every": 2}
"""Of the packaged model: six steps of two short pairs."""


def prepare(root: Path, *, real: bool = False) -> None:
    """A model, a corpus' stand-in and labelled pairs with reference log-probabilities."""
    import pandas as pd

    from madpo.models.load import build_tiny, resolve_model

    pairs, heldout, texts = (12, 4, 12) if real else (44, 12, 40)
    if real:
        (root / "base").mkdir()
        (root / "base" / "model").symlink_to(resolve_model("gemma-3-270m"))
    else:
        build_tiny("llama", root / "base" / "model", seed=1)
    (root / "settings.json").write_text(json.dumps(REAL if real else SETTINGS))
    generator = np.random.default_rng(5)

    def ids(low: int, high: int) -> list[int]:
        return [int(i) for i in generator.integers(5, 200, generator.integers(low, high))]

    rows = [
        {
            "pair_id": 100 + i,
            "split": "train" if i < pairs else "heldout",
            "prompt_ids": ids(2, 6),
            "chosen_ids": ids(2, 9),
            "rejected_ids": ids(2, 9),
        }
        for i in range(pairs + heldout)
    ]
    (root / "pairs").mkdir()
    pd.DataFrame(rows).to_parquet(root / "pairs" / "pairs.parquet")
    train = [row["pair_id"] for row in rows if row["split"] == "train"]
    (root / "logps").mkdir()
    logps = {name: -20.0 - generator.random(len(train)) for name in ("ref_chosen_logps", "ref_rejected_logps")}
    pd.DataFrame({"pair_id": train, **logps}).to_parquet(root / "logps" / "reference.parquet")
    (root / "texts.json").write_text(json.dumps([" ".join(f"w{i}" for i in ids(4, 12)) for _ in range(texts)]))


def train(kind: str, root: Path, out: Path, changes: dict | None = None) -> None:
    """One stage of the study on the tiny model; LoRA dropout makes it depend on the random states."""
    from madpo.core.metrics import plain_metrics
    from madpo.losses import DPO, BetaDPO
    from madpo.models.hyperparameters import Optimisation
    from madpo.models.load import LoRA
    from madpo.operations import study_training as stages

    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads((root / "settings.json").read_text())
    optimisation = Optimisation(**{**settings, **(changes or {})})
    common = {"optimisation": optimisation, "lora": LoRA(rank=4, alpha=8, dropout=0.1), "seed": 3}
    inputs = {"pairs": root / "pairs", "reference": root / "base", "logps": root / "logps"}
    model = str(root / "base" / "model")
    if kind.startswith("sft"):
        texts = json.loads((root / "texts.json").read_text())
        stages.load_corpus = lambda corpus: corpus
        stages.sft_reviews = lambda corpus, count: {"text": texts[:count]}
        corpus = {"kind": "imdb-package"}  # never read
        common |= {"reviews": len(texts), "max_tokens": 16}
        if kind == "sft_stopped":
            stopping = {"texts": 4, "eval_every": 2, "patience": 3}
            common |= {"reviews": len(texts) - 4, "prompt_tokens": 3, "early_stopping": stopping}
        config = stages.SFTStage(model=model, corpus=corpus, **common)
        metrics = stages.train_sft(config, {}, out)
    elif kind == "reward_model":
        config = stages.RewardModelStage(model=model, eval_every=2, patience=6, **common)
        metrics = stages.train_reward_model(config, inputs, out)
    else:
        loss = DPO() if kind == "dpo" else BetaDPO(filter=True, keep=0.75)
        metrics = stages.train_policy(stages.PolicyStage(method=kind, loss=loss, **common), inputs, out)
    shutil.rmtree(out / "checkpoints")  # as the runner does with a finished step
    (out / "metrics.json").write_text(json.dumps(plain_metrics(metrics, kind), sort_keys=True))


def result(out: Path) -> dict[str, str]:
    """SHA-256 of everything that a stage leaves, logs and metrics included."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def fork(job) -> int:
    """Run ``job()`` in a fork of this process; returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        job()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a fork; negative is the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at_step(step: int, name: str = "") -> None:
    """From now on, end this process by SIGKILL when row ``step`` of a training with ``name`` in its path is logged."""
    from madpo.training import run

    real = run._Watch.on_log

    def on_log(self, args, state, control, logs, **kwargs):
        real(self, args, state, control, logs, **kwargs)
        if state.global_step >= step and name in str(self.path):
            os.kill(os.getpid(), signal.SIGKILL)

    run._Watch.on_log = on_log


def warm_up() -> None:
    """Load what every run needs, and start no thread that a fork would lose."""
    import torch

    import madpo.operations.study_training  # noqa: F401

    torch.set_num_threads(1)


def _rows(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _killed_and_again(kind: str, root: Path, out: Path, rows: int, delay: float) -> tuple[int, int]:
    """Kill ``delay`` seconds after ``rows`` rows are logged, then run to the end.

    Returns:
        The exit code of the first run, and the newest checkpoint's step when it was dead (0: none).
    """
    child = fork(lambda: train(kind, root, out))
    while _rows(out) < rows and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    first = wait(child)
    steps = [int(p.name.split("-")[1]) for p in (out / "checkpoints").glob("checkpoint-*")]
    second = wait(fork(lambda: train(kind, root, out)))
    if second:
        raise SystemExit(f"{kind}: the run after a kill {delay:.3f} s after row {rows} ended with status {second}")
    return first, max(steps, default=0)


def soak(root: Path, kinds: tuple[str, ...], kills: int, seed: int) -> list[dict]:
    """The counts, one row a kind."""
    generator, counts = np.random.default_rng(seed), []
    for kind in kinds:
        whole = root / "whole" / kind
        started = time.monotonic()
        assert wait(fork(lambda kind=kind, whole=whole: train(kind, root, whole))) == 0
        seconds, expected, logged = time.monotonic() - started, result(whole), _rows(whole)
        count = {"kind": kind, "trials": 0, "killed": 0, "resumed": 0, "equal": 0, "unequal": []}
        for _ in range(kills):
            out = root / "killed" / kind
            # Anywhere between two logged rows: in a step, in an evaluation, in the writing of a checkpoint.
            rows, delay = int(generator.integers(0, logged)), float(generator.uniform(0, seconds / logged))
            first, step = _killed_and_again(kind, root, out, rows, delay)
            found = result(out)
            count["trials"] += 1
            count["killed"] += first == -signal.SIGKILL
            count["resumed"] += first == -signal.SIGKILL and step > 0
            count["equal"] += found == expected
            if found != expected:
                names = found.keys() | expected.keys()
                count["unequal"].append(sorted(name for name in names if found.get(name) != expected.get(name)))
            shutil.rmtree(out)
        counts.append(count)
        print(json.dumps(count), flush=True)
    return counts


def write_page(rows: list[dict], path: Path, seed: int, *, real: bool = False) -> None:
    """The section of docs/reliability.md."""
    table = [
        "| training | kills tried | ended by the kill | continued from a checkpoint | equal in every byte |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {r['kind']} | {r['trials']} | {r['killed']} | {r['resumed']} | {r['equal']} |" for r in rows),
        "",
    ]
    if real:
        lines = [
            "What `make soak` does to trainings of tiny models, done to trainings of Gemma-3-270M, by",
            "`python tests/cases/soak.py --model real`: six steps of two short pairs (or texts), a checkpoint every",
            "2 steps.",
            "",
            *table,
            f"Seed {seed}; LoRA dropout 0.1; two micro-batches a step; {_conditions()}.",
        ]
        put_section(path, "## Trainings of Gemma-3-270M killed and continued", lines)
        return
    lines = [
        "`make soak` trains tiny models with every stage of the study, kills each training with SIGKILL at random",
        "moments, starts it again in the same folder and compares **every file** that it leaves (weights, `log.jsonl`,",
        "metrics) with those of a run that nobody disturbed. The counts below are written by that command.",
        "",
        *table,
        "A training that was killed before its first checkpoint starts from the first step; one that had ended before",
        "the kill came is counted as tried, and not as ended by it.",
        "",
        f"Seed {seed}; a checkpoint every {EVERY} steps; LoRA dropout 0.1; two micro-batches a step;",
        f"{_conditions()}.",
    ]
    put_section(path, "## Trainings killed and continued", lines)


def _conditions() -> str:
    import torch

    from madpo.models.load import compute_dtype

    precision = "bfloat16" if compute_dtype() is torch.bfloat16 else "float32"
    return f"CPU, one thread, {precision}; torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("tiny", "real"), default="tiny", help="real: Gemma-3-270M, minutes a kill")
    parser.add_argument("--kills", type=int, help="kills of each kind of training (default: 20, of the real model 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--page", type=Path, help="write the counts to this Markdown file")
    options = parser.parse_args()
    os.nice(10)
    warm_up()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        real = options.model == "real"
        if not real:  # which is unpacked in the user's own cache
            os.environ["MADPO_CACHE"] = str(root / "cache")
        assert wait(fork(lambda: prepare(root, real=real))) == 0
        rows = soak(root, tuple(options.kinds), options.kills or (3 if real else 20), options.seed)
    if options.page:
        write_page(rows, options.page, options.seed, real=real)
    raise SystemExit(any(row["equal"] < row["trials"] for row in rows))


if __name__ == "__main__":
    main()
