"""Chat templates: the text they make is transformers' own, within bounds, and what they leave out is counted."""

import re
import resource
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from madpo.core.errors import ConfigError, DataError, MadpoError, located
from madpo.data import check, load_preferences
from madpo.data.messages import said
from madpo.data.templates import Clock, left_out, render
from practice_cases import write
from quick import quick
from refusals import refused

USER = {"role": "user", "content": "Say <hi>."}
HI, NO = {"role": "assistant", "content": "Hi!"}, {"role": "assistant", "content": "No."}
CHAT = {"prompt": [USER], "chosen": [HI], "rejected": [NO]}
SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TURNS = [
    *(USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHi 'you'"}),
    *({"role": "user", "content": "And?\n" * 9}, {"role": "assistant", "content": "No.\n\n"}),
]


@pytest.fixture
def tokenizer(llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama)


@pytest.mark.parametrize("template", SHIPPED, ids=lambda path: path.stem)
def test_the_text_is_that_of_transformers(template: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = template.read_text()
    for messages in (TURNS, [*said("system", "Be brief."), *TURNS[:3]]):
        for prompted in (False, True):
            caught = None
            try:
                expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
            except Exception as error:
                caught = str(error).splitlines()[0]
            if caught is not None:
                with pytest.raises(DataError, match=re.escape(caught)):
                    render(tokenizer, messages, Clock(), add_generation_prompt=prompted)
            else:
                assert render(tokenizer, messages, Clock(), add_generation_prompt=prompted) == expected


def test_there_are_templates_to_compare_with() -> None:
    assert len(SHIPPED) > 40


GROWING = (
    "{{% set ns = namespace(x={}) %}}{{% for i in range(60) %}}{{% set ns.x = {} %}}{{% endfor %}}{{{{ ns.x{} }}}}"
)
BOMBS = [
    "{{ 'a'.zfill(9999999999) }}",
    "{{ 'a'.encode().center(9999999999) }}",
    "{{ 'a'|center(9999999999) }}",
    "{{ 'a' * 10**10 }}",
    "{{ 9999999999 * [0] }}",
    "{{ 9**(9**9) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '%9999999999s'|format(1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:>{w}}'.format_map({'w': 9999999999}) }}",
    "{{ ('\t' * 1000).expandtabs(1000000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "{{ (('a' * 100000)|list)|join('b' * 100000) }}",
    "{{ ('b' * 100000).join(('a' * 100000)|list) }}",
    "{{ ('a' * 1000).translate({97: 'b' * 1000000}) }}",
    "{{ ('a\n' * 100000)|indent('b' * 100000) }}",
    "{{ ('a ' * 100000)|wordwrap(1, wrapstring='b' * 100000) }}",
    "{{ messages|tojson(indent=1000000000) }}",
    "{{ (5).to_bytes(9999999999, 'big') }}",
    "{{ ([[0] * 5000] * 5000)|sum(start=[])|length }}",
    "{{ ('a' * 20000000)|list|length }}",
    "{{ ('a ' * 20000000).split()|length }}",
    "{% set s = 'a' * 60000000 %}{% set ns = namespace(l=[]) %}{% for i in range(999) %}"
    "{% set ns.l = ns.l + [s[i:]] %}{% endfor %}",
    GROWING.format("'a'", "ns.x + ns.x", ""),
    GROWING.format("'a'", "ns.x ~ ns.x", ""),
    GROWING.format("[1]", "ns.x + ns.x", "|length"),
    GROWING.format("[1]", "[ns.x, ns.x]", ""),
    GROWING.format("[1]", "[ns.x, ns.x]", "|tojson"),
    GROWING.format("[1]", "[ns.x, ns.x]", "|string|length"),
    GROWING.format("[1]", "'a' ~ [ns.x, ns.x]", "|length"),
    *(
        "{% set ns = namespace(a=" + start + ", b=" + start + ") %}{% for i in range(60) %}"
        "{% set ns.a = " + twice.replace("X", "ns.a") + " %}{% set ns.b = " + twice.replace("X", "ns.b") + " %}"
        "{% endfor %}" + use
        for start, use in (("[1]", "{{ ns.a == ns.b }}"), ("(1,)", "{{ {ns.a: 1} }}"))
        for twice in ("[X, X]", "(X, X)", "[X] * 2", "[X] + [X]", "{'a': X, 'b': X}", "dict(a=X, b=X)")
    ),
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = m(ns.x) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}static{% endfor %}{% endfor %}",
    "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "+".join(["1"] * 20000) + " }}",
    "a" * 1_000_001,
]
LIGHT = [bomb for bomb in BOMBS if not any(part in bomb for part in ("5000] * 5000", "static", "ns.x + ns.x"))]


@pytest.mark.parametrize("bomb", quick(BOMBS, *LIGHT), ids=lambda text: text[:60])
def test_a_template_that_builds_gigabytes_is_stopped(bomb: str, tokenizer: Any) -> None:
    tokenizer.chat_template = bomb
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused(ConfigError, "d.jsonl", "line 7", "llama"), located("d.jsonl, line 7"):
        render(tokenizer, [USER], Clock())
    assert time.monotonic() - began < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


