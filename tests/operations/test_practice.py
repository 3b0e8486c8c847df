"""The practitioner's chain through the command line, on a tiny model: each command reads what the last one wrote."""

import json
import math
import re
import shutil
import tomllib

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from madpo import MADPO, margin_weight
from madpo.commands.cli import main
from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.core.statistics import fit_temperature
from madpo.data import load_preferences
from madpo.models.load import compute_dtype, load_tokenizer
from madpo.operations import (
    EvaluateSettings,
    RewardSettings,
    ScoreSettings,
    TrainSettings,
    evaluate,
    load_scorer,
    score,
    scoring,
    train,
)
from madpo.operations import pair_scorer as scorer_module
from madpo.operations import reward_model as reward_module
from madpo.operations.inputs import split_by_prompt
from madpo.rewards.reward_model import RewardModel
from madpo.training import PreferenceTrainer
from madpo.training.margins import sequences
from practice_cases import FORMATS, ids_of, logps, read, run, text_pairs, write
from refusals import names, refused

BATCH = 8

# Scores are computed in what the processor multiplies natively; packed rows round otherwise than single ones.
ROUNDING = 1e-6 if compute_dtype() == torch.float32 else 5e-2


pytestmark = pytest.mark.usefixtures("module_cache", "module_float32")


@pytest.fixture(scope="module")
def chain(llama, tmp_path_factory):
    """reward -> score -> inspect -> train --merge -> evaluate, once, by the command line."""
    root = tmp_path_factory.mktemp("chain")
    data = write(root / "pairs.jsonl", text_pairs())
    prompts = write(root / "prompts.jsonl", [{"prompt": f"The film {i} is"} for i in (0, 1, 2, 1, 3)])
    base = ("--model_name_or_path", llama)
    run("reward", data, *base, "--output_dir", root / "R", "--learning_rate", "1e-2", "--epochs", "2",
        "--batch_size", "8", "--eval_share", "0.4", "--lora_rank", "4")  # fmt: skip
    run("score", data, "--reward_model", root / "R", "--output_dir", root / "S")
    run("inspect", root / "S" / "scored.jsonl")
    run("train", root / "S" / "scored.jsonl", *base, "--loss", "madpo", "--loss.tau", "3", "--loss.c_max", "4",
        "--output_dir", root / "P", "--merge", "--eval_share", "0.25", "--learning_rate", "1e-2", "--epochs", "2",
        "--batch_size", BATCH, "--args.bf16", "false", "--dtype", "float32",
        "--args.logging_steps", "1", "--lora.rank", "4")  # fmt: skip
    run("evaluate", root / "P", "--reference", llama, "--prompts", prompts, "--reward", root / "R", "--output_dir",
        root / "E", "--max_new_tokens", "6", "--samples_per_prompt", "2")  # fmt: skip
    return root


