"""Reading and checking preference data: every layout gives the same pair, and every count is the true one."""

import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from madpo.core.errors import ConfigError, DataError
from madpo.data import check, load_preferences
from madpo.data.findings import Findings, Seen
from madpo.data.folds import Beginnings
from madpo.data.rows import Pair, shared_prefix
from practice_cases import read, write
from refusals import names, refused

PLAIN = {"prompt": "Say hi.", "chosen": " Hi!", "rejected": " No."}
USER = {"role": "user", "content": "Say hi."}
HI, NO = {"role": "assistant", "content": "Hi!"}, {"role": "assistant", "content": "No."}
CHAT = {"prompt": [USER], "chosen": [HI], "rejected": [NO]}
CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, one merge ("b" + "c"), and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "bc"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<eos>",
        additional_special_tokens=["<|start|>", "<|end|>"],
        chat_template=CHATML,
    )


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (PLAIN, PLAIN),
        ({"chosen": "Say hi. Hi!", "rejected": "Say hi. No."}, PLAIN),
        ({"question": "Say hi.", "chosen": " Hi!", "rejected": " No."}, PLAIN),
        ({"instruction": "Say hi.", "chosen_response": " Hi!", "rejected_response": " No."}, PLAIN),
        (CHAT, CHAT),
        ({"chosen": [USER, HI], "rejected": [USER, NO]}, CHAT),
        ({"prompt": "Say hi.", "chosen": [USER, HI], "rejected": [USER, NO]}, CHAT),
        ({"prompt": "Say hi.", "chosen": [HI], "rejected": [NO]}, CHAT),
        ({"prompt": [USER], "chosen": "Hi!", "rejected": "No."}, CHAT),
        (CHAT | {"chosen": [HI | {"content": [{"type": "text", "text": "Hi!"}], "extra": None}]}, CHAT),
    ],
)
def test_every_layout_gives_the_same_pair(raw: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert load_preferences(write(tmp_path / "d.jsonl", [raw])) == [{"pair_id": 0} | expected]
    pq.write_table(pa.Table.from_pylist([raw]), tmp_path / "d.parquet")
    assert load_preferences(tmp_path / "d.parquet") == [{"pair_id": 0} | expected]


def test_ultrafeedback_ranks_best_against_worst(tmp_path: Path) -> None:
    completions = [
        {"response": text, "overall_score": score, "model": "m"} for text, score in (("b", 7), ("c", 9.5), ("a", 1))
    ]
    tied = [{"response": "x", "overall_score": 5}] * 2
    path = write(
        tmp_path / "d.jsonl",
        [
            {"instruction": "q", "completions": completions, "source": "s"},
            {"instruction": "r", "completions": tied, "source": "s"},
        ],
    )
    scores = {"chosen_score": 9.5, "rejected_score": 1.0}
    assert load_preferences(path) == [{"pair_id": 0, "prompt": "q", "chosen": "c", "rejected": "a"} | scores]
    report = check(path)
    assert (report.pairs, report.count("unranked"), report.ignored) == (1, 1, ("source",))


UNANNOTATED = [{"response": text, "model": "m"} for text in ("worse", "better")]


@pytest.mark.parametrize(
    "columns",
    [
        {"completions": [{"response": "worse", "score": 2}, {"response": "better", "rating": 4.5}]},
        {"completions": {"response": ["worse", "better"], "overall_score": [2, 4.5], "model": ["m", "n"]}},
        {"responses": ["worse", "better", "middling"], "scores": [2.0, 4.5, 3.0]},
        {"generations": ["better", "worse"], "ratings": [4.5, 2], "source": "s"},
        {
            "completions": [
                one | {"annotations": {a: {"Rating": r, "Rationale": "-"} for a, r in ratings.items()}}
                for one, ratings in zip(
                    UNANNOTATED,
                    (
                        {"truthfulness": "2", "honesty": "N/A"},
                        {"truthfulness": "5", "honesty": "4", "helpfulness": "N/A"},
                    ),
                    strict=True,
                )
            ]
        },
    ],
)
def test_nested_shapes_of_scored_responses(columns: dict[str, Any], tmp_path: Path) -> None:
    row = {"instruction": "q"} | columns
    expected = {"pair_id": 0, "prompt": "q", "chosen": "better", "rejected": "worse"}
    scores = {"chosen_score": 4.5, "rejected_score": 2.0}
    assert load_preferences(write(tmp_path / "d.jsonl", [row])) == [expected | scores]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    assert load_preferences(tmp_path / "d.parquet") == [expected | scores]


def test_binarized_ultrafeedback(tmp_path: Path) -> None:
    row = {"prompt": "Say hi.", "prompt_id": "f0", "chosen": [USER, HI], "rejected": [USER, NO], "messages": [USER, HI]}
    path = write(tmp_path / "d.jsonl", [row | {"score_chosen": 8, "score_rejected": 2.5}])
    assert load_preferences(path) == [{"pair_id": 0, **CHAT, "chosen_score": 8.0, "rejected_score": 2.5}]
    report = check(path)
    assert report.read_as["chosen_score"] == "score_chosen"
    assert report.ignored == ("prompt_id", "messages")
    assert "'score_chosen' as chosen_score" in report.text()
    assert check(write(path, [row | {"prompt": "Something else"}])).count("prompt_mismatch") == 1


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [
        {
            "pair_id": 7,
            "prompt": 'a "q", ü\nline',
            "chosen": " é",
            "rejected": " 😀",
            "reward_margin": -0.1,
            "weight": 2.0,
        },
        {"pair_id": 3, "prompt": "", "chosen": "x,y", "rejected": "z", "reward_margin": 1e-9, "weight": 0.0},
    ]
    write(tmp_path / "d.jsonl", rows)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress((tmp_path / "d.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name, delimiter in (("d.csv", ","), ("d.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    for name in ("d.jsonl", "e.jsonl.gz", "d.parquet", "d.csv", "d.tsv"):
        assert load_preferences(tmp_path / name) == rows, name
        assert load_preferences(str(tmp_path / name)) == rows, name


def test_saved_and_hub_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    data = datasets.Dataset.from_list([PLAIN])
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    assert load_preferences(tmp_path / "saved") == [{"pair_id": 0} | PLAIN]
    with refused(DataError, tmp_path / "splits", tmp_path / "splits" / "train"):
        check(tmp_path / "splits")
    asked = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        if name == "a/gone":
            raise datasets.exceptions.DatasetNotFoundError("no such data set")
        return data.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_preferences("a/b") == load_preferences("a/b:test_prefs") == [{"pair_id": 0} | PLAIN]
    with refused(DataError, "a/gone"):
        check("a/gone")
    assert asked == [("a/b", "train", True), ("a/b", "test_prefs", True), ("a/gone", "train", True)]


def test_counts_of_repeats_and_leaks(tmp_path: Path) -> None:
    a, b, c = (PLAIN | {"prompt": p} for p in "abc")
    swapped = b | {"chosen": b["rejected"], "rejected": b["chosen"]}
    path = write(tmp_path / "train.jsonl", [a, b, a, swapped, c, a, swapped])
    report = check(path)
    assert (report.pairs, report.prompts) == (7, 3)
    assert {f.kind: f.count for f in report.findings} == {"duplicate": 3, "contradiction": 1}
    assert report.findings[0].examples == tuple(
        f"{path}, line {later}, first in {first}" for later, first in ((3, 1), (6, 1), (7, 4))
    )
    assert report.findings[1].examples == (f"{path}, line 4, first in 2",)
    evaluation = write(tmp_path / "eval.jsonl", [c | {"chosen": " new"}, swapped, PLAIN | {"prompt": "d"}])
    leaks = check(path, eval_data=evaluation)
    assert (leaks.eval_pairs, leaks.count("leaked_pair"), leaks.count("leaked_prompt")) == (3, 1, 2)
    assert leaks.findings[-1].examples == (f"{evaluation}, line 1", f"{evaluation}, line 2")
    assert "2 of 3" in leaks.text()


_few = st.lists(st.tuples(*(st.sampled_from(letters) for letters in ("ab", "xyz", "xyz"))), min_size=1, max_size=12)


@given(train=_few, evaluation=_few)
def test_repeats_and_leaks_are_those_of_sets(train: list[Any], evaluation: list[Any]) -> None:
    sides, findings = [Seen(), Seen()], Findings()
    for seen, rows in zip(sides, (train, evaluation), strict=True):
        for i, (prompt, chosen, rejected) in enumerate(rows):
            seen.add(Pair(i, i, prompt, chosen, rejected, {}))
    sides[0].repeats(findings, str)
    sides[1].leaks(sides[0], findings, str)
    different = set(train)
    unordered = {(p, frozenset((c, r))) for p, c, r in train}
    expected = {
        "duplicate": len(train) - len(different),
        "contradiction": sum(c < r and (p, r, c) in different for p, c, r in different),
        "leaked_pair": sum((p, frozenset((c, r))) in unordered for p, c, r in evaluation),
        "leaked_prompt": sum(p in {p for p, _, _ in train} for p, _, _ in evaluation),
    }
    assert findings.counts == {kind: count for kind, count in expected.items() if count}
    assert sides[0].distinct_prompts() == len({p for p, _, _ in train})


_turns = st.lists(st.sampled_from("abc"), min_size=1, max_size=4)


def _transcript(turns: Sequence[str]) -> str:
    """As in hh-rlhf; the user has the first turn."""
    speakers = ("\n\nHuman: ", "\n\nAssistant: ")
    said = "".join(speakers[i % 2] + turn for i, turn in enumerate(turns))
    return said + "\n\nAssistant:" * (len(turns) % 2)


def _messages(turns: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


@pytest.mark.parametrize("form", [_transcript, _messages])
@given(train=st.lists(_turns, min_size=1, max_size=8), evaluation=st.lists(_turns, min_size=1, max_size=8))
def test_prompts_that_continue_others_are_those_of_a_loop_over_all(
    form: Any, train: list[list[str]], evaluation: list[list[str]]
) -> None:
    def continues(one: list[str], other: list[str]) -> bool:
        return len(one) > len(other) and one[: len(other)] == other

    expected = [any(continues(e, t) or continues(t, e) for t in train) for e in evaluation]
    theirs, mine = (Beginnings(map(form, part)) for part in (train, evaluation))
    assert mine.parted(theirs).tolist() == expected


def test_conversations_on_both_sides_of_a_split_are_found(tmp_path: Path) -> None:
    """One evaluation prompt continues a training prompt, and one is continued; other texts, and none, are no turns."""
    pair = {"chosen": " Yes.", "rejected": " No."}
    train = [_transcript(turns) for turns in (["a"], ["d", "e", "f"], ["x", "y", "z"])] + ["Plain", ""]
    held = [_transcript(turns) for turns in (["a", "b", "c"], ["d"], ["dd"], ["x", "y", "z"])] + ["Plain text", "P"]
    paths = [
        write(tmp_path / f"{name}.jsonl", [pair | {"prompt": prompt} for prompt in prompts])
        for name, prompts in (("train", train), ("held", held))
    ]
    report = check(paths[0], eval_data=paths[1])
    found = {finding.kind: (finding.count, finding.examples) for finding in report.findings}
    assert found["leaked_conversation"] == (2, (f"{paths[1]}, line 1", f"{paths[1]}, line 2"))
    assert found["leaked_prompt"] == (1, (f"{paths[1]}, line 4",))
    assert report.continuing == 0
    both = check(write(tmp_path / "both.jsonl", [pair | {"prompt": prompt} for prompt in [*train, *held]]))
    assert both.continuing == 4
    names(both.text(), ("4 of 11 pairs", "continues"), "--eval_data")


def test_three_examples_and_every_count(tmp_path: Path) -> None:
    rows = [PLAIN | {"prompt": str(i), "rejected": "" if i % 2 else " No."} for i in range(20)]
    finding = check(write(tmp_path / "d.jsonl", rows)).findings[0]
    assert (finding.kind, finding.count, len(finding.examples)) == ("empty_completion", 10, 3)
    assert finding.examples[0].endswith("d.jsonl, line 2: rejected")


def test_implicit_prompts_that_look_wrong(tmp_path: Path) -> None:
    report = check(
        write(tmp_path / "d.jsonl", [{"chosen": "Say hello", "rejected": "Say help"}, {"chosen": "a", "rejected": "b"}])
    )
    assert (report.count("split_word"), report.count("no_shared_prompt")) == (1, 1)


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_shared_prefix_is_the_longest(start: str, one: str, other: str) -> None:
    a, b = start + one, start + other
    n = shared_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_lengths_without_tokenizer_are_characters(tmp_path: Path) -> None:
    report = check(write(tmp_path / "d.jsonl", [PLAIN | {"prompt": "x" * n} for n in (1, 2, 3, 10)]))
    assert report.unit == "characters"
    prompt = report.lengths["prompt"]
    assert (prompt.mean, prompt.median, prompt.longest) == (4.0, 2.5, 10)


def test_plain_text_gets_exactly_one_end_token(tokenizer: Any, tmp_path: Path) -> None:
    eos = tokenizer.eos_token_id
    path = write(tmp_path / "d.jsonl", [PLAIN, PLAIN | {"chosen": " Hi!<eos>", "rejected": " N<eos>o.<eos><eos>"}])
    first, second = load_preferences(path, tokenizer=tokenizer)
    assert tokenizer.decode(first["prompt_ids"] + first["chosen_ids"]) == "Say hi. Hi!<eos>"
    assert second["chosen_ids"] == first["chosen_ids"]
    assert second["chosen_ids"].count(eos) == 1
    assert tokenizer.decode(second["rejected_ids"]) == " N<eos>o.<eos>"
    report = check(path, tokenizer=tokenizer)
    assert {f.kind: f.count for f in report.findings} == {"doubled_end": 1}
    assert check(write(path, [PLAIN | {"chosen": "a<eos>b"}]), tokenizer=tokenizer).count("inner_end") == 1


def test_chat_template_ids_end_with_the_turn(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [CHAT])
    (row,) = load_preferences(path, tokenizer=tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "<|start|>user\nSay hi.<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(row["chosen_ids"]) == "Hi!<|end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "No.<|end|>"
    report = check(path, tokenizer=tokenizer)
    assert report.findings == ()
    assert report.unit == "tokens"
    assert report.lengths["chosen"].longest == 4
    assert report.rendered[0].endswith("| 'Hi!<|end|>'")
    # Two answers in one completion: an end token after each is no fault, but the question between them is.
    longer = CHAT | {"chosen": [HI, USER, HI]}
    findings = check(write(path, [longer]), tokenizer=tokenizer).findings
    assert [(finding.kind, finding.count) for finding in findings] == [("other_turns", 1)]


def test_prompt_that_is_no_prefix_is_counted_for_every_pair(tokenizer: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl", [*({"prompt": f"{i}b", "chosen": "cat", "rejected": "dog"} for i in range(5)), PLAIN]
    )
    report = check(path, tokenizer=tokenizer)
    assert report.count("boundary") == 5
    row = load_preferences(path, tokenizer=tokenizer)[0]
    # As TRL: the completion starts where the tokens part.
    assert [tokenizer.decode(row[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")] == [
        "0",
        "bcat<eos>",
        "bdog<eos>",
    ]
    with refused(DataError, "d.jsonl", "line 1", "'b'", "5"):
        check(path, tokenizer=tokenizer, strict=True)


def test_missing_end_token_of_a_template(tokenizer: Any, tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    bare.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    path = write(tmp_path / "d.jsonl", [CHAT])
    assert check(path, tokenizer=bare).count("missing_end") == 1
    (row,) = load_preferences(path, tokenizer=bare)
    assert bare.decode(row["chosen_ids"]).endswith("Hi!\n<eos>")


def test_template_that_refuses_a_conversation(tokenizer: Any, tmp_path: Path) -> None:
    strict = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system\n!') }}{% endif %}<eos>"
    )
    system = CHAT | {"prompt": [{"role": "system", "content": "x"}, USER]}
    path = write(tmp_path / "d.jsonl", [CHAT, system, system])
    with refused(DataError, "d.jsonl", "line 2", "no system", "1", "3"):
        check(path, tokenizer=strict)
    strict.chat_template = None
    with refused(ConfigError, "chat_template"):
        check(path, tokenizer=strict)


def test_truncation_policies(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"pair_id": 10, "prompt": "aaaa", "chosen": "xx", "rejected": "y"},  # 4 + 3
        {"pair_id": 11, "prompt": "aaaa", "chosen": "xxxxxx", "rejected": "y"},  # 4 + 7
        {"pair_id": 12, "prompt": "a" * 8, "chosen": "x", "rejected": "y"},  # no room
        {"pair_id": 13, "prompt": "aaaa", "chosen": "xxxxxx", "rejected": "xxxxyy"},  # the same after the cut
    ]
    path = write(tmp_path / "d.jsonl", rows)
    options = {"tokenizer": tokenizer, "max_length": 8}

    dropped = check(path, **options, truncation="drop", output=tmp_path / "out")
    assert dropped.truncation is not None
    assert (dropped.truncation.too_long, dropped.truncation.dropped, dropped.truncation.cut) == (3, 3, 0)
    saved = read(tmp_path / "out/dropped.jsonl")
    assert saved == [{"pair_id": i, "line": i - 9, "tokens": n} for i, n in ((11, 11), (12, 10), (13, 11))]
    assert json.loads((tmp_path / "out/check.json").read_text())["truncation"]["dropped"] == 3
    assert [row["pair_id"] for row in load_preferences(path, **options)] == [10]

    cut = check(path, **options, truncation="cut")
    assert cut.truncation is not None
    assert (cut.truncation.too_long, cut.truncation.dropped, cut.truncation.cut) == (3, 2, 1)
    kept = load_preferences(path, **options, truncation="cut")
    assert [row["pair_id"] for row in kept] == [10, 11]
    assert tokenizer.decode(kept[1]["chosen_ids"]) == "xxxx", "a cut completion must not teach the end"
    assert tokenizer.decode(kept[1]["rejected_ids"]) == "y<eos>"

    for function in (check, load_preferences):
        with refused(DataError, "d.jsonl", "line 2", ("11", "max_length 8"), "truncation"):
            function(path, **options, truncation="refuse")
    with refused(DataError, "d.jsonl", "max_length 2"):
        load_preferences(path, tokenizer=tokenizer, max_length=2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_length": 8}, ["max_length", "tokenizer"]),
        ({"truncation": "keep"}, [("truncation", "'keep'"), "'drop', 'cut', 'refuse'"]),
        ({"tokenizer": "t", "max_length": 1}, [("max_length", "1"), "2"]),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], named: list[Any], tmp_path: Path) -> None:
    with refused(ConfigError, *named):
        check(write(tmp_path / "d.jsonl", [PLAIN]), **options)


def test_checking_imports_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [PLAIN])
    heavy = {"torch", "transformers", "datasets", "pyarrow"}
    code = f"import sys; from madpo.data import check; check({str(path)!r}); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Under 120 bytes a row beyond a fixed 100 MiB, so a million rows stay far below 500 MB."""
    path = tmp_path / "d.jsonl"
    with path.open("w") as file:
        for i in range(60_000):
            file.write(json.dumps(PLAIN | {"prompt": f"{i} " + "word " * 200}) + "\n")
    code = (
        "import re; from pathlib import Path; from madpo.data import check; from madpo.data.findings import Seen\n"
        # Of this program only: what getrusage says begins with the parent's.
        r"peak = lambda: int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])"
        "\nbefore = peak()\n"
        f"assert check({str(path)!r}).pairs == 60000\n"
        "print((peak() - before) * 1024)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 40e6, f"{grown / 1e6:.0f} MB for a file of {path.stat().st_size / 1e6:.0f} MB"


def test_tokenizer_by_folder(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    path = write(tmp_path / "d.jsonl", [CHAT])
    for name in (tmp_path / "model", str(tmp_path / "model")):
        assert check(path, tokenizer=name) == check(path, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="gone"):
        check(path, tokenizer=str(tmp_path / "gone"))


def test_numbers_of_one_side_only_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [CHAT | {"ref_chosen_logps": -5.0, "rejected_score": 2.0}])
    assert load_preferences(path) == [{"pair_id": 0, **CHAT}]
    assert set(check(path).ignored) == {"ref_chosen_logps", "rejected_score"}
