"""Finished steps in a store: the record last, what is missing later, and no result lost to a store that fails."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from madpo.commands.cli import main
from madpo.core.config import Frozen
from madpo.core.errors import ConfigError
from madpo.runner import run as pipeline
from madpo.runner.operation import operation
from madpo.runner.run import RunResult, Step
from madpo.runner.uploads import Upload, shown
from refusals import names, refused


class Config(Frozen):
    value: int = 0


@operation("write/1")
def write(config: Config, inputs: Any, out: Path) -> dict[str, float]:
    (out / "deep").mkdir(exist_ok=True)
    (out / "deep" / "b.bin").write_bytes(b"b" * 1000)
    (out / "a.txt").write_text(f"value {config.value}")
    (out / ".a.txt.7.tmp").write_text("left by a crash")
    return {"value": config.value}


def run(root: Path, url: str, count: int = 2) -> tuple[RunResult, Upload]:
    steps = [Step(f"part/{k}", write, Config(value=k)) for k in range(count)]
    with Upload(url) as store:
        result = pipeline.run(steps, root, upload=store)
    return result, store


@pytest.fixture
def memory() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/madpo", recursive=True) if store.exists("/madpo") else None


def test_a_store_gets_every_file_and_the_record_last(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    put = type(memory).put_file

    def noted(self: Any, local: str, remote: str, **how: Any) -> None:
        order.append(remote)
        put(self, local, remote, **how)

    monkeypatch.setattr(type(memory), "put_file", noted)
    result, store = run(tmp_path / "run", "memory://madpo/study")
    assert store.failed == {}
    folders = [p.step.folder(tmp_path / "run").relative_to(tmp_path / "run") for p in result.plan]
    expected = [f"/madpo/study/{f}/{name}" for f in folders for name in ("a.txt", "deep/b.bin", "record.json")]
    assert order == expected
    for folder in folders:
        local = (tmp_path / "run" / folder / "record.json").read_bytes()
        assert memory.cat_file(f"/madpo/study/{folder}/record.json") == local


def test_a_second_run_uploads_only_what_is_missing(tmp_path: Path) -> None:
    root, url = tmp_path / "run", f"file://{tmp_path}/store"
    run(root, url, count=1)
    (first,) = (tmp_path / "store").glob("part/*")
    (first / "a.txt").write_text("value 9")  # to see that it is not written again
    second, store = run(root, url)
    assert (second.done, second.ran, store.failed) == (["part/0"], ["part/1"], {})
    assert (first / "a.txt").read_text() == "value 9"
    (first / "record.json").unlink()
    (first / "a.txt").write_text("val")
    run(root, url)
    assert (first / "a.txt").read_text() == "value 0"
    assert json.loads((first / "record.json").read_bytes())["name"] == "part/0"


KILLED = """
import os, sys
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from madpo.runner.uploads import Upload
put = LocalFileSystem.put_file
def dies(self, local, remote, **how):
    if remote.endswith("b.bin"):
        Path(remote).write_bytes(b"b" * 10)
        os._exit(9)
    put(self, local, remote, **how)
LocalFileSystem.put_file = dies
folder, root = Path(sys.argv[1]), Path(sys.argv[2])
with Upload(sys.argv[3]) as store:
    store.step("part/0", folder, root)
"""


def test_killed_in_the_middle_leaves_no_record_and_is_mended(tmp_path: Path) -> None:
    root, url = tmp_path / "run", f"file://{tmp_path}/store"
    result = pipeline.run([Step("part/0", write, Config())], root)
    folder = result.plan[0].step.folder(root)
    died = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(root), url], check=False)
    assert died.returncode == 9
    place = tmp_path / "store" / folder.relative_to(root)
    assert (place / "a.txt").exists()
    assert not (place / "record.json").exists()
    again, store = run(root, url, count=1)
    assert (again.ran, store.failed) == ([], {})
    assert (place / "deep" / "b.bin").read_bytes() == b"b" * 1000
    assert (place / "record.json").exists()


def test_a_store_that_fails_costs_no_result_and_tells_no_secret(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "memory://name:pass%20word@madpo/study?token=s3cret"

    def refuse(self: Any, local: str, remote: str, **how: Any) -> None:
        raise PermissionError(f"403 for name:pass%20word (pass word) with token=s3cret: {remote.rsplit('/')[-1]}")

    monkeypatch.setattr(type(memory), "put_file", refuse)
    result, store = run(tmp_path / "run", url)
    assert list(result.records) == ["part/0", "part/1"]
    assert list(store.failed) == ["part/0", "part/1"]
    said = capsys.readouterr()
    for text in (said.err + said.out, store.shown, *store.failed.values()):
        assert not [secret for secret in ("pass%20word", "pass word", "s3cret", "name") if secret in text], text
    assert "403" in store.failed["part/0"]
    names(said.err + said.out, ("memory://madpo/study", "PermissionError: 403"))


def test_a_bucket_is_never_created(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # s3fs and gcsfs create the bucket of a folder that they are asked to make: a mistyped name would pass unnoticed.
    def create(self: Any, path: str, exist_ok: bool = False) -> None:
        raise AssertionError(f"the bucket of {path} would be created")

    def put(self: Any, local: str, remote: str) -> None:
        self.pipe_file(remote, Path(local).read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "makedirs", create)
        patch.setattr(type(memory), "put_file", put)
        patch.setattr(type(memory), "protocol", ("s3", "s3a"))
        _, store = run(tmp_path / "run", "memory://bucket/study")
        assert store.failed == {}
    assert len(memory.find("/bucket/study")) == 6


def test_a_url_is_checked_before_anything_runs() -> None:
    assert shown("s3://key:secret@bucket/place?x=1") == "s3://bucket/place"
    with refused(ConfigError, "--upload"):
        Upload("somewhere/else")
    with refused(ConfigError, "--upload", "nowhere://b/c") as caught:
        Upload("nowhere://key:secret@b/c")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_uploads_a_run_and_says_so_where_it_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: bool
) -> None:
    from madpo.study import experiment

    class Small:
        title, seed, report_to, corpus = "small", 0, (), None

        def model_dump(self, mode: str) -> dict[str, Any]:
            return {}

        def rows(self) -> tuple[()]:
            return ()

        def with_groups(self, only: object) -> "Small":
            return self

        def steps(self) -> list[Step]:
            return [Step("part/0", write, Config())]

    monkeypatch.setattr(experiment, "load_config", lambda *given: Small())
    if broken:
        (tmp_path / "store").write_text("a file, not a folder")
    status = main(["run", "smoke", "--output_dir", str(tmp_path / "run"), "--upload", f"file://{tmp_path}/store"])
    err = capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").exists()
    if broken:
        assert status == 1
        names(err, "part/0, report")
    else:
        assert status == 0
        for name in ("run.json", "report.html", "results.md"):
            assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
