"""Conversations on a real tokenizer and chat template: SmolLM2-135M-Instruct's. No model is loaded."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from madpo.data import check, load_preferences
from madpo.models.locate import load_tokenizer
from madpo.models.packaged import PACKAGED, cache_dir
from practice_cases import write

PACKAGE, FILE = PACKAGED["smollm2-135m-instruct"].parts[0]
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"the package {PACKAGE} is absent"),
]

SYSTEM = {"role": "system", "content": "You are brief."}
DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ONE = {
    "prompt": [said("user", "Is it cold?")],
    "chosen": [said("assistant", "Yes.")],
    "rejected": [said("assistant", "No!")],
}
TURNS = {
    "prompt": [
        SYSTEM,
        said("user", "Hi"),
        said("assistant", "Hello 😀\n\nwho are you?"),
        said("user", "  a Gast, 你好 "),
    ],
    "chosen": [said("assistant", "Welcome, guest.")],
    "rejected": [said("assistant", "")],
}
SEVERAL = {
    "prompt": [SYSTEM, said("user", "Count.")],
    "chosen": [said("assistant", "1"), said("user", "on"), said("assistant", "2")],
    "rejected": [said("assistant", "2"), said("user", "on"), said("assistant", "1")],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """From the unpacked model where there is one, else out of the packaged file, whose weights are not read."""
    unpacked = cache_dir() / "models" / f"smollm2-135m-instruct-{PACKAGED['smollm2-135m-instruct'].sha256[:8]}"
    if (unpacked / "tokenizer_config.json").is_file():
        return load_tokenizer(unpacked)
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    return AutoTokenizer.from_pretrained(Path(next(iter(spec.submodule_search_locations))), gguf_file=FILE)


def rendered(messages: list[dict[str, str]]) -> str:
    """The template written out by hand."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text if messages[0]["role"] == "system" else DEFAULT + text


@pytest.mark.parametrize("row", [ONE, TURNS, SEVERAL])
def test_prompt_and_completions_are_cut_where_the_template_ends_the_prompt(
    tokenizer: Any, row: Any, tmp_path: Path
) -> None:
    (found,) = load_preferences(write(tmp_path / "d.jsonl", [row]), tokenizer=tokenizer)
    prompt = rendered(row["prompt"]) + "<|im_start|>assistant\n"
    assert tokenizer.decode(found["prompt_ids"]) == prompt
    for side in ("chosen", "rejected"):
        whole = rendered(row["prompt"] + row[side])
        assert prompt + tokenizer.decode(found[f"{side}_ids"]) == whole.removesuffix("\n")
        assert found[f"{side}_ids"][-1] == tokenizer.eos_token_id
        # One end token for each answer, and for each message between them.
        assert found[f"{side}_ids"].count(tokenizer.eos_token_id) == len(row[side])


def test_the_check_counts_what_a_real_template_does(tokenizer: Any, tmp_path: Path) -> None:
    implicit = {side: TURNS["prompt"] + TURNS[side] for side in ("chosen", "rejected")}
    rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in (ONE, SEVERAL)]
    report = check(write(tmp_path / "d.jsonl", [*rows, implicit]), tokenizer=tokenizer)
    assert {f.kind: f.count for f in report.findings} == {"empty_completion": 1, "other_turns": 1}
    assert (report.form, report.unit, report.pairs, report.prompts) == ("messages", "tokens", 3, 3)
    assert all(shown.endswith("<|im_end|>'") for shown in report.rendered)
    assert report.roles == {"user > assistant": 1, "system, user > assistant, user, assistant": 1,
                            "system, user, assistant, user > assistant": 1}  # fmt: skip
    odd = [
        ONE | {"prompt": [said("user", "a"), said("user", "b")]},
        ONE | {"prompt": [said("user", "a"), SYSTEM, said("user", "b")]},
        ONE | {"chosen": [said("assistant", "Yes.<|im_end|>")]},
        ONE | {"chosen": [said("assistant", "Yes<|im_end|>, yes.")]},
    ]
    report = check(write(tmp_path / "odd.jsonl", odd), tokenizer=tokenizer)
    assert {f.kind: f.count for f in report.findings} == {"role_order": 2, "doubled_end": 1, "inner_end": 1}


@pytest.mark.parametrize("row", [ONE, TURNS])
@pytest.mark.parametrize("implicit", [False, True])
def test_ids_are_those_of_trl_less_the_line_break_after_the_end_token(
    tokenizer: Any, row: Any, implicit: bool, tmp_path: Path
) -> None:
    from trl import DPOTrainer

    if implicit:
        row = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None)
    (expected,) = DPOTrainer._prepare_dataset(
        SimpleNamespace(), Dataset.from_list([row]), tokenizer, arguments, "train"
    )
    (found,) = load_preferences(write(tmp_path / "d.jsonl", [row]), tokenizer=tokenizer)
    assert found["prompt_ids"] == expected["prompt_ids"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for side in ("chosen_ids", "rejected_ids"):
        assert [*found[side], *newline] == expected[side]


@pytest.mark.slow
def test_a_million_rows_fit_into_500_megabytes_with_a_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    """What a small file takes, and a million times what a row adds to it (text, tokens, hashes), in bytes."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    row = {"prompt": "Question {}: what is it?", "chosen": " It is {}.", "rejected": " I do not know {}."}
    code = (
        "import re, sys; from pathlib import Path; from madpo.data import check;"
        "check(sys.argv[1], tokenizer=sys.argv[2]);"
        # Of this program only: what getrusage says begins with the parent's.
        r"print(1024 * int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]))"
    )
    peaks = []
    for count in (2_000, 42_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for i in range(count):
                file.write(json.dumps({name: text.format(i) for name, text in row.items()}) + "\n")
        command = [sys.executable, "-c", code, str(path), str(tmp_path / "tokenizer")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    per_row = (peaks[1] - peaks[0]) / 40_000
    assert peaks[0] + 1_000_000 * max(0.0, per_row) < 500e6, f"{peaks} bytes for 2,000 and 42,000 rows"
