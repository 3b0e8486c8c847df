"""The memory of a step on paper is that of the same step on real tensors, and plans follow from it."""

import shutil

import pytest
import torch

from madpo.commands.cli import main
from madpo.core.errors import ConfigError
from madpo.models.load import build_tiny, load_model, load_tokenizer
from madpo.operations import memory_plan
from madpo.operations.policy import trainer_arguments, trainer_of
from madpo.operations.train_settings import TrainSettings
from practice_cases import write
from quick import quick
from refusals import refused

ROWS = [{"prompt_ids": [5] * 9, "chosen_ids": [6] * (4 + i), "rejected_ids": [7] * 8} for i in range(3)]


def settings(model, **changes):
    return TrainSettings(
        **{"model": str(model), "loss": {"kind": "madpo"}, "dtype": "float32", "args": {"bf16": False}, **changes}
    )


@pytest.mark.parametrize(("family", "full"), quick([("gemma3", False), ("llama", True)], ("llama", True)))
def test_a_step_on_paper_holds_what_a_real_one_holds(family, full, tmp_path):
    folder = build_tiny(family, tmp_path / family)
    chosen = settings(folder, full=full)
    args = trainer_arguments(chosen, tmp_path / "out", evaluated=False)
    rows = [memory_plan._NUMBERS | row for row in ROWS]
    real = trainer_of(chosen, args, load_model(folder, dtype=torch.float32), load_tokenizer(folder), rows, [])
    real.create_optimizer()
    measured = memory_plan.steps_of(real, ROWS)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(folder / "config.json", bare / "config.json")
    paper = memory_plan.steps_of(memory_plan._on_paper(chosen, args, bare, ROWS[0]), ROWS)
    for pairs in (1, 3, 4):
        found, wanted = paper(pairs), measured(pairs)
        assert found[:4] == wanted[:4]
        assert found.saved == pytest.approx(wanted.saved, rel=0.01)
        assert found.peak == pytest.approx(wanted.peak, rel=0.01)
    trained = sum(p.numel() for p in real.model.parameters() if p.requires_grad)
    assert found.gradients == 4 * trained
    assert found.optimizer == pytest.approx(8 * trained, rel=0.01)


@pytest.mark.parametrize("pairs", [0, 1, 2, 5, 40, 900])
@pytest.mark.parametrize("need", [lambda pairs: 10 + 3 * pairs, lambda pairs: max(70 + pairs, 9 + 4 * pairs)])
def test_the_largest_micro_batch_is_the_last_that_fits(need, pairs):
    for memory in (need(pairs), need(pairs + 1) - 1):
        assert memory_plan._largest(need, memory, 4096) == pairs
        for most in (1, 20):
            assert memory_plan._largest(need, memory, most) == min(pairs, most)


@pytest.mark.slow
def test_the_command_reads_the_longest_pairs_and_writes_nothing(llama, tmp_path, capsys):
    rows = [{"prompt": "The film", "chosen": " was good" * n, "rejected": " was bad"} for n in (1, 9, 4)]
    pairs = write(tmp_path / "pairs.jsonl", rows)
    before = sorted(tmp_path.rglob("*"))
    words = ["train", str(pairs), "--model_name_or_path", str(llama), "--dry_run"]
    assert main([*words, "--memory", "602MB"]) == 0
    said = capsys.readouterr().out
    longest = len(load_tokenizer(llama)(" was good" * 9, add_special_tokens=False)["input_ids"])
    assert f"+ {longest} tokens" in said or f"+ {longest + 1} tokens" in said
    assert "into 602.0 MB" in said
    assert "600.0 MB" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_of_4_bits_are_not_planned(llama):
    with refused(ConfigError, "4 bits", "--qlora", "--dry_run"):
        memory_plan.memory_plan("nowhere", settings(llama, qlora=True), lengths=(2, 3))