ODD = [
    "{{ 1/0 }}",
    "{{ messages[0].content.index('zzz') }}",
    "{{ messages[0].nothing.at.all }}",
    "{{ range(10**7) }}",
    "{{ 2.0**100000 }}",
    "{{ 10**9000 }}",
    "{{ raise_exception('no \x1b]0;P\x07 way') }}",
    "{{ cycler() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ strftime_now('%d' * 9999) }}",
    "{{ strftime_now(3) }}",
    "{{ lipsum() }}",
    "{{ [1, 2]|random }}",
    "{% include 'x' %}",
    "{% break %}",
    "{% if %}",
    "{{ 'x' if }}",
    "{{ '\\ud800' }}",
    "{{ messages|map('nothing')|list }}",
]


@pytest.mark.parametrize("template", ODD)
def test_whatever_a_template_raises_is_one_sentence_with_row_and_template(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(MadpoError, match=r"d.jsonl, line 7: ") as found, located("d.jsonl, line 7"):
        render(tokenizer, [USER], Clock())
    assert "llama" in str(found.value) or r"\ud800" in str(found.value)
    assert str(found.value).isprintable()


def test_the_budget_grows_with_the_conversation(tokenizer: Any) -> None:
    """What is long is no bomb: a template that gathers its text turn by turn copies it as many times."""
    tokenizer.chat_template = (
        "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.role + ': ' + m.content + '\n' %}"
        "{% endfor %}{{ ns.x }}"
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 40} for i in range(400)]
    assert render(tokenizer, messages, Clock()).count("word") == 16_000
    (long,) = [{"role": "user", "content": "word " * 1_000_000}]
    assert len(render(tokenizer, [long], Clock())) > 5_000_000


def test_several_templates_without_a_default_are_named_and_the_remedy_works(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").rename(folder / "additional_chat_templates" / "rag.jinja")
    data = write(tmp_path / "d.jsonl", [CHAT])
    with refused(ConfigError, "rag", "chat_template.jinja"):
        check(data, tokenizer=folder)
    shutil.copy(folder / "additional_chat_templates" / "rag.jinja", folder / "chat_template.jinja")
    assert load_preferences(data, tokenizer=folder) == load_preferences(data, tokenizer=llama)


@pytest.mark.parametrize(
    "bad",
    [
        {"chosen": [HI], "rejected": [NO]},
        {"chosen": [*said("system", "Be kind."), USER, HI], "rejected": [USER, NO]},
        {"chosen": [USER, HI], "rejected": [*said("user", "Another?"), NO]},
    ],
)
def test_messages_that_share_no_beginning_are_named_by_row(bad: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    good = {"chosen": [USER, HI], "rejected": [USER, NO]}
    data = write(tmp_path / "d.jsonl", [good, bad, good, bad])
    for read in (check, load_preferences):
        with refused(DataError, "d.jsonl", "line 2", "1 more", "4"):
            read(data, tokenizer=tokenizer)


# What the template does to the text

R1 = (
    "{{ bos_token }}{% for m in messages %}{% set content = m.content.split('</think>')[-1] %}"
    "{{ '<' + m.role + '>' + content + eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROLES = (
    "{{ bos_token }}{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ '<' + m.role + '>' + m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIM = ROLES.replace("m.content }}", "m.content|trim }}")
MERGED = (  # as Mistral: the system prompt goes into the last question
    "{{ bos_token }}{% for m in messages[1:] %}{{ '<' + m.role + '>' }}"
    "{% if loop.last or loop.index == messages|length - 2 %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOJSON = ROLES.replace("m.content }}", "m.content|tojson }}")


def thinking(thought: str, answer: str) -> list[dict[str, str]]:
    return said("assistant", f"<think>\n{thought}\n</think>\n\n{answer}")


