"""What reaches a terminal, and what signals do: nothing that a terminal obeys, one sentence, the right status."""

import ast
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import madpo.__main__
from madpo.commands.cli import main
from madpo.core import errors, processes, progress
from madpo.core.errors import DataError, MadpoError, printable
from madpo.core.progress import show

SOURCE = Path(errors.__file__).parents[1]
EVIL = "\x1b]0;TITLE\x07\x1b[2J\x9b31m\u202eevil\r\udcff"


@given(st.text() | st.text(alphabet="\x1b\x9b\u202e\ud800\r\n\t\\x1b "))
def test_what_is_printable_stays_and_all_else_is_escaped(text):
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert shown == text or not text.isprintable()
    shown.encode("utf-8")


def test_every_sentence_is_printable():
    for kind in (MadpoError, *MadpoError.__subclasses__()):
        error = kind(f"{EVIL}\n{EVIL}")
        assert str(error).isprintable()
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert "\\x1b]0;TITLE\\x07" in str(DataError(EVIL))


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_lines_and_tabs_stay_and_the_rest_is_escaped(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    show(f"a\tb\nc {EVIL} β", stream)
    text = raw.getvalue().decode(encoding)
    assert text.count("\n") == 2
    assert text.startswith("a\tb\nc \\x1b]0;TITLE")
    assert ("β" if encoding == "utf-8" else "\\u03b2") in text
    assert all(line.replace("\t", "").isprintable() for line in text.splitlines())


def test_a_live_bar_shows_no_control_character(monkeypatch):
    drawn = io.StringIO()
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    with progress.bar(EVIL, 2) as advance:
        advance(1, note=EVIL)
        progress.say(EVIL)
    assert "\\x1b]0;TITLE" in drawn.getvalue()
    assert "\x1b]0" not in drawn.getvalue()
    assert "\x07" not in drawn.getvalue()


def test_only_progress_prints():
    """Text that does not go through ``show`` or ``say`` could hold what a terminal obeys."""
    for path in SOURCE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        printed = [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
        written = [
            call
            for call in calls
            if isinstance(call, ast.Attribute) and ast.unparse(call) in ("sys.stdout.write", "sys.stderr.write")
        ]
        assert path.name == "progress.py" or not printed + written, path


def test_status_shows_what_a_stranger_wrote_as_escapes(tmp_path, capsys):
    folder = tmp_path / "bad-00000000"
    folder.mkdir()
    (folder / "error.txt").write_bytes(b"Traceback\nValueError: \x1b]0;PWNED\x07\x1b[2J\xff")
    listing = {"bad": {"folder": folder.name, "identity": "0" * 64}}
    (tmp_path / "run.json").write_text(json.dumps({"about": {}, "steps": listing}))
    (tmp_path / ".lock.owner").write_text(json.dumps({"pid": 1, "host": "\x1b[2J", "started": "\x07"}))
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "failed: ValueError: \\x1b]0;PWNED\\x07\\x1b[2J" in out
    assert "process 1 on \\x1b[2J, since \\x07" in out
    assert out.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        *(("\x1b[2J.jsonl", "utf-8"), ("a\nb.jsonl", "latin-1")),
        *((os.fsdecode(b"\xff\xfe.jsonl"), "utf-8"), ("\u202e.jsonl", "utf-8"), ("\u202e.jsonl", "latin-1")),
    ],
)
def test_any_file_name_on_any_terminal(name, encoding, tmp_path):
    (tmp_path / name).write_text('{"prompt": "π", "chosen": "c\\u001b[2J", "rejected": "r", "\\u001b[2Jx": 1}\n' * 2)
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "madpo", "check", name, "--output_dir", "checked"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert "2 pairs" in text
    assert text.replace("\n", "").isprintable()
    assert json.loads((tmp_path / "checked" / "check.json").read_bytes())["pairs"] == 2


# ---- Signals ----

WORKING = """
import os, sys, time
from pathlib import Path
from madpo import __main__
from madpo.commands import cli
from madpo.core.config import Frozen
from madpo.core.progress import show
from madpo.operations.running import run_in_folder
from madpo.runner.operation import operation

class Nothing(Frozen):
    pass

@operation("work/1")
def work(config, inputs, out):
    if not (out / "half").exists():
        (out / "half").write_text("half")
        show("working")
        time.sleep(600)
    return {}

def command(options: Nothing):
    run_in_folder(work, Nothing(), {}, os.environ["PLACE"], memory="")
    return 0

cli.COMMANDS["work"] = ("work", "work:command")
sys.modules["madpo.commands.work"] = sys.modules["__main__"]
sys.argv = ["madpo", "work"]
raise SystemExit(__main__.main())
"""


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_a_command_in_one_sentence_and_it_continues(number, status, word, tmp_path):
    environment = {**os.environ, "PLACE": str(tmp_path / "out"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "import signal; signal.signal(2, signal.default_int_handler)\n" + WORKING]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    process = subprocess.Popen(command, **pipes)
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == status
    (line,) = said.strip().splitlines()
    assert line.startswith(f"madpo: {word}")
    assert os.listdir(tmp_path / "out") == ["unfinished"], "nobody holds it any more"
    assert sorted(os.listdir(tmp_path / "out" / "unfinished")) == ["begun.json", "half"]
    again = subprocess.run(command, env=environment, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["half", "record.json"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_no_exit_status(closed, tmp_path):
    """And what is written to it goes into no file that is opened later."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for data, status in ((pairs, 0), (tmp_path / "none.jsonl", 2)):
        command = f"{sys.executable} -m madpo check {data} --output_dir {tmp_path / 'out'} {closed}"
        assert subprocess.run(command, shell=True, env=environment, capture_output=True).returncode == status
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "out"}
    assert json.loads((tmp_path / "out" / "check.json").read_text())["pairs"] == 1


@pytest.mark.parametrize("data", ["pairs", "none"])
@pytest.mark.parametrize("full", [1, 2])
def test_a_stream_on_a_full_disk_is_no_traceback(full, data, tmp_path):
    """Standard output is what was asked for; what standard error lacks changes nothing."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    command = [sys.executable, "-m", "madpo", "check", f"{data}.jsonl", "--output_dir", "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open("/dev/full", "w") as nowhere:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {("stdout", "stderr")[full - 1]: nowhere}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, text=True, **streams)
    assert ended.returncode == (0 if (full, data) == (2, "pairs") else 2)
    said = (ended.stdout, ended.stderr)[2 - full]
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1 or full == 2
    assert (tmp_path / "out" / "check.json").exists() == (data == "pairs")


@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_terminal_that_was_closed_ends_no_work(on_terminal, monkeypatch):
    """As after "disown": from then on each write is an error of the disk."""

    class Closed(io.StringIO):
        def isatty(self):
            return on_terminal

        def write(self, *_):
            raise OSError(5, "Input/output error")

        flush = write

    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.track(range(3), description="work")) == [0, 1, 2]
    with progress.bar("work", 2) as advance:
        progress.say("a line")
        advance(1)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (processes.Terminated, 143)])
def test_an_interrupt_while_the_command_line_loads_is_no_traceback(error, status, monkeypatch):
    class Interrupted:
        def find_spec(self, name, *_):
            if name == "madpo.commands.cli":
                raise error

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.delitem(sys.modules, "madpo.commands.cli")
    monkeypatch.delattr("madpo.commands.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    try:
        assert madpo.__main__.main() == status
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
