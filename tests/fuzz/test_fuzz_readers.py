"""Fuzzers for the readers of data: whole tables of odd types, arrays, delimiters, and damaged files of each format."""

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz_cases import damaged, fresh, fuzzed, mutated, survives, values
from madpo.data import check, load_preferences, text_files
from madpo.data.margins import read_margins
from madpo.data.texts import read_texts
from madpo.operations.inputs import read_prompts

READERS = (load_preferences, check, read_margins, read_prompts, lambda path: list(read_texts(path)))
MESSAGES = [{"role": "user", "content": "q"}]
ROW = {"prompt": "p", "chosen": "c", "rejected": "r", "reward_margin": 0.5, "weight": 1.0, "pair_id": 3}
TALK = {"prompt": MESSAGES, "chosen": [{"role": "assistant", "content": "c"}], "rejected": MESSAGES, "pair_id": 1}


def read_all(kind: str, path: Path, folder: Path) -> None:
    for read in READERS:
        found = survives(f"data {kind}", lambda read=read: read(path), folder)
        if isinstance(found, Exception):
            assert str(found).isprintable()


@fuzzed(share=2)
@given(data=st.data())
def test_any_array(data, tmp_path):
    folder = fresh(tmp_path, "data")
    row = data.draw(st.sampled_from([ROW, TALK]))
    text = json.dumps(
        data.draw(mutated([row, row | {"prompt": row["chosen"]}])), indent=data.draw(st.sampled_from([None, 1]))
    )
    content = data.draw(st.just(text.encode()) | damaged(text.encode()) | damaged(b"[" + text.encode() + b"]"))
    zipped = data.draw(st.booleans())
    path = folder / ("d.json.gz" if zipped else "d.json")
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK", data.draw(st.sampled_from([1, 7, 2**20])))
        patch.setattr(text_files, "MAX_ROW", data.draw(st.sampled_from([100, 2**26])))
        read_all(".json array", path, folder)


@fuzzed(share=3)
@given(data=st.data())
def test_any_table_of_text(data, tmp_path):
    folder = fresh(tmp_path, "data")
    delimiter = data.draw(st.sampled_from(",;\t| :"))
    cells = st.text(max_size=6) | st.sampled_from(["prompt", "chosen", "rejected", "reward_margin", '"', "a\nb", "1"])
    rows = data.draw(st.lists(st.lists(cells, max_size=5), max_size=4))
    rows = [["prompt", "chosen", "rejected"], *rows] if data.draw(st.booleans()) else rows
    text = "\n".join(delimiter.join(row) for row in rows).encode("utf-8", "surrogatepass")
    name = data.draw(st.sampled_from(["d.csv", "d.tsv", "d.CSV"]))
    (folder / name).write_bytes(data.draw(st.just(text) | damaged(text)))
    read_all(".csv", folder / name, folder)


NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, 2**31, 2**62, -(2**63)])
TYPES = st.sampled_from(
    [
        *(pa.timestamp(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC", "Europe/Berlin")),
        *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
        *(pa.date64(), pa.date32(), pa.time64("us"), pa.time64("ns"), pa.time32("s")),
        *(pa.int64(), pa.int8(), pa.uint64(), pa.float64(), pa.float16(), pa.bool_()),
        *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view(), pa.binary(2)),
        *(pa.decimal128(30, 5), pa.decimal256(60, 5), pa.null()),
        *(
            pa.dictionary(pa.int8(), pa.string()),
            pa.list_(pa.string()),
            pa.large_list(pa.int8()),
            pa.list_(pa.int8(), 2),
        ),
        *(pa.map_(pa.string(), pa.string()), pa.struct({"role": pa.string(), "content": pa.string()})),
        pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(pa.struct({"text": pa.string()}))})),
    ]
)


@st.composite
def columns(draw, kind, rows):
    """An array of a type, with values that Arrow holds and Python may not."""
    if pa.types.is_temporal(kind):
        bits = {8: np.int64, 4: np.int32}[kind.bit_width // 8]
        raw = np.array(draw(st.lists(NUMBERS, min_size=rows, max_size=rows)), dtype=np.int64).astype(bits)
        return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(raw.tobytes())])
    length = draw(st.sampled_from([0, 1, 5000]))
    samples = [
        None,
        1,
        0.5,
        "x" * length,
        b"ab",
        ["a"] * length,
        [1, 2],
        [("a", "b")],
        *([{"role": "u", "content": "c"}],),
    ]
    samples += [{"role": "u", "content": "c"}, [{"role": "u", "content": [{"text": "t"}]}], True]
    found = []
    for value in draw(st.lists(st.sampled_from(samples), min_size=rows, max_size=rows)):
        try:
            found.append(pa.array([value], kind))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            found.append(pa.nulls(1, kind))
    return pa.concat_arrays(found) if found else pa.array([], kind)


@fuzzed()
@given(data=st.data())
def test_any_type_of_parquet_column(data, tmp_path):
    folder = fresh(tmp_path, "data")
    rows = data.draw(st.integers(0, 70))
    names = data.draw(
        st.lists(
            st.sampled_from(
                ["prompt", "chosen", "rejected", "messages", "reward_margin", "weight", "pair_id", "text", "x.y"]
            )
            | st.text(min_size=1, max_size=3),
            max_size=5,
        )
    )
    plain = (
        {"prompt": ["p"] * rows, "chosen": ["c"] * rows, "rejected": ["r"] * rows} if data.draw(st.booleans()) else {}
    )
    arrays = {name: data.draw(columns(data.draw(TYPES), rows)) for name in names}
    try:
        table = pa.table(plain | arrays)
        pq.write_table(
            table,
            folder / "d.parquet",
            version=data.draw(st.sampled_from(["1.0", "2.6"])),
            use_dictionary=data.draw(st.booleans()),
            row_group_size=data.draw(st.sampled_from([None, 9])),
            data_page_version=data.draw(st.sampled_from(["1.0", "2.0"])),
            store_schema=data.draw(st.booleans()),
            compression=data.draw(st.sampled_from(["none", "zstd"])),
        )
    except (pa.ArrowException, UnicodeEncodeError):  # Arrow does not write it
        return
    if data.draw(st.booleans()):
        (folder / "d.parquet").write_bytes(data.draw(damaged((folder / "d.parquet").read_bytes())))
    read_all(".parquet", folder / "d.parquet", folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, rows in (("text", [ROW, ROW | {"prompt": "q"}]), ("talk", [TALK, TALK])):
        datasets.Dataset.from_list(rows).save_to_disk(folder / name)
    datasets.DatasetDict({"train": datasets.Dataset.from_list([ROW])}).save_to_disk(folder / "splits")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@fuzzed()
@given(data=st.data())
def test_any_saved_data_set_and_its_splits(data, saved, tmp_path):
    folder = fresh(tmp_path, "saved")
    for name, content in saved.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for victim in data.draw(st.lists(st.sampled_from(sorted(saved)), min_size=1, max_size=3)):
        if victim.endswith(".json") and data.draw(st.booleans()):
            content = json.dumps(data.draw(mutated(json.loads(saved[victim])) | values)).encode(
                "utf-8", "surrogatepass"
            )
        else:
            content = data.draw(damaged(saved[victim]))
        (folder / victim).write_bytes(content)
    for name in ("text", "talk", "splits", "splits/train"):
        read_all("saved data set", folder / name, tmp_path)
