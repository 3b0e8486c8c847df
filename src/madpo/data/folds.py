"""What makes two prompts the same, and folds that no prompt crosses."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from madpo.core.errors import ConfigError
from madpo.core.seeding import rng
from madpo.data.conversation import Conversation, columns_of
from madpo.data.messages import TRANSCRIPT, Text

_ENDS = " .,;:!?¿¡()[]\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb\u3001\u3002"

_OPEN = re.compile(r"\n\n(?:Assistant|A):\s*$")  # the turn that a completion fills
_TURN = re.compile(r"\n\n(?=(?:Human|H|Assistant|A):)")


def prompt_key(prompt: Text) -> str:
    """What makes two prompts the same."""
    if isinstance(prompt, str):
        return prompt
    whole = [prompt, columns] if (columns := columns_of(prompt)) else prompt
    return json.dumps(whole, sort_keys=True, ensure_ascii=False)


class PromptNumbers:
    """Numbers of prompts in the order in which they first come: 0, 1, ...; the same where :func:`prompt_keys` are.

    It keeps hashes, since the prompts of a large file may not fit into memory.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def __call__(self, prompt: Text) -> int:
        return self._numbers.setdefault(hash(prompt_key(plain_prompt(prompt))), len(self._numbers))


def plain_prompt(prompt: Text) -> Text:
    """A prompt without what no reader sees: runs of white space as one, each letter written in one way (NFKC)."""

    def plain(text: str) -> str:
        return unicodedata.normalize("NFKC", " ".join(text.split()))

    if isinstance(prompt, str):
        return plain(prompt)
    return Conversation([{**said, "content": plain(said["content"])} for said in prompt], columns_of(prompt))


def loose_prompt(prompt: Text) -> Text:
    """:func:`plain_prompt` without case, characters that show nothing, and punctuation at the ends of its texts.

    Prompts that are the same in this form count as different ones, and a reader may well take them for one.
    """

    def loose(text: str) -> str:
        folded = text.casefold()
        if not folded.isascii():  # Cf: zero width, direction, soft hyphen
            folded = "".join(c for c in folded if unicodedata.category(c) != "Cf")
        return folded.strip(_ENDS) or text

    prompt = plain_prompt(prompt)
    if isinstance(prompt, str):
        return loose(prompt)
    return Conversation([{**said, "content": loose(said["content"])} for said in prompt], columns_of(prompt))


def prompt_keys(prompts: Sequence[Text]) -> list[str]:
    """What makes prompts of a data set the same, for its parts: those have one key that a reader cannot tell apart."""
    keys, plain = ([prompt_key(form(prompt)) for prompt in prompts] for form in (lambda prompt: prompt, plain_prompt))
    least: dict[str, str] = {}
    for key, group in zip(keys, plain, strict=True):
        least[group] = min(key, least.get(group, key))
    return [least[group] for group in plain]


class Beginnings:
    """Hashes of what prompts begin with, turn by turn, which tell the prompts that continue others."""

    def __init__(self, prompts: Iterable[Text] = ()) -> None:
        self._keys = array("Q")
        self._ends = array("q")  # of the keys of each prompt
        for prompt in prompts:
            self.add(prompt)

    def add(self, prompt: Text) -> None:
        """Remember a prompt."""
        hasher = hashlib.blake2b(digest_size=8)
        for turn in _turns(prompt) or [""]:
            hasher.update(f"{prompt_key(plain_prompt(turn))}\0".encode())
            self._keys.append(int.from_bytes(hasher.digest(), "little"))
        self._ends.append(len(self._keys))

    def parted(self, others: Beginnings) -> npt.NDArray[np.bool_]:
        """Whether each prompt continues one of ``others``, or is continued by one; equal ones do not."""
        (wholes, parts, rows), (other_wholes, other_parts, _) = self._split(), others._split()
        found = np.isin(wholes, other_parts)
        found[rows[np.isin(parts, other_wholes)]] = True
        return found

    def _split(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.intp]]:
        """Keys of whole prompts, keys of their beginnings, and the prompts that the latter belong to."""
        keys, ends = np.frombuffer(self._keys, np.uint64), np.frombuffer(self._ends, np.int64)
        inner = np.ones(len(keys), bool)
        inner[ends - 1] = False
        rows = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        return keys[~inner], keys[inner], rows[inner]


def _turns(prompt: Text) -> Sequence[Text]:
    """The turns of a conversation, or of a transcript such as Anthropic's; any other text is one turn."""
    if not isinstance(prompt, str):
        return [[message] for message in prompt]
    return _TURN.split(_OPEN.sub("", prompt.strip())) if TRANSCRIPT.match(prompt) else [prompt]


def folds_by_prompt(prompts: Iterable[str], folds: int, seed: int, name: str) -> list[int]:
    """A fold from 0 for every row, the same for the same prompt, of about equal sizes.

    Raises ConfigError: there are fewer prompts than folds.
    """
    keys = list(prompts)
    distinct = sorted(set(keys))
    if len(distinct) < folds:
        remedy = "use fewer folds" if len(distinct) > 1 else "give pairs of at least two prompts"
        raise ConfigError(f"folds is {folds}, but {name} has only {len(distinct)} different prompts; {remedy}")
    order = rng(seed, "folds").permutation(len(distinct))
    fold = {distinct[prompt]: place % folds for place, prompt in enumerate(order)}
    return [fold[key] for key in keys]
