"""Encoders of text, alone or with a decoder."""

from __future__ import annotations

from typing import Any

import torch

from support.many_architectures.rows import ModelRow
from support.many_architectures.texts import T5, VOCABULARY, WIDE, classes, sequences, tokens, unpadded

_BOTH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
ENCODERS = (
    ModelRow("AlbertForMaskedLM", {**WIDE, "embedding_size": 8}, tokens),
    ModelRow("BigBirdForMaskedLM", {**WIDE, "attention_type": "original_full"}, tokens),
    ModelRow(
        "CanineForSequenceClassification",
        {
            **WIDE,
            "num_hash_buckets": 16,
            "num_hash_functions": 2,
            "local_transformer_stride": 4,
            "downsampling_rate": 2,
            "upsampling_kernel_size": 2,
        },
        classes,
        dtype=torch.float32,
    ),
    ModelRow(
        "ConvBertForMaskedLM",
        {**WIDE, "embedding_size": 8, "conv_kernel_size": 3, "num_attention_heads": 4},
        tokens,
    ),
    ModelRow(
        "DebertaForMaskedLM",
        {**WIDE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
        tokens,
        refused="deberta.encoder.rel_embeddings.weight",
    ),
    ModelRow(
        "DebertaV2ForMaskedLM",
        {**WIDE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        tokens,
        refused="deberta.encoder.rel_embeddings.weight",
    ),
    ModelRow(
        "DistilBertForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "hidden_dim": 24,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 32,
        },
        tokens,
    ),
    ModelRow("ElectraForMaskedLM", {**WIDE, "embedding_size": 8}, tokens),
    ModelRow("EsmForMaskedLM", {**WIDE, "position_embedding_type": "rotary", "mask_token_id": 4}, tokens),
    ModelRow("FNetForMaskedLM", WIDE, unpadded),
    ModelRow(
        "FunnelForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 24,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
        tokens,
    ),
    ModelRow("LongformerForMaskedLM", {**WIDE, "attention_window": 4}, tokens),
    ModelRow(
        "MobileBertForMaskedLM",
        {**WIDE, "embedding_size": 16, "intra_bottleneck_size": 8, "num_feedforward_networks": 2},
        tokens,
    ),
    ModelRow(
        "ModernBertForMaskedLM",
        {
            **WIDE,
            "global_attn_every_n_layers": 2,
            "local_attention": 4,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        tokens,
    ),
    ModelRow("MPNetForMaskedLM", WIDE, tokens),
    ModelRow("NystromformerForMaskedLM", {**WIDE, "segment_means_seq_len": 8, "num_landmarks": 4}, unpadded),
    ModelRow(
        "ReformerForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "attention_head_size": 8,
            "num_attention_heads": 2,
            "feed_forward_size": 24,
            "attn_layers": ["local", "lsh"],
            "num_buckets": 2,
            "axial_pos_shape": [2, 4],
            "axial_pos_embds_dim": [8, 8],
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "max_position_embeddings": 8,
            "is_decoder": False,
            "hash_seed": 5,
        },
        tokens,
    ),
    ModelRow("RoFormerForMaskedLM", WIDE, tokens),
    ModelRow(
        "SqueezeBertForMaskedLM",
        {
            **WIDE,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "intermediate_groups": 2,
            "output_groups": 2,
            "embedding_size": 16,
        },
        tokens,
    ),
    ModelRow(
        "XLMWithLMHeadModel",
        {
            "n_words": VOCABULARY,
            "emb_dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 32,
            "n_langs": 1,
        },
        tokens,
    ),
)

SEQUENCES = (
    ModelRow("BlenderbotForConditionalGeneration", _BOTH, sequences),
    ModelRow(
        "LEDForConditionalGeneration",
        {
            **_BOTH,
            "attention_window": 4,
            "max_encoder_position_embeddings": 32,
            "max_decoder_position_embeddings": 32,
        },
        sequences,
    ),
    ModelRow(
        "LongT5ForConditionalGeneration",
        {**T5, "local_radius": 3, "encoder_attention_type": "transient-global", "global_block_size": 4},
        sequences,
    ),
    ModelRow("M2M100ForConditionalGeneration", _BOTH, sequences),
    ModelRow("MarianMTModel", _BOTH, sequences),
    ModelRow("MBartForConditionalGeneration", _BOTH, sequences),
    ModelRow("PegasusForConditionalGeneration", _BOTH, sequences),
    ModelRow(
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 2,
            "num_decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 32,
            "ngram": 2,
            "num_buckets": 8,
            "relative_max_distance": 16,
            "decoder_start_token_id": 1,
        },
        unpadded,
        refused="prophetnet.decoder.position_embeddings.weight",
    ),
    ModelRow("UMT5ForConditionalGeneration", T5, sequences),
)
