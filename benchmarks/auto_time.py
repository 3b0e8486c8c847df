"""Time of ``madpo train`` with auto and with ``--fast`` against plain DPO, in turns in one process.

Every run begins with an empty cache, so each pays its own reference pass. Libraries are loaded, and one short training
is run, before the first measurement. Prints processor and wall seconds with their ratios to DPO, and writes JSON.

    python benchmarks/auto_time.py pairs.jsonl --model gemma-3-270m --epochs 3 --repeats 2 --json out.json
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from madpo.losses import DPO
from madpo.operations import TrainSettings, train
from madpo.operations.train_settings import Auto

LOSSES = {"dpo": DPO(), "fast": Auto(fast=True), "auto": Auto()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES}

    def once(name: str, args: dict[str, float]) -> tuple[float, float]:
        folder = Path(tempfile.mkdtemp())
        os.environ["MADPO_CACHE"] = str(folder / "cache")
        cpu, wall = time.process_time(), time.perf_counter()
        report = train(
            arguments.data, folder / "out", TrainSettings(model=arguments.model, loss=LOSSES[name], args=args)
        )
        found = time.process_time() - cpu, time.perf_counter() - wall
        print(f"{name}: {found[0]:.1f} s of processor, {found[1]:.1f} s\n{report.text()}", flush=True)
        shutil.rmtree(folder)
        return found

    once("dpo", {"max_steps": 2})
    for _ in range(arguments.repeats):
        for name, found in seconds.items():
            found.append(once(name, {"num_train_epochs": arguments.epochs}))
    middle = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in seconds.items()
    }
    for name, (cpu, wall) in middle.items():
        ratios = cpu / middle["dpo"][0], wall / middle["dpo"][1]
        print(f"{name}: {cpu:.1f} s of processor ({ratios[0]:.2f}), {wall:.1f} s ({ratios[1]:.2f})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": seconds, "median": middle}, indent=1) + "\n")


if __name__ == "__main__":
    main()
