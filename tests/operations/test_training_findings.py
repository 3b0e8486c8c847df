"""What a check finds, every training says at its start; the date that a chat template prints stays the first one."""

import shutil
import tomllib
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from madpo.commands.cli import main
from madpo.core.config import load_config
from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.data import check, load_preferences
from madpo.data import templates as templates_of
from madpo.data.findings import Survey
from madpo.data.folds import prompt_keys
from madpo.operations import ScoreSettings, TrainSettings, score
from madpo.operations.inputs import split_by_prompt, started_clock
from practice_cases import conversation, read, text_pairs, write
from quick import quick
from refusals import names, refused

CLOCK = (
    "{{ bos_token }}Today: {{ strftime_now('%Y-%m-%d') }}\n{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRAIN = ["--loss", "dpo", "--epochs", "1", "--batch_size", "4", "--dtype", "float32", "--args.bf16", "false"]
REWARD = ["--epochs", "1", "--batch_size", "4", "--eval_share", "0.3"]
TUNE = [*TRAIN, "--folds", "2", "--trials", "1", "--space.loss.beta", "[0.1]"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: Any) -> Path:
    """Pairs with a repeated pair, an answer that has an end token inside, and turns of others."""
    rows = text_pairs(24)
    rows[3] = rows[1]
    rows[5] = rows[5] | {"chosen": " A</s> B"}
    return write(tmp_path_factory.mktemp("odd") / "odd.jsonl", rows)


def commands(data: Path, model: Path, out: Path) -> dict[str, list[str]]:
    base, where = ["--model_name_or_path", str(model)], ["--output_dir", str(out)]
    return {
        "train": ["train", str(data), *base, *where, *TRAIN],
        "reward": ["reward", str(data), *base, *where, *REWARD],
        "tune": ["tune", str(data), *base, *where, *TUNE],
        "folds": ["score", str(data), *base, *where, "--folds", "2", "--epochs", "1", "--eval_share", "0.3"],
    }


@pytest.mark.parametrize("name", ["train", "reward", "tune", "folds"])
def test_strict_refuses_at_the_start_what_a_check_would_warn_of(
    name: str, odd: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: None
) -> None:
    report = check(odd, tokenizer=llama)
    assert {finding.kind: finding.count for finding in report.findings} == {"duplicate": 1, "inner_end": 1}
    assert main([*commands(odd, llama, tmp_path / "o")[name], "--strict"]) == 2
    said = capsys.readouterr().err
    names(said, odd, ("line 4", "2"), "1 in all")
    assert not (tmp_path / "o" / "record.json").exists()


def test_a_training_says_in_one_line_what_a_check_would_warn_of(
    odd: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: None
) -> None:
    assert main(commands(odd, llama, tmp_path / "o")["train"]) == 0
    said = capsys.readouterr().err
    command = f"madpo check {odd} --model_name_or_path"
    assert said.count(command) == 1
    names(said, ("24 pairs", odd, "1 duplicate", "1 inner"))
    # What is without findings says nothing.
    clean = write(tmp_path / "clean.jsonl", text_pairs(12)[:9])
    assert check(clean, tokenizer=llama).findings == ()
    assert main(commands(clean, llama, tmp_path / "c")["train"]) == 0
    assert "madpo check" not in capsys.readouterr().err


def test_scoring_says_it_too_and_refuses_late_rows_before_it_scores(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"a": 2.0, "b": 1.0} for row in read(odd)]
    data = write(tmp_path / "d.jsonl", rows)
    how = {"score_columns": ("a", "b"), "margin_temperature": 1.0}
    score(data, tmp_path / "S", ScoreSettings(**how))
    names(capsys.readouterr().err, ("24 pairs", data, "1 duplicate"))
    with refused(DataError, data, ("line 4", "2")):
        score(data, tmp_path / "T", ScoreSettings(**how, strict=True))


def test_pairs_of_the_evaluation_are_looked_for_in_the_training(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: None
) -> None:
    rows = text_pairs(12)
    data, other = write(tmp_path / "d.jsonl", rows[:8]), write(tmp_path / "e.jsonl", [*rows[7:]])
    command = [*commands(data, llama, tmp_path / "o")["train"], "--eval_data", str(other), "--strict"]
    assert main(command) == 2
    names(capsys.readouterr().err, other, "line 1", "1 in all")


def test_a_split_that_parts_conversations_is_said(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: None
) -> None:
    turn = "\n\nHuman: {}\n\nAssistant:"
    prompts = [turn.format(i % 10) + (" ok" + turn.format("more") if i >= 10 else "") for i in range(20)]
    data = write(tmp_path / "d.jsonl", [{"prompt": p, "chosen": " a", "rejected": " b"} for p in prompts])
    _, aside = split_by_prompt(load_preferences(data), 0.3, 42, "d")
    held = {prompts.index(row["prompt"]) for row in aside}
    parted = sum((i + 10) % 20 not in held for i in held)
    assert parted
    assert main([*commands(data, llama, tmp_path / "o")["train"], "--eval_share", "0.3"]) == 0
    names(capsys.readouterr().err, (f"{parted} of {len(held)} held-out pairs", "continues"))


