"""Full disks, missing rights, vanished folders, two runs at once, too little memory: one sentence, nothing lost."""

import contextlib
import errno
import os
import pwd
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import soak
from guarded_cases import At, build
from holding import another_process_in
from madpo.commands.cli import main
from madpo.core.errors import ConfigError, MemoryShortage, StorageError, is_shortage, memory_errors
from madpo.core.feature_file import FeatureWriter
from madpo.core.locks import LOCK, holder, locked
from madpo.core.storage import expanded, remove_oldest, storage_errors, write_atomically
from madpo.models.packaged import cache_dir
from madpo.operations.running import digest
from madpo.training import PreferenceTrainer, pair_loss, reference
from madpo.training import checkpoints as disk
from practice_cases import classifier, text_pairs, write
from refusals import names, refused

SIZE = 6 * 2**20  # of the small disk: the tiny model's results fit, a ballast fills it


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB of its own; ``remount(options)`` changes it."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system of its own")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place):
    """Leave no room; the ballast's path."""
    ballast = place.parent / place.name / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


def remount(place, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def words(data, model, out):
    """``madpo train`` with a checkpoint after every step."""
    options = ["--loss", "dpo", "--args.save_steps", "1", "--args.bf16", "false", "--dtype", "float32", "--epochs", "1"]
    return ["train", str(data), "--model_name_or_path", str(model), "--output_dir", str(out), *options]


def disturbed(monkeypatch, step, what):
    """Every training from now on is disturbed after ``step``."""
    real = PreferenceTrainer.__init__

    def with_disturbance(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.add_callback(At(step, lambda model: what()))

    monkeypatch.setattr(PreferenceTrainer, "__init__", with_disturbance)
    return lambda: monkeypatch.setattr(PreferenceTrainer, "__init__", real)


def in_a_fork(job, err):
    """(exit code of ``job()`` in a child, what it wrote to stderr)."""

    def run():
        handle = os.open(err, os.O_WRONLY | os.O_CREAT, 0o644)
        sys.stderr = os.fdopen(handle, "w", buffering=1)
        os._exit(job())

    code = soak.wait(soak.fork(run))
    return code, err.read_text()


def one_sentence(capsys):
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("madpo: ")]
    assert "Traceback" not in err
    return line


# ---- A full disk ----


def test_a_full_disk_in_the_middle_costs_one_step(small_disk, llama, tmp_path, capsys, monkeypatch):
    data = write(tmp_path / "pairs.jsonl", text_pairs(24))
    assert main(words(data, llama, tmp_path / "undisturbed")) == 0
    capsys.readouterr()
    command = words(data, llama, small_disk / "P")
    restore = disturbed(monkeypatch, 2, lambda: fill(small_disk))
    assert main(command) == 2
    names(one_sentence(capsys), small_disk / "P", "full")
    assert not (small_disk / "P" / "record.json").exists()
    newest = disk.newest(small_disk / "P" / "unfinished" / "checkpoints")
    assert newest.step == 1
    restore()
    (small_disk / "ballast").unlink()
    assert main(command) == 0
    names(capsys.readouterr().err, "step 1")
    for name in ("adapter/adapter_model.safetensors", "log.jsonl"):
        assert (small_disk / "P" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
    assert [p.name for p in small_disk.iterdir()] == ["P"]


@pytest.mark.parametrize("command", ["reward", "score", "evaluate", "check"])
def test_every_command_on_a_full_disk(small_disk, llama, tmp_path, capsys, command):
    data = write(tmp_path / "pairs.jsonl", [r | {"a": 2.0, "b": 1.0} for r in text_pairs(24)])
    base, out = ["--model_name_or_path", str(llama)], ["--output_dir", str(small_disk / "out")]
    rewards = classifier(llama, tmp_path / "rm")
    given = {
        "reward": [str(data), *base, *out, "--eval_share", "0.4"],
        "score": [str(data), "--score_columns", "a", "b", *out],
        "evaluate": [str(llama), "--reference", str(llama), "--prompts", str(data), "--reward", str(rewards), *out],
        "check": [str(data), "--output_dir", str(small_disk / "out")],
    }[command]
    fill(small_disk)
    assert main([command, *given]) == 2
    names(one_sentence(capsys), small_disk / "out", "full")
    assert not [p for p in small_disk.rglob("*") if p.is_file() and p.name != "ballast" and p.stat().st_size]


@pytest.mark.parametrize("name", ["write", "fsync", "replace", "rename", "mkdir", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_every_call_of_the_system_may_fail_in_a_checkpoint(tmp_path, monkeypatch, name, code):
    """The first three calls of each kind fail in turn: the older checkpoint is whole, and the new one or none."""

    def checkpoint(step):
        with disk.writing(tmp_path, step, {"data": "a"}) as part:
            for file in (disk.WEIGHTS, disk.OPTIMIZER, disk.EXTRA):
                disk.save_tensors({"x": torch.full((3,), float(step))}, part / file)
            for file in (disk.TRAINING, disk.TRAINER_STATE):
                disk.save_json({"step": step}, part / file)

    checkpoint(1)
    real, calls = getattr(os, name), {"left": 0}

    def failing(*arguments, **options):
        calls["left"] -= 1
        if calls["left"] == 0:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, failing)
    for n in (1, 2, 3):
        calls["left"] = n
        with contextlib.suppress(StorageError):
            checkpoint(2)
        calls["left"] = 0
        assert disk.newest(tmp_path).step in (1, 2)
        assert disk.verify(tmp_path / "checkpoint-1").step == 1
        shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EFBIG, "ulimit -f"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EOPNOTSUPP, "another"),
        (errno.ENOSYS, "another"),
        (errno.ENOTCONN, "mount"),
        (errno.ESTALE, "mount"),
    ],
    ids=lambda value: errno.errorcode.get(value, ""),
)
def test_whatever_a_file_system_refuses_is_one_sentence(code, remedy, tmp_path):
    """As the system raises it, and as a library in Rust words it."""
    for error in (OSError(code, os.strerror(code), str(tmp_path / "f")), RuntimeError(f"I/O error: (os error {code})")):
        with refused(StorageError, tmp_path, remedy), storage_errors(tmp_path):
            raise error


