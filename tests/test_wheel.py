"""The wheel, built from this tree and installed in an environment of its own: whole, offline, and free of pickle."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from offline_chain import COMMANDS
from repository import CASES, ROOT


def command(*words, **environment):
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        cwd=environment.get("PWD"),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment that holds only the wheel; the libraries are those of the tests, through ``PYTHONPATH``."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("src", "pyproject.toml", "README.md", "LICENSE"):
        place = ROOT / name
        ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
        shutil.copytree(place, root / name, ignore=ignored) if place.is_dir() else shutil.copy(place, root)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    command(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", root / "dist", root)
    command(sys.executable, "-m", "venv", "--without-pip", root / "venv")
    (wheel,) = (root / "dist").glob("madpo-*.whl")
    python = root / "venv" / "bin" / "python"
    command(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python


def run(installed, folder, *words):
    # A folder in PYTHONPATH runs no .pth file, so an editable madpo among the libraries stays away.
    libraries = os.pathsep.join([str(CASES), sysconfig.get_path("purelib")])
    return command(
        installed,
        *words,
        PYTHONPATH=libraries,
        PYTHONDONTWRITEBYTECODE="1",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        PWD=str(folder),
    )


@pytest.mark.slow  # a build, and a chain of six commands and two stages in a process of its own: half a minute
@pytest.mark.timeout(1500)
def test_the_wheels_chain_opens_no_socket_and_unpickles_nothing(installed, tmp_path):
    help_text = run(installed, tmp_path, installed.parent / "madpo", "--help")
    assert all(name in help_text for name in COMMANDS[:6])
    assert "verify-theory" in help_text
    run(installed, tmp_path, CASES / "offline_chain.py", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert Path(found["madpo"]).is_relative_to(installed.parents[1])
    source = ROOT / "src"
    modules = {p.relative_to(source).with_suffix("").as_posix().replace("/", ".") for p in source.rglob("*.py")}
    modules.remove("madpo.__main__")  # the program itself, which runs above
    assert {name.removesuffix(".__init__") for name in modules} == {"madpo", *found["modules"]}
    assert found["ran"] == COMMANDS
    assert found["control"]["network"] >= 1
    assert found["control"]["pickle"] >= 1
    assert found["seen"] == {"network": [], "pickle": []}
    about = {p.name for p in (installed.parents[1] / "lib").rglob("madpo-*.dist-info/licenses/*")}
    assert about == {"LICENSE"}
