"""What the practitioner's functions share: folders that are whole or absent, TOML, splits that no prompt crosses."""

import tomllib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from madpo import DPO, PreferenceTrainer
from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.data.folds import folds_by_prompt, prompt_key
from madpo.operations import TrainSettings, train
from madpo.operations.inputs import split_by_prompt
from madpo.operations.running import digest, toml
from madpo.training.checkpoints import verify
from practice_cases import text_pairs, write
from refusals import names, refused


def test_a_checkpoint_outlives_another_split_and_is_never_dropped(llama, own_cache, tmp_path, monkeypatch, capsys):
    """Of a step into micro-batches: continued. Other settings are refused by name; to start over is asked for."""
    data = write(tmp_path / "pairs.jsonl", text_pairs(40))  # their reference is computed, in batches of the split
    args = {"learning_rate": 1e-2, "max_steps": 6, "save_steps": 2, "bf16": False, "adam_epsilon": 1e-5}

    def asked(pairs, micro_batches, **changes):
        split = {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": micro_batches}
        return TrainSettings(model=str(llama), loss=DPO(), args={**args, **split, **changes}, dtype="float32")

    whole = train(data, tmp_path / "whole", asked(8, 1))
    steps, real = [], PreferenceTrainer.training_step

    def step(self, *words, **more):
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(self, *words, **more)

    monkeypatch.setattr(PreferenceTrainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "P", asked(8, 1))
    kept = tmp_path / "P" / "unfinished" / "checkpoints" / "checkpoint-2"
    for changed, values in (
        (asked(8, 1, learning_rate=0.02), ("args.learning_rate", "0.02", "0.01")),
        (asked(8, 2), ("batch", "16", "8")),
        (asked(4, 1), ("batch", "4", "8")),
    ):
        with refused(StorageError, "P", kept.parent, values):
            train(data, tmp_path / "P", changed)
        assert verify(kept).step == 2
    report = train(data, tmp_path / "P", asked(2, 4, save_steps=3))
    assert steps == [0, 1, 2, 3, *(n for n in (2, 3, 4, 5) for _ in range(4))]
    names(capsys.readouterr().err, ("per_device_train_batch_size", "8", "2"))
    assert report.loss == pytest.approx(whole.loss, rel=1e-5)
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("P", "whole"))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=3e-5, err_msg=name)
    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "Q", asked(8, 1))
    steps.extend([0] * 9)
    assert train(data, tmp_path / "Q", asked(8, 1, max_steps=1), overwrite=True).steps == 1


def test_digests(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = digest(tmp_path / "a")
    assert digest(tmp_path / "a" / "x") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    (tmp_path / "a" / "x").write_text("2")
    assert digest(tmp_path / "a") != first
    assert digest("owner/name") is None


_PLAIN = st.one_of(st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.text(), st.just(-0.5))
_VALUES = st.recursive(
    st.one_of(_PLAIN, st.lists(_PLAIN, max_size=3)), lambda inner: st.dictionaries(st.text(), inner, max_size=3)
)


@given(st.dictionaries(st.text(), _VALUES, max_size=4))
def test_toml_is_read_back(data):
    assert tomllib.loads(toml(data)) == data


def test_toml_leaves_out_none_and_refuses_what_it_cannot_hold():
    assert tomllib.loads(toml({"a": None, "b": {"c": None, "d": 1}})) == {"b": {"d": 1}}
    with pytest.raises(TypeError):
        toml({"a": object()})


ROWS = st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(lambda ids: len(set(ids)) > 1)


@given(ROWS, st.floats(0.05, 0.9), st.integers(0, 5))
def test_no_prompt_crosses_the_split(ids, share, seed):
    rows = [{"prompt": f"p{i}", "row": n} for n, i in enumerate(ids)]
    train, heldout = split_by_prompt(rows, share, seed, "data")
    assert sorted(r["row"] for r in train + heldout) == list(range(len(rows)))
    assert train
    assert heldout
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in heldout}
    assert split_by_prompt(rows, share, seed, "data") == (train, heldout)
    # It stops with the prompt that reaches the share, unless that would leave nothing to train on.
    largest = max(ids.count(i) for i in ids)
    assert len(heldout) < share * len(rows) + largest
    # And it is not far above the share, unless no prompt is small enough.
    most = max(1, min(2 * share, (1 + share) / 2) * len(rows))
    assert len(heldout) <= most or len(heldout) == min(ids.count(i) for i in ids)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_a_prompt_of_most_pairs_is_trained_on(share, seed):
    rows = [{"prompt": f"p{max(0, n - 999)}"} for n in range(1020)]
    train, heldout = split_by_prompt(rows, share, seed, "data")
    assert len(train) == 1000
    assert len(heldout) == 20


def test_the_split_is_seeded_and_needs_two_prompts():
    rows = [{"prompt": [{"role": "user", "content": str(i)}]} for i in range(50)]
    assert split_by_prompt(rows, 0.2, 0, "d")[1] != split_by_prompt(rows, 0.2, 1, "d")[1]
    assert len(split_by_prompt(rows, 0.2, 0, "d")[1]) == 10
    with refused(DataError, "d", "prompt"):
        split_by_prompt([{"prompt": "a"}] * 4, 0.5, 0, "d")


def test_folds():
    keys = [f"p{i % 7}" for i in range(40)]
    folds = folds_by_prompt(keys, 3, 0, "d")
    assert set(folds) == {0, 1, 2}
    assert len({(key, fold) for key, fold in zip(keys, folds, strict=True)}) == 7
    with refused(ConfigError, ("folds", "8"), ("d", "7")):
        folds_by_prompt(keys, 8, 0, "d")


def test_prompts_are_the_same_by_what_they_say():
    one, other = [{"role": "user", "content": "a"}], [{"content": "a", "role": "user"}]
    assert prompt_key(one) == prompt_key(other) != prompt_key("a")
