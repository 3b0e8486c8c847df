"""Conversations that ``PreferenceTrainer`` renders itself: findings, sentences, and the date of the first start."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from madpo.core.errors import ConfigError, DataError
from madpo.data import templates
from madpo.training import PreferenceConfig, PreferenceTrainer
from practice_cases import conversation, text_pairs

DATED = (
    "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def made(llama: Path, tmp_path: Path, own_cache: None) -> Any:
    """A trainer of some rows, with a template of the test's choice."""

    def make(rows: list[dict[str, Any]], template: str | None = None, out: str = "o") -> PreferenceTrainer:
        tokenizer = AutoTokenizer.from_pretrained(llama)
        tokenizer.chat_template = template or tokenizer.chat_template
        args = PreferenceConfig(
            output_dir=str(tmp_path / out), bf16=False, use_cpu=True, report_to="none", max_steps=2, save_steps=1
        )
        return PreferenceTrainer(
            AutoModelForCausalLM.from_pretrained(llama),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    return make


CHATS = [conversation(row) for row in text_pairs(6)]


def thinking(row: dict[str, Any]) -> dict[str, Any]:
    return row | {
        side: [{"role": "assistant", "content": f"<think>{side}</think>\n\nYes."}] for side in ("chosen", "rejected")
    }


def test_what_the_template_does_is_said_in_one_line(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made([*map(thinking, CHATS[:2]), *CHATS[2:]], R1)
    said = capsys.readouterr().err
    assert "train, 6 pairs: the chat template leaves out text in 4 of 12 conversations" in said
    assert "both sides of 2 pairs have the same tokens" in said
    assert "beginning" not in said
    made([{"prompt": "<s>a", "chosen": " b", "rejected": " c"}, {"prompt": "a", "chosen": " b", "rejected": " c"}])
    assert "train, 2 pairs: 1 pairs begin with two beginning tokens." in capsys.readouterr().err
    made(CHATS)
    assert "train, " not in capsys.readouterr().err


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[0].content.index('zzz') }}"])
def test_whatever_a_template_raises_names_the_row(template: str, made: Any) -> None:
    late = "{% if 'film 7' in messages[0].content %}" + template + "{% else %}a{% endif %}"
    rows = [conversation(row | {"prompt": f"The film {i}"}) for i, row in enumerate(text_pairs(9))]
    with pytest.raises(DataError, match=r"train data set, row 7: the chat template of .*llama refuses"):
        made(rows, late)


def test_a_template_that_grows_without_end_is_stopped(made: Any) -> None:
    with pytest.raises(ConfigError, match=r"train data set, row 0: the chat template of .*llama cannot be used"):
        made(CHATS, "{{ 'a'.zfill(9999999999) }}")


def test_messages_without_a_shared_beginning_name_the_row(made: Any) -> None:
    whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHATS]
    bad = {name: CHATS[0][name] for name in ("chosen", "rejected")}
    with pytest.raises(DataError, match="train data set, row 2: chosen and rejected share no message"):
        made([*whole[:2], bad, *whole[3:]])


def test_what_is_no_template_s_fault_is_raised_as_it_is(made: Any) -> None:
    with pytest.raises(KeyError, match="rejected"):
        made([{name: row[name] for name in ("prompt", "chosen")} for row in CHATS])


def test_a_training_continues_on_another_day(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Day:
        today = datetime(2026, 3, 1)
        now = classmethod(lambda cls: cls.today)

    monkeypatch.setattr(templates, "datetime", Day)
    first = made(CHATS, DATED)
    assert "2026-03-01T00:00:00" in capsys.readouterr().err
    first.train()
    shutil.rmtree(tmp_path / "o" / "checkpoint-2")
    Day.today = datetime(2026, 3, 2)
    second = made(CHATS, DATED)
    assert second.train_dataset["prompt_ids"][:] == first.train_dataset["prompt_ids"][:]
    assert second.train(resume_from_checkpoint=True).global_step == 2
    assert made(CHATS, DATED, "other").train_dataset["prompt_ids"][:] != first.train_dataset["prompt_ids"][:]
    # Without a date nothing is left behind.
    made(CHATS, None, "plain")
    assert not list((tmp_path / "plain").rglob(".first_start.json"))
    assert json.loads((tmp_path / "o" / ".first_start.json").read_bytes()) == {"started": "2026-03-01T00:00:00"}
