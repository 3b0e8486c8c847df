"""Public layouts of preference data, with their real columns: every pair is read as its publisher means it."""

import csv
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layout_cases import ASK, BAD, CASES, GOOD, NEXT, TEXT
from layout_table import PAGE, table
from madpo.commands.cli import main
from madpo.core.config import identity_settings
from madpo.core.errors import ConfigError, DataError
from madpo.core.layout import Layout
from madpo.data import check, load_preferences
from madpo.data.texts import read_texts
from madpo.operations import ScoreSettings, score
from madpo.operations.inputs import read_prompts, tell_unused_template
from practice_cases import read, write
from refusals import names, refused

FORMS = ("jsonl", "json", "parquet", "csv")


def written(folder: Path, rows: list[dict[str, Any]], form: str = "jsonl") -> Path:
    path = folder / f"d.{form}"
    if form == "jsonl":
        return write(path, rows)
    if form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def pairs(path: Path, columns: Any = None) -> list[tuple[Any, Any, Any]]:
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in load_preferences(path, columns=columns)]


@pytest.mark.parametrize("name", CASES)
def test_a_public_layout_is_read_as_meant(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for form in FORMS:
        if form == "csv" and not case.flat:
            continue
        path = written(tmp_path, case.rows, form)
        assert pairs(path) == case.pairs, form
        report = check(path)
        assert {f.kind: f.count for f in report.findings if f.kind in LEFT_OUT} == case.left_out
        assert [(m.name, m.mean) for m in report.reward_margins] == ([case.margin] if case.margin else []), form
        assert "None" not in report.text()
    assert "reward_margin" not in load_preferences(path)[0], "a strength is never used without being asked for"


LEFT_OUT = ("tie", "no_winner", "no_completion", "unpaired", "unranked")


@pytest.mark.parametrize("name", CASES)
def test_what_was_scored_holds_the_same_pairs(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    rows = [row | {"x": 2.0, "y": 1.0} for row in case.rows]
    path = written(tmp_path, rows)
    score(path, tmp_path / "S", ScoreSettings(score_columns=("x", "y"), margin_temperature=1.0))
    scored = tmp_path / "S" / "scored.jsonl"
    assert pairs(scored) == case.pairs
    assert [row["reward_margin"] for row in read(scored)] == [1.0] * len(case.pairs)
    texts = [text for _, text in read_texts(scored)]
    assert len(texts) == 2 * len(case.pairs)


def test_the_page_of_layouts_is_that_of_the_table() -> None:
    assert table() in PAGE.read_text(), "run tests/cases/layout_table.py"


# Layouts that nobody has published


@pytest.mark.parametrize(
    ("row", "strength"),
    [
        ({"question": ASK, "answer_left": BAD, "answer_right": GOOD, "winner": "right"}, None),
        ({"Prompt": ASK, "Response A": GOOD, "Response B": BAD, "Preference": "Response A"}, None),
        ({"prompt": ASK, "responseA": BAD, "responseB": GOOD, "preferred": "b"}, None),
        ({"prompt": ASK, "chosenResponse": GOOD, "rejectedResponse": BAD}, None),
        ({"prompt": ASK, "completion_1": GOOD, "completion_2": BAD, "score_1": 5, "score_2": 3}, 2.0),
        ({"prompt": ASK, "outputs": [BAD, GOOD], "rewards": [0.5, 1.5]}, 1.0),
        ({"prompt": ASK, "candidates": [BAD, GOOD], "ranking": [2, 1]}, 1.0),
        ({"prompt": ASK, "responses": [{"text": BAD, "reward": 1}, {"text": GOOD, "reward": 3}]}, 2.0),
        ({"prompt": ASK, "preferred": GOOD, "dispreferred": BAD}, None),
        ({"prompt": ASK, "generation_a": GOOD, "generation_b": BAD, "winner": "[[A]]"}, None),
        ({"prompt": ASK, "response_a": {"text": GOOD}, "response_b": {"text": BAD}, "winner": "a"}, None),
        ({"prompt": ASK, "response_a": BAD, "response_b": GOOD, "winner_a": False, "winner_b": True}, None),
        ({"prompt": ASK, "responses": [BAD, GOOD], "chosen": 1}, None),
        ({"prompt": ASK, "response_1": GOOD, "response_2": BAD, "preference_strength": "-2"}, 2.0),
        ({"prompt": ASK, "output": "x", "candidates": [{"text": BAD, "score": 1}, {"text": GOOD, "score": 3}]}, 2.0),
    ],
)
def test_other_names_are_recognised_by_what_they_say(
    row: dict[str, Any], strength: float | None, tmp_path: Path
) -> None:
    try:
        path = written(tmp_path, [row])
        assert pairs(path) == [TEXT]
        assert [m.mean for m in check(path).reward_margins] == ([] if strength is None else [strength])
    except DataError as caught:
        columns = proposed(str(caught))[0]
        assert pairs(path, columns) == [TEXT]


def test_two_layouts_that_fit_are_refused_until_one_is_named(tmp_path: Path) -> None:
    row = {"prompt": ASK, "response_a": GOOD, "response_b": BAD, "winner": "a"}
    row |= {"responses": [BAD, GOOD, "?"], "scores": [3, 1, 2], "answer_a": BAD, "answer_b": GOOD}
    path = written(tmp_path, [row])
    with refused(DataError, "d.jsonl", "'prompt'", "'response_a'") as caught:
        load_preferences(path)
    first, second = proposed(str(caught.value))
    assert pairs(path, first) == [TEXT]
    assert pairs(path, second) == [(ASK, BAD, GOOD)]


def test_another_label_is_named_and_can_be_taken(tmp_path: Path) -> None:
    path = written(tmp_path, CASES["PKU-Alignment/PKU-SafeRLHF"].rows)
    report = check(path)
    assert "safer_response_id" in report.ignored
    assert report.other_labels == ("safer_response_id",)
    assert "--columns.label safer_response_id" in report.text()
    assert pairs(path, {"label": "safer_response_id"}) == [(ASK, BAD, GOOD), TEXT]


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.margin and case.margin[0] != "chosen_score - rejected_score"]
)
def test_a_strength_becomes_the_margin_when_it_is_asked_for(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    assert case.margin is not None
    path = written(tmp_path, case.rows)
    (candidate,) = check(path).reward_margins
    option = re.search(r"--columns\.reward_margin (.*)", candidate.remedy)
    assert option is not None
    (value,) = shlex.split(option[1])
    margins = [row["reward_margin"] for row in load_preferences(path, columns={"reward_margin": value})]
    assert sum(margins) / len(margins) == case.margin[1]
    assert min(margins) > 0


def test_good_and_bad_rows_pair_wherever_they_are(tmp_path: Path) -> None:
    rows = [
        {"prompt": str(i % 7), "completion": f"{good} {i}", "label": good}
        for i, good in enumerate([True] * 21 + [False] * 14)
    ]
    found = pairs(written(tmp_path, rows))
    assert sorted(prompt for prompt, _, _ in found) == sorted([str(i) for i in range(7)] * 2)
    assert all(c.startswith("True") and r.startswith("False") for _, c, r in found)
    assert check(written(tmp_path, rows)).count("unpaired") == 7


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=30))
def test_of_scored_rows_the_best_and_the_worst_make_a_pair(tmp_path_factory: Any, dealt: list[tuple[int, int]]) -> None:
    rows = [{"prompt": f"p{p}", "response": f"r{i}", "rating": s} for i, (p, s) in enumerate(dealt)]
    path = written(tmp_path_factory.mktemp("d"), rows)
    expected = {}
    for prompt in {row["prompt"] for row in rows}:
        own = [row for row in rows if row["prompt"] == prompt]
        best, worst = max(own, key=lambda r: r["rating"]), min(own, key=lambda r: r["rating"])
        if best["rating"] > worst["rating"]:
            expected[prompt] = (best["response"], worst["response"])
    if expected:
        assert {p: (c, r) for p, c, r in pairs(path)} == expected
    else:
        with refused(DataError, path, "prompt"):
            load_preferences(path)


