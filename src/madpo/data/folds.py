"""What makes two prompts the same, and folds that no prompt crosses."""

import json
import unicodedata
from collections.abc import Iterable, Sequence

from madpo.core.errors import ConfigError
from madpo.core.seeding import rng
from madpo.data.conversation import Conversation, columns_of
from madpo.data.messages import Text

_ENDS = " .,;:!?¿¡()[]\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb\u3001\u3002"


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
