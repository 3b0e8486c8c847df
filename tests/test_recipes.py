"""The recipes of CONTRIBUTING.md, followed word by word in a copy of the package."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from madpo import losses
from practice_cases import write
from refusals import names
from repository import CASES, ROOT, TESTS

# The class at the top of losses/__init__.py.
LOSS = textwrap.dedent(str(losses.__doc__).split("::\n", 1)[1].rsplit("\n\nIt reads", 1)[0])
COUNT = '''"""Counts pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from madpo.core.config import Frozen
from madpo.core.metrics import Metrics
from madpo.data import load_preferences
from madpo.runner.operation import operation


class CountSettings(Frozen):
    """What is counted."""

    longer_than: int = 0
    """Characters of the chosen side."""


@operation("count_pairs/1")
def count_pairs(settings: CountSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The number of pairs."""
    rows = load_preferences(inputs["data"])
    return {"pairs": sum(len(row["chosen"]) > settings.longer_than for row in rows)}
'''
COMMAND = '''"""``madpo count``."""

from __future__ import annotations

from madpo.commands.from_settings import Configurable
from madpo.commands.shared import Data, Result
from madpo.core.config import part
from madpo.core.progress import show
from madpo.operations.counting import CountSettings, count_pairs
from madpo.operations.running import run_in_folder


class Count(Configurable, CountSettings, Result, Data):
    pass


def count(options: Count) -> int:
    """Count."""
    inputs = {"data": options.data}
    out = run_in_folder(count_pairs, part(options, CountSettings), inputs, options.output_dir, memory="")
    show(f"written to {out}")
    return 0
'''


CORPUS = '''class Toys(CorpusConfig):
    """Reviews of toys."""

    kind: Literal["toys"] = "toys"

    def read(self) -> pd.DataFrame:
        """Ten reviews of each label."""
        texts = [f"toy {i} is {'fine' if i % 2 else 'bad'}" for i in range(20)]
        return pd.DataFrame({"text": texts, "label": [i % 2 for i in range(20)], "source": IMDB})


'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package to change."""
    shutil.copytree(ROOT / "src" / "madpo", tmp_path / "src" / "madpo", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "src" / "madpo"


def replace(file: Path, before: str, after: str) -> None:
    text = file.read_text("utf-8")
    assert text.count(before) == 1
    file.write_text(text.replace(before, after), "utf-8")


def run(package: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), str(CASES)])}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_loss_is_a_file_and_a_member_of_the_union(package: Path) -> None:
    (package / "losses" / "cubic.py").write_text(LOSS)
    replace(package / "losses" / "__init__.py", "    DPO\n    | IPO", "    DPO\n    | Cubic\n    | IPO")
    replace(
        package / "losses" / "__init__.py",
        "from madpo.losses.margin import",
        "from madpo.losses.cubic import Cubic\nfrom madpo.losses.margin import",
    )
    said = run(package, "-m", "madpo", "train", "--loss", "cubic", "--help").split("Example:")[0]
    assert "--loss.beta" in said
    assert "--loss.tau" not in said
    code = (
        "from madpo.report.methods import method_of; from madpo.losses import LossAdapter;"
        "print(method_of('a', 'A', {'kind': 'cubic'}, 'all', 'in_sample', 'offline'),"
        "LossAdapter.validate_python({'kind': 'cubic', 'beta': 2}).beta)"
    )
    assert run(package, "-c", code) == "CUBIC 2.0\n"
    options = ("-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(TESTS))
    tests = run(package, "-m", "pytest", *options, str(TESTS / "losses" / "test_losses.py"), "-k", "cubic")
    assert int(tests.split(" passed")[0].split()[-1]) >= 4, "the identities take their losses from the union"


def test_an_operation_and_a_command_are_a_function_each(package: Path) -> None:
    (package / "operations" / "counting.py").write_text(COUNT)
    (package / "commands" / "count.py").write_text(COMMAND)
    replace(
        package / "commands" / "cli.py",
        "COMMANDS = {\n",
        'COMMANDS = {\n    "count": ("count pairs", "count:count"),\n',
    )
    rows = [{"prompt": "p", "chosen": "long", "rejected": "r"}, {"prompt": "q", "chosen": "c", "rejected": "r"}]
    write(package.parent / "d.jsonl", rows)
    code = (
        "from madpo.commands.cli import main\n"
        "assert main(['--help']) == main(['count', '--help']) == 0\n"
        "words = ['count', 'd.jsonl', '--longer_than', '2', '--output_dir', 'o']\n"
        "assert main(words) == main(words) == 0\n"
        "assert main([*words, '--longer_than', 'x']) == 2\n"
    )
    said = " ".join(run(package, "-c", code).split())
    names(said, "count count", ("--longer_than N", "0"), ("longer_than", "'x'"))
    assert json.loads((package.parent / "o" / "record.json").read_text())["metrics"] == {"pairs": 1}


def test_a_corpus_is_a_class_that_reads_it_and_a_member_of_the_union(package: Path) -> None:
    corpus = package / "data" / "corpus.py"
    replace(corpus, "Corpus = Annotated[PackagedIMDB |", CORPUS + "Corpus = Annotated[Toys | PackagedIMDB |")
    code = (
        "from madpo.data.corpus import load_corpus, oracle_reviews, prompt_reviews, sft_reviews\n"
        "from madpo.study.experiment import Experiment\n"
        "from madpo.core.config import find_experiment, load_config\n"
        "experiment = load_config(find_experiment('smoke'), Experiment, ['corpus.kind=toys'])\n"
        "reviews = load_corpus(experiment.corpus)\n"
        "parts = sft_reviews(reviews, 3), prompt_reviews(reviews, 4), oracle_reviews(reviews, sft=3, prompts=4)\n"
        "print(type(experiment.corpus).__name__, *map(len, parts))"
    )
    assert run(package, "-c", code) == "Toys 3 4 13\n"
