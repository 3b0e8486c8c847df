"""What trimming a vocabulary is asked for and what it found: settings, report, and the README beside the model."""

from __future__ import annotations

import json
from pathlib import Path

from madpo import __version__
from madpo.core.metrics import Estimate
from madpo.core.reports import Report
from madpo.operations.settings import TrimSettings


class TrimReport(Report):
    """What was kept and what it costs; intervals are over held-out texts."""

    model: str
    model_digest: str | None
    corpus: tuple[str, ...]
    corpus_digests: tuple[str | None, ...]
    eval_data: str | None
    texts: int
    tokens: int
    """Texts and tokens that decided what is kept."""
    entries_before: int
    entries: int
    entries_always: int
    """Kept whatever the corpus says: added and special tokens, bytes or characters."""
    parameters_before: int
    parameters: int
    covered: float
    """Share of the corpus's tokens whose entry is kept."""
    held_out_texts: int
    held_out_covered: float
    tokens_per_word: Estimate
    tokens_per_word_before: Estimate
    kl: Estimate
    """KL(trimmed || original), nats **per token**, on held-out text as the original tokenises it: the mean of
    -log(the original's probability of all kept entries). Exact where all tokens so far are kept."""
    nats_per_byte: Estimate
    nats_per_byte_before: Estimate
    nats_per_byte_difference: Estimate
    """Each reads the same bytes in its own tokens."""
    largest_state_gap: float
    """Between the states of both models on held-out text in kept tokens; 0 is expected."""
    settings: TrimSettings

    def text(self) -> str:
        """The report for a person."""
        lines = [
            f"kept {self.entries:,} of {self.entries_before:,} entries ({self.entries_always:,} of them whatever the "
            f"corpus says), {self.parameters / 1e6:,.1f} of {self.parameters_before / 1e6:,.1f} million parameters",
            f"{self.covered:.2%} of the corpus's {self.tokens:,} tokens are kept entries, and "
            f"{self.held_out_covered:.2%} of those of {self.held_out_texts} held-out texts",
            f"{'on the held-out texts':22}{'original':>26}{'trimmed':>26}",
        ]
        for name, before, after in (
            ("tokens per word", self.tokens_per_word_before, self.tokens_per_word),
            ("nats per byte", self.nats_per_byte_before, self.nats_per_byte),
        ):
            lines.append(f"{name:22}{_interval(before):>26}{_interval(after):>26}")
        lines.append(f"difference in nats per byte: {_interval(self.nats_per_byte_difference)}")
        lines.append(f"KL(trimmed || original): {_interval(self.kl)} nats per token")
        return "\n".join(lines)


def _interval(e: Estimate) -> str:
    return f"{e.mean:.4f} ({e.low:.4f} to {e.high:.4f})"


def model_card(report: TrimReport) -> str:
    """Markdown with the hub's front matter."""
    corpus = ", ".join(
        f"`{_line(data)}` (SHA-256: {known or 'unknown'})"
        for data, known in zip(report.corpus, report.corpus_digests, strict=True)
    )
    held = f"of `{_line(report.eval_data)}`" if report.eval_data else "of the corpus, which decided nothing"
    rows = [
        ("tokens per word", report.tokens_per_word_before, report.tokens_per_word),
        ("nats per byte", report.nats_per_byte_before, report.nats_per_byte),
    ]
    table = [f"| {name} | {_interval(before)} | {_interval(after)} |" for name, before, after in rows]
    return f"""---
library_name: transformers
base_model: {json.dumps(report.model, ensure_ascii=False)}
tags: [madpo, trimmed-vocabulary]
---

# {_line(Path(report.model).name)} with {report.entries:,} of its {report.entries_before:,} entries

- base model, whose terms bind: `{_line(report.model)}` (SHA-256 of its files: {report.model_digest or "unknown"})
- corpus: {corpus}
- it has {report.texts:,} texts of {report.tokens:,} tokens, {report.covered:.2%} of them kept entries
- parameters: {report.parameters:,} of {report.parameters_before:,}; no other weight was changed
- made by madpo {__version__} (`madpo trim-vocab`)
- `kept_ids.json` holds the old id of each new one, `vocabulary.json` all numbers

Where every token of a text is kept, tokens and states are the base model's, and its probabilities are shared among the
kept entries. Other words are written in smaller kept pieces.

## Measured on {report.held_out_texts} texts {held}

| | base model | trimmed |
| --- | --- | --- |
{chr(10).join(table)}

KL(trimmed || base model): {_interval(report.kl)} nats per token, the mean of -log of the probability that the base
model gives to all kept entries. Intervals are 95 %, over texts.
"""


def _line(text: str) -> str:
    return text.replace("`", "'").replace("\n", " ")
