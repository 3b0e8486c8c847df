"""Data without ``reward_margin``: a probe gives it, from the pass that computes the reference columns."""

import os

import numpy as np
import pytest
import torch

from madpo import DPO, MADPO
from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.core.feature_file import FeatureFile, FeatureWriter
from madpo.models.engine.features import feature_layers, feature_width
from madpo.models.engine.logprobs import completion_features, unwrapped
from madpo.rewards.probe import fit_probe
from madpo.training import reference, reference_columns
from refusals import names, refused
from small_trainers import build, pairs

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def passes(monkeypatch):
    """One entry for each pass of a reference, with the layers that it read."""
    calls = []
    real = reference._compute

    def compute(*args):
        calls.append(args[2])
        return real(*args)

    monkeypatch.setattr(reference, "_compute", compute)
    return calls


def test_margins_are_those_of_a_probe_by_hand(llama, tmp_path, passes, monkeypatch):
    said = []
    monkeypatch.setattr(reference_columns, "say_once", said.append)
    trainer = build(llama, tmp_path, loss=MADPO(), per_device_train_batch_size=3)
    model, rows = unwrapped(trainer.model).eval(), pairs()
    layers = feature_layers(model)
    sides = []
    for side in ("chosen_ids", "rejected_ids"):  # one row at a time, without packing
        found = []
        for prompt, completion in zip(rows["prompt_ids"], rows[side], strict=True):
            ids = torch.tensor([[*prompt, *completion]])
            inside = torch.arange(ids.shape[1])[None] >= len(prompt)
            with torch.no_grad(), trainer.model.disable_adapter():
                found.append(completion_features(model, ids, torch.ones_like(ids), inside, layers)[0].numpy())
        sides.append(np.stack(found))
    expected = fit_probe(*sides, [str(ids) for ids in rows["prompt_ids"]])
    np.testing.assert_allclose(trainer.train_dataset["reward_margin"], expected.margins, rtol=1e-3, atol=1e-5)
    assert len(passes) == 2, "one pass for each data set gives the columns and the features"
    assert len(said) == 1
    assert "accuracy" in said[0]
    # Pairs that are held out get the frozen probe's.
    frozen = trainer.probe.weights
    heldout = np.array(trainer.eval_dataset["reward_margin"])
    assert heldout.shape == (8,)
    assert np.abs(heldout).max() > 0 or np.abs(frozen.weights).max() < 1e-6
    plain = build(llama, tmp_path / "plain", per_device_train_batch_size=3)
    assert len(passes) == 2, "columns with features serve those who need no features"
    assert plain.train_dataset["ref_chosen_logps"] == trainer.train_dataset["ref_chosen_logps"]
    assert "reward_margin" not in plain.train_dataset.column_names


