"""``madpo chat``: policy and reference side by side, through standard input, without anything a terminal obeys."""

import io
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from madpo.core.errors import ConfigError
from madpo.models.load import build_tiny
from madpo.operations.chat import Chat, without_control
from madpo.operations.settings import ChatSettings
from practice_cases import run, text_pairs, write
from refusals import refused

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    model = build_tiny("llama", folder / "model", seed=1)
    data = write(folder / "pairs.jsonl", text_pairs(8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MADPO_CACHE", str(folder / "cache"))
        run("train", data, "--model_name_or_path", model, "--loss", "dpo", "--learning_rate", "0.05", "--epochs", 8,
            "--batch_size", 8, "--output_dir", folder / "policy")  # fmt: skip
    return folder / "policy"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07a\x1b]8;;http://x\x1b\\\\b", "ab"),
        ("a\x9b2Jb\x07\r\x08", "a2Jb"),
        ("\x1bc\x1b(0", "c(0"),
        ("\u202eabc\u2066", "abc"),
        ("tab\tand\nline 😀 é", "tab\tand\nline 😀 é"),
    ],
)
def test_what_a_terminal_obeys_is_taken_out(text: str, left: str) -> None:
    assert without_control(text.replace("\\\\", "\\")) == left


def test_one_question_has_two_answers(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("chat", policy, "--prompt", "The film", "--max_new_tokens", 8, "--temperature", 0)
    run(*asked)
    first = capsys.readouterr().out
    run(*asked)
    assert capsys.readouterr().out == first
    assert "policy" in first
    assert "model" in first


def test_lines_of_standard_input_are_answered_in_turn(
    policy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The film\n\n/help\nThe film\n/new\n/quit\nThe end\n"))
    run("chat", policy, "--max_new_tokens", 4)
    out = capsys.readouterr().out
    assert out.count("policy") == 2
    assert "/help" in out


def test_each_side_remembers_its_own_answers(policy: Path) -> None:
    chat = Chat(policy, ChatSettings(max_new_tokens=4, system="Be brief."))
    one, other = chat.answer("Hi")
    assert [message["content"] for message in chat._said[0]] == ["Be brief.", "Hi", one]
    assert [message["content"] for message in chat._said[1]] == ["Be brief.", "Hi", other]
    chat.answer("And?")
    assert len(chat._said[0]) == len(chat._said[1]) == 5
    chat.forget()
    assert chat._said == [[{"role": "system", "content": "Be brief."}]] * 2


def test_a_model_without_a_chat_template_continues_texts(policy: Path) -> None:
    for folder in (policy.parent / "model", policy / "adapter"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = None
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
    with refused(ConfigError, policy, "system"):
        Chat(policy, ChatSettings(system="Be brief."))
    chat = Chat(policy, ChatSettings(max_new_tokens=4))
    assert not chat.remembers
    assert all(isinstance(answer, str) for answer in chat.answer("The film"))
