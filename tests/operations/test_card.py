"""The card of a policy: front matter that the hub takes, code that runs, the curves, and where all came from."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from madpo.models.load import build_tiny
from madpo.operations.train_report import _origin
from practice_cases import run, text_pairs, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a card of its own, and a policy from it."""
    out = tmp_path_factory.mktemp("card")
    model = build_tiny("llama", out / "model", seed=1)
    (model / "README.md").write_text("---\nlicense: mit\nbase_model: someone/tiny-llama\n---\n")
    rows = [row | {"chosen_score": 1.0, "rejected_score": 0.2} for row in text_pairs(16)]
    data = write(out / "pairs.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MADPO_CACHE", str(out / "cache"))
        run("score", data, "--score_columns", "chosen_score", "rejected_score", "--output_dir", out / "scored")
        run("train", out / "scored" / "scored.jsonl", "--model_name_or_path", model, "--loss", "madpo",
            "--learning_rate", "0.01", "--epochs", 1, "--batch_size", 4, "--args.logging_steps", 1, "--eval_share", 0.3,
            "--merge", "--output_dir", out / "policy")  # fmt: skip
    return out


@pytest.mark.parametrize(("place", "library"), [(".", "peft"), ("adapter", "peft"), ("merged", "transformers")])
def test_the_card_says_where_all_came_from(folder: Path, place: str, library: str) -> None:
    card = ModelCard.load(folder / "policy" / place / "README.md")
    about = card.data.to_dict()
    assert about["library_name"] == library
    assert (about["base_model"], about["license"]) == ("someone/tiny-llama", "mit")
    assert about["pipeline_tag"] == "text-generation"
    for words in ("margins from: the columns chosen_score and rejected_score", "| `lora.rank` | 16 |",
                  "| `learning_rate` | 0.01 |", "| `per_device_train_batch_size` | 4 |", "hf upload OWNER/NAME",
                  "| accuracy |", "madpo chat"):  # fmt: skip
        assert words in card.content, words
    picture = card.content.split("](")[1].split(")")[0]
    assert ET.parse(folder / "policy" / place / picture).getroot().tag.endswith("svg")


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_of_the_card_runs(
    folder: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "policy")
    code = (folder / "policy" / kind / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "chat_template" not in code.split("#")[0], "the pairs are text"
    exec(compile(code.replace("max_new_tokens=64", "max_new_tokens=4"), "card", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_a_base_model_that_the_hub_does_not_know_is_left_out(tmp_path: Path) -> None:
    assert _origin("gemma-3-270m") == ("google/gemma-3-270m", "gemma")
    assert _origin("owner/name") == ("owner/name", None)
    assert _origin(str(tmp_path)) == (None, None)
    for text in (
        "---\nbase_model: [a/b, c/d]\n---\n",
        "---\nbase_model: a b/c\nlicense: [1]\n---\n",
        "---\n: {\n---\n",
    ):
        (tmp_path / "README.md").write_text(text)
        assert _origin(str(tmp_path)) == (None, None), text
    (tmp_path / "README.md").write_text(json.dumps({}))
    assert _origin(str(tmp_path)) == (None, None)
