"""``auto`` as a row of a study: the average of two policies, whose second target follows from held-out labels."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from madpo.core.config import find_experiment, load_config
from madpo.core.errors import ConfigError
from madpo.losses import DPO
from madpo.models.hyperparameters import Optimisation
from madpo.models.load import build_tiny, load_model, load_tokenizer, merged, save_model
from madpo.operations.study_auto import AutoStage, train_auto_policy
from madpo.operations.study_training import (
    PolicyStage,
    ReferenceStage,
    fit_policy,
    reference_logps,
    training_rows,
)
from madpo.study.experiment import Experiment
from madpo.training.settings import AutoSettings
from refusals import refused

OPTIMISATION = Optimisation(learning_rate=1e-3, epochs=1, batch_size=8)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Forty training pairs with exact margins: a token of the chosen side is worth 2."""
    root = tmp_path_factory.mktemp("auto")
    build_tiny("llama", root / "sft" / "model", seed=1)
    draw = np.random.default_rng(0)
    rows = [
        {
            "pair_id": i,
            "split": "train",
            "prompt_ids": [1, *draw.integers(10, 300, 4)],
            "chosen_ids": [*draw.integers(10, 300, 5), 44],
            "rejected_ids": [*draw.integers(10, 300, 6)],
        }
        for i in range(40)
    ]
    for name in ("pairs", "logps", "margins"):
        (root / name).mkdir()
    pd.DataFrame(rows).to_parquet(root / "pairs" / "pairs.parquet")
    margins = pd.DataFrame({"pair_id": range(40), "reward_margin": 2.0 + draw.normal(size=40)})
    margins.to_parquet(root / "margins" / "margins.parquet")
    made = {"pairs": root / "pairs", "reference": root / "sft", "margins": root / "margins"}
    reference_logps(ReferenceStage(), made, root / "logps")
    return {**made, "logps": root / "logps"}


def _weights(reference, adapter, out):
    model = load_model(reference, dtype=torch.float32, adapter=adapter)
    save_model(merged(model), out, load_tokenizer(reference))
    return load_model(out, dtype=torch.float32).state_dict()


def test_the_result_is_the_mean_of_the_two_policies_and_the_share_is_used(inputs, tmp_path) -> None:
    out = tmp_path / "auto"
    out.mkdir()
    stage = AutoStage(method="Auto", settings=AutoSettings(beta=0.2), optimisation=OPTIMISATION, seed=3)
    metrics = train_auto_policy(stage, inputs, out)
    assert [metrics[name] for name in ("pairs", "decided_on_pairs", "steps")] == [40, 20, 10]
    assert 0 <= metrics["label_share_low"] < metrics["label_share"] < metrics["label_share_high"] <= 1
    place = inputs["reference"] / "model"
    parts = {name: _weights(place, out / name / "adapter", tmp_path / name) for name in ("dpo", "mixed")}
    average = _weights(place, out / "adapter", tmp_path / "average")
    for name, value in average.items():
        torch.testing.assert_close(value, (parts["dpo"][name] + parts["mixed"][name]) / 2, atol=2e-6, rtol=1e-5)
    moved = max(float((parts["dpo"][n] - parts["mixed"][n]).abs().max()) for n in average)
    assert moved > 1e-4, "the two trainings differ"
    # The second training is the one that the decision names.
    decision = json.loads((out / "decision.json").read_text())
    assert decision["label_share"] == metrics["label_share"]

    # A run that was cut off after the first training goes on to the same bytes.
    again = tmp_path / "again"
    (again / "dpo").mkdir(parents=True)
    (out / "dpo" / "adapter").rename(again / "dpo" / "adapter")
    (out / "decision.json").rename(again / "decision.json")
    assert train_auto_policy(stage, inputs, again) == metrics
    file = "adapter/adapter_model.safetensors"
    assert (again / file).read_bytes() == (out / file).read_bytes()


def test_with_a_share_of_one_it_is_two_dpo_policies_averaged(inputs, tmp_path) -> None:
    settings = AutoSettings(beta=0.2, label_share=1)
    stage = AutoStage(method="DPO, two averaged", settings=settings, optimisation=OPTIMISATION, seed=3)
    read = {role: path for role, path in inputs.items() if role != "margins"}
    metrics = train_auto_policy(stage, read, tmp_path)
    assert metrics["pairs"] == 40, "no pair decides anything"
    own = PolicyStage(method="DPO", loss=DPO(beta=0.2), optimisation=OPTIMISATION, seed=3)
    (tmp_path / "plain").mkdir()
    fit_policy(own, training_rows(read), inputs["reference"] / "model", tmp_path / "plain")
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "dpo" / file).read_bytes()
    assert (tmp_path / "plain" / file).read_bytes() != (tmp_path / "mixed" / file).read_bytes(), "another seed"


def test_rows_of_auto_are_checked_before_anything_runs() -> None:
    laptop = find_experiment("laptop")
    row = "method.0={ name = 'Auto 2', trainer = 'auto', auto = { beta = 0.1 } }"
    with refused(ConfigError, "auto"):
        load_config(laptop, Experiment, [row])
    rows = load_config(laptop, Experiment, ()).rows()
    auto = next(row for row in rows if row.name == "Auto β=0.3")
    assert auto.averaging == AutoSettings(beta=0.3)
    assert auto.reads == {"reward_margin"}
    assert next(row for row in rows if row.name == "DPO, two averaged").reads == frozenset()
