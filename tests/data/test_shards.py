"""Folders of data files and data sets of the hub with a configuration."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madpo.core.errors import DataError
from madpo.data import check, load_preferences
from madpo.data.sources import look_at
from madpo.operations.running import digest
from practice_cases import write
from refusals import refused


def pair(i: int) -> dict[str, Any]:
    return {"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"}


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def prompts(data: Path | str) -> list[str]:
    return [row["prompt"] for row in load_preferences(data)]


@pytest.fixture
def hub_like(tmp_path: Path) -> Path:
    """A folder as the hub stores it: two splits of Parquet shards, and files that are no data."""
    folder = tmp_path / "set"
    for i in range(3):
        parquet(folder / "data" / f"train-0000{i}-of-00003.parquet", [pair(10 * i + j) for j in range(4)])
    parquet(folder / "data" / "test-00000-of-00001.parquet", [pair(99)])
    (folder / "README.md").write_text("about")
    (folder / "dataset_infos.json").write_text("{}")
    return folder


def test_shards_are_read_in_order_and_train_is_the_default(hub_like: Path) -> None:
    assert prompts(hub_like) == [f"p{10 * i + j}" for i in range(3) for j in range(4)]
    assert prompts(f"{hub_like}:test") == ["p99"]
    assert [row["pair_id"] for row in load_preferences(hub_like)] == list(range(12))
    look_at(hub_like)
    look_at(f"{hub_like}:test")
    assert digest(hub_like) == digest(f"{hub_like}:test") is not None


def test_the_place_of_a_row_is_its_file(hub_like: Path) -> None:
    parquet(hub_like / "data" / "train-00001-of-00003.parquet", [pair(1), pair(2) | {"chosen": None}, pair(3)])
    with refused(DataError, "set/data/train-00001-of-00003.parquet", "row 1", "chosen", "null"):
        load_preferences(hub_like)
    parquet(hub_like / "data" / "train-00001-of-00003.parquet", [pair(0), pair(5)])
    (finding,) = check(hub_like).findings
    assert finding.examples == (f"{hub_like}/data/train-00001-of-00003.parquet, row 0, first in 0",)


def test_shards_of_lines_and_of_arrays(tmp_path: Path) -> None:
    folder = tmp_path / "lines"
    folder.mkdir()
    for i in range(3):
        write(folder / f"part-{i}.jsonl", [pair(10 * i + j) for j in range(2)])
    assert prompts(folder) == ["p0", "p1", "p10", "p11", "p20", "p21"]
    write(folder / "part-1.jsonl", [pair(10), {"prompt": "x", "chosen": "y"}])
    with refused(DataError, "lines/part-1.jsonl", "line 2", "'rejected'"):
        load_preferences(folder)
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    for i in range(2):
        (arrays / f"d{i}.json").write_text(json.dumps([pair(i)]))
    assert prompts(arrays) == ["p0", "p1"]


def test_rows_of_one_prompt_pair_across_files(tmp_path: Path) -> None:
    folder = tmp_path / "kto"
    folder.mkdir()
    for i, label in enumerate((True, False)):
        write(folder / f"part-{i}.jsonl", [{"prompt": "p", "completion": f"c{i}", "label": label}])
    (row,) = load_preferences(folder)
    assert (row["chosen"], row["rejected"]) == ("c0", "c1")


def test_what_a_folder_does_not_say_is_refused_with_a_name_that_works(hub_like: Path, tmp_path: Path) -> None:
    for path in (hub_like / "data").glob("train*"):
        path.rename(path.with_name(path.name.replace("train", "train_prefs")))
    with refused(DataError, "test", "train_prefs") as caught:
        load_preferences(hub_like)
    assert prompts(str(caught.value).rsplit(" ", 1)[1]) == ["p99"]
    (hub_like / "data" / "test-00000-of-00001.parquet").rename(hub_like / "data" / "test-00000-of-00002.parquet")
    parquet(hub_like / "data" / "test-00001-of-00002.parquet", [pair(1) | {"note": "x"}])
    with refused(DataError, "test-00001-of-00002.parquet", "'note'"):
        load_preferences(f"{hub_like}:test")
    (tmp_path / "empty").mkdir()
    with refused(DataError, "folder", ".jsonl"):
        load_preferences(tmp_path / "empty")


def test_configurations_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    folder, real = tmp_path / "remote", datasets.load_dataset
    for name in ("one", "two"):
        parquet(folder / name / "train-00000-of-00001.parquet", [pair(len(name) + ord(name[0]))])
    configs = "".join(f"- config_name: {n}\n  data_files:\n  - split: fit\n    path: {n}/*\n" for n in ("one", "two"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *parts, **how: real(str(folder), *parts, **how))
    assert prompts("a/b:two:fit") == ["p119"]
    # A stranger follows the remedies: first the configuration, then the split.
    data = "a/b"
    for choices in (("'one'", "'two'"), ("'fit'",)):
        with refused(DataError, data, choices) as caught:
            load_preferences(data)
        found = re.search(r"such as (\S+)$", str(caught.value))
        assert found is not None, caught.value
        data = found[1]
    assert prompts(data) == ["p114"]


def test_rows_that_would_be_read_twice_or_not_at_all_are_refused(hub_like: Path, tmp_path: Path) -> None:
    (hub_like / "data" / "train-00001-of-00003.parquet").rename(tmp_path / "away.parquet")
    with refused(DataError, "2 files", "3"):
        prompts(hub_like)
    for i in range(2):  # an older writing of the same rows
        parquet(hub_like / "data" / f"train-0000{i}-of-00002.parquet", [pair(10 * i + j) for j in range(4)])
    with refused(DataError, "4 files", ("2", "3")):
        look_at(hub_like)
    for kept in (0, 2):
        (hub_like / "data" / f"train-0000{kept}-of-00003.parquet").unlink()
    assert prompts(hub_like) == [f"p{10 * i + j}" for i in range(2) for j in range(4)]
    twins = tmp_path / "twins"
    twins.mkdir()
    path = write(twins / "pairs.jsonl", [pair(1)])
    with gzip.open(twins / "pairs.jsonl.gz", "wb") as packed:
        packed.write(path.read_bytes())
    with refused(DataError, "pairs.jsonl", "pairs.jsonl.gz"):
        prompts(twins)
    path.unlink()
    assert prompts(twins) == ["p1"]
