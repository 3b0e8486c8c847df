"""The wording of mistakes, pinned here once for each class of errors; elsewhere a test names place, field and value."""

import ast
import errno
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from madpo.core import errors
from madpo.core.errors import (
    ConfigError,
    DataError,
    DivergedError,
    MadpoError,
    MemoryShortage,
    RowError,
    StorageError,
    located,
    memory_errors,
)
from madpo.core.storage import storage_errors
from madpo.data import check, load_preferences
from madpo.data.raw import as_number
from madpo.losses import BetaDPO, LossInputs
from madpo.training.checkpoints import DamagedCheckpoint, verify
from refusals import names


def unknown_policy(folder: Path) -> None:
    check(folder / "pairs.jsonl", truncation="keep")  # type: ignore[arg-type]


def short_row(folder: Path) -> None:
    (folder / "pairs.csv").write_text("prompt,chosen,rejected\na,b\n")
    load_preferences(folder / "pairs.csv")


def quoted_number(folder: Path) -> None:
    with located(f"{folder}/pairs.jsonl, line 7"):
        as_number("0.5", "weight")


def lost_policy(folder: Path) -> None:
    logps, lengths = torch.tensor([-1.0, math.nan]), torch.tensor([1, 1])
    loss = BetaDPO()
    loss(LossInputs(logps, *[torch.tensor([-1.0, -1.0])] * 3, lengths, lengths), loss.init_state(0))


def full_disk(folder: Path) -> None:
    with storage_errors(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "model.safetensors"))


def too_little_memory(folder: Path) -> None:
    with memory_errors("lower batch_size"):
        raise MemoryError("4 GB")


SENTENCES: dict[type[MadpoError], tuple[Callable[[Path], object], str]] = {
    ConfigError: (unknown_policy, "truncation is 'keep', but must be one of 'drop', 'cut', 'refuse'"),
    DataError: (
        short_row,
        "FOLDER/pairs.csv, line 2: has 2 fields where the header has 3; quote fields that hold a comma, a quote or a "
        "line break",
    ),
    RowError: (
        quoted_number,
        "FOLDER/pairs.jsonl, line 7: weight is '0.5' (text), not a number; write it without quotes",
    ),
    DivergedError: (
        lost_policy,
        "the policy's margin in row 1 of the batch is nan: the training has diverged, or a reference log-prob is not a "
        "number; check the reference columns or lower the learning rate",
    ),
    StorageError: (
        full_disk,
        "FOLDER/model.safetensors: the disk is full; free some space and run the same command again, finished steps "
        "are kept",
    ),
    MemoryShortage: (too_little_memory, "the memory is used up (4 GB); lower batch_size"),
    DamagedCheckpoint: (verify, "FOLDER has no manifest.json, so it is no complete checkpoint of madpo"),
}


@pytest.mark.parametrize("kind", SENTENCES, ids=lambda kind: kind.__name__)
def test_a_sentence_of_each_class(kind: type[MadpoError], tmp_path: Path) -> None:
    provoke, sentence = SENTENCES[kind]
    with pytest.raises(kind) as caught:
        provoke(tmp_path)
    assert caught.type is kind
    assert str(caught.value) == sentence.replace("FOLDER", str(tmp_path))


def test_every_class_is_here() -> None:
    kinds = {"MadpoError"}
    classes = [
        node
        for path in Path(errors.__file__).parents[1].rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    for _ in range(3):  # depths of inheritance
        kinds |= {
            node.name for node in classes if any(ast.unparse(base).split(".")[-1] in kinds for base in node.bases)
        }
    assert kinds - {"MadpoError"} == {kind.__name__ for kind in SENTENCES}


@pytest.mark.parametrize("named", [3, "row 1", 0.5, ("weight", "-1"), ("row 13", "prompt")])
def test_what_a_text_does_not_name_is_noticed(named: object) -> None:
    text = "d.jsonl, row 13: weight is 0, column 10.5; prompt must be above -1"
    names(text, "d.jsonl", "row 13", 0, ("weight", "row 13"), "10.5", -1, ("0", "weight", "row 13"))
    with pytest.raises(AssertionError):
        names(text, named)