def test_the_reward_models_report(chain, llama):
    report = json.loads((chain / "R" / "report.json").read_text())
    settings = RewardSettings.model_validate(report["settings"])
    rows = load_preferences(chain / "pairs.jsonl", tokenizer=load_tokenizer(llama))
    train_rows, heldout = split_by_prompt(rows, 0.4, 0, "")
    stopping, reported = reward_module._halves(heldout, settings, "")
    sizes = {"train_pairs": len(train_rows), "stopping_pairs": len(stopping), "heldout_pairs": len(reported)}
    assert {name: report[name] for name in sizes} == sizes
    assert sum(sizes.values()) == 60
    assert report["data_digest"] == scoring.digest(chain / "pairs.jsonl")
    sides = sequences(reported)
    loaded = RewardModel.load(chain / "R")
    margins = (loaded.score_ids(sides["chosen_ids"]) - loaded.score_ids(sides["rejected_ids"])).astype(np.float64)
    assert report["accuracy"]["mean"] == (margins > 0).mean()
    assert report["accuracy"]["low"] < report["accuracy"]["mean"] <= report["accuracy"]["high"]
    assert report["log_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=ROUNDING)
    if report["temperature_reason"].startswith("fitted"):
        assert report["temperature"] == pytest.approx(fit_temperature(margins)[0], rel=10 * ROUNDING)
    calibrated = np.log1p(np.exp(-margins / report["temperature"])).mean()
    assert report["calibrated_log_loss"] == pytest.approx(calibrated, rel=ROUNDING)
    for name in ("log_loss", "temperature"):
        if (interval := report[f"{name}_interval"]) is not None:
            assert interval["mean"] == pytest.approx(report[name])
            assert interval["low"] < interval["mean"] < interval["high"]
            assert interval["n"] == len({row["prompt"] for row in reported})
    assert report["model_digest"] == scoring.digest(llama)
    assert report["dropped"] == 0
    page = (chain / "R" / "report.html").read_text()
    assert page.count("<circle") == len(report["reliability"])
    assert f"{100 * report['accuracy']['mean']:.0f} %" in page
    assert sum(b["pairs"] for b in report["reliability"]) == len(reported)
    assert len(report["reliability"]) <= 10


def test_scored_rows_hold_the_reward_models_margins(chain, llama):
    rows, tokenizer, loaded = read(chain / "S" / "scored.jsonl"), load_tokenizer(llama), RewardModel.load(chain / "R")
    raw = text_pairs()
    assert [{k: row[k] for k in raw[0]} for row in rows] == raw, "the columns of the data stay"
    chosen, rejected = ([ids_of(tokenizer, row["prompt"], row[side]) for row in raw] for side in ("chosen", "rejected"))
    scores = loaded.score_ids([*chosen, *rejected])
    np.testing.assert_allclose([row["chosen_score"] for row in rows], scores[:60], atol=ROUNDING)
    np.testing.assert_allclose([row["rejected_score"] for row in rows], scores[60:], atol=ROUNDING)
    for row in rows:
        assert row["reward_margin"] == row["chosen_score"] - row["rejected_score"]
    assert np.ptp(scores) > 0.1
    assert not (chain / "S" / "parts").exists()


def test_the_policys_numbers(chain, llama):
    policy_dir, tokenizer = chain / "P", load_tokenizer(llama)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(policy_dir / "merged", dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), policy_dir / "adapter"
    ).eval()
    ids = torch.tensor([[1, 20, 33, 150, 7]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)
        assert (base(ids).logits - merged(ids).logits).abs().max() > 1e-3
    rows = read(chain / "S" / "scored.jsonl")
    scored = load_preferences(chain / "S" / "scored.jsonl", tokenizer=tokenizer)
    rows_train, heldout = split_by_prompt(scored, 0.25, 42, "")
    log = read(policy_dir / "log.jsonl")
    losses = [row for row in log if "loss" in row]
    assert len(losses) == max(row["step"] for row in log) == 2 * math.ceil(len(rows_train) / BATCH)
    expected = []
    for pair in heldout:
        row = rows[pair["pair_id"]]
        h = sum(
            sign
            * (logps(merged, tokenizer, row["prompt"], row[side]) - logps(base, tokenizer, row["prompt"], row[side]))
            for sign, side in ((1, "chosen"), (-1, "rejected"))
        )
        weight = margin_weight(torch.tensor([row["reward_margin"]]), tau=3, c_max=4).item()
        expected.append(weight * math.log1p(math.exp(-0.1 * h)))
    card = (policy_dir / "README.md").read_text()
    measured = float(next(line for line in card.splitlines() if line.startswith("| loss |")).split("|")[2])
    # The trainer's mean is over batches, of which the last is smaller.
    batches = [np.mean(expected[i : i + 8]) for i in range(0, len(expected), 8)]
    weights = [len(expected[i : i + 8]) for i in range(0, len(expected), 8)]
    assert measured == pytest.approx(np.average(batches, weights=weights), abs=2e-4)


def test_the_card_and_the_resolved_configuration(chain, llama, tmp_path):
    card = (chain / "P" / "README.md").read_text()
    for words in (scoring.digest(chain / "S" / "scored.jsonl"), str(chain / "R"), "`madpo`", "tau = 3.0", str(llama)):
        assert words in card
    resolved = tomllib.loads((chain / "P" / "config.toml").read_text())
    assert resolved["loss"]["tau"] == 3
    assert resolved["args"]["logging_steps"] == 1
    settings = TrainSettings.model_validate(resolved)
    report = json.loads((chain / "P" / "report.json").read_text())
    assert report["data_digest"] == scoring.digest(chain / "S" / "scored.jsonl")
    assert report["model_digest"] == scoring.digest(llama)
    again = train(chain / "S" / "scored.jsonl", tmp_path / "P", settings)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "P" / name).read_bytes() == (chain / "P" / name).read_bytes(), "config.toml repeats the training"
    assert again.steps == max(row["step"] for row in read(chain / "P" / "log.jsonl"))


