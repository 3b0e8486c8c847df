"""The search over a loss's parameters: what is measured, that nothing is measured twice, and what a kill leaves."""

import csv
import json
import math
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM

from madpo.commands.cli import main
from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.core.statistics import fit_temperature
from madpo.losses import DPO, IPO, MADPO, AlphaDPO, LossInputs, OmniDPO, SimPO
from madpo.models.load import load_model, load_tokenizer
from madpo.operations import TrainSettings, train
from madpo.operations.running import digest
from madpo.operations.tuning import Dimension, RewardCriterion, TuneSettings, heldout, tune
from madpo.operations.tuning import search as study
from madpo.operations.tuning.heldout import RewardCurve
from madpo.operations.tuning.settings import grid_size, with_values
from madpo.training import PreferenceTrainer, reference
from practice_cases import logps, read, run, text_pairs, write
from refusals import names, refused

ARGS = {"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 8, "bf16": False}
SPACE = {"loss.tau": {"values": [2.0, 4.0]}}


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    generator = np.random.default_rng(0)
    rows = [row | {"reward_margin": float(generator.normal(1, 1))} for row in text_pairs(30)]
    return write(tmp_path_factory.mktemp("data") / "scored.jsonl", rows)


def settings_for(llama, **changes):
    shared = {"model": str(llama), "args": ARGS, "dtype": "float32", "lora": {"rank": 4}, "folds": 2, "space": SPACE}
    return TuneSettings.model_validate({**shared, **changes})


@pytest.fixture(scope="module")
def tuned(llama, data, tmp_path_factory):
    """A whole search, the fold trainings that it made, and how often the reference was asked."""
    trained, asked = [], []
    step, compute = PreferenceTrainer.training_step, reference._compute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PreferenceTrainer,
            "training_step",
            lambda self, *a, **k: (trained.append(self.loss), step(self, *a, **k))[1],
        )
        patch.setattr(reference, "_compute", lambda *a, **k: (asked.append(len(a[0].dataset)), compute(*a, **k))[1])
        out = tmp_path_factory.mktemp("tuned") / "T"
        report = tune(data, out, settings_for(llama))
    return out, report, trained, asked


def test_the_criteria_are_those_of_policies_that_madpo_train_makes(tuned, llama, data, tmp_path):
    _, report, _, _ = tuned
    rows, tokenizer = read(data), load_tokenizer(llama)
    trial = report.trials[0]
    settings = with_values(settings_for(llama).training, trial.values)
    prepared = heldout.prepare(data, settings_for(llama), tmp_path / "prepared")
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    margins = np.zeros(len(rows))
    for k in (0, 1):
        inside = [row for row, fold in zip(rows, prepared.fold, strict=True) if fold != k]
        train(write(tmp_path / f"train{k}.jsonl", inside), tmp_path / f"P{k}", settings)
        policy = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), tmp_path / f"P{k}" / "adapter"
        ).eval()
        for i in np.flatnonzero(prepared.fold == k):
            row = rows[i]
            margins[i] = 0.1 * sum(
                sign * (logps(policy, tokenizer, row["prompt"], row[s]) - logps(base, tokenizer, row["prompt"], row[s]))
                for sign, s in ((1, "chosen"), (-1, "rejected"))
            )
    temperature = fit_temperature(margins)[0]
    h = trial.heldout
    assert h.accuracy.mean == pytest.approx((margins > 0).mean())
    assert h.temperature == pytest.approx(temperature, rel=1e-3)
    assert h.log_loss.mean == pytest.approx(np.log1p(np.exp(-margins / temperature)).mean(), abs=1e-4)
    assert h.raw_log_loss.mean == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)
    assert h.log_loss.low < h.log_loss.mean < h.log_loss.high
    assert not {row["prompt"] for row, f in zip(rows, prepared.fold, strict=True) if f == 0} & {
        row["prompt"] for row, f in zip(rows, prepared.fold, strict=True) if f == 1
    }, "a prompt's pairs are in one fold"


def test_every_setting_is_trained_once_and_the_reference_asked_once(tuned):
    out, report, trained, asked = tuned
    assert len(report.trials) == 2, "a grid ends when it is through"
    assert [loss.kind for loss in trained[:6]] == ["dpo"] * 6
    assert len(trained) == (1 + 2) * 2 * ARGS["max_steps"]
    assert asked == [30], "folds and trials share one pass of the reference over all pairs"
    assert {trial.values["loss.tau"] for trial in report.trials} == {2.0, 4.0}
    best = min(report.trials, key=lambda trial: trial.heldout.log_loss.mean)
    assert report.chosen == best.number
    baseline = report.baseline.heldout
    assert report.advantage.mean == pytest.approx(baseline.log_loss.mean - best.heldout.log_loss.mean)
    assert not list(out.rglob("training-*")), "checkpoints are gone"


