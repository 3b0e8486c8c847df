"""Text -> token ids: where the prompt ends, which token ends a completion, and what truncation does to a pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from madpo.core.errors import ConfigError, DataError, RowError, located
from madpo.core.storage import expanded
from madpo.data.conversation import columns_of, unshown
from madpo.data.messages import Text, content_of, shared_prefix
from madpo.data.raw import At
from madpo.data.rows import Pair
from madpo.data.templates import Clock, left_out, render
from madpo.models.hyperparameters import Truncation
from madpo.models.loading import loading
from madpo.models.vocabulary import refuse_unknown

NO_PROMPT = (
    "chosen and rejected share no message at their beginning, so there is no prompt for the chat template; add a "
    "column prompt, or begin both sides with the same messages"
)


@dataclass(slots=True)
class Encoded:
    """A pair in token ids; prompt + chosen and prompt + rejected are the training sequences.

    Each completion ends with exactly one end token, unless it was cut. ``flags`` are kinds of findings with details.
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
    """A tokenizer as it is, or loaded from a name or folder. Raises ConfigError, StorageError: it cannot be loaded."""
    if not isinstance(tokenizer, str) and not hasattr(tokenizer, "__fspath__"):
        return tokenizer
    from madpo.models.locate import light_tokenizer, refuse_unreachable, resolve_model

    # A folder may hold a tokenizer and no model.
    own = (expanded(tokenizer) / "tokenizer_config.json").is_file()
    place = expanded(tokenizer) if own else resolve_model(str(tokenizer))
    if isinstance(place, str):
        refuse_unreachable(place)
    return light_tokenizer(place)


