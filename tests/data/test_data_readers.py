"""Readers of data: JSON arrays and other people's CSV, and that no file takes more memory or time than its rows."""

import codecs
import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from madpo.commands.cli import main
from madpo.core.errors import DataError
from madpo.data import check, load_preferences, parquet, raw, text_files
from madpo.data.sources import open_source
from quick import quick
from refusals import names, refused

GOOD = {"prompt": "Say hi.", "chosen": " Hi!", "rejected": " No."}
ROWS = [GOOD | {"prompt": f'p{i} π 😀\n[],{{}}\\"', "reward_margin": i / 7} for i in range(5)]


def read(path, content=None):
    if content is not None:
        path.write_bytes(content)
    return list(open_source(path).rows)


# ---- JSON arrays ----


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("before", [b"", codecs.BOM_UTF8, b" \n\t", codecs.BOM_UTF8 + b"\n" * 5000])
@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.json.gz"])
def test_an_array_gives_the_rows_of_json_lines(name, before, indent, tmp_path):
    content = before + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode() + b"\n"
    if len(before) > 4096:  # so much in front of it is looked at no further
        content = content[len(before) - 100 :]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(path) == list(enumerate(ROWS))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert load_preferences(path) == load_preferences(tmp_path / "lines.jsonl")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), values, max_size=4), max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    ascii=st.booleans(),
    chunk=st.sampled_from([1, 2, 3, 7, 64]),
)
def test_an_array_is_read_the_same_wherever_its_chunks_end(rows, indent, ascii, chunk, tmp_path):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK", chunk)
        assert read(tmp_path / "d.json", text.encode("utf-8", "surrogatepass")) == list(enumerate(rows))


