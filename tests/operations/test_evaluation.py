"""A policy measured on held-out prompts: against closed forms, and itself against itself."""

import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from madpo.core.errors import ConfigError
from madpo.models.engine import responses
from madpo.models.load import LoRA, build_tiny, load_model, load_tokenizer
from madpo.operations import EvaluateSettings
from madpo.operations import study_evaluation as evaluation
from madpo.operations.evaluation import EvaluateReport
from madpo.operations.responses import distinct
from madpo.operations.study_evaluation import EvaluationStage, evaluate_policy
from madpo.operations.study_pairs import PAIRS
from practice_cases import read
from quick import quick
from refusals import refused


@pytest.fixture(scope="module", params=quick(["llama", "gemma3"], "gemma3"))
def inputs(request, tmp_path_factory):
    """A reference, an adapter on it, and pairs of which the last eight are held out."""
    root = tmp_path_factory.mktemp("study")
    base = build_tiny(request.param, root / "reference" / "model", seed=1)
    tokenizer = load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoRA(rank=4).peft_config("CAUSAL_LM", model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(root / "policy" / "adapter")
    rows = []
    for i, prompt in enumerate(["The film begins", "I watched this movie with", "A good cast", "Nobody"] * 3):
        ids = tokenizer(prompt)["input_ids"]
        row = dict.fromkeys(PAIRS.names, "x") | {key: [3] for key in ("chosen_ids", "rejected_ids")}
        row |= {"pair_id": 50 + i, "prompt": prompt, "prompt_ids": ids, "split": "train" if i < 4 else "heldout"}
        rows.append(row | {"chosen_oracle_reward": 0.0, "rejected_oracle_reward": 0.0})
    (root / "pairs").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), root / "pairs" / "pairs.parquet")
    return {name: root / name for name in ("reference", "policy", "pairs", "oracle")}


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """Full precision, and an oracle that counts letters."""
    monkeypatch.setattr(evaluation, "load_model", lambda place, **kw: load_model(place, dtype=torch.float32, **kw))
    monkeypatch.setattr(evaluation, "load_oracle", lambda folder: lambda p, c: np.array([float(len(x)) for x in c]))


def evaluate(inputs, out, **changes):
    settings = {"method": "DPO", "tier": "high", "max_new_tokens": 10, "seed": 2, "score_batch_size": 3, **changes}
    out.mkdir(exist_ok=True)
    metrics = evaluate_policy(EvaluationStage(**settings), inputs, out)
    return metrics, pd.DataFrame(read(out / "samples.jsonl"))


def test_the_reference_has_no_distance_to_itself(inputs, tmp_path) -> None:
    own = {name: path for name, path in inputs.items() if name != "policy"}
    metrics, samples = evaluate(own, tmp_path / "own")
    assert (samples["kl"] == 0).all()
    assert metrics["kl"] == (0, 0, 0, 8)
    # The same through the full computation: an adapter of zeros.
    model = load_model(inputs["reference"] / "model", dtype=torch.float32)
    model = get_peft_model(model, LoRA().peft_config("CAUSAL_LM", model))
    model.save_pretrained(tmp_path / "zero" / "adapter")
    same, zeros = evaluate({**inputs, "policy": tmp_path / "zero"}, tmp_path / "same")
    assert (zeros["kl"].abs() < 1e-6).all()
    assert list(zeros["response"]) == list(samples["response"])
    assert same["reference_perplexity"] == pytest.approx(metrics["reference_perplexity"])


def test_samples_and_metrics_of_a_policy(inputs, tmp_path) -> None:
    metrics, samples = evaluate(inputs, tmp_path / "a", samples_per_prompt=2)
    expected = ["prompt_id", "sample", "prompt", "response", "tokens", "ended", "oracle_reward", "kl"]
    assert list(samples.columns) == expected
    assert list(samples["prompt_id"]) == list(range(54, 62)) * 2
    assert list(samples["sample"]) == [0] * 8 + [1] * 8
    assert (samples["oracle_reward"] == samples["response"].str.len()).all()
    assert (samples["kl"] > 0).all()
    assert samples["tokens"].between(1, 10).all()
    assert (samples["ended"] | (samples["tokens"] == 10)).all()
    for name, column in (("oracle_reward", "oracle_reward"), ("kl", "kl"), ("length", "tokens")):
        assert metrics[name].mean == pytest.approx(samples[column].mean())
        assert metrics[name].n == 8  # prompts, not responses
    assert metrics["ended_share"] == samples["ended"].mean()
    assert metrics["distinct_2"] == distinct(list(samples["response"]), 2)
    first, second = samples[samples["sample"] == 0], samples[samples["sample"] == 1]
    assert (first["response"].to_numpy() != second["response"].to_numpy()).any()


