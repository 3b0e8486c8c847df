"""Tiny random models of any family that transformers can build from a configuration.

Sizes are set by the names that configurations have for them, and a model has a layer of each kind that its family has.
So a family needs an entry of its own only where its sizes must fit together in a way of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

VOCABULARY = 64
LARGEST = 3_000_000
"""Parameters of a model that is still tiny."""

_SIZES: dict[int, str] = {
    64: ("vocab_size vocab_size_per_layer_input n_words unpadded_vocab_size pronunciation_vocab_size shape_vocab_size"),
    32: (
        "hidden_size d_model n_embd dim embedding_size emb_dim word_embed_proj_dim lru_width input_embedding_size "
        "output_embedding_size attention_hidden_size vision_output_dim projector_input_dim projector_output_dim "
        "out_hidden_size"
    ),
    48: (
        "intermediate_size ffn_dim n_inner ffn_hidden_size intermediate_size_mlp d_ff d_inner mlp_hidden_size "
        "encoder_ffn_dim decoder_ffn_dim dff dim_ff dense_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size feed_forward_size"
    ),
    24: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size",
    16: "q_lora_rank kv_lora_rank o_lora_rank qk_head_dim num_position_embeddings image_size attention_chunk_size",
    8: (
        "head_dim kv_channels d_kv global_head_dim attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "mamba_head_dim chunk_size linear_key_head_dim linear_value_head_dim swa_head_dim dim_head d_head "
        "attention_head_size linear_head_dim index_head_dim patch_size hidden_size_per_layer_input "
        "laurel_rank mamba_d_state mamba_chunk_size"
    ),
    6: "sliding_window sliding_window_size attention_window_size window_size local_attention",
    4: (
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads encoder_attention_heads "
        "num_local_experts num_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads state_size "
        "ssm_state_size time_step_rank mamba_dt_rank linear_num_value_heads mm_tokens_per_image"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "
        "num_decoder_layers num_blocks depth layers num_key_value_heads num_kv_heads swa_num_key_value_heads "
        "multi_query_group_num num_global_key_value_heads num_experts_per_tok moe_k moe_top_k num_experts_per_token "
        "top_k_experts moe_topk zero_expert_num linear_num_key_heads linear_num_heads index_n_heads"
    ),
    1: (
        "n_group num_expert_group topk_group first_k_dense_replace n_shared_experts mamba_n_groups n_groups expand "
        "spatial_merge_size temporal_patch_size interleave_moe_layer_step num_dense_layers"
    ),
    0: "num_nextn_predict_layers num_kv_shared_layers pad_token_id",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length model_max_length",
}
_VALUES: dict[str, Any] = {
    **{name: size for size, names in _SIZES.items() for name in names.split()},
    **{"fullatt_block_indexes": [0], "deepstack_visual_indexes": [0], "bos_token_id": 1, "eos_token_id": 2},
    **{"image_token_id": 63, "image_token_index": 63, "video_token_id": 62, "vision_start_token_id": 59},
    **{"boi_token_index": 61, "eoi_token_index": 60, "boi_token_id": 61, "eoi_token_id": 60},
    **{"vision_end_token_id": 58, "audio_token_id": 57},
}
_NEEDED = ("num_key_value_heads", "head_dim", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
"""What may be None in a default configuration of which no model can be built."""
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")
"""Lists of what each layer is."""
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
_DECODERS = (  # encoders that a setting turns into decoders
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
)
_OWN: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "diffllama": {"attention_dropout": 0.0},  # it takes no other
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "num_heads": 4, "expand": 2},
    "qwen2_vl_text": {"rope_parameters": _ROPE},
    "qwen2_5_vl_text": {"rope_parameters": _ROPE},
    "reformer": {
        **{"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"]},
        **{"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "num_buckets": 4, "num_hashes": 1},
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **{"num_hidden_layers": 4, "attention_hidden_size": 64},
    },
    "zamba2": {"attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}
UNBUILT = {
    "blt": "its configuration keeps sizes in parts that have no common names",
    "cohere_compass_text": "its default configuration has layers without positions, which it does not build",
    "dots3_note": "its parts must agree on sizes; its text model is dots3_note_text",
    "dots3_note_text": "38 million parameters at its smallest",
    "gemma3n": "needs timm; its text model is gemma3n_text",
    "gemma4_assistant": "a draft model, which reads states of another one",
    "gemma4_unified_assistant": "a draft model, which reads states of another one",
    "musicgen": "a model of sound, which is not built from its configuration only",
    "musicgen_melody": "a model of sound, which is not built from its configuration only",
    "qwen4_exp": "its n-gram embeddings need sizes that have no defaults",
    "qwen4_exp_text": "its n-gram embeddings need sizes that have no defaults",
}
"""Causal families that are not built here, and why."""


def values(kind: type[PreTrainedConfig], noise: float = 0.0) -> dict[str, Any]:
    """What a configuration of a few small layers says, for its own class; ``noise`` is each dropout and jitter."""
    default = kind()
    found: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = values(type(value), noise)
        elif noise and ("drop" in name or "jitter" in name) and isinstance(value, float):
            found[name] = noise
        elif name in _VALUES and (value is not None or name in _NEEDED):
            small = _VALUES[name]
            keeps = isinstance(small, int) and isinstance(value, int) and 0 <= value < small
            found[name] = value if keeps else small
        elif name in _KINDS and value:
            found[name] = list(dict.fromkeys(value))
    depth = max(2, *(len(found.get(name, ())) for name in _KINDS))
    found |= {name: (found[name] * depth)[:depth] for name in _KINDS if name in found}
    found |= {name: depth for name in _DEPTHS if name in found}
    if "kv_lora_rank" in found:  # compressed keys and values have one head for each query head
        found |= {"num_key_value_heads": 4, "head_dim": 8} if "head_dim" in found else {"num_key_value_heads": 4}
    return found | _OWN.get(kind.model_type, {})


def tiny(
    family: str, seed: int = 0, auto: Any = None, *, noise: float = 0.0, loud: float = 1.0, **settings: Any
) -> Any:
    """A random model of a family in float32, for evaluation.

    Args:
        family: transformers' ``model_type``.
        auto: the class to build; by default the language model, or where there is none the one for images and text.
        noise: each dropout and jitter of its configuration.
        loud: a factor of all matrices; the usual start is so small that some mistakes would not show.
        settings: take the place of what the configuration would say.

    Raises:
        ValueError: the model would have more than 3 million parameters.
    """
    decoder = {"is_decoder": True} if family in _DECODERS.split() else {}
    given = values(CONFIG_MAPPING[family], noise) | decoder | settings
    auto = auto or (AutoModelForCausalLM if family in CAUSAL else AutoModelForImageTextToText)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(CONFIG_MAPPING[family](**given)).parameters())
    if size > LARGEST:
        raise ValueError(f"{family} has {size} parameters, so it is not tiny")
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = auto.from_config(CONFIG_MAPPING[family](**given), dtype=torch.float32)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for parameter in model.parameters():  # scales that begin at zero would hide what lies behind them
            if parameter.dim() == 1 and not parameter.is_meta and not parameter.any():
                parameter.fill_(0.01)
            elif parameter.dim() > 1:
                parameter.mul_(loud)
    return model.eval()
