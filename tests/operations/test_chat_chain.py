"""The chain on conversations: SmolLM2-135M-Instruct's tokenizer and chat template on a model of two layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from madpo.data import check
from madpo.models.packaged import PACKAGED, cache_dir
from practice_cases import read, run, text_pairs, with_turns, write
from refusals import names

PLACE = cache_dir() / "models" / f"smollm2-135m-instruct-{PACKAGED['smollm2-135m-instruct'].sha256[:8]}"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (PLACE / "tokenizer.json").is_file(),
        reason="SmolLM2-135M-Instruct is not unpacked (madpo check DATA --model_name_or_path smollm2-135m-instruct)",
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chat"
    tokenizer = AutoTokenizer.from_pretrained(PLACE)
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("module_cache")
def test_conversations_go_through_the_whole_chain(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [with_turns(row) | {"reward_margin": 2.0 if i % 3 else -1.0} for i, row in enumerate(text_pairs(16))]
    data = write(tmp_path / "chat.jsonl", rows)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows[:4]])
    run("check", data, "--model_name_or_path", model, "--max_length", 256)
    said = capsys.readouterr().out
    names(said, "16 pairs", "system, user, assistant, user > assistant (16)")
    assert check(data, tokenizer=model).findings == ()
    few = ("--args.max_steps", 2, "--batch_size", 4, "--learning_rate", "1e-2")
    run("reward", data, "--model_name_or_path", model, "--eval_share", 0.5, "--output_dir", tmp_path / "rm")
    for loss in ("dpo", "madpo"):
        policy = tmp_path / loss
        where = ("--model_name_or_path", model, "--loss", loss, "--merge", "--output_dir", policy)
        run("train", data, *where, *few)
        assert_loads(model, policy, rows[0]["prompt"])
    weights = [row for row in read(tmp_path / "madpo" / "log.jsonl") if "weight/mean" in row]
    assert weights
    out = tmp_path / "evaluation"
    run(
        "evaluate",
        policy,
        "--prompts",
        prompts,
        "--reward",
        tmp_path / "rm",
        "--max_new_tokens",
        8,
        "--output_dir",
        out,
    )
    report = json.loads((out / "evaluation.json").read_text())
    assert report["prompts"] == len({json.dumps(row["prompt"]) for row in rows[:4]})
    assert all(isinstance(line["prompt"], list) for line in read(out / "samples.jsonl"))


def assert_loads(model: Path, policy: Path, prompt: list[dict[str, Any]]) -> None:
    """PEFT's adapter and transformers' merged model give the same logits, which are not the base model's."""
    tokenizer = AutoTokenizer.from_pretrained(policy / "merged")
    base = AutoTokenizer.from_pretrained(model)
    shown = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert shown == base.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert shown.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    ids = tokenizer(shown, add_special_tokens=False, return_tensors="pt")
    as_it_was = {"dtype": torch.float32}
    found = [
        AutoModelForCausalLM.from_pretrained(policy / "merged", **as_it_was),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, **as_it_was), policy / "adapter"),
        AutoModelForCausalLM.from_pretrained(model, **as_it_was),
    ]
    with torch.no_grad():
        merged, adapted, before = (one.eval()(**ids).logits for one in found)
    # The merged weights were rounded to the dtype of the base model.
    torch.testing.assert_close(merged, adapted, atol=2e-2, rtol=0)
    assert (adapted - before).abs().max() > 3 * (merged - adapted).abs().max()
    found[0].generate(**ids, max_new_tokens=4, do_sample=False)
