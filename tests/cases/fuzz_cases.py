"""What fuzzers feed to our own readers, and the count of what they tried.

The rule: a reader takes its input, or says one sentence (MadpoError); no other exception, and no file more or less.
"""

import json
import os
import platform
import shutil
import tomllib
from collections import Counter
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from madpo.core.errors import MadpoError
from sections import put_section

EXECUTIONS: Counter[str] = Counter()
"""Inputs tried, by reader."""
EXAMPLES = int(os.environ.get("MADPO_FUZZ", "15"))
fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize="MADPO_FUZZ" not in os.environ,  # the suite tries the same inputs every time, `make fuzz` new ones
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TOKENS = [b"null", b"NaN", b"-Infinity", b"{}", b"[]", b'"', b"1e999", b"\\ud800", b"\x00", b"../", b"9" * 40, b"true"]


def everything(folder: Path) -> dict[str, bytes | None]:
    """All files and folders with their contents."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def survives(reader: str, read, folder: Path, *, writes: bool = False) -> object:
    """What ``read()`` gives, or its sentence; anything else is a failure."""
    EXECUTIONS[reader] += 1
    before = None if writes else everything(folder)
    try:
        found = read()
    except MadpoError as error:
        found = error
    if isinstance(found, MadpoError):
        assert str(found)
        assert "\n" not in str(found).strip(), str(found)
    assert before is None or everything(folder) == before, "a reader writes nothing"
    return found


@st.composite
def damaged(draw, good: bytes) -> bytes:
    """A good file with bytes changed, cut, doubled, or put in."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["change", "cut", "insert", "double"]))
        if how == "change" and content:
            content[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del content[at : at + draw(st.integers(1, 40))]
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=6) | st.sampled_from(TOKENS))
        elif how == "double":
            content[at:at] = content[at : at + 30]
    return bytes(content)


@st.composite
def mutated(draw, tree):
    """A JSON value with some of its parts replaced, renamed or taken away."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        paths = list(_paths(tree))
        if not paths:
            return draw(values)
        path = draw(st.sampled_from(paths))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if how == "remove":
            del parent[path[-1]]
        elif how == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8) | st.just("../../x"))] = parent.pop(path[-1])
        else:
            parent[path[-1]] = draw(values | st.sampled_from(["../../x", "/etc/passwd", "a" * 300, 10**30, "\x00"]))
    return tree


def _paths(tree, prefix=()):
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in entries:
        yield (*prefix, key)
        yield from _paths(inner, (*prefix, key))


def as_toml(tree) -> bytes:
    """A tree as TOML where it can be, else as JSON (which no TOML reader takes)."""
    from madpo.operations.running import toml

    try:
        text = toml(tree)
        tomllib.loads(text)
    except (MadpoError, ValueError, TypeError, AttributeError):
        text = json.dumps(tree)
    return text.encode("utf-8", errors="surrogatepass")


def fresh(folder: Path, name: str) -> Path:
    """An empty folder of that name."""
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir(parents=True)
    return folder / name


def write_page(page: Path) -> None:
    """The section of docs/reliability.md with the inputs tried."""
    rows = [f"| {reader} | {count:,} |" for reader, count in sorted(EXECUTIONS.items())]
    lines = [
        "`make fuzz` feeds files to every reader of ours: good ones with fields replaced, renamed or taken away, with",
        "bytes changed, cut, doubled or put in, and bytes at random. A reader takes its input or says one sentence,",
        "without any other exception, and leaves no file more or less (a report leaves its own files). A packaged GGUF",
        "is never parsed unless its bytes are the known ones. Every input below ended in one of these two ways.",
        "",
        "| reader | inputs tried |",
        "| --- | --- |",
        *rows,
        f"| **all** | **{EXECUTIONS.total():,}** |",
        "",
        f"{EXAMPLES} examples a test (some read one input with several readers); hypothesis {hypothesis.__version__},",
        f"Python {platform.python_version()}. `make test` tries 15 examples a test, the same ones every time.",
    ]
    put_section(page, "## Inputs tried", lines)