def test_the_evaluation(chain, llama):
    report = json.loads((chain / "E" / "evaluation.json").read_text())
    samples = read(chain / "E" / "samples.jsonl")
    assert (report["prompts"], report["samples_per_prompt"], len(samples)) == (4, 2, 8), "a prompt counts once"
    tokenizer, loaded = load_tokenizer(llama), RewardModel.load(chain / "R")
    for response, reward in (("response", "reward"), ("reference_response", "reference_reward")):
        found = loaded.score_ids([ids_of(tokenizer, s["prompt"], s[response]) for s in samples])
        np.testing.assert_allclose([s[reward] for s in samples], found, atol=2e-2)  # other batches, half precision
    mine, theirs = (np.array([s[name] for s in samples]) for name in ("reward", "reference_reward"))
    wins = (mine > theirs) + 0.5 * (mine == theirs)
    assert report["win_rate"]["mean"] == pytest.approx(wins.mean())
    assert report["reward_difference"]["mean"] == pytest.approx((mine - theirs).mean())
    assert report["kl"]["mean"] == pytest.approx(np.mean([s["kl"] for s in samples]))
    assert all(s["kl"] > 0 for s in samples)
    assert all(s["tokens"] <= 6 for s in samples)
    assert report["policy_digest"] == scoring.digest(chain / "P")
    assert report["reference_digest"] == scoring.digest(llama)
    assert report["reward_model_digest"] == scoring.digest(chain / "R" / "adapter")
    page = (chain / "E" / "samples.html").read_bytes().decode()
    assert page.count('class="card"') == 3  # without scripts
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["samples"]["all"]["prompts"]
    assert [(s["prompt"], s["responses"]) for s in shown] == [
        (s["prompt"], [s["response"], s["reference_response"]]) for s in samples
    ]


def test_a_model_against_itself_is_a_draw(chain, llama, tmp_path, capsys):
    settings = EvaluateSettings(reward_model=str(chain / "R"), reference=str(llama), max_new_tokens=5)
    report = evaluate(str(llama), chain / "prompts.jsonl", tmp_path / "E", settings)
    assert report.win_rate.mean == 0.5
    assert report.kl.mean == 0
    assert all(s["response"] == s["reference_response"] for s in read(tmp_path / "E" / "samples.jsonl"))
    for policy in (chain / "P" / "merged", chain / "P" / "adapter"):
        found = evaluate(policy, chain / "prompts.jsonl", tmp_path / policy.name, settings)
        assert found.kl.mean > 0
    with refused(ConfigError, "--reference"):
        evaluate(llama, chain / "prompts.jsonl", tmp_path / "F", EvaluateSettings(reward_model=str(chain / "R")))
    with refused(DataError, ("prompts.jsonl", "4", "9")):
        evaluate(llama, chain / "prompts.jsonl", tmp_path / "F", settings.model_copy(update={"max_prompts": 9}))
    assert not (tmp_path / "F").exists()


def test_a_further_temperature_is_an_evaluation_at_it(chain, llama, tmp_path):
    settings = EvaluateSettings(reward_model=str(chain / "R"), reference=str(llama), max_new_tokens=6, temperature=1)
    given = chain / "P", chain / "prompts.jsonl"
    both = evaluate(*given, tmp_path / "both", settings.model_copy(update={"temperatures": (0.0, 1.0, 0.5)}))
    assert [at.temperature for at in both.temperatures] == [0.0, 0.5]
    rows = read(tmp_path / "both" / "samples.jsonl")
    for at in both.temperatures:
        one = evaluate(
            *given, tmp_path / "one", settings.model_copy(update={"temperature": at.temperature}), overwrite=True
        )
        own = [row for row in rows if row.get("temperature") == at.temperature]
        same = [row["response"] for row in read(tmp_path / "one" / "samples.jsonl")]
        assert [row["response"] for row in own] == same
        assert at.win_rate == one.win_rate
        assert at.policy_reward.mean == pytest.approx(one.policy_side.reward.mean, abs=1e-5)
    assert sum("temperature" not in row for row in rows) == both.prompts


