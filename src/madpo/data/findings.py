"""What is found in pairs while they stream by: all of it for ``madpo check``, one line of it for a training."""

from __future__ import annotations

import hashlib
import json
import shlex
import tomllib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from madpo.core.columns import MARGIN
from madpo.core.config import Frozen
from madpo.core.errors import DataError
from madpo.data.conversation import columns_of
from madpo.data.folds import Beginnings, loose_prompt, plain_prompt
from madpo.data.messages import Text
from madpo.data.raw import At, Source
from madpo.data.rows import Pair
from madpo.data.tokens import Encoded

FEW = 3  # pairs of one prompt that may be a coincidence
EXAMPLES = 3
MANY = 20  # pairs whose margins may show their unit

KINDS: dict[str, tuple[str, str]] = {
    kind: (says, remedy)
    for kind, (says, remedy) in tomllib.loads((files("madpo.data") / "findings.toml").read_text("utf-8")).items()
}
"""Kind -> (what is so, what to do)."""


def unit_of_margins(pairs: int, least: float, most: float) -> str | None:
    """The kind of finding for margins that look like the chosen side's probabilities or percentages; None for others.

    A probability of one half is a margin of 0, and a smaller one contradicts the label: read as log-odds, all of them
    would agree with it.
    """
    for kind, whole in (("margin_probability", 1.0), ("margin_percentage", 100.0)):
        if pairs >= MANY and 0 <= least < whole / 2 and whole / 5 < most <= whole:
            return kind
    return None


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

    def add(self, kind: str, count: int, examples: Iterable[str]) -> None:
        """Count findings of one kind; ``examples`` name their places."""
        if kind not in KINDS:
            raise KeyError(kind)
        if count:
            self.counts[kind] = self.counts.get(kind, 0) + count
            kept = self._examples.setdefault(kind, [])
            kept.extend(islice(examples, EXAMPLES - len(kept)))

    def summary(self) -> tuple[Finding, ...]:
        """The findings in the order of KINDS."""
        return tuple(
            Finding(kind=kind, count=count, says=says, remedy=remedy, examples=tuple(self._examples[kind]))
            for kind, (says, remedy) in KINDS.items()
            if (count := self.counts.get(kind)) is not None
        )


