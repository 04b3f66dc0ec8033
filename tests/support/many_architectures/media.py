"""Small random models of transformers that read images, sound, series, or several of these and text."""

from __future__ import annotations

from typing import Any

import torch

from support.many_architectures.rows import ModelRow, floats, integers
from support.many_architectures.texts import VOCABULARY

_SIZE = 16
_CLASSES = torch.tensor([0, 1, 1])


def _images(size: int = _SIZE, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": floats((3, 3, size, size), seed=13), **more}


def _pictures() -> dict[str, torch.Tensor]:
    return _images(labels=_CLASSES)


def _large_pictures() -> dict[str, torch.Tensor]:
    return _images(32, labels=_CLASSES)


def _maps() -> dict[str, torch.Tensor]:
    return _images(32, labels=integers(0, 2, (3, 32, 32), seed=14))


def _sound() -> dict[str, torch.Tensor]:
    return {"input_values": floats((3, 320), seed=15), "labels": integers(1, 12, (3, 4), seed=16)}


def _captioned() -> dict[str, torch.Tensor]:
    """Images and texts that end in the token by which some models find the end."""
    end = torch.full((3, 1), VOCABULARY - 1)
    words = torch.cat([integers(5, VOCABULARY - 1, (3, 6), seed=12), end], 1)
    return _images(input_ids=words, attention_mask=torch.ones_like(words))


def _shown() -> dict[str, torch.Tensor]:
    """Images and texts with a place (id 3) for each patch."""
    places = torch.full((3, 4), 3)
    words = torch.cat([places, integers(5, VOCABULARY, (3, 5), seed=12)], 1)
    labels = words.masked_fill(words == 3, -100)
    return _images(input_ids=words, attention_mask=torch.ones_like(words), labels=labels)


def _boxes() -> dict[str, Any]:
    box = torch.tensor([[0.5, 0.5, 0.25, 0.5]])
    return _images(32, labels=[{"class_labels": torch.tensor([1]), "boxes": box}] * 3)


_LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_PATCHES: dict[str, Any] = {**_LAYERS, "image_size": _SIZE, "patch_size": 8}
_WORDS: dict[str, Any] = {
    **_LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": VOCABULARY - 1,
}
_TOWERS: dict[str, Any] = {"text_config": _WORDS, "vision_config": _PATCHES, "projection_dim": 8}
_WAVES: dict[str, Any] = {
    **_LAYERS,
    "vocab_size": 12,
    "conv_dim": [8, 8],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "ctc_loss_reduction": "mean",
    "ctc_zero_infinity": True,
}

VISION = (
    ModelRow("BeitForImageClassification", {**_PATCHES, "use_relative_position_bias": True}, _pictures),
    ModelRow(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        _pictures,
    ),
    ModelRow("DeiTForImageClassification", _PATCHES, _pictures),
    ModelRow(
        "DetrForObjectDetection",
        {
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_queries": 4,
        },
        _boxes,
        refused="model.query_position_embeddings.weight",
        dtype=torch.float32,
    ),
    ModelRow("Dinov2ForImageClassification", _PATCHES, _pictures),
    ModelRow(
        "MobileViTForImageClassification",
        {
            "image_size": 32,
            "hidden_sizes": [8, 12, 16],
            "neck_hidden_sizes": [4, 4, 8, 8, 12, 12, 16],
            "num_attention_heads": 2,
            "patch_size": 2,
        },
        _large_pictures,
    ),
    ModelRow(
        "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        _large_pictures,
    ),
    ModelRow(
        "PvtForImageClassification",
        {
            "image_size": 32,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
        },
        _large_pictures,
    ),
    ModelRow(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        _pictures,
    ),
    ModelRow(
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [4, 8, 8, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 8,
            "num_labels": 3,
        },
        _maps,
    ),
    ModelRow(
        "SwinForImageClassification",
        {
            "image_size": _SIZE,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "window_size": 4,
        },
        _pictures,
    ),
    ModelRow(
        "VideoMAEForVideoClassification",
        {**_PATCHES, "num_frames": 4},
        lambda: {"pixel_values": floats((3, 4, 3, _SIZE, _SIZE), seed=13), "labels": _CLASSES},
    ),
    ModelRow("ViTForImageClassification", _PATCHES, _pictures),
    ModelRow(
        "ViTMAEForPreTraining",
        {
            **_PATCHES,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 24,
        },
        lambda: _images(noise=floats((3, 4), seed=18)),
    ),
)

SOUND = (
    ModelRow(
        "ASTForAudioClassification",
        {
            **_LAYERS,
            "patch_size": 4,
            "num_mel_bins": 8,
            "max_length": 16,
            "frequency_stride": 4,
            "time_stride": 4,
        },
        lambda: {"input_values": floats((3, 16, 8), seed=15), "labels": _CLASSES},
    ),
    ModelRow("HubertForCTC", _WAVES, _sound),
    ModelRow(
        "MoonshineForConditionalGeneration",
        {
            **_LAYERS,
            "vocab_size": VOCABULARY,
            "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 1,
            "encoder_num_attention_heads": 2,
            "decoder_num_attention_heads": 2,
            "encoder_num_key_value_heads": 2,
            "decoder_num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
        },
        lambda: {
            "input_values": floats((3, 1600), seed=15),
            "labels": integers(5, VOCABULARY, (3, 5), seed=16),
        },
    ),
    ModelRow(
        "Speech2TextForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "input_feat_per_channel": 8,
            "conv_channels": 8,
            "max_source_positions": 32,
            "max_target_positions": 16,
        },
        lambda: {
            "input_features": floats((3, 16, 8), seed=15),
            "labels": integers(5, VOCABULARY, (3, 5), seed=16),
        },
    ),
    ModelRow("Wav2Vec2ForCTC", _WAVES, _sound),
    ModelRow("WavLMForCTC", {**_WAVES, "num_buckets": 8, "max_bucket_distance": 16}, _sound),
    ModelRow(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        lambda: {
            "input_features": floats((3, 8, 16), seed=15),
            "labels": integers(5, VOCABULARY, (3, 5), seed=16),
        },
        refused="model.decoder.embed_positions.weight",
    ),
)

