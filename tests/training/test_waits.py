"""A training step asks an accelerator for two numbers, its loss and its gradient's norm; counted on a processor."""

import importlib.util
import sys

import pytest
import torch

from engine_cases import PAIRS, pair_batch
from madpo import MADPO
from madpo.core.errors import DataError
from madpo.losses import SoftMADPO
from madpo.models.engine.packing import HostRows, pack
from madpo.training.columns import HOST_ROWS
from refusals import refused
from repository import ROOT
from small_trainers import build, pairs


@pytest.fixture(scope="module")
def count():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("count_operators", ROOT / "benchmarks" / "count.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def counted(count, trainer):
    return count.counted(sys.modules["workers"].ready(trainer), list(trainer.train_dataset)[:4])


@pytest.mark.parametrize("loss", [MADPO(), SoftMADPO()])
def test_a_step_waits_twice_and_launches_no_more_than_trl(count, llama, tmp_path, loss):
    data = {
        "train_dataset": pairs().add_column("reward_margin", [0.5 * i - 3 for i in range(16)]),
        "eval_dataset": None,
    }
    ours = counted(count, build(llama, tmp_path / "ours", loss=loss, lora_dropout=0.0, **data))
    theirs = counted(count, build(llama, tmp_path / "trl", stock=True, lora_dropout=0.0))
    assert sum(ours.waits.values()) == 2, ours.waits
    assert sum(theirs.waits.values()) > 10
    assert sum(ours.operators.values()) < 1.1 * sum(theirs.operators.values())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("predict", [True, False])
def test_rows_of_the_host_give_the_same_packing(side, predict):
    rows = pair_batch(PAIRS, side)
    here, there = pack(**rows, predict=predict), pack(**vars(HostRows(**rows)), predict=predict).to(torch.device("cpu"))
    for name, value in vars(here).items():
        assert torch.equal(value, vars(there)[name]) if isinstance(value, torch.Tensor) else value == vars(there)[name]


def test_a_batch_that_is_changed_after_its_collator_is_refused(llama, tmp_path):
    """Its packing was decided by the tokens before."""
    trainer = build(llama, tmp_path / "out")
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    count = torch.tensor(4)
    same = trainer.compute_loss(trainer.model, {**batch, "input_ids": batch["input_ids"].clone()}, False, count)
    assert same == trainer.compute_loss(trainer.model, batch, False, count)
    batch["input_ids"] = batch["input_ids"].roll(1, 0)
    with refused(DataError, "data_collator", repr(HOST_ROWS)):
        trainer.training_step(trainer.model, batch, count)
    del batch[HOST_ROWS]
    assert torch.isfinite(trainer.training_step(trainer.model, batch, count))
