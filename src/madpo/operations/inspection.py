"""Inspecting the margins of a data set: the numbers and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from madpo.core.errors import StorageError
from madpo.core.storage import expanded, storage_errors
from madpo.data.margins import read_margins
from madpo.rewards.label_share import label_share
from madpo.rewards.margins import MarginReport
from madpo.rewards.margins import inspect as inspect_margins


def inspect(
    data: str | Path, *, columns: Any = None, margin_temperature: float | None = None, output: Path | None = None
) -> MarginReport:
    """:func:`madpo.rewards.margins.inspect` for a file or hub data set; ``output`` is one HTML page to play with.

    Margins that a reward model gave to its own training pairs, as ``madpo score`` reports them, are not calibrated.
    ``heldout.jsonl`` and ``first_look.jsonl`` of a training have DPO's implicit margins too, so the report has the
    deciding number.

    Raises:
        DataError, ConfigError: as :func:`read_margins` and :func:`madpo.rewards.margins.inspect`.
        StorageError: the page cannot be written, or would replace a file that is no page.
    """
    if output is not None and (page := expanded(output)).is_file():
        with storage_errors(page), page.open("rb") as file:
            if (head := file.read(9)) and head.lower() != b"<!doctype":
                raise StorageError(f"{output} is no HTML page and would be replaced; give another --output, FILE.html")
    margins = read_margins(data, columns, sampled=0 if output is None else 500)
    report = inspect_margins(
        margins.values,
        prompts=margins.prompts,
        pair_ids=margins.pair_ids,
        margin_temperature=margin_temperature,
        texts=margins.texts,
        trained_on=_trained_on(expanded(data)),
    )
    if margins.implicit is not None:
        found = label_share(margins.implicit, margins.values, prompts=margins.prompts)
        report = report.model_copy(update={"share": found})
    if output is not None:
        from madpo.report.margin_page import write_margin_page

        write_margin_page(expanded(output), str(data), report, margins)
    return report


def _trained_on(data: Path) -> bool:
    """Whether ``madpo score`` wrote the file and says that its reward model was trained on these pairs."""
    try:
        about = json.loads((data.parent / "report.json").read_bytes())
        return bool(about["file"] == data.name and about["trained_on"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
