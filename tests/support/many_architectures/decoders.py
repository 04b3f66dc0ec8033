"""Decoders of text: dense ones, mixtures of experts, and recurrent ones."""

from __future__ import annotations

from typing import Any

import torch

from support.many_architectures.rows import ModelRow
from support.many_architectures.texts import PLAIN, T5, VOCABULARY, WIDE, sequences, tokens

_GROUPED: dict[str, Any] = {**WIDE, "num_key_value_heads": 1}
_HEADS: dict[str, Any] = {**_GROUPED, "head_dim": 8}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {
    **_HEADS,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "output_router_logits": True,
}
_LATENT: dict[str, Any] = {
    **WIDE,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "q_lora_rank": 6,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
_STATES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "state_size": 4,
    "num_hidden_layers": 2,
}
DECODERS = (
    ModelRow("ApertusForCausalLM", _GROUPED, tokens),
    ModelRow("BioGptForCausalLM", WIDE, tokens),
    ModelRow("BloomForCausalLM", {**PLAIN, "n_layer": 2, "n_head": 2}, tokens),
    ModelRow("CodeGenForCausalLM", {**_GPT, "n_head": 4, "rotary_dim": 2}, tokens),
    ModelRow("CohereForCausalLM", _GROUPED, tokens),
    ModelRow("CTRLLMHeadModel", {**_GPT, "dff": 24}, tokens),
    ModelRow("FalconForCausalLM", {**PLAIN, "alibi": False}, tokens),
    ModelRow("Gemma2ForCausalLM", {**_HEADS, "sliding_window": 4}, tokens),
    ModelRow("Gemma3ForCausalLM", {**_HEADS, "sliding_window": 4}, tokens),
    ModelRow("Glm4ForCausalLM", _HEADS, tokens),
    ModelRow("GPTBigCodeForCausalLM", _GPT, tokens),
    ModelRow("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}, tokens),
    ModelRow(
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 32,
        },
        tokens,
    ),
    ModelRow("GPTNeoXForCausalLM", WIDE, tokens),
    ModelRow("GraniteForCausalLM", _GROUPED, tokens),
    ModelRow(
        "MptForCausalLM", {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 2, "n_layers": 2}, tokens
    ),
    ModelRow("Olmo2ForCausalLM", _GROUPED, tokens),
    ModelRow("Phi3ForCausalLM", _GROUPED, tokens),
    ModelRow("Qwen2ForCausalLM", _GROUPED, tokens),
    ModelRow("StableLmForCausalLM", _GROUPED, tokens),
    ModelRow("Starcoder2ForCausalLM", _GROUPED, tokens),
    ModelRow(
        "XGLMForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "ffn_dim": 24,
            "num_layers": 2,
            "attention_heads": 2,
            "max_position_embeddings": 32,
        },
        tokens,
        dtype=torch.float32,
    ),
    ModelRow(
        "XLNetLMHeadModel",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
        tokens,
    ),
)

MIXTURES = (
    ModelRow(
        "DbrxForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        },
        tokens,
        dtype=torch.float32,
    ),
    ModelRow("DeepseekV3ForCausalLM", _LATENT, tokens, dtype=torch.float32),
    ModelRow("GptOssForCausalLM", {**_EXPERTS, "sliding_window": 4}, tokens, dtype=torch.float32),
    ModelRow("GraniteMoeForCausalLM", _EXPERTS, tokens, dtype=torch.float32),
    ModelRow("MixtralForCausalLM", _EXPERTS, tokens, dtype=torch.float32),
    ModelRow("OlmoeForCausalLM", _EXPERTS, tokens, dtype=torch.float32),
    ModelRow(
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, "shared_expert_intermediate_size": 12},
        tokens,
        dtype=torch.float32,
    ),
    ModelRow("Qwen3MoeForCausalLM", _EXPERTS, tokens, dtype=torch.float32),
    ModelRow(
        "SwitchTransformersForConditionalGeneration",
        {**T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4},
        sequences,
        dtype=torch.float32,
    ),
    ModelRow(
        "JambaForCausalLM",
        {
            **_EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 3,
            "use_mamba_kernels": False,
        },
        tokens,
        dtype=torch.float32,
    ),
    ModelRow(
        "Qwen3NextForCausalLM",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        tokens,
        dtype=torch.float32,
    ),
)

RECURRENT = (
    ModelRow("FalconMambaForCausalLM", {**_STATES, "time_step_rank": 3}, tokens),
    ModelRow(
        "Mamba2ForCausalLM",
        {**_STATES, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
        tokens,
    ),
    ModelRow("Lfm2ForCausalLM", {**_GROUPED, "layer_types": ["conv", "full_attention"]}, tokens),
    ModelRow(
        "RecurrentGemmaForCausalLM",
        {**_HEADS, "lru_width": 16, "attention_window_size": 4, "num_hidden_layers": 3},
        tokens,
    ),
    ModelRow(
        "RwkvForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "attention_hidden_size": 16,
            "num_hidden_layers": 2,
            "context_length": 32,
        },
        tokens,
        refused="rwkv.blocks.0.attention.output.weight",
    ),
)
