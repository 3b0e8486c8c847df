"""Preference pairs from a corpus: sample responses from the SFT model, let the oracle choose between two of them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from torch import nn
from transformers import PreTrainedTokenizerBase

from madpo.core.config import Frozen, added
from madpo.core.errors import ConfigError
from madpo.core.metrics import Metrics
from madpo.core.progress import bar
from madpo.core.seeding import rng
from madpo.core.statistics import bootstrap_mean, proportion
from madpo.core.storage import write_atomically
from madpo.data.corpus import Corpus, Tier, load_corpus, prompt_reviews
from madpo.models.engine.responses import decode, end_tokens, respond
from madpo.models.load import load_model, load_tokenizer
from madpo.operations.settings import Drawing
from madpo.rewards.oracles import RewardFn, load_oracle
from madpo.runner.operation import operation

SHORTEST_CONTINUATION = 8  # tokens; a review that goes on for fewer is no prompt


def _schema(names: str) -> pa.Schema:
    """The columns of a table; their names say what they hold."""
    kinds = {"_ids": pa.list_(pa.int32()), "reward": pa.float64(), "_id": pa.int64()}
    return pa.schema(
        [(name, next((kind for part, kind in kinds.items() if part in name), pa.string())) for name in names.split()]
    )


RESPONSES = _schema(
    "prompt_id prompt prompt_ids response_0 response_ids_0 response_1 response_ids_1 real real_ids reward_0 reward_1 "
    "reward_real"
)
PAIRS = _schema(
    "pair_id split prompt chosen rejected prompt_ids chosen_ids rejected_ids chosen_oracle_reward "
    "rejected_oracle_reward chosen_source rejected_source"
)


class ResponseStage(Drawing):
    """Two sampled responses to the beginning of every prompt review, and the review's own continuation."""

    corpus: Corpus
    prompts: int = Field(ge=1)
    """Reviews that prompts are cut from."""
    skip: int = added(0, ge=0)
    """Reviews before those, which another run's prompts are cut from."""
    prompt_tokens: int = Field(default=20, ge=1)
    """Tokens of a prompt, the beginning-of-text token included."""
    max_new_tokens: int = Field(default=48, ge=1)
    batch_size: int = Field(default=128, ge=1, exclude=True)
    """Prompts generated for at once, and kept when the run is interrupted."""


