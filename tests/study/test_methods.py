"""Rows and their sweeps, and the pairs and margins that rows may ask for."""

import math
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from scipy.special import expit

from losses_cases import UNION
from madpo.core.config import find_experiment, load_config
from madpo.core.errors import ConfigError
from madpo.core.progress import duration
from madpo.losses import Combined, Custom
from madpo.models.engine.responses import Response
from madpo.operations import study_margins as folds
from madpo.operations.study_evaluation import best_responses
from madpo.operations.study_margins import AgreeingStage, RedrawnStage, keep_agreeing, redraw_labels
from madpo.operations.study_pairs import PAIRS
from madpo.operations.study_training import fold_of_pairs
from madpo.runner.run import Planned, Record, run
from madpo.study import estimates
from madpo.study.experiment import Experiment
from madpo.study.methods import Method
from refusals import refused

MADPO = {"kind": "madpo", "c_max": 4}


# Rows


def test_a_sweep_is_one_row_for_every_combination():
    method = Method(name="MADPO", group="sensitivity", loss=MADPO, sweep={"tau": (2, 7), "c_max": (2, 3.5)})
    rows = method.rows()
    assert [row.name for row in rows] == ["MADPO τ=2 c=2", "MADPO τ=2 c=3.5", "MADPO τ=7 c=2", "MADPO τ=7 c=3.5"]
    assert [row.key for row in rows][1] == "madpo-tau=2-c=3.5"
    assert [(row.loss.tau, row.loss.c_max) for row in rows] == [(2, 2), (2, 3.5), (7, 2), (7, 3.5)]
    assert {row.group for row in rows} == {"sensitivity"}
    assert all(row.rows() == (row,) for row in rows)


def test_a_swept_row_is_the_row_written_out():
    """Equal losses make equal identities: a preset and defaults are resolved the same way."""
    (swept,) = Method(
        name="β-DPO", loss={"kind": "beta_dpo", "preset": "madpo_notebook"}, sweep={"keep": (0.4,)}
    ).rows()
    written = Method(name="β-DPO p=0.4", loss={"kind": "beta_dpo", "preset": "madpo_notebook", "keep": 0.4})
    assert swept == written
    (four,) = Method(name="Best of", trainer="best_of_n", sweep={"n": (4,)}).rows()
    assert four == Method(name="Best of n=4", trainer="best_of_n", n=4)
    optimisation = {"learning_rate": 1e-4, "epochs": 1, "batch_size": 8, "micro_batch_size": 2, "checkpoint_every": 7}
    (online,) = Method(
        name="RLOO", trainer="rloo", online={"optimisation": optimisation}, sweep={"beta": (0.5,)}
    ).rows()
    assert online.settings.beta == 0.5
    assert (online.settings.optimisation.micro_batch_size, online.settings.optimisation.checkpoint_every) == (2, 7)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, ["'M'", "loss"]),
        ({"trainer": "rloo", "loss": {"kind": "dpo"}}, ["'M'", ("rloo", "loss")]),
        ({"trainer": "best_of_n"}, ["'M'", ("best_of_n", "n")]),
        ({"loss": MADPO, "n": 4}, ["'M'", ("n", "best_of_n")]),
        ({"loss": MADPO, "online": {}}, ["'M'", "online"]),
        ({"trainer": "rloo", "pairs": "agreeing"}, ["'M'", ("rloo", "pairs")]),
        ({"loss": MADPO, "sweep": {"taau": (1,)}}, ["'M'", "sweep.taau", "'tau'"]),
        ({"loss": MADPO, "sweep": {"tau": ()}}, ["'M'", "sweep.tau"]),
        ({"loss": MADPO, "sweep": {"c_max": (0.5,)}}, [("c_max", "0.5")]),
        ({"loss": MADPO, "sweep": {"beta": ("a",)}}, [("sweep.beta", "'a'")]),
        ({"loss": MADPO, "group": "sensitvity"}, [("'ablation'", "'sensitivity'")]),
    ],
)
def test_a_row_that_makes_no_sense_is_refused_with_its_name(fields, named):
    with refused((ValidationError, ConfigError), *named):
        Method(name="M", **fields)


