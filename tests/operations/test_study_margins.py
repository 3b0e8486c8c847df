"""A study's margins from a probe: out of fold where it was trained, and a reward model like any other."""

import numpy as np
import pandas as pd
import pytest

from madpo.core.config import find_experiment, load_config
from madpo.core.errors import ConfigError
from madpo.models.load import build_tiny
from madpo.operations.study_margins import NoSettings, ProbeStage, fit_pairs_probe, probe_margins
from madpo.rewards.reward_model import RewardModel
from madpo.study.experiment import Experiment
from madpo.training.margins import sequences
from refusals import refused


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Thirty pairs whose chosen side has a token that the rejected one lacks; twenty of them are for training."""
    root = tmp_path_factory.mktemp("probe")
    build_tiny("llama", root / "sft" / "model", seed=1)
    (root / "pairs").mkdir()
    draw = np.random.default_rng(0)
    rows = [
        {
            "pair_id": 100 + i,
            "split": "train" if i % 3 else "heldout",
            "prompt_ids": [1, *draw.integers(10, 300, 4)],
            "chosen_ids": [*draw.integers(10, 300, 5), 44, 44],
            "rejected_ids": [*draw.integers(10, 300, 7)],
        }
        for i in range(30)
    ]
    pd.DataFrame(rows).to_parquet(root / "pairs" / "pairs.parquet")
    (root / "reward_model").mkdir()
    inputs = {"pairs": root / "pairs", "reference": root / "sft"}
    metrics = fit_pairs_probe(ProbeStage(folds=4), inputs, root / "reward_model")
    return root, rows, metrics


def test_heldout_margins_are_those_of_the_reward_model_that_is_left(made) -> None:
    root, rows, metrics = made
    heldout = [row for row in rows if row["split"] == "heldout"]
    model = RewardModel.load(root / "reward_model")
    sides = sequences(heldout)
    chosen, rejected = model.score_pairs(sides["chosen_ids"], sides["rejected_ids"], sides["prompt_length"])
    kept = pd.read_parquet(root / "reward_model" / "margins.parquet").set_index("pair_id")["reward_margin"]
    np.testing.assert_allclose(kept.loc[sides["pair_id"]], chosen - rejected, atol=1e-4)
    assert metrics["heldout_pairs"] == len(heldout)
    assert metrics["heldout_accuracy"].mean > 0.8, "one token decides"


def test_a_training_pair_has_the_margin_of_a_probe_that_has_not_seen_it(made, tmp_path) -> None:
    root, rows, _ = made
    inputs = {"pairs": root / "pairs", "reward_model": root / "reward_model"}
    metrics = probe_margins(NoSettings(), inputs, tmp_path)
    table = pd.read_parquet(tmp_path / "margins.parquet").set_index("pair_id")["reward_margin"]
    assert sorted(table.index) == [row["pair_id"] for row in rows]
    assert metrics["pairs"] == len(rows)
    sides = sequences([row for row in rows if row["split"] == "train"])
    model = RewardModel.load(root / "reward_model")
    chosen, rejected = model.score_pairs(sides["chosen_ids"], sides["rejected_ids"], sides["prompt_length"])
    assert np.mean(chosen - rejected) > table.loc[sides["pair_id"]].mean(), "in sample a probe is surer"


def test_a_probe_takes_no_training_settings_and_a_trained_model_needs_them() -> None:
    quickstart = find_experiment("quickstart")
    assert load_config(quickstart, Experiment, ()).reward_model.kind == "probe"
    with refused(ConfigError, "optimisation", "add"):
        load_config(quickstart, Experiment, ["reward_model.kind=trained"])
    with refused(ConfigError, "optimisation", "remove"):
        load_config(find_experiment("smoke"), Experiment, ["reward_model.kind=probe"])
    scores = ["method.1.loss={ kind = 'omni_dpo', beta = 0.1 }", "method.1.name=Omni"]
    with refused(ConfigError, "'Omni'", "reward_model.kind"):
        load_config(quickstart, Experiment, scores)
