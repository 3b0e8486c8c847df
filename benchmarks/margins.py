"""Margins without a reward model against margins of one: accuracy, log loss and time, on any preference file.

Rows of the table: the probe (`madpo score --probe`), and `madpo reward` with its reward read at the last token and as
the mean over the completion. Each is fitted on the training pairs and measured on held-out ones, and on its own
training pairs in sample and out of fold. Log losses are also given after one temperature, which each method fits to the
very pairs it is measured on. Intervals are over prompts. Time is processor time of everything from pairs to margins.

    python benchmarks/margins.py compare pairs.jsonl --model gemma-3-270m --heldout 0.3 --output_dir out
    python benchmarks/margins.py compare RUN/pairs/*/*/pairs.parquet --model RUN/sft-*/model --output_dir out

A column `split` (train, heldout), as in the pairs of a study, decides what is held out. `scale` measures how time and
memory of the fit grow, on features made up for it:

    python benchmarks/margins.py scale --pairs 100000 --features 8192
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from madpo.core.feature_file import FeatureFile, FeatureWriter
from madpo.core.metrics import Estimate
from madpo.core.seeding import rng
from madpo.core.statistics import bootstrap_mean, bootstrap_share, fit_temperature
from madpo.data import load_preferences
from madpo.data.folds import folds_by_prompt, prompt_key


def compare(arguments: argparse.Namespace) -> None:
    """Every method on every file; prints tables and writes ``margins.json``."""
    found = []
    methods = {"probe": (_probe, None), **{f"reward, {pooling}": (_reward, pooling) for pooling in arguments.pooling}}
    for data in arguments.data:
        place = Path(arguments.output_dir) / data.parent.parent.name / data.parent.name / data.stem
        place.mkdir(parents=True, exist_ok=True)
        train, heldout = _split(data, place, arguments)
        for method, (run, pooling) in methods.items():
            out, begin = place / method.replace(", ", "-"), time.process_time()
            for part, scored in run(arguments, pooling, train, heldout, out):
                seconds = time.process_time() - begin
                row = {"data": str(data), "method": method, "part": part, "seconds": seconds, **measured(scored)}
                found.append(row)
                print(_line(row), flush=True)
                begin = time.process_time()
    Path(arguments.output_dir, "margins.json").write_text(json.dumps(found, indent=1) + "\n")


def _probe(arguments: argparse.Namespace, _: Any, train: Path, heldout: Path, out: Path) -> Iterator[tuple[str, Path]]:
    from madpo.operations import ScoreSettings, score

    score(train, out / "S", ScoreSettings(probe=arguments.model, probe_seed=arguments.seed))
    yield "out of fold", out / "S" / "scored.jsonl"
    for part, file in (("heldout", heldout), ("in sample", train)):
        score(file, out / part, ScoreSettings(reward_model=str(out / "S" / "probe")))
        yield part, out / part / "scored.jsonl"


def _reward(
    arguments: argparse.Namespace, pooling: Any, train: Path, heldout: Path, out: Path
) -> Iterator[tuple[str, Path]]:
    from madpo.operations import RewardSettings, ScoreSettings, reward, score
    from madpo.operations.settings import RewardOptimisation

    optimisation = RewardOptimisation(
        learning_rate=arguments.learning_rate, epochs=arguments.epochs, batch_size=8, micro_batch_size=8
    )
    settings = RewardSettings(
        model=arguments.model, pooling=pooling, optimisation=optimisation, eval_share=0.15, seed=arguments.seed
    )
    reward(train, out / "R", settings)
    for part, file in (("heldout", heldout), ("in sample", train)):
        score(file, out / part, ScoreSettings(reward_model=str(out / "R")))
        yield part, out / part / "scored.jsonl"
    if arguments.folds:
        score(train, out / "S", ScoreSettings(folds=arguments.folds, reward=settings))
        yield "out of fold", out / "S" / "scored.jsonl"


def measured(scored: Path) -> dict[str, Any]:
    """Accuracy, log loss and log loss after one temperature, of the margins in a scored file."""
    rows = load_preferences(scored)
    margins, prompts = np.array([row["reward_margin"] for row in rows]), [prompt_key(row["prompt"]) for row in rows]
    temperature = fit_temperature(margins)[0]
    return {
        "pairs": len(rows),
        "accuracy": bootstrap_share((margins > 0).astype(float), clusters=prompts),
        "log_loss": bootstrap_mean(np.logaddexp(0, -margins), clusters=prompts),
        "temperature": temperature,
        "calibrated_log_loss": bootstrap_mean(np.logaddexp(0, -margins / temperature), clusters=prompts),
    }


def _line(row: dict[str, Any]) -> str:
    def shown(e: Estimate) -> str:
        return f"{e.mean:.3f} ({e.low:.3f} to {e.high:.3f})"

    numbers = " | ".join(shown(row[name]) for name in ("accuracy", "log_loss", "calibrated_log_loss"))
    return f"| {row['data']} | {row['method']} | {row['part']} | {row['pairs']} | {numbers} | {row['seconds']:.1f} s |"


def _split(data: Path, place: Path, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Files of the training and of the held-out pairs, text or messages."""
    rows = load_preferences(data)
    if data.suffix == ".parquet" and "split" in (table := pd.read_parquet(data)):
        aside = (table["split"] == "heldout").to_numpy()
    else:
        parts = max(2, round(1 / arguments.heldout))
        fold = folds_by_prompt([prompt_key(row["prompt"]) for row in rows], parts, arguments.seed, str(data))
        aside = np.array(fold) == 0
    kept = [row for row, out in zip(rows, aside, strict=True) if not out][: arguments.train]
    files = place / "train.jsonl", place / "heldout.jsonl"
    for file, chosen in zip(files, (kept, [row for row, out in zip(rows, aside, strict=True) if out]), strict=True):
        lines = ({name: row[name] for name in ("prompt", "chosen", "rejected")} for row in chosen)
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return files


