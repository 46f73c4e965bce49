"""transformers: audio, vision, and images with text."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.suites.transformers_kinds import IMAGE, TEXT, VOCABULARY, kind, pixels, sound

# audio
AUDIO: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": (24, 32, 32),
    "conv_stride": (4, 2, 2),
    "conv_kernel": (8, 3, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 3,
    "apply_spec_augment": False,
}
kind("Wav2Vec2ForCTC", sound(), **AUDIO)
kind("HubertForCTC", sound(), **AUDIO)
kind("WavLMForCTC", sound(), **AUDIO)
kind(
    "ASTForAudioClassification",
    lambda n: {"input_values": torch.randn(n, 32, 16)},
    max_length=32,
    num_mel_bins=16,
    frequency_stride=8,
    time_stride=8,
    **{k: v for k, v in IMAGE.items() if k != "image_size"},
)

# vision
kind("ViTForImageClassification", pixels(), **IMAGE)
kind("DeiTForImageClassificationWithTeacher", pixels(), **IMAGE)
kind("BeitForImageClassification", pixels(), use_relative_position_bias=True, use_mask_token=False, **IMAGE)
kind(
    "Dinov2ForImageClassification",
    pixels(),
    mlp_ratio=2,
    **{k: v for k, v in IMAGE.items() if k != "intermediate_size"},
)
kind(
    "SwinForImageClassification",
    pixels(),
    image_size=32,
    patch_size=2,
    embed_dim=24,
    depths=[1, 2],
    num_heads=[2, 4],
    window_size=4,
)
kind(
    "Swinv2ForImageClassification",
    pixels(),
    image_size=32,
    patch_size=2,
    embed_dim=24,
    depths=[1, 2],
    num_heads=[2, 4],
    window_size=4,
)
kind(
    "SegformerForSemanticSegmentation",
    pixels(64),
    hidden_sizes=[16, 32, 48, 64],
    num_attention_heads=[1, 2, 3, 4],
    depths=[1, 1, 1, 1],
    decoder_hidden_size=32,
)
kind("ConvNextForImageClassification", pixels(), hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1])
kind("ConvNextV2ForImageClassification", pixels(), hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1])
kind("ResNetForImageClassification", pixels(), embedding_size=16, hidden_sizes=[32, 48, 64, 80], depths=[1, 1, 1, 1])
kind(
    "MobileViTForImageClassification",
    pixels(64),
    image_size=64,
    hidden_sizes=[24, 32, 40],
    neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 96],
    num_attention_heads=4,
)
kind("PoolFormerForImageClassification", pixels(64), hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])
kind(
    "ViTMAEForPreTraining",
    pixels(32, noise=lambda n: torch.rand(n, 16)),
    decoder_hidden_size=48,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=64,
    **IMAGE,
)
kind(
    "DPTForDepthEstimation",
    pixels(),
    neck_hidden_sizes=[16, 24, 32, 40],
    fusion_hidden_size=24,
    backbone_out_indices=[0, 1, 2, 3],
    is_hybrid=False,
    **{**IMAGE, "num_hidden_layers": 4},
)
kind(
    "YolosForObjectDetection",
    pixels(),
    num_detection_tokens=5,
    **{**IMAGE, "image_size": [32, 32]},
)

# images and text
TWO: dict[str, Any] = {
    "text_config": {
        **TEXT,
        "hidden_size": 48,
        "intermediate_size": 80,
        "projection_dim": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "vision_config": {**IMAGE, "projection_dim": 32},
}
kind("CLIPModel", pixels(32, input_ids=lambda n: torch.randint(3, VOCABULARY, (n, 7))), projection_dim=32, **TWO)
kind(
    "SiglipModel",
    pixels(32, input_ids=lambda n: torch.randint(3, VOCABULARY, (n, 7))),
    **{**TWO, "text_config": {**TWO["text_config"], "projection_size": 64}},
)
kind(
    "BlipForImageTextRetrieval",
    pixels(32, input_ids=lambda n: torch.randint(3, VOCABULARY, (n, 7))),
    projection_dim=32,
    image_text_hidden_size=32,
    **{**TWO, "text_config": {**TWO["text_config"], "encoder_hidden_size": 64}},
)
kind(
    "ViltForQuestionAnswering",
    pixels(32, input_ids=lambda n: torch.randint(3, VOCABULARY, (n, 7))),
    max_image_length=-1,
    **{**TEXT, **IMAGE},
)
kind(
    "PerceiverForSequenceClassification",
    lambda n: {"inputs": torch.randint(3, VOCABULARY, (n, 12))},
    vocab_size=VOCABULARY,
    max_position_embeddings=12,
    d_model=32,
    num_latents=6,
    d_latents=48,
    num_blocks=1,
    num_self_attends_per_block=2,
    num_self_attention_heads=4,
    num_cross_attention_heads=4,
)
kind(
    "TimeSeriesTransformerModel",
    lambda n: {
        "past_values": torch.randn(n, 12),
        "past_time_features": torch.randn(n, 12, 2),
        "past_observed_mask": torch.ones(n, 12),
        "future_values": torch.randn(n, 4),
        "future_time_features": torch.randn(n, 4, 2),
    },
    prediction_length=4,
    context_length=8,
    lags_sequence=[1, 2, 3, 4],
    num_time_features=2,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    use_cache=False,
)
