"""What a check may find in data that can be read: counted, with three examples each, and a remedy."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.resources import files
from itertools import islice

from madpo.core.config import Frozen

EXAMPLES = 3

KINDS: dict[str, tuple[str, str]] = {
    kind: (says, remedy)
    for kind, (says, remedy) in tomllib.loads((files("madpo.data") / "findings.toml").read_text("utf-8")).items()
}
"""Kind -> (what is so, what to do)."""


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
