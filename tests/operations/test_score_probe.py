"""``madpo score --probe``: margins without a training, a frozen probe for new pairs, and a judge for ``evaluate``."""

import json
import shutil

import numpy as np
import pytest

from madpo import MADPO
from madpo.core.errors import DataError, StorageError
from madpo.data.load import load_preferences
from madpo.data.rows import Pair
from madpo.models.load import load_tokenizer
from madpo.operations import (
    EvaluateSettings,
    ScoreSettings,
    TrainSettings,
    evaluate,
    inspect,
    load_scorer,
    probing,
    score,
    scoring,
    train,
)
from madpo.operations import policy as policy_module
from madpo.operations.pair_scorer import reward_model_digest
from madpo.rewards.probe_reward import ProbeReward
from madpo.rewards.reward_model import RewardModel
from madpo.training import reference_columns
from practice_cases import conversation, read, run, text_pairs, write
from refusals import refused

pytestmark = pytest.mark.usefixtures("module_cache", "module_float32")


@pytest.fixture(scope="module")
def scored(llama, tmp_path_factory):
    """Scores of 60 pairs in parts of 16, by the command line."""
    root = tmp_path_factory.mktemp("probe")
    data = write(root / "pairs.jsonl", text_pairs())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "PART", 16)
        run("score", data, "--probe", llama, "--output_dir", root / "S")
    return root


def test_margins_are_out_of_fold_and_the_report_measures_them(scored):
    rows = read(scored / "S" / "scored.jsonl")
    report = json.loads((scored / "S" / "report.json").read_text())
    margins = np.array([row["reward_margin"] for row in rows])
    assert len(rows) == 60
    np.testing.assert_allclose(margins, [row["chosen_score"] - row["rejected_score"] for row in rows], atol=1e-12)
    assert report["heldout"]
    assert report["accuracy"]["mean"] == pytest.approx((margins > 0).mean())
    assert report["probe"]["log_loss"]["mean"] == pytest.approx(np.logaddexp(0, -margins).mean())
    assert report["probe"]["prompts"] == 25
    assert report["accuracy"]["mean"] > 0.6, "random states know these words by their embeddings"
    assert rows[3]["note"] == "row 3"


def test_a_second_run_is_complete_and_an_interrupted_one_ends_with_the_same_bytes(scored, llama, monkeypatch):
    settings = ScoreSettings(probe=str(llama))
    data, out = scored / "pairs.jsonl", scored / "again"
    monkeypatch.setattr(scoring, "PART", 16)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "fit_from_parts", lambda *args: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception):
            score(data, out, settings)
    monkeypatch.setattr(scoring, "feature_reader", None)  # features are not computed again
    score(data, out, settings)
    for name in ("scored.jsonl", "report.json", "probe/probe.safetensors"):
        assert (out / name).read_bytes() == (scored / "S" / name).read_bytes(), name
    assert not list(out.rglob("part-*"))


def test_the_frozen_probe_scores_new_pairs_and_single_responses(scored, llama):
    folder = scored / "S" / "probe"
    model = RewardModel.load(folder)
    assert isinstance(model, ProbeReward)
    rows = text_pairs()
    prompts, good = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    report = score(scored / "pairs.jsonl", scored / "new", ScoreSettings(reward_model=str(folder)))
    assert report.reward_model_digest == reward_model_digest(str(folder))
    new = read(scored / "new" / "scored.jsonl")
    pairs = [Pair(i, i, row["prompt"], row["chosen"], row["rejected"], {}) for i, row in enumerate(rows)]
    chosen, _ = load_scorer(folder).score_pairs(pairs, "d", "row")
    np.testing.assert_allclose(chosen, [row["chosen_score"] for row in new], atol=1e-6)
    # One response, its end token included, has the reward that it has in a pair.
    tokenizer = load_tokenizer(llama)
    before = [tokenizer(prompt)["input_ids"] for prompt in prompts[:5]]
    after = [
        [*tokenizer(prompt + said)["input_ids"][len(ids) :], tokenizer.eos_token_id]
        for prompt, said, ids in zip(prompts, good, before, strict=False)
    ]
    np.testing.assert_allclose(model.score_responses(before, after), chosen[:5], atol=1e-4)
    assert model(prompts[:3], good[:3]).shape == (3,)
    assert report.accuracy.mean >= 0.8, "pairs that it was fitted on"
    assert report.heldout is False
    assert report.trained_on
    assert report.temperature == 1
    inspected = inspect(scored / "new" / "scored.jsonl")
    assert inspected.margin_temperature == 1
    assert inspected.temperature_reason == report.temperature_reason


def test_pairs_that_a_probe_was_made_from_are_recognised_one_by_one(scored, tmp_path):
    rows, settings = text_pairs(), ScoreSettings(reward_model=str(scored / "S" / "probe"))
    other = [{**row, "prompt": f"{row['prompt']}, {i}"} for i, row in enumerate(rows)]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[30:40]]
    for name, data, seen in (
        ("reordered", rows[::-1], 60),
        ("sampled", [{**row, "source": "x"} for row in rows[5:25]], 20),
        ("turned", [*turned, *other[:10]], 10),
        ("few", [*other, rows[3]], 1),
        ("new", other, 0),
    ):
        report = score(write(tmp_path / f"{name}.jsonl", data), tmp_path / name, settings)
        assert (report.seen, report.trained_on) == (seen, seen > 1), name
        assert (f"{seen} of" in report.text()) == (seen > 0)
        assert not report.trained_on or report.temperature == 1
    path = tmp_path / "P"
    shutil.copytree(scored / "S" / "probe", path)
    (path / "trained_on.safetensors").write_bytes(b"{}")
    with refused(StorageError, path / "trained_on.safetensors"):
        score(tmp_path / "few.jsonl", tmp_path / "damaged", ScoreSettings(reward_model=str(path)))


