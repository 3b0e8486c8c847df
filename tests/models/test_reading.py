"""Models that the engine would read wrongly are refused, with what is wrong and what to do."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from families import tiny as of_any_family
from madpo.core.errors import ConfigError
from madpo.models.engine.kl import completion_kl
from madpo.models.engine.logprobs import completion_logps, install_completion_head, position_limit
from madpo.models.engine.sampling import generate
from madpo.models.load import build_tiny, load_model
from refusals import refused

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **SPECIAL, **more}))
    for parameter in model.parameters():  # the usual start is so small that mistakes would not show
        parameter.data.normal_(std=0.3)
    return model.eval()


def llama(**more: Any) -> Any:
    return tiny("llama", num_key_value_heads=2, **more)


@pytest.mark.parametrize(
    ("kind", "more", "name"),
    [
        ("modernbert-decoder", {"cls_token_id": 1, "sep_token_id": 2}, "ModernBertDecoderForCausalLM"),
        ("roberta", {"is_decoder": True}, "RobertaForCausalLM"),
        ("bert", {}, "BertLMHeadModel"),
    ],
)
def test_architectures_whose_logits_are_made_otherwise_are_refused(kind: str, more: dict[str, Any], name: str) -> None:
    with refused(ConfigError, name):
        install_completion_head(tiny(kind, **more))


@pytest.mark.parametrize("wrong", [False, True])
def test_weights_in_float32_are_checked_under_autocast(wrong: bool) -> None:
    """As in full training with ``bf16``, TRL's default. Logits of real models are far larger than 1."""
    model = llama(tie_word_embeddings=False)
    model.lm_head.weight.data *= 100
    rows = {"input_ids": torch.tensor([[1, 5, 7, 2], [1, 5, 9, 2]])}
    rows |= {"attention_mask": torch.ones(2, 4), "completion_mask": torch.tensor([[0, 0, 1, 1]] * 2)}
    plain = completion_logps(copy.deepcopy(model), **rows).logps
    if wrong:
        own = model.lm_head.forward
        model.lm_head.forward = lambda x: own(x).roll(1, -1)  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16):
        if wrong:
            with refused(ConfigError, "LlamaForCausalLM"):
                completion_logps(model, **rows)
        else:
            found = completion_logps(model, **rows).logps
            assert float((found - plain).abs().max()) < 0.02 * float(plain.abs().max())
            assert generate(model, [[1, 5], [1, 5, 7]], keys=[0, 1], draw=0, seed=0, max_new_tokens=2, eos_token_ids=())


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = llama()
    model.model.forward = _seeing_all(model.model.forward)
    with refused(ConfigError, "LlamaForCausalLM", "is_decoder"):
        install_completion_head(model)


def _seeing_all(forward: Callable[..., Any]) -> Callable[..., Any]:
    def everyone(input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        n, length = input_ids.shape
        return forward(input_ids=input_ids, attention_mask=torch.zeros(n, 1, length, length), **kwargs)

    return everyone


def test_reading_a_model_changes_nothing_in_it() -> None:
    model: nn.Module = llama().train()
    model.model.layers[0].eval()  # type: ignore[union-attr, index]
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    install_completion_head(model)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_cap_of_recurrent_gemma_has_another_name() -> None:
    model = tiny("recurrent_gemma", num_key_value_heads=1, head_dim=8, lru_width=16, logits_soft_cap=2.0)
    ids = torch.tensor([[5, 6, 7, 8]])
    scores = completion_logps(model, ids, torch.ones_like(ids), torch.tensor([[0, 0, 1, 1]]))
    logps = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    assert scores.logps.item() == pytest.approx(float(logps[0, 1, 7] + logps[0, 2, 8]), abs=1e-5)


def test_learned_positions_are_a_limit() -> None:
    model = tiny("gpt2", n_positions=8)
    assert position_limit(model) == 8
    assert position_limit(llama()) is None
    ids = torch.full((1, 9), 5)
    with refused(ConfigError, ("GPT2LMHeadModel", "8"), "9", "max_length"):
        completion_logps(model, ids, torch.ones_like(ids), torch.ones_like(ids))
    padded = torch.ones_like(ids)
    padded[0, 0] = 0  # padding takes no position
    assert completion_logps(model, ids, padded, padded).logps.isfinite().all()
    how = {"keys": [0], "draw": 0, "seed": 0, "eos_token_ids": []}
    with refused(ConfigError, "8", "10", "max_new_tokens"):
        generate(model, [[3, 4]], max_new_tokens=8, **how)
    assert len(generate(model, [[3, 4]], max_new_tokens=6, **how)[0]) == 6
    roberta = AutoConfig.for_model("roberta", **SHAPE, max_position_embeddings=10, pad_token_id=1)
    assert position_limit(AutoModelForSequenceClassification.from_config(roberta)) == 8


@pytest.mark.parametrize(
    ("family", "option"),
    [
        *((family, "n_positions") for family in ("gptj", "codegen", "ctrl", "openai-gpt")),
        ("mpt", "max_seq_len"),
        ("whisper", "max_target_positions"),
    ],
)
def test_tables_of_positions_are_a_limit_whatever_they_are_called(family: str, option: str) -> None:
    """Longer texts ended in an IndexError, or in tensors of unlike sizes."""
    model = of_any_family(family, **{option: 16})
    fits, longer = torch.full((1, 16), 5), torch.full((1, 17), 5)
    with refused(ConfigError, type(model).__name__, "16", "17", "max_length"):
        completion_logps(model, longer, torch.ones_like(longer), torch.ones_like(longer))
    found = completion_logps(model, fits, torch.ones_like(fits), torch.ones_like(fits)).logps
    logps = model(input_ids=fits, use_cache=False).logits.log_softmax(-1)
    assert found.item() == pytest.approx(float(logps[0, :-1, 5].sum()), rel=1e-5)


def test_models_of_unlike_vocabularies_have_no_kl() -> None:
    policy, reference = llama(), llama(vocab_size=64)
    ids = torch.tensor([[5, 6, 7]])
    for pair, (own, other) in (((policy, reference), (50, 64)), ((reference, policy), (64, 50))):
        with refused(ConfigError, ("policy", own), ("reference", other), "resize_token_embeddings"):
            completion_kl(*pair, ids, torch.ones_like(ids), torch.ones_like(ids))


def test_an_adapter_of_the_head_is_refused() -> None:
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["lm_head"]))
    ids = torch.tensor([[5, 6, 7]])
    with refused(ConfigError, "adapter", "head (Linear)"):
        completion_logps(adapted, ids, torch.ones_like(ids), torch.ones_like(ids))


def test_virtual_tokens_are_refused_where_they_would_be_left_out(tmp_path: Path) -> None:
    base = build_tiny("llama", tmp_path / "base")
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(load_model(base), config).save_pretrained(tmp_path / "adapter")
    with refused(ConfigError, tmp_path / "adapter", "PROMPT_TUNING"):
        load_model(base, adapter=tmp_path / "adapter")


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("bart", d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=50).save_pretrained(
        tmp_path
    )
    with refused(ConfigError, tmp_path, "encoder-decoder"):
        load_model(tmp_path)
