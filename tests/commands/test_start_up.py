"""What the start of a command costs, and what a person sees meanwhile."""

import gc
import os
import subprocess
import sys

import pytest

from madpo.core import libraries, progress
from practice_cases import text_pairs, write


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_once_that_libraries_are_loaded(terminal, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_on_terminal", lambda: terminal)
    libraries._tell.cache_clear()
    for _ in range(2):
        with libraries.loading_libraries():
            assert not gc.isenabled()
    assert gc.isenabled()
    assert capsys.readouterr().err == "loading PyTorch and transformers ...\n" * terminal


def test_collections_are_on_again_after_an_import_that_fails():
    with pytest.raises(ImportError), libraries.loading_libraries():
        import madpo.nothing  # noqa: F401
    assert gc.isenabled()


def test_what_a_command_has_loaded_is_left_out_of_collections(tmp_path):
    data = write(tmp_path / "pairs.jsonl", [row | {"a": 2.0, "b": 1.0} for row in text_pairs(4)])
    words = ["score", str(data), "--score_columns", "a", "b", "--output_dir", str(tmp_path / "S")]
    code = (
        "import gc, sys; from madpo.commands.cli import main; assert main(sys.argv[1:]) == 0;"
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 100_000)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "True True True", done.stderr


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("madpo.operations.scoring", {"trl", "sklearn"}),
        ("madpo.operations.evaluation", {"trl", "sklearn"}),
        ("madpo.study.graph", {"trl", "sklearn"}),  # a dry run
        ("madpo.study.experiment", {"trl", "sklearn", "transformers", "peft"}),  # a mistake in an experiment's file
        ("madpo.operations.train_settings", {"trl", "sklearn", "transformers", "peft"}),
        ("madpo.training.settings", {"torch"}),
    ],
)
def test_what_a_module_does_not_need_is_not_loaded(module, absent):
    code = f"import sys, {module}; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert not absent & set(done.stdout.split())
