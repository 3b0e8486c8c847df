"""What the paper and its notebooks fix of the protocol, and fields that change nothing where nothing is said."""

from __future__ import annotations

import json

import pytest

import soak
from madpo.core.config import find_experiment, load_config
from madpo.data.corpus import PackagedIMDB
from madpo.models.hyperparameters import Optimisation
from madpo.operations.study_training import SFTStage, _scored
from madpo.study.experiment import Experiment


def steps(name, *overrides):
    return {step.name: step for step in load_config(find_experiment(name), Experiment, overrides).steps()}


def test_the_papers_values_reach_the_steps():
    found = steps("paper")
    sft = found["sft"].config
    assert (sft.reviews, sft.prompt_tokens, sft.max_tokens) == (12_000, 20, 196)
    assert sft.early_stopping.model_dump() == {"texts": 250, "eval_every": 20, "patience": 3}
    sampled = [found[name].config for name in ("responses", "evaluation/low/dpo/seed0", "policy/low/rloo/seed0")]
    assert {(config.temperature, config.top_k, config.top_p) for config in sampled} == {(1.0, 64, 0.95)}
    assert found["oracle"].config.sft == 12_250  # the oracle is measured on reviews that nothing else has seen


def test_the_fields_are_in_identities_only_where_they_differ():
    plain = {name: step.identity for name, step in steps("laptop").items()}
    same = ("sft.score_prompt=true", "responses.top_p=1.0")
    assert plain == {name: step.identity for name, step in steps("laptop", *same).items()}
    masked = {name: step.identity for name, step in steps("laptop", "sft.score_prompt=false").items()}
    assert {name for name in plain if plain[name] == masked[name]} == {"oracle", "base"}
    cut = {name: step.identity for name, step in steps("laptop", "responses.top_k=64").items()}
    assert {name for name in plain if plain[name] == cut[name]} == {"oracle", "base", "sft"}


class Words:
    """A tokenizer of words: 2, then a number per word."""

    eos_token_id = 1

    def __call__(self, text):
        return {"input_ids": [2, *range(10, 10 + len(text.split()))]}


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (2, [-100, -100, -100, 1]),  # the end counts where the text ends within the limit
        (4, [-100, -100, -100, 12, 13, 1]),
        (9, [-100, -100, -100, 12, 13, 14]),
        (1, None),
    ],
)
def test_a_prompt_is_read_and_not_scored(words, labels):
    config = SFTStage(
        model="m",
        corpus=PackagedIMDB(),
        reviews=1,
        max_tokens=6,
        prompt_tokens=3,
        optimisation=Optimisation(learning_rate=1, epochs=1, batch_size=1),
    )
    row = _scored("w " * words, Words(), config)
    assert (row and row["labels"]) == labels
    if row:
        assert row["input_ids"] == [2, *range(10, 10 + words), 1][:6]


def test_early_stopping_keeps_the_weights_of_the_lowest_loss(tmp_path):
    soak.prepare(tmp_path / "made")
    out = tmp_path / "out"
    soak.train("sft_stopped", tmp_path / "made", out, {"learning_rate": 2.0, "epochs": 6})
    losses = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "eval_loss" in row:
            losses[row["step"]] = row["eval_loss"]
    metrics = json.loads((out / "metrics.json").read_text())
    best = min(losses, key=losses.get)
    assert (metrics["steps"], metrics["stopping_loss"]) == (best, losses[best])
    assert list(losses)[-3:] == [best + 2, best + 4, best + 6], "three measurements without improvement end it"
    assert best + 6 < 6 * 36 / 8