def test_a_file_above_the_limit_is_one_sentence_and_leaves_nothing(llama, tmp_path):
    data = write(tmp_path / "pairs.jsonl", text_pairs(24))

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        return main(words(data, llama, tmp_path / "P"))

    code, err = in_a_fork(limited, tmp_path / "err.txt")
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("madpo: ")]
    names(line, tmp_path / "P", "ulimit -f")
    assert not (tmp_path / "P").exists()


def test_a_table_of_features_on_a_full_disk_is_an_error_and_no_dead_process(small_disk):
    """16 MB on a disk of 6 MB: through a memory map the process would end by a signal."""
    rows = np.ones((512, 512), np.float32)
    path = small_disk / "features.safetensors"
    with (
        refused(StorageError, small_disk, "full"),
        storage_errors(small_disk),
        FeatureWriter(path, 4096, 512) as writer,
    ):
        for start in range(0, 4096, 512):
            writer.write(start, rows, rows)
    assert not list(small_disk.iterdir())


# ---- Read-only, no rights, vanished ----


def test_a_read_only_disk(small_disk, llama, tmp_path, capsys):
    data = write(tmp_path / "pairs.jsonl", text_pairs(24))
    remount(small_disk, "ro")
    assert main(words(data, llama, small_disk / "P")) == 2
    names(one_sentence(capsys), small_disk, "read-only")
    assert not list(small_disk.iterdir())


def test_a_cache_that_cannot_be_written_is_refused_before_the_reference_is_computed(
    small_disk, llama, tmp_path, capsys, monkeypatch
):
    """As in a container with a read-only home folder. The remedy works."""
    data = write(tmp_path / "pairs.jsonl", text_pairs(24))
    monkeypatch.setenv("MADPO_CACHE", str(small_disk / "cache"))
    monkeypatch.setattr(reference, "batch_logps", lambda *_: pytest.fail("computed"))
    remount(small_disk, "ro")
    assert main(words(data, llama, tmp_path / "P")) == 2
    names(one_sentence(capsys), small_disk / "cache", "read-only", "MADPO_CACHE")
    assert not (tmp_path / "P").exists()
    monkeypatch.undo()
    monkeypatch.setenv("MADPO_CACHE", str(tmp_path / "cache"))
    assert main(words(data, llama, tmp_path / "P")) == 0


