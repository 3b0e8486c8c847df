"""The documentation: links and anchors lead somewhere, and the code of the Python page runs."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from madpo.commands.cli import COMMANDS, command
from madpo.commands.from_settings import CommandLine, configuration
from madpo.models.load import build_tiny
from practice_cases import text_pairs, write
from repository import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub and mkdocs make them from ASCII text."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        place, _, anchor = target.partition("#")
        found = (page.parent / place).resolve() if place else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_compile(page: Path) -> None:
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(code, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_read(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of every ``madpo`` line in a block is one of its command, with a value that it takes."""
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_file.py").write_text(next((code for _, code in blocks if "class Hinge" in code), ""))
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "chosen.toml").write_text('model = "M"\n')
    lines = [
        line for language, code in blocks if language != "python" for line in code.replace("\\\n", " ").split("\n")
    ]
    for line in lines:
        found = re.match(r"(?:\$ )?(?:.* -m )?madpo (.+)", line.strip())
        name, *words = shlex.split(found[1], comments=True) if found else [""]
        if name in COMMANDS:
            CommandLine("madpo", configuration(command(COMMANDS[name][1])), words).read()


def test_every_page_of_the_site_is_in_its_menu() -> None:
    menu = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert menu == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda script: script.name)
def test_benchmarks_import_what_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "madpo":
            exec(ast.unparse(node), {})


@pytest.mark.slow  # three trainings
def test_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    build_tiny("llama", tmp_path / "model", seed=1)
    rows = [row | {"reward_margin": float(i % 7) - 2} for i, row in enumerate(text_pairs(32))]
    write(tmp_path / "pairs.jsonl", rows[:24])
    write(tmp_path / "heldout.jsonl", [row | {"prompt": f"Now {row['prompt']}"} for row in rows[24:]])
    write(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows[24:]])
    page = ROOT / "docs" / "python.md"
    names: dict[str, object] = {"__name__": "page"}
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "evaluation" / "evaluation.json").is_file()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='the documentation\'s libraries are in the extra ".[docs]"')
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build(config)
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in ("PreferenceTrainer", "MADPO", "margin_weight", "TrainSettings", "run_experiment", "MadpoError"):
        assert f">{name}<" in api, name
