"""Data that is broken in every way we could think of: each gives one sentence, never a traceback or partial output."""
# ruff: noqa: E501  (one breakage on each line reads as the table that it is)

import gzip
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from madpo.commands.cli import main
from madpo.core.errors import ConfigError, DataError
from madpo.data import check, load_preferences, raw
from refusals import refused

GOOD = {"prompt": "Say hi.", "chosen": " Hi!", "rejected": " No."}
USER = {"role": "user", "content": "Say hi."}
HI, NO = {"role": "assistant", "content": "Hi!"}, {"role": "assistant", "content": "No."}
CHAT = {"prompt": [USER], "chosen": [HI], "rejected": [NO]}


class Broken(NamedTuple):
    name: str
    make: Callable[[Path], Path]
    names: tuple[Any, ...] | None = None
    """What the sentence names, besides the file; None where the data is accepted."""
    finding: str = ""
    """For accepted data: the warning that it gives; "" for none at all."""


def _bytes(file: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / file
        path.write_bytes(content)
        return path

    return make


def _rows(*rows: Any) -> Callable[[Path], Path]:
    return _bytes("d.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def _with(**fields: Any) -> Callable[[Path], Path]:
    """A good row, then one with ``fields``."""
    return _rows(GOOD | {k: 1.0 for k in fields if k in ("reward_margin", "weight")}, GOOD | {"prompt": "b"} | fields)


def _line(text: str) -> Callable[[Path], Path]:
    """A good row, then this text."""
    return _bytes("d.jsonl", (json.dumps(GOOD) + "\n" + text).encode())


def _parquet(names: list[str], columns: list[list[Any]], *, cut: int = 0, flip: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "d.parquet"
        pq.write_table(pa.Table.from_arrays([pa.array(c) for c in columns], names=names), path, compression="none")
        data = bytearray(path.read_bytes())
        if flip:
            data[4:40] = b"\xff" * 36
        path.write_bytes(data[: len(data) - cut])
        return path

    return make


def _folder(folder: Path) -> Path:
    (folder / "data.jsonl").mkdir()
    return folder / "data.jsonl"


def _loop(folder: Path) -> Path:
    (folder / "a.jsonl").symlink_to(folder / "b.jsonl")
    (folder / "b.jsonl").symlink_to(folder / "a.jsonl")
    return folder / "a.jsonl"


def _dangling(folder: Path) -> Path:
    (folder / "a.jsonl").symlink_to(folder / "gone.jsonl")
    return folder / "a.jsonl"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "d.jsonl")
    return folder / "d.jsonl"


def _secret(folder: Path) -> Path:
    path = _rows(GOOD)(folder)
    path.chmod(0)
    return path


def _socket(folder: Path) -> Path:
    path = folder / "d.csv"
    with socket.socket(socket.AF_UNIX) as s:
        here = Path.cwd()
        os.chdir(folder)  # the address of a socket is short
        try:
            s.bind("d.csv")
        finally:
            os.chdir(here)
    return path


T = "prompt,chosen,rejected\n"
LINE = (json.dumps(GOOD) + "\n").encode()
TABLE = [
    # the file
    Broken("missing", lambda f: f / "gone.jsonl", ("owner/name",)),
    Broken("folder", _folder, (".jsonl",)),
    Broken("symlink loop", _loop, ()),
    Broken("dangling link", _dangling, ("owner/name",)),
    Broken("pipe", _pipe, ()),
    Broken("socket", _socket, ()),
    Broken("no permission", _secret, ()),
    Broken("file as folder", lambda f: _rows(GOOD)(f) / "x.jsonl", ()),
    Broken("name too long", lambda f: f / ("x" * 5000 + ".jsonl"), ()),
    Broken("NUL in the path", lambda f: f / "a\0b.jsonl", (".jsonl", "owner/name")),
    Broken("unknown ending", _bytes("d.txt", LINE), ("'.txt'", ".jsonl")),
    Broken("no ending", _bytes("data", LINE), ("''", ".jsonl")),
    Broken("zero bytes", _bytes("d.jsonl", b""), ()),
    Broken("zero bytes of CSV", _bytes("d.csv", b""), ()),
    Broken("zero bytes of Parquet", _bytes("d.parquet", b""), ()),
    Broken("only blank lines", _bytes("d.jsonl", b"\n \n\r\n"), ()),
    Broken("CSV with only a header", _bytes("d.csv", T.encode()), ()),
    Broken("Parquet without rows", _parquet(["prompt", "chosen", "rejected"], [[], [], []]), ()),
    # encodings
    Broken("Latin-1", _bytes("d.jsonl", LINE + '{"prompt": "é"}\n'.encode("latin-1")), ("line 2", ("byte 12", "0xe9"), "UTF-8")),
    Broken("Latin-1 in CSV", _bytes("d.csv", (T + "é,a,b\n").encode("latin-1")), ("line 2", ("byte 0", "0xe9"), "UTF-8")),
    Broken("UTF-16 with mark", _bytes("d.jsonl", LINE.decode().encode("utf-16")), ("UTF-16", "UTF-8")),
    Broken("UTF-16 without mark", _bytes("d.jsonl", LINE.decode().encode("utf-16-le")), ("line 1", "UTF-8")),
    Broken("UTF-32 with mark", _bytes("d.jsonl", LINE.decode().encode("utf-32")), ("UTF-32", "UTF-8")),
    Broken("UTF-32", _bytes("d.jsonl", LINE.decode().encode("utf-32-be")), ("line 1", "UTF-8")),
    Broken("byte-order mark", _bytes("d.jsonl", b"\xef\xbb\xbf" + LINE)),
    Broken("byte-order mark in CSV", _bytes("d.csv", b"\xef\xbb\xbf" + T.encode() + b"p,a,b\n")),
    Broken("CRLF", _bytes("d.jsonl", LINE.replace(b"\n", b"\r\n") * 1)),
    Broken("CRLF in CSV", _bytes("d.csv", T.replace("\n", "\r\n").encode() + b"p,a,b\r\n")),
    Broken("only CR", _bytes("d.jsonl", LINE.replace(b"\n", b"\r") * 2), ("carriage return",)),
    Broken("only CR in CSV", _bytes("d.csv", (T + "p,a,b\n").replace("\n", "\r").encode()), ("carriage return",)),
    Broken("half a surrogate pair", _line('{"prompt": "a", "chosen": "\\ud83d", "rejected": "b"}\n'), ("line 2", "chosen")),
    Broken("binary noise", _bytes("d.jsonl", bytes(range(256)) * 8), ("line 1", "UTF-8")),
    Broken("overlong UTF-8", _bytes("d.jsonl", LINE + b'"\xc0\xaf"\n'), ("line 2", "byte 1", "UTF-8")),
    # compression and mistaken names
    Broken("gzip", _bytes("d.jsonl.gz", gzip.compress(LINE))),
    Broken("gzip without .gz", _bytes("d.jsonl", gzip.compress(LINE)), ("gzip", ".gz")),
    Broken("gzip cut", _bytes("d.jsonl.gz", gzip.compress(LINE * 99)[:-12]), ()),
    Broken("gzip only by name", _bytes("d.csv.gz", T.encode()), (".gz",)),
    Broken("zip", _bytes("d.csv", b"PK\x03\x04" + b"0" * 40), ("ZIP", ".jsonl")),
    Broken("zstd", _bytes("d.jsonl", b"\x28\xb5\x2f\xfd" + b"0" * 40), ("zstd -d",)),
    Broken("zstd called what it is", _bytes("d.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"0" * 40), ("zstd -d",)),
    Broken("zstd called Parquet", _bytes("d.parquet", b"\x28\xb5\x2f\xfd" + b"0" * 40), ("zstd -d",)),
    Broken("Excel", _bytes("d.xlsx", b"PK\x03\x04" + b"0" * 40), ("Excel", ".csv")),
    Broken("older Excel", _bytes("d.xls", b"\xd0\xcf\x11\xe0" + b"0" * 40), ("Excel", ".csv")),
    Broken("Arrow", _bytes("d.arrow", b"\xff\xff\xff\xff" + b"0" * 40), ("save_to_disk",)),
    Broken("Parquet called JSONL", _bytes("d.jsonl", b"PAR1" + b"0" * 40), (".parquet",)),
    Broken("JSONL called Parquet", _bytes("d.parquet", LINE), ("PAR1",)),
    # JSON
    Broken("pretty-printed JSON", _bytes("d.jsonl", json.dumps(GOOD, indent=1).encode()), ("line 1", "JSON")),
    Broken("cut in a row", _bytes("d.jsonl", LINE + LINE[:20]), ("line 2",)),
    Broken("a row that is text", _line('"hello"\n'), ("line 2", "'hello'")),
    Broken("a row that is null", _line("null\n"), ("line 2", "null")),
    Broken("a row that is a list", _line("[1]\n"), ("line 2", "1 entries")),
    Broken("single quotes", _line("{'prompt': 'a'}\n"), ("line 2", "JSON")),
    Broken("key twice", _line('{"prompt": "a", "chosen": "b", "chosen": "c"}\n'), ("line 2", "'chosen'")),
    Broken("deep nesting", _line('{"chosen": ' + "[" * 100_000 + "\n"), ("line 2",)),
    Broken("huge number", _line('{"chosen": ' + "1" * 5000 + "}\n"), ("line 2", "4300")),
    Broken("row too long", _bytes("d.jsonl", b" " * (raw.MAX_ROW + 2)), ("line 1", "64 MB")),
    # columns
    Broken("column margin", _rows(GOOD | {"margin": 1.0}), ("'margin'", "'reward_margin'")),
    Broken("column margin later", _with(margin=1.0), ("line 2", "'margin'", "'reward_margin'")),
    Broken("column margin in CSV", _bytes("d.csv", b"chosen,rejected,margin\n"), ("'margin'", "'reward_margin'")),
    Broken("no rejected", _rows({"prompt": "a", "chosen": "b"}), ("'rejected'", "'prompt', 'chosen'")),
    Broken("near name", _rows({"prompt": "a", "choosen": "b", "rejected": "c"}), ("'chosen'", "--columns.chosen choosen --columns.rejected rejected")),
    Broken("no keys at all", _rows({}), ("line 1", "'chosen'")),
    Broken("one score", _rows(GOOD | {"chosen_score": 1})),
    Broken("duplicate columns in CSV", _bytes("d.csv", b"prompt,chosen,rejected,chosen\n"), ("'chosen'",)),
    Broken("duplicate columns in Parquet", _parquet(["chosen", "chosen", "rejected"], [["a"]] * 3), ("'chosen'",)),
    Broken("more keys in a row", _rows(GOOD, GOOD | {"prompt": "b", "note": "x", "n": {"a": [None]}})),
    Broken("fewer keys in a row", _rows(GOOD, {"prompt": "a", "chosen": "b"}), ("line 2", "'rejected'")),
    Broken("margin from the second row on", _rows(GOOD, GOOD | {"reward_margin": 1}), ("line 2", "'reward_margin'")),
    Broken("margin only in the first row", _rows(GOOD | {"reward_margin": 1}, GOOD), ("line 2", "'reward_margin'")),
    # values
    Broken("null", _with(chosen=None), ("line 2", ("chosen", "null"))),
    Broken("null prompt", _with(prompt=None), ("line 2", ("prompt", "null"))),
    Broken("number for text", _with(chosen=3), ("line 2", ("chosen", "3"))),
    Broken("true for text", _with(rejected=True), ("line 2", ("rejected", "True"))),
    Broken("a message for text", _with(chosen=HI), ("line 2", "chosen", "rejected")),
    Broken("object for text", _with(chosen={"a": 1}), ("line 2", ("chosen", "'a'"))),
    Broken("ShareGPT's keys", _with(chosen={"from": "gpt", "value": "a"}), ("line 2", "chosen", "rejected")),
    Broken("empty list", _with(chosen=[]), ("line 2", "chosen")),
    Broken("NaN margin", _with(reward_margin=float("nan")), ("line 2", ("reward_margin", "nan"))),
    Broken("infinite margin", _with(reward_margin=float("-inf")), ("line 2", ("reward_margin", "-inf"))),
    Broken("overflowing margin", _with(reward_margin=10**400), ("line 2", ("reward_margin", "inf"))),
    Broken("text margin", _with(reward_margin="0.5"), ("line 2", ("reward_margin", "'0.5'"))),
    Broken("true margin", _with(reward_margin=True), ("line 2", ("reward_margin", "True"))),
    Broken("null margin", _with(reward_margin=None), ("line 2", ("reward_margin", "null"))),
    Broken("decimal comma", _with(reward_margin="1,5"), ("line 2", ("reward_margin", "'1,5'"), ("1234.5", "commas and quotes"))),
    Broken("decimal comma in CSV", _bytes("d.csv", b"chosen;rejected;reward_margin\na;b;1,5\n"), ("line 2", ("reward_margin", "'1,5'"), ("1234.5", "commas"))),
    Broken("list margin", _with(reward_margin=[1.0]), ("line 2", ("reward_margin", "1 entries"))),
    Broken("negative weight", _with(weight=-1.0), ("line 2", ("weight", "-1.0"))),
    Broken("text number in CSV", _bytes("d.csv", b"chosen,rejected,reward_margin\na,b,high\n"), ("line 2", ("reward_margin", "'high'"))),
    Broken("empty number in CSV", _bytes("d.csv", b"chosen,rejected,reward_margin\na,b,\n"), ("line 2", ("reward_margin", "''"))),
    Broken("NaN in CSV", _bytes("d.csv", b"chosen,rejected,reward_margin\na,b,nan\n"), ("line 2", ("reward_margin", "nan"))),
    Broken("pair_id in a later row", _with(pair_id=1), ("line 2", "'pair_id'")),
    Broken("pair_id as a fraction", _rows(GOOD | {"pair_id": 1.5}), ("line 1", ("pair_id", "1.5"))),
    Broken("several bad rows", _rows(GOOD, {}, GOOD | {"chosen": 1}, GOOD | {"chosen": 2}), ("line 2", ("2 more", "3, 4"))),
    # CSV
    Broken("ragged CSV", _bytes("d.csv", (T + "a,b\n").encode()), ("line 2", ("2 fields", "3"))),
    Broken("comma without quotes", _bytes("d.csv", (T + "a,b,c,d\n").encode()), ("line 2", ("4 fields", "3"))),
    Broken("quote never closed", _bytes("d.csv", (T + 'a,"b,c\nd,e,f\n').encode()), ("line 3", "CSV")),
    Broken("text after a quote", _bytes("d.csv", (T + 'a,"b"x,c\n').encode()), ("line 2", "CSV")),
    Broken("blank header", _bytes("d.csv", b"\na,b\n"), ("prompt", "chosen", "rejected")),
    Broken("quote in the header", _bytes("d.csv", b'"prompt,chosen'), ("line 1", "CSV")),
    # Parquet
    Broken("Parquet cut", _parquet(["chosen", "rejected"], [["a"], ["b"]], cut=9), ("Parquet",)),
    Broken("Parquet scribbled over", _parquet(["chosen", "rejected"], [["a" * 99], ["b"]], flip=True), ("row 0",)),
    Broken("Parquet null", _parquet(["chosen", "rejected"], [["a", None], ["b", "c"]]), ("row 1", ("chosen", "null"))),
    Broken("Parquet NaN", _parquet(["chosen", "rejected", "weight"], [["a"], ["b"], [float("nan")]]), ("row 0", ("weight", "nan"))),
    Broken("Parquet bytes", _parquet(["chosen", "rejected"], [[b"a"], [b"b"]]), ("row 0", ("chosen", "bytes"))),
    # conversations
    Broken("text and messages in one row", _rows(CHAT | {"chosen": "Hi!"}), ("line 1", "chosen", "rejected")),
    Broken("text after messages", _rows(CHAT, GOOD), ("line 2",)),
    Broken("message without role", _rows(CHAT | {"chosen": [{"content": "a"}]}), ("line 1", ("chosen[0]", "'content'"), "role")),
    Broken("ShareGPT", _rows(CHAT | {"chosen": [{"from": "gpt", "value": "a"}]})),
    Broken("another role", _rows(CHAT | {"chosen": [{"role": "gpt", "content": "a"}]})),
    Broken("unknown role", _rows(CHAT | {"chosen": [{"role": "critic", "content": "a"}]}), ("line 1", ("chosen[0].role", "'critic'"), "system")),
    Broken("role as a number", _rows(CHAT | {"chosen": [{"role": 1, "content": "a"}]}), ("line 1", ("chosen[0].role", "1"), "system")),
    Broken("role as a list", _rows(CHAT | {"chosen": [{"role": [], "content": "a"}]}), ("line 1", "chosen[0].role", "system")),
    Broken("null content", _rows(CHAT | {"chosen": [HI | {"content": None}]}), ("line 1", ("chosen[0].content", "null"))),
    Broken("nested null", _rows(CHAT | {"chosen": [None]}), ("line 1", ("chosen[0]", "null"))),
    Broken("text in a list", _rows(CHAT | {"chosen": ["Hi"]}), ("line 1", ("chosen[0]", "'Hi'"))),
    Broken("picture", _rows(CHAT | {"chosen": [HI | {"content": [{"type": "image"}]}]}), ("line 1", "chosen[0].content")),
    Broken("ranked without scores", _rows({"instruction": "a", "completions": [{"response": "b"}]}), ("line 1", "completions[0]", "response", "overall_score")),
    Broken("ranked text score", _rows({"instruction": "a", "completions": [{"response": "b", "overall_score": "5"}]}), ("line 1", ("overall_score", "'5'"))),
    Broken("ranked without ratings", _rows({"instruction": "a", "completions": [{"response": "b", "annotations": {"x": {"Rating": "N/A"}}}]}), ("line 1", "completions[0]", "response", "overall_score")),
    Broken("ranked rating in words", _rows({"instruction": "a", "completions": [{"response": "b", "annotations": {"x": {"Rating": "good"}}}]}), ("line 1", ("annotations.Rating", "'good'"))),
    Broken("ranked lists of two lengths", _rows({"prompt": "a", "responses": ["b", "c"], "scores": [1]}), ("line 1", ("responses", "2 entries"), ("scores", "1"))),
    Broken("ranked score list as a number", _rows({"prompt": "a", "responses": ["b", "c"], "scores": 1}), ("line 1", ("scores", "1"))),
    Broken("ranked object of uneven lists", _rows({"prompt": "a", "completions": {"response": ["b", "c"], "score": [1]}}), ("line 1", ("completions", "2 entries"))),
    Broken("ranked infinite score", _rows({"prompt": "a", "responses": ["b", "c"], "scores": [1, float("inf")]}), ("line 1", ("scores[1]", "inf"))),
    Broken("ranked, all equal", _rows({"instruction": "a", "completions": []}), ()),
    # accepted, with a warning
    Broken("one row", _rows(GOOD)),
    Broken("emoji and right-to-left text", _with(prompt="😀 שלום עליכם 👩‍👩‍👧", chosen=" مرحبا", rejected="\u202eabc")),
    Broken("row separators of Unicode in a row", _bytes("d.jsonl", json.dumps(GOOD | {"chosen": "a\u2028b\x85c"}, ensure_ascii=False).encode()), finding="control_characters"),
    Broken("terminal escape", _with(chosen="\x1b[2J"), finding="control_characters"),
    Broken("wrongly decoded before", _with(chosen="caf\ufffd"), finding="replacement_character"),
    Broken("10 MB in a field", _with(chosen="x" * 10_000_000), finding="very_long"),
    Broken("10 MB in a CSV field", _bytes("d.csv", (T + "p," + "x" * 10_000_000 + ",b\n").encode()), finding="very_long"),
    Broken("missing value as text", _with(rejected="nan"), finding="missing_as_text"),
    Broken("empty completion", _with(rejected=" "), finding="empty_completion"),
    Broken("empty prompt", _with(prompt=""), finding="empty_prompt"),
    Broken("both sides equal", _with(rejected=" Hi!"), finding="identical"),
    Broken("pair twice", _rows(GOOD, GOOD), finding="duplicate"),
    Broken("pair in both orders", _rows(GOOD, GOOD | {"chosen": " No.", "rejected": " Hi!"}), finding="contradiction"),
    Broken("messages as JSON text", _with(**{name: json.dumps(CHAT[name]) for name in CHAT}), finding="messages_as_text"),
    Broken("messages as Python text", _with(**{name: str(CHAT[name]) for name in CHAT}), finding="messages_as_text"),
    Broken("prompt said again", _rows({"prompt": "a", "chosen": "a b", "rejected": "a c"}), finding="repeats_prompt"),
    Broken("swapped scores", _rows(GOOD | {"chosen_score": 1, "rejected_score": 2}), finding="score_order"),
    Broken("margin next to the scores", _rows(GOOD | {"chosen_score": 2, "rejected_score": 1, "reward_margin": 3}), finding="margin_mismatch"),
    Broken("prompt that ends with the assistant", _rows(CHAT | {"prompt": [USER, HI]}), finding="role_order"),
    Broken("system in the middle", _rows(CHAT | {"prompt": [USER, HI, {"role": "system", "content": "x"}, USER]}), finding="role_order"),
    Broken("chosen begins with the user", _rows(CHAT | {"chosen": [USER]}), finding="role_order"),
]  # fmt: skip


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_each_breakage_has_its_sentence(case: Broken, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = case.make(tmp_path)
    if case.name == "no permission" and os.geteuid() == 0:
        with _nobody(path) as readable:
            for read in (check, load_preferences):
                with refused(DataError, readable.name):
                    read(readable)
        return
    before = sorted(tmp_path.rglob("*"))
    if case.names is None:
        report = check(path)
        assert [finding.kind for finding in report.findings] == [case.finding] * bool(case.finding)
        assert "\x1b" not in report.text()
        assert len(load_preferences(path)) == report.pairs > 0
        return
    named = (path.name.replace("\0", r"\\x00"), *case.names)
    with refused(DataError, *named) as checked:
        check(path, output=tmp_path / "out")
    assert "\n" not in str(checked.value)
    assert len(str(checked.value)) < 500 or case.name == "name too long"
    if case.name != "ranked, all equal":
        with refused(DataError, *named):
            load_preferences(path)
    for command in (["check"], ["score", "--score_columns", "chosen_score", "rejected_score"]):
        assert main([command[0], str(path), "--output_dir", str(tmp_path / "out"), *command[1:]]) == 2
        err = capsys.readouterr().err
        assert err.startswith("madpo: ")
        assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before, "a refused data set leaves nothing behind"


@contextmanager
def _nobody(path: Path) -> Iterator[Path]:
    """The file where everybody may look for it, and this process without the rights of root."""
    folder = Path(tempfile.mkdtemp(prefix="madpo-"))
    try:
        folder.chmod(0o755)
        shutil.copy(path, folder)
        (folder / path.name).chmod(0)
        os.seteuid(65534)
        try:
            yield folder / path.name
        finally:
            os.seteuid(0)
    finally:
        shutil.rmtree(folder)


def test_table_is_large_enough() -> None:
    assert len(TABLE) >= 60
    assert len({case.name for case in TABLE}) == len(TABLE)


def _mistake(read: Callable[[Path], object], path: Path) -> str:
    try:
        read(path)
    except (DataError, ConfigError) as error:
        return str(error)
    return "fine"


def _survives(path: Path) -> None:
    for read in (check, load_preferences):
        assert "\n" not in (_mistake(read, path) or "\n"), "a mistake is one sentence"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
_messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=4)}),
    max_size=3,
)
_names = [
    "prompt",
    "chosen",
    "rejected",
    "reward_margin",
    "chosen_score",
    "rejected_score",
    "weight",
    "completions",
    "instruction",
    "pair_id",
]
_row = st.dictionaries(st.sampled_from(_names), _json | _messages | st.text(max_size=4) | st.floats(), max_size=8)


@given(content=st.binary(max_size=300))
def test_any_bytes(content: bytes, tmp_path: Path) -> None:
    for name in ("d.jsonl", "d.csv", "d.jsonl.gz", "d.parquet"):
        (tmp_path / name).write_bytes(content)
        _survives(tmp_path / name)


@given(rows=st.lists(_row, min_size=1, max_size=4))
def test_any_rows(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _survives(tmp_path / "d.jsonl")


@given(data=st.data())
def test_any_damage_to_a_parquet_file(data: st.DataObject, tmp_path: Path) -> None:
    table = pa.table({"chosen": ["a", "b" * 30], "rejected": ["c", "d"], "reward_margin": [0.5, 1.5]})
    pq.write_table(table, tmp_path / "d.parquet")
    content = bytearray((tmp_path / "d.parquet").read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    (tmp_path / "d.parquet").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    _survives(tmp_path / "d.parquet")


@given(text=st.text(alphabet=st.sampled_from('ab,"\n\r;\0é 1'), max_size=60))
def test_any_csv(text: str, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(f"chosen,rejected,weight\n{text}".encode())
    _survives(tmp_path / "d.csv")
