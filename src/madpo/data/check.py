"""``madpo check``: what is in a preference data set, and what would go wrong in training, before it does."""

from __future__ import annotations

import shlex
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from madpo.core.columns import MARGIN, SCORES
from madpo.core.config import Frozen
from madpo.core.locks import locked
from madpo.core.reports import Report
from madpo.core.storage import expanded, remove_leftovers, storage_errors, write_atomically
from madpo.data.findings import Finding, Survey
from madpo.data.load import PairStream, TooLong, surveyed, surveyed_pairs
from madpo.data.messages import Text
from madpo.data.raw import COLUMNS
from madpo.data.rows import Pair
from madpo.data.templates import UNUSED_TEMPLATE
from madpo.data.tokens import Encoded, Encoder, as_tokenizer, check_options, text_length
from madpo.models.hyperparameters import Truncation

SIDES = ("prompt", "chosen", "rejected")
DIFFERENCE = " - ".join(SCORES)
ORDERS = 1000  # of roles that are counted each for itself
ROLES_SHOWN = 5
RENDERED = 3  # pairs that the report shows as the model will see them
_SPACELESS = "\u0e00"  # from Thai on, few scripts have spaces between words
_ENDS = tuple(".,;!?")
SHOWN = 600  # characters of each part of them


class Lengths(Frozen):
    """Lengths of one part of the pairs, in tokens (with a tokenizer) or characters."""

    mean: float
    median: float
    p95: float
    longest: int


class TruncationReport(Frozen):
    """What ``max_length`` does: counts of pairs."""

    max_length: int
    policy: Truncation
    too_long: int
    dropped: int
    cut: int


class MarginCandidate(Frozen):
    """A strength of preference or a difference of scores, in the data set's own unit, of the pairs that have one."""

    name: str
    pairs: int
    mean: float
    lowest: float
    highest: float
    remedy: str
    """How it becomes ``reward_margin``."""


class CheckReport(Report):
    """What :func:`check` found. ``text()`` is what the command prints; ``model_dump()`` is what it saves."""

    source: str
    pairs: int
    prompts: int
    """Different prompts."""
    form: str
    """"text" or "messages"."""
    roles: dict[str, int]
    """For messages, "system, user > assistant" (prompt > chosen) -> how many pairs; the most frequent ones."""
    read_as: dict[str, str]
    """Our name -> the data set's, of all columns but the prompt's."""
    layout: dict[str, str] = Field(default_factory=dict)
    """For a data set without ``chosen`` and ``rejected``: where the completions are and what orders them."""
    other_labels: tuple[str, ...] = ()
    """Columns that could have ordered the completions as well."""
    reward_margins: tuple[MarginCandidate, ...] = ()
    """What could serve as ``reward_margin``. None of it is used unless asked for."""
    prompt_columns: tuple[str, ...] = ()
    """The columns that the prompt is made of, in its order."""
    ignored: tuple[str, ...]
    """Columns that nothing reads."""
    unit: str
    """Unit of the lengths: "tokens" or "characters"."""
    lengths: dict[str, Lengths]
    truncation: TruncationReport | None
    eval_pairs: int | None
    findings: tuple[Finding, ...]
    rendered: tuple[str, ...]
    """The first pairs as the model sees them: prompt | chosen, with special tokens."""
    date: str | None = None
    """What the chat template took for now; None where it does not ask."""
    touching: int = 0
    """Pairs of text whose prompt and completion are words without a white space in between."""
    continuing: int = 0
    """Pairs whose prompt continues another pair's prompt, or is continued by one."""
    unused_template: bool = False
    """The model has a chat template, and the pairs are text, which does not use it."""

    def count(self, kind: str) -> int:
        """How many findings of a kind (``madpo.data.findings.KINDS``) there are."""
        return next((finding.count for finding in self.findings if finding.kind == kind), 0)

    def text(self) -> str:
        """The report for a person; text of the data is escaped, so that it cannot command a terminal."""
        evaluated = "" if self.eval_pairs is None else f", and {self.eval_pairs} evaluation pairs"
        lines = [f"{self.source}: {self.pairs} pairs of {self.form}, {self.prompts} different prompts{evaluated}"]
        renamed = [f"{theirs!r} as {ours}" for ours, theirs in self.read_as.items() if ours != theirs]
        if self.prompt_columns not in ((), ("prompt",)):
            renamed.insert(0, f"{' and '.join(map(repr, self.prompt_columns))} as prompt")
        if renamed:
            lines.append(f"read {', '.join(renamed)}")
        if layout := [f"{field} {name!r}" for field, name in self.layout.items() if field != name]:
            lines.append(f"layout: {', '.join(layout)}")
        lines += [
            f"not used: {label!r} is a label too; to order by it, give --columns.label {shlex.quote(label)}"
            for label in self.other_labels
        ]
        lines += [
            f"not used: {c.name!r} could be the reward_margin of {c.pairs} pairs ({c.mean:.3g} on average, "
            f"{c.lowest:.3g} to {c.highest:.3g}); {c.remedy}"
            for c in self.reward_margins
            if c.lowest < c.highest  # one margin for all pairs prefers none of them
        ]
        if self.ignored:
            lines.append(f"not read: {', '.join(map(repr, self.ignored))}")
        if self.roles:
            lines.append(f"roles: {'; '.join(f'{order} ({count})' for order, count in self.roles.items())}")
        for side, n in self.lengths.items():
            lines.append(
                f"{side}: {n.mean:.0f} {self.unit} on average, median {n.median:.0f}, 95 % up to {n.p95:.0f}, "
                f"longest {n.longest}"
            )
        if self.truncation is not None:
            t = self.truncation
            lines.append(f"max_length {t.max_length}: {t.too_long} pairs are longer; {t.dropped} dropped, {t.cut} cut")
        lines += [f"as the model sees it: {shown}" for shown in self.rendered]
        if self.touching:
            lines.append(
                f"no white space is between prompt and completion in {self.touching} of {self.pairs} pairs, which a "
                "model reads as one text: begin the completions with a space or a line break, or give messages"
            )
        if self.continuing:
            lines.append(
                f"{self.continuing} of {self.pairs} pairs have a prompt that continues another pair's or is continued "
                "by it, and a split by prompt may part them: to hold pairs out, give --eval_data of other conversations"
            )
        if self.unused_template:
            lines.append(UNUSED_TEMPLATE)
        if self.date is not None:
            lines.append(f"the chat template prints the date, here {self.date}; a training keeps its first start's")
        for finding in self.findings:
            of = self.eval_pairs if finding.kind.startswith("leaked") and self.eval_pairs else self.pairs
            lines.append(f"warning: {finding.count} of {of} pairs: {finding.says}; {finding.remedy}")
            lines += [f"    {example}" for example in finding.examples]
        if not self.findings:
            lines.append("nothing to warn of")
        return "\n".join(lines)


