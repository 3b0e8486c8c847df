"""Bars and lines: quiet for quick work, sparse in a log, live on a terminal."""

import os
import pty
import subprocess
import sys

import pytest

from madpo.core import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets; the first plain line is due."""
    now = [1000.0]
    monkeypatch.setattr("madpo.core.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_last_line", float("-inf"))
    return now


def test_quick_work_shows_nothing(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    assert list(progress.track(range(3), description="counting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_log_gets_a_line_at_most_every_15_seconds(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress.bar("training", 100) as advance:
        for _ in range(60):
            clock[0] += 1
            advance(1, loss=0.61234)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  training: 2/100, about 1 min 38 s left, loss 0.6123"
    assert [line.split()[1] for line in lines] == ["2/100,", "17/100,", "32/100,", "47/100,"]


def test_a_bar_of_unknown_length(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    for _ in progress.track(iter(range(3)), description="reading"):
        clock[0] += 3
    assert capsys.readouterr().err == "  reading: 1\n"


def test_say_keeps_the_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    progress.say("[bold]not markup[/bold]")
    assert capsys.readouterr() == ("", "[bold]not markup[/bold]\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (41.2, "41 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


LIVE = """
from madpo.core import progress
progress.SHOW_AFTER = 0.0
with progress.bar("outer [x]", 2) as advance:
    for _ in progress.track(range(2), description="inner"):
        progress.say("a [line]")
        advance(1, loss=0.5)
print("the end")
"""


def test_a_live_bar_on_a_terminal() -> None:
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    environment.pop("MADPO_PROGRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", LIVE], stderr=terminal, stdout=subprocess.PIPE, text=True, env=environment, timeout=60
    )
    os.close(terminal)
    shown = os.read(reader, 100_000).decode()
    os.close(reader)
    assert done.returncode == 0
    assert done.stdout == "the end\n"  # bars never mix into the data
    assert shown.count("a [line]") == 2
    assert "outer [x]" in shown