def test_further_temperatures_leave_the_measurement_as_it_is(inputs, tmp_path) -> None:
    plain, samples = evaluate(inputs, tmp_path / "plain", samples_per_prompt=3)
    metrics, both = evaluate(inputs, tmp_path / "swept", samples_per_prompt=3, temperatures=(0, 0.5, 1))
    assert {name: metrics[name] for name in plain} == plain
    assert set(metrics) - set(plain) == {"oracle_reward_at_0", "oracle_reward_at_0.5"}
    pd.testing.assert_frame_equal(both[both["temperature"].isna()][[*samples]], samples, check_dtype=False)
    for temperature in (0.0, 0.5):
        own = both[both["temperature"] == temperature]
        assert metrics[f"oracle_reward_at_{temperature:g}"].mean == pytest.approx(own["oracle_reward"].mean())
        assert metrics[f"oracle_reward_at_{temperature:g}"].n == 8
        _, single = evaluate(inputs, tmp_path / f"at{temperature}", temperature=temperature, samples_per_prompt=3)
        assert list(own["response"]) == list(single["response"])
    greedy = both[both["temperature"] == 0].groupby("prompt_id")["response"].nunique()
    assert (greedy == 1).all()


@pytest.mark.parametrize("count", [1, 3])
def test_kl_and_perplexity_equal_a_loop_over_tokens(inputs, tmp_path, monkeypatch, count) -> None:
    seen = []
    original = responses.generate
    monkeypatch.setattr(responses, "generate", lambda m, p, **kw: (seen.append((p, r := original(m, p, **kw))), r)[1])
    metrics, samples = evaluate(inputs, tmp_path / "a", samples_per_prompt=count)
    reference = load_model(inputs["reference"] / "model", dtype=torch.float32)
    policy = load_model(inputs["reference"] / "model", dtype=torch.float32, adapter=inputs["policy"] / "adapter")
    logps = 0.0
    ((prompts, drawn),) = seen
    written = [(prompt, drawn[i * count + k]) for k in range(count) for i, prompt in enumerate(prompts)]
    for row, (prompt, response) in zip(samples.itertuples(), written, strict=True):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (policy, reference))
        where = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        assert row.kl == pytest.approx(sum((p[i].exp() * (p[i] - q[i])).sum().item() for i in where), abs=1e-4)
        logps += sum(q[i, ids[0, i + 1]].item() for i in where)
    assert metrics["reference_perplexity"] == pytest.approx(math.exp(-logps / samples["tokens"].sum()), rel=1e-5)


def test_the_same_seed_gives_the_same_file_and_fewer_prompts_a_part_of_it(inputs, tmp_path) -> None:
    _, whole = evaluate(inputs, tmp_path / "a")
    evaluate(inputs, tmp_path / "b")
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == (tmp_path / "b" / "samples.jsonl").read_bytes()
    _, few = evaluate(inputs, tmp_path / "c", prompts=3, batch_size=2)
    assert list(few["response"]) == list(whole["response"].iloc[:3])
    _, other = evaluate(inputs, tmp_path / "d", seed=3)
    assert list(other["response"]) != list(whole["response"])


def test_more_prompts_than_are_held_out(inputs, tmp_path) -> None:
    with refused(ConfigError, "prompts", "9", "8"):
        evaluate(inputs, tmp_path / "a", prompts=9)


def test_distinct_counts_words() -> None:
    assert distinct(["a b a", "A c"], 1) == 3 / 5
    assert distinct(["a b a b", "b a"], 2) == 2 / 4  # no pair of words across two texts
    assert distinct(["one", ""], 2) == 0.0


@pytest.mark.parametrize(
    ("changes", "doubts"), [({}, 0), ({"temperature": 0.5}, 1), ({"top_p": 0.9}, 1), ({"top_k": 5}, 1)]
)
def test_a_kl_along_other_than_the_policys_own_responses_is_doubted(changes, doubts):
    settings = EvaluateSettings(reward_model="rm", **changes)
    assert len(EvaluateReport.model_construct(settings=settings).doubts()) == doubts