def test_every_loss_of_the_union_can_be_a_row(tmp_path):
    kinds = {kind: cls for kind, cls in UNION.items() if cls is not Custom}
    more = {"combined": ', parts = [{ kind = "madpo", c_max = 4 }, { kind = "dpo" }]'}
    rows = "\n".join(
        f'[[method]]\nname = "{kind}"\nloss = {{ kind = "{kind}"{more.get(kind, "")} }}\n' for kind in kinds
    )
    toml = tmp_path / "all.toml"
    text = find_experiment("smoke").read_text()
    toml.write_text(text[: text.index("[[method]]")] + rows)
    steps = {step.name: step for step in load_config(toml, Experiment).steps()}
    for kind, cls in kinds.items():
        inputs = steps[f"policy/low/{kind.replace('_', '-')}/seed0"].inputs
        needs = {"reward_margin"} if cls is Combined else cls.needs
        assert ("scores" in inputs) == ("chosen_score" in needs)
        assert ("margins" in inputs) == ("reward_margin" in needs)
    fixed = [cls.needs for cls in kinds.values() if cls is not Combined]
    assert {"chosen_score", "reward_margin"} <= set().union(*fixed)


# Pairs


@pytest.fixture
def folders(tmp_path):
    """Five training pairs and a held-out one, with margins, log-probabilities and scores."""
    ids = np.array([30, 10, 20, 50, 40, 60])
    rows = [
        {
            "pair_id": int(i),
            "split": "train" if i != 60 else "heldout",
            "prompt": f"p{i}",
            "chosen": f"c{i}",
            "rejected": f"r{i}",
            "prompt_ids": [1, int(i)],
            "chosen_ids": [2, int(i)],
            "rejected_ids": [3, int(i)],
            "chosen_oracle_reward": 1.0,
            "rejected_oracle_reward": -1.0,
            "chosen_source": "sft",
            "rejected_source": "review",
        }
        for i in ids
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), tmp_path / "pairs.parquet")
    margins = {10: -3.0, 20: 0.0, 30: 2.0, 40: 0.5, 50: -0.1, 60: -9.0}
    pd.DataFrame({"pair_id": [*margins], "reward_margin": [*margins.values()]}).to_parquet(tmp_path / "margins.parquet")
    train = [i for i in sorted(ids) if i != 60]
    logps = {"ref_chosen_logps": [-float(i) for i in train], "ref_rejected_logps": [-2.0 * i for i in train]}
    pd.DataFrame({"pair_id": train, **logps}).to_parquet(tmp_path / "reference.parquet")
    return dict.fromkeys(("pairs", "margins", "logps"), tmp_path)


def read(folder, name):
    return pd.read_parquet(folder / f"{name}.parquet").set_index("pair_id")


