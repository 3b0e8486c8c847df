"""What a policy writes: its reward, how far it went from the reference for it, and whether its text fell apart."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import nn

from madpo.config import Frozen
from madpo.errors import ConfigError
from madpo.generation import generate
from madpo.logprobs import completion_kl, completion_logps
from madpo.models import load_model, load_tokenizer
from madpo.preferences import Tier, decode, end_tokens
from madpo.records import Metrics
from madpo.rewards import load_oracle, padded_batches
from madpo.statistics import bootstrap_mean
from madpo.storage import write_atomically

FIRST_DRAW = 2  # draws 0 and 1 of a prompt made the pairs


class EvaluationStage(Frozen):
    """How responses are drawn to measure a policy; the same for every method that is compared."""

    method: str
    """Name in tables and figures."""
    tier: Tier
    prompts: int | None = Field(default=None, ge=1)
    """The first so many held-out prompts; None is all of them."""
    samples_per_prompt: int = Field(default=1, ge=1)
    max_new_tokens: int = Field(default=48, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    """At 1 (and top_p 1) the KL is that of the policy; elsewhere it is taken along another text than its own."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0
    batch_size: int = Field(default=128, ge=1, exclude=True)
    """Prompts generated for at once."""
    score_batch_size: int = Field(default=16, ge=1, exclude=True)
    """Responses per forward pass for the KL."""


def evaluate_policy(config: EvaluationStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Sample responses to held-out prompts and measure them; writes ``samples.jsonl``.

    Inputs: "reference" (a folder with ``model``), "oracle", "pairs", and "policy" (a folder with ``adapter``); without
    it the reference itself is measured. The random numbers depend on the seed, the prompt and the sample alone, so
    methods are compared on common ones.

    Raises:
        ConfigError: more prompts are asked for than are held out.
    """
    prompts = _heldout_prompts(inputs["pairs"], config.prompts)
    place = inputs["reference"] / "model"
    tokenizer, reference = load_tokenizer(place), load_model(place)
    policy = load_model(place, adapter=inputs["policy"] / "adapter") if "policy" in inputs else reference
    ends = end_tokens(reference, tokenizer)
    rows: list[dict[str, Any]] = []
    sequences: list[tuple[list[int], list[int]]] = []
    for sample in range(config.samples_per_prompt):
        responses = generate(
            policy,
            prompts["prompt_ids"].tolist(),
            keys=prompts["pair_id"].tolist(),
            draw=FIRST_DRAW + sample,
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
            eos_token_ids=ends,
            temperature=config.temperature,
            top_p=config.top_p,
            batch_size=config.batch_size,
            description=f"{config.method}: responses",
        )
        for prompt_id, prompt, prompt_ids, ids in zip(
            prompts["pair_id"], prompts["prompt"], prompts["prompt_ids"], responses, strict=True
        ):
            sequences.append((prompt_ids, ids))
            response = {
                "prompt_id": int(prompt_id),
                "sample": sample,
                "prompt": prompt,
                "response": decode(tokenizer, ids),
            }
            rows.append({**response, "tokens": len(ids), "ended": ids[-1] in ends})
    samples = pd.DataFrame(rows)
    samples["oracle_reward"] = load_oracle(inputs["oracle"])(list(samples["prompt"]), list(samples["response"]))
    logps, samples["kl"] = _against_reference(policy, reference, sequences, tokenizer.pad_token_id, config)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in samples.to_dict("records"))
    write_atomically(out / "samples.jsonl", "".join(lines))
    return {**_metrics(samples, config.seed), "reference_perplexity": math.exp(-logps.sum() / samples["tokens"].sum())}


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams among all n-grams of words in ``texts``; 0 where there is none.

    It falls with the number of texts, so it compares only equal numbers of them.
    """
    words = [text.lower().split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _heldout_prompts(folder: Path, count: int | None) -> pd.DataFrame:
    pairs = pd.read_parquet(folder / "pairs.parquet", columns=["pair_id", "split", "prompt", "prompt_ids"])
    heldout = pairs[pairs["split"] == "heldout"]
    if count is not None and count > len(heldout):
        raise ConfigError(f"prompts is {count}, but only {len(heldout)} pairs are held out; ask for fewer")
    heldout = heldout.iloc[:count]
    lists = [[int(i) for i in ids] for ids in heldout["prompt_ids"]]
    return heldout.assign(prompt_ids=pd.Series(lists, index=heldout.index, dtype=object))


def _against_reference(
    policy: nn.Module,
    reference: nn.Module,
    sequences: Sequence[tuple[list[int], list[int]]],
    pad: int,
    config: EvaluationStage,
) -> tuple[np.ndarray, np.ndarray]:
    """Per response, in nats and summed: log-probability under the reference, KL(policy || reference)."""
    logps, kl = np.zeros(len(sequences)), np.zeros(len(sequences))
    whole = [[*prompt, *response] for prompt, response in sequences]
    device = next(reference.parameters()).device
    for rows, ids, mask in padded_batches(whole, config.score_batch_size, pad, device, f"{config.method}: KL"):
        completion = mask.clone()
        for i, row in enumerate(rows):
            completion[i, : len(sequences[row][0])] = 0
        with torch.no_grad():
            logps[rows] = completion_logps(reference, ids, mask, completion).logps.double().cpu().numpy()
        if policy is not reference:
            kl[rows] = completion_kl(policy, reference, ids, mask, completion)[1].double().cpu().numpy()
    return logps, kl


def _metrics(samples: pd.DataFrame, seed: int) -> Metrics:
    metrics: Metrics = {
        name: bootstrap_mean(samples[column], seed=seed, clusters=samples["prompt_id"])
        for name, column in (("oracle_reward", "oracle_reward"), ("kl", "kl"), ("length", "tokens"))
    }
    responses = list(samples["response"])
    return {
        **metrics,
        "prompts": int(samples["prompt_id"].nunique()),
        "distinct_1": distinct(responses, 1),
        "distinct_2": distinct(responses, 2),
        "ended_share": float(samples["ended"].mean()),
    }