# Columns by option

OWN = {"question": ASK, "best": GOOD, "worse": BAD, "n": 1}
OPTIONS = ["--columns.prompt", "question", "--columns.chosen", "best", "--columns.rejected", "worse"]


def test_columns_are_named_by_option_table_file_and_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [OWN | {"question": f"{ASK} {i}"} for i in range(4)]
    path = written(tmp_path, rows)
    layout = tmp_path / "my.toml"
    layout.write_text('prompt = "question"\nchosen = "best"\nrejected = "worse"\n')
    config = tmp_path / "config.toml"
    config.write_text('[layout]\nprompt = ["question"]\nchosen = "best"\nrejected = "worse"\n')
    for words in (OPTIONS, ["--layout", str(layout)], ["--config", str(config)]):
        assert main(["check", str(path), *words]) == 0
        names(capsys.readouterr().out, "4 pairs", "4 different")
    for columns in (
        layout,
        str(layout),
        {"prompt": "question", "chosen": "best", "rejected": "worse"},
        Layout(chosen="best", rejected="worse"),
    ):
        assert pairs(path, columns)[0] == (f"{ASK} 0", GOOD, BAD)
    assert [p.content for p in read_prompts(path, columns={"prompt": "question"})] == [row["question"] for row in rows]
    words = ["--score_columns", "n", "n", "--margin_temperature", "1", "--output_dir", str(tmp_path / "S")]
    assert main(["score", str(path), *OPTIONS, *words]) == 0
    assert pairs(tmp_path / "S" / "scored.jsonl")[0] == (f"{ASK} 0", GOOD, BAD)


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"chosen": "best"}, ["columns.rejected"]),
        ({"chosen": "best", "rejected": "worse", "sides": "a,b"}, [("chosen", "rejected", "sides")]),
        ({"sides": "a"}, [("sides", "'a'")]),
        ({"chosn": "best"}, ["'chosn'", "'chosen'"]),
        ("kto2", [("layout", "'kto2'"), "'kto'"]),
    ],
)
def test_a_layout_that_does_not_fit_itself_is_one_sentence(columns: Any, named: list[Any], tmp_path: Path) -> None:
    with refused(ConfigError, *named):
        load_preferences(written(tmp_path, [OWN]), columns=columns)


