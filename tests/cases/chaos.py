"""Kill the study at random moments, continue it, and compare everything it leaves with an undisturbed run.

Part of ``make soak``. The smoke study runs undisturbed and in three other ways: killed by SIGKILL again and again, in a
cluster whose workers are killed in the middle of steps, and in several processes. Every step's files and records
(outside ``provenance``) and the tables of the report must have the bytes of the undisturbed run.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sections import put_section
from soak import fork, wait, warm_up

TABLES = ("results.md", "selection.json")
# File -> its key that says where and when. PEFT writes sets of names as lists, in any order.
ELSEWHERE = {"record.json": "provenance", "adapter_config.json": "base_model_name_or_path"}


def study(root: Path) -> None:
    """The smoke study, in this process."""
    from madpo.study.experiment import run_experiment

    if run_experiment("smoke", root).failed:
        raise SystemExit(1)


def final(root: Path) -> dict[str, str]:
    """Digests of what a run leaves: file -> SHA-256, less what is said of place and time."""
    found = {}
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root)
        if not path.is_file() or (len(place.parts) == 1 and place.name not in TABLES):
            continue  # the page and results.json name hours and hosts
        content = path.read_bytes()
        if path.parent.name == "adapter" and path.name == "README.md":
            continue  # PEFT's card, which names the folder
        if path.name in ELSEWHERE:
            kept = {k: v for k, v in json.loads(content).items() if k != ELSEWHERE[path.name]}
            content = json.dumps({k: sorted(v) if isinstance(v, list) else v for k, v in kept.items()}).encode()
        found[str(place)] = hashlib.sha256(content).hexdigest()
    return found


def unequal(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Files that differ, or that one of two runs lacks."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def killed_again_and_again(root: Path, kills: int, seconds: float, generator: np.random.Generator) -> tuple[int, int]:
    """Start the study, kill it after a random while, and so on; then let it end.

    Args:
        seconds: how long an undisturbed run takes. A kill comes within a tenth of that, so that all of them hit.

    Returns:
        Kills that hit a running study, and how often it was started in all.
    """
    hit = started = 0
    while hit < kills and started < 3 * kills:
        child = fork(lambda: study(root))
        started += 1
        deadline = time.monotonic() + float(generator.uniform(0.05, max(0.3, seconds / 10)))
        while time.monotonic() < deadline and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        hit += wait(child) == -signal.SIGKILL
    assert wait(fork(lambda: study(root))) == 0
    return hit, started + 1


def command(root: Path, *options: str) -> subprocess.Popen[bytes]:
    """The study on the command line, with its words in ``<root>.log``."""
    with root.with_suffix(".log").open("wb") as log:
        arguments = [sys.executable, "-m", "madpo.commands.cli", "run", "smoke", "--output_dir", str(root), *options]
        return subprocess.Popen(arguments, stdout=log, stderr=log)


def with_lost_workers(root: Path, kills: int, generator: np.random.Generator) -> int:
    """The study on a Ray cluster, with workers killed in the middle of steps; returns how many."""
    import psutil

    process, hit = command(root, "--executor", "ray", "--processes", "2"), 0
    own = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(float(generator.uniform(0.5, 3)))
        if hit == kills or process.poll() is not None:
            continue
        # A worker carries the name of the function that it works on.
        busy = [p for p in own.children(recursive=True) if p.is_running() and "ray::_work" in " ".join(p.cmdline()[:1])]
        if busy:
            busy[int(generator.integers(len(busy)))].kill()
            hit += 1
    assert process.returncode == 0, root.with_suffix(".log").read_text()[-3000:]
    return hit


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lost_workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="add the counts to this Markdown file")
    options = parser.parse_args()
    os.nice(10)
    generator = np.random.default_rng(options.seed)
    rows: list[tuple[str, str, list[str]]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ |= {"MADPO_CACHE": str(root / "cache"), "MADPO_PROGRESS": "plain"}
        warm_up()
        import madpo.study.experiment  # noqa: F401

        assert wait(fork(lambda: study(root / "first"))) == 0  # builds the tiny model, which is not to be measured
        began = time.monotonic()
        assert wait(fork(lambda: study(root / "whole"))) == 0
        seconds = time.monotonic() - began
        expected = final(root / "whole")
        rows.append(("undisturbed, a second time", "", unequal(final(root / "first"), expected)))
        hit, started = killed_again_and_again(root / "killed", options.kills, seconds, generator)
        words = f"{hit} SIGKILLs at random moments, {started} starts"
        rows.append(("killed and continued", words, unequal(final(root / "killed"), expected)))
        assert command(root / "processes", "--processes", "2").wait() == 0
        rows.append(("two processes", "", unequal(final(root / "processes"), expected)))
        if importlib.util.find_spec("ray") is not None:
            lost = with_lost_workers(root / "ray", options.lost_workers, generator)
            rows.append(
                ("Ray, two workers", f"{lost} workers killed during a step", unequal(final(root / "ray"), expected))
            )
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.page:
        add_to_page(options.page, rows, len(expected))
    raise SystemExit(any(row[2] for row in rows))


def add_to_page(page: Path, rows: list[tuple[str, str, list[str]]], files: int) -> None:
    """The section of docs/reliability.md."""
    lines = [
        f"The smoke study leaves {files} files and its page: every step's, and the tables of the report. They are",
        "compared with those of an undisturbed run: weights, samples, logs and tables byte for byte, records without",
        "their provenance, PEFT's `adapter_config.json` without the path of the base model. PEFT's card is left out.",
        "",
        "| run | what happened to it | files that differ |",
        "| --- | --- | --- |",
        *(f"| {run} | {words or DASH} | {len(different)} |" for run, words, different in rows),
    ]
    put_section(page, "## The whole study", lines)


DASH = "nothing"

if __name__ == "__main__":
    main()