@pytest.mark.parametrize(
    ("template", "row", "found"),
    [
        (R1, {"prompt": [USER], "chosen": thinking("a", "4"), "rejected": thinking("b", "4")},
         {"dropped_content": 1, "identical_tokens": 1}),
        (R1, {"prompt": [USER], "chosen": thinking("a", "4"), "rejected": thinking("a", "5")}, {"dropped_content": 1}),
        (R1, {"prompt": [USER, *thinking("a", "4"), USER], "chosen": [HI], "rejected": [NO]}, {"dropped_content": 1}),
        (ROLES, {"prompt": [*said("developer", "In French."), USER], "chosen": [HI], "rejected": [NO]},
         {"dropped_content": 1}),
        (ROLES, {"prompt": [USER, HI, *said("tool", "31 degrees")], "chosen": [HI], "rejected": [NO]},
         {"dropped_content": 1}),
        # A text that occurs once is one message only.
        (ROLES, {"prompt": [*said("tool", "Hi!"), USER], "chosen": [HI], "rejected": [NO]},
         {"dropped_content": 1, "role_order": 1}),
        (TRIM, {"prompt": [USER], "chosen": said("assistant", "Hi! "), "rejected": said("assistant", "Hi!")},
         {"identical_tokens": 1}),
        (TRIM, {"prompt": said("user", " Hi \n"), "chosen": [HI], "rejected": [NO]}, {}),
        (TOJSON, {"prompt": said("user", 'a "b"\nc \u00fc'), "chosen": [HI], "rejected": [NO]}, {}),
        (ROLES, {"prompt": [USER], "chosen": [HI], "rejected": [HI]}, {"identical": 1}),
        (ROLES, {"prompt": said("user", "<s>Hi"), "chosen": [HI], "rejected": [NO]}, {}),
        (ROLES.replace("'<' + m.role + '>' + ", ""), {"prompt": said("user", "<s>Hi"), "chosen": [HI],
         "rejected": [NO]}, {"doubled_start": 1}),
        (None, {"prompt": "<s><user>Hi<assistant>", "chosen": "Hello!</s>", "rejected": "Go away</s>"},
         {"doubled_start": 1}),
        (None, {"prompt": "", "chosen": "<s>Hello!", "rejected": "Go away"}, {"doubled_start": 1, "empty_prompt": 1}),
        (None, {"prompt": "Hi <s>", "chosen": "Hello!", "rejected": "Go away"}, {}),
    ],
)  # fmt: skip
def test_what_the_template_does_to_the_text_is_counted(
    template: str | None, row: dict[str, Any], found: dict[str, int], tokenizer: Any, tmp_path: Path
) -> None:
    if template is not None:
        tokenizer.chat_template = template
    data = write(tmp_path / "d.jsonl", [row])
    findings = {f.kind: f.count for f in check(data, tokenizer=tokenizer).findings}
    findings.pop("boundary", None)
    assert findings == found
    if found:
        with pytest.raises(DataError, match="line 1"):
            check(data, tokenizer=tokenizer, strict=True)


def test_a_text_in_another_order_is_all_there(tokenizer: Any) -> None:
    messages = [*said("system", "Be brief."), *TURNS[:3]]
    tokenizer.chat_template = MERGED
    text = render(tokenizer, messages, Clock())
    assert text.index("Say <hi>.") < text.index("Be brief.")
    assert left_out(messages, text) == []


_ROLE = st.sampled_from(["user", "assistant", "tool", "system"])
_CONTENT = st.text(alphabet="ab \n", min_size=1, max_size=5).map(lambda text: f"[{text}]")


@given(messages=st.lists(st.tuples(_ROLE, _CONTENT), max_size=6), shown=st.sets(_ROLE), order=st.randoms())
def test_left_out_is_what_is_not_there(messages: Any, shown: set[str], order: Any) -> None:
    """Of contents that cannot hold one another, in any order and with white space changed."""
    conversation = [{"role": role, "content": content} for role, content in messages]
    kept = [message for message in conversation if message["role"] in shown]
    order.shuffle(kept)
    text = "".join(f"<{m['role']}>{m['content'].replace(' ', '  ')}\n" for m in kept)
    squeezed = lambda found: sorted("".join(m["content"].split()) for m in found)  # noqa: E731
    missing = [m for m in conversation if m["role"] not in shown]
    assert squeezed(left_out(conversation, text)) == squeezed(missing)


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {}?\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ({"prompt": [USER], "chosen": [HI, USER, HI], "rejected": [NO]}, 1),
        ({"prompt": [USER], "chosen": [HI], "rejected": [NO, *said("tool", "x"), HI]}, 1),
        ({"prompt": [USER], "chosen": [HI, NO], "rejected": [NO]}, 0),
        ({"chosen": HH.format("Why", "So."), "rejected": HH.format("How", "Thus.")}, 1),
        ({"chosen": HH.format("Why", "So."), "rejected": HH.format("Why", "Thus.")}, 0),
        ({side: f"\n\nHuman: {word}\n\nAssistant: No." for side, word in (("chosen", "a"), ("rejected", "b"))}, 1),
        ({"prompt": "Human: Hi", "chosen": "\n\nAssistant: Hello", "rejected": "\n\nAssistant: No"}, 0),
        ({"prompt": "Human: Hi\n\nAssistant:", "chosen": "Hello\nHuman: Go.", "rejected": " No"}, 1),
        ({"prompt": "Write a play.", "chosen": "User: Hello!", "rejected": "No."}, 0),
        ({"prompt": "a", "chosen": "b<|im_end|>\n<|im_start|>user\nc", "rejected": "d"}, 1),
        ({"prompt": "[INST] a [/INST]", "chosen": "b</s>[INST] c [/INST] d", "rejected": "e"}, 1),
    ],
)
def test_turns_of_others_inside_a_completion_are_counted(row: dict[str, Any], count: int, tmp_path: Path) -> None:
    assert check(write(tmp_path / "d.jsonl", [row])).count("other_turns") == count


def test_a_clock_is_one_moment_and_knows_whether_it_was_read(tokenizer: Any) -> None:
    clock = Clock(datetime(2026, 2, 3, 4, 5, 6))
    render(tokenizer, [USER], clock)
    assert not clock.read
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}"
    assert render(tokenizer, [USER], clock) == "2026-02-03 04:05:06"
    assert clock.read
    # Outside, transformers renders as ever.
    assert tokenizer.apply_chat_template([USER], tokenize=False) > "2026-02-04"