def check(
    data: str | Path,
    *,
    columns: Any = None,
    eval_data: str | Path | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncation: Truncation = "drop",
    output: str | Path | None = None,
    strict: bool = False,
) -> CheckReport:
    """Read a preference data set once and report what is in it.

    A million rows take less than 500 MB, and a tokenizer what it needs itself.

    Args:
        data, columns, tokenizer, max_length, truncation: as in :func:`madpo.data.load_preferences`.
        eval_data: evaluation pairs, to look for leakage.
        output: a folder for ``check.json`` and ``dropped.jsonl`` (pair_id, place and length of each dropped pair),
            written only after everything was read.
        strict: treat the first finding as an error.

    Raises:
        DataError: one sentence with file, row, field and remedy; of several the first, and where the others are.
        ConfigError: options that do not fit together.
        StorageError: ``output`` cannot be written.
    """
    check_options(tokenizer, max_length, truncation)
    encoder = None if tokenizer is None else Encoder(as_tokenizer(tokenizer))
    stream, survey, too_long = PairStream(data, columns), Survey(), TooLong(keep=output is not None)
    tally = _Tally(stream, encoder)
    for pair, encoded in surveyed_pairs(stream, encoder, survey, max_length):
        tally.take(pair, encoded)
        if encoded is not None:
            too_long.fitted(pair, encoded, max_length, truncation, stream.source)
    evaluation = None if eval_data is None else surveyed(eval_data, None, columns)
    if evaluation is not None:
        survey.add_leaks(evaluation)
    cuts = None
    if max_length is not None:
        drops, cut = too_long.drops, too_long.cut
        cuts = TruncationReport(max_length=max_length, policy=truncation, too_long=drops + cut, dropped=drops, cut=cut)
    assert stream.columns is not None
    tokens = None if encoder is None else encoder.tokenizer
    form = "messages" if tally.roles else "text"
    report = CheckReport(
        source=stream.source.name,
        pairs=len(survey.seen),
        prompts=survey.seen.distinct_prompts(),
        form=form,
        roles=dict(tally.roles.most_common(ROLES_SHOWN)),
        read_as=dict(stream.columns.read_as),
        layout={} if (found := stream.layout) is None else found.spelled() | found.numbers(),
        other_labels=stream.other_labels,
        reward_margins=tuple(tally.candidates()),
        prompt_columns=stream.prompt_columns,
        ignored=tuple(name for name in stream.ignored if name not in COLUMNS or form == "text"),
        unit="characters" if encoder is None else "tokens",
        lengths=tally.summary(),
        truncation=cuts,
        eval_pairs=None if evaluation is None else len(evaluation.seen),
        findings=survey.findings.summary(),
        date=None if encoder is None else encoder.clock.text(),
        touching=tally.touching,
        continuing=int(survey.seen.beginnings.parted(survey.seen.beginnings).sum()),
        unused_template=form == "text" and getattr(tokens, "chat_template", None) is not None,
        rendered=tuple(tally.rendered),
    )
    if strict:
        survey.refuse_findings()
    if output is not None:
        folder = expanded(output)
        with storage_errors(folder), locked(folder):
            remove_leftovers(folder)
            write_atomically(folder / "dropped.jsonl", too_long.lines())
            # Last: a folder with check.json is whole.
            write_atomically(folder / "check.json", report.model_dump_json(indent=2) + "\n")
    return report


