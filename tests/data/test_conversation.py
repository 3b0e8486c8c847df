"""Tool calls, reasoning, names and tools: rendered as TRL does, by the templates of known models, or refused."""

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOTrainer

from madpo.core.errors import DataError
from madpo.data import check, load_preferences
from madpo.data.conversation import Conversation
from madpo.data.findings import digest
from madpo.data.folds import prompt_key
from madpo.data.texts import read_texts
from practice_cases import write
from refusals import refused

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def call(city: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city, **more}}}


def says(content: str = "", **keys: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content, **keys}]


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "a city"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Weather of a city", "parameters": PARAMETERS},
    }
]
ASK = [{"role": "user", "content": "Weather in Rome?"}]
CALLS = {
    "prompt": ASK,
    "chosen": says(tool_calls=[call("Rome")]),
    "rejected": says(tool_calls=[call("Paris")]),
    "tools": TOOLS,
}
RESULT = {
    "prompt": [*ASK, *says(tool_calls=[call("Rome")]), {"role": "tool", "name": "weather", "content": "sunny"}],
    "chosen": says("It is sunny."),
    "rejected": says("It rains."),
    "tools": json.dumps(TOOLS),
}
THOUGHT = {
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "chosen": says("4.", reasoning_content="Two and two."),
    "rejected": says("4.", reasoning_content="A guess."),
    "chat_template_kwargs": {"enable_thinking": True},
}


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama)


