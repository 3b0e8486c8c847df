"""What fuzzers feed to our own readers, and the count of what they tried.

The rule: a reader takes its input, or says one sentence (MadpoError); no other exception, and no file more or less.
"""

import functools
import json
import os
import platform
import resource
import shutil
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from madpo.core.errors import MadpoError
from practice_cases import everything
from sections import put_section

EXECUTIONS: Counter[str] = Counter()
"""What readers were given, by reader."""
INPUTS: Counter[str] = Counter()
"""Inputs tried, by test. Some tests give an input to several readers."""


def fuzzed(quick: int = 15, share: float = 1):
    """A property that is tried with ``quick`` inputs, the same every time; with a third of them by `make test`.

    `make fuzz` tries ``share * $MADPO_FUZZ`` new ones: more where an input costs a millisecond, fewer where it costs
    hundreds.
    """
    tried = quick if settings.default.max_examples > 100 else quick // 3

    def decorated(test):
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def counted(*args, **named):
            before = EXECUTIONS.total()
            inner(*args, **named)
            INPUTS[test.__name__] += EXECUTIONS.total() > before

        test.hypothesis.inner_test = counted
        return settings(
            max_examples=int(share * int(os.environ.get("MADPO_FUZZ", 0))) or tried,
            derandomize="MADPO_FUZZ" not in os.environ,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(test)

    return decorated


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TOKENS = [b"null", b"NaN", b"-Infinity", b"{}", b"[]", b'"', b"1e999", b"\\ud800", b"\x00", b"../", b"9" * 40, b"true"]


class Reader(NamedTuple):
    """A reader of ours, and a folder that it takes.

    To fuzz another one, write such a row: ``read`` gets a folder in which :func:`changed` has changed something.
    """

    name: str
    """Its row in the table of counts."""
    files: Callable[[], Mapping[str, bytes]]
    """The good folder: relative paths and contents. Called once an input, so it should remember them."""
    read: Callable[[Path], object]
    """Takes the folder, or raises a MadpoError."""
    touched: tuple[str, ...] = ()
    """The only files to change; without any, all are."""

    def tried(self, data: st.DataObject, folder: Path) -> object:
        """One input: a changed folder is written and read."""
        place = fresh(folder, "folder")
        for name, content in data.draw(changed(self.files(), self.touched)).items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        return survives(self.name, lambda: self.read(place), folder)


SECONDS, GROWTH = 30, 2 * 2**30
"""Processor time and memory (bytes) that no input of a few kilobytes may take."""


def survives(reader: str, read, folder: Path, *, writes: bool = False) -> object:
    """What ``read()`` gives, or its sentence; anything else is a failure."""
    EXECUTIONS[reader] += 1
    before = None if writes else everything(folder)
    began, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = read()
    except MadpoError as error:
        found = error
    if isinstance(found, MadpoError):
        assert str(found)
        assert "\n" not in str(found).strip(), str(found)
    assert before is None or everything(folder) == before, "a reader writes nothing"
    assert time.process_time() - began < SECONDS, "a small input takes long"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024 < GROWTH, "a small input takes memory"
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


@st.composite
def bent(draw, tree):
    """A JSON value with one or two places changed, which are found from the outside in.

    So the few fields at the top of a large file are met as often as its thousands of words.
    """
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 2))):
        parent = key = None
        value = tree
        while isinstance(value, dict | list) and value and (parent is None or draw(st.integers(0, 2))):
            keys = sorted(value) if isinstance(value, dict) else range(len(value))
            parent, key = value, draw(st.sampled_from(list(keys)))
            value = value[key]
        if parent is None:
            return draw(values)
        how = draw(st.sampled_from(["other", "other", "near", "near", "remove", "rename"]))
        if how == "remove":
            del parent[key]
        elif how == "rename" and isinstance(parent, dict):
            name = draw(st.text(max_size=8) | st.sampled_from(sorted(parent)))
            parent[name] = parent.pop(key)
        else:  # a copy: what is drawn may be a part of the tree, and is changed in the next round
            parent[key] = json.loads(json.dumps(draw(_near(value, tree) if how == "near" else values | ODD)))
    return tree


ODD = st.sampled_from(
    ["../../x", "/etc/passwd", "a" * 300, "\x00", "x/y", 10**30, 2**31, -(2**63), 10**6, 1e308, {}, [], [[]], ""]
)


