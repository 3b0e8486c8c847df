"""Equal runs give equal bytes, and a step depends on neither how it is split nor how its batches are padded."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

import launch_cases
from losses_cases import EVERY_LOSS
from madpo.operations import TrainSettings, train
from madpo.training.columns import DataCollatorForPreference
from practice_cases import read, text_pairs, write
from quick import quick

LOSSES = ("dpo", "madpo", "wpo", "beta_dpo", "alpha_dpo")
ACCUMULATED = ("madpo", "ipo", "simpo", "beta_dpo", "beta_dpo-notebook", "alpha_dpo")
"""Losses that ``make test`` accumulates: sums, a sum without a reference, and statistics of three kinds."""


class LeftPadded(DataCollatorForPreference):
    """The padding in front of the prompts instead of behind the completions."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        empty = (batch["attention_mask"] == 0).sum(-1).tolist()
        for name in ("input_ids", "attention_mask", "completion_mask"):
            for row, shift in zip(batch[name], empty, strict=True):
                row.copy_(row.roll(shift))
        return batch


def collator(kind=DataCollatorForPreference, **settings):
    return kind(pad_token_id=0, max_length=launch_cases.LIMIT, **settings)


def course(folder, out, name, *, micro=launch_cases.BATCH, **settings):
    trainer = launch_cases.trainer_of(
        folder, out, EVERY_LOSS[name], micro=micro, accumulation=launch_cases.BATCH // micro, **settings
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    weights = {key: weight.numpy().copy() for key, weight in launch_cases.weights(trainer).items()}
    return rows, weights


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """A loss's course in whole batches of 8, padded behind to the longest row; computed once."""
    return functools.cache(lambda name: course(llama, tmp_path_factory.mktemp("whole"), name, collator=collator()))


SETTINGS = {
    "4 x 2": {"micro": 4},
    "1 x 8": {"micro": 1},
    "left": {"collator": collator(LeftPadded)},
    "longer": {"collator": collator(pad_to_multiple_of=32)},
    "2 x 4, left, longer": {"micro": 2, "collator": collator(LeftPadded, pad_to_multiple_of=16)},
}
TOGETHER = "2 x 4, left, longer"
APART = [(name, how) for name in LOSSES for how in SETTINGS]
ALL = [(name, TOGETHER) for name in ACCUMULATED]
CASES = quick(dict.fromkeys(APART + ALL), *ALL)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_step_depends_on_neither_its_split_nor_its_padding(whole, llama, tmp_path, name, how):
    rows, weights = whole(name)
    found, after = course(llama, tmp_path, name, **SETTINGS[how])
    assert len(found) == len(rows) == 6
    for key in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
        a, b = ([row[key] for row in run] for run in (rows, found))
        np.testing.assert_allclose(b, a, rtol=5e-5, atol=5e-6, err_msg=key)
        # A factor that is missing, or a token that counts twice, shifts every step the same way.
        assert abs(np.mean(np.subtract(b, a) / np.maximum(np.abs(a), 1))) < 2e-6, key
    for key, weight in weights.items():
        np.testing.assert_allclose(after[key], weight, rtol=0, atol=3e-5, err_msg=key)


def test_two_trainings_by_one_command_are_the_same_bytes(llama, tmp_path, monkeypatch):
    """Dropout, filter and shuffle included; once with the reference columns computed, once from the cache."""
    monkeypatch.setenv("MADPO_CACHE", str(tmp_path / "cache"))
    data = write(tmp_path / "pairs.jsonl", text_pairs(20))
    args = {"learning_rate": 1e-2, "num_train_epochs": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    settings = TrainSettings(
        model=str(llama), loss=EVERY_LOSS["beta_dpo"], args=args, lora={"rank": 4, "dropout": 0.2}, eval_share=0.2
    )
    reports = [train(data, tmp_path / name, settings) for name in ("one", "two")]
    assert reports[0].model_dump(exclude={"output_dir"}) == reports[1].model_dump(exclude={"output_dir"})
    files = [
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("one", "two")
    ]
    assert files[0].keys() == files[1].keys()
    records = [json.loads(found.pop(Path("record.json"))) | {"provenance": None} for found in files]
    different = [str(name) for name in files[0] if files[0][name].replace(b"/one", b"/two") != files[1][name]]
    assert not different
    assert records[0] == records[1]
    assert len(read(tmp_path / "one" / "log.jsonl")) > 8