def test_a_trainer_of_ones_own_in_a_read_only_folder(small_disk, llama):
    remount(small_disk, "ro")
    with refused(StorageError, small_disk / "run", "read-only"):
        build(llama, small_disk / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_a_folder_of_somebody_else(llama, tmp_path, tmp_path_factory):
    """In a process that has given up its rights: root may write anywhere."""
    for place in (tmp_path, *tmp_path.parents[:3], llama, llama.parent, *llama.iterdir()):
        place.chmod(0o755)
    (tmp_path / "cache").mkdir(mode=0o777)
    data = write(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_pairs(24))
    data.parent.chmod(0o755)
    before = sorted(tmp_path.rglob("*"))

    def as_nobody():
        os.setgid(65534)
        os.setuid(65534)
        with refused(StorageError, tmp_path / "run", "permission"):
            build(llama, tmp_path / "run")
        return main(words(data, llama, tmp_path / "P"))

    code, err = in_a_fork(as_nobody, tmp_path_factory.mktemp("said") / "err.txt")
    assert code == 2, err
    names(err, tmp_path / "P", "permission")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_a_file_that_may_not_be_read_is_named(tmp_path, tmp_path_factory):
    for place in (tmp_path, *tmp_path.parents[:3]):
        place.chmod(0o755)
    (tmp_path / "weights").write_bytes(b"0")
    (tmp_path / "weights").chmod(0o600)

    def as_nobody():
        os.setuid(65534)
        for place in (tmp_path, tmp_path / "weights"):
            with refused(StorageError, tmp_path / "weights", "readable"):
                digest(place)
        return 0

    code, err = in_a_fork(as_nobody, tmp_path_factory.mktemp("said") / "err.txt")
    assert code == 0, err


def test_a_user_without_a_home_folder_is_asked_for_a_cache(monkeypatch):
    def unknown(*_):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "MADPO_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with refused(ConfigError, "MADPO_CACHE"):
        cache_dir()
    assert str(expanded("~/layout.toml")) == "~/layout.toml"


def test_a_folder_that_vanishes_under_a_training(llama, tmp_path, capsys, monkeypatch):
    data = write(tmp_path / "pairs.jsonl", text_pairs(24))
    partial = tmp_path / "P"
    restore = disturbed(monkeypatch, 2, lambda: shutil.move(partial, tmp_path / "moved"))
    assert main(words(data, llama, tmp_path / "P")) == 2
    names(one_sentence(capsys), partial, "vanished")
    assert not partial.exists()
    restore()
    shutil.move(tmp_path / "moved", partial)
    assert main(words(data, llama, tmp_path / "P")) == 0
    names(capsys.readouterr().err, "step 1")


def test_a_trainers_folder_that_vanishes(llama, tmp_path):
    root = tmp_path / "run"
    trainer = build(llama, root, callback=At(2, lambda model: shutil.rmtree(root)))
    with refused(StorageError, root, "vanished"):
        trainer.train()
    assert not root.exists()


def test_what_is_missing_elsewhere_is_no_vanished_folder(tmp_path):
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "nothing").read_text()
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path / "gone"):
        (tmp_path / "nothing").read_text()
    with refused(StorageError, tmp_path / "gone", "vanished"), storage_errors(tmp_path / "gone"):
        (tmp_path / "gone" / "x").write_text("")


# ---- Two runs at once ----