def test_scoring_goes_on_where_it_was_killed(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "PART", 16)
    settings = ScoreSettings(reward_model=str(chain / "R"))
    score(chain / "pairs.jsonl", tmp_path / "whole", settings)
    original, calls = scorer_module.PairScorer.score_pairs, []

    def killed_in_the_third_part(self, pairs, name, unit):
        calls.append(pairs[0].pair_id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, pairs, name, unit)

    monkeypatch.setattr(scorer_module.PairScorer, "score_pairs", killed_in_the_third_part)
    with pytest.raises(KeyboardInterrupt):
        score(chain / "pairs.jsonl", tmp_path / "S", settings)
    assert not (tmp_path / "S" / "scored.jsonl").exists()
    score(chain / "pairs.jsonl", tmp_path / "S", settings)
    assert calls == [0, 16, 32, 32, 48], "finished parts are not scored again"
    assert (tmp_path / "S" / "scored.jsonl").read_bytes() == (tmp_path / "whole" / "scored.jsonl").read_bytes()
    assert score(chain / "pairs.jsonl", tmp_path / "S", settings).pairs == 60
    assert len(calls) == 5


def test_a_finished_folder_with_other_settings_is_refused(chain, tmp_path):
    data = write(tmp_path / "pairs.jsonl", text_pairs(8))
    settings = ScoreSettings(reward_model=str(chain / "R"))
    score(data, tmp_path / "S", settings)
    with refused(StorageError, ("batch_size", "4", "16"), "--overwrite"):
        score(data, tmp_path / "S", settings.model_copy(update={"batch_size": 4}))
    write(data, text_pairs(9)[1:])
    with refused(StorageError, tmp_path / "S", "data", "--overwrite"):
        score(data, tmp_path / "S", settings)
    score(data, tmp_path / "S", settings, overwrite=True)
    with refused(ConfigError, "config.json"):
        score(data, tmp_path / "new", ScoreSettings(reward_model=str(tmp_path / "S")))
    assert not (tmp_path / "new").exists(), "a mistake leaves nothing"


def test_out_of_fold_margins_come_from_models_that_did_not_see_the_prompt(llama, tmp_path, monkeypatch):
    data, seen, fit = write(tmp_path / "pairs.jsonl", text_pairs(40)), [], scoring.fit

    def recorded(settings, train_rows, stopping, out):
        seen.append({row["prompt"] for row in [*train_rows, *stopping]})
        return fit(settings, train_rows, stopping, out)

    monkeypatch.setattr(scoring, "fit", recorded)
    kept, by_model = tmp_path / "kept", scoring._Scoring.by_model

    def keeps_the_model(work, model, rows, folder):
        shutil.copytree(model, kept / model.name)  # reward models of folds are not part of the result
        return by_model(work, model, rows, folder)

    monkeypatch.setattr(scoring._Scoring, "by_model", keeps_the_model)
    options = ("--folds", 2, "--model_name_or_path", llama, "--learning_rate", "1e-2", "--format", "parquet")
    run("score", data, *options, "--output_dir", tmp_path / "S")
    table = pd.read_parquet(tmp_path / "S" / "scored.parquet")
    assert list(table["note"]) == [row["note"] for row in text_pairs(40)]
    everything = set(table["prompt"])
    assert len(seen) == 2
    assert seen[0] | seen[1] == everything
    assert not seen[0] & seen[1], "with two folds, each model is trained on the other's part"
    for k in (0, 1):
        rows = table[~table["prompt"].isin(seen[k])]
        found = load_scorer(kept / f"fold-{k}").model.score_ids(
            [ids_of(load_tokenizer(llama), p, c) for p, c in zip(rows["prompt"], rows["chosen"], strict=True)]
        )
        np.testing.assert_allclose(rows["chosen_score"], found, atol=2e-2)
    assert load_preferences(tmp_path / "S" / "scored.parquet")[3]["reward_margin"] == table["reward_margin"][3]