def _touch(prompt: Text, completion: Text) -> bool:
    """Whether a word follows a word or the end of a sentence at once; scripts without spaces between words are left."""
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        return False
    before, after = prompt[-1:], completion[:1]
    return after.isalnum() and after < _SPACELESS and (before in _ENDS if not before.isalnum() else before < _SPACELESS)


class _Tally:
    """Everything that is counted while the pairs of one data set are read."""

    def __init__(self, stream: PairStream, encoder: Encoder | None) -> None:
        self.stream, self.encoder = stream, encoder
        self.strengths: dict[str, array[float]] = {}
        self.lengths = {side: array("I") for side in SIDES}
        self.roles: Counter[str] = Counter()
        self.rendered: list[str] = []
        self.touching = 0

    def take(self, pair: Pair, encoded: Encoded | None) -> None:
        if isinstance(pair.prompt, list):
            sides = (pair.prompt, pair.chosen)
            order = " > ".join(", ".join(m["role"] for m in side if isinstance(m, dict)) for side in sides)
            # Conversations of every length would fill the memory: what is not known by then counts as others.
            self.roles[order if order in self.roles or len(self.roles) < ORDERS else "others"] += 1
        elif self.stream.prompt_columns:  # without one, the prompt ends where the two sides part
            self.touching += all(_touch(pair.prompt, side) for side in (pair.chosen, pair.rejected))
        layout, difference = self.stream.layout, pair.score_difference
        if MARGIN not in pair.numbers and difference is not None:
            self.strengths.setdefault(DIFFERENCE, array("d")).append(difference)
        elif MARGIN not in pair.numbers and pair.strength is not None and layout is not None:
            self.strengths.setdefault(layout.strength_name() or "rank", array("d")).append(pair.strength)
        for side in SIDES:
            part = getattr(pair, side) if encoded is None else getattr(encoded, f"{side}_ids")
            self.lengths[side].append(len(part) if encoded is not None else text_length(part))
        if encoded is not None and self.encoder is not None and len(self.rendered) < RENDERED:
            texts = map(self.encoder.tokenizer.decode, (encoded.prompt_ids, encoded.chosen_ids))
            half = SHOWN // 2
            prompt, chosen = (t if len(t) <= SHOWN else f"{t[:half]}…{t[-half:]}" for t in texts)
            self.rendered.append(f"{prompt!r} | {chosen!r}")

    def summary(self) -> dict[str, Lengths]:
        found = {}
        for side, values in self.lengths.items():
            numbers = np.frombuffer(values, dtype=np.uint32)
            median, p95 = map(float, np.percentile(numbers, [50, 95]))
            found[side] = Lengths(mean=float(numbers.mean()), median=median, p95=p95, longest=int(numbers.max()))
        return found

    def candidates(self) -> Iterator[MarginCandidate]:
        for name, values in self.strengths.items():
            remedy = f"to use it, give --columns.reward_margin {shlex.quote(name)}"
            if name == DIFFERENCE:
                remedy = f"to calibrate and use it, run madpo score with --score_columns {' '.join(SCORES)}"
            numbers = np.frombuffer(values)
            low, mean, high = (float(function(numbers)) for function in (np.min, np.mean, np.max))
            yield MarginCandidate(name=name, pairs=len(values), mean=mean, lowest=low, highest=high, remedy=remedy)