class Seen:
    """Collects hashes while rows stream by; duplicates, contradictions and leakage come out afterwards.

    The hash of a pair does not depend on the order of its completions; its last bit says which order it was.
    """

    def __init__(self) -> None:
        self._pairs = bytearray()
        self._prompts = bytearray()
        self._loose_prompts = bytearray()
        self.beginnings = Beginnings()
        self.numbers = array("q")
        """Line or row of each pair."""
        self.ids: array[int] | None = None
        """pair_id of each pair; None while these are 0, 1, 2, ..."""

    def add(self, pair: Pair) -> None:
        """Remember a pair."""
        prompt, chosen, rejected = digest(pair.prompt), digest(pair.chosen), digest(pair.rejected)
        in_order = chosen <= rejected
        both = chosen + rejected if in_order else rejected + chosen
        key = bytearray(hashlib.blake2b(prompt + both, digest_size=16).digest())
        key[15] = (key[15] & 0xFE) | in_order
        self._pairs += key
        self._prompts += digest(plain_prompt(pair.prompt))
        self._loose_prompts += digest(loose_prompt(pair.prompt))
        self.beginnings.add(pair.prompt)
        if self.ids is None and pair.pair_id != len(self):
            self.ids = array("q", range(len(self)))
        if self.ids is not None:
            self.ids.append(pair.pair_id)
        self.numbers.append(pair.number)

    def __len__(self) -> int:
        return len(self.numbers)

    def unordered(self) -> npt.NDArray[np.bytes_]:
        """Keys of the pairs without the order's bit."""
        keys = np.frombuffer(self._pairs, np.uint8).reshape(-1, 16).copy()
        keys[:, 15] &= 0xFE
        return keys.view("S16").ravel()

    def distinct_prompts(self) -> int:
        """How many prompts there are that a reader can tell apart."""
        return len(np.unique(np.frombuffer(self._prompts, "S16")))

    def repeats(self, findings: Findings, at: At) -> None:
        """Add duplicates, pairs that are there in both orders, names of two pairs, and prompts that are alike."""
        rows = np.arange(len(self))
        if self.ids is not None:
            named = _first(np.frombuffer(self.ids, np.int64))
            self._report(findings, "repeated_id", named, named != rows, at)
        first = _first(np.frombuffer(self._pairs, "S16"))
        self._report(findings, "duplicate", first, first != rows, at)
        orders = np.frombuffer(self._pairs, np.uint8)[15::16] & 1
        either = _first(self.unordered())
        self._report(findings, "contradiction", either, (orders != orders[either]) & (first == rows), at)
        prompts, loose = (np.frombuffer(keys, "S16") for keys in (self._prompts, self._loose_prompts))
        similar = _first(loose)
        self._report(findings, "similar_prompt", similar, prompts != prompts[similar], at)

    def _report(
        self, findings: Findings, kind: str, first: npt.NDArray[np.intp], hits: npt.NDArray[np.bool_], at: At
    ) -> None:
        rows = np.flatnonzero(hits)
        places = [f"{at(self.numbers[row])}, first in {self.numbers[first[row]]}" for row in rows[:EXAMPLES]]
        findings.add(kind, len(rows), places)

    def leaks(self, train: Seen, findings: Findings, at: At) -> None:
        """Add the pairs (in either order) and the prompts of this evaluation data that are in ``train``."""

        def among(mine: bytearray, theirs: bytearray) -> npt.NDArray[np.bool_]:
            return np.isin(np.frombuffer(mine, "S16"), np.frombuffer(theirs, "S16"))

        prompts = among(self._prompts, train._prompts)
        hits = {
            "leaked_pair": np.isin(self.unordered(), train.unordered()),
            "leaked_prompt": prompts,
            "leaked_similar_prompt": among(self._loose_prompts, train._loose_prompts) & ~prompts,
            "leaked_conversation": self.beginnings.parted(train.beginnings) & ~prompts,
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


def _first(keys: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """For each row the first one with its key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rows: npt.NDArray[np.intp] = first[inverse]
    return rows


class Survey:
    """Counts what a check would warn of: findings with examples, and which pairs and prompts there were."""

    def __init__(self) -> None:
        self.findings = Findings()
        self.seen = Seen()
        self.at: At = str
        self._margins = (0, np.inf, -np.inf)  # how many, the smallest and the largest

    def take(self, pair: Pair, encoded: Encoded | None, source: Source, max_length: int | None = None) -> None:
        """Look at a pair, in text and, where there are any, in tokens."""
        self.at = source.at
        self.seen.add(pair)
        if (margin := pair.numbers.get(MARGIN)) is not None:
            count, least, most = self._margins
            self._margins = count + 1, min(least, margin), max(most, margin)
        details: dict[str, list[str]] = {}  # a pair counts once for a kind, whatever is found in it
        for kind, detail in (*pair.flags, *(encoded.flags if encoded else ())):
            details.setdefault(kind, []).append(detail)
        if encoded is not None and max_length is not None and encoded.length > max_length:
            details["too_long"] = [f"{encoded.length} tokens"]
        for kind, found in details.items():
            text = ", ".join(filter(None, found))
            self.findings.add(kind, 1, [self.at(pair.number) + (f": {text}" if text else "")])

    def finish(self, left_out: Mapping[str, Sequence[int]], at: At) -> None:
        """Add what only all pairs together show.

        Args:
            left_out: kind of finding -> rows without a pair.
        """
        for kind, numbers in left_out.items():
            self.findings.add(kind, len(numbers), [at(number) for number in numbers[:EXAMPLES]])
        if not len(self.seen):
            return
        self.seen.repeats(self.findings, at)
        if (unit := unit_of_margins(*self._margins)) is not None:
            self.findings.add(unit, len(self.seen), [at(number) for number in self.seen.numbers[:EXAMPLES]])
        if len(self.seen) >= FEW and self.seen.distinct_prompts() == 1:
            examples = [at(number) for number in self.seen.numbers[:EXAMPLES]]
            self.findings.add("one_prompt", len(self.seen), examples)

    def add_leaks(self, evaluation: Survey) -> None:
        """Add the pairs and prompts of evaluation data that are among these."""
        evaluation.seen.leaks(self.seen, self.findings, evaluation.at)

    def refuse_findings(self) -> None:
        """Take the first finding for a mistake (DataError)."""
        if summary := self.findings.summary():
            raise DataError(strict_sentence(summary[0]))

    def refuse_repeated_ids(self) -> None:
        """Refuse names that two pairs have, for what tells pairs apart by them (DataError)."""
        for finding in self.findings.summary():
            if finding.kind == "repeated_id":
                raise DataError(strict_sentence(finding))

    def refuse_nothing_to_learn(self, data: str) -> None:
        """Refuse pairs that all have the same tokens on both sides, for a training (DataError)."""
        equal = sum(self.findings.counts.get(kind, 0) for kind in ("identical", "identical_tokens"))
        if equal == len(self.seen) > 0:
            raise DataError(
                f"{data}: the two sides of every pair have the same tokens, so there is nothing to learn; "
                f"{strict_sentence(self.findings.summary()[0])}"
            )

    def line(self, data: str, model: str | None = None, options: Sequence[str] = ()) -> str | None:
        """The findings in one line; None if there are none.

        Args:
            data, model, options: as the user names them, for the command that shows more.
        """
        if not self.findings.counts:
            return None
        counts = ", ".join(f"{f.count} {f.kind.replace('_', ' ')}" for f in self.findings.summary())
        command = ["madpo", "check", data, *options, *(["--model_name_or_path", model] if model else [])]
        return f"Found in {len(self.seen)} pairs of {data}: {counts} (what and where: {shlex.join(command)})"


def strict_sentence(finding: Finding) -> str:
    """A finding as a mistake."""
    return f"{finding.examples[0]}: {finding.says} ({finding.count} in all); {finding.remedy}"