def test_columns_of_scores_are_brought_to_log_odds(tmp_path):
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(2, 50))
    rows = [row | {"mine": x, "theirs": y} for row, x, y in zip(text_pairs(50), a, b, strict=True)]
    data = write(tmp_path / "pairs.jsonl", rows)
    run("score", data, "--score_columns", "mine", "theirs", "--output_dir", tmp_path / "S")
    report = json.loads((tmp_path / "S" / "report.json").read_text())
    found = [row["reward_margin"] for row in read(tmp_path / "S" / "scored.jsonl")]
    np.testing.assert_allclose(found, (a - b) / report["temperature"])
    if report["temperature"] != 1:
        assert report["temperature"] == pytest.approx(fit_temperature(a - b)[0])
    ordered = [row | {"mine": max(x, y), "theirs": min(x, y)} for row, x, y in zip(text_pairs(50), a, b, strict=True)]
    report = score(
        write(tmp_path / "o.jsonl", ordered), tmp_path / "O", ScoreSettings(score_columns=("mine", "theirs"))
    )
    assert report.temperature == 1, "pairs ordered by their scores show no calibration"
    with refused(DataError, "line 1", "'yours'"):
        score(data, tmp_path / "X", ScoreSettings(score_columns=("mine", "yours")))
    for bad, named in (
        ({}, ("reward_model", "score_columns", "probe", "folds")),
        ({"reward_model": "R", "folds": 2}, ("reward_model", "score_columns", "probe", "folds")),
        ({"folds": 2}, ("folds", "--model_name_or_path")),
        ({"reward_model": "R", "margin_temperature": 2.0}, ("margin_temperature", "score_columns")),
    ):
        with refused(ValueError, named):
            ScoreSettings(**bad)


def test_any_reward_model_with_one_output(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("madpo.models.load.compute_dtype", lambda: torch.float32)
    torch.manual_seed(0)
    foreign = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, dtype=torch.float32).eval()
    torch.nn.init.normal_(foreign.score.weight)
    tokenizer = load_tokenizer(llama)
    foreign.config.pad_token_id = tokenizer.pad_token_id
    foreign.save_pretrained(tmp_path / "foreign")
    tokenizer.save_pretrained(tmp_path / "foreign")
    for form in ("text", "messages"):
        rows = [FORMATS[form](row) for row in text_pairs(6)]
        data = write(tmp_path / f"{form}.jsonl", rows)
        score(data, tmp_path / f"S-{form}", ScoreSettings(reward_model=str(tmp_path / "foreign")))
        for row in read(tmp_path / f"S-{form}" / "scored.jsonl"):
            if form == "text":
                ids = ids_of(tokenizer, row["prompt"], row["chosen"])
            else:
                text = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                assert row["chosen_score"] == pytest.approx(foreign(torch.tensor([ids])).logits.item(), abs=1e-5)
    two = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2)
    two.save_pretrained(tmp_path / "two")
    for place, named in ((tmp_path / "two", "2 outputs"), (llama, "LlamaForCausalLM")):
        with refused(ConfigError, place, named):
            load_scorer(place)


def test_full_training_writes_a_model(llama, tmp_path, capsys):
    data = write(tmp_path / "pairs.jsonl", text_pairs(8))
    run("train", data, "--model_name_or_path", llama, "--loss", "dpo", "--full", "--output_dir", tmp_path / "P",
        "--learning_rate", "1e-2", "--args.max_steps", "2", "--args.bf16", "false")  # fmt: skip
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "P" / "model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert not torch.equal(trained.lm_head.weight, base.lm_head.weight)
    assert sorted(p.name for p in (tmp_path / "P").iterdir()) == [
        "README.md",
        "config.toml",
        "log.jsonl",
        "model",
        "record.json",
        "report.html",
        "report.json",
    ]
    assert main(["train", str(data), "--model_name_or_path", str(llama), "--output_dir", str(tmp_path / "P")]) == 2
    names(capsys.readouterr().err, "--overwrite")


