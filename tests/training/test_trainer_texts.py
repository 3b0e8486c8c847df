"""Conversations that ``PreferenceTrainer`` renders itself: findings, sentences, and the date of the first start."""

import json
import shutil
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from madpo.core.errors import ConfigError, DataError
from madpo.data import templates
from madpo.losses import SimPO
from madpo.training import PreferenceConfig, PreferenceTrainer, rendering
from practice_cases import conversation, text_pairs
from refusals import names, refused

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
    """A trainer of some rows, with a template of the test's choice. Streamed rows have a loss without a reference."""

    def make(
        rows: list[dict[str, Any]], template: str | None = None, out: str = "o", *, streamed: bool = False
    ) -> PreferenceTrainer:
        tokenizer = AutoTokenizer.from_pretrained(llama)
        tokenizer.chat_template = template or tokenizer.chat_template
        args = PreferenceConfig(
            output_dir=str(tmp_path / out), bf16=False, use_cpu=True, report_to="none", max_steps=2, save_steps=1
        )
        return PreferenceTrainer(
            AutoModelForCausalLM.from_pretrained(llama),
            args=args,
            train_dataset=IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows),
            processing_class=tokenizer,
            loss=SimPO() if streamed else None,
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
    names(said, ("train", "6 pairs"), "4 of 12", "2 pairs")
    assert said.count(" pairs") == 2, "and nothing of doubled beginnings"
    made([{"prompt": "<s>a", "chosen": " b", "rejected": " c"}, {"prompt": "a", "chosen": " b", "rejected": " c"}])
    names(capsys.readouterr().err, ("train", "2 pairs"), "1 pairs")
    made([{"prompt": "a", "chosen": " b", "rejected": f" {c}"} for c in ("c</s></s>", "d</s>", "e")])
    names(capsys.readouterr().err, ("train", "3 pairs"), "1 pairs end")
    made(CHATS)
    assert "train, " not in capsys.readouterr().err


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[0].content.index('zzz') }}"])
def test_whatever_a_template_raises_names_the_row(template: str, made: Any) -> None:
    late = "{% if 'film 7' in messages[0].content %}" + template + "{% else %}a{% endif %}"
    rows = [conversation(row | {"prompt": f"The film {i}"}) for i, row in enumerate(text_pairs(9))]
    with refused(DataError, "train", "row 7", "llama"):
        made(rows, late)


def test_a_template_that_grows_without_end_is_stopped(made: Any) -> None:
    with refused(ConfigError, "train", "row 0", "llama"):
        made(CHATS, "{{ 'a'.zfill(9999999999) }}")


def test_messages_without_a_shared_beginning_name_the_row(made: Any) -> None:
    whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHATS]
    bad = {name: CHATS[0][name] for name in ("chosen", "rejected")}
    with refused(DataError, "train", "row 2"):
        made([*whole[:2], bad, *whole[3:]])


def test_what_is_no_template_s_fault_is_raised_as_it_is(made: Any) -> None:
    with pytest.raises(KeyError, match="rejected"):  # of a stream nobody knows the columns before
        made([{name: row[name] for name in ("prompt", "chosen")} for row in CHATS], streamed=True)


def test_a_stream_is_rendered_like_rows_that_are_there(
    made: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = made(CHATS, streamed=True)
    assert "train, " not in capsys.readouterr().err
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert [{c: row[c] for c in columns} for row in streamed.train_dataset] == list(
        made(CHATS, out="whole").train_dataset.select_columns(list(columns))
    )
    monkeypatch.setattr(rendering, "FIRST_ROWS", 4)
    made([*map(thinking, CHATS[:2]), *CHATS[2:]], R1, streamed=True)
    said = capsys.readouterr().err
    names(said, ("train", "4 pairs", "stream"), "4 of", "2 pairs")


@pytest.mark.parametrize("bad", ["{{ 1 / 0 }}", "{{ 'a'.zfill(9999999999) }}"])
def test_a_row_of_a_stream_that_cannot_be_rendered_is_named_when_it_is_met(
    bad: str, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "FIRST_ROWS", 2)
    rows = [conversation(row | {"prompt": f"The film {i}"}) for i, row in enumerate(text_pairs(9))]
    trainer = made(rows, "{% if 'film 7' in messages[0].content %}" + bad + "{% else %}a b c{% endif %}", streamed=True)
    with refused((DataError, ConfigError), "streamed", "'The film 7'", "llama"):
        trainer.train()
    with refused(DataError, "streamed"):
        made([{name: CHATS[0][name] for name in ("chosen", "rejected")}], streamed=True)
    with refused(DataError, "streamed"):
        made([CHATS[0], CHATS[1] | {"prompt": []}], streamed=True)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_training_continues_on_another_day(
    streamed: bool, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = partial(made, streamed=streamed)

    def prompts(trainer: PreferenceTrainer) -> list[list[int]]:
        return [row["prompt_ids"] for row in trainer.train_dataset]

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
    assert prompts(second) == prompts(first)
    assert second.train(resume_from_checkpoint=True).global_step == 2
    assert prompts(made(CHATS, DATED, "other")) != prompts(first)
    # Without a date nothing is left behind.
    made(CHATS, None, "plain")
    assert not list((tmp_path / "plain").rglob(".first_start.json"))
    assert json.loads((tmp_path / "o" / ".first_start.json").read_bytes()) == {"started": "2026-03-01T00:00:00"}


@pytest.mark.parametrize(("target", "named"), [("no_such_layer", "no_such_layer"), ("input_layernorm", "LlamaRMSNorm")])
def test_layers_that_peft_cannot_adapt_are_one_sentence(target: str, named: str, llama: Path, tmp_path: Path) -> None:
    args = PreferenceConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    adapter = LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM")
    for model in (str(llama), AutoModelForCausalLM.from_pretrained(llama)):
        with refused(ConfigError, "PEFT", named):
            PreferenceTrainer(model, args=args, train_dataset=Dataset.from_list(CHATS), peft_config=adapter)
