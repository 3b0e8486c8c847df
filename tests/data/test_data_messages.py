"""What of messages and rows reaches a model or a file: end tokens, tool calls, columns that a format cannot hold."""

import datetime
import json
import math
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from madpo.core.errors import DataError, StorageError
from madpo.data import check, load_preferences
from madpo.data.tokens import Encoder
from madpo.operations import ScoreSettings, TrimSettings, score, scoring
from madpo.operations.trimming.corpus_tokens import encoded, read_corpus
from practice_cases import read, text_pairs, write
from refusals import refused
from vocabulary_cases import LINES, write_model

USER = {"role": "user", "content": "hi"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
PHI = GEMMA.replace("<start_of_turn>", "<|role|>").replace("<end_of_turn>", "<|end|>")


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def turns_tokenizer(turn: str, end: str, template: str, *, special: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte; the marks of turns are special in tokenizer.json and named nowhere else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<bos>", "<eos>", *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    raw.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in (turn, end)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", chat_template=template)


@pytest.mark.parametrize(
    ("turn", "end", "template"), [("<start_of_turn>", "<end_of_turn>", GEMMA), ("<|role|>", "<|end|>", PHI)]
)
def test_a_turn_ends_at_a_token_that_only_the_tokenizers_file_calls_special(
    turn: str, end: str, template: str, tmp_path: Path
) -> None:
    tokenizer = turns_tokenizer(turn, end, template)
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert end_id not in tokenizer.all_special_ids, "the case of Gemma and Phi"
    path = write(tmp_path / "d.jsonl", [CHAT])
    (row,) = load_preferences(path, tokenizer=tokenizer)
    assert Encoder(tokenizer).end_id() == end_id
    assert tokenizer.decode(row["prompt_ids"]) == f"<bos>{turn}user\nhi{end}\n{turn}assistant\n"
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
    for side, said in (("chosen_ids", "good"), ("rejected_ids", "bad")):
        assert row[side] == [*tokenizer(said, add_special_tokens=False)["input_ids"], end_id]
    assert check(path, tokenizer=tokenizer).findings == ()
    # A turn's end inside an answer is one, and so are two at its end.
    rows = [CHAT | {"chosen": [GOOD | {"content": text}]} for text in (f"go{end}od", f"good{end}")]
    report = check(write(tmp_path / "odd.jsonl", rows), tokenizer=tokenizer)
    assert {f.kind: f.count for f in report.findings} == {"inner_end": 1, "doubled_end": 1}


def test_turns_are_those_of_trl_less_the_line_break_after_the_end_token(tmp_path: Path) -> None:
    from trl import DPOTrainer

    tokenizer = turns_tokenizer("<start_of_turn>", "<end_of_turn>", GEMMA)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None)
    (expected,) = DPOTrainer._prepare_dataset(
        SimpleNamespace(), Dataset.from_list([CHAT]), tokenizer, arguments, "train"
    )
    (found,) = load_preferences(write(tmp_path / "d.jsonl", [CHAT]), tokenizer=tokenizer)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert found["prompt_ids"] == expected["prompt_ids"]
    assert [*found["chosen_ids"], *newline] == expected["chosen_ids"]
    assert [*found["rejected_ids"], *newline] == expected["rejected_ids"]


