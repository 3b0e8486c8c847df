"""Pages that stand alone: a shared head, a policy that allows what stands in the page and nothing else, tables.

The page loads nothing from anywhere: styles, scripts and data stand inside. All text that comes from data is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

MARGINS_SHOWN = 50_000  # margins on a page; above, evenly spaced quantiles stand for them


def page_part(name: str) -> str:
    """A packaged part of a page: ``head.html``, ``page.css``, ``weight.js``, ``page.js``, ``report.html``."""
    return (files("madpo.report") / "page" / name).read_text(encoding="utf-8")


def page(template: str, scripts: Sequence[str], data: object, **parts: str) -> str:
    """Fill a template: ``{{name}}`` becomes ``parts[name]``, which must be HTML already.

    ``{{head}}``, ``{{scripts}}`` and ``{{data}}`` are made here; the head wants the part ``title``. Inserted text is
    not searched for further names, and the policy allows exactly the styles and scripts that stand in the page.
    """
    style, script = page_part("page.css"), "\n".join(page_part(name) for name in scripts)
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = {"style": f"<style>{style}</style>", "policy": escape(policy), "title": parts["title"]}
    made = {
        "head": _filled(page_part("head.html"), head),
        "scripts": f"<script>{script}</script>",
        "data": f'<script type="application/json" id="data">{_json(data)}</script>',
        **parts,
    }
    return _filled(page_part(template), made)


def _filled(template: str, parts: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: object) -> str:
    # "</script>" and "<!--" inside the data must not end or hide the block.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], label: str, *, plain: bool = False, sortable: bool = False
) -> str:
    """A table that scrolls sideways where it is too wide; the first cell of every row is its heading.

    Args:
        head: names of the columns, as text.
        rows: cells as HTML; what comes from data must be escaped already.
        label: of the region, for who does not see it.
        plain: smaller.
        sortable: the page's script puts buttons into the head.
    """
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row" dir="auto">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    kinds = " ".join(name for name, wanted in (("plain", plain), ("sortable", sortable)) if wanted)
    kind = f' class="{kinds}"' if kinds else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
        f"<table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(summary: str, inside: str) -> str:
    """Folded away until asked for; ``inside`` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def nothing(text: str) -> str:
    """Why a place is empty."""
    return f'<p class="nothing">{escape(text)}</p>'


def note(text: str) -> str:
    """A sentence of explanation."""
    return f'<p class="note">{escape(text)}</p>'
