"""Pages that need nothing else: jinja2 templates with their styles, scripts and data inside.

The content security policy allows exactly those styles and scripts, and all text is escaped by the templates.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from madpo.core.metrics import Estimate
from madpo.core.storage import storage_errors, write_atomically
from madpo.report import svg
from madpo.report.numbers import DASH, MINUS, interval, one, short, side

STYLES = ("palette.css", "figure.css", "page.css")
SHARED = "common.js"
MARGINS_SHOWN = 50_000  # margins on a page; above, evenly spaced quantiles take their place


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: what counts; small: lines of detail below it; plain: the text is not emphasised.
        bar: a difference with its interval, drawn on an axis through 0 that ends at plus and minus ``limit``.
    """

    text: str
    small: tuple[str, ...] = ()
    plain: bool = False
    bar: Estimate | None = None
    limit: float = 1.0

    @property
    def number(self) -> bool:
        """Whether it is a number with few words, which tables align on the right."""
        return (self.text[:1].isdigit() or self.text[:1] in ("+", MINUS)) and len(self.small) < 3

    @property
    def whisker(self) -> Markup:
        """The bar as a small figure."""
        return whisker(self.bar, self.limit) if self.bar is not None else Markup()


class Table(NamedTuple):
    """A table of a page: the first cell of every row is its heading. On a phone every row becomes a card."""

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    plain: bool = False
    sortable: bool = False

    @property
    def numbers(self) -> set[int]:
        """Places of the columns that hold numbers, or dashes in their place."""
        columns = enumerate(zip(*self.rows, strict=True))
        return {
            i for i, cells in columns if any(c.number for c in cells) and all(c.number or c.text == DASH for c in cells)
        }


class Card(NamedTuple):
    """A figure and its verdict (``kind``: "above", "below", "open"), with smaller remarks and what to doubt; and the
    figure's legend, where its marks are not named."""

    label: str
    figure: Markup | None
    text: str
    kind: str = "open"
    asides: tuple[str, ...] = ()
    doubt: str = ""
    legend: Sequence[tuple[Markup, str]] = ()


def cell(
    value: Estimate | float | str | None,
    how: str = "number",
    limit: float | None = None,
    digits: int = 2,
    more: Iterable[str] = (),
) -> Cell:
    """A number, its interval below it and then ``more``; with ``limit``, which an interval is drawn within."""
    more = tuple(filter(None, more))
    if isinstance(value, str):
        return Cell(value, more, plain=True)
    if not isinstance(value, Estimate):
        return Cell(short(value, how, digits), more)
    bar = value if limit is not None else None
    span = interval(value, how, digits).replace(" ", "\N{NO-BREAK SPACE}")
    return Cell(one(value.mean, how, digits), (span, *more), bar=bar, limit=limit or 1.0)


def limit_of(values: Iterable[object]) -> float:
    """What the intervals of a table are drawn within: the end that is farthest from 0."""
    ends = [abs(end) for value in values if isinstance(value, Estimate) for end in (value.low, value.high)]
    return max(ends, default=1.0)


def values_table(
    label: str,
    columns: Mapping[str, tuple[str, str]],
    lines: Sequence[tuple[Cell, Mapping[str, Any], Sequence[Cell]]],
    first: str = "method",
    last: Sequence[str] = (),
    **kind: bool,
) -> Table | None:
    """A table of named values, without the columns that no line has a value in; None without any.

    Args:
        columns: name of a value -> heading, and how it is written; signed values are drawn.
        lines: heading, values by name, and cells that follow them, under the heads ``last``.
    """
    shown = {name: columns[name] for name in columns if any(values.get(name) is not None for _, values, _ in lines)}
    limit = limit_of(values.get(name) for _, values, _ in lines for name, (_, how) in shown.items() if how == "signed")
    rows = [
        [head, *(cell(values.get(n), how, limit if how == "signed" else None) for n, (_, how) in shown.items()), *end]
        for head, values, end in lines
    ]
    return Table(label, [first, *(heading for heading, _ in shown.values()), *last], rows, **kind) if shown else None


def whisker(value: Estimate, limit: float) -> Markup:
    """A difference with its interval on an axis through 0."""
    x = [60 + 54 * max(-1.0, min(1.0, v / (limit or 1.0))) for v in (value.low, value.mean, value.high)]
    figure = svg.figure(120, 14, f"{one(value.mean, 'signed')}, {interval(value, 'signed')}")
    figure.set("class", f"whisker {side(value)}")
    svg.line(figure, 60, 0, 60, 14, "axis")
    svg.line(figure, x[0], 7, x[2], 7, "range")
    svg.dot(figure, x[1], 7, 0, "point", r=3)
    return svg.markup(figure)


@cache
def part(name: str) -> str:
    """A packaged part of a page: a style sheet or a script."""
    return (files("madpo.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment(*, html: bool) -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("madpo.report"),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )
    # Inside a page "</script>" and "<!--" must not end or hide the data: tojson escapes <, > and &.
    found.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}

    def plain(text: object) -> str:
        return str(text).replace("`", "'").replace("\n", " ")

    found.filters |= {
        "one": one,
        "plain": plain,
        "name": lambda place: plain(Path(place).name),
        "json": lambda value: json.dumps(value, ensure_ascii=False, default=str),
        "interval": lambda value: short(value, digits=4),
    }
    found.globals.update(svg=svg.markup)
    return found


def markdown(template: str, **context: Any) -> str:
    """A text in Markdown from a template, whose names cannot end the code or the line that they are in."""
    return _environment(html=False).get_template(template).render(**context)


def render(template: str, title: str, scripts: Sequence[str] = (), data: object = None, **context: Any) -> str:
    """A page as HTML.

    Args:
        template: its name without ".html".
        title: of the page.
        scripts: packaged scripts that run on it, in order.
        data: what the scripts read.
        context: names of the template.
    """
    style = "".join(part(name) for name in STYLES)
    script = "\n".join(part(name) for name in (SHARED, *scripts)) if scripts else ""
    allowed = [f"default-src 'none'; style-src {_digest(style)}"]
    allowed += [f"script-src {_digest(script)}"] if script else []
    policy = "; ".join([*allowed, "base-uri 'none'; form-action 'none'"])
    page = _environment(html=True).get_template(f"{template}.html")
    text = page.render(
        title=title, style=Markup(style), script=Markup(script), policy=policy, data=data or {}, **context
    )
    # A lone surrogate of the data has no place in UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def shown_margins(margins: np.ndarray) -> list[float]:
    """Margins in order, for the script of the weight curve; of very many, evenly spaced quantiles."""
    margins = np.sort(margins)
    if len(margins) > MARGINS_SHOWN:
        margins = margins[np.linspace(0, len(margins) - 1, MARGINS_SHOWN).round().astype(int)]
    return [float(h) for h in margins]


def write_page(path: Path, text: str) -> None:
    """Write a page, and the folders above it.

    Raises:
        StorageError: it cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
