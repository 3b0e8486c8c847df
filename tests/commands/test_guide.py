"""Every command of docs/guide.md runs, in order, on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from madpo.commands.cli import COMMANDS, command, main
from madpo.commands.from_settings import CommandLine, configuration
from madpo.models.load import build_tiny
from repository import ROOT

GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```$", GUIDE, re.S | re.M)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ madpo")]


def test_the_guide_goes_through_every_command_on_ones_own_data() -> None:
    assert [shlex.split(line)[1] for line in commands()] == [
        *("example", "check", "reward", "score", "score", "inspect", "train", "evaluate", "tune", "train")
    ]
    sections = re.findall(r"^## (\w+)$", GUIDE, re.M)
    assert sections == ["check", "reward", "score", "inspect", "train", "evaluate", "tune", "compare"]


@pytest.mark.slow  # a chain of sixteen trainings
def test_every_command_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MADPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    build_tiny("llama", tmp_path / "model", seed=1)
    for line in commands():
        line = line.replace("gemma-3-270m-imdb", "model")
        assert main(shlex.split(line)[1:]) == 0, line
        assert len(capsys.readouterr().out.splitlines()) >= 2, line
    for result in (
        *("checked/check.json", "rm/report.html", "scored/scored.jsonl", "margins.html", "policy/README.md"),
        *("evaluation/samples.html", "tuned/tune.html", "tuned/chosen.toml", "tuned_policy/README.md"),
    ):
        assert (tmp_path / result).is_file(), result
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy" / "merged")
    assert isinstance(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "policy/adapter"), PeftModel
    )
    assert merged.config.vocab_size == 400


@pytest.mark.parametrize("name", ["check", "reward", "score", "inspect", "train", "tune", "evaluate", "trim-vocab"])
def test_help_has_an_example_that_reads(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out.split("Example:\n")[1].replace("\\\n", " ").splitlines()
    model = configuration(command(COMMANDS[name][1]))
    for line in lines:
        program, its_name, *rest = shlex.split(line)
        assert (program, its_name) == ("madpo", name)
        if "--config" not in rest:
            CommandLine("madpo", model, rest).read()