def _near(value, tree):
    """A value of the same type, or one from another place of the file: what a mistaken edit gives."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int):
        return st.sampled_from([0, 1, -1, 2, value + 1, value - 1, value * 2, value * 1000]) | st.integers()
    if isinstance(value, float):
        return st.sampled_from([0.0, -value, 1 / 3, value * 1e6]) | st.floats(allow_nan=False, allow_infinity=False)
    if isinstance(value, str):
        return st.sampled_from([value.upper(), value + value, value[:-1], value[::-1]]) | st.text(max_size=8)
    return st.sampled_from([*(tree.values() if isinstance(tree, dict) else tree), None])


@st.composite
def safetensors_damaged(draw, good: bytes) -> bytes:
    """A file of tensors with another header, other numbers, or a part of it gone."""
    length = int.from_bytes(good[:8], "little")
    header, tensors = json.loads(good[8 : 8 + length]), good[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")
    how = draw(st.sampled_from(["header", "lose", "rename", "prefix", "shape", "dtype", "cut", "fill", "length"]))
    name = draw(st.sampled_from(names))
    if how == "header":
        header = draw(bent(header))
    elif how == "lose":
        del header[name]
    elif how == "rename":
        header[draw(st.sampled_from([name + ".x", name.upper(), name.replace("weight", "bias")]))] = header.pop(name)
    elif how == "prefix":
        prefix = draw(st.sampled_from(["module.", "base_model.model.", "x."]))
        header = {prefix + key if key in names else key: value for key, value in header.items()}
    elif how == "shape":
        header[name]["shape"] = draw(st.sampled_from([header[name]["shape"][::-1], [1], [], [0], [-1], [2**40]]))
    elif how == "dtype":
        header[name]["dtype"] = draw(st.sampled_from(["BF16", "F16", "I32", "F64", "BOOL", "F8_E4M3", "X"]))
    elif how == "cut":
        return good[: draw(st.integers(0, len(good) - 1))]
    elif how == "fill":  # NaN in every format of floats
        start, stop = header[name]["data_offsets"]
        tensors = tensors[:start] + b"\xff" * (stop - start) + tensors[stop:]
    text = json.dumps(header).encode()
    claimed = draw(st.sampled_from([0, 2**20, 2**62])) if how == "length" else len(text)
    return claimed.to_bytes(8, "little") + text + tensors


def _by_name(name: str, good: bytes):
    """The ways to damage a file that only fit files of its kind."""
    if name.endswith(".safetensors"):
        return [safetensors_damaged(good)] * 3
    if name.endswith(".json"):
        return [bent(json.loads(good)).map(lambda tree: json.dumps(tree).encode())] * 5
    if name.endswith(".toml"):
        return [mutated(tomllib.loads(good.decode())).map(as_toml)] * 3
    return []


@st.composite
def changed(draw, files: Mapping[str, bytes], touched: tuple[str, ...] = ()) -> dict[str, bytes]:
    """A folder with one or two of its files changed: damaged as their kind can be, cut, emptied, exchanged, removed."""
    found = dict(files)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(set(touched or found) & found.keys()) or sorted(found)))
        good = files[name]
        others = st.sampled_from(sorted(files)).map(lambda other: files[other])
        ways = [*_by_name(name, good), damaged(good), st.sampled_from([b"", b"{}", b"[]", b"null"]), others]
        kinds = [*ways, st.integers(0, len(good)).map(lambda end, good=good: good[:end]), st.none()]
        content = draw(kinds[draw(st.integers(0, len(kinds) - 1))])
        if content is None:
            del found[name]
            if not found:
                break
        else:
            found[name] = content
    return found


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
        "`make fuzz` feeds files to every reader of ours, those of models, adapters and tokenizers included: good ones",
        "with fields replaced, renamed or taken away, with bytes changed, cut, doubled or put in, with tensors lost,",
        "renamed or reshaped, and bytes at random. A reader takes its input or says one sentence, in 30 seconds and",
        "2 GB, without any other exception, and leaves no file more or less (a report leaves its own files).",
        "A packaged GGUF is never parsed unless its bytes are the known ones. Every reading below ended in one of",
        f"these two ways: {INPUTS.total():,} inputs, of which some are read by several readers.",
        "",
        "| reader | readings |",
        "| --- | --- |",
        *rows,
        f"| **all** | **{EXECUTIONS.total():,}** |",
        "",
        f"Tried with hypothesis {hypothesis.__version__}, Python {platform.python_version()}. `make test` tries 5 or",
        "15 inputs a test, the same ones every time.",
    ]
    put_section(page, "## Inputs tried", lines)
