"""Which pairs and prompts were seen: 16 bytes of hash each, sorted once at the end."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from madpo.data.conversation import columns_of
from madpo.data.findings import EXAMPLES, Findings
from madpo.data.messages import Text
from madpo.data.rows import Pair

At = Callable[[int], str]
"""The place of a row, for messages."""


class Seen:
    """Collects hashes while rows stream by; duplicates, contradictions and leakage come out afterwards.

    The hash of a pair does not depend on the order of its completions; its last bit says which order it was.
    """

    def __init__(self) -> None:
        self._pairs = bytearray()
        self._prompts = bytearray()
        self.numbers = array("q")
        """Line or row of each pair."""

    def add(self, pair: Pair) -> None:
        """Remember a pair."""
        prompt, chosen, rejected = digest(pair.prompt), digest(pair.chosen), digest(pair.rejected)
        in_order = chosen <= rejected
        both = chosen + rejected if in_order else rejected + chosen
        key = bytearray(hashlib.blake2b(prompt + both, digest_size=16).digest())
        key[15] = (key[15] & 0xFE) | in_order
        self._pairs += key
        self._prompts += prompt
        self.numbers.append(pair.number)

    def __len__(self) -> int:
        return len(self.numbers)

    def _unordered(self) -> npt.NDArray[np.bytes_]:
        """Keys of the pairs without the order's bit."""
        keys = np.frombuffer(self._pairs, np.uint8).reshape(-1, 16).copy()
        keys[:, 15] &= 0xFE
        return keys.view("S16").ravel()

    def distinct_prompts(self) -> int:
        """How many different prompts there are."""
        return len(np.unique(np.frombuffer(self._prompts, "S16")))

    def repeats(self, findings: Findings, at: At) -> None:
        """Add duplicates, and pairs that are there in both orders."""
        rows = np.arange(len(self))
        first = _first(np.frombuffer(self._pairs, "S16"))
        self._report(findings, "duplicate", first, first != rows, at)
        orders = np.frombuffer(self._pairs, np.uint8)[15::16] & 1
        either = _first(self._unordered())
        self._report(findings, "contradiction", either, (orders != orders[either]) & (first == rows), at)

    def _report(
        self, findings: Findings, kind: str, first: npt.NDArray[np.intp], hits: npt.NDArray[np.bool_], at: At
    ) -> None:
        rows = np.flatnonzero(hits)
        places = [f"{at(self.numbers[row])}, first in {self.numbers[first[row]]}" for row in rows[:EXAMPLES]]
        findings.add(kind, len(rows), places)

    def leaks(self, train: Seen, findings: Findings, at: At) -> None:
        """Add the pairs (in either order) and the prompts of this evaluation data that are in ``train``."""
        hits = {
            "leaked_pair": np.isin(self._unordered(), train._unordered()),
            "leaked_prompt": np.isin(np.frombuffer(self._prompts, "S16"), np.frombuffer(train._prompts, "S16")),
        }
        for kind, found in hits.items():
            rows = np.flatnonzero(found)
            findings.add(kind, len(rows), [at(self.numbers[row]) for row in rows[:EXAMPLES]])


def digest(text: Text) -> bytes:
    """16 bytes of hash of a text or a conversation."""
    hasher = hashlib.blake2b(digest_size=16)
    if isinstance(text, str):
        hasher.update(text.encode())
    else:
        for message in text:
            content = message["content"].encode()
            hasher.update(f"{message['role']}:{len(content)}:".encode() + content)
            if len(message) > 2:
                hasher.update(json.dumps(message, sort_keys=True, default=str).encode())
        if columns := columns_of(text):
            hasher.update(json.dumps(columns, sort_keys=True, default=str).encode())
    return hasher.digest()


def _first(keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.intp]:
    """For each row the first one with its key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rows: npt.NDArray[np.intp] = first[inverse]
    return rows
