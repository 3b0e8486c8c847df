"""Trackers such as TensorBoard, trackio and wandb: whether they are there, and which of them trainings report to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from madpo.core.errors import ConfigError
from madpo.core.suggestions import did_you_mean
from madpo.models.hyperparameters import REPORT_TO


def refuse_missing_trackers(names: str | Sequence[str] | None) -> None:
    """Refuse trackers that transformers does not know, or whose package is absent.

    Raises:
        ConfigError: naming those that are there.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    installed = get_available_reporting_integrations()
    for name in [names] if isinstance(names, str) else names or ():
        if name in ("all", "none", *installed):
            continue
        known = name in INTEGRATION_TO_CALLBACK
        remedy = f"pip install {name}" if known else (did_you_mean(name, list(INTEGRATION_TO_CALLBACK)) or "")
        there = f"; installed are {', '.join(installed)}" if installed else ""
        raise ConfigError(
            f"report_to names {name!r}, {'which is not installed; ' if known else 'which is no tracker'}{remedy}{there}"
        )


@contextmanager
def reporting_to(names: Sequence[str]) -> Iterator[None]:
    """In here, trainings of this process and of its workers report to these trackers; with none, to those of before.

    Raises:
        ConfigError: as :func:`refuse_missing_trackers`.
    """
    before = os.environ.get(REPORT_TO)
    if names:
        os.environ[REPORT_TO] = ",".join(names)
    try:
        if REPORT_TO in os.environ:
            refuse_missing_trackers(os.environ[REPORT_TO].split(","))
        yield
    finally:
        if before is None:
            os.environ.pop(REPORT_TO, None)
        else:
            os.environ[REPORT_TO] = before
