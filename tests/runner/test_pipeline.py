"""Identity, skipping, resuming, and what happens when things go wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import Field

import madpo.runner.record
from madpo.core.config import Frozen
from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.core.locks import holder, locked
from madpo.core.metrics import Estimate, Metrics
from madpo.core.storage import write_atomically
from madpo.runner.executors import Inline, Processes
from madpo.runner.operation import operation
from madpo.runner.record import run_status
from madpo.runner.run import Record, Step, load_record, plan, run
from quick import quick
from refusals import names, refused


class Numbers(Frozen):
    value: int = 2
    scale: float = 1.0
    batch_size: int = Field(8, exclude=True)


class Place(Frozen):
    folder: Path
    where: Path = Field(Path("x"), exclude=True)


@operation("produce/1")
def produce(config: Numbers, inputs: Mapping[str, Path], out: Path) -> Metrics:
    with (out / "calls.txt").open("a") as file:
        file.write("x")
    (out / "value.txt").write_text(str(config.value * config.scale))
    return {"value": config.value, "mean": Estimate(1.0, 0.5, 1.5, 7), "share": np.float32(0.5), "kind": "test"}


@operation("produce/2")
def produce_differently(config: Numbers, inputs: Mapping[str, Path], out: Path) -> Metrics:
    return {"value": -config.value}


@operation("combine/1")
def combine(config: Numbers, inputs: Mapping[str, Path], out: Path) -> Metrics:
    return {"sum": sum(float((folder / "value.txt").read_text()) for folder in inputs.values())}


@operation("crash/1")
def crash(config: Numbers, inputs: Mapping[str, Path], out: Path) -> Metrics:
    partial = out / "checkpoints" / "checkpoint-1" / "manifest.json"
    partial.parent.mkdir(parents=True, exist_ok=True)
    if not partial.exists():
        partial.write_text("half")
    if os.environ.get("MADPO_TEST_CRASH"):
        raise RuntimeError("broken\nline 2")
    return {"continued": partial.read_text()}


MISTAKE = "reviews.csv row 3: the text is empty; drop the row"


@operation("refuse/1")
def refuse(config: Numbers, inputs: Mapping[str, Path], out: Path) -> Metrics:
    raise DataError(MISTAKE)


@operation("fill_disk/1")
def fill_disk(config: Numbers, inputs: Mapping[str, Path], out: Path) -> Metrics:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / "model.safetensors"))


@operation("fill_disk_in_rust/1")
def fill_disk_in_rust(config: Numbers, inputs: Mapping[str, Path], out: Path) -> Metrics:
    raise RuntimeError("I/O error: No space left on device (os error 28)")


@operation("diverge/1")
def diverge(config: Numbers, inputs: Mapping[str, Path], out: Path) -> Metrics:
    return {"loss": float("nan")}


LIBRARIES = {"torch": "2.13.0", "transformers": "5.24.0", "trl": "1.16.0", "peft": "0.21.0"}


@pytest.fixture(autouse=True)
def _fixed_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("madpo.runner.step.libraries", lambda: LIBRARIES)


def graph(value: int = 2, **config: Any) -> list[Step]:
    first = Step("data/first", produce, Numbers(value=value, **config), says="makes a number")
    second = Step("data/second", produce, Numbers(value=5))
    return [first, second, Step("sum", combine, Numbers(), {"a": first, "b": second})]


def calls(root: Path, step: Step) -> int:
    return len((step.folder(root) / "calls.txt").read_text())


# Identity


def test_golden_identities() -> None:
    # These may change only with a sentence in the log saying why: every change makes all earlier runs stale.
    assert [step.identity for step in graph()] == [
        "1d2c9b52a47232c67aa38dfa8ab1fe786a846403b276e3e717839722eb52b88b",
        "c339b2c828f1e1f57aa04d71cb7d861c8d1900de633f285adb096b6b3b608d6d",
        "e1bc5671ad9eaca0457428bc10213a81af2524e3e84e974c8155f6f77133b341",
    ]


def test_identity_moves_with_everything_that_bears_on_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Step("a", produce, Numbers())
    upstream = Step("u", produce, Numbers())
    variants = [
        Step("a", produce, Numbers(value=3)),
        Step("a", combine, Numbers()),
        Step("a", produce_differently, Numbers()),
        Step("a", produce, Numbers(), {"x": upstream}),
        Step("a", produce, Numbers(), {"y": upstream}),
        Step("a", produce, Numbers(), {"x": Step("u", produce, Numbers(value=9))}),
    ]
    assert len({step.identity for step in [base, *variants]}) == 7
    monkeypatch.setattr("madpo.runner.step.libraries", lambda: {"torch": "2.14.0"})
    assert Step("a", produce, Numbers()).identity != base.identity


@pytest.mark.parametrize("name", ["record.json", "report.html", "figures"])
def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name == "figures" else (tmp_path / name).write_text("mine")
    with refused(StorageError, name, "--output_dir"):
        run(graph(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / "run.json").write_text("{}")
    assert run(graph(), tmp_path).ran


def test_identity_ignores_how_and_where(tmp_path: Path) -> None:
    base = Step("a", produce, Numbers())
    same = [
        Step("a", produce, Numbers(batch_size=64)),
        Step("renamed", produce, Numbers()),
        Step("a", produce, Numbers(value=2, scale=1.0), says="other words"),
    ]
    assert {step.identity for step in same} == {base.identity}
    assert base.folder(tmp_path).name == f"a-{base.identity[:8]}"


def test_a_path_cannot_enter_the_identity() -> None:
    with refused(TypeError, "config.folder"):
        _ = Step("a", produce, Place(folder=Path("/data"))).identity


def test_library_versions_leave_out_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    madpo.runner.record.installed.cache_clear()
    monkeypatch.setattr("madpo.runner.record.version", lambda name: "2.13.0+cpu")
    try:
        assert set(madpo.runner.record.libraries().values()) == {"2.13.0"}
    finally:
        madpo.runner.record.installed.cache_clear()


@pytest.mark.parametrize("name", ["../escape", "a/../b", "/root", "a b", ""])
def test_a_name_is_a_safe_folder(name: str) -> None:
    with refused(ValueError, repr(name)):
        Step(name, produce, Numbers())


def test_a_function_must_have_a_stable_name() -> None:
    def unnamed(config: Numbers, inputs: Mapping[str, Path], out: Path) -> Metrics:
        return {}

    unnamed.__qualname__ = "unnamed"
    with refused(ValueError, "unnamed"):
        Step("a", unnamed, Numbers())
    for name in ("train", "train/one", "Train/1", "train/1/2"):
        with pytest.raises(ValueError, match=name):
            operation(name)


def test_a_function_must_be_at_module_level() -> None:
    with refused(ValueError, "<lambda>"):
        Step("a", lambda config, inputs, out: {}, Numbers())


# Running


@pytest.mark.parametrize("jobs", [0, 2])
def test_runs_in_order_then_skips(tmp_path: Path, jobs: int, capsys: pytest.CaptureFixture[str]) -> None:
    with Processes(jobs) if jobs else Inline() as executor:
        result = run([graph()[-1]], tmp_path, executor)
    assert sorted(result.ran) == ["data/first", "data/second", "sum"]
    assert result.ran[-1] == "sum"
    assert list(result.records) == ["data/first", "data/second", "sum"]  # the graph's order, not that of finishing
    assert result.records["sum"].metrics == {"sum": 7.0}
    first = result.records["data/first"]
    assert first.metrics == {"value": 2, "mean": Estimate(1.0, 0.5, 1.5, 7), "share": 0.5, "kind": "test"}
    assert first.config == {"value": 2, "scale": 1.0}
    assert first.threads >= 1
    conditions = {"instruction_set", "machine", "processor", "cores", "memory", "peak_memory", "device", "versions"}
    assert {"seconds", "host", "started", "madpo", "argv", "files", *conditions} == set(first.provenance)
    assert set(first.files or {}) == {"calls.txt", "value.txt"}
    names(capsys.readouterr().err, "data/first")

    again = run(graph(), tmp_path)
    assert again.ran == []
    assert again.done == ["data/first", "data/second", "sum"]
    assert again.records == result.records
    assert calls(tmp_path, graph()[0]) == 1
    names(capsys.readouterr().err, "3 steps")


@pytest.mark.parametrize("jobs", [0, 1, 2])
def test_a_free_worker_takes_the_first_step_that_is_ready(
    tmp_path: Path, jobs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[Step] = []
    for seed in range(3):
        base = Step(f"data/seed{seed}", produce, Numbers(value=seed))
        steps += [base, Step(f"sum/seed{seed}", combine, Numbers(), inputs={"one": base})]
    with Processes(jobs) if jobs else Inline() as executor:
        result = run(steps, tmp_path, executor)
    running = 0
    for line in capsys.readouterr().err.splitlines():
        if ": done in" in line:
            running -= 1
        elif line.startswith(("data/", "sum/")):
            running += 1  # said to start
        assert running <= max(1, jobs)
    assert running == 0
    if jobs < 2:
        assert result.ran == [step.name for step in steps]  # a seed is whole before the next begins


def strip(step: Step, root: Path, *, folders: bool) -> None:
    """What an export leaves of a step: a line of ``records.json``, or, in older ones, the folder with its record."""
    folder, kept = step.folder(root), root / "records.json"
    record = json.loads((folder / "record.json").read_text())
    record["provenance"]["exported"] = True
    shutil.rmtree(folder)
    if folders:
        folder.mkdir()
        (folder / "record.json").write_text(json.dumps(record))
    else:
        records = json.loads(kept.read_text()) if kept.exists() else {}
        kept.write_text(json.dumps({**records, folder.relative_to(root).as_posix(): record}))


@pytest.mark.parametrize("folders", [True, False])
def test_a_run_goes_on_from_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str], folders: bool) -> None:
    first, second, both = graph()
    before = run([both], tmp_path).records
    for step in (first, second, both):
        strip(step, tmp_path, folders=folders)
    assert [status for _, status in plan([both], tmp_path)] == ["done"] * 3
    assert run([both], tmp_path).ran == []
    assert first.folder(tmp_path).is_dir() == folders
    assert plan(graph(value=3), tmp_path)[0].status == "stale: value is 3, was 2"
    status = run_status(tmp_path)
    assert status.unfinished == {}
    assert status.steps["sum"] == result_of(before["sum"])

    more = Step("more", combine, Numbers(), {"a": first})
    dry = run([both, more], tmp_path, dry_run=True)
    assert dry.done == ["data/second", "sum"]
    again = {step.name: status for step, status in dry.plan}
    names(again["data/first"], "more")
    capsys.readouterr()
    result = run([both, more], tmp_path)
    assert result.ran == ["data/first", "more"]
    names(capsys.readouterr().err, "1 of")
    assert result.records["more"].metrics == {"sum": 2.0}
    assert result.records["sum"] == result_of(before["sum"])
    assert not result.records["data/first"].stripped
    assert run([both, more], tmp_path).ran == []

    # A step that is to run needs its inputs' files, and these theirs.
    third = Step("third", produce, Numbers(), {"a": more})
    strip(more, tmp_path, folders=folders)
    strip(first, tmp_path, folders=folders)
    assert run([third], tmp_path).ran == ["data/first", "more", "third"]


def result_of(record: Record) -> Record:
    """The record as an export has it."""
    return record.model_copy(update={"provenance": {**record.provenance, "exported": True}})


def test_a_damaged_list_of_records_counts_as_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = graph()[0]
    run([first], tmp_path)
    strip(first, tmp_path, folders=False)
    kept = tmp_path / "records.json"
    kept.write_text(kept.read_text()[:-20])
    assert [status for _, status in plan([first], tmp_path)] == ["to run"]
    names(capsys.readouterr().err, kept)


def test_records_are_equal_outside_provenance(tmp_path: Path) -> None:
    one = run(graph(), tmp_path / "one").records
    two = run(graph(), tmp_path / "two").records
    for name in one:
        assert one[name].model_dump(exclude={"provenance"}) == two[name].model_dump(exclude={"provenance"})


@pytest.mark.slow
def test_a_record_states_what_its_bytes_depend_on(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "cases")]!r}
from test_pipeline import graph
from madpo.runner.run import run
without = run(graph(), Path({str(tmp_path / "without")!r})).records["sum"]
assert "torch" not in sys.modules
import torch
torch.set_num_threads(1)
record = run(graph(), Path({str(tmp_path / "with")!r})).records["sum"]
assert record.threads == 1
assert record.provenance["instruction_set"] == torch.backends.cpu.get_cpu_capability()
assert without.provenance["instruction_set"] is None
assert record.libraries["torch"] == torch.__version__.split("+")[0]
import numpy
assert record.provenance["versions"]["numpy"] == numpy.__version__
assert record.provenance["versions"]["python"] == sys.version.split()[0]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_change_runs_what_depends_on_it_in_a_new_folder(tmp_path: Path) -> None:
    run(graph(), tmp_path)
    result = run(graph(value=3), tmp_path)
    assert result.ran == ["data/first", "sum"]
    assert result.done == ["data/second"]
    assert result.records["sum"].metrics == {"sum": 8.0}
    assert run(graph(), tmp_path).ran == []  # the old result is still there, under its own identity


def test_plan_names_what_changed(tmp_path: Path) -> None:
    assert [p.status for p in plan(graph(), tmp_path)] == ["to run"] * 3
    run(graph(), tmp_path)
    assert [p.status for p in plan(graph(), tmp_path)] == ["done"] * 3
    stale = [p.status for p in plan(graph(value=3), tmp_path)]
    assert stale == ["stale: value is 3, was 2", "done", "stale: its input a changed (data/first)"]
    bumped = Step("data/second", produce_differently, Numbers(value=5))
    assert plan([bumped], tmp_path)[0].status == "stale: the operation is produce/2, was produce/1"


def test_plan_names_a_changed_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(graph(), tmp_path)
    monkeypatch.setattr("madpo.runner.step.libraries", lambda: {**LIBRARIES, "torch": "2.14.0"})
    assert plan(graph(), tmp_path)[0].status == 'stale: torch is "2.14.0", was "2.13.0"'


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = run(graph(), tmp_path / "new", dry_run=True)
    assert [p.status for p in result.plan] == ["to run"] * 3
    assert not (tmp_path / "new").exists()


def test_only_takes_upstreams_along(tmp_path: Path) -> None:
    assert run(graph(), tmp_path, only=["data/f*"]).ran == ["data/first"]
    assert run(graph(), tmp_path, only=["sum"]).ran == ["data/second", "sum"]
    with refused(ConfigError, "'data/first'"):
        run(graph(), tmp_path, only=["data/frist"])


def test_only_takes_groups_and_patterns_within_groups(tmp_path: Path) -> None:
    first, second, both = graph()
    steps = [
        first,
        second,
        Step("a/low", produce, Numbers(value=3), groups=("core",)),
        Step("a/high", produce, Numbers(value=4), groups=("core", "ablation")),
        both,
    ]

    def chosen(*only: str) -> list[str]:
        return [p.step.name for p in run(steps, tmp_path, only=only, dry_run=True).plan]

    assert chosen("core") == ["a/low", "a/high"]
    assert chosen("ablation", "data/f*") == ["data/first", "a/high"]
    assert chosen("core/*/low") == ["a/low"]
    assert len(chosen()) == 5
    with refused(ConfigError, "'ablation'"):
        chosen("core", "ablatoin")
    assert {step.identity for step in steps[2:3]} == {Step("x", produce, Numbers(value=3)).identity}


def test_a_choice_keeps_the_order_of_the_whole(tmp_path: Path) -> None:
    first, second, both = graph()
    early = Step("early", produce, Numbers(value=3))
    steps = [first, second, early, both, Step("late", combine, Numbers(), {"a": second, "b": early})]
    planned = run(steps, tmp_path, only=["late", "sum"], dry_run=True).plan
    assert [p.step.name for p in planned] == ["data/first", "data/second", "early", "sum", "late"]
    planned = run(steps, tmp_path, only=["late"], dry_run=True).plan
    assert [p.step.name for p in planned] == ["data/second", "early", "late"]


def test_two_different_steps_cannot_share_a_name(tmp_path: Path) -> None:
    with refused(ConfigError, "'a'"):
        run([Step("a", produce, Numbers()), Step("a", produce, Numbers(value=3))], tmp_path)


def test_run_lists_its_steps(tmp_path: Path) -> None:
    run(graph(), tmp_path, about={"title": "t"}, only=["data/first"])
    listing = json.loads((tmp_path / "run.json").read_text())
    assert listing["about"] == {"title": "t"}
    assert list(listing["steps"]) == ["data/first", "data/second", "sum"]
    assert (tmp_path / listing["steps"]["data/first"]["folder"] / "record.json").exists()


# Failing


def test_a_crash_leaves_no_record_and_a_rerun_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Step("broken", crash, Numbers())
    after = Step("after", combine, Numbers(), {"x": broken})
    later = Step("later", combine, Numbers(), {"x": after})
    free = Step("free", produce, Numbers())
    monkeypatch.setenv("MADPO_TEST_CRASH", "1")
    result = run([broken, after, later, free], tmp_path)
    assert result.ran == ["free"]
    assert result.skipped == {"after": "broken", "later": "broken"}
    assert list(result.failed) == ["broken"]
    folder = broken.folder(tmp_path)
    names(result.failed["broken"], "RuntimeError: broken", folder / "error.txt")
    assert "line 2" in (folder / "error.txt").read_text()
    assert load_record(folder) is None
    monkeypatch.delenv("MADPO_TEST_CRASH")
    again = run([broken], tmp_path)
    assert again.records["broken"].metrics == {"continued": "half"}
    assert sorted(p.name for p in folder.iterdir()) == ["record.json"]


def test_a_users_mistake_is_raised_when_nothing_else_came_of_it(tmp_path: Path) -> None:
    wrong = Step("wrong", refuse, Numbers())
    with refused(DataError, MISTAKE):
        run([wrong], tmp_path)
    result = run([wrong, Step("free", produce, Numbers())], tmp_path)
    assert result.failed == {"wrong": MISTAKE}


@pytest.mark.parametrize("fn", [fill_disk, fill_disk_in_rust])
def test_a_full_disk_is_one_sentence(tmp_path: Path, fn: Any) -> None:
    step = Step("big", fn, Numbers())
    with refused(StorageError, step.folder(tmp_path), "full"):
        run([step], tmp_path)


def test_a_full_disk_while_the_record_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    step = Step("a", produce, Numbers())
    step.folder(tmp_path).mkdir()
    write_atomically(tmp_path / "run.json", "{}")
    monkeypatch.setattr("madpo.core.storage.os.fsync", full)
    with refused(StorageError, tmp_path, "full"):
        run([step], tmp_path)
    assert load_record(step.folder(tmp_path)) is None
    assert (tmp_path / "run.json").read_text() == "{}"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with refused(StorageError, tmp_path, "permission"):
            run(graph(), tmp_path / "new")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_missing_rights_as_the_system_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse_folder(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse_folder)
    with refused(StorageError, "new"):
        run(graph(), tmp_path / "new")


@pytest.mark.parametrize("tail", ["", "deeper"])
def test_a_file_in_place_of_the_folder(tmp_path: Path, tail: str) -> None:
    (tmp_path / "taken").write_text("mine")
    with refused(StorageError, tmp_path / "taken"):
        run(graph(), tmp_path / "taken" / tail)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_diverged_metric_fails_the_step(tmp_path: Path) -> None:
    step = Step("nan", diverge, Numbers())
    with refused(ConfigError, ("loss", "nan")):
        run([step], tmp_path)
    assert load_record(step.folder(tmp_path)) is None


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"\xff\xfe"])
def test_a_damaged_record_counts_as_missing(tmp_path: Path, damage: bytes) -> None:
    step = graph()[0]
    run([step], tmp_path)
    (step.folder(tmp_path) / "record.json").write_bytes(damage)
    assert plan([step], tmp_path)[0].status == "to run"
    assert run([step], tmp_path).ran == ["data/first"]


def test_a_second_run_is_refused_with_pid_and_host(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with locked(tmp_path), refused(StorageError, f"process {os.getpid()}", os.uname().nodename):
        run(graph(), tmp_path)
    assert holder(tmp_path) is None
    assert len(run(graph(), tmp_path).ran) == 3


KILLED = """
    import signal, sys, time
    # A background job of a shell inherits an ignored SIGINT, and python then installs no handler of its own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from pathlib import Path
    from madpo.core.config import Frozen
    from madpo.runner.executors import Inline, Processes
    from madpo.runner.operation import operation
    from madpo.runner.run import Step, run

    class Count(Frozen):
        upto: int = 40

    @operation("count/1")
    def count(config, inputs, out):
        path = out / "count.txt"
        done = int(path.read_text()) if path.exists() else 0
        began = done
        while done < config.upto:
            done += 1
            path.write_text(str(done))
            time.sleep(0.05 if began == 0 else 0)
        return {"began": began, "done": done}

    if __name__ == "__main__":
        steps = [Step("first", count, Count(upto=1)), Step("long", count, Count())]
        with Processes(1) if sys.argv[2] == "processes" else Inline() as executor:
            result = run(steps, Path(sys.argv[1]), executor)
        print(result.ran, result.done, result.records["long"].metrics)
"""


@pytest.mark.parametrize("kind", quick(["inline", "processes"], "processes"))
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_during_a_step_then_continued(tmp_path: Path, kind: str, how: signal.Signals) -> None:
    script, root = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, str(script), str(root), kind]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not [p for p in root.glob("long-*/unfinished/count.txt") if p.read_text() not in ("", "0", "1")]:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    process.communicate()
    assert process.returncode != 0
    (folder,) = root.glob("long-*")
    assert not (folder / "record.json").exists()
    time.sleep(0.3)
    reached = (folder / "unfinished" / "count.txt").read_text()
    time.sleep(0.3)
    assert (folder / "unfinished" / "count.txt").read_text() == reached  # no orphan goes on writing

    after = subprocess.run(command, capture_output=True, text=True, check=True)
    assert after.stdout.startswith("['long'] ['first']")
    assert "'done': 40" in after.stdout
    assert "'began': 0" not in after.stdout
    assert isinstance(load_record(folder), Record)
