"""docs/reliability.md: commands write the sections with their counts, people the rest."""

from pathlib import Path

FIRST = "# Reliability"


def put_section(page: Path, heading: str, lines: list[str]) -> None:
    """Write a section in place of the one with its heading, or at the end.

    Args:
        heading: its second-level heading, with ``## ``.
        lines: what is below it.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else FIRST
    before, *rest = text.split("\n## ")
    found = {part.split("\n")[0].strip(): part.split("\n", 1)[-1].strip() for part in rest}
    found[heading.removeprefix("## ")] = "\n".join(lines).strip()
    parts = [before.strip(), *(f"## {name}\n\n{body}" for name, body in found.items())]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