def test_a_second_run_is_refused_with_pid_and_host_everywhere(llama, tmp_path, capsys):
    """Trainer, and each command; the run itself is in tests/runner/test_pipeline.py."""
    data = write(tmp_path / "pairs.jsonl", [r | {"a": 2.0, "b": 1.0} for r in text_pairs(24)])
    base, out = ["--model_name_or_path", str(llama)], ["--output_dir", str(tmp_path / "out")]
    with another_process_in(tmp_path / "out") as other:
        who = f"process {other.pid} on {os.uname().nodename}"
        with refused(StorageError, "out", who):
            build(llama, tmp_path / "out").train()
        for more in ([], ["--overwrite"]):  # which must not empty what another run fills
            assert main(["score", str(data), "--score_columns", "a", "b", *out, *more]) == 2
            assert who in one_sentence(capsys)
        assert [p.name for p in (tmp_path / "out").iterdir()] == [LOCK]
    rewards = classifier(llama, tmp_path / "rm")
    prompts = ["--reference", str(llama), "--prompts", str(data), "--reward", str(rewards)]
    with another_process_in(tmp_path / "other") as other:
        out = ["--output_dir", str(tmp_path / "other")]
        for command in (
            ["reward", str(data), *base, *out],
            ["train", str(data), "--loss", "dpo", *base, *out],
            ["evaluate", str(llama), *prompts, *out],
        ):
            assert main(command) == 2
            names(one_sentence(capsys), ("other", f"process {other.pid}"))
    # It was killed; the system let go of its lock.
    with locked(tmp_path / "out"):
        pass


def test_a_trainer_lets_go_of_its_folder_and_leaves_no_lock(llama, tmp_path):
    build(llama, tmp_path / "run", max_steps=1).train()
    assert not (tmp_path / "run" / LOCK).exists()
    assert holder(tmp_path / "run") is None
    build(llama, tmp_path / "none", max_steps=1, save_strategy="no").train()


# ---- Memory ----


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**9, 10**9), np.dtype("f8")),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_way_to_say_that_memory_is_short(error):
    with refused(MemoryShortage, "batch_size"), memory_errors("lower batch_size"):
        raise error
    wrapped = RuntimeError("while generating the data set")
    wrapped.__cause__ = error
    assert is_shortage(wrapped)


def test_other_errors_pass():
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory is only a text"), KeyError("a")):
        with pytest.raises(type(error)), memory_errors("lower batch_size"):
            raise error
    with pytest.raises(RuntimeError):
        torch.zeros(2) @ torch.zeros(3)


def test_memory_that_runs_out_in_a_training(llama, tmp_path, monkeypatch, capsys):
    """The address space of a child is closed after two steps; its third batch then asks for a gigabyte."""
    data = write(tmp_path / "pairs.jsonl", text_pairs(24))

    def in_little_memory():
        def close():
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**22, resource.RLIM_INFINITY))
            real = pair_loss.completion_logps
            monkeypatch.setattr(pair_loss, "completion_logps", lambda *a, **k: (torch.empty(2**28), real(*a, **k))[1])

        disturbed(monkeypatch, 2, close)
        return main(words(data, llama, tmp_path / "P"))

    code, err = in_a_fork(in_little_memory, tmp_path / "err.txt")
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("madpo: ")]
    names(line, "memory", "gradient_accumulation_steps")
    assert "Traceback" not in err
    assert not (tmp_path / "P" / "record.json").exists()
    assert disk.newest(tmp_path / "P" / "unfinished" / "checkpoints").step == 2
    assert main(words(data, llama, tmp_path / "P")) == 0
    names(capsys.readouterr().err, "step 2")


def test_writing_leaves_the_old_file_or_the_new_one(small_disk):
    path = small_disk / "file"
    write_atomically(path, "old")
    fill(small_disk)
    with refused(StorageError, path, "full"), storage_errors(path):
        write_atomically(path, b"new" * 10**5)
    assert path.read_text() == "old"
    assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "file"]


def test_what_was_used_longest_ago_makes_room(tmp_path):
    week = 8 * 24 * 3600
    ages = {"a": 4, "b": 3, "c": 2, ".d.7.tmp": week, ".e.8.tmp": 5}
    for name, age in ages.items():
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert remove_oldest(tmp_path, 50) == 0
    assert remove_oldest(tmp_path, 40) == 1
    assert remove_oldest(tmp_path, 15, keep=[tmp_path / "b"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".e.8.tmp", "b"], "one is in use, one is to be kept"


def test_two_processes_make_room_at_once(tmp_path, monkeypatch):
    """Whatever the other one has removed meanwhile is gone, which is no error."""
    for i in range(4):
        (tmp_path / str(i)).write_bytes(b"x" * 10)
        os.utime(tmp_path / str(i), (i, i))
    real = Path.unlink

    def overtaken(path, missing_ok=False):
        real(path)
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", overtaken)
    assert remove_oldest(tmp_path, 20) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