PLAIN, OTHER = "Caf\u00e9 or  tea?\n", "Cafe\u0301 or tea?"
"""The same to a reader, and other bytes."""


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_that_a_reader_cannot_tell_apart_are_on_one_side(chat: bool, tmp_path: Path) -> None:
    rows = [{"prompt": f"{(PLAIN, OTHER)[i % 2]} {i // 2}", "chosen": "a", "rejected": "b"} for i in range(40)]
    rows = [conversation(row) for row in rows] if chat else rows
    data = write(tmp_path / "d.jsonl", rows)
    kept, aside = split_by_prompt(load_preferences(data), 0.3, 0, "d")
    assert {row["pair_id"] // 2 for row in kept}.isdisjoint(row["pair_id"] // 2 for row in aside)
    assert (len(kept), len(aside)) == (28, 12)
    keys = prompt_keys([row["prompt"] for row in load_preferences(data)])
    assert keys[::2] == keys[1::2]
    assert len(set(keys)) == 20
    # Each in a file of its own: a leak.
    train, held = (write(tmp_path / f"{k}.jsonl", rows[k::2]) for k in range(2))
    report = check(train, eval_data=held)
    assert (report.count("leaked_prompt"), report.prompts) == (20, 20)


def test_prompts_that_differ_in_case_or_final_punctuation_are_found(tmp_path: Path) -> None:
    """They stay prompts of their own. Signs inside a prompt, and what a prompt consists of, may mean something."""
    same = ("What is it", "what is it?", "\u201cWHAT IS IT\u201d", "what\u200b is it", "What is it")
    others = ("What is 2*3", "What is 2/3", "?", "!", "stra\u00dfe", "STRASSE")
    rows = [{"prompt": p, "chosen": f"a{i}", "rejected": "b"} for i, p in enumerate((*same, *others))]
    for turn in (dict, conversation):
        data = write(tmp_path / "d.jsonl", [turn(row) for row in rows])
        report = check(data)
        assert report.prompts == 10
        assert {f.kind: f.count for f in report.findings} == {"similar_prompt": 4}
        (finding,) = report.findings
        assert finding.examples == tuple(f"{data}, line {n}, first in 1" for n in (2, 3, 4))
        train, held = write(tmp_path / "t.jsonl", [turn(rows[0])]), write(tmp_path / "h.jsonl", map(turn, rows[1:]))
        leaks = check(train, eval_data=held)
        assert (leaks.count("leaked_similar_prompt"), leaks.count("leaked_prompt")) == (3, 1)
    assert len(set(prompt_keys([row["prompt"] for row in rows]))) == 10


@pytest.mark.parametrize(
    ("least", "most", "kind"),
    [
        (0.02, 0.97, "margin_probability"),
        (3.0, 98.0, "margin_percentage"),
        (0.5, 0.97, None),  # no label is contradicted: margins of pairs that they ordered
        (-0.1, 0.97, None),
        (0.02, 7.0, None),
        (0.0, 0.1, None),
    ],
)
def test_margins_that_look_like_probabilities_are_found(
    least: float, most: float, kind: str | None, tmp_path: Path
) -> None:
    rows = [row | {"reward_margin": m} for row, m in zip(text_pairs(24), np.linspace(least, most, 24), strict=True)]
    found = {f.kind: f.count for f in check(write(tmp_path / "d.jsonl", rows)).findings}
    assert found == ({} if kind is None else {kind: 24})
    assert not check(write(tmp_path / "few.jsonl", rows[:19])).findings


def test_names_of_two_pairs_are_found_and_refused_and_the_remedy_works(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: None
) -> None:
    """As two scored files in one have them."""
    twice = write(tmp_path / "d.jsonl", [row | {"pair_id": i % 8} for i, row in enumerate(text_pairs(12))])
    once = write(tmp_path / "e.jsonl", [row | {"prompt": f"No {i}"} for i, row in enumerate(text_pairs(12))])
    report = check(twice)
    assert {finding.kind: finding.count for finding in report.findings} == {"repeated_id": 4}
    assert report.findings[0].examples[0].endswith("line 9, first in 1")
    for name in ("train", "reward", "tune"):
        assert main(commands(twice, llama, tmp_path / name)[name]) == 2
        names(capsys.readouterr().err, twice, ("line 9", "first in 1"), "--columns.ignore pair_id")
    assert main([*commands(once, llama, tmp_path / "o")["train"], "--eval_data", str(twice)]) == 2
    names(capsys.readouterr().err, twice, ("line 9", "first in 1"))
    assert main([*commands(twice, llama, tmp_path / "p")["train"], "--columns.ignore", "pair_id"]) == 0


def test_a_training_refuses_pairs_that_all_look_the_same(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: None
) -> None:
    """As chat templates for images do, which show only lists of parts."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}"
        "{{ eos_token }}{% endfor %}"
    )
    chats = write(tmp_path / "chats.jsonl", [conversation(row) for row in text_pairs(12)])
    for name in ("train", "reward", "tune"):
        assert main(commands(chats, folder, tmp_path / "o")[name]) == 2
        names(capsys.readouterr().err, chats, "12 dropped")


def test_one_prompt_for_all_rows_is_found(tmp_path: Path) -> None:
    rows = [row | {"prompt": "Answer."} for row in text_pairs(5)]
    found = check(write(tmp_path / "d.jsonl", rows))
    assert (found.count("one_prompt"), found.prompts) == (5, 1)
    assert check(write(tmp_path / "e.jsonl", rows[:2])).count("one_prompt") == 0
    survey = Survey()
    load_preferences(tmp_path / "d.jsonl", survey=survey)
    assert survey.findings.summary() == found.findings


# The date


@pytest.fixture(scope="module")
def dated(llama: Path, tmp_path_factory: Any) -> Path:
    """A model whose chat template prints the date."""
    folder = tmp_path_factory.mktemp("dated") / "model"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CLOCK
    tokenizer.save_pretrained(folder)
    return folder


class Day:
    """What ``datetime`` is for the clock of chat templates, on a day of the test's choice."""

    today = datetime(2026, 3, 1, 12)

    @classmethod
    def now(cls) -> datetime:
        return cls.today


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> type[Day]:
    monkeypatch.setattr(templates_of, "datetime", Day)
    monkeypatch.setattr(Day, "today", Day.today)
    return Day


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.jsonl", [conversation(row) for row in text_pairs(24)])


def test_the_check_says_that_the_template_prints_the_date(chats: Path, dated: Path, llama: Path, day: Any) -> None:
    report = check(chats, tokenizer=dated)
    assert report.date == "2026-03-01T12:00:00"
    assert "2026-03-01" in report.text()
    assert "Today: 2026-03-01" in report.rendered[0]
    assert report.findings == (), "it is no mistake"
    assert check(chats, tokenizer=llama).date is None


class Killed(BaseException):
    """A kill, as far as a process can see one."""


@pytest.mark.parametrize("name", quick(["train", "reward", "tune"], "train"))
def test_what_is_continued_on_another_day_keeps_its_date_and_ends_in_the_same_bytes(
    name: str, chats: Path, dated: Path, tmp_path: Path, day: Any, monkeypatch: Any, own_cache: None
) -> None:
    from madpo.training.resume import ExactResume

    def run(out: Path) -> int:
        save = ["--args.save_steps", "2"] if name in ("train", "tune") else []
        return main([*commands(chats, dated, out)[name], *save])

    assert run(tmp_path / "whole") == 0
    train, ended = ExactResume.train, []

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Killed

    # Killed when the texts are made and the training is about to begin, and started again the next day.
    monkeypatch.setattr(ExactResume, "train", killed)
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    monkeypatch.setattr(ExactResume, "train", lambda self, *a, **k: (ended.append(1), train(self, *a, **k))[1])
    day.today = datetime(2026, 3, 2, 9)
    assert run(tmp_path / "cut") == 0
    assert ended
    weights = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors"))
    assert weights
    for path in weights:
        assert (tmp_path / "cut" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path
    # Another day gives other texts.
    assert run(tmp_path / "later") == 0
    assert any((tmp_path / "later" / p).read_bytes() != (tmp_path / "whole" / p).read_bytes() for p in weights)
    if name != "reward":
        configuration = {"train": "config.toml", "tune": "chosen.toml"}[name]
        assert tomllib.loads((tmp_path / "cut" / configuration).read_text())["date"] == "2026-03-01T12:00:00"


def test_a_configuration_repeats_the_date(chats: Path, dated: Path, tmp_path: Path, day: Any, own_cache: None) -> None:
    assert main(commands(chats, dated, tmp_path / "o")["train"]) == 0
    day.today = datetime(2026, 5, 5)
    again = ["train", str(chats), "--config", str(tmp_path / "o" / "config.toml"), "--output_dir", str(tmp_path / "p")]
    assert main(again) == 0
    one, other = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "op")
    assert one == other


def test_a_damaged_start_is_one_sentence(tmp_path: Path, day: Any) -> None:
    assert started_clock(tmp_path).now == Day.today
    day.today = datetime(2027, 1, 1)
    assert started_clock(tmp_path).now == datetime(2026, 3, 1, 12)
    for content in ("{", "[]", '{"started": "soon"}'):
        (file,) = tmp_path.iterdir()
        file.write_text(content)
        with refused(StorageError, file):
            started_clock(tmp_path)


def test_what_is_no_date_is_refused() -> None:
    with refused(ConfigError, ("date", "soon")):
        load_config(None, TrainSettings, ["model=m", "date=soon"])