# Every remedy works


def proposed(sentence: str) -> list[dict[str, str]]:
    """The options that a refusal proposes, one table for each alternative."""
    found = []
    for part in re.split(r", or (?=--)", sentence):
        if "--columns." not in part:
            continue
        words = shlex.split(part[part.index("--columns.") :].removesuffix(")"))
        options = {}
        while words and words[0].startswith("--columns."):
            options[words[0].removeprefix("--columns.")] = words[1].rstrip(",;")
            words = words[2:]
        found.append(options)
    return found


REFUSED: dict[str, tuple[list[dict[str, Any]], tuple[Any, Any, Any]]] = {
    "good and bad": ([{"question": ASK, "good": GOOD, "bad": BAD}], TEXT),
    "best and worse": ([OWN], TEXT),
    "positive and negative, a prompt of another name": ([{"ask": ASK, "positive": GOOD, "negative": BAD}], TEXT),
    "near names": ([{"prompt": ASK, "choosen": GOOD, "rejecte": BAD}], TEXT),
    "names with spaces": ([{"the prompt": ASK, "good one": GOOD, "it's bad": BAD}], TEXT),
    "names that say nothing": ([{"id": 1, "a text": ASK, "x": GOOD, "y": BAD, "source": "s"}], TEXT),
    "sides without a known label": ([{"prompt": ASK, "option_x": GOOD, "option_y": BAD, "pick": "x"}], TEXT),
    "sides and nothing that orders": ([{"prompt": ASK, "response_a": GOOD, "response_b": BAD}], TEXT),
    "a label of its own": (
        [{"prompt": ASK, "response_a": GOOD, "response_b": BAD, "winner": "gpt-4"},
         {"prompt": NEXT, "response_a": GOOD, "response_b": BAD, "winner": "tie"}],
        TEXT,
    ),
    "a sentence that names both sides": (
        [{"prompt": ASK, "response_a": GOOD, "response_b": BAD, "winner": "a is better than b"},
         {"prompt": NEXT, "response_a": GOOD, "response_b": BAD, "winner": "tie"}],
        TEXT,
    ),
    "sides that chosen and rejected name": (
        [{"prompt": ASK, "response_a": GOOD, "response_b": BAD, "chosen": "a", "rejected": "b"}], TEXT,
    ),
    "whole names of sides in chosen and rejected": (
        [{"prompt": ASK, "worse": BAD, "GPT-4": GOOD, "chosen": "gpt-4", "rejected": "worse"}], TEXT,
    ),
    "a negative number next to sides from 1": (
        [{"prompt": ASK, "response_1": GOOD, "response_2": BAD, "preference": "-1"},
         {"prompt": NEXT, "response_1": GOOD, "response_2": BAD, "preference": "tie"}],
        TEXT,
    ),
    "a side that is not preferred": (
        [{"prompt": ASK, "response_a": GOOD, "response_b": BAD, "preference": "not b"},
         {"prompt": NEXT, "response_a": GOOD, "response_b": BAD, "preference": "tie"}],
        TEXT,
    ),
    "context next to the prompt": ([{"prompt": ASK, "context": "Rivers", "chosen": GOOD, "rejected": BAD}], TEXT),
    "a column margin": ([{"prompt": ASK, "chosen": GOOD, "rejected": BAD, "margin": 1.0}], TEXT),
    "labels from 0 next to sides from 1": (
        [{"prompt": ASK, "response_1": GOOD, "response_2": BAD, "preference": "0"},
         {"prompt": NEXT, "response_1": GOOD, "response_2": BAD, "preference": "tie"}],
        TEXT,
    ),
    "two labels of one side": ([{"prompt": ASK, "response_a": GOOD, "response_b": BAD, "winner": 0}], TEXT),
}  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", REFUSED)
def test_the_option_that_a_refusal_proposes_works(
    name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, pair = REFUSED[name]
    path = written(tmp_path, rows, form)
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    if "found" in str(caught.value):
        assert all(repr(column) in str(caught.value) for column in rows[0]), "a refusal lists all columns"
    columns = proposed(str(caught.value))
    assert columns, caught.value
    for options in columns:
        if "tie" not in options:
            assert load_preferences(path, columns=options), options
    assert pairs(path, columns[0]) == [pair]
    words = [word for field, value in columns[0].items() for word in (f"--columns.{field}", value)]
    assert main(["check", str(path), *words]) == 0
    assert "1 pairs" in capsys.readouterr().out


def test_a_prompt_file_of_other_names_says_which_option_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"text": ASK}])
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert [p.content for p in read_prompts(path, columns=proposed(str(caught.value))[0])] == [ASK]


