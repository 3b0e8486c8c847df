"""What commands that generate responses share: the tokens that end them, and pairs of two responses to score."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedTokenizerBase

from madpo.data.messages import Text, answered
from madpo.data.rows import Pair
from madpo.data.tokens import Encoder
from madpo.models.engine.responses import end_tokens


def ends_of_responses(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Text], *models: nn.Module) -> set[int]:
    """The tokens that end a response: those of the models, and where a prompt is messages, the chat template's.

    Raises:
        ConfigError: as :func:`madpo.models.engine.responses.end_tokens`.
    """
    ends = {token for model in models for token in end_tokens(model, tokenizer)}
    if any(isinstance(prompt, list) for prompt in prompts):
        ends.add(Encoder(tokenizer).end_id())
    return ends


def response_pairs(prompts: Iterable[Text], first: Iterable[str], second: Iterable[str]) -> list[Pair]:
    """Two responses to each prompt, as the chosen and the rejected side; messages are answered by a message."""
    return [
        Pair(i, i, prompt, answered(prompt, a), answered(prompt, b), {})
        for i, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True))
    ]