def test_pairs_that_are_too_long_are_dropped_cut_or_refused(llama, tmp_path):
    rows = text_pairs(9)
    rows[4]["chosen"] = " is" + " long" * 30 + "."
    data = write(tmp_path / "pairs.jsonl", rows)
    shared = {"model": str(llama), "loss": {"kind": "dpo"}, "args": {"max_steps": 1, "max_length": 40, "bf16": False}}
    dropped = train(data, tmp_path / "drop", TrainSettings(**shared))
    assert (dropped.pairs, dropped.dropped, dropped.cut) == (8, 1, 0)
    tokens = len(ids_of(load_tokenizer(llama), rows[4]["prompt"], rows[4]["chosen"]))
    assert read(tmp_path / "drop" / "dropped.jsonl") == [{"pair_id": 4, "line": 5, "tokens": tokens}]
    names((tmp_path / "drop" / "README.md").read_text(), "1 pairs")
    names(dropped.text(), ("1 pairs", "dropped.jsonl"))
    cut = train(data, tmp_path / "cut", TrainSettings(**shared, truncation="cut"))
    assert (cut.pairs, cut.dropped, cut.cut) == (9, 0, 1)
    assert not (tmp_path / "cut" / "dropped.jsonl").exists()
    with refused(DataError, "line 5", "max_length 40"):
        train(data, tmp_path / "refuse", TrainSettings(**shared, truncation="refuse"))
    assert not (tmp_path / "refuse").exists()


def test_qlora_needs_a_gpu_and_says_so(llama, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    data = write(tmp_path / "pairs.jsonl", text_pairs(8))
    with refused(ConfigError, "4 bits", "GPU", "qlora"):
        train(data, tmp_path / "P", TrainSettings(model=str(llama), loss={"kind": "dpo"}, qlora=True))
    with refused(ValueError, "full", "qlora"):
        TrainSettings(model=str(llama), full=True, qlora=True)


def test_an_interrupted_training_ends_in_the_same_bytes(chain, llama, tmp_path, monkeypatch):
    args = {"learning_rate": 1e-2, "max_steps": 6, "save_steps": 2}
    settings = TrainSettings(model=str(llama), loss=MADPO(), args=args)
    data = chain / "S" / "scored.jsonl"
    train(data, tmp_path / "whole", settings)
    step, taken = PreferenceTrainer.training_step, []

    def killed_in_the_fourth_step(self, *args, **kwargs):
        taken.append(self.state.global_step)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "training_step", killed_in_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "P", settings)
    assert not (tmp_path / "P" / "record.json").exists()
    report = train(data, tmp_path / "P", settings)
    assert taken == [0, 1, 2, 3, 2, 3, 4, 5]
    assert report.steps == 6
    for name in ("adapter/adapter_model.safetensors", "log.jsonl"):
        assert (tmp_path / "P" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "P"}


def test_conversations_go_through_the_whole_chain(llama, tmp_path, monkeypatch):
    rows = [FORMATS["messages"](row) for row in text_pairs(24)]
    data, base = write(tmp_path / "pairs.jsonl", rows), ("--model_name_or_path", llama)
    run("reward", data, *base, "--output_dir", tmp_path / "R", "--eval_share", "0.3")
    run("score", data, "--reward_model", tmp_path / "R", "--output_dir", tmp_path / "S")
    run("train", tmp_path / "S" / "scored.jsonl", *base, "--output_dir", tmp_path / "P", "--args.max_steps", "2")
    run("evaluate", tmp_path / "P", "--prompts", data, "--reward", tmp_path / "R", "--output_dir", tmp_path / "E",
        "--max_new_tokens", "4", "--max_prompts", "3")  # fmt: skip
    monkeypatch.chdir(tmp_path / "P")
    card = (tmp_path / "P" / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(card.replace("max_new_tokens=64", "max_new_tokens=4"), "card", "exec"), {})
    assert "apply_chat_template" in card
    samples, tokenizer = read(tmp_path / "E" / "samples.jsonl"), load_tokenizer(llama)
    assert [s["prompt"] for s in samples] == [row["prompt"] for row in rows[:3]]
    ids = [
        tokenizer(
            tokenizer.apply_chat_template(
                [*s["prompt"], {"role": "assistant", "content": s["response"]}], tokenize=False
            ),
            add_special_tokens=False,
        )["input_ids"]
        for s in samples
    ]
    found = RewardModel.load(tmp_path / "R").score_ids(ids)
    np.testing.assert_allclose([s["reward"] for s in samples], found, atol=2e-2)
