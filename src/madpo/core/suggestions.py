"""The nearest known name for a wrong one: names that other tools use for the same thing, then close matches."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from importlib.resources import files


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` most likely means, both dotted or not; None where nothing comes near."""
    names = list(known)
    last = word.rpartition(".")[2]
    table = tomllib.loads((files("madpo.core") / "suggestions.toml").read_text(encoding="utf-8"))
    for ours, theirs in table.items():
        if ours in names and last in theirs.split():
            return ours
    by_end = {name.rpartition(".")[2]: name for name in reversed(names)}
    if last in by_end and last.isidentifier():
        return by_end[last]
    longer = sorted((name for name in by_end if len(last) > 2 and name.startswith(last)), key=len)
    tried = ((word, names), (last, by_end))
    close, of_end = (difflib.get_close_matches(one, of, n=1, cutoff=0.65) for one, of in tried)
    close = close or longer or of_end
    return by_end.get(close[0], close[0]) if close else None


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean 'x'?"`` for a near miss, else ``""``."""
    near = nearest(word, known)
    return f"; did you mean {prefix + near!r}?" if near else ""
