"""One raw row -> one pair: prompt, chosen and rejected as text or messages, with the numbers of the row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from madpo.core.columns import MARGIN, NUMBERS, REFERENCE_COLUMNS, SCORES
from madpo.core.errors import RowError
from madpo.data.conversation import Conversation, columns_of
from madpo.data.layouts import listed_columns
from madpo.data.messages import (
    SYSTEM_ROLES,
    TRANSCRIPT,
    Message,
    Text,
    as_text,
    contents,
    is_silent,
    said,
    shared_prefix,
)
from madpo.data.prompts import KNOWN, PromptColumns, read_prompt, refuse_lost_context
from madpo.data.raw import COLUMNS, as_number, described, lacks, null, surplus

# Our name first, then what known data sets call it; the report says which name was read. Those of the prompt are in
# madpo.data.prompts, and where the completions are called otherwise, in madpo.data.layouts.
ALIASES: dict[str, tuple[str, ...]] = {name: (name,) for name in ("pair_id", "chosen", "rejected")} | NUMBERS
WANTED = (*{alias for names in ALIASES.values() for alias in names}, *KNOWN, *COLUMNS, "margin")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_MESSAGES = re.compile(r"""\s*(?:\[\s*)?\{\s*["'](?:role|content|from|value)["']\s*:""")
_MISSING = ("nan", "NaN", "None", "null", "<NA>", "NaT")
LONG = 1_000_000  # characters
# Who speaks in transcripts, and how the templates of known models begin a turn of the user.
_SPEAKERS = (*((user, "assistant:") for user in ("human:", "user:", "prompter:")), ("instruction:", "response:"))
_MARKUP = (
    *("<|im_start|>user", "<|start_header_id|>user", "<|user|>", "<|prompter|>", "<|User|>"),
    *("<\uff5cUser\uff5c>", "<start_of_turn>user", "[INST]"),
)


@dataclass(slots=True)
class Pair:
    """A preference pair as training takes it.

    Attributes:
        pair_id: the data set's own, else the index of the row from 0.
        number: line or row in the source, for messages.
        prompt, chosen, rejected: text, or messages; a prompt of messages is a ``Conversation``.
        numbers: the numeric columns that the data set has, finite.
        flags: kinds of findings (``findings.KINDS``), each with a detail.
        strength: how strongly chosen is preferred, where the data set's layout has a measure of its own.
    """

    pair_id: int
    number: int
    prompt: Text
    chosen: Text
    rejected: Text
    numbers: dict[str, float]
    flags: list[tuple[str, str]] = field(default_factory=list)
    strength: float | None = None

    @property
    def score_difference(self) -> float | None:
        """Score of the chosen side minus that of the rejected one; None where the data have no scores."""
        chosen, rejected = map(self.numbers.get, SCORES)
        return None if chosen is None or rejected is None else chosen - rejected

    def row(self) -> dict[str, Any]:
        """The pair as a flat row: pair_id, prompt, chosen, rejected, the numbers, and what the chat template reads."""
        row = {"pair_id": self.pair_id, "prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return row | self.numbers | columns_of(self.prompt)


@dataclass(frozen=True)
class Columns:
    """Which of the data set's names is read as what."""

    read_as: Mapping[str, str]
    prompt: PromptColumns
    unpaired: tuple[str, ...] = ()
    """Scores and reference log-probabilities of one side without the other's, which nothing reads."""

    @classmethod
    def found_in(cls, names: Iterable[str]) -> Columns:
        """Find our columns among ``names``.

        Raises RowError: chosen or rejected is missing, or there is a column "margin".
        """
        names = [str(n) for n in names]
        if "margin" in names:
            raise RowError(
                "rename the column 'margin' to 'reward_margin': TRL's RewardTrainer subtracts a column "
                "named margin inside its loss; or give --columns.reward_margin margin, or --columns.ignore margin"
            )
        read_as = {}
        for ours, aliases in ALIASES.items():
            theirs = next((alias for alias in aliases if alias in names), None)
            if theirs is not None:
                read_as[ours] = theirs
        prompt = PromptColumns.found_in(names)
        for ours in ("chosen", "rejected"):
            if ours not in read_as:
                raise RowError(f"has no column {ours!r} (found {listed_columns(names)}); add it, or name its column")
        given = ({*pair} & read_as.keys() for pair in (SCORES, REFERENCE_COLUMNS))
        unpaired = {name for sides in given if len(sides) == 1 for name in sides}
        kept = {ours: theirs for ours, theirs in read_as.items() if ours not in unpaired}
        return cls(kept, prompt, tuple(read_as[name] for name in unpaired))

    @property
    def numbers(self) -> tuple[str, ...]:
        """The numeric columns that the data set has, by our names."""
        return tuple(name for name in NUMBERS if name in self.read_as)


class Reader:
    """Parses rows into pairs; every row must have the form (text or messages) of the first valid one."""

    def __init__(self, columns: Columns, *, from_text: bool = False, turns: bool = False) -> None:
        """``from_text``: numbers come as text (CSV), not as numbers. ``turns``: text is read as messages, because the
        user says so or some row has turns before its prompt."""
        self.columns = columns
        self.from_text = from_text
        self.turns = turns
        self.conversational: bool | None = None
        self._prompts: dict[tuple[str, ...], PromptColumns] = {}

    def pair(
        self,
        raw: Mapping[str, Any],
        number: int,
        index: int,
        flags: Sequence[tuple[str, str]] = (),
    ) -> Pair:
        """The pair in a row; ``index`` is its pair_id where the row has none, ``flags`` what is known of it. Raises
        RowError.
        """
        if "margin" in raw:
            Columns.found_in(raw)
        values = {}
        for ours, theirs in self.columns.read_as.items():
            if (value := raw.get(theirs)) is None:
                raise null(theirs) if theirs in raw else lacks(theirs)
            values[ours] = value
        for name in (*NUMBERS, "pair_id"):
            if name in raw and name not in self.columns.read_as and name not in self.columns.unpaired:
                raise surplus(name)
        pair = self._split(raw, values, number, index)
        pair.flags.extend(flags)
        if isinstance(pair.prompt, list):
            pair.prompt = Conversation.of(pair.prompt, raw)
        for ours in self.columns.numbers:
            theirs = self.columns.read_as.get(ours, ours)
            pair.numbers[ours] = as_number(values[ours], theirs, from_text=self.from_text)
        if pair.numbers.get("weight", 0.0) < 0:
            raise RowError(f"weight is {pair.numbers['weight']}, and must be 0 or more; correct it")
        _flag(pair)
        return pair

    def _split(self, raw: Mapping[str, Any], values: Mapping[str, Any], number: int, index: int) -> Pair:
        chosen, rejected = (as_text(values[name], name) for name in ("chosen", "rejected"))
        if isinstance(chosen, list) != isinstance(rejected, list):
            raise RowError("chosen and rejected must both be text or both be messages; write them alike")
        flags: list[tuple[str, str]] = []
        columns = self._prompt_columns(raw)
        found = read_prompt(raw, columns, completion=chosen)
        text = found.text
        if (self.turns or found.history) and isinstance(chosen, str):
            if text is None:
                before = f"some rows have turns in {columns.history!r}" if columns.history else "columns.chat is true"
                raise RowError(
                    f"{before}, and there is no column prompt; name it with --columns.prompt NAME, or give chosen and "
                    "rejected as messages"
                )
            text = said("user", text) if isinstance(text, str) else text
        conversational = isinstance(chosen, list) or isinstance(text, list)
        if self.conversational is None:
            self.conversational = conversational
        elif self.conversational != conversational:
            form, before = ("messages", "text") if conversational else ("text", "messages")
            raise RowError(f"holds {form} where the rows before hold {before}; use one form in the file")
        pair_id = _pair_id(values.get("pair_id", index))
        if isinstance(chosen, str) and isinstance(rejected, str):
            prompt, chosen, rejected = _split_text(text, chosen, rejected, flags)
        else:
            assert isinstance(chosen, list)
            assert isinstance(rejected, list)
            prompt, chosen, rejected = _split_messages(text, chosen, rejected, flags)
        if is_silent(prompt) and ("no_shared_prompt", "") not in flags:
            flags.append(("empty_prompt", ""))
        prompt = found.joined(prompt)
        refuse_lost_context(raw, found.context, (prompt, chosen, rejected))
        return Pair(pair_id, number, prompt, chosen, rejected, {}, flags)

    def _prompt_columns(self, raw: Mapping[str, Any]) -> PromptColumns:
        names = tuple(raw)
        if names not in self._prompts:
            if len(self._prompts) > 1000:  # rows of random keys would fill the memory
                self._prompts.clear()
            found = PromptColumns.found_in(map(str, names))
            mine, theirs = self.columns.prompt.question[:1], found.question[:1]
            if mine != theirs:  # the prompt is in another column than that of the first row
                raise lacks(mine[0]) if mine and mine[0] not in found.context else surplus(theirs[0])
            self._prompts[names] = found
        return self._prompts[names]


def _split_text(
    prompt: Text | None, chosen: str, rejected: str, flags: list[tuple[str, str]]
) -> tuple[Text, Text, Text]:
    if isinstance(prompt, list):  # a conversation with its two answers given as text
        return prompt, said("assistant", chosen), said("assistant", rejected)
    if prompt is not None:
        if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
            flags.append(("repeats_prompt", ""))
        return prompt, chosen, rejected
    shared = shared_prefix(chosen, rejected)
    if chosen != rejected:
        if (turn := _last_turn(chosen[:shared])) is not None:
            return chosen[:turn], chosen[turn:], rejected[turn:]
        if shared and chosen[shared - 1] == " ":  # as TRL: the space belongs to the completion
            shared -= 1
        elif 0 < shared < min(len(chosen), len(rejected)) and (chosen[shared - 1] + chosen[shared]).isalnum():
            flags.append(("split_word", repr(chosen[max(0, shared - 20) : shared])))
        if not shared:
            flags.append(("no_shared_prompt", ""))
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _last_turn(shared: str) -> int | None:
    """Where the last answer begins in a transcript such as Anthropic's; None where the text is none."""
    if not TRANSCRIPT.match(shared):
        return None
    return max((match.end() for match in re.finditer(r"\n\n(?:Assistant|A):", shared)), default=None)


def _split_messages(
    prompt: Text | None, chosen: list[Message], rejected: list[Message], flags: list[tuple[str, str]]
) -> tuple[Text, Text, Text]:
    if isinstance(prompt, list):
        if prompt and chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
            flags.append(("repeats_prompt", ""))
        return prompt, chosen, rejected
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return said("user", prompt), chosen, rejected
    # At least one message stays with each side, so that equal conversations keep their answer.
    shared = min(shared_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if not shared:
        flags.append(("no_shared_prompt", ""))
    elif isinstance(prompt, str):
        before = [message["content"].strip() for message in chosen[:shared]]
        # A prompt as text may be one of the shared messages, or hold all of them.
        if prompt.strip() not in before and not all(text in prompt for text in before):
            flags.append(("prompt_mismatch", ""))
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _pair_id(value: Any) -> int:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 19:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise RowError(f"pair_id is {described(value)}, not a whole number from 0; correct or drop the column")
    return value


def _flag(pair: Pair) -> None:
    """Findings that one row shows by itself."""
    flags = pair.flags
    if pair.chosen == pair.rejected:
        flags.append(("identical", ""))
    for side in ("chosen", "rejected"):
        if is_silent(getattr(pair, side)) and ("identical", "") not in flags:
            flags.append(("empty_completion", side))
    for name in ("prompt", "chosen", "rejected"):
        if isinstance(text := getattr(pair, name), str) and _MESSAGES.match(text):
            flags.append(("messages_as_text", name))
        if text in _MISSING:
            flags.append(("missing_as_text", f"{name} is {text}"))
        for text in contents(getattr(pair, name)):
            if match := _CONTROL.search(text):
                flags.append(("control_characters", f"{name} has U+{ord(match[0]):04X}"))
            if "\ufffd" in text:
                flags.append(("replacement_character", name))
            if len(text) > LONG:
                flags.append(("very_long", f"{name} has {len(text)} characters"))
    flags.extend(("other_turns", side) for side in ("chosen", "rejected") if _has_other_turns(pair, side))
    if isinstance(pair.prompt, list):
        flags.extend(("role_order", problem) for problem in _role_problems(pair))
    numbers = pair.numbers
    if (gap := pair.score_difference) is not None:
        if gap < 0:
            flags.append(("score_order", " < ".join(f"{numbers[name]:g}" for name in SCORES)))
        if abs(numbers.get(MARGIN, gap) - gap) > 1e-3 * max(1.0, abs(gap)):
            flags.append(("margin_mismatch", f"{numbers[MARGIN]:g} against {gap:g}"))


def _has_other_turns(pair: Pair, side: str) -> bool:
    """Whether somebody else than the assistant speaks in a completion."""
    text = getattr(pair, side)
    if ("repeats_prompt", "") in pair.flags:
        return False
    if isinstance(text, list):
        return any(message["role"] != "assistant" for message in text[1:])  # the first one is role_order's
    if any(mark in text for mark in _MARKUP):
        return True
    # An answer may have a line that begins with "User:"; after a transcript it is the next turn.
    said, before = text.strip().lower(), "\n" + "".join(contents(pair.prompt)).lower()
    return any(_speaks(said, names) and _speaks(before, names) for names in _SPEAKERS)


def _speaks(text: str, names: Sequence[str]) -> bool:
    """Whether a line after the first begins with one of the names."""
    return any(name in text and re.search(rf"\n[ \t#*]*{name}", text) for name in names)


def _role_problems(pair: Pair) -> list[str]:
    assert isinstance(pair.prompt, list)
    roles = [m["role"] for m in pair.prompt]
    problems = []
    if any(role in SYSTEM_ROLES for role in roles[1:]):
        problems.append("system after the first message")
    turns = [role for role in roles if role not in SYSTEM_ROLES]
    if turns and turns[0] != "user":
        problems.append(f"the prompt begins with {turns[0]}")
    if any(a == b == "user" or a == b == "assistant" for a, b in pairwise(turns)):
        problems.append("one role twice in a row")
    if turns and turns[-1] == "assistant":
        problems.append("the prompt ends with assistant")
    for side in ("chosen", "rejected"):
        first = getattr(pair, side)[0]["role"]
        if first != "assistant":
            problems.append(f"{side} begins with {first}")
    return problems
