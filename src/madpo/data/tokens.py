"""Text -> token ids: where the prompt ends, which token ends a completion, and what truncation does to a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from madpo.data.messages import Message, Text
from madpo.data.rows import Pair, shared_prefix
from madpo.errors import ConfigError, DataError, first_line

Truncation = Literal["drop", "cut", "refuse"]
TRUNCATIONS: tuple[Truncation, ...] = ("drop", "cut", "refuse")


@dataclass(slots=True)
class Encoded:
    """A pair in token ids; prompt + chosen and prompt + rejected are the training sequences.

    Attributes:
        prompt_ids, chosen_ids, rejected_ids: each completion ends with exactly one end token (unless it was cut).
        flags: kinds of findings with details.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    flags: list[tuple[str, str]]

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def as_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer as it is, or loaded from a name or folder.

    Raises:
        ConfigError, StorageError: it cannot be loaded.
    """
    if not isinstance(tokenizer, str) and not hasattr(tokenizer, "__fspath__"):
        return tokenizer
    from madpo.places import light_tokenizer, refuse_unreachable, resolve_model

    # A folder may hold a tokenizer and no model.
    alone = (Path(tokenizer).expanduser() / "tokenizer_config.json").is_file()
    place = Path(tokenizer).expanduser() if alone else resolve_model(str(tokenizer))
    if isinstance(place, str):
        refuse_unreachable(place)
    return light_tokenizer(place)


class Encoder:
    """Tokenises pairs the way TRL's DPO does, and says where that goes wrong, for every pair."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end token, so completions would never end; set eos_token (tokenizer_config.json)"
            )
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        probe = tokenizer("a")["input_ids"]
        # Some tokenizers close every text with their end token, a prompt too; that one is taken off.
        self.closes_texts = probe[-1:] == [self.eos] and len(probe) > 1
        self._turn_end: int | None = None

    def encode(self, pairs: Sequence[Pair], name: str, unit: str) -> list[Encoded | DataError]:
        """Token ids of each pair; a DataError in place of a pair that the chat template refuses."""
        texts: list[str] = []
        refused: dict[int, DataError] = {}
        for i, pair in enumerate(pairs):
            try:
                texts.extend(self._texts(pair))
            except template_refusals() as error:
                refused[i] = _refused(f"{name}, {unit} {pair.number}", error)
        conversational = bool(pairs) and isinstance(pairs[0].prompt, list)
        ids = iter(self._ids(texts, special=not conversational))
        return [
            refused[i] if i in refused else self._pair(pair, next(ids), next(ids), next(ids))
            for i, pair in enumerate(pairs)
        ]

    def prompt_ids(self, prompt: Text, place: str) -> list[int]:
        """Token ids of a prompt alone, as a response to it is generated.

        Raises:
            DataError: the chat template refuses it, at ``place``.
        """
        if isinstance(prompt, str):
            ids = self._ids([prompt], special=True)[0]
            return ids[:-1] if self.closes_texts and ids[-1:] == [self.eos] else ids
        try:
            text = self._render(prompt, add_generation_prompt=True)
        except template_refusals() as error:
            raise _refused(place, error) from None
        return self._ids([text], special=False)[0]

    def end_id(self) -> int:
        """The token that ends an assistant's turn in the chat template; the end token where it writes none."""
        if self._turn_end is None:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            try:
                ids = self._ids([self._render(probe)], special=False)[0]
            except template_refusals():
                ids = []
            # Not all_special_ids alone, which lacks what only tokenizer.json calls special, as Gemma's <end_of_turn>.
            added = self.tokenizer.added_tokens_decoder
            special = {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
            # Only white space may follow the end token in the template.
            tail = next((t for t in reversed(ids) if self.tokenizer.decode([t]).strip()), self.eos)
            self._turn_end = tail if tail in special else self.eos
        return self._turn_end

    def _texts(self, pair: Pair) -> tuple[str, str, str]:
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        if isinstance(prompt, list):
            assert isinstance(chosen, list)
            assert isinstance(rejected, list)
            start = self._render(prompt, add_generation_prompt=True)
            return start, self._render(prompt + chosen), self._render(prompt + rejected)
        assert isinstance(chosen, str)
        assert isinstance(rejected, str)
        return prompt, prompt + chosen, prompt + rejected

    def _render(self, messages: list[Message], **options: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"the data holds messages but the tokenizer{_of(self.tokenizer)} has no chat template; take an "
                "instruction-tuned model's tokenizer or set its chat_template (chat_template.jinja beside the model)"
            )
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _pair(self, pair: Pair, prompt: list[int], chosen: list[int], rejected: list[int]) -> Encoded:
        conversational = isinstance(pair.prompt, list)
        if self.closes_texts and not conversational and prompt[-1:] == [self.eos]:
            prompt = prompt[:-1]
        flags: list[tuple[str, str]] = []
        shared = min(shared_prefix(prompt, chosen), shared_prefix(prompt, rejected))
        if shared < len(prompt):
            flags.append(("boundary", f"the prompt ends in {self.tokenizer.decode(prompt[shared:])[:40]!r}"))
        ends = {self.eos, self.end_id()} if conversational else {self.eos}
        sides = []
        for name, ids in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
            ids, problem = self._ended(ids, ends, conversational)
            sides.append(ids)
            # A completion of several messages has an end token after each of them.
            if problem and not (problem == "inner_end" and conversational and len(getattr(pair, name)) > 1):
                flags.append((problem, name))
        return Encoded(prompt[:shared], sides[0], sides[1], flags)

    def _ended(self, ids: list[int], ends: set[int], conversational: bool) -> tuple[list[int], str]:
        """The completion with exactly one end token, and the finding on the way."""
        last = len(ids)
        while last and ids[last - 1] not in ends:
            last -= 1
        # Templates may write a line break after the end token: text that no model has to learn.
        if last and not self.tokenizer.decode(ids[last:]).strip():
            body = last
            while body and ids[body - 1] in ends:
                body -= 1
            closing = ids[body : body + 1]
            problem = "doubled_end" if last - body > 1 else ""
        else:
            body, closing = len(ids), [self.end_id() if conversational else self.eos]
            problem = "missing_end" if conversational else ""
        if not problem and any(token in ends for token in ids[:body]):
            problem = "inner_end"
        return ids[:body] + closing, problem


def truncated(pair: Encoded, max_length: int, policy: Truncation) -> Encoded | None:
    """The pair within ``max_length`` tokens: as it is, with cut completions, or None if it has to go.

    A cut completion loses its end token: the model must not learn to stop there. A pair goes if its prompt leaves
    no room, or if the cut makes both completions the same. "refuse" is the caller's to raise.
    """
    if pair.length <= max_length:
        return pair
    room = max_length - len(pair.prompt_ids)
    if policy != "cut" or room < 1:
        return None
    chosen, rejected = pair.chosen_ids[:room], pair.rejected_ids[:room]
    return None if chosen == rejected else Encoded(pair.prompt_ids, chosen, rejected, pair.flags)


def check_options(tokenizer: object, max_length: int | None, truncation: str) -> None:
    """Refuse combinations that cannot work.

    Raises:
        ConfigError: with the option, its value and what is allowed.
    """
    if truncation not in TRUNCATIONS:
        raise ConfigError(f"truncation is {truncation!r}, but must be one of {', '.join(map(repr, TRUNCATIONS))}")
    if max_length is not None and tokenizer is None:
        raise ConfigError("max_length counts tokens, so it needs a tokenizer; give one or leave max_length out")
    if max_length is not None and (isinstance(max_length, bool) or max_length < 2):
        raise ConfigError(
            f"max_length is {max_length}, but must be at least 2 (one token each of prompt and completion)"
        )


def _of(tokenizer: Any) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return f" of {name}" if name else ""


def _refused(place: str, error: Exception) -> DataError:
    reason = first_line(error, 160)
    return DataError(
        f"{place}: the chat template refuses the conversation ({reason}); correct the roles or use another template"
    )


def template_refusals() -> tuple[type[Exception], ...]:
    """What a chat template raises for a conversation that it does not take."""
    from jinja2 import TemplateError

    return (TemplateError, TypeError, KeyError)


def text_length(text: Text) -> int:
    """Characters."""
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)
