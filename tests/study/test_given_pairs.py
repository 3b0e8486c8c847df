"""Experiments on pairs that people have ordered, in the place of pairs that a study makes of a corpus."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from madpo.core.config import find_experiment, load_config
from madpo.core.errors import ConfigError, DataError
from madpo.data.folds import prompt_key
from madpo.models.hyperparameters import EarlyStopping, Optimisation
from madpo.operations import study_training
from madpo.operations.study_training import PairSFTStage, fold_of_pairs, train_sft_on_pairs
from madpo.study.experiment import Experiment, run_experiment
from practice_cases import write
from refusals import refused

POSTS = [
    "I lost my keys at the station",
    "My cat sleeps on the printer",
    "The bakery opens at noon",
    "We missed the bus",
]


def written(path, count=40):
    """Pairs of two summaries a post, every fourth post with two pairs."""
    rows = []
    for i in range(count):
        post = i - 1 if i % 5 == 4 else i
        prompt = f"POST: {POSTS[post % 4]}, number {post}, and nobody helped.\nTL;DR:"
        chosen, rejected = f" {POSTS[post % 4]}, {i}.", f" Somebody wrote {i} things and more."
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return write(path, rows)


def load(*overrides):
    return load_config(find_experiment("summarize"), Experiment, overrides)


TINY = (
    "model=tiny-gemma3",
    "corpus.eval_data=false",
    "corpus.judge=probe",
    "corpus.max_length=160",
    "responses={max_new_tokens=6}",
    "sft={reviews=16, score_prompt=false, optimisation={learning_rate=1e-3, epochs=1, batch_size=8}}",
    "policy={optimisation={learning_rate=1e-3, epochs=1, batch_size=8}}",
    "reward_model={optimisation={learning_rate=1e-3, epochs=1, batch_size=8}, eval_every=2, folds=2}",
    "evaluation={prompts=4, samples_per_prompt=2, temperatures=[0, 0.5]}",
)


def test_people_take_the_place_of_oracle_prompts_and_tiers():
    steps = {step.name: step for step in load().steps()}
    assert not {"oracle", "responses", "base"} & {name.split("/")[0] for name in steps}
    assert {name.split("/")[1] for name in steps if name.startswith("policy/")} == {"own"}
    assert steps["pairs"].inputs["eval_data"].place == "trl-lib/tldr-preference:validation"
    assert set(steps["sft"].inputs) == {"pairs"}
    policy = steps["policy/own/madpo-tau=7-c=4/seed0"]
    assert {role: step.name for role, step in policy.inputs.items()} == {
        "pairs": "pairs",
        "reference": "sft",
        "logps": "reference/own/seed0",
        "margins": "margins/own/seed0",
    }
    evaluation = steps["evaluation/own/dpo/seed0"]
    assert evaluation.inputs["judge"].place == "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr"
    assert (evaluation.config.temperature, evaluation.config.temperatures) == (1.0, (0, 0.25, 0.5, 0.75))
    again = {step.name: step.identity for step in load("evaluation.temperatures=[]").steps()}
    assert {n for n, s in steps.items() if s.identity != again[n]} == {n for n in steps if n.startswith("evaluation/")}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("pairs={prompts=40, train=20}", ["pairs"]),
        ("oracle.kind=ngram", ["oracle"]),
        ("responses.prompt_tokens=20", ["responses.prompt_tokens"]),
        ("method.0.tiers=['low']", ["tiers"]),
        ("corpus.kind=imdb-hub", ["corpus"]),
        ("corpus={kind='imdb-hub'}", ["pairs"]),
        ("vocabulary.size=300", ["vocabulary"]),
        ("evaluation.prompts=2001", [("evaluation.prompts", "2001", "2000 pairs")]),
        ("corpus.judge_share=1", ["judge_share"]),
    ],
)
def test_what_does_not_go_with_given_pairs_is_refused(override, named):
    with refused(ConfigError, "summarize.toml", *named):
        load(override)


def test_a_missing_file_and_a_missing_judge_are_reported_before_anything_runs(tmp_path):
    with refused(DataError, "nowhere.jsonl"):
        load("corpus.data=nowhere.jsonl").steps()
    pairs = written(tmp_path / "pairs.jsonl")
    given = (*TINY, f"corpus.data={pairs}", "corpus.judge=./no-judge")
    with refused(ConfigError, "no-judge"):
        run_experiment("summarize", tmp_path / "run", overrides=given)
    assert not list(tmp_path.glob("run/*/record.json"))


def test_folds_hold_whole_prompts():
    prompts = np.array([7, 7, 3, 9, 3, 1, 5, 5, 5])
    fold = fold_of_pairs(prompts, 2, seed=0)
    assert all(len(set(fold[prompts == prompt])) == 1 for prompt in prompts)
    assert sorted(np.bincount([fold[prompts == prompt][0] for prompt in np.unique(prompts)])) == [2, 3]


def test_fine_tuning_learns_chosen_completions_and_prompts_where_they_count(tmp_path, monkeypatch):
    pairs = {"split": ["train"] * 5 + ["heldout"], "prompt_ids": [[2, k] for k in range(6)], "chosen_ids": [[9, 1]] * 6}
    pd.DataFrame(pairs).to_parquet(tmp_path / "pairs.parquet")
    fitted = []
    monkeypatch.setattr(
        study_training, "fit_sft", lambda config, base, rows, held, out: fitted.append((rows, held)) or {}
    )
    how = {"model": "tiny-gemma3", "optimisation": Optimisation(learning_rate=1, epochs=1, batch_size=1)}
    train_sft_on_pairs(PairSFTStage(reviews=100, **how), {"pairs": tmp_path}, tmp_path)
    few = PairSFTStage(reviews=2, score_prompt=True, early_stopping=EarlyStopping(texts=2), **how)
    train_sft_on_pairs(few, {"pairs": tmp_path}, tmp_path)
    none = few.model_copy(update={"early_stopping": EarlyStopping(texts=5)})
    with refused(ConfigError, ("sft.early_stopping.texts", "5")):
        train_sft_on_pairs(none, {"pairs": tmp_path}, tmp_path)
    masked = [{"input_ids": [2, k, 9, 1], "labels": [-100, -100, 9, 1]} for k in range(5)]
    whole = [{**row, "labels": row["input_ids"]} for row in masked]
    assert fitted == [(masked, []), (whole[2:4], whole[:2])]


@pytest.mark.slow
def test_the_whole_graph_on_forty_pairs(tmp_path):
    pairs = written(tmp_path / "pairs.jsonl")
    rows = ("dpo", "madpo-tau=7-c=4", "madpo-tau=7-c=4-probe", "madpo-tau=7-c=4-out-of-fold")
    given = (*TINY, f"corpus.data={pairs}")
    only = [f"evaluation/own/{row}/seed0" for row in rows] + [f"heldout/own/{row}/seed0" for row in rows]
    result = run_experiment("summarize", tmp_path / "run", overrides=given, only=[*only, "evaluation/sft/seed0"])
    assert not result.failed
    (folder,) = (tmp_path / "run").glob("pairs-*")
    table = pd.read_parquet(folder / "pairs.parquet")
    prompts = table.groupby("prompt")["split"].nunique()
    assert (prompts == 1).all(), "no prompt is in two parts"
    assert {prompt_key(text) for text in table["prompt"]} == {
        prompt_key(json.loads(line)["prompt"]) for line in pairs.read_text().splitlines()
    }
    assert set(table["split"]) == {"train", "heldout", "judge"}
    (evaluated,) = (tmp_path / "run").glob("evaluation/own/dpo/seed0-*")
    samples = pd.read_json(evaluated / "samples.jsonl", lines=True)
    assert samples["temperature"].isna().sum() == 8
    assert samples.groupby("temperature").size().to_dict() == {0.0: 8, 0.5: 8}
    greedy = samples[samples["temperature"] == 0]
    assert greedy.groupby("prompt_id")["response"].nunique().eq(1).all()
    assert (tmp_path / "run" / "report.html").exists()
