"""The table of ``docs/layouts.md`` out of the table of layouts; run as a script, it writes it there."""

import re
from pathlib import Path

from madpo.core.layout import Packaged, packaged_layouts

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"
HEADING = "| layout | completions | ordered by | data sets |\n| --- | --- | --- | --- |\n"


def table() -> str:
    """A row for each packaged layout."""
    return HEADING + "".join(_row(layout) for layout in packaged_layouts())


def _row(layout: Packaged) -> str:
    found = layout.spelled()
    ordering = {field: found.pop(field) for field in ("label", "score", "rank", "order") if field in found}
    prompt = [f"prompt {_code(', '.join(layout.prompt))}"] if layout.prompt else []
    completions = ", ".join([f"{field} {_code(name)}" for field, name in found.items()] + prompt)
    order = ", ".join(f"{field} {_code(name)}" for field, name in ordering.items())
    return f"| `{layout.name}` | {completions} | {order} | {'; '.join(layout.of)} |\n"


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(re.sub(re.escape(HEADING) + r"(\|.*\n)*", lambda _: table(), page))
