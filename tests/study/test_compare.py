"""``madpo compare``: a user's own pairs as a study, against independent computations."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from scipy.optimize import minimize_scalar
from transformers import AutoModelForCausalLM, AutoTokenizer

from claim_cases import N, madpo, row, samples, tier_of
from madpo.core.config import load_config
from madpo.core.errors import ConfigError, DataError
from madpo.data.rows import Pair
from madpo.operations import ScoreSettings, score
from madpo.operations.own_pairs import OwnPairsStage, read_own_pairs
from madpo.operations.pair_scorer import load_scorer
from madpo.report.collect import planned_row
from madpo.report.equal_kl import frontiers
from madpo.report.methods import SFT
from madpo.report.numbers import short
from madpo.report.own import own_notes, own_opening, own_verdict
from madpo.report.results import Row, Tier, measured
from madpo.report.sources import HELDOUT, SAMPLES, Sources
from madpo.report.study_charts import COLOURS, _colour
from madpo.study.compare import CompareSettings, compare
from madpo.study.own_graph import OwnPairsGraph, rows_of
from practice_cases import conversation, read, text_pairs, write
from refusals import names, refused

PAIRS = 60
SMALL = {
    "betas": [0.1, 0.5],
    "losses": ["madpo", {"kind": "auto", "beta": 0.1}],
    "optimisation": {"learning_rate": 2e-3, "batch_size": 12, "checkpoint_every": 0},
    "other_learning_rates": [],
    "lora": {"rank": 2},
    "responses": {"max_new_tokens": 6},
}


def settings(model, **changes):
    given = {"model": str(model), **SMALL, **changes}
    if "judge" not in given:
        del given["responses"]
    return load_config(None, CompareSettings, given)


@pytest.fixture(scope="module")
def run(llama, tmp_path_factory, module_float32):
    """Conversations, of which a prompt has two or three, compared with a probe as the judge."""
    root = tmp_path_factory.mktemp("compare")
    data = write(root / "pairs.jsonl", [conversation(row) for row in text_pairs(PAIRS)])
    how = settings(llama, judge="probe", eval_share=0.3, judge_share=0.3, evaluation={"temperatures": [0.5]})
    result = compare(data, root / "out", how)
    assert not result.failed
    return data, how, result


def folder(result, name):
    return next(step for step in result.graph if step.name == name).folder(result.root)


def lines(result, name):
    return pd.DataFrame(read(folder(result, name) / "samples.jsonl"))


def test_no_prompt_is_in_two_parts_and_no_pair_is_lost(run) -> None:
    pairs = pd.read_parquet(folder(run[2], "pairs") / "pairs.parquet")
    assert sorted(pairs["row"]) == list(range(PAIRS))
    assert pairs.groupby("prompt_id")["split"].nunique().max() == 1
    shares = pairs["split"].value_counts(normalize=True)
    assert set(shares.index) == {"train", "heldout", "judge"}
    assert shares["heldout"] == pytest.approx(0.3, abs=0.06)
    assert shares["judge"] == pytest.approx(0.3, abs=0.06)
    judged = pd.read_parquet(folder(run[2], "judge") / "out_of_fold.parquet")["pair_id"]
    assert set(judged) == set(pairs.loc[pairs["split"] == "judge", "pair_id"]), "no policy has seen the judge's pairs"


def test_tokens_are_those_of_the_chat_template(run, llama) -> None:
    data, _, result = run
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = read(data)
    for pair in pd.read_parquet(folder(result, "pairs") / "pairs.parquet").head(8).itertuples():
        row = rows[pair.row]
        text = tokenizer.apply_chat_template(row["prompt"] + row["rejected"], tokenize=False)
        assert text.startswith(tokenizer.decode([*pair.prompt_ids, *pair.rejected_ids]))
        assert row["rejected"][0]["content"].strip() in tokenizer.decode(pair.rejected_ids)


@pytest.mark.parametrize("judge_share", [0.0, 0.5])
def test_held_out_prompts_that_were_trained_on_are_told(llama, tmp_path, judge_share) -> None:
    rows = [{**row, "prompt": f"The film {i}"} for i, row in enumerate(text_pairs(12))]
    given = write(tmp_path / "p.jsonl", rows)
    other = write(tmp_path / "e.jsonl", [*rows[:3], {**rows[0], "prompt": "Another film"}])
    stage = OwnPairsStage(model=str(llama), judge_share=judge_share)
    metrics = read_own_pairs(stage, {"data": given, "eval_data": other}, tmp_path)
    assert (metrics["heldout_pairs"], metrics["leaked_pairs"]) == (4, 3)
    record = SimpleNamespace(metrics=metrics)
    names(" ".join(own_notes({}, {"pairs": record})), ("3", "4"))
    metrics = read_own_pairs(stage.model_copy(update={"eval_share": 0.3}), {"data": given}, tmp_path)
    assert metrics["leaked_pairs"] == 0
    assert own_notes({}, {"pairs": SimpleNamespace(metrics=metrics)}) == []


@torch.no_grad()
def _logps(model, prompt, completion):
    ids = torch.tensor([[*prompt, *completion]])
    words = model(ids).logits[0, :-1].double().log_softmax(-1)
    return float(words.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum())


@pytest.mark.parametrize("key", ["dpo", "auto"])
def test_heldout_margins_and_their_log_loss(run, llama, key) -> None:
    result = run[2]
    pairs = pd.read_parquet(folder(result, "pairs") / "pairs.parquet").query("split == 'heldout'")
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    found = {}
    for name in ("reference", "policy"):
        model = base
        if name == "policy":
            model = PeftModel.from_pretrained(base, folder(result, f"policy/own/{key}/seed0") / "adapter").eval()
        found[name] = [
            _logps(model, p.prompt_ids, p.chosen_ids) - _logps(model, p.prompt_ids, p.rejected_ids)
            for p in pairs.itertuples()
        ]
    expected = np.array(found["policy"]) - found["reference"]
    table = lines(result, f"heldout/own/{key}/seed0")
    np.testing.assert_allclose(table["log_ratio_margin"], expected, atol=2e-4)
    best = minimize_scalar(lambda s: np.logaddexp(0, -expected * np.exp(s)).mean(), bounds=(-6, 6), method="bounded")
    losses = pd.Series(np.logaddexp(0, -expected * np.exp(best.x)))
    prompts = pairs["prompt_id"].to_numpy()
    metrics = result.records[f"heldout/own/{key}/seed0"].metrics
    assert metrics["heldout_log_loss"].mean == pytest.approx(losses.groupby(prompts).mean().mean(), abs=1e-4)
    right = pd.Series(expected > 0).groupby(prompts).mean()
    assert metrics["heldout_accuracy"].mean == pytest.approx(right.mean())
    assert metrics["heldout_accuracy"].n == len(right) < len(pairs)


def test_what_the_probe_is_worth_counts_prompts(run) -> None:
    result = run[2]
    pairs = pd.read_parquet(folder(result, "pairs") / "pairs.parquet").set_index("pair_id")
    known = {name: record for name, record in result.records.items() if "calibrated_log_loss" in record.metrics}
    assert "judge" in known
    assert len(known) > 1, "and the probe of the policies' margins"
    for record in known.values():
        held = pairs[pairs["split"] == "heldout"]
        assert record.metrics["heldout_pairs"] == len(held)
        assert record.metrics["heldout_accuracy"].n == held["prompt_id"].nunique() < len(held)
        drawn = Sources(result.root).margins(record, result.records)
        assert drawn["prompt_id"].tolist() == pairs.loc[drawn["pair_id"], "prompt_id"].tolist()


def test_responses_have_the_judges_rewards(run) -> None:
    data, _, result = run
    rows = read(data)
    pairs = pd.read_parquet(folder(result, "pairs") / "pairs.parquet").drop_duplicates("prompt_id")
    said = {pair.prompt_id: rows[pair.row]["prompt"] for pair in pairs.itertuples()}
    table = lines(result, "evaluation/own/madpo/seed0")
    assert table["temperature"].value_counts(dropna=False).nunique() == 1, "as many at 0.5 as at 1"
    scorer = load_scorer(folder(result, "judge"))
    answers = [[{"role": "assistant", "content": text}] for text in table["response"]]
    given = [Pair(i, i, said[p], a, a, {}) for i, (p, a) in enumerate(zip(table["prompt_id"], answers, strict=True))]
    rewards, _ = scorer.score_pairs(given, "responses", "row")
    np.testing.assert_allclose(table["oracle_reward"], rewards, atol=1e-5)


def test_the_report_has_the_paired_differences_and_a_verdict(run) -> None:
    result = run[2]
    results = json.loads((result.root / "results.json").read_bytes())
    methods = {row["key"]: row for row in results["tiers"]["own"]["methods"]}
    tables = {key: lines(result, f"heldout/own/{key}/seed0").groupby("prompt_id")["log_loss"].mean() for key in methods
              if key != "sft"}  # fmt: skip
    assert set(tables) == {"dpo", "dpo-beta=0.5", "madpo", "madpo-beta=0.5", "auto"}
    difference = methods["madpo"]["log_loss_difference"]
    assert difference["mean"] == pytest.approx((tables["madpo"] - tables["dpo"]).mean())
    assert methods["sft"]["name"] == "Reference"
    assert all(row["oracle_reward"] for row in methods.values())
    page = (result.root / "report.html").read_text(encoding="utf-8")
    assert results["summary"][1].split(". ")[0].replace("'", "&#39;") in page
    assert "Figure 1" not in page


def test_a_further_loss_leaves_what_is_finished(run, llama) -> None:
    data, how, result = run
    again = compare(data, result.root, how)
    assert not again.ran
    more = how.model_copy(update={"losses": (*how.losses, "ipo"), "seeds": (0, 1)})
    plan = {step.name: status for step, status in compare(data, result.root, more, dry_run=True).plan}
    assert all(plan[name] == "done" for name in result.records)
    assert plan["policy/own/ipo/seed0"] == plan["policy/own/dpo/seed1"] == "to run"


def test_margins_of_the_pairs_take_the_place_of_a_probe(llama, tmp_path) -> None:
    rows = [{**row, "reward_margin": float(i)} for i, row in enumerate(text_pairs(PAIRS))]
    result = compare(write(tmp_path / "p.jsonl", rows), tmp_path / "out", settings(llama), only=["pairs"])
    names = [step.name for step in result.graph]
    assert not any(name.startswith(("margins", "probe", "evaluation", "judge")) for name in names), "no judge is given"
    pairs = pd.read_parquet(folder(result, "pairs") / "pairs.parquet")
    margins = pd.read_parquet(folder(result, "pairs") / "margins.parquet")
    assert (margins["reward_margin"] == pairs["row"]).all()
    step = next(step for step in result.graph if step.name == "policy/own/madpo/seed0")
    assert step.inputs["margins"].name == "pairs"


def test_columns_without_an_effect_are_told(tmp_path, llama, capsys) -> None:
    rows = [{**row, "weight": 2.0, "chosen_score": 2.0, "rejected_score": 1.0} for row in text_pairs(20)]
    plain, scored = (write(tmp_path / f"{name}.jsonl", rows) for name in ("plain", "scored"))
    compare(plain, tmp_path / "out", settings(llama), dry_run=True)
    names(capsys.readouterr().err, "'weight'", "--score_columns chosen_score rejected_score")
    compare(scored, tmp_path / "out", settings(llama, losses=["ipo"]), dry_run=True)
    said = capsys.readouterr().err
    names(said, "'weight'")
    assert "score_columns" not in said, "no loss reads margins"


def test_a_judge_that_was_trained_on_the_evaluation_data_is_told(tmp_path, llama) -> None:
    rows = [{**row, "prompt": f"The film {i}"} for i, row in enumerate(text_pairs(30))]
    data, held = write(tmp_path / "p.jsonl", rows[:20]), write(tmp_path / "e.jsonl", rows[20:])
    score(held, tmp_path / "scored", ScoreSettings(probe=str(llama)))
    judged = settings(llama, judge=str(tmp_path / "scored" / "probe"))
    assert OwnPairsGraph(judged, str(data), str(held)).judge_saw_pairs == 10
    assert OwnPairsGraph(judged, str(data), None).judge_saw_pairs == 0


def test_mistakes_are_told_before_a_model_loads(tmp_path) -> None:
    data = write(tmp_path / "p.jsonl", text_pairs(20))
    with refused(ConfigError, "'madpo'"):
        settings("tiny-llama", losses=["mapdo"])
    with refused(ConfigError, "losses", "madpo", ("tau", "-1.0")):
        settings("tiny-llama", losses=[{"kind": "madpo", "tau": -1}])
    with refused(DataError, "chosen_score"):
        compare(data, tmp_path / "out", settings("tiny-llama", losses=["omni_dpo"]), dry_run=True)
    with refused(ConfigError, ("losses", "IPO")):
        compare(data, tmp_path / "out", settings("tiny-llama", losses=["ipo", "ipo"]), dry_run=True)
    assert not (tmp_path / "out").exists()


def _tier(gain, prompts=60):
    """DPO, and MADPO whose held-out log loss is lower by ``gain`` on average."""
    draw = np.random.default_rng(0)
    base = draw.normal(0.6, 0.1, prompts)
    losses = {"dpo": base, "madpo": base - gain + draw.normal(0, 0.05, prompts)}
    parts = [
        pd.DataFrame({"prompt_id": range(prompts), "sample": 0, "log_loss": x, "right": 1.0 * (x < 0.69)}).assign(
            key=key, seed="seed0"
        )
        for key, x in losses.items()
    ]
    samples = pd.concat(parts).reindex(columns=["key", "seed", *SAMPLES, *HELDOUT])
    rows = [Row(key, key.upper(), key.upper(), {"kind": key, "beta": 0.1}, seeds=("seed0",)) for key in losses]
    return measured(Tier("own", rows, samples))


def test_dpo_is_trained_at_half_the_rate_too() -> None:
    rows = {row.key: row for row in rows_of(CompareSettings(model="m"), margins=True)}
    assert list(rows) == ["dpo", "dpo-lr=5e-05", "madpo", "auto"]
    assert [row.learning_rate for row in rows.values()] == [None, 5e-5, None, None]
    settings = CompareSettings(model="m", betas=(0.1, 0.3), other_learning_rates=(2e-4,))
    again = [row for row in rows_of(settings, margins=True) if row.learning_rate == 2e-4]
    assert [row.name for row in again] == [
        f"{m}{b} lr=0.0002" for m in ("DPO", "MADPO", "Auto") for b in ("", " β=0.3")
    ]
    none = rows_of(CompareSettings(model="m", other_learning_rates=()), margins=True)
    assert [row.key for row in none] == ["dpo", "madpo", "auto"]
    with refused(ValueError, "other_learning_rates", "0.0001"):
        CompareSettings(model="m", other_learning_rates=(1e-4,))


MINE = """
from typing import Literal
from madpo.losses import LossConfig

