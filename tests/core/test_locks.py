"""One run at a time in a folder: with the system's file lock, and where there is none."""

import ast
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from holding import another_process_in
from madpo.commands.cli import main
from madpo.core import locks
from madpo.core.errors import StorageError
from madpo.core.locks import LOCK, OWNER, holder, locked
from practice_cases import write
from quick import quick
from refusals import names, refused

ERRORS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL]
NO_FLOCK = """
import fcntl
def refuse(*_):
    raise OSError({code}, "no file locks here")
fcntl.flock = refuse
"""


def refusing(code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.fixture(params=[None, *ERRORS], ids=lambda code: "flock" if code is None else errno.errorcode[code])
def system(request, monkeypatch):
    """Code that another process runs first, so that it has the same system as this one."""
    if request.param is None:
        return ""
    monkeypatch.setattr(fcntl, "flock", refusing(request.param))
    return NO_FLOCK.format(code=request.param)


@pytest.fixture
def no_flock(monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS))
    monkeypatch.setattr(locks, "_said", set())


def test_a_second_run_is_refused_until_the_first_is_killed(system, tmp_path):
    with another_process_in(tmp_path, system) as other:
        who = f"process {other.pid} on {socket.gethostname()}, since "
        for _ in range(2):  # a refusal changes nothing
            with refused(StorageError, tmp_path.name, who):
                locked(tmp_path).__enter__()
            assert holder(tmp_path).startswith(who)
        other.kill()
        other.wait()
        assert holder(tmp_path) is None
    with locked(tmp_path):
        assert holder(tmp_path).startswith(f"process {os.getpid()} on")
    assert holder(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_its_folders_and_survives_a_rename(system, tmp_path):
    with locked(tmp_path / "a"):
        (tmp_path / "a").rename(tmp_path / "b")
        with locked(tmp_path / "a"):  # another folder of that name: another lock
            assert holder(tmp_path / "a") is not None
        assert list((tmp_path / "a").iterdir()) == []
        assert holder(tmp_path / "b") is not None
        with locked(tmp_path / "a"):
            (tmp_path / "a").rename(tmp_path / "c")
            (tmp_path / "b").rename(tmp_path / "a")
        assert holder(tmp_path / "a") is not None, "the inner one let go of its own folder only"


RACE = """
import sys, time
from pathlib import Path
from madpo.core.errors import StorageError
from madpo.core.locks import locked
root, mine = Path(sys.argv[1]), Path(sys.argv[1]) / "inside"
entered = 0
until = time.monotonic() + 60
while entered < 60 and time.monotonic() < until:
    try:
        with locked(root):
            mine.touch(exist_ok=False)
            time.sleep(0.0005)
            mine.unlink()
            entered += 1
    except StorageError:
        time.sleep(0.0003)
print(entered)
"""
# Every fourth time it leaves without letting go, as a killed process does; its child has ended by then.
KILLED = """
import os, sys, time
from pathlib import Path
from madpo.core.errors import StorageError
from madpo.core.locks import locked
root, mine = Path(sys.argv[1]), Path(sys.argv[1]) / "inside"
entered = 0
until = time.monotonic() + 60
while entered < 15 and time.monotonic() < until:
    child = os.fork()
    if not child:
        try:
            with locked(root):
                mine.touch(exist_ok=False)
                time.sleep(0.001)
                mine.unlink()
                os._exit(3)
        except StorageError:
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code != 1, "another was inside"
    entered += code == 3
print(entered)
"""


RACES = [(RACE, None), (RACE, errno.ENOSYS), (KILLED, None), (KILLED, errno.ENOSYS)]


@pytest.mark.parametrize(
    ("program", "system"),
    quick(RACES, RACES[1], RACES[2]),
    indirect=["system"],
    ids=["released-flock", "released-ENOSYS", "killed-flock", "killed-ENOSYS"],
)
def test_the_lock_excludes_although_its_file_comes_and_goes(program, system, tmp_path):
    children = [
        subprocess.Popen([sys.executable, "-c", system + program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    entered = [int(child.communicate()[0]) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], "nobody met another inside"
    assert all(count > 10 for count in entered)


@pytest.mark.parametrize("content", ["", "{", "null", "3", '{"pid": 7}'])
def test_whoever_holds_it_is_said_as_far_as_it_is_known(tmp_path, content):
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(content)
        file.flush()
        assert holder(tmp_path).startswith("process 7 on ?" if "7" in content else "process ? on ?")


def owner(**changed):
    return json.dumps({**locks._here(), "pid": 2**22 + 1, "started": "2026-01-01T00:00:00Z"} | changed)


@pytest.mark.parametrize(
    "record",
    [
        owner(host="elsewhere"),  # nobody can tell from here whether it runs
        owner(namespace=1),  # a container of this host has processes of its own
        owner(pid=1),
        owner(pid="5"),
        owner(pid=-1),
        "",  # being written
        "{",
    ],
)
def test_an_owner_that_may_be_alive_is_never_removed(record, no_flock, tmp_path):
    (tmp_path / OWNER).write_text(record)
    with refused(StorageError, tmp_path / OWNER):
        locked(tmp_path).__enter__()
    assert (tmp_path / OWNER).read_text() == record
    (tmp_path / OWNER).unlink()  # what the sentence says
    with locked(tmp_path):
        pass


def test_an_owner_that_has_ended_here_is_removed_by_one_run_at_a_time(no_flock, tmp_path):
    (tmp_path / OWNER).write_text(owner())
    assert holder(tmp_path) is None
    (tmp_path / f"{OWNER}.break").touch()  # another run is just removing it
    with refused(StorageError, tmp_path):
        locked(tmp_path).__enter__()
    (tmp_path / f"{OWNER}.break").unlink()
    with locked(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_runs_with_and_without_file_locks_exclude_each_other(tmp_path):
    """ENOLCK may last for a moment only, or concern one machine of several."""
    with another_process_in(tmp_path) as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
        with refused(StorageError, tmp_path, f"process {other.pid}"):
            locked(tmp_path).__enter__()
        assert not (tmp_path / OWNER).exists()
    with another_process_in(tmp_path, NO_FLOCK.format(code=errno.ENOLCK)) as other:
        assert holder(tmp_path).startswith(f"process {other.pid}")
        with refused(StorageError, tmp_path, f"process {other.pid}"):
            locked(tmp_path).__enter__()


def test_the_missing_lock_is_said_once(no_flock, tmp_path, capsys):
    for name in ("a", "b"):
        with locked(tmp_path / name):
            pass
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    names(said, os.strerror(errno.ENOSYS), OWNER)


@pytest.mark.parametrize("name", [LOCK, OWNER])
def test_a_link_in_place_of_a_lock_is_not_followed(name, no_flock, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    with refused(StorageError, name, "link"):
        locked(tmp_path / "run").__enter__()
    os.mkfifo(tmp_path / "run" / "pipe")
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "pipe").rename(tmp_path / "run" / name)
    with refused(StorageError, name, "regular"):
        locked(tmp_path / "run").__enter__()
    assert (tmp_path / "mine").read_text() == "precious"


def test_commands_work_without_file_locks(no_flock, tmp_path, capsys):
    rows = [{"prompt": "p", "chosen": f"c{i}", "rejected": "r", "a": float(i), "b": 1.0} for i in range(8)]
    data = write(tmp_path / "pairs.jsonl", rows)
    command = ["score", str(data), "--score_columns", "a", "b", "--output_dir", str(tmp_path / "out")]
    with another_process_in(tmp_path / "out", NO_FLOCK.format(code=errno.ENOSYS)) as other:
        assert main(command) == 2
        assert f"process {other.pid} on" in capsys.readouterr().err.splitlines()[-1]
    assert main(command) == 0
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


# ---- Systems that are not POSIX ----

POSIX_ONLY = (
    "fcntl",
    "resource",
    "pwd",
    "grp",
    "termios",
    "tty",
    "pty",
    "syslog",
    "crypt",
    "nis",
    "spwd",
)
SOURCE = Path(locks.__file__).parents[1]


def test_no_module_needs_posix_when_it_is_imported():
    """Windows has none of these modules."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            if set(names) & set(POSIX_ONLY):
                found[path.name] = names
    assert found == {}


def without_what_windows_lacks(words):
    """The command line; libraries stay as they are, since they choose by ``sys.platform`` and have what they need."""
    for name in [n for n in sys.modules if n.split(".")[0] in {*POSIX_ONLY, "filelock", "madpo"}]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(POSIX_ONLY))
    for place, name in ((os, "fork"), (os, "O_NOFOLLOW"), (os, "O_NONBLOCK"), (signal, "SIGHUP"), (signal, "SIGALRM")):
        delattr(place, name)
    from madpo.commands.cli import main

    raise SystemExit(main(words))


def test_a_command_runs_without_what_windows_lacks(forked, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r", "a": float(i), "b": 1.0} for i in range(8)]
    data = write(tmp_path / "pairs.jsonl", rows)
    arguments = ["score", str(data), "--score_columns", "a", "b", "--output_dir", str(tmp_path / "out")]
    ended = forked(without_what_windows_lacks, arguments).end()
    assert ended.status == 0, ended.err
    assert OWNER in ended.err
    assert len((tmp_path / "out" / "scored.jsonl").read_text().splitlines()) == 8
