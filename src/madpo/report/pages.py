"""Small pages that stand alone: a summary, and sections of tables and figures. All text is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from madpo.core.metrics import Estimate
from madpo.report import page


class Section(NamedTuple):
    """One section: its heading, a note in plain words, and its content as HTML."""

    heading: str
    note: str
    content: str


def sections_page(kind: str, title: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """The page as HTML. ``kind``, ``title``, ``summary`` (paragraphs), headings and notes are text."""
    parts = [
        f"<section><h2>{escape(s.heading)}</h2>"
        + (f'<p class="note">{escape(s.note)}</p>' if s.note else "")
        + f"{s.content}</section>"
        for s in sections
    ]
    return page(
        "sections.html",
        [],
        {},
        kind=escape(kind),
        title=escape(title),
        summary="".join(f'<p dir="auto">{escape(line)}</p>' for line in summary),
        sections="".join(parts),
    )


def cell(value: Estimate | str | float | None, digits: str = ".4f", small: str = "") -> str:
    """A cell as HTML: an estimate with its interval below, a number, or text."""
    if isinstance(value, Estimate):
        low, high = format(value.low, digits), format(value.high, digits)
        return f"{format(value.mean, digits)}<small>{low} to {high}</small>"
    text = "" if value is None else value if isinstance(value, str) else format(value, digits)
    return escape(text) + (f"<small>{escape(small)}</small>" if small else "")


def card(head: str, answers: Sequence[tuple[str, str]]) -> str:
    """A card as HTML: a head, and texts side by side under their names; all of it is text."""
    sides = "".join(
        f'<div class="answer"><h4 dir="auto">{escape(name)}</h4><p dir="auto">{escape(text)}</p></div>'
        for name, text in answers
    )
    return f'<article class="card"><p class="prompt" dir="auto">{escape(head)}</p>{sides}</article>'
