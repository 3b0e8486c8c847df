"""The reward of samples at equal KL: a policy's adapter made weaker and stronger, and the reward read off at one KL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from madpo.data.folds import prompt_key
from madpo.data.messages import answered
from madpo.data.rows import Pair
from madpo.data.tokens import Encoder
from madpo.models.engine.responses import Response, divergence, end_tokens, respond
from madpo.operations.inputs import Row
from madpo.operations.pair_scorer import PairScorer
from madpo.operations.tuning.settings import RewardCriterion

Floats = NDArray[np.float64]


class RewardCurve(NamedTuple):
    """One fold's policy: rewards and KL per prompt at rising strengths of its adapter.

    Attributes:
        strengths: (points,); 0, the reference, comes first.
        rewards: (points, prompts), in the reward model's unit.
        kl: (points, prompts), nats per response.
    """

    strengths: Floats
    rewards: Floats
    kl: Floats

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> RewardCurve:
        """From the arrays of :meth:`tensors`."""
        return cls(*(np.asarray(tensors[f"curve_{name}"], dtype=np.float64) for name in cls._fields))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, for a file."""
        return {f"curve_{name}": np.ascontiguousarray(value) for name, value in self._asdict().items()}

    def at(self, kl: float) -> Floats | None:
        """Reward per prompt at this KL, between the two strengths around it; None if no strength reaches it."""
        means = self.kl.mean(-1)
        above = np.flatnonzero(means >= kl)
        if not len(above):
            return None
        right = int(above[0])
        share = (kl - means[right - 1]) / (means[right] - means[right - 1])
        found: Floats = (1 - share) * self.rewards[right - 1] + share * self.rewards[right]
        return found


def reward_curve(
    policy: PeftModel,
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scorer: PairScorer,
    rows: Sequence[Row],
    config: RewardCriterion,
) -> RewardCurve:
    """Sample at rising strengths until the KL reaches ``config.kl``; the same random numbers at each.

    Args:
        rows: held-out pairs; each of their first ``config.prompts`` different prompts gets one response a strength.
    """
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(prompt_key(row["prompt"]), row)
    chosen = list(first.values())[: config.prompts]
    prompt_ids = [list(row["prompt_ids"]) for row in chosen]
    ends = end_tokens(reference, tokenizer)
    if isinstance(chosen[0]["prompt"], list):
        ends.add(Encoder(tokenizer).end_id())

    def written(model: nn.Module, name: str) -> list[Response]:
        keys = [int(row["pair_id"]) for row in chosen]
        how = f"{name}: responses"
        return respond(model, tokenizer, prompt_ids, config, keys=keys, draw=0, ends=ends, description=how)[0]

    base = written(reference, "Reference")
    points: list[tuple[float, Floats, Floats]] = []
    for strength in config.strengths:
        with strengthened(policy, strength):
            said = written(policy, f"Adapter at {strength:g}")
            ids = [response.ids for response in said]
            size = config.score_batch_size
            kl = divergence(policy, reference, prompt_ids, ids, pad=tokenizer.pad_token_id, batch_size=size)[1]
        pairs = [
            Pair(i, i, row["prompt"], answered(row["prompt"], a.text), answered(row["prompt"], b.text), {})
            for i, (row, a, b) in enumerate(zip(chosen, said, base, strict=True))
        ]
        mine, theirs = scorer.score_pairs(pairs, "held-out prompts", "row")
        if not points:
            points.append((0.0, theirs, np.zeros(len(chosen))))
        points.append((strength, mine, kl))
        if kl.mean() >= config.kl:
            break
    strengths, rewards, kls = zip(*points, strict=True)
    return RewardCurve(np.array(strengths), np.stack(rewards), np.stack(kls))


@contextmanager
def strengthened(model: PeftModel, strength: float) -> Iterator[None]:
    """The adapter's update times ``strength``; 1 is the policy as trained, 0 its reference."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    scaling = [dict(layer.scaling) for layer in layers]
    try:
        for layer, before in zip(layers, scaling, strict=True):
            layer.scaling.update({name: value * strength for name, value in before.items()})
        yield
    finally:
        for layer, before in zip(layers, scaling, strict=True):
            layer.scaling.update(before)