@given(data=st.data(), chunk=st.sampled_from([1, 5, 2**20]))
def test_a_broken_array_gives_its_good_rows_and_one_sentence(data, chunk, tmp_path):
    whole = json.dumps(ROWS, ensure_ascii=False).encode()
    at = data.draw(st.integers(1, len(whole) - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK", chunk)
        (tmp_path / "d.json").write_bytes(whole[:at])
        rows = open_source(tmp_path / "d.json").rows
        found = []
        with pytest.raises(DataError, match=rf"d\.json, row {whole[:at].count(b'},')}\b"):
            found.extend(rows)
        assert found == list(enumerate(ROWS))[: len(found)]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'[{"a": 1} {"b": 2}]', ["row 0", "line 1", "JSON"]),
        (b'[\n{"a": 1},\n{"a": tru}\n]', ["row 1", "line 3", "JSON"]),
        (b'[{"a": 1},]', ["row 1", "line 1", "JSON"]),
        (b'[{"a": 1}', ["row 0", "line 1"]),
        (b'[{"a": 1},\n', ["row 1", "line 2"]),
        (b"[", ["row 0", "line 1"]),
        (b'[{"a": "b', ["row 0", "line 1"]),
        (b'[{"a": 1}]\n[', ["row 0", "line 2"]),
        (b'["a"]\n["b"]', ["row 0", "line 2"]),
        (b'[{"a": "\xff"}]', ["row 0", ("byte 8", "0xff"), "UTF-8"]),
        (b'[{"a": "' + b"x" * 70 + b'\xe2\x82"}]', ["row 0", ("byte 78", "0xe2"), "UTF-8"]),
        (b"[" + b"[" * 100_000, ["row 0"]),
        (b'[{"a": "' + b"x" * 3000, ["row 0"]),
    ],
)
@pytest.mark.parametrize("chunk", [3, 2**20])
def test_each_mistake_of_an_array_has_its_place(content, named, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK", chunk)
    monkeypatch.setattr(text_files, "MAX_ROW", 1000)
    with refused(DataError, "d.json", *named):
        read(tmp_path / "d.json", content)


def test_a_bad_row_of_an_array_costs_that_row(tmp_path):
    content = b'[{"a": 1, "a": 2}, 3, null, {"n": ' + b"1" * 5000 + b'}, {"x": {"b": 1, "b": 2}}, {"a": 7}]'
    rows = read(tmp_path / "d.json", content)
    assert [number for number, _ in rows] == list(range(6))
    assert [isinstance(row, DataError) for _, row in rows] == [True] * 5 + [False]
    for number, value in enumerate(["'a'", "3", "null", "4300", "'b'"]):
        names(str(rows[number][1]), "d.json", f"row {number}", value)


def test_an_array_works_with_every_command_that_reads_rows(tmp_path, capsys):
    rows = [GOOD | {"prompt": f"p{i}", "a": i, "b": 1} for i in range(6)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    assert main(["check", str(tmp_path / "d.json")]) == 0
    scored = ["score", str(tmp_path / "d.json"), "--score_columns", "a", "b", "--output_dir", str(tmp_path / "out")]
    assert main(scored) == 0
    written = [json.loads(line) for line in (tmp_path / "out" / "scored.jsonl").read_text().splitlines()]
    margins = [row["reward_margin"] for row in written]
    assert [margin / margins[2] for margin in margins] == pytest.approx([i - 1.0 for i in range(6)])
    rows[3]["chosen"] = 5
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    capsys.readouterr()
    assert main(["check", str(tmp_path / "d.json")]) == 2
    names(capsys.readouterr().err, "d.json", "row 3", ("chosen", "5"))


# ---- CSV of spreadsheets ----


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.csv.gz"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
def test_a_table_is_read_with_the_delimiter_of_its_header(delimiter, name, quoting, bom, tmp_path):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter, quoting=quoting)
    writer.writeheader()
    writer.writerows(row | {"chosen": f"a,b;c\td|e {row['chosen']}"} for row in ROWS)
    content = bom + text.getvalue().encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = load_preferences(path)
    assert [(row["prompt"], row["reward_margin"]) for row in found] == [(r["prompt"], r["reward_margin"]) for r in ROWS]
    assert found[0]["chosen"] == "a,b;c\td|e  Hi!"


def test_one_column_needs_no_delimiter(tmp_path):
    assert read(tmp_path / "d.csv", b"prompt\na;b\n") == [(2, {"prompt": "a;b"})]


def test_fields_that_do_not_fit_name_the_delimiter(tmp_path):
    with refused(DataError, "d.csv", "line 2", ("4 fields", "3"), "semicolon"):
        load_preferences(write(tmp_path / "d.csv", b"prompt;chosen;rejected\na;b;c;d\n"))


def write(path, content):
    path.write_bytes(content)
    return path


# ---- Time ----


@pytest.mark.parametrize("twice", quick([False, True], True))
def test_time_grows_with_the_number_of_names_and_not_faster(twice, tmp_path):
    names = [f"c{i}" for i in range(60_000)]
    names += ["c59999"] if twice else []
    began = time.process_time()
    for name, content in (
        ("d.csv", ",".join(names) + "\n" + ",".join("1" * len(names)) + "\n"),
        ("d.jsonl", "{" + ",".join(f'"{name}": 1' for name in names) + "}\n"),
        ("d.json", "[{" + ",".join(f'"{name}": 1' for name in names) + "}]"),
    ):
        with refused(DataError, name, "'c59999'" if twice else "'chosen'"):
            load_preferences(write(tmp_path / name, content.encode()))
    assert time.process_time() - began < 4, "4x per doubling would take minutes"


# ---- Memory ----


def peak(path: Path) -> tuple[int, str]:
    """Bytes that reading a file takes at most in a process of its own, and what it printed."""
    program = (
        "import resource, sys\nfrom madpo.data.sources import open_source\nimport pyarrow.parquet, pyarrow.compute\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    wrong = [row for _, row in open_source(sys.argv[1]).rows if not isinstance(row, dict)]\n"
        "    print(wrong[0] if wrong else 'read')\nexcept ValueError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    said, grown = done.stdout.strip().rsplit("\n", 1)
    return int(grown) * 1024, said


def repeated(value, count):
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


def many_rows():
    """256 rows of one text of 20 MB."""
    return {"prompt": repeated("x" * 20_000_000, 256)}


def many_messages():
    """256 conversations of one text of 20 MB."""
    return {"prompt": conversations(["user"] * 256, repeated("x" * 20_000_000, 256), range(257))}


def one_long_row():
    """One conversation of 4,000 messages of 2 MB, after many of one."""
    content = repeated("x" * 2_000_000, 5000)
    return {"prompt": conversations(["user"] * 5000, content, [*range(1001), 5000])}


def lists_of_text():
    """One list of 60,000 texts of 1 MB."""
    texts = repeated("x" * 1_000_000, 60_000)
    return {"prompt": pa.ListArray.from_arrays(pa.array([0, 60_000], pa.int32()), texts)}


def long_rows():
    """Texts of 65 MB each."""
    return {"prompt": repeated("x" * 68_000_000, 12)}


def packed():
    """Texts of 5 MB that are there in full, and packed to nothing."""
    return {"prompt": pa.array(["x" * 5_000_000] * 100)}


def conversations(roles, contents, offsets):
    messages = pa.StructArray.from_arrays([pa.array(roles), contents], ["role", "content"])
    return pa.ListArray.from_arrays(pa.array(list(offsets), pa.int32()), messages)


@pytest.mark.parametrize(
    "bomb",
    quick([one_long_row, lists_of_text, packed, many_rows, many_messages, long_rows], lists_of_text),
)
def test_a_parquet_bomb_takes_bounded_memory(bomb, tmp_path):
    columns = bomb()
    rows = len(columns["prompt"])
    table = pa.table(columns | {"chosen": pa.array(["c"] * rows), "rejected": pa.array(["r"] * rows)})
    path = tmp_path / "d.parquet"
    pq.write_table(table, path, compression="zstd", store_schema=False, use_dictionary=bomb is not packed)
    assert path.stat().st_size < 200_000
    taken, said = peak(path)
    assert taken < 1.2 * 2**30, f"{taken / 1e9:.2f} GB ({bomb.__doc__})"
    if bomb in (one_long_row, lists_of_text):
        names(said, "d.parquet", "row 0", "GB")
    if bomb is long_rows:
        names(said, "d.parquet", "row 0", "64 MB")
    if bomb is packed:
        names(said, "d.parquet", "row 0", "'prompt'")


def test_a_csv_row_over_many_lines_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_ROW", 10_000)
    content = b"prompt,chosen,rejected\n" + b'a,b,"c"\n' * 5000 + b'"' + b"x\n" * 6000
    with pytest.raises(DataError, match=r"d\.csv, line 1000\d: "):
        read(tmp_path / "d.csv", content)


def random_rows(seed):
    draw = random.Random(seed)
    word = lambda: "".join(draw.choices("abc π", k=draw.randint(0, 12)))  # noqa: E731
    turns = lambda: [{"role": "user", "content": word()} for _ in range(draw.randint(0, 4))]  # noqa: E731
    nested = lambda: [{"k": [word() for _ in range(draw.randint(0, 3))]} for _ in range(draw.randint(0, 3))]  # noqa: E731
    rows = [
        {
            "text": word(),
            "turns": turns(),
            "nested": nested(),
            "names": [word()] * draw.randint(0, 3),
            "n": draw.random(),
        }
        for _ in range(draw.randint(1, 300))
    ]
    for row in draw.sample(rows, len(rows) // 3):
        row[draw.choice(list(row))] = None
    return rows


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("small", [False, True], ids=["usual", "little memory"])
@pytest.mark.parametrize("how", [{}, {"use_dictionary": False}, {"row_group_size": 7}, {"compression": "zstd"}])
def test_parquet_rows_are_those_that_pyarrow_reads(seed, small, how, tmp_path, monkeypatch):
    if small:  # so that every bound is met: what a value, a list and a row group may take
        monkeypatch.setattr(parquet, "UNPACKED", 300)
        monkeypatch.setattr(parquet, "_MAX_RATIO", 10**9)
    table = pa.Table.from_pylist(random_rows(seed))
    table = table.append_column(
        "map", pa.array([[("a", "b")], []] * table.num_rows, pa.map_("str", "str"))[: table.num_rows]
    )
    table = table.append_column("dot.ted", pa.array(["d"] * table.num_rows))
    pq.write_table(table, tmp_path / "d.parquet", **how)
    assert [row for _, row in read(tmp_path / "d.parquet")] == table.to_pylist()
    wanted = ("turns", "dot.ted", "absent")
    source = open_source(tmp_path / "d.parquet", wanted=wanted)
    assert [row for _, row in source.rows] == table.select(["turns", "dot.ted"]).to_pylist()


@pytest.mark.parametrize(
    "kind", [pa.timestamp("us"), pa.duration("us"), pa.date64(), pa.time64("us"), pa.timestamp("ns")]
)
def test_a_value_out_of_range_costs_its_row(kind, tmp_path):
    prompts = (
        pa.array([0, 2**62, 1], pa.int64()).cast(kind, safe=False)
        if kind != pa.date64()
        else pa.array([0, 2**62, 1], pa.int64()).view(kind)
    )
    table = pa.table({"prompt": prompts, "chosen": ["a"] * 3, "rejected": ["b"] * 3})
    pq.write_table(table, tmp_path / "d.parquet", coerce_timestamps=None)
    with refused(DataError, "d.parquet", "row 0", "prompt", "type"):
        load_preferences(tmp_path / "d.parquet")
    rows = read(tmp_path / "d.parquet")
    assert [number for number, _ in rows] == [0, 1, 2]
    assert not isinstance(rows[0][1], DataError)
    assert not isinstance(rows[2][1], DataError)
    if isinstance(rows[1][1], DataError):
        names(str(rows[1][1]), "d.parquet", "row 1")


# ---- Saved data sets and names ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "data"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "x" * 5000, "../x", "", "/", "."])
def test_a_file_that_a_saved_data_set_cannot_have_is_refused(name, saved, tmp_path):
    for file, content in saved.items():
        (tmp_path / file).write_bytes(content)
    state = json.loads(saved["state.json"]) | {"_data_files": [{"filename": name}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with refused(DataError, tmp_path):
        load_preferences(tmp_path)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/d.jsonl", "\ud800.jsonl", "a" * 300 + ".jsonl", "\x1b[2J"])
def test_a_name_that_no_file_has_is_one_printable_sentence(name, tmp_path):
    with pytest.raises(DataError) as error:
        load_preferences(name)
    assert str(error.value).isprintable()


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert len(load_preferences("~/d.jsonl")) == 1


def test_a_name_that_is_no_utf_8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    path.write_text(json.dumps(GOOD) + "\n")
    assert len(load_preferences(path)) == 1
    report = check(path, output=tmp_path / "out")
    assert report.source.endswith("\\udcff.jsonl")
    assert raw.MAX_ROW == 2**26


@pytest.mark.parametrize("written", [json.dumps, str])
def test_messages_written_as_text_are_found_and_the_remedy_reads_them(written, tmp_path):
    """As pandas and data sets write lists into CSV."""
    row = {"prompt": [{"role": "user", "content": 'Isn\'t it "cold"?'}]}
    row |= {
        "chosen": [{"role": "assistant", "content": "Yes.\n"}],
        "rejected": [{"role": "assistant", "content": "No"}],
    }
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [*row])
        table.writeheader()
        table.writerow({name: written(value) for name, value in row.items()})
    assert {finding.kind for finding in check(path).findings} == {"messages_as_text"}
    read_as_messages = check(path, columns={"decode": True})
    assert (read_as_messages.findings, read_as_messages.form) == ((), "messages")
    assert load_preferences(path, columns={"decode": True}) == [{"pair_id": 0, **row}]
    assert main(["check", str(path), "--columns.decode", "true", "--strict"]) == 0


def test_a_margin_of_fixed_decimals_is_a_number(tmp_path):
    margins = pa.array([Decimal("0.10"), Decimal("-3.25")], pa.decimal128(10, 2))
    pq.write_table(
        pa.table({**{name: [value] * 2 for name, value in GOOD.items()}, "reward_margin": margins}),
        tmp_path / "d.parquet",
    )
    assert [row["reward_margin"] for row in load_preferences(tmp_path / "d.parquet")] == [0.1, -3.25]
