"""Inspecting the margins of a data set: the numbers and the page."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from madpo.core.config import Frozen
from madpo.core.storage import expanded
from madpo.data.margins import SUSPICIOUS, read_margins
from madpo.rewards.margins import MarginReport, inspect


class InspectSettings(Frozen):
    """What ``madpo inspect`` may be told in a file."""

    margin_temperature: float | None = Field(default=None, gt=0)


def inspect_data(
    data: str | Path, *, margin_temperature: float | None = None, output: Path | None = None
) -> MarginReport:
    """:func:`inspect` for a file or hub data set; with ``output``, also one HTML page to look at and play with.

    Raises:
        DataError, ConfigError: as :func:`read_margins` and :func:`inspect`.
        StorageError: the page cannot be written.
    """
    margins = read_margins(data, shown=SUSPICIOUS, sampled=0 if output is None else 500)
    report = inspect(
        margins.values, pair_ids=margins.pair_ids, margin_temperature=margin_temperature, texts=margins.texts
    )
    if output is not None:
        from madpo.report.margin_page import write_margin_page

        write_margin_page(expanded(output), str(data), report, margins)
    return report