def test_score_columns_that_are_not_there_name_those_that_are(tmp_path: Path) -> None:
    rows = [{"prompt": f"{ASK}{i}", "chosen": GOOD, "rejected": BAD, "good one": 3, "other": 1} for i in range(3)]
    path = written(tmp_path, rows)
    with refused(DataError, "d.jsonl", "'a'") as caught:
        score(path, tmp_path / "S", ScoreSettings(score_columns=("a", "b"), margin_temperature=1.0))
    option = re.search(r"--score_columns (.*)", str(caught.value))
    assert option is not None
    one, two = shlex.split(option[1])
    score(path, tmp_path / "S", ScoreSettings(score_columns=(one, two), margin_temperature=1.0))


def test_scores_of_sides_that_a_label_orders_are_not_those_of_the_chosen(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"{ASK}{i}",
            "response_a": GOOD,
            "response_b": BAD,
            "winner": "ab"[i % 2],
            "rm_a": i,
            "rm_b": 3.0 - i,
        }
        for i in range(4)
    ]
    path = written(tmp_path, rows)
    with refused(DataError, "rm_a and rm_b", "response_a and response_b"):
        load_preferences(path, columns={"chosen_score": "rm_a", "rejected_score": "rm_b"})
    with refused(ConfigError, "rm_a and rm_b", "response_a and response_b") as caught:
        score(path, tmp_path / "S", ScoreSettings(score_columns=("rm_a", "rm_b"), margin_temperature=1.0))
    command = re.search(r"(--columns.*) orders", str(caught.value))
    assert command is not None
    words = [*shlex.split(command[1]), "--score_columns", "chosen_score", "rejected_score"]
    words += ["--margin_temperature", "1", "--output_dir", str(tmp_path / "S")]
    assert main(["score", str(path), *words]) == 0
    found = [(row["chosen"], row["reward_margin"]) for row in read(tmp_path / "S" / "scored.jsonl")]
    assert found == [(BAD, 3.0), (BAD, 1.0), (GOOD, 1.0), (GOOD, 3.0)]


