"""Margins without a reward model against margins of one: accuracy, log loss and time, on any preference file.

Rows of the table: the probe of `madpo score --probe`, and `madpo reward` with its reward read at the last token and as
the mean over the completion. Each is fitted on the training pairs and measured on held-out ones, and on its own
training pairs in sample (a reward model) and out of fold. Log losses are also given after one temperature, which each
method fits to the very pairs it is measured on; for held-out pairs also less that of the probe. Intervals are over
prompts. Time is processor time of everything from pairs to margins; a probe's has its pairs' share of the pass that
computes their states.

    python benchmarks/margins.py compare pairs.jsonl --model gemma-3-270m --heldout 0.3 --output_dir out
    python benchmarks/margins.py compare RUN/pairs/*/*/pairs.parquet --model RUN/sft-*/model --output_dir out

A column `split` (train, heldout), as in the pairs of a study, decides what is held out. `--train 200 400` measures at
these sizes, each the first so many training pairs of one random order. `margins.json` has every row as soon as it is
found, and no row in it is measured again. `scale` measures how time and memory of the fit grow, on features made up
for it:

    python benchmarks/margins.py scale --pairs 100000 --features 8192
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from madpo.core.feature_file import FeatureFile, FeatureWriter
from madpo.core.metrics import Estimate
from madpo.core.seeding import rng
from madpo.core.statistics import bootstrap_mean, bootstrap_share, fit_temperature
from madpo.core.storage import write_atomically
from madpo.data import load_preferences
from madpo.data.folds import folds_by_prompt, prompt_key

Floats = NDArray[np.float64]


class Scored(NamedTuple):
    """A part of the pairs: its margins and prompts, and processor seconds that were spent on them before."""

    part: str
    margins: Floats
    prompts: list[str]
    seconds: float = 0.0


def compare(arguments: argparse.Namespace) -> None:
    """Every method at every size on every file; prints a line for each part and keeps it in ``margins.json``."""
    kept = Path(arguments.output_dir) / "margins.json"
    found = json.loads(kept.read_text()) if kept.exists() else []
    for data in arguments.data:
        place = kept.parent / data.parent.parent.name / data.parent.name / data.stem
        place.mkdir(parents=True, exist_ok=True)
        train, heldout = _split(data, arguments)
        features = _features([*heldout, *train], place / "features.safetensors", arguments.model)
        for size in arguments.train or [len(train)]:
            methods = {"probe": _probe(features, len(heldout), [*heldout, *train[:size]], arguments.seed)}
            for pooling in arguments.pooling:
                out = place / str(size) / pooling
                methods[f"reward, {pooling}"] = _reward(arguments, pooling, train[:size], heldout, out)
            for method, parts in methods.items():
                begin = time.process_time()
                for part in parts:
                    row = {"data": str(data), "train": size, "method": method, "part": part.part}
                    if not any(row.items() <= other.items() for other in found):
                        seconds = time.process_time() - begin + part.seconds
                        found.append(row | {"seconds": seconds, **measured(part.margins, part.prompts)})
                        if part.part == "heldout":
                            found[-1] |= _less_probe(found, part.prompts)
                        write_atomically(kept, json.dumps(found, indent=1) + "\n")
                        print(_line(found[-1]), flush=True)
                    begin = time.process_time()


def _features(rows: Sequence[dict[str, Any]], path: Path, name: str) -> dict[str, NDArray[np.float32]]:
    """States of both sides of the pairs, and the processor seconds that they took."""
    if not path.exists():
        from madpo.models.engine.features import feature_layers
        from madpo.models.load import load_model, load_tokenizer, placed, resolve_model
        from madpo.rewards.probe_reward import pair_features

        begin, base = time.process_time(), resolve_model(name)
        model, pad = placed(load_model(base)), load_tokenizer(base).pad_token_id
        sides = ([[*row["prompt_ids"], *row[side]] for row in rows] for side in ("chosen_ids", "rejected_ids"))
        lengths = [len(row["prompt_ids"]) for row in rows]
        chosen, rejected = pair_features(model, pad, feature_layers(model), *sides, lengths, 16)
        seconds = np.array([time.process_time() - begin], dtype=np.float32)
        write_atomically(path, save({"chosen": chosen, "rejected": rejected, "seconds": seconds}))
    return load_file(path)


def _probe(features: dict[str, Any], heldout: int, rows: Sequence[dict[str, Any]], seed: int) -> Iterator[Scored]:
    from madpo.rewards.probe import fit_probe

    chosen, rejected = features["chosen"][: len(rows)], features["rejected"][: len(rows)]
    prompts = [prompt_key(row["prompt"]) for row in rows]
    each = float(features["seconds"][0]) / len(features["chosen"])
    fitted = fit_probe(chosen[heldout:], rejected[heldout:], prompts[heldout:], seed=seed)
    yield Scored("out of fold", fitted.margins, prompts[heldout:], each * (len(rows) - heldout))
    margins = fitted.weights.rewards(chosen[:heldout]) - fitted.weights.rewards(rejected[:heldout])
    yield Scored("heldout", margins, prompts[:heldout], each * heldout)


def _reward(
    arguments: argparse.Namespace, pooling: Any, train: Sequence[Any], heldout: Sequence[Any], out: Path
) -> Iterator[Scored]:
    from madpo.operations import RewardSettings, ScoreSettings, reward, score
    from madpo.operations.settings import AdapterOptimisation

    files = {"heldout": heldout, "in sample": train}
    out.mkdir(parents=True, exist_ok=True)
    for part, rows in files.items():
        lines = ({name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(out / f"{part}.jsonl", text)
    optimisation = AdapterOptimisation(
        learning_rate=arguments.learning_rate, epochs=arguments.epochs, batch_size=8, micro_batch_size=8
    )
    settings = RewardSettings(
        model=arguments.model, pooling=pooling, optimisation=optimisation, eval_share=0.15, seed=arguments.seed
    )

    def scored(part: str, name: str, how: ScoreSettings) -> Scored:
        score(out / f"{name}.jsonl", out / part, how)
        rows = load_preferences(out / part / "scored.jsonl")
        margins = np.array([row["reward_margin"] for row in rows])
        return Scored(part, margins, [prompt_key(row["prompt"]) for row in rows])

    reward(out / "in sample.jsonl", out / "R", settings)
    for part in files:
        yield scored(part, part, ScoreSettings(reward_model=str(out / "R")))
    if arguments.folds:
        yield scored("out of fold", "in sample", ScoreSettings(folds=arguments.folds, reward=settings))


def measured(margins: Floats, prompts: list[str]) -> dict[str, Any]:
    """Accuracy, log loss and log loss after one temperature; and the log losses after it, pair by pair."""
    temperature = fit_temperature(margins)[0]
    losses = np.logaddexp(0, -margins / temperature)
    return {
        "pairs": len(margins),
        "accuracy": bootstrap_share((margins > 0).astype(float), clusters=prompts),
        "log_loss": bootstrap_mean(np.logaddexp(0, -margins), clusters=prompts),
        "temperature": temperature,
        "calibrated_log_loss": bootstrap_mean(losses, clusters=prompts),
        "losses": losses.tolist(),
    }


def _less_probe(found: Sequence[dict[str, Any]], prompts: list[str]) -> dict[str, Any]:
    """The difference of held-out losses to those of the probe of the same training pairs."""
    row = found[-1]
    wanted = {"data": row["data"], "train": row["train"], "method": "probe", "part": "heldout"}
    probe = next(other for other in found if wanted.items() <= other.items())
    return {"less_probe": bootstrap_mean(np.subtract(row["losses"], probe["losses"]), clusters=prompts)}


def _line(row: dict[str, Any]) -> str:
    shown = [Estimate(*row[n]) for n in ("accuracy", "log_loss", "calibrated_log_loss", "less_probe") if n in row]
    numbers = " | ".join(f"{e.mean:.3f} ({e.low:.3f} to {e.high:.3f})" for e in shown)
    what = f"{row['data']} | {row['train']} | {row['method']} | {row['part']} | {row['pairs']}"
    return f"| {what} | {numbers} | {row['seconds']:.1f} s |"


def _split(data: Path, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training pairs in a random order, and the held-out ones; those of more than ``--max_length`` tokens are in
    neither."""
    rows = load_preferences(data, tokenizer=arguments.model, max_length=arguments.max_length)
    if data.suffix == ".parquet" and "split" in (table := pd.read_parquet(data)):
        heldout = set(table.loc[table["split"] == "heldout", "pair_id"])
        aside = np.array([row["pair_id"] in heldout for row in rows])
    else:
        parts = max(2, round(1 / arguments.heldout))
        fold = folds_by_prompt([prompt_key(row["prompt"]) for row in rows], parts, arguments.seed, str(data))
        aside = np.array(fold) == 0
    order = rng(arguments.seed, "order").permutation(len(rows))
    return [rows[i] for i in order if not aside[i]], [row for row, out in zip(rows, aside, strict=True) if out]


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
        before = _own_memory()
        with _clock() as spent, _peak() as memory:
            fitted = fit_probe(features.chosen, features.rejected, [str(i) for i in range(arguments.pairs)], folds=5)
        known = np.concatenate(true)
        print(
            f"{arguments.pairs} pairs x {arguments.features} features ({path.stat().st_size / 2**30:.2f} GiB on disk): "
            f"{spent['seconds']:.1f} processor seconds, {max(memory):.0f} MiB of own memory (before: {before:.0f}; "
            f"pages of the file do not count); log loss {fitted.report.log_loss.mean:.4f}, of the true margins "
            f"{np.logaddexp(0, -known).mean():.4f}; correlation {np.corrcoef(fitted.margins, known)[0, 1]:.3f}; "
            f"penalty {fitted.weights.penalty:.3g}",
            flush=True,
        )


def _own_memory() -> float:
    """MiB that belong to this process and to no file (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@contextmanager
def _peak() -> Iterator[list[float]]:
    """Looks at the memory ten times a second."""
    found, done = [_own_memory()], threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            found.append(_own_memory())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


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
    one.add_argument("--train", type=int, nargs="*", help="numbers of training pairs; all that are left by default")
    one.add_argument("--max_length", type=int, help="tokens of prompt and completion; longer pairs are left out")
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