SERIES = (
    ModelRow(
        "DecisionTransformerModel",
        {
            "state_dim": 5,
            "act_dim": 3,
            "hidden_size": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "max_ep_len": 16,
            "vocab_size": 1,
        },
        lambda: {
            "states": floats((2, 4, 5), seed=1),
            "actions": floats((2, 4, 3), seed=2),
            "rewards": floats((2, 4, 1), seed=3),
            "returns_to_go": floats((2, 4, 1), seed=4),
            "timesteps": torch.arange(4).repeat(2, 1),
            "attention_mask": torch.ones(2, 4),
        },
        output="action_preds",
    ),
    ModelRow(
        "PatchTSTForPrediction",
        {
            "num_input_channels": 2,
            "context_length": 16,
            "prediction_length": 4,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 24,
        },
        lambda: {"past_values": floats((3, 16, 2), seed=1), "future_values": floats((3, 4, 2), seed=2)},
    ),
    ModelRow(
        "PerceiverForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_latents": 16,
            "num_latents": 4,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "max_position_embeddings": 8,
        },
        lambda: {
            "inputs": integers(5, VOCABULARY, (3, 8), seed=1),
            "labels": integers(5, VOCABULARY, (3, 8), seed=2),
        },
        refused="perceiver.decoder.output_position_encodings.position_embeddings",
    ),
)

SEVERAL = (
    ModelRow(
        "BlipForConditionalGeneration", _TOWERS, lambda: {**_captioned(), "labels": _captioned()["input_ids"]}
    ),
    ModelRow("CLIPModel", _TOWERS, lambda: {**_captioned(), "return_loss": True}),
    ModelRow(
        "GitForCausalLM",
        {**_WORDS, "vision_config": _PATCHES},
        lambda: {**_captioned(), "labels": _captioned()["input_ids"]},
    ),
    ModelRow(
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_WORDS, "model_type": "llama"},
            "vision_config": {**_PATCHES, "model_type": "clip_vision_model"},
            "image_token_index": 3,
            "image_token_id": 3,
        },
        _shown,
    ),
    ModelRow(
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**_WORDS, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8},
            "vision_config": {**_PATCHES, "model_type": "siglip_vision_model"},
            "image_token_index": 3,
            "image_token_id": 3,
            "projection_dim": 16,
        },
        _shown,
    ),
    ModelRow(
        "SiglipModel",
        {"text_config": {**_WORDS, "projection_size": 16}, "vision_config": _PATCHES},
        lambda: {**_captioned(), "return_loss": True},
    ),
    ModelRow(
        "ViltForImageAndTextRetrieval",
        {**_WORDS, **_PATCHES, "max_image_length": -1},
        _captioned,
        output="logits",
    ),
)