def test_a_list_in_order_and_an_entry_of_a_list_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, [{"prompt": ASK, "ranked_responses": [GOOD, "?", BAD]}])
    with pytest.raises(DataError, match=r"--columns\.completions ranked_responses"):
        load_preferences(path)
    with pytest.raises(DataError, match=r"--columns\.order best-first"):
        load_preferences(path, columns={"completions": "ranked_responses"})
    assert pairs(path, {"completions": "ranked_responses", "order": "best-first"}) == [TEXT]
    path = written(tmp_path, [{"prompt": ASK, "chosen": [GOOD], "rejected": ["?", BAD]}])
    with refused(DataError, "--columns.rejected rejected.0"):
        load_preferences(path)
    assert pairs(path, {"chosen": "chosen.0", "rejected": "rejected.1"}) == [TEXT]


def test_a_tree_of_other_names_needs_only_the_key_of_its_replies(tmp_path: Path) -> None:
    case = CASES["OpenAssistant/oasst2 trees"]
    row = {"prompt": case.rows[0]["prompt"]}
    assert pairs(written(tmp_path, [row]), {"replies": "replies"}) == case.pairs


def test_a_tree_without_replies_is_refused_by_its_row(tmp_path: Path) -> None:
    row = CASES["OpenAssistant/oasst2 trees"].rows[0]
    path = written(tmp_path, [row, row | {"prompt": row["prompt"] | {"replies": 3}}])
    with refused(DataError, "d.jsonl", "line 2", ("replies", "3")):
        load_preferences(path)


def test_columns_of_a_prompt_are_joined_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, [{"prompt": ASK, "context": "Rivers", "chosen": GOOD, "rejected": BAD}])
    assert pairs(path, {"prompt": "context,prompt"}) == [(f"Rivers\n{ASK}", GOOD, BAD)]


def test_text_is_read_as_turns_for_a_chat_model(tmp_path: Path) -> None:
    asked, good, bad = (
        [{"role": "user", "content": ASK}],
        *([{"role": "assistant", "content": t}] for t in (GOOD, BAD)),
    )
    own = {"prompt": "question", "chosen": "best", "rejected": "worse", "chat": True}
    assert pairs(written(tmp_path, [OWN], "csv"), own) == [(asked, good, bad)]
    path = written(tmp_path, [{"prompt": ASK, "system": "Be brief.", "chosen": GOOD, "rejected": BAD}])
    system = [{"role": "system", "content": "Be brief."}]
    assert pairs(path, {"chat": True}) == [(system + asked, good, bad)]
    assert [p.content for p in read_prompts(path, columns={"chat": True})] == [system + asked]
    assert [text for _, text in read_texts(path, {"chat": True})] == [system + asked + side for side in (good, bad)]
    messages = written(tmp_path, [{"prompt": asked, "chosen": good, "rejected": bad}])
    assert pairs(messages, {"chat": True}) == [(asked, good, bad)]
    with refused(DataError, "line 1", "columns.chat", "--columns.prompt"):
        pairs(written(tmp_path, [{"chosen": f"{ASK} {GOOD}", "rejected": f"{ASK} {BAD}"}]), {"chat": True})