class Mine(LossConfig):
    kind: Literal["mine"] = "mine"
    beta: float = 0.1
    gain: float = 1.0
"""


def test_a_loss_of_ones_own_has_a_curve_over_beta(tmp_path) -> None:
    (tmp_path / "my_file.py").write_text(MINE)
    target = f"{tmp_path}/my_file.py:Mine"

    def rows(*losses):
        return rows_of(CompareSettings(model="m", losses=losses, judge="probe", other_learning_rates=()), margins=True)

    dpo, own = rows(target)[:3], rows(target)[3:]
    assert [row.name.replace("DPO", "Mine (my_file.py)") for row in dpo] == [row.name for row in own]
    assert [row.loss.beta for row in dpo] == [row.loss.loss.beta for row in own] == [0.1, 0.03, 0.3]
    shown = [planned_row({"key": row.key, **row.model_dump(mode="json")}) for row in own]
    assert {row.method for row in shown} == {"Mine (my_file.py)"}
    seen = [replace(row, seeds=("seed0",)) for row in shown]
    tier = measured(Tier("own", seen, pd.concat(samples(row.key, "seed0", np.ones(9), np.ones(9)) for row in seen)))
    (curve,) = frontiers(tier, 0.1).values()
    assert [row.loss["beta"] for row in curve] == [0.03, 0.1, 0.3]
    table = {"kind": "custom", "target": target}
    assert [row.key for row in rows({**table, "parameters": {"beta": 3}})][3:] == ["mine-my-file.py"], (
        "a beta of the user's stays"
    )
    two = rows(target, {**table, "parameters": {"gain": 2}})
    assert two[6].name == "Mine (my_file.py), gain 2"
    (tmp_path / "other.py").write_text(MINE)
    others = rows(target, f"{tmp_path}/other.py:Mine")
    assert len({row.key for row in others}) == len(others) == 9, "two classes of one name are two methods"


def test_the_parts_of_the_pairs_must_leave_some_to_train_on(llama, tmp_path) -> None:
    """A part that the user gives takes none of them."""
    data, heldout = (write(tmp_path / f"{name}.jsonl", text_pairs()) for name in ("pairs", "heldout"))
    how = {"judge": "probe", "judge_share": 0.85, "max_length": None}
    with refused(ConfigError, "eval_share", "judge_share", "1.05"):
        OwnPairsGraph(settings(llama, **how), str(data), None)
    assert OwnPairsGraph(settings(llama, **how), str(data), str(heldout))


def test_no_method_is_drawn_as_the_reference_or_as_another_one() -> None:
    methods = ["DPO", "DPO, learning rate 5e-05", "MADPO", "Auto", "IPO", "Mine"]
    assert len({COLOURS[SFT], *(_colour(method, methods) for method in methods)}) == 1 + len(methods)


@pytest.mark.parametrize("gain", [0.1, 0.0])
def test_the_verdict_follows_the_paired_difference(gain) -> None:
    tier = _tier(gain)
    found = own_verdict(tier)
    assert found.kind == "above"
    assert ("MADPO" in found.level) == (gain > 0)
    assert f"DPO orders {short(tier.baseline['heldout_accuracy'], 'share')}" in found.level


@pytest.mark.parametrize(("kl", "gain", "said"), [(0.03, 0.0, True), (0.03, 2.0, False), (0.2, 0.0, False)])
def test_a_policy_that_hardly_moved_is_trained_more(kl, gain, said) -> None:
    tier = tier_of("own", [row("SFT", 0.0, kl=0.0), row("DPO 0.1", gain, kl=kl, kind="dpo", beta=0.1)])
    verdict = own_verdict(tier)
    assert verdict.kind == ("above" if gain else "open")
    assert ("--learning_rate" in verdict.level) == said
    assert ("nats from the reference" in verdict.level) == said


def test_what_cannot_be_compared_is_named_and_what_was_not_measured_is_not() -> None:
    """Judged responses only, and a loss that moves beyond DPO's curve."""
    dpo = [row(f"DPO {beta}", 1.0 + kl, kl=kl, kind="dpo", beta=beta) for beta, kl in ((0.1, 2.0), (0.3, 1.0))]
    tier = tier_of("own", [row("SFT", 0.0, kl=0.0), *dpo, madpo(7.0, 4.0, 4.0, kl=9.0)])
    names(own_verdict(tier).level, ("MADPO", "9.0 nats"), ("DPO", "2.0"))
    opening = own_opening(tier)
    names(opening, (f"{N} prompts"))
    assert "held-out pairs" not in opening
    closer = tier_of("own", [row("SFT", 0.0, kl=0.0), *dpo, madpo(7.0, 4.0, 4.0, kl=1.5)])
    names(own_verdict(closer).level, "MADPO")
    assert own_verdict(closer).kind == "above"
