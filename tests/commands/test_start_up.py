"""What the start of a command costs, and what a person sees meanwhile."""

import gc
import json
import os
import subprocess
import sys

import pytest

from madpo.core import libraries, progress
from practice_cases import classifier, text_pairs, write


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_once_that_libraries_are_loaded(terminal, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_on_terminal", lambda: terminal)
    progress.say_once.cache_clear()
    for _ in range(2):
        with libraries.loading_libraries():
            assert not gc.isenabled()
    assert gc.isenabled()
    assert capsys.readouterr().err == "loading PyTorch and transformers ...\n" * terminal


def test_collections_are_on_again_after_an_import_that_fails():
    with pytest.raises(ImportError), libraries.loading_libraries():
        import madpo.nothing  # noqa: F401
    assert gc.isenabled()


# Loaded one after the other in one interpreter: a later module may load what an earlier one does not.
ABSENT = {
    "madpo.training.settings": {"torch"},
    "madpo.operations.train_settings": {"trl", "sklearn", "transformers", "peft"},
    "madpo.study.experiment": {"trl", "sklearn", "transformers", "peft"},  # a mistake in an experiment's file
    "madpo.study.graph": {"trl", "sklearn"},  # a dry run
    "madpo.operations.scoring": {"trl", "sklearn"},
    "madpo.operations.evaluation": {"trl", "sklearn"},
}
COMMANDS = ("score", "inspect", "compare", "run", "evaluate")
CODE = """
import contextlib, gc, importlib, io, json, sys
for name in sys.argv[1].split():
    importlib.import_module(name)
    print(*sys.modules)
from madpo.commands.cli import main
for words in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0
    print(*sys.modules)
print(gc.isenabled(), gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 100_000)
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory, llama):
    """What a new interpreter says that loads these modules, and then runs the commands."""
    folder = tmp_path_factory.mktemp("commands")
    data = write(folder / "pairs.jsonl", [row | {"a": 2.0, "b": 1.0} for row in text_pairs(24)])
    scored, judge = folder / "score" / "scored.jsonl", classifier(llama, folder / "judge")
    commands = {
        "score": [data, "--score_columns", "a", "b", "--output_dir", scored.parent],
        "inspect": [scored, "--output", folder / "page.html"],
        "compare": [data, "--model", llama, "--dry_run", "--output_dir", folder / "compare"],
        "run": ["smoke", "--dry_run", "--output_dir", folder / "run"],
        "evaluate": [
            *(llama, "--reference", llama, "--prompts", data, "--reward", judge),
            *("--max_new_tokens", 2, "--output_dir", folder / "evaluate"),
        ],
    }
    words = json.dumps([[name, *map(str, commands[name])] for name in COMMANDS])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CODE, " ".join(ABSENT), words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("module", ABSENT)
def test_what_a_module_does_not_need_is_not_loaded(lines, module):
    assert not ABSENT[module] & set(lines[[*ABSENT].index(module)].split())


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_train_nothing_load_no_trainer(lines, command):
    assert not {"trl", "sklearn", "optuna", "ray"} & set(lines[len(ABSENT) + COMMANDS.index(command)].split())


@pytest.mark.slow
def test_what_a_command_has_loaded_is_left_out_of_collections(lines):
    assert lines[-1] == "True True True"