@pytest.mark.parametrize(
    ("prompt", "template", "said"), [("p", "{{ 1 }}", True), ("p", None, False), ([], "{{ 1 }}", False)]
)
def test_a_chat_template_that_text_does_not_use_is_named(
    prompt: Any, template: str | None, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_unused_template(SimpleNamespace(chat_template=template), prompt)
    assert ("--columns.chat true" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "touching"),
    [
        ("Why?", "It rains.", "No.", 1),
        ("Why?", "It rains.", " No.", 0),
        ("Why?\n", "It rains.", "No.", 0),
        ("Почему?", "Дождь.", "Нет.", 1),
        ("なぜ?", "雨です", "いいえ", 0),
        ("f(", "x)", "y)", 0),
    ],
)
def test_words_that_touch_are_counted(prompt: str, chosen: str, rejected: str, touching: int, tmp_path: Path) -> None:
    report = check(written(tmp_path, [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]))
    assert report.touching == touching
    assert ("white space" in report.text()) == (touching > 0)


def test_a_corpus_of_prompts_takes_the_names_of_its_columns(tmp_path: Path) -> None:
    path = written(tmp_path, [{"question": ASK, "n": 1}], "csv")
    assert [text for _, text in read_texts(path, {"prompt": "question"})] == [ASK]


def test_a_check_names_the_command_that_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, [{"question": f"{ASK} {i}", "best": GOOD, "the worse": BAD} for i in range(2)])
    words = ["--columns.prompt", "question", "--columns.chosen", "best", "--columns.rejected", "the worse"]
    assert main(["check", str(path), *words, "--columns.chat", "true", "--eval_data", str(path)]) == 0
    (following,) = re.findall("^next: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert shlex.split(following)[:5] == ["madpo", "train", str(path), "--eval_data", str(path)]
    assert shlex.split(following)[5:-4] == [*words, "--columns.chat", "true"]


def test_tools_of_a_layout_reach_the_row(tmp_path: Path) -> None:
    row, tools = CASES["OpenAI preference fine-tuning"].rows[0], [{"type": "function", "function": {"name": "look"}}]
    (pair,) = load_preferences(written(tmp_path, [row | {"input": row["input"] | {"tools": tools}}]))
    assert pair["tools"] == tools


def test_columns_that_nobody_names_are_no_part_of_a_result() -> None:
    plain = ScoreSettings(reward_model="r")
    named = ScoreSettings.model_validate({"reward_model": "r", "columns": {"chosen": "a", "rejected": "b"}})
    assert not {"columns", "layout"} & identity_settings(plain).keys()
    assert identity_settings(named)["columns"] == {"chosen": "a", "rejected": "b"}


def test_a_report_names_the_columns_of_numbers_and_proposes_no_constant(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": GOOD, "rejected": BAD, "votes": i} for i in range(2)]
    assert check(written(tmp_path, rows), columns={"reward_margin": "votes"}).layout["reward_margin"] == "votes"
    rows = [{"prompt": f"{i}?", "responses": [BAD, GOOD], "rank": [2, 1]} for i in range(2)]
    report = check(written(tmp_path, rows))
    assert [(c.lowest, c.highest) for c in report.reward_margins] == [(1.0, 1.0)]
    assert "--columns.reward_margin" not in report.text()
