"""What somebody else's folder or configuration cannot make madpo do: read or write elsewhere, or remove anything."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from madpo.commands.cli import main
from madpo.core.config import Frozen
from madpo.core.custom import source_file
from madpo.core.errors import ConfigError, StorageError
from madpo.core.storage import remove_leftovers, write_atomically
from madpo.data.check import check
from madpo.operations import TrainSettings
from madpo.operations.running import run_in_folder
from madpo.report import export_report
from madpo.runner import run as pipeline
from madpo.runner.operation import operation
from madpo.runner.run import Step
from madpo.runner.uploads import Upload
from practice_cases import write
from refusals import names, refused
from report_cases import make_study

SECRET = "the secret of another folder"
PAIRS = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r", "a": float(i), "b": 1.0} for i in range(8)]


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    made = make_study(root, tiers=("high",), seeds=1, groups=("core",))
    made.unfinished("policy/high/later/seed0", "OSError: gone")
    made.write("A part")
    return root


# ---- Links in a run ----


def linked(root: Path, victim: str) -> Path:
    """Move a file or folder of a run out of it and leave a link; texts become the secret."""
    path = next(iter(sorted(root.rglob(victim))))
    outside = root.parent / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    if outside.suffix == ".txt":
        outside.write_text(SECRET)
    return path


@pytest.mark.parametrize(
    "victim",
    [
        "run.json",
        "samples.jsonl",
        "log.jsonl",
        "margins.parquet",
        "pairs.parquet",
        "record.json",
        "error.txt",
        "policy",
    ],
)
def test_an_export_carries_nothing_from_outside_the_run(victim, study, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(study, root)
    link = linked(root, victim)
    with refused(StorageError, link.name, "link"):
        export_report(root, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "run"]


def test_a_run_with_links_to_its_own_files_is_exported(study, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(study, root)
    path = next(iter(sorted(root.rglob("samples.jsonl"))))
    path.rename(path.with_name("kept.jsonl"))
    path.symlink_to("kept.jsonl")
    (tmp_path / "link").symlink_to(root)
    export_report(tmp_path / "link", tmp_path / "export")
    export_report(study, tmp_path / "same")
    for name in ("records.json", "samples.parquet", "report.html"):
        assert (tmp_path / "export" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


@pytest.mark.parametrize("name", [".export.tmp", ".export.old"])
@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_is_in_the_way_of_an_export_is_never_removed(name, kind, study, tmp_path):
    mine = tmp_path / ("mine" if kind == "link" else name)
    if kind == "file":
        mine.write_text("precious")
    else:
        mine.mkdir()
        (mine / "precious.txt").write_text("precious")
    if kind == "link":
        (tmp_path / name).symlink_to(mine)
    with refused(StorageError, name, "export"):
        export_report(study, tmp_path / "export")
    assert (mine if kind == "file" else mine / "precious.txt").read_text() == "precious"
    assert not (tmp_path / "export").exists()


@operation("one_value/1")
def one_value(config, inputs, out):
    (out / "value.txt").write_text("1")
    return {"value": 1}


def test_a_link_in_place_of_a_steps_folder_is_not_emptied(tmp_path):
    step = Step("part/one", one_value, Frozen())
    for place in (step.folder(tmp_path / "run"), tmp_path / "run" / "part"):
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "precious.txt").write_text("precious")
        place.parent.mkdir(parents=True)
        place.symlink_to(mine)
        with refused(StorageError, place.name, "link"):
            pipeline.run([step], tmp_path / "run")
        assert os.listdir(mine) == ["precious.txt"]
        shutil.rmtree(tmp_path / "run")
        shutil.rmtree(mine)


@operation("fail/1")
def fail(config, inputs, out):
    raise RuntimeError(SECRET)


def test_a_traceback_is_not_written_through_a_link(tmp_path):
    step = Step("part/one", fail, Frozen())
    (tmp_path / "mine").write_text("precious")
    step.folder(tmp_path / "run").mkdir(parents=True)
    (step.folder(tmp_path / "run") / "error.txt").symlink_to(tmp_path / "mine")
    assert SECRET in pipeline.run([step], tmp_path / "run").failed["part/one"]
    assert (tmp_path / "mine").read_text() == "precious"
    assert SECRET in (step.folder(tmp_path / "run") / "error.txt").read_text()


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_an_unfinished_folder_of_somebody_else_is_not_emptied(kind, tmp_path):
    mine = tmp_path / ("mine" if kind == "link" else "out/unfinished")
    mine.mkdir(parents=True)
    (mine / "precious.txt").write_text("precious")
    if kind == "link":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "unfinished").symlink_to(mine)
    for overwrite in (False, True):
        with refused(StorageError, "unfinished"):
            run_in_folder(one_value, Frozen(), {}, tmp_path / "out", memory="", overwrite=overwrite)
    assert (mine / "precious.txt").read_text() == "precious"


def test_an_upload_carries_nothing_from_outside_the_run(tmp_path):
    step = Step("part/one", one_value, Frozen())
    pipeline.run([step], tmp_path / "run")
    folder = step.folder(tmp_path / "run")
    (tmp_path / "secret.txt").write_text(SECRET)
    (folder / "more.txt").symlink_to(tmp_path / "secret.txt")
    with Upload(f"file://{tmp_path}/store") as store:
        pipeline.run([step], tmp_path / "run", upload=store)
    names(store.failed["part/one"], folder / "more.txt", "link")
    assert not list((tmp_path / "store").rglob("more.txt"))
    assert not list((tmp_path / "store").rglob("record.json")), "a step without all its files is not there"


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError) as caught:  # noqa: PT011  (its number says which)
        write_atomically(tmp_path / "file", "x")
    assert caught.value.errno == errno.ELOOP
    assert (tmp_path / "mine").read_text() == "precious"


# ---- Configurations ----


def score(pairs, *more):
    return main(["score", str(pairs), "--score_columns", "a", "b", *map(str, more)])


def test_a_configuration_writes_nothing_outside_its_folder_and_the_working_directory(
    pairs, tmp_path, monkeypatch, capsys
):
    for name in ("theirs", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = tmp_path / "theirs" / "c.toml"
    (tmp_path / "here" / "link").symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("../elsewhere", str(tmp_path / "elsewhere"), "link/elsewhere", "~/elsewhere", "/elsewhere"):
        config.write_text(f'output_dir = "{place}"\n')
        assert score(pairs, "--config", config) == 2
        names(capsys.readouterr().err, config, ("output_dir", f"'{place}'"))
    assert not (tmp_path / "elsewhere").exists()
    for number, place in enumerate((tmp_path / "theirs" / "out", "out", tmp_path / "here" / "deep" / "out")):
        config.write_text(f'output_dir = "{place}"\n')
        assert score(pairs, "--config", config) == 0, number
    config.write_text('output_dir = "../elsewhere"\n')
    assert score(pairs, "--config", config, "--output_dir", tmp_path / "elsewhere") == 0, "the user's word counts"
    capsys.readouterr()


def test_a_configuration_replaces_nothing(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert score(pairs, "--output_dir", "out") == 0
    before = (tmp_path / "out" / "scored.jsonl").read_bytes()
    (tmp_path / "c.toml").write_text('output_dir = "out"\noverwrite = true\nmargin_temperature = 2.0\n')
    capsys.readouterr()
    assert score(pairs, "--config", "c.toml") == 2
    names(capsys.readouterr().err, "c.toml", ("overwrite", "true"), "--overwrite")
    assert (tmp_path / "out" / "scored.jsonl").read_bytes() == before
    assert score(pairs, "--config", "c.toml", "--overwrite") == 0
    assert (tmp_path / "out" / "scored.jsonl").read_bytes() != before


def test_a_token_is_refused_and_told_to_nobody(tmp_path):
    with refused(ValueError, "args.hub_token", "hf auth login") as error:
        TrainSettings(model="m", args={"hub_token": "hf_SECRET"})
    assert "hf_SECRET" not in str(error.value).split("[type=")[0]


def test_a_token_on_the_command_line_is_not_printed(pairs, tmp_path, capsys):
    command = ["train", str(pairs), "--model_name_or_path", "tiny-llama", "--output_dir", str(tmp_path / "o")]
    assert main([*command, "--args.hub_token", "hf_SECRET"]) == 2
    said = capsys.readouterr()
    assert "args.hub_token" in said.err
    assert "hf_SECRET" not in said.err + said.out
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("target", ["..:L", "../x.PY:L", ".:L", "a..b:L", "...x:L", "\0:L", "a b:L", "x/y:L", "os:L.x"])
def test_a_target_that_is_no_module_is_one_sentence(target):
    with refused(ConfigError, ("target", repr(target))):
        source_file(target)


# ---- Places ----


@pytest.mark.parametrize("place", ["/", "/proc/self/foo", "/proc/foo/bar", "pipe", "pipe/x", ".", ".."])
@pytest.mark.parametrize("command", ["score", "inspect", "run"])
def test_a_place_where_nothing_can_be_written_is_one_sentence(command, place, pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    before = sorted(os.listdir(tmp_path))
    words = {
        "score": ["score", str(pairs), "--score_columns", "a", "b", "--output_dir", place],
        "inspect": ["inspect", str(pairs), "--output", place],
        "run": ["run", "smoke", "--only", "responses", "--output_dir", place],
    }[command]
    if command == "inspect":
        write(pairs, [row | {"reward_margin": row["a"] - 3.5} for row in PAIRS])
    if command == "run" and place in (".", "..", "/"):
        return  # a run may be made in any folder
    assert main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("madpo: ")
    assert "vanished" not in line
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_home_folder_is_meant_wherever_a_place_is_given(pairs, tmp_path, monkeypatch, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copy(pairs, tmp_path / "home" / "pairs.jsonl")
    assert score("~/pairs.jsonl", "--output_dir=~/scored") == 0
    assert main(["check", "~/pairs.jsonl", "--output_dir=~/checked"]) == 0
    assert main(["inspect", "~/scored/scored.jsonl", "--output=~/page.html"]) == 0
    (tmp_path / "home" / "c.toml").write_text('output_dir = "~/configured"\n')
    assert score("~/pairs.jsonl", "--config=~/c.toml") == 0
    assert main(["run", "smoke", "--dry-run", "--output_dir=~/run"]) == 0
    assert sorted(os.listdir(tmp_path / "home")) == [
        *("c.toml", "checked", "configured", "page.html", "pairs.jsonl", "scored")
    ]
    assert os.listdir(tmp_path / "work") == []
    capsys.readouterr()
    assert score("~/pairs.jsonl", "--output_dir=~nobody-of-this-name/x") == 0, "then it is a name like any other"
    assert os.listdir(tmp_path / "work") == ["~nobody-of-this-name"]


# ---- What a kill leaves ----


def test_temporary_files_of_killed_runs_go(pairs, tmp_path):
    out = tmp_path / "checked"
    out.mkdir()
    for name in (".dropped.jsonl.4711.tmp", ".check.json.12.tmp"):
        (out / name).write_text("half")
    (out / ".mine.tmp").write_text("precious")
    (out / ".a.b.tmp").write_text("precious")
    check(pairs, output=out)
    assert sorted(os.listdir(out)) == [".a.b.tmp", ".mine.tmp", "check.json", "dropped.jsonl"]
    remove_leftovers(out)


@operation("kill/1")
def interrupted(config, inputs, out):
    if not (out / "again").exists():
        (out / "again").touch()
        (out / ".report.json.4711.tmp").write_text("half")
        raise KeyboardInterrupt
    return {"value": 1}


def test_a_result_has_no_temporary_file_of_a_killed_run(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_in_folder(interrupted, Frozen(), {}, tmp_path / "out", memory="")
    run_in_folder(interrupted, Frozen(), {}, tmp_path / "out", memory="")
    assert sorted(os.listdir(tmp_path / "out")) == ["again", "record.json"]