@operation("sample_responses/4")
def sample_responses(config: ResponseStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``responses.parquet``. What an interrupted run had sampled is kept and continued from.

    Inputs: "sft" (a folder with ``model``) and "oracle".
    """
    tokenizer = load_tokenizer(inputs["sft"] / "model")
    reviews = prompt_reviews(load_corpus(config.corpus), config.prompts, config.skip)
    prompts = cut_prompts(reviews, tokenizer, config.prompt_tokens, config.max_new_tokens)
    if prompts.empty:
        raise ConfigError(
            f"none of the {len(reviews)} prompt reviews has {config.prompt_tokens + SHORTEST_CONTINUATION} tokens; "
            "use fewer prompt_tokens"
        )
    path = out / "responses.parquet"
    if not path.exists():  # a part or the whole exists only when it is complete
        parts = [
            out / f"part-{start:06d}-{min(start + config.batch_size, len(prompts)):06d}.parquet"
            for start in range(0, len(prompts), config.batch_size)
        ]
        if missing := [part for part in parts if not part.exists()]:
            model, oracle = load_model(inputs["sft"] / "model"), load_oracle(inputs["oracle"])
            with bar("Responses", len(prompts)) as advance:
                for part in parts:
                    start, stop = map(int, part.stem.split("-")[1:])
                    if part in missing:
                        write_table(_responses(config, prompts.iloc[start:stop], model, tokenizer, oracle), part)
                    advance(stop - start)
        write_table(pa.concat_tables(pq.read_table(part) for part in parts), path)
    for part in out.glob("part-*.parquet"):
        part.unlink()
    table = pd.read_parquet(path)
    sampled = np.concatenate([table["reward_0"], table["reward_1"]])
    lengths = np.array([len(ids) for k in (0, 1) for ids in table[f"response_ids_{k}"]])
    return {
        "prompts": len(table),
        "skipped": len(reviews) - len(table),
        "oracle_reward": bootstrap_mean(sampled, seed=config.seed, clusters=np.tile(table["prompt_id"], 2)),
        "real_oracle_reward": bootstrap_mean(table["reward_real"], seed=config.seed),
        "length": float(lengths.mean()),
    }


def cut_prompts(
    reviews: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, max_new_tokens: int
) -> pd.DataFrame:
    """Prompts and their real continuations: prompt_id, prompt, prompt_ids, real, real_ids.

    The real continuation is the review's own, cut to ``max_new_tokens``; it has an end token only where the review
    really ends. Reviews too short to be continued are left out.
    """
    end = tokenizer.eos_token_id
    rows = []
    for review, ids in zip(reviews.itertuples(), tokenizer(list(reviews["text"]))["input_ids"], strict=True):
        ids = ids[:-1] if ids and ids[-1] == end else ids
        if len(ids) < prompt_tokens + SHORTEST_CONTINUATION:
            continue
        prompt, real = ids[:prompt_tokens], [*ids[prompt_tokens:], end][:max_new_tokens]
        rows.append((review.review_id, decode(tokenizer, prompt), prompt, decode(tokenizer, real), real))
    return pd.DataFrame(rows, columns=["prompt_id", "prompt", "prompt_ids", "real", "real_ids"])


def _responses(
    config: ResponseStage, prompts: pd.DataFrame, model: nn.Module, tokenizer: PreTrainedTokenizerBase, oracle: RewardFn
) -> pa.Table:
    columns: dict[str, Any] = {str(name): prompts[name].tolist() for name in prompts}
    ends = end_tokens(model, tokenizer)
    for k in (0, 1):
        responses = respond(
            model,
            tokenizer,
            columns["prompt_ids"],
            config,
            keys=columns["prompt_id"],
            draw=k,
            ends=ends,
            description=f"Response {k + 1} of 2",
        )[0]
        columns[f"response_ids_{k}"] = [response.ids for response in responses]
        columns[f"response_{k}"] = [response.text for response in responses]
        columns[f"reward_{k}"] = oracle(columns["prompt"], columns[f"response_{k}"])
    columns["reward_real"] = oracle(columns["prompt"], columns["real"])
    return pa.Table.from_pydict({name: columns[name] for name in RESPONSES.names}, schema=RESPONSES)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that is whole or absent."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_atomically(path, buffer.getvalue())


class PairStage(Frozen):
    """How two responses are chosen for a pair, and how its label is drawn."""

    tier: Tier
    """"high": both are sampled. "low": the better-scored sample against the review's own continuation. "medium": the
    first half of the prompts as low, the second half as high."""
    train: int = Field(ge=1)
    """Pairs to train on; the others are held out."""
    label_noise: float = Field(default=1.0, ge=0)
    """Scale of the Gumbel noise on each reward: 1 is Bradley-Terry, 0 always prefers the higher reward."""
    seed: int = 0
    seed_permutation: int = 0
    """Which prompts are held out: the same for every tier and every ``seed``."""


@operation("label_pairs/1")
def label_pairs(config: PairStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Write ``pairs.parquet``; a pair has the id of its prompt. Inputs: "responses".

    The winner is the response with the larger reward + label_noise * Gumbel noise, so that at scale 1 the first wins
    with probability sigma(r_1 - r_2). The noise depends only on (seed, prompt).

    Raises:
        ConfigError: no pair would be held out.
    """
    responses = pd.read_parquet(inputs["responses"] / "responses.parquet").sort_values("prompt_id")
    if config.train >= len(responses):
        raise ConfigError(f"train is {config.train}, but there are {len(responses)} pairs and some must be held out")
    order = rng(config.seed_permutation, "permutation").permutation(len(responses))
    half = len(responses) // 2
    rows = []
    for position, index in enumerate(order):
        row = responses.iloc[index]
        low = config.tier == "low" or (config.tier == "medium" and index < half)
        prompt = {"pair_id": row["prompt_id"], "prompt": row["prompt"], "prompt_ids": row["prompt_ids"]}
        split = "train" if position < config.train else "heldout"
        rows.append({**prompt, "split": split, **_labelled(row, low, config)})
    table = pa.Table.from_pylist(rows, schema=PAIRS)
    write_table(table, out / "pairs.parquet")
    margins = table["chosen_oracle_reward"].to_numpy() - table["rejected_oracle_reward"].to_numpy()
    # Such a pair teaches nothing. Records without one stay as they were before it was counted.
    same = sum(bool(np.array_equal(row["chosen_ids"], row["rejected_ids"])) for row in rows)
    return {
        "pairs": len(margins),
        "train": config.train,
        "mean_oracle_margin": bootstrap_mean(margins, seed=config.seed),
        "mean_absolute_oracle_margin": float(np.abs(margins).mean()),
        "flipped_share": proportion(int((margins < 0).sum()), len(margins)),
        **({"identical_sides": same} if same else {}),
    }


def _labelled(row: pd.Series[Any], low: bool, config: PairStage) -> dict[str, Any]:
    sampled = [
        {"": row[f"response_{k}"], "_ids": row[f"response_ids_{k}"], "_oracle_reward": row[f"reward_{k}"]}
        for k in (0, 1)
    ]
    first, second = ({**response, "_source": "sft"} for response in sampled)
    if low:
        if second["_oracle_reward"] > first["_oracle_reward"]:
            first = second
        real = {"": row["real"], "_ids": row["real_ids"], "_oracle_reward": row["reward_real"]}
        second = {**real, "_source": "review"}
    noise = rng(config.seed, "label", int(row["prompt_id"])).gumbel(size=2)
    scores = np.array([first["_oracle_reward"], second["_oracle_reward"]]) + config.label_noise * noise
    sides = (second, first) if scores[1] > scores[0] else (first, second)
    named = zip(("chosen", "rejected"), sides, strict=True)
    return {f"{side}{name}": value for side, one in named for name, value in one.items()}