def scale(arguments: argparse.Namespace) -> None:
    """Fit a probe to made-up features on disk: a signal in 64 directions of 512 that are shared, and noise."""
    from madpo.rewards.probe import fit_probe

    generator = rng(arguments.seed, "features")
    mixing = generator.normal(size=(512, arguments.features)).astype(np.float32)
    spectrum = (1 / np.sqrt(1 + np.arange(512))).astype(np.float32)
    signal = np.where(np.arange(512) % 8 == 0, generator.normal(size=512) / spectrum, 0).astype(np.float32)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        path, true = Path(folder) / "features.safetensors", []
        with FeatureWriter(path, arguments.pairs, arguments.features) as writer:
            for start in range(0, arguments.pairs, 2048):
                count = min(2048, arguments.pairs - start)
                sides = generator.normal(size=(2, count, 512)).astype(np.float32) * spectrum
                margins = 1.5 / 8 / np.sqrt(2) * ((sides[0] - sides[1]) @ signal)
                swapped = generator.random(count) > 1 / (1 + np.exp(-margins))
                sides[:, swapped] = sides[::-1, swapped]
                true.append(np.where(swapped, -margins, margins))
                noise = 0.3 * generator.normal(size=(2, count, arguments.features)).astype(np.float32)
                writer.write(start, *(sides @ mixing + noise))
        features = FeatureFile.read(path, arguments.pairs, arguments.features)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with _clock() as spent:
            fitted = fit_probe(features.chosen, features.rejected, [str(i) for i in range(arguments.pairs)], folds=5)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        known = np.concatenate(true)
        print(
            f"{arguments.pairs} pairs x {arguments.features} features ({path.stat().st_size / 2**30:.2f} GiB on disk): "
            f"{spent['seconds']:.1f} processor seconds, peak resident {peak:.0f} MiB (before: {before:.0f}); log loss "
            f"{fitted.report.log_loss.mean:.4f}, of the true margins {np.logaddexp(0, -known).mean():.4f}; correlation "
            f"with them {np.corrcoef(fitted.margins, known)[0, 1]:.3f}; penalty {fitted.weights.penalty:.3g}",
            flush=True,
        )


@contextmanager
def _clock() -> Iterator[dict[str, float]]:
    spent, begin = {"seconds": 0.0}, time.process_time()
    yield spent
    spent["seconds"] = time.process_time() - begin


def main() -> None:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("compare")
    one.set_defaults(run=compare)
    one.add_argument("data", nargs="+", type=Path)
    one.add_argument("--model", required=True)
    one.add_argument("--output_dir", required=True)
    one.add_argument("--heldout", type=float, default=0.3)
    one.add_argument("--train", type=int, default=None, help="training pairs at most")
    one.add_argument("--folds", type=int, default=0, help="reward models for margins out of fold; 0 trains none")
    one.add_argument("--pooling", nargs="*", default=["last", "mean"])
    one.add_argument("--learning_rate", type=float, default=3e-4)
    one.add_argument("--epochs", type=float, default=2)
    one.add_argument("--seed", type=int, default=0)
    two = commands.add_parser("scale")
    two.set_defaults(run=scale)
    two.add_argument("--pairs", type=int, default=100_000)
    two.add_argument("--features", type=int, default=8192)
    two.add_argument("--scratch", default=None, help="folder for the features")
    two.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