def with_template(tokenizer: Any, name: str) -> Any:
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize(
    ("template", "row"),
    [
        *(("qwen3", row) for row in (CALLS, RESULT, THOUGHT)),
        (
            "qwen3",
            THOUGHT
            | {"chosen": says("4."), "rejected": says("5."), "chat_template_kwargs": {"enable_thinking": False}},
        ),
        ("gptoss", THOUGHT),
        ("gptoss", {**THOUGHT, "chosen": says("4.", thinking="Two and two."), "rejected": says("5.", thinking="Hm.")}),
        ("llama3_1", CALLS),
        ("qwen3_5_think", RESULT),
    ],
)
def test_token_ids_are_those_of_trl(template: str, row: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = with_template(tokenizer, template)
    options = SimpleNamespace(dataset_num_proc=None, max_length=None)
    expected = DPOTrainer._prepare_dataset(SimpleNamespace(), Dataset.from_list([row]), tokenizer, options, "train")[0]
    data = write(tmp_path / "d.jsonl", [row])
    (found,) = load_preferences(data, tokenizer=tokenizer)
    assert found["prompt_ids"] == expected["prompt_ids"]
    for side in ("chosen_ids", "rejected_ids"):  # white space after the end token is left out, or one is added
        ids = found[side][:-1]
        assert ids == expected[side][: len(ids)]
        assert len(expected[side]) - len(ids) <= 2
    # The rows themselves are what the trainer renders in the same way.
    (plain,) = load_preferences(data)
    again = DPOTrainer._prepare_dataset(SimpleNamespace(), Dataset.from_list([plain]), tokenizer, options, "train")[0]
    assert all(again[name] == expected[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


def test_what_the_template_shows_is_what_the_check_shows(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = with_template(tokenizer, "qwen3")
    report = check(write(tmp_path / "d.jsonl", [CALLS, RESULT]), tokenizer=tokenizer)
    assert '"name": "weather"' in report.rendered[0]
    assert "<tool_call>" in report.rendered[0].split(" | ")[-1]
    assert "<tool_response>" in report.rendered[1]
    assert report.ignored == ()
    assert report.count("empty_completion") == 0


@pytest.mark.parametrize(
    ("template", "row", "named"),
    [
        ("phi3", CALLS, [("tools", "1 entries"), "chat_template.jinja"]),
        ("phi3", {k: v for k, v in CALLS.items() if k != "tools"}, [("tool_calls", "chosen", "1 entries")]),
        ("phi3", RESULT | {"tools": None}, [("tool_calls", "prompt")]),
        ("qwen2_5", THOUGHT, [("reasoning_content", "chosen", "'Two and two.'"), "chat_template.jinja"]),
        ("qwen3", CALLS | {"chosen": says(functions="[1]")}, ["chosen[0].functions"]),
        ("qwen3", CALLS | {"chosen": says(tool_calls="[{")}, ["chosen[0].tool_calls", "JSON"]),
        ("qwen3", CALLS | {"tools": {"name": "weather"}}, ["tools", "JSON"]),
        ("qwen3", CALLS | {"chat_template_kwargs": [1]}, [("chat_template_kwargs", "1 entries")]),
        ("qwen3", CALLS | {"chat_template_kwargs": {"tokenize": True}}, [("chat_template_kwargs", "'tokenize'")]),
        ("qwen3", THOUGHT | {"chosen": says("4.", reasoning_content=3)}, [("chosen[0].reasoning_content", "3")]),
        ("qwen3", THOUGHT | {"chosen": says("4.", reasoning_content="\ud83d")}, ["chosen[0].reasoning_content"]),
    ],
)
def test_what_the_template_leaves_out_or_cannot_be_given_is_refused(
    template: str, row: dict[str, Any], named: list[Any], tokenizer: Any, tmp_path: Path
) -> None:
    data = write(tmp_path / "d.jsonl", [THOUGHT | {"chat_template_kwargs": None} if template == "qwen3" else TEXT, row])
    tokenizer = with_template(tokenizer, template)
    for reading in (load_preferences, check):
        with refused(DataError, "d.jsonl", "line 2", *named):
            reading(data, tokenizer=tokenizer)


TEXT = {"prompt": ASK, "chosen": says("Good."), "rejected": says("Bad.")}


def test_old_thoughts_and_names_that_are_left_out_are_findings(tokenizer: Any, tmp_path: Path) -> None:
    named = TEXT | {"prompt": [ASK[0] | {"name": "Ann"}]}
    turns = TEXT | {"prompt": [*ASK, *says("Sunny.", reasoning_content="Hm, hm."), *ASK]}
    report = check(write(tmp_path / "d.jsonl", [named, turns, RESULT]), tokenizer=with_template(tokenizer, "qwen3"))
    (finding,) = (f for f in report.findings if f.kind == "dropped_content")
    assert finding.count == 2
    assert [example.split(": ", 1)[1] for example in finding.examples] == [
        "name of prompt: 'Ann'",
        "reasoning_content of prompt: 'Hm, hm.'",
    ]


def test_a_table_shows_no_arguments_of_other_rows(tokenizer: Any, tmp_path: Path) -> None:
    """Arrow gives every call the keys of all calls; what was not given is not shown."""
    rows = [CALLS, CALLS | {"chosen": says(tool_calls=[call("Rome", day="Monday")])}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    tokenizer = with_template(tokenizer, "qwen3")
    expected = [row["chosen_ids"] for row in load_preferences(write(tmp_path / "d.jsonl", rows), tokenizer=tokenizer)]
    for data in (tmp_path / "d.parquet", tmp_path / "saved"):
        assert [row["chosen_ids"] for row in load_preferences(data, tokenizer=tokenizer)] == expected


def test_tools_and_calls_make_another_prompt() -> None:
    plain, other = Conversation(ASK), Conversation(ASK, {"tools": TOOLS})
    assert len({prompt_key(p) for p in (plain, other, ASK)}) == len({digest(p) for p in (plain, other, ASK)}) == 2
    assert digest(says()) != digest(says(tool_calls=[call("Rome")])) != digest(says(tool_calls=[call("Paris")]))
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other)), other.__add__([])):
        assert (list(copied), copied.columns) == (ASK, {"tools": TOOLS})


def test_a_corpus_of_conversations_keeps_its_tools(tmp_path: Path) -> None:
    ((_, text),) = read_texts(write(tmp_path / "c.jsonl", [{"messages": [*ASK, *CALLS["chosen"]], "tools": TOOLS}]))
    assert isinstance(text, Conversation)
    assert text.options == {"tools": TOOLS}
    assert text[-1]["tool_calls"] == [call("Rome")]
