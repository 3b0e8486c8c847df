"""The house rules that a machine can check."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import madpo
from madpo.config import find_experiment, load_config, packaged_experiments
from madpo.pipeline import ordered
from repository import ROOT, TESTS

SOURCE = ROOT / "src" / "madpo"
FILES = sorted(SOURCE.rglob("*.py"))

TORCH_FREE = [
    *("errors", "seeding", "config", "progress", "storage", "records", "pipeline", "executors", "statistics", "cli"),
    *("processes", "memory", "locks", "vocabulary", "uploads", "loading"),
    *("figures", "svg", "report", "corpus", "data", "diagnostics", "packaged", "places"),
    *("recipe", "practice", "practice.early", "practice.settings", "practice.arguments", "practice.folders"),
]

# Imports go from a higher layer to the same or a lower one. A package counts as one module.
LAYERS = [
    {"__main__", "cli"},
    {"commands_data", "commands_train"},
    {"options"},
    {"experiment", "graph", "estimates", "tuning", "practice"},
    {"methods"},
    {"training", "preferences", "relabelling", "evaluation", "diagnostics", "report", "margin_page", "pages", "theory"},
    {"figures", "responses"},
    {"svg"},
    {
        "adapters",
        "models",
        "packaged",
        "places",
        "loading",
        "weights",
        "recipe",
        "generation",
        "head",
        "kv_cache",
        "divergence",
        "logprobs",
        "packing",
        "lean",
        "vocabulary",
        "modes",
        "batches",
        "rewards",
        "data",
        "corpus",
        "losses",
        "statistics",
    },
    {"pipeline", "untrusted"},
    {"work"},
    {"executors", "result_folder", "steps"},
    {"records"},
    {"locks", "begun"},
    {"storage", "uploads"},
    {"config", "progress", "seeding", "processes", "memory", "operation", "metrics"},
    {"errors"},
]
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> str:
    """The top-level module or package under madpo that a file belongs to ("" for madpo itself)."""
    first = path.relative_to(SOURCE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Full names of what a file imports; imports under TYPE_CHECKING count only for the direction."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; write the full name"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def loaded_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_madpo_is_cheap() -> None:
    loaded = loaded_after("import madpo")
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets", "numpy", "pydantic", "rich"}


def test_modules_that_must_not_load_torch() -> None:
    present = [name for name in TORCH_FREE if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").exists()]
    assert len(present) >= 14
    code = "\n".join(
        f"import madpo.{name}\nassert 'torch' not in sys.modules, 'madpo.{name} loads torch'" for name in present
    )
    assert not loaded_after(code) & {"torch", "transformers", "trl", "peft"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    own = module_of(path)
    if own == "":
        return
    assert own in LAYER, f"{own} has no layer yet: say in LAYERS where it stands"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "madpo" or len(parts) < 2 or parts[1] not in LAYER:
            continue
        assert LAYER[parts[1]] >= LAYER[own], f"{own} imports {parts[1]}, which stands above it"


def test_theory_imports_losses_alone() -> None:
    names = {name.split(".")[1] for name in imports(SOURCE / "theory.py") if name.startswith("madpo.")}
    assert names <= {"losses", "errors", "seeding"}


def test_pipeline_and_executors_know_no_machine_learning() -> None:
    for name in ("pipeline", "executors", "records", "storage", "memory", "config", "progress"):
        outside = {n.split(".")[0] for n in imports(SOURCE / f"{name}.py")} - set(sys.stdlib_module_names)
        assert outside <= {"madpo", "pydantic", "rich", *(["ray"] if name == "executors" else [])}, name
    assert not [n for n in imports(SOURCE / "executors.py") if n.startswith(("madpo.pipeline", "madpo.records"))]


def test_only_training_imports_trl() -> None:
    users = {module_of(path) for path in FILES if any(n.split(".")[0] == "trl" for n in imports(path))}
    assert users <= {"training"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert (node.end_lineno or 0) - first.lineno <= 60, f"{node.name} has more than 60 lines"


def test_public_names_are_pinned() -> None:
    # A public name may be added here on purpose; taking one away breaks somebody's code.
    pinned = "DPO MADPO Loss LossInputs LossOutput LossState MadpoError PreferenceLoss log_margin_weight margin_weight"
    assert set(pinned.split()) <= set(madpo.__all__)
    for name in madpo.__all__:
        assert getattr(madpo, name) is not None
    assert set(madpo.__all__) <= set(dir(madpo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = madpo.nothing


def test_public_signatures_are_pinned() -> None:
    from madpo.metrics import Estimate
    from madpo.pipeline import Step, run
    from madpo.report import build_report

    found = {fn.__name__: list(inspect.signature(fn).parameters) for fn in (load_config, run, build_report, Step)}
    assert found == {
        "load_config": ["source", "model", "overrides"],
        "run": ["steps", "root", "executor", "only", "dry_run", "about", "upload"],
        "build_report": ["root", "records", "title", "experiment", "unfinished", "figures"],
        "Step": ["name", "fn", "config", "inputs", "says", "groups", "light"],
    }
    assert Estimate._fields == ("mean", "low", "high", "n")
    weight = list(inspect.signature(madpo.margin_weight).parameters)
    assert weight == ["reward_margin", "tau", "c_max", "c_min", "lam", "part"]


@pytest.mark.parametrize("name", packaged_experiments())
def test_every_packaged_experiment_parses(name: str) -> None:
    from madpo.experiment import Experiment

    steps = ordered(load_config(find_experiment(name), Experiment).steps())
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert {"sft", "responses"} <= set(names)
    # Every input comes before the step that reads it: the graph has no cycle.
    for position, step in enumerate(steps):
        assert {upstream.name for upstream in step.inputs.values()} <= set(names[:position])


def test_there_are_packaged_experiments() -> None:
    assert {"quickstart", "smoke"} <= set(packaged_experiments())


# Written apart, so that this file does not hold what it looks for.
FORBIDDEN = [
    r"\bpickle\." r"loads?\(",
    r"^\s*import " r"pickle\b",
    r"trust_remote_code\s*=\s*" r"True",
    r"torch\." r"load\(",
    r"except" r":\s*$",
    r"\byaml\." r"load\(",
    r"\bjoblib\." r"load\(",
    r"shell\s*=\s*" r"True",
    r"(?<![\w.])ev" r"al\(",
]


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_forbidden_words(pattern: str) -> None:
    # Tests may pickle a loss in memory, as a worker process does; what is shipped reads no pickle.
    places = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py"))]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in places
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert not found


PROMISES = ("Exact resume", "Determinism", "Several processes", "Bad numbers", "Disk and memory", "Hostile input")


@pytest.mark.parametrize("heading", PROMISES)
def test_every_promise_names_tests_that_exist(heading: str) -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0].strip()
    head, _, *rows = section.splitlines()
    assert head == "| promise | kept by | figures |"
    assert len(rows) >= 3
    for row in rows:
        named = re.findall(r"`(\w+\.py)::(\w+)`", row.split(" | ")[1])
        assert named, f"no test keeps the promise {row[:90]!r}"
        for file, name in named:
            (path,) = TESTS.rglob(file)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in tests, f"docs/reliability.md names {file}::{name}, which is not there"