def test_a_mark_that_is_ordinary_text_ends_no_turn(tmp_path: Path) -> None:
    tokenizer = turns_tokenizer("<start_of_turn>", "<end_of_turn>", GEMMA, special=False)
    assert Encoder(tokenizer).end_id() == tokenizer.eos_token_id
    assert check(write(tmp_path / "d.jsonl", [CHAT]), tokenizer=tokenizer).count("missing_end") == 1


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_keys_and_columns_that_say_nothing_are_no_mistake(form: str, tmp_path: Path) -> None:
    blank = {"tool_calls": [], "name": None, "reasoning_content": ""}
    row = CHAT | {
        "chosen": [GOOD | blank],
        "tools": "[]",
        "chat_template_kwargs": {"enable_thinking": None},
        "note": "kept out",
    }
    path = tmp_path / f"d.{form}"
    if form == "jsonl":
        write(path, [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    assert load_preferences(path) == [{"pair_id": 0} | CHAT]
    # Text has no chat template that would be given them.
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    text = write(tmp_path / "text.jsonl", [plain | {"tools": [call("")]}])
    assert load_preferences(text) == [{"pair_id": 0} | plain]
    assert check(text).ignored == ("tools",)


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"text": "a \ud83d b"}, "text"),
        ({"prompt": "a", "completion": "\ude00"}, "completion"),
        ({"messages": [USER, GOOD | {"content": "\ud83d"}]}, r"messages\[1\]\.content"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD | {"content": "\ud83d"}]}, r"rejected\[0\]\.content"),
    ],
)
def test_half_a_surrogate_pair_in_a_corpus_is_one_sentence(row: dict[str, Any], where: str, tmp_path: Path) -> None:
    data = write(tmp_path / "c.jsonl", [row])
    with pytest.raises(DataError, match=rf"line 1: {where} .*\(\\ud"):
        read_corpus([str(data)], turns_tokenizer("<t>", "<e>", GEMMA), TrimSettings())


def with_holes(folder: Path) -> Path:
    """A word's id is far above the number of entries."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"]["\u2581film"] = len(spec["model"]["vocab"]) + 60
    path.write_text(json.dumps(spec))
    return folder


def test_a_tokenizer_with_holes_in_its_ids_is_counted(tmp_path: Path) -> None:
    folder = with_holes(write_model(tmp_path / "model", "llama", "gemma", padded=70))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    highest = tokenizer.get_vocab()["\u2581film"]
    assert highest == max(tokenizer.get_vocab().values()) > len(tokenizer)
    rows = [{"text": f"{a} {b} film film"} for a in LINES[:3] for b in LINES[:3]]
    data = write(tmp_path / "c.jsonl", rows)
    found = read_corpus([str(data)], tokenizer, TrimSettings(held_out_share=0.3))
    assert found.counts[highest] >= 2 * found.texts > 0
    expected = [i for row in rows if row["text"] not in found.held_out for i in encoded(tokenizer, [row["text"]])[0]]
    assert found.counts == {i: expected.count(i) for i in set(expected)}


SCORED = [row | {"a": float(i % 7), "b": 3.0 - i % 3} for i, row in enumerate(text_pairs(12))]
COLUMNS = ScoreSettings(score_columns=("a", "b"), margin_temperature=2.0)


class Counting:
    """A reward model that counts how many pairs it scored."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.pairs, self.fail_after = 0, fail_after
        self.kept: dict[str, Any] = {}

    def score_pairs(self, pairs: Any, name: str, unit: str) -> Any:
        if self.fail_after is not None and self.pairs >= self.fail_after:
            raise KeyboardInterrupt
        self.pairs += len(pairs)
        rewards = np.array([float(pair.pair_id) for pair in pairs])
        return rewards, rewards - 1.5


