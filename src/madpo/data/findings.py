"""What a check may find in data that can be read: counted, with three examples each, and a remedy."""

from __future__ import annotations

from collections.abc import Iterable

from madpo.core.config import Frozen

EXAMPLES = 3

# kind: (what is so, what to do). A finding is no error: training runs, but seldom as meant.
KINDS: dict[str, tuple[str, str]] = {
    "identical": ("chosen and rejected are the same", "drop these pairs: their gradient is zero"),
    "identical_tokens": (
        "chosen and rejected differ, but the model sees the same tokens",
        "drop these pairs, or use a chat template that keeps the difference",
    ),
    "duplicate": ("the pair is there before", "keep one of each unless it is meant to count twice"),
    "contradiction": (
        "the same two completions are there in the other order",
        "keep the order you believe, or both if annotators disagree",
    ),
    "empty_completion": ("a completion is empty", "drop the pair, unless silence is an answer you want to teach"),
    "system_prompts": (
        "chosen and rejected were written under different system prompts, which are left out",
        "choose responses with the same system prompt, or accept that the model sees none",
    ),
    "empty_prompt": ("the prompt is empty", "fill in the prompt or drop the pair"),
    "repeats_prompt": (
        "the completions begin with the prompt, which would be trained on",
        "leave the prompt out of chosen and rejected, or drop the column prompt",
    ),
    "prompt_mismatch": (
        "the prompt is not a prefix of the conversation in chosen and rejected",
        "drop the column prompt (the shared messages are taken as the prompt) or correct it",
    ),
    "no_shared_prompt": (
        "chosen and rejected share no beginning, so there is no prompt",
        "add a column prompt, or begin both with the same prompt",
    ),
    "split_word": (
        "the shared beginning of chosen and rejected ends inside a word",
        "give the prompt in a column of its own",
    ),
    "one_prompt": ("all pairs have the same prompt", "check that the column with the question is read"),
    "role_order": (
        "the order of the roles is unusual",
        "use [system,] user, assistant, user, ...; end the prompt on user",
    ),
    "other_turns": (
        "a completion holds turns of others than the assistant, which would be trained on",
        "keep one answer on each side: put the turns before it into the prompt, the same for both sides",
    ),
    "control_characters": ("the text holds control characters", "remove them unless the model should write them"),
    "replacement_character": ("the text holds U+FFFD, left by a wrong decoding", "read the original again as UTF-8"),
    "very_long": ("a field is longer than a million characters", "check whether rows were joined by mistake"),
    "score_order": ("chosen has the lower score", "check that the columns are not swapped"),
    "margin_mismatch": (
        "reward_margin is not chosen_score - rejected_score",
        "keep scores and margin of one reward model, on one scale",
    ),
    "tie": ("the label prefers neither completion; the row is left out", "nothing to do, or label them"),
    "no_winner": ("there is no label; the row is left out", "nothing to do, or label them"),
    "no_completion": ("a completion is missing; the row is left out", "nothing to do, or fill it in"),
    "unpaired": (
        "no other row of the same prompt makes a pair with it; the row is left out",
        "nothing to do, or give good and bad completions of the same prompts",
    ),
    "unranked": ("the completions have no two different scores; the row is left out", "nothing to do, or score them"),
    "dropped_content": (
        "the chat template leaves out what a message says, so that the model never sees it",
        "use a chat template that shows it, or take it out of the data",
    ),
    "doubled_start": (
        "two beginning tokens open the text",
        "take the beginning token out of the data: tokenizer or chat template writes one",
    ),
    "boundary": (
        "the tokens of the prompt are not the beginning of the tokens of prompt and completion",
        "use a chat template that renders the prompt the same way in both, or end the prompt where a token ends",
    ),
    "missing_end": (
        "the chat template writes no end token after the completion; one is added",
        "check the chat template",
    ),
    "doubled_end": ("more than one end token closes the completion; one is kept", "remove end tokens from the text"),
    "inner_end": ("an end token stands inside the completion", "remove it: the model would stop there"),
    "too_long": (
        "prompt and completion are longer than max_length",
        "raise max_length, or accept what truncation does",
    ),
    "leaked_pair": ("the pair of the evaluation data is in the training data", "remove it from one of the two"),
    "leaked_prompt": ("the prompt of the evaluation data is in the training data", "split the data by prompt"),
}


class Finding(Frozen):
    """One kind of warning: how often, where for example, and what to do."""

    kind: str
    count: int
    says: str
    remedy: str
    examples: tuple[str, ...]


class Findings:
    """Counts findings by kind and keeps the first three examples of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count ``count`` findings; ``example`` names the place (kept while there are fewer than three)."""
        if kind not in KINDS:
            raise KeyError(kind)
        self.counts[kind] = self.counts.get(kind, 0) + count
        examples = self._examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(example)

    def add_many(self, kind: str, count: int, examples: Iterable[str]) -> None:
        """Count findings that were made together."""
        if count:
            self.counts[kind] = self.counts.get(kind, 0) + count
            self._examples.setdefault(kind, []).extend(examples)

    def summary(self) -> tuple[Finding, ...]:
        """The findings in the order of KINDS."""
        return tuple(
            Finding(
                kind=kind,
                count=self.counts[kind],
                says=says,
                remedy=remedy,
                examples=tuple(self._examples[kind][:EXAMPLES]),
            )
            for kind, (says, remedy) in KINDS.items()
            if kind in self.counts
        )
