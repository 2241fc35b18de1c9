# ruff: noqa: E501
"""Tiny random models of every family that the matrix in docs/models.md names."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging

VOCABULARY = 20  # the demo's tokenizer

# Options by the names that most families share; one that a family does not have is left out by `config_of`.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_chunk_size": 8,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_shared_experts": 1, "head_dim": 8,
}  # fmt: skip
ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": COMMON | MOE | {"num_dense_layers": 1, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "apertus": COMMON,
    "arcee": COMMON,
    "bamba": COMMON | MAMBA | {"attn_layer_indices": [1]},
    "biogpt": COMMON,
    "bitnet": COMMON,
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4} | {k: COMMON[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
    "codegen": GPT | {"rotary_dim": 4},
    "cohere": COMMON,
    "cohere2": COMMON | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v2": COMMON | LATENT | {"topk_method": "greedy"},
    "deepseek_v3": COMMON | LATENT,
    "diffllama": COMMON,
    "doge": COMMON,
    "dots1": COMMON | LATENT,
    "ernie4_5": COMMON,
    "ernie4_5_moe": COMMON | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    "exaone4": COMMON | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {k: v for k, v in COMMON.items() if k != "head_dim"} | {"new_decoder_architecture": False, "alibi": False},
    "falcon-alibi": {k: v for k, v in COMMON.items() if k != "head_dim"} | {"new_decoder_architecture": False, "alibi": True},
    "falcon_h1": COMMON | MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.7},
    "falcon_mamba": COMMON | {"state_size": 8},
    "flex_olmo": COMMON | MOE,
    "gemma": COMMON,
    "gemma2": COMMON | {"sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 1.5},
    "gemma3_text": COMMON | {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": COMMON | {"sliding_window": 4, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 8, "altup_num_inputs": 2, "layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": 1.5, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": COMMON | {"sliding_window": 4, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": 1.5, "global_head_dim": 8},
    "glm": COMMON,
    "glm4": COMMON,
    "glm4_moe": COMMON | LATENT,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": COMMON | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": COMMON,
    "gpt_oss": COMMON | LOCAL | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gptj": GPT | {"rotary_dim": 4},
    "granite": COMMON | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "granitemoe": COMMON | LOCAL | {"logits_scaling": 3.0},
    "granitemoehybrid": COMMON | LOCAL | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, "logits_scaling": 3.0},
    "granitemoeshared": COMMON | LOCAL | {"shared_intermediate_size": 32, "logits_scaling": 3.0},
    "helium": COMMON,
    "hunyuan_v1_dense": COMMON,
    "hunyuan_v1_moe": COMMON | {"num_experts": 4, "moe_topk": 2},
    "hyperclovax": COMMON | {"logits_scaling": 3.0},
    "jamba": COMMON | MOE | {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "jetmoe": COMMON | {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": COMMON | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "lfm2_moe": COMMON | MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": COMMON,
    "llama4_text": COMMON | {"num_local_experts": 4, "attention_chunk_size": 8, "intermediate_size_mlp": 48, "moe_layers": [1], "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "longcat_flash": COMMON | LATENT | {"num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2, "zero_expert_num": 1},
    "mamba": COMMON | {"state_size": 8},
    "mamba2": COMMON | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": COMMON | LOCAL | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "minimax_m2": COMMON | LOCAL,
    "ministral": COMMON | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": COMMON,
    "mistral": COMMON | {"sliding_window": 4},
    "mixtral": COMMON | LOCAL,
    "modernbert-decoder": COMMON | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128} | {k: COMMON[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
    "nanochat": COMMON | {"final_logit_softcapping": 1.5},
    "nemotron": COMMON,
    "nemotron_h": COMMON | {"layers_block_type": ["mamba", "attention"], "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "olmo": COMMON,
    "olmo2": COMMON,
    "olmo3": COMMON | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo_hybrid": COMMON | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "olmoe": COMMON | MOE,
    "opt": COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": COMMON,
    "phi": COMMON,
    "phi3": COMMON | {"rope_parameters": ROPE, "original_max_position_embeddings": 16},
    "phimoe": COMMON | LOCAL | {"lm_head_bias": True},
    "qwen2": COMMON,
    "qwen2_moe": COMMON | MOE | {"shared_expert_intermediate_size": 16},
    "qwen3": COMMON,
    "qwen3_5_moe_text": COMMON | LINEAR | MOE | {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16},
    "qwen3_5_text": COMMON | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": COMMON | MOE,
    "qwen3_next": COMMON | LINEAR | MOE | {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16},
    "recurrent_gemma": COMMON | {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8, "num_key_value_heads": 1},
    "rwkv": COMMON | {"attention_hidden_size": 32, "context_length": 128},
    "seed_oss": COMMON,
    "smollm3": COMMON,
    "solar_open": COMMON | LATENT,
    "stablelm": COMMON,
    "starcoder2": COMMON | {"sliding_window": 4},
    "vaultgemma": COMMON | {"sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 1.5, "layer_types": ["sliding_attention", "full_attention"]},
    "xglm": COMMON | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "youtu": COMMON | LATENT,
    "gemma3": {"text_config": COMMON | {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}, "vision_config": VISION, "mm_tokens_per_image": 4, "boi_token_index": 1000, "eoi_token_index": 1000, "image_token_index": 1000},
    "gemma4": {"text_config": COMMON | {"sliding_window": 4, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8}, "vision_config": VISION | {"head_dim": 8, "num_key_value_heads": 2}, "image_token_id": 1000},
    "llava": {"text_config": COMMON | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"}, "image_token_index": 1000},
    "mistral3": {"text_config": COMMON | {"model_type": "mistral"}, "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16}, "image_token_index": 1000, "spatial_merge_size": 2},
    "qwen2_5_vl": {"text_config": COMMON | MROPE, "vision_config": QWEN_VISION | {"intermediate_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [0]}, "image_token_id": 1000, "video_token_id": 1000, "vision_start_token_id": 1000, "vision_end_token_id": 1000},
    "qwen2_vl": {"text_config": COMMON | MROPE, "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1, "patch_size": 4}, "image_token_id": 1000, "video_token_id": 1000, "vision_start_token_id": 1000, "vision_end_token_id": 1000},
    "qwen3_5": {"text_config": COMMON | LINEAR | {"layer_types": ["linear_attention", "full_attention"]}, "vision_config": QWEN_VISION | {"intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 16}, "image_token_id": 1000, "video_token_id": 1000, "vision_start_token_id": 1000, "vision_end_token_id": 1000},
    "qwen3_vl": {"text_config": COMMON | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e4}}, "vision_config": QWEN_VISION | {"intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, "image_token_id": 1000, "video_token_id": 1000, "vision_start_token_id": 1000, "vision_end_token_id": 1000},
    "smolvlm": {"text_config": COMMON | {"model_type": "llama"}, "vision_config": VISION, "image_token_id": 1000, "scale_factor": 2},
    "zamba2": COMMON | {"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 8, "attention_hidden_size": 64, "attention_head_dim": 16, "num_mem_blocks": 1, "adapter_rank": 8},
}  # fmt: skip


def config_of(family: str) -> Any:
    """A tiny configuration."""
    return AutoConfig.for_model(family.removesuffix("-alibi"), **FAMILIES[family])


def model_of(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A tiny model whose weights are wide enough that nothing in it is flat."""
    logging.set_verbosity_error()
    torch.manual_seed(seed)
    config = config_of(family)
    multimodal = config.get_text_config() is not config
    kind: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model = kind.from_config(config).float()
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv" not in name:
                parameter.normal_(0, 0.3)
            elif "bias" in name:
                parameter.normal_(0, 0.2)
    return model.eval()
