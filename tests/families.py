"""Tiny random models of any family that transformers can build from a configuration.

Sizes are set by the names that configurations have for them, so that a family needs an entry of its own only where its
sizes must fit together in a way of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

VOCABULARY = 64

_SIZES: dict[int, str] = {
    64: "vocab_size vocab_size_per_layer_input n_words",
    32: (
        "hidden_size d_model n_embd dim embedding_size emb_dim word_embed_proj_dim mamba_d_ssm lru_width "
        "vision_output_dim projector_input_dim projector_output_dim out_hidden_size"
    ),
    48: (
        "intermediate_size ffn_dim n_inner ffn_hidden_size intermediate_size_mlp d_ff d_inner mlp_hidden_size "
        "encoder_ffn_dim decoder_ffn_dim"
    ),
    24: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size",
    16: (
        "q_lora_rank kv_lora_rank qk_head_dim attention_window_size num_position_embeddings image_size "
        "attention_chunk_size"
    ),
    8: (
        "head_dim kv_channels d_kv global_head_dim attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "mamba_d_head mamba_head_dim mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim "
        "index_head_dim index_topk sliding_window patch_size hidden_size_per_layer_input laurel_rank"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts mamba_n_heads "
        "mamba_num_heads mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank linear_num_value_heads "
        "mm_tokens_per_image"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth layers "
        "num_key_value_heads num_kv_heads multi_query_group_num num_global_key_value_heads num_experts_per_tok moe_k "
        "moe_top_k num_experts_per_token top_k_experts moe_topk zero_expert_num linear_num_key_heads index_n_heads"
    ),
    1: (
        "n_group topk_group first_k_dense_replace n_shared_experts mamba_n_groups n_groups mamba_expand expand "
        "spatial_merge_size temporal_patch_size interleave_moe_layer_step"
    ),
    0: "num_nextn_predict_layers num_kv_shared_layers pad_token_id",
    128: "max_position_embeddings n_positions max_seq_len",
}
_VALUES: dict[str, Any] = {
    **{name: size for size, names in _SIZES.items() for name in names.split()},
    **{"fullatt_block_indexes": [0], "deepstack_visual_indexes": [0], "bos_token_id": 1, "eos_token_id": 2},
    **{"image_token_id": 63, "image_token_index": 63, "video_token_id": 62, "vision_start_token_id": 59},
    **{"boi_token_index": 61, "eoi_token_index": 60, "boi_token_id": 61, "eoi_token_id": 60},
    **{"vision_end_token_id": 58, "audio_token_id": 57},
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_OWN: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": {"rope_parameters": _ROPE},
    "qwen2_5_vl_text": {"rope_parameters": _ROPE},
    "dbrx": {
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
}


def values(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """What a configuration of two small layers says, for its own class."""
    default = kind()
    found: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = values(type(value))
        elif name in _VALUES and value is not None:
            small = _VALUES[name]
            keeps = isinstance(small, int) and isinstance(value, int) and 0 <= value < small
            found[name] = value if keeps else small
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and value:
            found[name] = (list(dict.fromkeys(value)) * 2)[:2]
    if "kv_lora_rank" in found:  # compressed keys and values have one head for each query head
        found |= {"num_key_value_heads": 4, "head_dim": 8} if "head_dim" in found else {"num_key_value_heads": 4}
    return found | _OWN.get(kind.model_type, {})


def tiny(family: str, seed: int = 0, auto: Any = None, **settings: Any) -> Any:
    """A random model of a family in float32, for evaluation.

    Args:
        family: transformers' ``model_type``.
        auto: the class to build; by default the language model, or where there is none the one for images and text.
        settings: take the place of what the configuration would say.
    """
    config = CONFIG_MAPPING[family](**values(CONFIG_MAPPING[family]) | settings)
    auto = auto or (AutoModelForCausalLM if family in CAUSAL else AutoModelForImageTextToText)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for parameter in model.parameters():  # scales that begin at zero would hide what lies behind them
            if parameter.dim() == 1 and not parameter.is_meta and not parameter.any():
                parameter.fill_(0.01)
    return model.eval()
