"""Columns next to a pair that belong to the prompt: joined the way their layout means, or refused, never dropped."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from madpo.core.errors import DataError
from madpo.data import check, load_preferences
from madpo.data.messages import contents
from madpo.data.prompts import KNOWN
from madpo.data.texts import read_texts
from madpo.operations import ScoreSettings, score
from madpo.operations.inputs import read_prompts
from practice_cases import read, write
from refusals import names, refused


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TEXTS = {"chosen": "The Po.", "rejected": "Italy."}
MESSAGES = {"chosen": [assistant("The Po.")], "rejected": [assistant("Italy.")]}
WHOLE = {side: [user("Name a river."), *said] for side, said in MESSAGES.items()}
ASKED = [user("Name a river.")]
BEFORE = [user("Hi"), assistant("Hello!")]

LAYOUTS: dict[str, tuple[dict[str, Any], Any]] = {
    "alpaca": (TEXTS | {"instruction": "Answer.", "input": "Name a river."}, "Answer.\nName a river."),
    "alpaca without input": (TEXTS | {"instruction": "Answer.", "input": ""}, "Answer."),
    "alpaca with a blank instruction": (TEXTS | {"instruction": "", "input": "Name a river."}, "Name a river."),
    "alpaca with a system prompt": (
        TEXTS | {"instruction": "Answer.", "input": "Name a river.", "system": "Be brief."},
        "Be brief.\n\nAnswer.\nName a river.",
    ),
    "alpaca with turns": (
        TEXTS | {"instruction": "Name a river.", "input": "", "system": "Be brief.", "history": [["Hi", "Hello!"]]},
        [SYSTEM, *BEFORE, *ASKED],
    ),
    "alpaca with a history that nobody uses": (
        TEXTS | {"instruction": "Name a river.", "input": "", "history": []},
        "Name a river.",
    ),
    "dolly": (TEXTS | {"instruction": "Answer.", "context": "Rivers of Italy."}, "Answer.\nRivers of Italy."),
    "orca": (TEXTS | {"system": "Be brief.", "question": "Name a river."}, "Be brief.\n\nName a river."),
    "orca with an empty system prompt": (TEXTS | {"system": "", "question": "Name a river."}, "Name a river."),
    "icr": (TEXTS | {"system": "Be brief.", "input": "Name a river."}, "Be brief.\n\nName a river."),
    "argilla": (
        {"chosen_response": "The Po.", "rejected_response": "Italy.", "system": "Be brief.", "instruction": "Name."},
        "Be brief.\n\nName.",
    ),
    "ultra": (WHOLE | {"system": "Be brief.", "prompt": "Name a river."}, [SYSTEM, *ASKED]),
    "a conversation and its answers": (MESSAGES | {"messages": [*BEFORE, *ASKED]}, [*BEFORE, *ASKED]),
    "conversations and a system prompt": (
        MESSAGES | {"conversations": [*BEFORE, *ASKED], "system": "Be brief."},
        [SYSTEM, *BEFORE, *ASKED],
    ),
    "one message on each side": (
        {"messages": [*BEFORE, *ASKED]} | {side: said[0] for side, said in MESSAGES.items()},
        [*BEFORE, *ASKED],
    ),
    "context as a conversation": (MESSAGES | {"context": ASKED}, ASKED),
    "history as messages": (MESSAGES | {"prompt": "Name a river.", "history": BEFORE}, [*BEFORE, *ASKED]),
    "messages as a copy of a side": (WHOLE | {"messages": WHOLE["chosen"]}, ASKED),
    "a copy next to a prompt": (WHOLE | {"prompt": "Name a river.", "messages": WHOLE["chosen"]}, ASKED),
    "the instruction inside the prompt": (
        TEXTS | {"prompt": "### Instruction:\nName a river.\n", "instruction": "Name a river."},
        "### Instruction:\nName a river.\n",
    ),
    "the system prompt is there already": (
        {side: [SYSTEM, *said] for side, said in WHOLE.items()} | {"system": "Be brief."},
        [SYSTEM, *ASKED],
    ),
    "the history is there already": (MESSAGES | {"prompt": [*BEFORE, *ASKED], "history": [["Hi", "Hello!"]]},
                                     [*BEFORE, *ASKED]),
}  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_prompt_of_a_known_layout(layout: str, form: str, tmp_path: Path) -> None:
    row, prompt = LAYOUTS[layout]
    path = tmp_path / f"d.{form}"
    if form == "jsonl":
        write(path, [row, row])
    else:
        pq.write_table(pa.Table.from_pylist([row, row]), path)
    found = load_preferences(path)
    assert [pair["prompt"] for pair in found] == [prompt, prompt]
    texts = [text for side in ("chosen", "rejected") for text in contents(found[0][side])]
    assert texts == ["The Po.", "Italy."]
    # What prompts are read from, and what a vocabulary is cut for, are the same texts.
    if any(name in row for name in ("prompt", "instruction", "question", "input", "messages", "conversations")):
        bare = {name: value for name, value in row.items() if not name.startswith(("chosen", "rejected"))}
        if bare.get("messages") != WHOLE["chosen"] and "ultra" not in layout:
            asked = read_prompts(write(tmp_path / "p.jsonl", [bare]))[0].content
            given = found[0]["prompt"]
            assert asked == given or contents(asked) == contents(given)
    for (_, whole), side in zip(read_texts(path), ("chosen", "rejected"), strict=False):
        assert contents(whole) == contents(found[0]["prompt"] + found[0][side])


def test_the_check_names_the_columns_of_the_prompt(tmp_path: Path) -> None:
    row = LAYOUTS["alpaca with turns"][0]
    report = check(write(tmp_path / "d.jsonl", [row | {"source": "s"}]))
    assert report.prompt_columns == ("system", "history", "instruction", "input")
    assert report.ignored == ("source",)
    names(report.text(), ("'system'", "'history'", "'instruction'", "'input'"))
    assert "'prompt'" not in check(write(tmp_path / "e.jsonl", [TEXTS | {"prompt": "a"}])).text()


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (TEXTS | {"prompt": "Answer.", "input": "Name one."}, [("input", "'Name one.'"), "--columns.ignore input"]),
        (TEXTS | {"question": "Name one.", "context": "Rivers."}, [("context", "'Rivers.'"), "--columns.prompt"]),
        (
            TEXTS | {"prompt": "Name one.", "documents": [{"title": "A", "text": "Po"}]},
            [("documents", "1 entries")],
        ),
        (TEXTS | {"prompt": "Name one.", "persona": "a pirate"}, [("persona", "'a pirate'")]),
        (TEXTS | {"prompt": "Name one.", "history": "Hi. Hello!"}, [("history", "'Hi. Hello!'")]),
        (TEXTS | {"prompt": "Name one.", "history": [["Hi"]]}, [("history[0]", "1 entries")]),
        (TEXTS | {"prompt": "Name one.", "system": 3}, [("system", "3")]),
        (MESSAGES | {"prompt": [SYSTEM, *ASKED], "system": "Be long."}, [("'Be brief.'", "'Be long.'")]),
        (WHOLE | {"messages": [SYSTEM, *WHOLE["chosen"]]}, [("messages", "3 entries"), "--columns.ignore messages"]),
        (MESSAGES | {"messages": ASKED, "prompt": "Another?"}, [("messages", "1 entries"), "--columns.prompt"]),
        (TEXTS | {"instruction": ASKED, "input": "Rivers"}, [("instruction", "input")]),
        (TEXTS | {"history": [["Hi", "Hello!"]]}, ["history"]),
    ],
)
def test_context_that_nothing_joins_is_refused_by_row_and_column(
    row: dict[str, Any], named: list[Any], tmp_path: Path
) -> None:
    blank = {name: None for name in row if name in KNOWN and name not in ("prompt", "question", "instruction")}
    with refused(DataError, "d.jsonl", "line 2", *named):
        load_preferences(write(tmp_path / "d.jsonl", [row | blank, row]))
    # The remedy works: without the column the row is read.
    load_preferences(write(tmp_path / "e.jsonl", [{k: v for k, v in row.items() if k not in blank}]))


def test_columns_of_the_prompt_may_be_missing_in_some_rows(tmp_path: Path) -> None:
    rows = [TEXTS | {"question": "a"}, TEXTS | {"question": "b", "system": "S"}, TEXTS | {"question": "c"}]
    assert [row["prompt"] for row in load_preferences(write(tmp_path / "d.jsonl", rows))] == ["a", "S\n\nb", "c"]
    later = TEXTS | {"instruction": "a", "question": "b"}
    with refused(DataError, "d.jsonl", "line 2", "'instruction'"):
        load_preferences(write(tmp_path / "d.jsonl", [rows[0], later]))


def test_turns_in_any_row_make_messages_of_all(tmp_path: Path) -> None:
    rows = [TEXTS | {"prompt": str(i), "history": [["Hi", "Hello!"]] if i == 2 else []} for i in range(3)]
    for pairs in (
        load_preferences(write(tmp_path / "d.jsonl", rows)),
        load_preferences(_parquet(tmp_path / "d.parquet", rows)),
    ):
        assert [pair["prompt"] for pair in pairs] == [[user("0")], [user("1")], [*BEFORE, user("2")]]
        assert pairs[0]["chosen"] == MESSAGES["chosen"]


def _parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("layout", ["alpaca with a system prompt", "alpaca with turns", "orca", "ultra"])
def test_scored_rows_hold_the_joined_prompt_once(layout: str, tmp_path: Path) -> None:
    row, prompt = LAYOUTS[layout]
    rows = [row | {"a": 2.0, "b": 1.0, "source": "s"}] * 2
    how = ScoreSettings(score_columns=("a", "b"), margin_temperature=1.0)
    score(write(tmp_path / "d.jsonl", rows), tmp_path / "S", how)
    scored = tmp_path / "S" / "scored.jsonl"
    assert [line["prompt"] for line in read(scored)] == [prompt, prompt]
    assert read(scored)[0]["source"] == "s"
    assert [pair["prompt"] for pair in load_preferences(scored)] == [prompt, prompt]


def completions(*systems: str) -> dict[str, Any]:
    entries = [
        {"response": text, "overall_score": value, "custom_system_prompt": system}
        for (text, value), system in zip((("The Po.", 5.0), ("Italy.", 1.0)), systems, strict=True)
    ]
    return {"instruction": "Name a river.", "completions": entries}


def test_system_prompts_of_ranked_responses_are_joined_or_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [completions("Be brief.", "Be brief."), completions("Be brief.", "Be long.")])
    assert [pair["prompt"] for pair in load_preferences(path)] == ["Be brief.\n\nName a river.", "Name a river."]
    assert {f.kind: f.count for f in check(path).findings} == {"system_prompts": 1}


_WORDS = st.sampled_from(["w1", "w2 w3", "", "w4\nw5"])
_VALUES = st.one_of(
    _WORDS,
    st.none(),
    st.lists(st.tuples(_WORDS, _WORDS).map(list), max_size=2),
    st.lists(st.builds(user, _WORDS), max_size=2),
)


@given(row=st.dictionaries(st.sampled_from(KNOWN), _VALUES, max_size=4), whole=st.booleans())
def test_no_text_of_a_known_column_is_ever_lost(tmp_path_factory: Any, row: dict[str, Any], whole: bool) -> None:
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    path.write_text(json.dumps(row | (WHOLE if whole else TEXTS)) + "\n")
    try:
        (pair,) = load_preferences(path)
    except DataError:
        return
    there = "\n".join(text for side in ("prompt", "chosen", "rejected") for text in contents(pair[side]))
    words = {word for value in row.values() for word in ("w1", "w2 w3", "w4\nw5") if word in _flat(value)}
    # A prompt that the whole conversations do not hold is no loss without a word.
    assert all(word in there for word in words) or check(path).count("prompt_mismatch") == 1, (row, pair)


def _flat(value: Any) -> str:
    if isinstance(value, list):
        return "|".join(map(_flat, value))
    return _flat(value["content"]) if isinstance(value, dict) else str(value)
