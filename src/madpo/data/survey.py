"""What is found in pairs while they stream by: all of it for ``madpo check``, one line of it for a training."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence

from madpo.core.errors import DataError
from madpo.data.duplicates import Seen
from madpo.data.findings import EXAMPLES, Finding, Findings
from madpo.data.raw import Source
from madpo.data.rows import Pair
from madpo.data.tokens import Encoded

FEW = 3  # pairs of one prompt that may be a coincidence


class Survey:
    """Counts what a check would warn of.

    Attributes:
        findings: the counts, with examples.
        seen: which pairs and prompts there were.
        at: the place of a row, for messages.
    """

    def __init__(self) -> None:
        self.findings = Findings()
        self.seen = Seen()
        self.at: Callable[[int], str] = str

    def take(self, pair: Pair, encoded: Encoded | None, source: Source, max_length: int | None = None) -> None:
        """Look at a pair, in text and, where there are any, in tokens."""
        self.at = source.at
        self.seen.add(pair)
        details: dict[str, list[str]] = {}  # a pair counts once for a kind, whatever is found in it
        for kind, detail in (*pair.flags, *(encoded.flags if encoded else ())):
            details.setdefault(kind, []).append(detail)
        if encoded is not None and max_length is not None and encoded.length > max_length:
            details["too_long"] = [f"{encoded.length} tokens"]
        for kind, found in details.items():
            text = ", ".join(filter(None, found))
            self.findings.add(kind, 1, [self.at(pair.number) + (f": {text}" if text else "")])

    def finish(self, left_out: Mapping[str, Sequence[int]], at: Callable[[int], str]) -> None:
        """Add what only all pairs together show.

        Args:
            left_out: kind of finding -> rows without a pair.
        """
        for kind, numbers in left_out.items():
            self.findings.add(kind, len(numbers), [at(number) for number in numbers[:EXAMPLES]])
        if not len(self.seen):
            return
        self.seen.repeats(self.findings, at)
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

    def refuse_nothing_to_learn(self, data: str) -> None:
        """Refuse pairs that all have the same tokens on both sides, for a training (DataError)."""
        equal = sum(self.findings.counts.get(kind, 0) for kind in ("identical", "identical_tokens"))
        if equal == len(self.seen) > 0:
            raise DataError(
                f"{data}: the two sides of every pair have the same tokens, so there is nothing to learn; "
                f"{strict_sentence(self.findings.summary()[0])}"
            )

    def line(self, data: str, model: str | None = None) -> str | None:
        """The findings in one line; None if there are none.

        Args:
            data, model: as the user names them, for the command that shows more.
        """
        if not self.findings.counts:
            return None
        counts = ", ".join(f"{f.count} {f.kind.replace('_', ' ')}" for f in self.findings.summary())
        command = ["madpo", "check", data, *(["--model_name_or_path", model] if model else [])]
        return f"Found in {len(self.seen)} pairs of {data}: {counts} (what and where: {shlex.join(command)})"


def strict_sentence(finding: Finding) -> str:
    """A finding as a mistake."""
    return f"{finding.examples[0]}: {finding.says} ({finding.count} in all); {finding.remedy}"