def test_agreeing_pairs_have_a_margin_above_the_threshold(folders, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    metrics = keep_agreeing(AgreeingStage(), folders, out)
    assert list(read(out, "pairs").index) == [30, 40, 60], "the order stays, and the held-out pair"
    assert metrics["pairs"] == 2
    assert metrics["agreeing_share"].mean == pytest.approx(2 / 5)
    with refused(ConfigError, "2.0"):
        keep_agreeing(AgreeingStage(above=2.0), folders, out)


def test_redrawn_labels_turn_everything_that_belongs_to_a_side(folders, tmp_path):
    before = {name: read(folders["pairs"], name) for name in ("pairs", "margins", "reference")}
    seen = set()
    for seed in range(20):
        out = tmp_path / f"out{seed}"
        out.mkdir()
        metrics = redraw_labels(RedrawnStage(seed=seed), folders, out)
        pairs, margins, reference = (read(out, name) for name in ("pairs", "margins", "reference"))
        turned = [i for i in pairs.index if pairs.loc[i, "chosen"].startswith("r")]
        assert metrics["turned_share"].mean == pytest.approx(len(turned) / 5)
        assert list(pairs.index) == list(before["pairs"].index)
        for i in pairs.index:
            first, second = ("rejected", "chosen") if i in turned else ("chosen", "rejected")
            for column in ("", "_ids", "_oracle_reward", "_source"):
                assert np.array_equal(pairs.loc[i, f"chosen{column}"], before["pairs"].loc[i, f"{first}{column}"])
                assert np.array_equal(pairs.loc[i, f"rejected{column}"], before["pairs"].loc[i, f"{second}{column}"])
            sign = -1 if i in turned else 1
            assert margins.loc[i, "reward_margin"] == sign * before["margins"].loc[i, "reward_margin"]
            if i != 60:
                assert reference.loc[i, "ref_chosen_logps"] == before["reference"].loc[i, f"ref_{first}_logps"]
        assert 60 not in turned
        seen.add(tuple(turned))
    assert len(seen) > 5


def test_labels_are_redrawn_with_the_reward_models_probability(folders, tmp_path):
    """The share of turned labels is that of sigma(-margin / t), over many pairs."""
    ids = np.arange(4000)
    template = pq.read_table(folders["pairs"] / "pairs.parquet").to_pylist()[0]
    pq.write_table(
        pa.Table.from_pylist([{**template, "pair_id": int(i)} for i in ids], schema=PAIRS), tmp_path / "pairs.parquet"
    )
    pd.DataFrame({"pair_id": ids, "reward_margin": 2.0}).to_parquet(tmp_path / "margins.parquet")
    out = tmp_path / "many"
    out.mkdir()
    inputs = {"pairs": tmp_path, "margins": tmp_path}
    share = redraw_labels(RedrawnStage(margin_temperature=2.0, seed=3), inputs, out)["turned_share"]
    assert share.mean == pytest.approx(expit(-1.0), abs=4 * 0.0071)  # four standard errors
    assert not (out / "reference.parquet").exists()


# Folds and scores


def test_folds_are_equal_parts_that_depend_only_on_the_set_of_pairs():
    ids = np.array([5, 900, 12, 7, 33, 41, 2])
    found = dict(zip(ids, fold_of_pairs(ids, 3, seed=1), strict=True))
    assert sorted(np.bincount(list(found.values()))) == [2, 2, 3]
    again = dict(zip(ids[::-1], fold_of_pairs(ids[::-1], 3, seed=1), strict=True))
    assert found == again
    assert found != dict(zip(ids, fold_of_pairs(ids, 3, seed=2), strict=True))


class Judge:
    """Rewards a response by its last two tokens, plus what this model is off by."""

    def __init__(self, off=0.0):
        self.off = off

    def score(self, sequences):
        return np.array([ids[-2] * 10 + ids[-1] / 100 + self.off * (ids[-2] == 2) for ids in sequences])

    def score_pairs(self, chosen, rejected, prompt_lengths):
        return self.score(chosen), self.score(rejected)

    def score_responses(self, prompt_ids, response_ids):
        return self.score([[*prompt, *response] for prompt, response in zip(prompt_ids, response_ids, strict=True)])


def test_a_training_pairs_margin_is_that_of_the_model_that_has_not_seen_it(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(folds.RewardModel, "load", lambda folder: Judge(float(folder.name)))
    inputs = {"pairs": folders["pairs"], "fold0": tmp_path / "100", "fold1": tmp_path / "200"}
    out = tmp_path / "out"
    out.mkdir()
    metrics = folds.score_out_of_fold(folds.OutOfFoldStage(folds=2, seed=4), inputs, out)
    margins = read(out, "margins")["reward_margin"]
    train = np.array([30, 10, 20, 50, 40])
    of = dict(zip(train, fold_of_pairs(train, 2, seed=4), strict=True))
    # Chosen sequences end in (2, i), rejected ones in (3, i): without the offset every margin is -10.
    assert {i: margins[i] for i in train} == pytest.approx({i: -10 + 100 * (of[i] + 1) for i in train})
    assert margins[60] == pytest.approx(-10 + 150), "a held-out pair has the mean"
    assert metrics["negative_share"] == 0
    folds.score_sides(folds.NoSettings(), {"pairs": folders["pairs"], "reward_model": tmp_path / "0"}, out)
    scores = read(out, "scores")
    assert scores.loc[30, "chosen_score"] == pytest.approx(20.3)
    assert scores.loc[30, "rejected_score"] == pytest.approx(30.3)


def test_the_best_of_n_is_the_judges_choice_and_the_first_of_equals():
    drawn = [[Response([4, k], f"{k}", False) for k in row] for row in ([1, 9], [7, 9], [3, 2])]
    best = best_responses(Judge(), [[0], [0]], drawn)
    assert [response.text for response in best] == ["7", "9"]
    assert best[1] is drawn[0][1]


# Estimates


def test_estimates_follow_from_tokens_and_rates():
    steps = {s.name: s for s in load_config(find_experiment("laptop"), Experiment, ["vocabulary=false"]).steps()}
    rates = estimates.machine_of(["train=100", "generate=1000"]).rates
    policy = steps["policy/low/dpo/seed0"]
    assert estimates.work(policy).tokens == {"train": 400 * 2 * 68}
    assert estimates.estimate(policy, rates).seconds == pytest.approx(400 * 2 * 68 / 100 + 8)
    assert estimates.work(steps["responses"]).tokens == {"generate": 2 * 600 * 48}
    best = steps["evaluation/low/best-of-n=16/seed0"]
    assert estimates.work(best).tokens == {"generate": 16 * 160 * 48, "score": 160 * 68, "judge": 16 * 160 * 68}
    fold = steps["reward_model/low/seed0/fold1"]
    config, seen = fold.config, 400 * 2 / 3 * 2
    looks = math.ceil(seen / config.optimisation.batch_size / config.eval_every)
    stopping = 200 * config.stopping_share
    assert 0 < stopping < 200
    judged = looks * stopping + 200 - stopping
    assert estimates.work(fold).tokens == pytest.approx({"reward": 2 * seen * 68, "judge": 2 * judged * 68})
    assert estimates.work(steps["margins/low/seed0"]).tokens == pytest.approx({"judge": 2 * (400 + stopping) * 68})
    assert 1.5e9 < estimates.estimate(policy, rates).memory < 5e9
    for option, named in [("trian=1", "'train'"), ("train=fast", "train=fast"), ("train=0", "train=0")]:
        with refused(ConfigError, named):
            estimates.machine_of([option])


def test_a_slower_machine_takes_longer_by_its_products_share(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: float(next(clock)))  # every product takes a second
    machine = estimates.this_machine()
    slower = 0.52 * 400 / (torch.get_num_threads() * 2 * 512**3 / 1e9) + 0.48
    assert machine.rates["train"] == pytest.approx(estimates.TWO_CORES["train"] / slower)
    assert re.search(r"\d+ GFLOP/s.* (float32|bfloat16)", machine.name)


def test_a_smaller_model_takes_the_share_of_its_parameters(monkeypatch):
    def seconds(kind, *overrides):
        monkeypatch.setattr(estimates, "work", lambda step: estimates.Work({kind: 1e9}))  # loading is nothing to it
        steps = load_config(find_experiment("laptop"), Experiment, overrides).steps()
        policy = next(step for step in steps if step.name == "policy/low/dpo/seed0")
        return estimates.estimate(policy, estimates.TWO_CORES).seconds

    # Of a trimmed model the head's rows are fewer: those that a kind of work reads, as far as it reads them.
    gone, head = (262_144 - 32_768) * 640, 262_144 * 640
    for kind, weight in {"sft": 1.0, "train": 0.6, "score": 0.6, "generate": 0.6, "reward": 0.0, "judge": 0.0}.items():
        share = 1 - weight * gone / (268e6 - (1 - weight) * head)
        assert seconds(kind) == pytest.approx(share * seconds(kind, "vocabulary=false"), rel=1e-4)
    whole = seconds("judge")
    half = estimates._GEMMA._replace(parameters=head + (268e6 - head) / 2)
    monkeypatch.setattr(estimates, "_shape", lambda step: half)
    assert seconds("judge") == pytest.approx(whole / 2, rel=1e-4)


def test_a_run_begins_with_its_time_where_that_is_more_than_a_minute(tmp_path, monkeypatch):
    steps = load_config(find_experiment("quickstart"), Experiment).steps()
    rates = {kind: 2 * rate for kind, rate in estimates.TWO_CORES.items()}
    monkeypatch.setattr(estimates, "this_machine", lambda: estimates.Machine(rates, "a machine"))
    words = estimates.first_words(run(steps, tmp_path / "out", dry_run=True))
    seconds = sum(estimates.estimate(step, rates).seconds for step in steps)
    assert words is not None
    assert words.startswith(f"About {duration(seconds)} for a machine, ")
    assert estimates.first_words(run(steps[:1], tmp_path / "out", only=["oracle"], dry_run=True)) is None


def test_finished_steps_correct_the_estimates_of_their_kind(tmp_path, monkeypatch):
    steps = {step.name: step for step in load_config(find_experiment("laptop"), Experiment).steps()}
    done, other = steps["policy/low/dpo/seed0"], steps["policy/low/ipo/seed0"]
    plain = estimates.estimate(other, estimates.TWO_CORES).seconds
    record = Record.model_construct(identity=done.identity, provenance={"seconds": 2 * plain})
    monkeypatch.setattr(estimates, "finished", lambda step, root: record if step is done else None)
    plan = [Planned(done, "done"), Planned(other, "to run"), Planned(steps["sft"], "to run")]
    found = estimates.estimates(plan, estimates.TWO_CORES, tmp_path)
    assert found["policy/low/ipo/seed0"].seconds == pytest.approx(2 * plain)
    assert found["sft"].seconds == estimates.estimate(steps["sft"], estimates.TWO_CORES).seconds
    assert list(found) == ["policy/low/ipo/seed0", "sft"]
    part = estimates.estimates(plan[1:], estimates.TWO_CORES, tmp_path, [done])  # finished, and not of this selection
    assert part["policy/low/ipo/seed0"].seconds == pytest.approx(2 * plain)
