"""The folder of a result: made once, never half, replaced only on demand, and nothing of the user's is lost."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from madpo.core.config import Frozen
from madpo.core.errors import DataError, StorageError
from madpo.core.locks import locked
from madpo.core.metrics import Metrics
from madpo.runner.operation import operation
from madpo.runner.record import load_record
from madpo.runner.step import Source, Step
from madpo.runner.work import run_step
from refusals import refused


class Text(Frozen):
    text: str = "a"
    fail: bool = False
    checkpoint: bool = False


@operation("write/1")
def write(config: Text, inputs: Mapping[str, Path], out: Path) -> Metrics:
    if config.checkpoint:
        folder = out / "checkpoints" / "checkpoint-1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text("{}")
    if config.fail:
        raise DataError("pairs.jsonl, line 3: no chosen; add one")
    (out / "model").mkdir(exist_ok=True)
    (out / "model" / "weights").write_text(config.text)
    (out / f"{config.text}.txt").write_text("x")
    return {"length": len(config.text), "inputs": len(inputs)}


def make(out: Path, *, overwrite: bool = False, inputs: Mapping[str, Source] | None = None, **config: object) -> bool:
    """Whether the result was there before."""
    step = Step("write", write, Text.model_validate(config), inputs or {})
    return run_step(step, out, overwrite=overwrite, memory="use less")[1]


def tree(folder: Path) -> dict[str, str]:
    """Every file but the record, with its content."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "record.json")
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_a_result_is_made_once(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    assert not make(out)
    assert tree(out) == {"model/weights": "a", "a.txt": "x"}
    record = load_record(out)
    assert record is not None
    assert set(record.files or {}) == set(tree(out))
    before = (out / "record.json").read_bytes()
    assert make(out)
    assert (out / "record.json").read_bytes() == before


def test_a_result_that_lost_a_file_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    (out / "model" / "weights").unlink()
    with refused(StorageError, out / "model" / "weights", "--overwrite"):
        make(out)
    assert tree(out) == {"a.txt": "x"}
    assert not make(out, overwrite=True)
    assert make(out)
    assert tree(out) == {"model/weights": "a", "a.txt": "x"}


def test_other_settings_are_refused_by_the_first_difference(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with refused(StorageError, "text", '"b"', '"a"', "--overwrite"):
        make(tmp_path / "out", text="b")
    assert tree(tmp_path / "out") == {"model/weights": "a", "a.txt": "x"}


def test_another_input_is_refused_by_its_role(tmp_path: Path) -> None:
    make(tmp_path / "out", inputs={"data": Source("pairs.jsonl", "1" * 64)})
    assert make(tmp_path / "out", inputs={"data": Source("moved.jsonl", "1" * 64)})
    with refused(StorageError, "--overwrite"):
        make(tmp_path / "out", inputs={"data": Source("pairs.jsonl", "2" * 64)})


def test_overwrite_removes_what_the_record_lists_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    (out / "notes.md").write_text("mine")
    (out / "model" / "mine").write_text("mine")
    with refused(StorageError, out / "model" / "mine"):
        make(out, overwrite=True, text="b")
    assert (out / "model" / "weights").read_text() == "a"  # the old result is whole until the new one takes its place
    (out / "model" / "mine").unlink()
    make(out, overwrite=True, text="b")
    assert tree(out) == {"model/weights": "b", "b.txt": "x", "notes.md": "mine"}


def test_a_file_that_the_user_changed_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    (out / "a.txt").write_text("edited")
    with refused(StorageError, "a.txt"):
        make(out, overwrite=True, text="b")
    assert tree(out)["a.txt"] == "edited"


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with refused(StorageError, "'mine.txt'"):
            make(tmp_path, overwrite=overwrite)
        assert tree(tmp_path) == {"mine.txt": "mine"}
    file = tmp_path / "mine.txt"
    with pytest.raises(StorageError):
        make(file)


def test_unfinished_of_somebody_else_is_never_emptied(tmp_path: Path) -> None:
    own, link = tmp_path / "own", tmp_path / "link"
    (own / "unfinished").mkdir(parents=True)
    (own / "unfinished" / "precious.txt").write_text("x")
    link.mkdir()
    (link / "unfinished").symlink_to(own / "unfinished")
    for out in (own, link):
        with refused(StorageError, out / "unfinished"):
            make(out, overwrite=True)
    assert (own / "unfinished" / "precious.txt").read_text() == "x"


def test_nothing_that_the_work_reads_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    for place in (out / "model", out / "model" / "weights"):
        with refused(StorageError, place):
            make(out, overwrite=True, text="b", inputs={"model": Source(str(place), "1" * 64)})
    assert tree(out) == {"model/weights": "a", "a.txt": "x"}
    (out / "data.jsonl").write_text("mine")  # not part of the result, so it stays
    make(out, overwrite=True, text="b", inputs={"data": Source(str(out / "data.jsonl"), "1" * 64)})
    assert tree(out)["data.jsonl"] == "mine"


def test_a_failure_leaves_nothing_unless_there_is_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with refused(DataError, "line 3"):
        make(out, fail=True)
    assert not out.exists()
    with refused(DataError, "line 3"):
        make(out, fail=True, checkpoint=True)
    assert (out / "unfinished" / "checkpoints" / "checkpoint-1").is_dir()
    with refused(StorageError, "--overwrite"):
        make(out, text="b")
    assert not make(out, text="b", overwrite=True)
    assert tree(out) == {"model/weights": "b", "b.txt": "x"}


def test_an_old_result_outlives_a_failed_replacement(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(DataError):
        make(tmp_path / "out", overwrite=True, text="b", fail=True)
    assert tree(tmp_path / "out") == {"model/weights": "a", "a.txt": "x"}
    assert make(tmp_path / "out")


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), refused(StorageError, tmp_path / "out", f"process {os.getpid()}"):
        make(tmp_path / "out")


class Killed(BaseException):
    """In the place of a SIGKILL: no handler of ours catches it."""


def interruptions(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], int]:
    """Make the ``at``-th call that changes the disk fail as a kill would; the function counts the calls."""
    calls = itertools.count()
    reached = [0]
    for owner, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "fsync")):
        real = getattr(owner, name)

        def hooked(*args: object, real: Callable[..., object] = real, **kwargs: object) -> object:
            reached[0] = next(calls)
            if reached[0] == at:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, hooked)
    return lambda: reached[0]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_kill_at_any_moment_loses_nothing_that_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """Whatever call is the last: the old result or the new one is whole, and the same command ends in the new one."""
    begun, moments = tmp_path / "begun", 0
    if replaced:
        make(begun)
    for at in range(200):
        out = tmp_path / f"out{at}"
        if begun.exists():
            shutil.copytree(begun, out)
        with monkeypatch.context() as patch:
            reached = interruptions(patch, at)
            try:
                make(out, text="b", overwrite=replaced)
            except Killed:
                pass
            else:
                assert reached() < at
                break
        moments += 1
        record = load_record(out)
        if record is not None:  # whole, whichever it is
            assert {name: tree(out).get(name) for name in record.files or {}} == {
                name: {"model/weights": record.config["text"]}.get(name, "x") for name in record.files or {}
            } or (out / "unfinished" / "record.json").is_file()
        make(out, text="b", overwrite=replaced and (record is None or record.config["text"] == "a"))
        assert tree(out) == {"model/weights": "b", "b.txt": "x"}
    assert moments > 8


def test_a_damaged_note_of_what_was_begun_costs_a_word(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError):
        make(out, fail=True, checkpoint=True)
    (out / "unfinished" / "begun.json").write_text("{")
    with refused(StorageError, out, out / "unfinished" / "checkpoints", "--overwrite"):
        make(out, fail=True, checkpoint=True)
    begun = {"operation": "write/1", "config": json.loads("{}"), "inputs": {}, "libraries": {}}
    (out / "unfinished" / "begun.json").write_text(json.dumps(begun))
    with refused(StorageError, out, out / "unfinished" / "checkpoints", "--overwrite"):
        make(out, checkpoint=True)
