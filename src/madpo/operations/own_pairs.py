"""A user's own pairs in a study: the ``pairs`` step that they become, and what a policy makes of the held-out ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import Field

from madpo.core.columns import REFERENCE_COLUMNS
from madpo.core.config import Frozen, added
from madpo.core.metrics import Metrics
from madpo.core.statistics import bootstrap_mean, fit_temperature, share_of
from madpo.core.storage import write_atomically
from madpo.data.conversation import Conversation, columns_of
from madpo.data.folds import prompt_keys
from madpo.data.messages import Text
from madpo.data.templates import Clock
from madpo.models.engine.responses import decode
from madpo.models.load import load_model, load_tokenizer
from madpo.operations.inputs import load_training, split_by_prompt
from madpo.operations.settings import LimitedPairs, Training
from madpo.operations.study_training import (
    MARGINS,
    SCORES,
    pair_ids,
    pair_logps,
    prompts_of,
    read_pairs,
    reference_model,
)
from madpo.runner.operation import operation

DATE = "date.json"


class Size(Frozen):
    """What is known of pairs before they are read for a model."""

    pairs: int
    prompts: int
    characters: int
    """Mean length of a prompt with one completion."""


class OwnPairsStage(Training, LimitedPairs):
    """Preference data as the pairs of a study: token ids, and parts that no prompt crosses."""

    judge_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the pairs that no policy sees and that a judge is fitted to."""
    seed: int = Field(default=0, ge=0)
    """Seed of the division into parts."""
    max_train: int | None = added(None, ge=1)
    """Training pairs at most, the first ones; None is all."""
    max_heldout: int | None = added(None, ge=1)
    """Held-out pairs at most, the first ones; None is all."""
    size: Size | None = Field(default=None, exclude=True)


