"""Fuzzers for chat templates: those that TRL ships, damaged and with odd programs put in, on odd conversations."""

import json
import time
from pathlib import Path

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from jinja2.defaults import DEFAULT_FILTERS
from transformers import AutoTokenizer

from fuzz_cases import damaged, fresh, fuzzed, survives
from madpo.data import check, load_preferences

SHIPPED = [path.read_text() for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))]
NUMBERS = st.sampled_from(["0", "-1", "7", "100000", "9999999999", "10**30", "1e308", "true", "none", "'7'"])
VALUES = st.sampled_from(
    [
        *(
            "messages",
            "messages[0]",
            "messages[-1].content",
            "messages[0].role",
            "bos_token",
            "nothing",
            "nothing.at.all",
        ),
        *(
            "'a'",
            "'%s%s'",
            "'{}{0}'",
            "'{:>9}'",
            "[]",
            "[[1], [2]]",
            "{}",
            "{'a': [1]}",
            "range(9)",
            "loop",
            "loop.index",
        ),
        *("namespace(x=1)", "dict(a=1)", "strftime_now", "strftime_now('%Y')", "cycler('a', 'b')", "joiner()", "self"),
    ]
)
METHODS = [
    *("zfill", "center", "ljust", "rjust", "expandtabs", "replace", "join", "split", "rsplit", "splitlines", "strip"),
    *("upper", "title", "translate", "format", "format_map", "encode", "index", "find", "count", "startswith", "mro"),
    *("partition", "casefold", "maketrans", "isdigit", "items", "keys", "values", "get", "copy", "update", "append"),
    *("pop", "__class__", "__init__", "__globals__", "bit_length", "to_bytes"),
]
FILTERS = [*sorted(DEFAULT_FILTERS), "tojson", "nothing"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "if", "is"]


@st.composite
def expressions(draw, depth=2):
    """A Jinja expression: values, methods, filters and operators in any order, most of them without a meaning."""
    found = draw(VALUES | NUMBERS)
    for _ in range(draw(st.integers(0, depth))):
        how = draw(st.sampled_from(["method", "filter", "operator", "item", "attribute"]))
        arguments = ", ".join(draw(st.lists(VALUES | NUMBERS, max_size=3)))
        if how == "method":
            found = f"({found}).{draw(st.sampled_from(METHODS))}({arguments})"
        elif how == "filter":
            found = f"({found})|{draw(st.sampled_from(FILTERS))}" + (f"({arguments})" if arguments else "")
        elif how == "operator":
            found = f"({found}) {draw(st.sampled_from(OPERATORS))} ({draw(VALUES | NUMBERS)})"
        elif how == "item":
            found = f"({found})[{draw(VALUES | NUMBERS | st.just('1:') | st.just('::-1'))}]"
        else:
            found = f"({found}).{draw(st.sampled_from(METHODS))}"
    return found


@st.composite
def programs(draw):
    """A piece of a template that prints, loops, grows, calls itself or breaks off."""
    one, other = draw(expressions()), draw(expressions())
    shapes = [
        "{{ %(one)s }}",
        "{%% set x = %(one)s %%}{{ x }}{{ x|length }}",
        "{%% for i in %(one)s %%}{{ i }}{{ %(other)s }}{%% endfor %%}",
        "{%% for i in range(99) %%}{%% for j in range(99999) %%}{{ %(one)s }}{%% endfor %%}{%% endfor %%}",
        "{%% set ns = namespace(x=%(one)s) %%}{%% for i in range(40) %%}{%% set ns.x = ns.x %(sign)s ns.x %%}"
        "{%% endfor %%}{{ ns.x }}",
        "{%% set ns = namespace(x=%(one)s) %%}{%% for i in range(40) %%}{%% set ns.x = [ns.x, ns.x] %%}{%% endfor %%}"
        "{{ ns.x|%(filter)s }}",
        "{%% macro m(a) %%}{{ a }}{{ m(%(one)s) }}{%% endmacro %%}{{ m(1) }}",
        "{%% for i in [%(one)s] recursive %%}{{ loop([%(other)s]) }}{%% endfor %%}",
        "{%% if %(one)s %%}{{ raise_exception(%(other)s) }}{%% endif %%}",
        "{%% generation %%}{{ %(one)s }}{%% endgeneration %%}",
        "{%% filter %(filter)s %%}{{ %(one)s }}{%% endfilter %%}",
        "{%% break %%}{%% continue %%}",
        "{%% include %(one)s %%}",
        "{%% call(x) %(one)s %%}{{ x }}{%% endcall %%}",
    ]
    names = {
        "one": one,
        "other": other,
        "sign": draw(st.sampled_from(OPERATORS)),
        "filter": draw(st.sampled_from(FILTERS)),
    }
    return draw(st.sampled_from(shapes)) % (names | {"one": one, "other": other})


@st.composite
def templates(draw):
    """A shipped template with programs put in or bytes damaged, or only a program."""
    base = draw(st.sampled_from(SHIPPED) | st.just(""))
    for _ in range(draw(st.integers(0 if base else 1, 2))):
        places = [i for i in range(len(base)) if base.startswith(("{%", "{{"), i)] or [0]
        at = draw(st.sampled_from(places))
        base = base[:at] + draw(programs()) + base[at:]
    if draw(st.booleans()):
        base = draw(damaged(base.encode())).decode("utf-8", "replace")
    return base


ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
MESSAGES = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, ROLES, st.text(max_size=12)),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def tokenizer(llama):
    return AutoTokenizer.from_pretrained(llama)


@fuzzed()
@given(template=templates(), prompt=MESSAGES, chosen=MESSAGES, rejected=MESSAGES, whole=st.booleans())
def test_any_chat_template(template, prompt, chosen, rejected, whole, tokenizer, tmp_path):
    folder = fresh(tmp_path, "data")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if whole:
        row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    (folder / "d.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer.chat_template = template
    for read in (check, load_preferences):
        began = time.monotonic()
        survives("chat template", lambda read=read: read(folder / "d.jsonl", tokenizer=tokenizer), tmp_path)
        assert time.monotonic() - began < 200, "each of a row's three renderings ends within a minute"