def report_of(scored):
    return json.loads((scored / "S" / "report.json").read_text())


@pytest.mark.parametrize("form", [lambda row: row, conversation], ids=["text", "conversation"])
def test_prompts_that_read_the_same_share_a_fold_whatever_their_tokens(form, llama, tmp_path, monkeypatch):
    fitted = []
    real = reference_columns.fit_probe

    def fit(chosen, rejected, prompts, **how):
        fitted.append((real(chosen, rejected, prompts, **how), list(prompts)))
        return fitted[-1][0]

    monkeypatch.setattr(probing, "fit_probe", fit)
    monkeypatch.setattr(reference_columns, "fit_probe", fit)
    # The last token of "The film 3 " becomes a part of " is", and stays as it is before "9".
    rows = []
    for i, row in enumerate(text_pairs()):
        sides = {name: f"9{row[name]}" if i % 3 else row[name].strip() for name in ("chosen", "rejected")}
        rows.append(form({"prompt": f"{row['prompt']} ", **sides}))
    data = write(tmp_path / "pairs.jsonl", rows)
    tokenizer = load_tokenizer(llama)
    ids = {str(row["prompt_ids"]) for row in load_preferences(data, tokenizer=tokenizer)}
    assert len(ids) > 25 or form is conversation, "one text has different tokens"
    report = score(data, tmp_path / "S", ScoreSettings(probe=str(llama)))
    assert report.probe.prompts == 25
    settings = TrainSettings(model=str(llama), loss=MADPO(), args={"max_steps": 1, "bf16": False}, dtype="float32")
    train(data, tmp_path / "P", settings)
    (scored, keys), (trained, others) = fitted
    assert [len(set(keys)), len(set(others))] == [25, 25]
    assert keys == others
    assert trained.report.fold_penalties == scored.report.fold_penalties


def test_the_trainer_finds_the_same_margins(scored, llama, tmp_path, monkeypatch):
    made = []
    real = policy_module.build_trainer
    monkeypatch.setattr(policy_module, "build_trainer", lambda *a: made.append(real(*a)) or made[-1])
    settings = TrainSettings(model=str(llama), loss=MADPO(), args={"max_steps": 1, "bf16": False}, dtype="float32")
    frozen = RewardModel.load(scored / "S" / "probe").weights
    report = train(scored / "pairs.jsonl", tmp_path / "P", settings)
    rows = read(scored / "S" / "scored.jsonl")
    (trainer,) = made
    # Batches are padded otherwise, so that states differ by rounding; folds, penalties and margins are the same.
    assert trainer.probe.weights.penalty == frozen.penalty
    assert trainer.probe.report.fold_penalties == tuple(report_of(scored)["probe"]["fold_penalties"])
    np.testing.assert_allclose(
        trainer.probe.weights.weights, frozen.weights, rtol=1e-3, atol=1e-3 * np.abs(frozen.weights).max()
    )
    margins = [row["reward_margin"] for row in rows]
    np.testing.assert_allclose(trainer.train_dataset["reward_margin"], margins, rtol=1e-3, atol=1e-4)
    assert report.probe is not None
    assert report.probe.accuracy == trainer.probe.report.accuracy
    assert "probe" in (tmp_path / "P" / "README.md").read_text()


def test_a_probe_judges_a_policy(scored, llama, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "The film"}, {"prompt": "A film"}])
    how = EvaluateSettings(reward_model=str(scored / "S" / "probe"), reference=str(llama), max_new_tokens=4)
    found = evaluate(llama, prompts, tmp_path / "E", how)
    assert found.win_rate.mean == 0.5, "the reference against itself"
    assert np.isfinite(found.policy_side.reward.mean)


def test_mistakes(scored, llama, tmp_path):
    for wrong in ({"probe": "m", "reward_model": "r"}, {"probe": "m", "score_columns": ("a", "b")}):
        with refused(ValueError, ("reward_model", "score_columns", "probe", "folds")):
            ScoreSettings(**wrong)
    (tmp_path / "F").mkdir()
    for file in (scored / "S" / "probe").iterdir():
        (tmp_path / "F" / file.name).write_bytes(file.read_bytes())
    about = json.loads((tmp_path / "F" / "reward_model.json").read_text())
    about["probe"]["model_digest"] = "0" * 64
    (tmp_path / "F" / "reward_model.json").write_text(json.dumps(about))
    with refused(DataError, tmp_path / "F", f"--probe {llama}"):
        load_scorer(tmp_path / "F")
    about["probe"]["layers"] = [1]
    (tmp_path / "F" / "reward_model.json").write_text(json.dumps(about))
    with refused(DataError, tmp_path / "F"):
        RewardModel.load(tmp_path / "F")
    assert score(scored / "pairs.jsonl", tmp_path / "S", ScoreSettings(probe=str(llama), folds=40)).probe.folds == 25