@operation("read_own_pairs/3")
def read_own_pairs(config: OwnPairsStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``pairs.parquet``; its column ``split`` is "train", "heldout" or "judge", and ``row`` the data's own id.

    The columns ``reward_margin``, and ``chosen_score`` with ``rejected_score``, go to ``margins.parquet`` and
    ``scores.parquet`` where the data have them. Inputs: "data", "reference" and perhaps "eval_data".

    Raises:
        DataError: as :func:`madpo.operations.inputs.load_training`, or too few prompts for the parts.
    """
    data = str(inputs["data"])
    loaded = load_training(config, data, inputs.get("eval_data"), out, seed=config.seed, max_length=config.max_length)
    parts = {"train": loaded.train, "heldout": loaded.heldout}
    if config.judge_share:
        left = 1.0 if "eval_data" in inputs else 1 - config.eval_share
        parts["train"], parts["judge"] = split_by_prompt(loaded.train, config.judge_share / left, config.seed, data)
    for split, most in (("train", config.max_train), ("heldout", config.max_heldout)):
        parts[split] = parts[split][:most]
    rows = [{**row, "split": split} for split, part in parts.items() for row in part]
    keys = prompt_keys([row["prompt"] for row in rows])
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    table = pd.DataFrame(
        {
            "pair_id": range(len(rows)),
            "row": [row["pair_id"] for row in rows],
            "prompt_id": [number[key] for key in keys],
            "split": [row["split"] for row in rows],
            "prompt": [
                # Of messages what the chat template makes of them.
                row["prompt"] if isinstance(row["prompt"], str) else decode(loaded.tokenizer, row["prompt_ids"])
                for row in rows
            ],
            "conversation": [
                json.dumps([[*turns], columns_of(turns)], ensure_ascii=False)
                if isinstance(turns := row["prompt"], list)
                else None
                for row in rows
            ],
            **{name: [row[name] for row in rows] for name in ids},
        }
    )
    table.to_parquet(out / "pairs.parquet", index=False)
    for file, names in ((MARGINS, ("reward_margin",)), (SCORES, ("chosen_score", "rejected_score"))):
        if rows[0].keys() >= set(names):
            numbers = {name: [float(row[name]) for row in rows] for name in names}
            pd.DataFrame({"pair_id": table["pair_id"], **numbers}).to_parquet(out / file, index=False)
    if (date := loaded.clock.text()) is not None:
        write_atomically(out / DATE, json.dumps(date) + "\n")
    if loaded.too_long.dropped:
        write_atomically(out / "dropped.jsonl", loaded.too_long.lines())
    counts = {f"{split}_pairs": len(part) for split, part in parts.items()}
    heldout = table["split"] == "heldout"
    leaked = int(table["prompt_id"][heldout].isin(table["prompt_id"][~heldout]).sum())
    prompts, dropped = int(table.loc[heldout, "prompt_id"].nunique()), len(loaded.too_long.dropped)
    return {"pairs": len(rows), **counts, "heldout_prompts": prompts, "leaked_pairs": leaked, "dropped": dropped}


def prompt_contents(pairs: pd.DataFrame) -> list[Text]:
    """The prompt of every pair as a judge reads it: text, or messages."""
    if "conversation" not in pairs:
        return list(pairs["prompt"])
    rows = zip(pairs["prompt"], pairs["conversation"], strict=True)
    return [text if turns is None else Conversation(*json.loads(turns)) for text, turns in rows]


def pairs_clock(folder: Path) -> Clock | None:
    """The date that the chat template printed in the pairs of a step; None where it printed none."""
    path = folder / DATE
    return Clock(datetime.fromisoformat(json.loads(path.read_bytes()))) if path.exists() else None


class HeldoutStage(Frozen):
    """What a policy makes of the pairs that it was not trained on."""

    method: str
    """Name in tables and figures."""
    seed: int = 0
    batch_size: int = Field(default=8, ge=1, exclude=True)
    """Pairs per forward pass."""


@operation("measure_heldout/1")
def measure_heldout(config: HeldoutStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``samples.jsonl`` with a line per held-out pair: its log-ratio margin, whether it has the label's sign
    (0 is half right), and -log sigma(margin / temperature) in nats, at the one temperature that fits all these pairs.

    The log-ratio margin is the implicit reward margin of DPO over beta. The temperature takes beta's place, so policies
    of any loss and beta compare. Prompts weigh alike, whatever their number of pairs. Inputs: "pairs", "reference",
    "logps" (:func:`madpo.operations.study_training.reference_logps` of the held-out pairs), "policy".
    """

    from madpo.training.reference import refuse_not_finite

    pairs = read_pairs(inputs["pairs"], "heldout")
    pairs = pairs.merge(pd.read_parquet(inputs["logps"] / "reference.parquet"), on="pair_id", validate="one_to_one")
    reference_path = reference_model(inputs)
    policy = load_model(reference_path, adapter=inputs["policy"] / "adapter").eval()
    tokenizer = load_tokenizer(reference_path)
    logps = pair_logps(policy, tokenizer, pair_ids(pairs), config.batch_size, f"{config.method}: held-out pairs")
    ratios = logps - pairs[[*REFERENCE_COLUMNS]].to_numpy().T
    margins = ratios[0] - ratios[1]
    refuse_not_finite({"log_ratio_margin": margins}, pairs["pair_id"].to_list(), "the policy")
    temperature = fit_temperature(margins)[0]
    table = pd.DataFrame(
        {
            "prompt_id": prompts_of(pairs).to_numpy(),
            "pair_id": pairs["pair_id"].to_numpy(),
            "log_ratio_margin": margins,
            "right": (np.sign(margins) + 1) / 2,
            "log_loss": np.logaddexp(0.0, -margins / temperature),
        }
    )
    table.insert(1, "sample", table.groupby("prompt_id").cumcount())
    write_atomically(out / "samples.jsonl", table.to_json(orient="records", lines=True, double_precision=15))
    means = table.groupby("prompt_id")[["right", "log_loss"]].mean()
    return {
        "pairs": len(table),
        "prompts": len(means),
        "heldout_accuracy": share_of(means["right"], seed=config.seed),
        "heldout_log_loss": bootstrap_mean(means["log_loss"], seed=config.seed, lowest=0.0),
        "temperature": temperature,
        "mean_log_ratio_margin": float(margins.mean()),
    }
