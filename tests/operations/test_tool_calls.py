"""MADPO on tool calls, from the raw rows to an evaluation, by commands only."""

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from madpo.data import check
from practice_cases import read, run, write

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": {}}}]
CITIES = ("Rome", "Paris", "Oslo", "Lima")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]


def calls(city: str) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}]


@pytest.fixture
def model(llama: Path) -> Path:
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    (llama / "chat_template.jinja").write_text(template.read_text())
    return llama


def test_madpo_on_tool_calls_end_to_end(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Weather in {CITIES[i % 4]} on day {i}?"}],
            "chosen": calls(CITIES[i % 4]),
            "rejected": calls(CITIES[(i + 1) % 4]),
            "tools": TOOLS if i % 2 else json.dumps(TOOLS),
            "chat_template_kwargs": {"enable_thinking": False},
        }
        for i in range(12)
    ]
    data, out = write(tmp_path / "calls.jsonl", rows), tmp_path / "out"
    few = ("--learning_rate", "1e-2", "--epochs", 1, "--batch_size", 4)
    run("check", data, "--model_name_or_path", model)
    said = capsys.readouterr().out
    assert "12 pairs" in said
    assert "<tool_call>" in said
    assert [finding.kind for finding in check(data, tokenizer=model).findings] == ["missing_end"]
    run("reward", data, "--model_name_or_path", model, "--eval_share", 0.5, *few, "--output_dir", out / "rm")
    run("score", data, "--reward_model", out / "rm", "--output_dir", out / "scored")
    scored = read(out / "scored" / "scored.jsonl")
    assert [{name: row[name] for name in rows[0]} for row in scored] == [
        row | {side: [row[side][0] | {"content": ""}] for side in ("chosen", "rejected")} for row in rows
    ]
    scored_data = out / "scored" / "scored.jsonl"
    run("inspect", scored_data, "--output", out / "margins.html")
    assert "tool_calls" in (out / "margins.html").read_text()
    where = ("--model_name_or_path", model, "--loss", "madpo")
    run("train", scored_data, *where, *few, "--output_dir", out / "policy")
    assert any("weight/mean" in row for row in read(out / "policy" / "log.jsonl"))
    prompts = write(tmp_path / "prompts.jsonl", [{k: row[k] for k in ("prompt", "tools")} for row in rows[:4]])
    to = ("--reward", out / "rm", "--max_new_tokens", 4, "--output_dir", out / "evaluation")
    run("evaluate", out / "policy", "--prompts", prompts, *to)
    assert len(read(out / "evaluation" / "samples.jsonl")) == 4
    tuned = ("--trials", 1, "--folds", 2, "--space.loss.tau", "[3]", "--output_dir", out / "tuned")
    run("tune", scored_data, *where, *few, *tuned)


def test_both_commands_and_trainer_see_the_same_tokens(model: Path, tmp_path: Path) -> None:
    """The row's reference columns, computed by the trainer from messages, are those of the command's tokens."""
    from datasets import Dataset

    from madpo import DPO, PreferenceConfig, PreferenceTrainer
    from madpo.data import load_preferences

    row = {"prompt": [{"role": "user", "content": "Rome?"}], "chosen": calls("Rome"), "rejected": calls("Paris")}
    data = write(tmp_path / "d.jsonl", [row | {"tools": json.dumps(TOOLS)}])
    tokenizer = AutoTokenizer.from_pretrained(model)
    args = PreferenceConfig(output_dir=str(tmp_path / "out"), report_to="none")
    (plain,), (encoded,) = load_preferences(data), load_preferences(data, tokenizer=tokenizer)
    kept = {name: encoded[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    found = [
        PreferenceTrainer(str(model), args=args, loss=DPO(), train_dataset=Dataset.from_list([each])).train_dataset[0]
        for each in (plain, kept)
    ]
    assert found[0]["prompt_ids"] == found[1]["prompt_ids"]
    for side in ("chosen", "rejected"):
        common = found[1][f"{side}_ids"][:-1]
        assert found[0][f"{side}_ids"][: len(common)] == common