@pytest.fixture
def by_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings with a reward model, and the one that is asked in its place."""
    (tmp_path / "R").mkdir()
    asked = Counting()
    monkeypatch.setattr(scoring, "reward_model_digest", lambda model: "x")
    monkeypatch.setattr(scoring, "load_scorer", lambda model, batch_size, clock: asked)
    monkeypatch.setattr(scoring, "load_pair_encoder", lambda model, clock: SimpleNamespace(encoder=None))
    return ScoreSettings(reward_model=str(tmp_path / "R")), asked


@pytest.mark.parametrize(
    ("form", "values", "other", "named"),
    [
        ("parquet", [1, "two"], "jsonl", ("line 1", "'note'", "Parquet")),
        ("parquet", [{}, {}], "jsonl", ("Parquet",)),
        ("parquet", [2**70, 1], "jsonl", ("line 1", "'note'", "Parquet")),
        ("jsonl", [Decimal("1.5"), Decimal(2)], "parquet", ("row 0", "'note'", "JSON", "Decimal")),
        ("jsonl", [b"a", b"b"], "parquet", ("row 0", "'note'", "JSON", "bytes")),
    ],
)
def test_what_the_format_cannot_hold_shows_before_the_scoring_and_the_advice_works(
    form: Any, values: list[Any], other: Any, named: tuple[str, ...], by_model: Any, tmp_path: Path
) -> None:
    settings, asked = by_model
    rows = [row | {"note": value} for row, value in zip(text_pairs(2), values, strict=True)]
    data = tmp_path / f"pairs.{other}"
    if other == "jsonl":
        write(data, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), data)
    with refused(DataError, *named, f"--format {other}"):
        score(data, tmp_path / "S", settings.model_copy(update={"format": form}))
    assert asked.pairs == 0
    assert not (tmp_path / "S").exists(), "a mistake leaves nothing"
    score(data, tmp_path / "S", settings.model_copy(update={"format": other}))
    found = read(tmp_path / "S" / "scored.jsonl") if other == "jsonl" else pq.read_table(
        tmp_path / "S" / "scored.parquet").to_pylist()  # fmt: skip
    assert [row["note"] for row in found] == values
    assert [row["reward_margin"] for row in found] == [1.5, 1.5]
    assert asked.pairs == 2


def test_an_interrupted_scoring_goes_on(by_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, asked = by_model
    monkeypatch.setattr(scoring, "PART", 4)
    data, asked.fail_after = write(tmp_path / "pairs.jsonl", text_pairs(12)), 8
    with pytest.raises(KeyboardInterrupt):
        score(data, tmp_path / "S", settings)
    asked.fail_after = None
    with refused(StorageError, ("batch_size", "4", "16")):
        score(data, tmp_path / "S", settings.model_copy(update={"batch_size": 4}))
    score(data, tmp_path / "S", settings)
    assert asked.pairs == 12, "the parts that were there are not scored again"
    left = sorted(path.name for path in (tmp_path / "S").iterdir() if path.suffix)
    assert [name for name in left if "scored" in name or name.endswith("tmp")] == ["scored.jsonl"]
    score(data, tmp_path / "whole", settings)
    assert (tmp_path / "S" / "scored.jsonl").read_bytes() == (tmp_path / "whole" / "scored.jsonl").read_bytes()
    # Finished, its format is what it is.
    with refused(StorageError, ("format", '"parquet"', '"jsonl"')):
        score(data, tmp_path / "S", settings.model_copy(update={"format": "parquet"}))


def test_numbers_that_are_not_finite_and_broken_text_become_valid_json(tmp_path: Path) -> None:
    extra = {"x": math.nan, "deep": {"list": [1.5, -math.inf, {"y": math.nan}]}, "odd": "\ud83d é"}
    data = write(tmp_path / "pairs.jsonl", [SCORED[0] | extra, *SCORED[1:]])
    score(data, tmp_path / "S", COLUMNS)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = (tmp_path / "S" / "scored.jsonl").read_text(encoding="utf-8").splitlines()
    first, *others = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["x"], first["deep"], first["odd"]) == (None, {"list": [1.5, None, {"y": None}]}, "\ud83d é")
    assert [row["reward_margin"] for row in (first, *others)] == [(row["a"] - row["b"]) / 2 for row in SCORED]
    when = datetime.datetime(2026, 1, 2, 3, 4)
    pq.write_table(pa.Table.from_pylist([SCORED[0] | {"x": math.nan, "when": when}]), tmp_path / "p.parquet")
    score(tmp_path / "p.parquet", tmp_path / "P", COLUMNS)
    (row,) = read(tmp_path / "P" / "scored.jsonl")
    assert (row["x"], row["when"]) == (None, "2026-01-02T03:04:00")


def test_parquet_loses_no_column_of_rows_that_bring_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "pairs.jsonl", [*SCORED[:1], SCORED[1] | {"late": "here"}, *SCORED[2:]])
    settings = COLUMNS.model_copy(update={"format": "parquet"})
    score(data, tmp_path / "S", settings)
    table = pq.read_table(tmp_path / "S" / "scored.parquet").to_pylist()
    assert [row["late"] for row in table] == [None, "here", *[None] * 10]
    assert [row["note"] for row in table] == [row["note"] for row in SCORED]
    # Behind the first group of rows it is too late.
    monkeypatch.setattr(scoring, "PART", 1)
    write(data, [*SCORED[:9], SCORED[9] | {"late": "here"}])
    with refused(DataError, "line 10", "'late'"):
        score(data, tmp_path / "T", settings)