def test_the_table_and_the_page_show_every_trial(tuned):
    out, report, _, _ = tuned
    rows = list(csv.DictReader((out / "trials.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows] == ["dpo", "0", "1"]
    assert [int(row["chosen"]) for row in rows] == [0, *(int(t.number == report.chosen) for t in report.trials)]
    for row, trial in zip(rows[1:], report.trials, strict=True):
        assert float(row["loss.tau"]) == trial.values["loss.tau"]
        for name in ("accuracy", "log_loss", "raw_log_loss"):
            estimate = getattr(trial.heldout, name)
            assert [float(row[name + end]) for end in ("", "_low", "_high")] == [
                estimate.mean,
                estimate.low,
                estimate.high,
            ]
    page = (out / "tune.html").read_text()
    assert page.count("<title>trial ") == 2
    assert f"{report.best().heldout.log_loss.mean:.4f}" in page
    assert set(re.findall(r"https?://[\w./]+", page)) <= {"http://www.w3.org/2000/svg"}  # a name, which loads nothing


def test_the_chosen_settings_are_what_madpo_train_takes(tuned, data, tmp_path):
    out, report, _, _ = tuned
    chosen = tomllib.loads((out / "chosen.toml").read_text())
    assert chosen["loss"]["tau"] == report.best().values["loss.tau"]
    assert TrainSettings.model_validate(chosen).args["max_steps"] == 3
    run("train", data, "--config", out / "chosen.toml", "--output_dir", tmp_path / "P")
    assert tomllib.loads((tmp_path / "P" / "config.toml").read_text()) == chosen


@pytest.mark.parametrize("died_in_step", [11])
def test_a_search_that_was_cut_off_ends_in_the_same_table(tuned, llama, data, tmp_path, monkeypatch, died_in_step):
    out, _, trained, _ = tuned
    step, taken = PreferenceTrainer.training_step, []

    def dies_once(self, *args, **kwargs):
        taken.append(0)
        if len(taken) == died_in_step:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "training_step", dies_once)
    with pytest.raises(KeyboardInterrupt):
        tune(data, tmp_path / "T", settings_for(llama))
    journal = tmp_path / "T" / "unfinished" / "checkpoints" / study.JOURNAL
    if journal.exists():  # what a kill in the middle of a write leaves
        journal.write_bytes(journal.read_bytes() + b'{"op_code":5,"worker')
        journal.with_name(f"{journal.name}.lock").write_text("")
    tune(data, tmp_path / "T", settings_for(llama))
    for name in ("trials.csv", "chosen.toml"):
        assert (tmp_path / "T" / name).read_bytes() == (out / name).read_bytes()
    assert len(taken) <= len(trained) + ARGS["max_steps"], "at most the fold that was cut off is trained again"


@pytest.mark.slow
def test_a_finished_study_goes_on_with_more_trials_and_refuses_other_settings(llama, data, tmp_path):
    space = {"loss.tau": {"low": 1.0, "high": 9.0}, "lora.rank": {"low": 2, "high": 4, "integer": True}}
    changes = {"space": space, "baseline": False, "args": ARGS | {"max_steps": 1}}
    first = tune(data, tmp_path / "T", settings_for(llama, trials=1, **changes))
    more = tune(data, tmp_path / "T", settings_for(llama, trials=2, **changes))
    assert more.trials[:1] == first.trials
    assert len(more.trials) == 2
    whole = tune(data, tmp_path / "whole", settings_for(llama, trials=2, **changes))
    assert whole.trials == more.trials, "what is proposed depends only on seed, number and results"
    for trial in more.trials:
        assert 1 <= trial.values["loss.tau"] <= 9
        assert trial.values["lora.rank"] in (2, 3, 4)
    with refused(StorageError, ("folds", "3", "2")):
        tune(data, tmp_path / "T", settings_for(llama, folds=3, **changes))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--criterion", "raw_log_loss"], ["log_loss", "accuracy", "reward"]),
        (["--criterion", "reward"], [("criterion", '"reward"')]),
        (["--space.loss.taau", "[1, 2]"], [("space.loss.taau", "1")]),
        (["--space.loss.tau", "[0]"], [("space.loss.tau", "0")]),
        (["--space.folds", "[2]"], [("space", "'folds'"), ("loss.*", "args.*", "lora.*")]),
        (["--space.loss.tau", "{ low = 3, high = 1 }"], [("low", "3.0", "high")]),
        (["--space.loss.tau", "{ low = 0, high = 1, log = true }"], [("low", "0.0")]),
        (["--loss", "custom"], ["target"]),
        (["--folds", "40"], [("folds", "40"), "25 different"]),
        (["--sampler", "grid", "--space.loss.tau", "{ low = 2, high = 4 }"], ['"grid"', "values", '"tpe"']),
        (["--reward_model", "R", "--kl", "2"], [("criterion", '"reward"')]),
    ],
)
def test_mistakes(llama, data, tmp_path, capsys, words, named):
    argv = ["tune", str(data), "--model_name_or_path", str(llama), "--output_dir", str(tmp_path / "T"), *words]
    assert main([*argv, "--args.max_steps", "1", "--args.bf16", "false"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("madpo: ")
    names(err, *named)
    assert not (tmp_path / "T").exists()


def test_a_missing_column_is_told_before_anything_is_trained(llama, tmp_path):
    bare = write(tmp_path / "pairs.jsonl", text_pairs(8))
    with refused(DataError, "reward_margin", "madpo score"):
        tune(bare, tmp_path / "T", settings_for(llama))
    assert not (tmp_path / "T").exists()


def test_pairs_that_no_policy_scores_are_left_out_of_every_fold(llama, tmp_path):
    """Without a token that begins every text, nothing predicts the end token of an empty answer to an empty prompt."""
    model = shutil.copytree(llama, tmp_path / "model")
    place = model / "tokenizer.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"post_processor": None}))
    rows = [row | {"reward_margin": float(i)} for i, row in enumerate(text_pairs(12))]
    rows[3] |= {"prompt": "", "rejected": ""}
    found = heldout.prepare(write(tmp_path / "d.jsonl", rows), settings_for(model), tmp_path)
    assert [row["reward_margin"] for row in found.rows] == [0, 1, 2, *range(4, 12)]
    assert len(found.fold) == len(found.prompts) == 11
    reference = load_model(model, dtype=torch.float32)
    for row in (found.rows[0], found.rows[-1]):
        ids = torch.tensor([[*row["prompt_ids"], *row["chosen_ids"]]])
        start = len(row["prompt_ids"]) - 1
        with torch.no_grad():
            terms = reference(ids).logits[0, start:-1].log_softmax(-1).gather(1, ids[0, start + 1 :, None])
        assert row["ref_chosen_logps"] == pytest.approx(float(terms.sum()), abs=1e-3)


def test_spaces():
    assert grid_size({"a": Dimension(values=(1, 2)), "b": Dimension(values=(1, 2, 3))}) == 6
    assert math.isinf(grid_size({"a": Dimension(values=(1, 2)), "b": Dimension(low=0, high=1)}))
    paper = TuneSettings(model="m").searched
    assert paper["loss.tau"].values == (2, 4, 7, 10)
    assert paper["loss.c_max"].values == (2, 3, 4)
    assert TuneSettings(model="m", loss=DPO()).searched == {"loss.beta": Dimension(low=0.01, high=1.0, log=True)}
    nested = TuneSettings.model_validate(
        {"model": "m", "space": {"loss": {"tau": [1, 2], "lam": {"low": 1, "high": 2}}}}
    )
    assert nested.searched == {"loss.tau": Dimension(values=(1, 2)), "loss.lam": Dimension(low=1, high=2)}
    settings = with_values(
        TrainSettings(model="m", loss=MADPO()), {"loss.tau": 3, "args.learning_rate": 1e-3, "lora.rank": 2}
    )
    assert (settings.loss.tau, settings.args["learning_rate"], settings.lora.rank) == (3, 1e-3, 2)


def test_implicit_margins_are_the_losses_own():
    def both(*pair):
        return dict(zip(("chosen", "rejected"), (torch.tensor([float(x)]) for x in pair), strict=True))

    policy, ref, lengths = both(-10, -20), both(-12, -18), both(4, 5)
    inputs = LossInputs(
        **{f"policy_{k}_logps": v for k, v in policy.items()},
        **{f"ref_{k}_logps": v for k, v in ref.items()},
        **{f"{k}_lengths": v.long() for k, v in lengths.items()},
    )
    per_token, mean = 2 / 4 + 2 / 5, -10 / 4 + 20 / 5
    for loss, expected in (
        (DPO(beta=0.5), 2.0),
        (IPO(beta=0.1), 0.4),
        (IPO(beta=0.1, reduction="mean"), 0.1 * per_token),
        (OmniDPO(beta=2.0), 2 * per_token),
        (SimPO(beta=2.0), 2 * mean),
        (AlphaDPO(beta=3.0), 3 * mean),
    ):
        assert loss.implicit_margin(inputs).item() == pytest.approx(expected), loss


def test_the_reward_is_read_off_between_two_strengths():
    """In the root of the KL: where reward grows as this root, no strength that is sampled is favoured."""
    curve = RewardCurve(
        np.array([0, 0.5, 1.0]), np.array([[0.0, 1], [2, 3], [4, 9]]), np.array([[0.0, 0], [1, 3], [5, 11]])
    )
    np.testing.assert_allclose(curve.at(2.0), [2, 3])
    np.testing.assert_allclose(curve.at(0.5), [1, 2])
    np.testing.assert_allclose(curve.at(4.5), [3, 6])
    assert curve.at(9.1) is None
    strengths = np.array([0, 0.5, 1, 1.5])
    law = RewardCurve(strengths, 3 * strengths[:, None] + [[-1.0, 1.0]], 2 * strengths[:, None] ** 2 + [[0.0, 0.0]])
    np.testing.assert_allclose(law.at(1.0), 3 * math.sqrt(1 / 2) + np.array([-1.0, 1.0]))
    again = RewardCurve.of(curve.tensors())
    for one, other in zip(curve, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_the_reward_of_samples_at_equal_kl(llama, data, tmp_path):
    run("reward", data, "--model_name_or_path", llama, "--output_dir", tmp_path / "R", "--eval_share", "0.4",
        "--learning_rate", "1e-2")  # fmt: skip
    reward = {"reward_model": str(tmp_path / "R"), "kl": 0.001, "max_new_tokens": 4, "prompts": 5, "strengths": [1, 2]}
    settings = settings_for(llama, criterion="reward", reward=reward)
    settings = settings.model_copy(update={"args": ARGS | {"max_steps": 1}})
    report = tune(data, tmp_path / "T", settings)
    rewards = [trial.heldout.reward.mean for trial in report.trials]
    assert report.best().heldout.reward.mean == max(rewards)
    assert all(trial.heldout.kl.mean >= 0.001 for trial in report.trials)
    assert report.trials[0].heldout.reward.n == 10, "five prompts of each fold"
    assert report.advantage.mean == pytest.approx(max(rewards) - report.baseline.heldout.reward.mean)
    saved = next((tmp_path / "T" / "search" / "folds").rglob("fold-0.safetensors"))
    curve = RewardCurve.of(heldout.load_file(saved))
    assert (np.diff(curve.kl.mean(-1)) > 0).all(), "a stronger adapter is further from the reference"
    far = reward | {"kl": 1e6, "strengths": [0.5]}
    with refused(ConfigError, "1e+06"):
        tune(data, tmp_path / "F", settings_for(llama, criterion="reward", reward=far, baseline=False))


def test_a_strengthened_adapter_is_the_sum_of_base_and_scaled_update(llama, data, tmp_path):
    settings = TrainSettings(model=str(llama), loss=MADPO(), args=ARGS, dtype="float32", lora={"rank": 4})
    train(data, tmp_path / "P", settings)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj"
    before = base.get_submodule(name).weight.detach().clone()
    policy = PeftModel.from_pretrained(base, tmp_path / "P" / "adapter").eval()
    layer = policy.base_model.model.get_submodule(name)
    x = torch.randn(3, before.shape[1])
    update = layer(x) - x @ before.T
    assert update.abs().max() > 1e-4
    for strength in (0.0, 0.5, 2.0):
        with rescale_adapter_scale(policy, strength):
            torch.testing.assert_close(layer(x), x @ before.T + strength * update)
    torch.testing.assert_close(layer(x), x @ before.T + update)


def test_rewards_need_their_settings():
    for bad, named in (({"strengths": []}, "strengths"), ({"strengths": [1, 0.5]}, "strengths"), ({"kl": 0}, "kl")):
        with refused(ValueError, named):
            RewardCriterion(**{"reward_model": "R", "kl": 1.0, **bad})
    with refused(ValueError, "adapter", "full"):
        TuneSettings(model="m", full=True, criterion="reward", reward=RewardCriterion(reward_model="R", kl=1.0))


def test_the_settings_say_what_the_study_is(tuned, data):
    out, _, _, _ = tuned
    record = json.loads((out / "record.json").read_text())
    assert record["inputs"]["data"] == digest(data)
    assert sorted(p.name for p in Path(out).iterdir() if not p.name.startswith(".")) == [
        *("chosen.toml", "record.json", "report.json", "search", "trials.csv", "tune.html")
    ]