class Encoder:
    """Tokenises pairs the way TRL's DPO does, and says where that goes wrong, for every pair.

    ``clock`` is the date that the chat template prints; None is now. Token ids that the model has no row for are
    refused where the tokenizer was loaded with its model (:func:`madpo.models.locate.load_tokenizer`).
    """

    def __init__(self, tokenizer: Any, clock: Clock | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end token, so completions would never end; set eos_token (tokenizer_config.json)"
            )
        self.tokenizer = tokenizer
        self.clock = clock or Clock()
        self.eos: int = tokenizer.eos_token_id
        self.rows: int | None = getattr(tokenizer, "embedding_rows", None)
        (probe,) = self._ids(["a"], special=True)
        # Some tokenizers close every text with their end token, a prompt too; that one is taken off.
        self.closes_texts = probe[-1:] == [self.eos] and len(probe) > 1
        self._turn_end: int | None = None

    def encode(self, pairs: Sequence[Pair], at: At) -> list[Encoded | DataError]:
        """Token ids of each pair; a DataError in place of a pair that the chat template refuses.

        Raises ConfigError: there is no chat template for messages, or one that can render none.
        """
        texts: list[str] = []
        noted: list[list[tuple[str, str]] | DataError] = []  # for each pair its findings, or why it is refused
        for pair in pairs:
            try:
                with located(at(pair.number)):
                    rendered = self._texts(pair)
                    noted.append(list(self._left_out(pair, *rendered[1:])))
                texts.extend(rendered)
            except DataError as error:
                noted.append(error)
        ids = iter(self._ids(texts, special=isinstance(pairs[0].prompt, str))) if pairs else iter(())
        found: list[Encoded | DataError] = []
        for pair, findings in zip(pairs, noted, strict=True):
            try:
                if isinstance(findings, DataError):
                    raise findings
                encoded = self._pair(pair, next(ids), next(ids), next(ids))
                with located(at(pair.number)):
                    self._refuse_unknown([*encoded.prompt_ids, *encoded.chosen_ids, *encoded.rejected_ids])
                encoded.flags.extend(dict.fromkeys(findings))
                found.append(encoded)
            except DataError as error:
                found.append(error)
        return found

    def prompt_ids(self, prompt: Text) -> list[int]:
        """Token ids of a prompt without a completion, as a response to it is generated.

        Raises RowError, ConfigError: the chat template refuses it.
        """
        if isinstance(prompt, str):
            ids = self._ids([prompt], special=True)[0]
            ids = ids[:-1] if self.closes_texts and ids[-1:] == [self.eos] else ids
        else:
            text = render(self.tokenizer, prompt, self.clock, add_generation_prompt=True)
            ids = self._ids([text], special=False)[0]
        self._refuse_unknown(ids)
        return ids

    def end_id(self) -> int:
        """The token that ends an assistant's turn in the chat template; the end token where it writes none."""
        if self._turn_end is None:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            try:
                with located("a conversation of two messages"):
                    ids = self._ids([render(self.tokenizer, probe, self.clock)], special=False)[0]
            except DataError:
                ids = []
            # all_special_ids lacks what only tokenizer.json calls special, such as Gemma's <end_of_turn>.
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
            if not prompt:
                raise RowError(NO_PROMPT)
            start = render(self.tokenizer, prompt, self.clock, add_generation_prompt=True)
            whole = [render(self.tokenizer, prompt + side, self.clock) for side in (chosen, rejected)]
            return start, whole[0], whole[1]
        assert isinstance(chosen, str)
        assert isinstance(rejected, str)
        return prompt, prompt + chosen, prompt + rejected

    def _left_out(self, pair: Pair, chosen: str, rejected: str) -> Iterator[tuple[str, str]]:
        """Findings about what the chat template does not show of the messages.

        Raises RowError: it leaves out tools, tool calls or the reasoning of a completion.
        """
        prompt = pair.prompt
        if not isinstance(prompt, list):
            return
        assert isinstance(pair.chosen, list)
        assert isinstance(pair.rejected, list)
        sides = {"chosen": (pair.chosen, chosen), "rejected": (pair.rejected, rejected)}
        for name, (side, text) in sides.items():
            for message in left_out([*prompt, *side], text):
                where = name if any(message is one for one in side) else "prompt"
                yield "dropped_content", f"{message['role']} of {where}: {content_of(message)[:40]!r}"
        if columns_of(prompt) or any(
            len(message) > 2 for part in (prompt, pair.chosen, pair.rejected) for message in part
        ):
            yield from unshown(lambda messages: render(self.tokenizer, messages, self.clock), prompt, sides)

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        with loading(getattr(self.tokenizer, "name_or_path", ""), "tokenizer"):
            ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _refuse_unknown(self, ids: Sequence[int]) -> None:
        if self.rows is not None:
            refuse_unknown(ids, self.rows, tokenizer=self.tokenizer)

    def _pair(self, pair: Pair, prompt: list[int], chosen: list[int], rejected: list[int]) -> Encoded:
        conversational = isinstance(pair.prompt, list)
        if self.closes_texts and not conversational and prompt[-1:] == [self.eos]:
            prompt = prompt[:-1]
        flags: list[tuple[str, str]] = []
        if [self.tokenizer.bos_token_id] * 2 in (chosen[:2], rejected[:2]):
            flags.append(("doubled_start", ""))
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
        if sides[0] == sides[1] and pair.chosen != pair.rejected:
            flags.append(("identical_tokens", ""))
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
    """Refuse combinations that cannot work. Raises ConfigError."""
    if truncation not in (known := get_args(Truncation)):
        raise ConfigError(f"truncation is {truncation!r}, but must be one of {', '.join(map(repr, known))}")
    if max_length is not None and tokenizer is None:
        raise ConfigError("max_length counts tokens, so it needs a tokenizer; give one or leave max_length out")
    if max_length is not None and (isinstance(max_length, bool) or max_length < 2):
        raise ConfigError(f"max_length is {max_length}, but must be at least 2 (a token each of prompt and completion)")


def text_length(text: Text) -> int:
    """Characters."""
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)