def test_a_cached_pass_serves_again_and_a_damaged_one_does_not(llama, tmp_path, passes, monkeypatch):
    said = []
    monkeypatch.setattr(reference, "say", said.append)
    before = build(llama, tmp_path / "dpo", eval_dataset=None)
    assert passes == [()]
    first_one = build(llama, tmp_path / "a", loss=MADPO(), eval_dataset=None)
    assert passes == [(), (1, 2)], "features need a pass that the columns did not"
    assert first_one.train_dataset["ref_chosen_logps"] == before.train_dataset["ref_chosen_logps"]
    again = build(llama, tmp_path / "b", loss=MADPO(), eval_dataset=None, learning_rate=1e-3, seed=3)
    assert len(passes) == 2
    assert again.train_dataset["reward_margin"] == first_one.train_dataset["reward_margin"]
    (path,) = (tmp_path / "cache" / "columns").glob("features-*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    repaired = build(llama, tmp_path / "c", loss=MADPO(), eval_dataset=None)
    assert len(passes) == 3
    names(said[0], path, "SHA-256")
    assert repaired.train_dataset["reward_margin"] == first_one.train_dataset["reward_margin"]
    assert path.read_bytes() == content


def test_the_cache_is_bounded_and_what_was_used_last_stays(llama, tmp_path, passes, monkeypatch):
    said = []
    monkeypatch.setattr(reference, "say", said.append)
    folder, data = tmp_path / "cache" / "columns", [pairs(8, seed=seed) for seed in range(3)]

    def trained(number):
        return build(llama, tmp_path / str(number), loss=MADPO(), train_dataset=data[number], eval_dataset=None)

    for number in (0, 1):
        trained(number)
        for path in folder.iterdir():  # as if an hour had passed
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    assert (len(passes), said) == (2, [])
    first = set(folder.iterdir())
    trained(0)
    size = sum(path.stat().st_size for path in first)
    monkeypatch.setenv("MADPO_CACHE_GB", str(size / 1e9))
    trained(2)
    assert len(passes) == 3
    assert sum(path.stat().st_size for path in folder.iterdir()) <= size
    names(said[0], folder, f"{size / 1e9:g} GB", "MADPO_CACHE_GB", "2 files")
    trained(0)
    assert len(passes) == 3, "the second one had gone"
    trained(1)
    assert len(passes) == 4
    monkeypatch.setenv("MADPO_CACHE_GB", "much")
    with refused(ConfigError, "'much'"):
        build(llama, tmp_path / "x", loss=MADPO(), train_dataset=pairs(8, seed=9), eval_dataset=None)


def test_only_what_is_missing_is_computed(llama, tmp_path, passes):
    margins = list(np.linspace(-1, 1, 16))
    given = build(
        llama, tmp_path, loss=MADPO(), train_dataset=pairs().add_column("reward_margin", margins), eval_dataset=None
    )
    assert given.train_dataset["reward_margin"] == margins
    assert passes == [()]
    known = pairs().add_column("ref_chosen_logps", [-9.0] * 16).add_column("ref_rejected_logps", [-8.0] * 16)
    trainer = build(llama, tmp_path, loss=MADPO(), train_dataset=known, eval_dataset=None)
    assert trainer.train_dataset["ref_chosen_logps"] == [-9.0] * 16
    assert passes == [(), (1, 2)]
    assert np.ptp(trainer.train_dataset["reward_margin"]) >= 0
    trainer.evaluate(pairs(4, seed=5))
    with refused(DataError, "eval_dataset", "'reward_margin'"):
        build(llama, tmp_path, loss=MADPO(), train_dataset=pairs().add_column("reward_margin", margins))
    same = pairs().remove_columns("prompt_ids").add_column("prompt_ids", [[5, 6]] * 16)
    with refused(DataError, "reward_margin"):
        build(llama, tmp_path, loss=MADPO(), train_dataset=same, eval_dataset=None)
    assert build(llama, tmp_path, loss=DPO(), eval_dataset=None).probe is None


def test_feature_files_are_whole_or_absent(tmp_path):
    rows = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    path = tmp_path / "f.safetensors"
    with pytest.raises(RuntimeError), FeatureWriter(path, 4, 3):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with FeatureWriter(path, 4, 3) as writer:
        writer.write(0, rows[0, :2], rows[1, :2])
        writer.write(2, rows[0, 2:], rows[1, 2:])
    found = FeatureFile.read(path, 4, 3)
    np.testing.assert_array_equal([found.chosen, found.rejected], rows)
    from safetensors.numpy import load_file

    np.testing.assert_array_equal(load_file(path)["rejected"], rows[1])
    with refused(StorageError, path):
        FeatureFile.read(path, 3, 4)
    path.write_bytes(b"{}")
    with refused(StorageError, path):
        FeatureFile.read(path, 4, 3)


def test_width_is_that_of_the_features(llama, tmp_path):
    trainer = build(llama, tmp_path, loss=MADPO(), eval_dataset=None)
    model = unwrapped(trainer.model)
    assert trainer.probe.report.features == feature_width(model, feature_layers(model))
