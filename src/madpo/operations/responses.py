"""Responses to prompts as a table, and what is measured of their texts: for ``madpo evaluate`` and for studies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from madpo.data.messages import Text, answered
from madpo.data.rows import Pair
from madpo.data.tokens import Encoder
from madpo.models.engine.responses import Response, end_tokens


def ends_of_responses(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Text], *models: nn.Module) -> set[int]:
    """The tokens that end a response: those of the models, and where a prompt is messages, the chat template's.

    Raises:
        ConfigError: as :func:`madpo.models.engine.responses.end_tokens`.
    """
    ends = {token for model in models for token in end_tokens(model, tokenizer)}
    if any(isinstance(prompt, list) for prompt in prompts):
        ends.add(Encoder(tokenizer).end_id())
    return ends


def response_table(prompts: pd.DataFrame, drawn: Iterable[Sequence[Response]]) -> pd.DataFrame:
    """A line per response, sample after sample: prompt_id, sample, prompt, response, tokens, ended, ids.

    Args:
        prompts: prompt_id and prompt.
        drawn: samples, each with one response per prompt.
    """
    rows = [
        {"prompt_id": key, "sample": sample, "prompt": prompt, "response": response.text}
        | {"tokens": len(response.ids), "ended": response.ended, "ids": response.ids}
        for sample, responses in enumerate(drawn)
        for key, prompt, response in zip(prompts["prompt_id"], prompts["prompt"], responses, strict=True)
    ]
    return pd.DataFrame(rows)


def text_measures(responses: pd.DataFrame) -> dict[str, float]:
    """Share of different words and of different pairs of words, and of responses that ended before the limit."""
    texts = responses["response"].tolist()
    found = {f"distinct_{n}": distinct(texts, n) for n in (1, 2)}
    return {**found, "ended_share": float(responses["ended"].mean())}


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams among all n-grams of words in ``texts``; 0 where there is none.

    It falls with the number of texts, so it compares only equal numbers of them.
    """
    words = [text.lower().split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def response_pairs(prompts: Iterable[Text], first: Iterable[str], second: Iterable[str]) -> list[Pair]:
    """Two responses to each prompt, as the chosen and the rejected side; messages are answered by a message."""
    return [
        Pair(i, i, prompt, answered(prompt, a), answered(prompt, b), {})
        for i, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True))
    ]
