"""The page of what was tried, written where every reader stood it."""

import os
from pathlib import Path

import pytest

from fuzz_cases import write_page


def pytest_sessionfinish(exitstatus: int) -> None:
    """`make fuzz` writes the counts of its whole session to docs/reliability.md."""
    page = os.environ.get("MADPO_FUZZ_PAGE")
    if page and exitstatus == pytest.ExitCode.OK:
        write_page(Path(page))
