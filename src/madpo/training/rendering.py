"""Conversations that a trainer renders itself: within bounds, at the date of its first start, and with a line on what
the chat template did to them.

Data that are streamed are rendered while the training reads them, under the same rules, and what is said about them
comes from their first rows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from trl.data_utils import extract_prompt, is_conversational

from madpo.core import processes
from madpo.core.columns import ID_COLUMNS
from madpo.core.errors import MadpoError, RowError, located
from madpo.core.progress import say
from madpo.data.messages import content_of
from madpo.data.templates import Clock, applied, bounded_templates, left_out, render
from madpo.data.tokens import NO_PROMPT
from madpo.runner.first_start import fixed_before, since_first_start

_STARTED = "started"
FIRST_ROWS = 256
"""Pairs of a stream that are read before the training, for what there is to say about them."""


class TextFindings:
    """What the chat template and the tokenizer did to the texts of a data set."""

    def __init__(self) -> None:
        self.conversations = self.dropped = 0

    def see(self, messages: Sequence[Mapping[str, Any]], text: str) -> None:
        """Count a conversation whose messages do not all occur in the text that the template made of it."""
        if messages and messages[-1].get("role") == "assistant" and any(map(content_of, messages)):
            self.conversations += 1
            self.dropped += bool(left_out(messages, text))

    def say(self, dataset: Any, tokenizer: Any, name: str) -> None:
        """Say in one line what was found, if there was anything; of a stream, in its first rows."""
        streamed = isinstance(dataset, IterableDataset)
        if streamed:
            dataset = Dataset.from_list(list(dataset.take(FIRST_ROWS)))
        found = []
        if self.dropped:
            found.append(f"the chat template leaves out text in {self.dropped} of {self.conversations} conversations")
        if set(ID_COLUMNS) <= set(dataset.column_names):
            marks = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
            same, doubled, ended = _in_tokens(dataset, *marks)
            if same:
                found.append(f"both sides of {same} pairs have the same tokens")
            if doubled:
                found.append(f"{doubled} pairs begin with two beginning tokens")
            if ended:
                found.append(f"{ended} pairs end with two end tokens")
        if found:
            pairs = f"{'the first ' if streamed else ''}{len(dataset)} pairs{' of a stream' if streamed else ''}"
            say(f"{name}, {pairs}: {'; '.join(found)}.")


def _in_tokens(dataset: Dataset, start: int | None, end: int | None) -> tuple[int, int, int]:
    """Pairs with equal sides, pairs with two beginning tokens, and pairs with two end tokens."""
    same = doubled = ended = 0
    for table in dataset.select_columns(list(ID_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        for prompt, chosen, rejected in zip(*(_rows(table[name].combine_chunks()) for name in ID_COLUMNS), strict=True):
            same += np.array_equal(chosen, rejected)
            first = (*prompt[:2], *chosen[:2])[:2]
            doubled += start is not None and first == (start, start)
            ended += end is not None and (end, end) in (tuple(chosen[-2:]), tuple(rejected[-2:]))
    return same, doubled, ended


def _rows(column: pa.ListArray) -> Iterator[NDArray[np.integer[Any]]]:
    """The lists of a column, without making Python numbers of their entries."""
    values = np.asarray(column.values)
    return (values[start:stop] for start, stop in pairwise(np.asarray(column.offsets)))


@contextmanager
def rendering(dataset: Any, tokenizer: Any, args: Any, name: str) -> Iterator[tuple[TextFindings, Any]]:
    """In here a trainer renders ``dataset`` within bounds, at the date of the first start of its ``output_dir``.

    Yields:
        what is found, and the tokenizer to render with: for a stream, which is read later, a copy that keeps the rules.

    Raises:
        DataError, ConfigError: in place of whatever a chat template raised, with the row.
    """
    folder = Path(args.output_dir)
    started = fixed_before(folder, _STARTED) or processes.on_main_process(lambda: Clock().now.isoformat())
    clock, findings = Clock(datetime.fromisoformat(str(started))), TextFindings()
    if isinstance(dataset, IterableDataset) and hasattr(tokenizer, "apply_chat_template"):
        bounded = copy.copy(tokenizer)
        bounded.apply_chat_template = partial(_applied_in_stream, tokenizer, clock, findings, name)
        tokenizer = bounded
    try:
        with bounded_templates(clock, findings.see):
            yield findings, tokenizer
    except MadpoError:
        raise
    except Exception as error:
        refused = _first_refused(dataset, tokenizer, clock, name)
        if refused is None:
            raise
        raise refused from error
    if clock.read:  # other trainers leave no file behind
        since_first_start(folder, _STARTED, clock.now.isoformat)
        say(f"The chat template prints the date; the texts of {folder} have that of its first start, {clock.text()}.")


def with_prompts(dataset: Any, name: str) -> Any:
    """A stream with the column prompt, where a conversation without one is refused when it is read.

    TRL's ``is_conversational`` looks at any one column, so for some hash seeds it fails on an empty prompt itself.
    """
    return dataset.map(_with_prompt, fn_kwargs={"name": name}) if isinstance(dataset, IterableDataset) else dataset


def _with_prompt(example: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = example if "prompt" in example else extract_prompt(example)
    if found["prompt"] == []:
        start = content_of(found["chosen"][0])[:40] if found["chosen"] else ""
        with located(f"{name} data set (streamed), the pair whose chosen begins {start!r}"):
            raise RowError(NO_PROMPT)
    return found


def _applied_in_stream(
    tokenizer: Any, clock: Clock, findings: TextFindings, name: str, messages: list[Any], **options: Any
) -> Any:
    """``apply_chat_template`` for a row of a stream, which has no number: its beginning names it."""
    with located(f"{name} data set (streamed), the conversation that begins {content_of(messages[0])[:40]!r}"):
        return applied(tokenizer, messages, clock, findings.see, **options)


def _first_refused(dataset: Any, tokenizer: Any, clock: Clock, name: str) -> MadpoError | None:
    """The sentence for the first row that the chat template does not render; None if it renders all."""
    for row, example in enumerate(dataset if isinstance(dataset, Dataset) else ()):
        if not {"chosen", "rejected"} <= example.keys() or not is_conversational({"chosen": example["chosen"]}):
            continue
        parts = example if "prompt" in example else extract_prompt(example)
        tools = example.get("tools")
        options = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        options |= example.get("chat_template_kwargs") or {}
        try:
            with located(f"{name} data set, row {row}"):
                if not parts["prompt"]:
                    raise RowError(NO_PROMPT)
                render(tokenizer, parts["prompt"], clock, add_generation_prompt=True, **options)
                for side in ("chosen", "rejected"):
                    render(tokenizer, parts["prompt"] + parts[side], clock, **options)
        except MadpoError as error:
            return error
    return None
