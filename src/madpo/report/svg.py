"""Parts of figures as SVG elements: scales, ticks, lines and labels.

Colours are classes of the style sheet, so that one figure serves a light and a dark page; a figure as a file has them
resolved. Elements are of ElementTree, which escapes text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from xml.etree import ElementTree as ET

from markupsafe import Markup

from madpo.report.numbers import MINUS

TICK, PHONE = 12, {360: 13, 540: 17, 720: 17}  # size of labels, and by the figure's width that on a phone (page.css)


class Scale:
    """From a value to a place: ``low`` at ``start``, ``high`` at ``end``; ``log`` is in decades, ``whole`` has whole
    ticks only."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, log: bool = False, whole: bool = False
    ) -> None:
        self.low, self.high, self.start, self.end, self.log, self.whole = low, high, start, end, log, whole

    def __call__(self, value: float) -> float:
        low, high, value = map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (value - low) * (self.end - self.start) / ((high - low) or 1.0)

    def ticks(self, about: int = 5) -> list[float]:
        """About this many round numbers from the lowest to the highest value."""
        if self.log and self.high / self.low > 10:
            decades = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [10.0**decade for decade in decades][:: math.ceil(len(decades) / about)]
        rough = max((self.high - self.low) / about, 1.0 if self.whole else 0.0)
        power = 10 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        return [round(i * step, 12) for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def value_range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """From the lowest to the highest with a share of room on both sides; never empty."""
    low, high = min(values), max(values)
    pad = (high - low) * margin if high > low else max(abs(high), 1.0) * (0.1 if margin else 0.0)
    return low - pad, high + pad if high + pad > low - pad else low + 1.0


def number(value: float) -> str:
    """As short as it is exact, with a true minus sign."""
    return f"{value:g}".replace("-", MINUS)


def width_of(words: str, size: float) -> float:
    """How wide words are drawn at most, about: as in a wide sans serif."""
    return size * sum(0.78 if letter.isupper() or letter in "mwMW%" else 0.62 for letter in words)


def cut(words: str, room: float, size: float) -> str:
    """The words, or as many of them as there is room for."""
    if width_of(words, size) <= room:
        return words
    return next((f"{words[:n]}…" for n in range(len(words), 0, -1) if width_of(f"{words[:n]}…", size) <= room), "…")


def figure(width: float, height: float, label: str) -> ET.Element:
    """An empty figure; ``label`` says what it shows to those who cannot see it."""
    box = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": _xml(label)}
    return ET.Element("svg", {**box, "class": f"figure w{width:g}"})


def line(parent: ET.Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    """A straight line."""
    ends = {name: f"{value:.1f}" for name, value in zip(("x1", "y1", "x2", "y2"), (x1, y1, x2, y2), strict=True)}
    ET.SubElement(parent, "line", {**ends, "class": kind})


def text(parent: ET.Element, x: float, y: float, words: str, kind: str) -> None:
    """Words, where there are any."""
    if words:
        ET.SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": kind}).text = _xml(words)


def path(parent: ET.Element, points: Sequence[tuple[float, float]], kind: str, title: str = "") -> None:
    """A line through points."""
    steps = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    _titled(ET.SubElement(parent, "path", {"d": f"M{steps}", "class": kind}), title)


def box(parent: ET.Element, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> None:
    """A rectangle."""
    size = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    _titled(ET.SubElement(parent, "rect", {**size, "class": kind}), title)


def dot(parent: ET.Element, x: float, y: float, shape: int, kind: str, title: str = "", r: float = 5) -> None:
    """A mark whose shape also says which series it belongs to."""
    if shape % 4 == 0:
        at = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{r:g}", "class": kind}
        _titled(ET.SubElement(parent, "circle", at), title)
        return
    corners = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0, -r - 1), (r + 1, r), (-r - 1, r)],
        3: [(0, -r - 2), (r + 2, 0), (0, r + 2), (-r - 2, 0)],
    }[shape % 4]
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    _titled(ET.SubElement(parent, "polygon", {"points": points, "class": kind}), title)


def _titled(element: ET.Element, title: str) -> None:
    if title:
        ET.SubElement(element, "title").text = _xml(title)


def _xml(words: str) -> str:
    """Without the characters that XML cannot hold, such as control characters and lone surrogates."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", words)


def markup(element: ET.Element) -> Markup:
    """The element for a page."""
    return Markup(ET.tostring(element, encoding="unicode"))


def standalone(element: ET.Element) -> str:
    """The element as a file: the light colours are resolved, on a ground of their own."""
    view = element.get("viewBox", "0 0 0 0").split()
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": " ".join(view)})
    root.set("width", view[2])
    root.set("height", view[3])
    root.set("class", "figure")
    ET.SubElement(root, "style").text = _resolved()
    ET.SubElement(root, "rect", {"width": view[2], "height": view[3], "class": "ground"})
    root.append(element)
    return ET.tostring(root, encoding="unicode") + "\n"


@cache
def _resolved() -> str:
    folder = files("madpo.report") / "templates"
    colours, rules = ((folder / name).read_text(encoding="utf-8") for name in ("palette.css", "figure.css"))
    light = dict(re.findall(r"--([\w-]+):\s*(#\w+)", colours.split("@media")[0]))
    rules = re.sub(r"var\(--([\w-]+)\)", lambda match: light[match[1]], rules)
    return f"text {{ font-family: 'DejaVu Sans', 'Segoe UI', Roboto, sans-serif; }}\n{rules}"
