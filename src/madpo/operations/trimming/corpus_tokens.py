"""What a tokenizer makes of a corpus: how often each entry occurs, and texts that are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from madpo.core.errors import DataError, located
from madpo.core.layout import Layout
from madpo.core.progress import bar
from madpo.data.corpus import IMDB, PackagedIMDB, load_corpus
from madpo.data.load import batches
from madpo.data.messages import contents
from madpo.data.templates import Clock, render
from madpo.data.texts import read_texts
from madpo.operations.settings import TrimSettings

_BATCH = 256  # texts that are encoded together


class CorpusTokens(NamedTuple):
    """A corpus in tokens.

    Attributes:
        counts: id -> occurrences; special tokens that the tokenizer would add are not counted.
        texts: how many were counted.
        held_out: texts that were not, by the hash of what they were cut from.
        held_out_ids: the same in tokens.
    """

    counts: dict[int, int]
    texts: int
    held_out: list[str]
    held_out_ids: list[list[int]]

    @property
    def tokens(self) -> int:
        """How many were counted."""
        return sum(self.counts.values())

    def share(self, kept: Container[int]) -> float:
        """The share of the counted tokens whose id is in ``kept``."""
        return sum(count for i, count in self.counts.items() if i in kept) / self.tokens


def read_corpus(
    corpus: Sequence[str], tokenizer: Any, settings: TrimSettings, eval_data: str | Path | None = None
) -> CorpusTokens:
    """Count tokens, and hold texts out: by a hash of the text, so that neither order nor repetition matters.

    Conversations are read through the chat template, where there is one.

    Args:
        corpus: data sets, or ``imdb``.
        eval_data: held-out text; what is in the corpus too is not counted. None takes a share of the corpus.

    Raises:
        DataError: nothing is left to count, or to measure on; or a text cannot be read.
    """
    sample = _Sample(settings.eval_texts)
    held_out_keys = None
    if eval_data is not None:
        held_out_keys = {sample.offer(text) for text in _rendered(str(eval_data), tokenizer, settings.reading)}

    def is_counted(text: str) -> bool:
        key = _key(text)
        if held_out_keys is not None:
            return key not in held_out_keys
        if int.from_bytes(key[:8], "big") >= settings.held_out_share * 2**64:
            return True
        sample.offer(text)
        return False

    # Ids may have holes, so the highest can be above the number of entries.
    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    texts = 0
    rendered = (text for data in corpus for text in _rendered(data, tokenizer, settings.reading))
    with bar("Reading the corpus", None) as advance:
        for batch in batches(rendered, _BATCH, len):
            counted = [text for text in batch if is_counted(text)]
            for ids in encoded(tokenizer, counted):
                counts += np.bincount(ids, minlength=len(counts))
            texts += len(counted)
            advance(len(batch))
    name = ", ".join(corpus)
    if not counts.any():
        raise DataError(
            f"{name}: no text is left that says what to keep; give more text, or a smaller --held_out_share"
        )
    beginnings = (_beginning(text, settings.eval_characters) for text in sample.texts())
    held_out = [text for text in beginnings if text.strip()]
    if not held_out:
        where = eval_data or name
        raise DataError(f"{where}: no text is held out to measure on; raise --held_out_share, or give text with --eval")
    used = {int(i): int(counts[i]) for i in np.flatnonzero(counts)}
    return CorpusTokens(used, texts, held_out, encoded(tokenizer, held_out))


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids without what the tokenizer would add or cut off."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _beginning(text: str, limit: int) -> str:
    """At most ``limit`` characters, to the last white space before the limit."""
    parts = text[:limit].rsplit(None, 1)
    return parts[0] if len(text) > limit and len(parts) == 2 else text[:limit]


def _rendered(data: str, tokenizer: Any, columns: Layout) -> Iterator[str]:
    if data == "imdb" and not Path(data).exists():
        reviews = load_corpus(PackagedIMDB())
        yield from reviews.loc[reviews["source"] == IMDB, "text"]
        return
    clock = Clock()
    for place, text in read_texts(data, columns):
        if isinstance(text, str):
            yield text
        elif not tokenizer.chat_template:
            yield from contents(text)
        else:
            with located(place):
                text = render(tokenizer, text, clock)
            yield text


class _Sample:
    """The texts with the smallest hashes of all that are offered, each once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._found: dict[bytes, str] = {}

    def offer(self, text: str) -> bytes:
        """Take a text in, if its hash, which is returned, is small enough."""
        key = _key(text)
        self._found[key] = text
        if len(self._found) > self.size:
            del self._found[max(self._found)]
        return key

    def texts(self) -> list[str]:
        """In the order of their hashes."""
        return [self._found[key] for key in sorted(self._found)]


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
