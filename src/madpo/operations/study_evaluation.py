"""What a policy writes: its reward, how far it went from the reference for it, and whether its text fell apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from madpo.core.config import added
from madpo.core.errors import ConfigError
from madpo.core.metrics import Metrics
from madpo.core.statistics import bootstrap_mean
from madpo.core.storage import write_atomically
from madpo.models.engine.responses import Response, divergence, respond
from madpo.models.load import load_model, load_tokenizer, merged
from madpo.operations.own_pairs import pairs_clock, prompt_contents
from madpo.operations.pair_scorer import load_scorer
from madpo.operations.responses import ends_of_responses, response_table, text_measures
from madpo.operations.settings import Drawing, EvaluationSettings
from madpo.operations.study_training import prompts_of, read_pairs, reference_model
from madpo.rewards.oracles import load_oracle
from madpo.rewards.reward_model import RewardModel
from madpo.runner.operation import operation

FIRST_DRAW = 2  # draws 0 and 1 of a prompt made the pairs


class EvaluationStage(EvaluationSettings, Drawing):
    """How responses are drawn to measure a policy; the same for every method that is compared."""

    method: str
    """Name in tables and figures."""
    tier: str
    max_new_tokens: int = Field(default=48, ge=1)
    batch_size: int = Field(default=128, ge=1, exclude=True)
    """Responses generated at once."""
    score_batch_size: int = Field(default=16, ge=1, exclude=True)
    """Responses per forward pass for the KL."""
    best_of: int | None = added(None, ge=2)
    """Responses per sample, of which the one with the highest reward counts; None is one response."""


@operation("evaluate_policy/4")
def evaluate_policy(config: EvaluationStage, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Sample responses to held-out prompts and measure them; writes ``samples.jsonl``, in which the responses at
    further temperatures have the key ``temperature``.

    Inputs: "reference" (a folder with ``model``, or a model), "oracle" or "judge" (a reward model), "pairs", and
    "policy" (a folder with ``adapter``); without it the reference itself is measured; "reward_model" for ``best_of``.
    The random numbers depend only on the seed, the prompt and the sample, so methods are compared on common ones.

    The KL of the best of n is not measured: its upper bound log n - (n - 1)/n (arXiv 2401.01879) takes its place,
    and the metric ``kl_is_a_bound`` is there.

    Raises:
        ConfigError: more prompts are asked for than are held out.
    """
    prompts = _heldout_prompts(inputs["pairs"], config.prompts)
    reference_path = reference_model(inputs)
    tokenizer, reference = load_tokenizer(reference_path), load_model(reference_path)
    policy = (
        merged(load_model(reference_path, adapter=inputs["policy"] / "adapter")) if "policy" in inputs else reference
    )
    judge = None if config.best_of is None else RewardModel.load(inputs["reward_model"])
    score = _scorer(config, inputs)
    contents = dict(zip(prompts["prompt_id"], prompt_contents(prompts), strict=True))
    ends = ends_of_responses(tokenizer, contents.values(), reference)
    asked, samples_per_prompt = prompts["prompt_ids"].tolist(), config.samples_per_prompt

    def sampled(temperature: float) -> pd.DataFrame:
        drawn = respond(
            policy,
            tokenizer,
            asked,
            config,
            keys=prompts["prompt_id"].tolist(),
            draw=FIRST_DRAW,
            samples=samples_per_prompt * (config.best_of or 1),
            ends=ends,
            description=f"{config.method}: responses",
            temperature=temperature,
        )
        if judge is not None:
            drawn = [best_responses(judge, asked, drawn[k::samples_per_prompt]) for k in range(samples_per_prompt)]
        found = response_table(prompts, drawn)
        asked_prompts = [contents[prompt] for prompt in found["prompt_id"]]
        return found.assign(oracle_reward=score(asked_prompts, list(found["response"])))

    samples = sampled(config.temperature)
    samples["kl"], logps = _kl_and_logps(
        config, policy, reference, asked * samples_per_prompt, samples.pop("ids").tolist(), tokenizer.pad_token_id
    )
    metrics = _metrics(samples, config.seed)
    metrics["reference_perplexity"] = math.exp(-logps.sum() / samples["tokens"].sum())
    rows = samples.to_dict("records")
    for temperature in config.temperatures:
        if temperature != config.temperature:
            other = sampled(temperature).drop(columns="ids")
            rows += other.assign(temperature=temperature).to_dict("records")
            found = bootstrap_mean(other["oracle_reward"], seed=config.seed, clusters=other["prompt_id"])
            metrics[f"oracle_reward_at_{temperature:g}"] = found
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(out / "samples.jsonl", "".join(lines))
    return metrics if config.best_of is None else {**metrics, "kl_is_a_bound": 1}


def _scorer(
    config: EvaluationStage, inputs: Mapping[str, Path]
) -> Callable[[Sequence[Any], Sequence[str]], NDArray[np.float64]]:
    """Rewards of responses to prompts: by the judge of the user's own pairs, or by the oracle."""
    if "judge" not in inputs:
        return load_oracle(inputs["oracle"])
    clock = pairs_clock(inputs["pairs"])
    return load_scorer(inputs["judge"], batch_size=config.score_batch_size, clock=clock).score_responses


def _kl_and_logps(
    config: EvaluationStage,
    policy: nn.Module,
    reference: nn.Module,
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    pad: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per response, the KL to the reference (for the best of n its bound) and the log-probability under it, nats."""
    how: dict[str, Any] = {"pad": pad, "batch_size": config.score_batch_size, "description": f"{config.method}: KL"}
    moved = None if policy is reference else policy
    _, kl, logps = divergence(moved, reference, prompt_ids, response_ids, **how)
    if config.best_of is not None:
        kl += math.log(config.best_of) - (config.best_of - 1) / config.best_of
    if moved is not None and config.samples_per_prompt == 1:  # its records have the last digits of a pass of its own
        logps = divergence(None, reference, prompt_ids, response_ids, **how).ref_logps
    return kl, logps


def best_responses(
    judge: RewardModel, prompt_ids: Sequence[Sequence[int]], drawn: Sequence[Sequence[Response]]
) -> list[Response]:
    """Per prompt, of its responses the one with the highest reward; of equal ones the first.

    Args:
        drawn: [n][prompts], n responses to every prompt.
    """
    rewards = [judge.score_responses(prompt_ids, [response.ids for response in responses]) for responses in drawn]
    return [drawn[k][row] for row, k in enumerate(np.argmax(rewards, axis=0))]


def _heldout_prompts(folder: Path, count: int | None) -> pd.DataFrame:
    pairs = read_pairs(folder, "heldout")
    heldout = pairs.assign(prompt_id=prompts_of(pairs)).drop_duplicates("prompt_id")
    if count is not None and count > len(heldout):
        raise ConfigError(f"prompts is {count}, but only {len(heldout)} prompts are held out; ask for fewer")
    heldout = heldout.iloc[:count]
    lists = [[int(i) for i in ids] for ids in heldout["prompt_ids"]]
    return heldout.assign(prompt_ids=pd.Series(lists, index=heldout.index, dtype=object))


def _metrics(samples: pd.DataFrame, seed: int) -> Metrics:
    metrics: Metrics = {
        name: bootstrap_mean(samples[column], seed=seed, clusters=samples["prompt_id"])
        for name, column in (("oracle_reward", "oracle_reward"), ("kl", "kl"), ("length", "tokens"))
    }
    return {**metrics, "prompts": int(samples["prompt_id"].nunique()), **text_measures(samples)}
