"""Pages that need nothing else: jinja2 templates with their styles, scripts and data inside.

The content security policy allows exactly those styles and scripts, and all text is escaped by the templates.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
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
from madpo.report.drawing import NUMBERS
from madpo.report.numbers import DASH, interval, one, short

STYLES = ("palette.css", "figure.css", "page.css")
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


def cell(
    value: Estimate | float | str | None, how: str = "number", limit: float | None = None, digits: int = 2
) -> Cell:
    """A number, its interval below it; with ``limit``, which an interval is drawn within."""
    if isinstance(value, str):
        return Cell(value, plain=True)
    if not isinstance(value, Estimate):
        return Cell(short(value, how, digits))
    bar = value if limit is not None else None
    return Cell(one(value.mean, how, digits), (interval(value, how, digits),), bar=bar, limit=limit or 1.0)


def whisker(value: Estimate, limit: float) -> Markup:
    """A difference with its interval on an axis through 0."""
    x = [60 + 54 * max(-1.0, min(1.0, v / (limit or 1.0))) for v in (value.low, value.mean, value.high)]
    kind = "above" if value.low > 0 else "below" if value.high < 0 else "open"
    figure = svg.figure(120, 14, f"{one(value.mean, 'signed')}, {interval(value, 'signed')}")
    figure.set("class", f"whisker {kind}")
    svg.line(figure, 60, 0, 60, 14, "axis")
    svg.line(figure, x[0], 7, x[2], 7, "range")
    svg.dot(figure, x[1], 7, 0, "point", r=3)
    return svg.markup(figure)


@cache
def part(name: str) -> str:
    """A packaged part of a page: a style sheet or a script."""
    return (files("madpo.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("madpo.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Inside a page "</script>" and "<!--" must not end or hide the data: tojson escapes <, > and &.
    found.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    filters: dict[str, Callable[..., str]] = {"one": one, "short": short, "interval": interval}
    found.filters.update(filters)
    found.globals.update(dash=DASH, svg=svg.markup, NUMBERS=NUMBERS)
    return found


def render(template: str, title: str, scripts: Sequence[str] = (), data: object = None, **context: Any) -> str:
    """A page as HTML.

    Args:
        template: its name without ".html".
        title: of the page.
        scripts: packaged scripts that run on it, in order.
        data: what the scripts read.
        context: names of the template.
    """
    style, script = "".join(part(name) for name in STYLES), "\n".join(part(name) for name in scripts)
    allowed = [f"default-src 'none'; style-src {_digest(style)}"]
    allowed += [f"script-src {_digest(script)}"] if script else []
    policy = "; ".join([*allowed, "base-uri 'none'; form-action 'none'"])
    page = _environment().get_template(f"{template}.html")
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
