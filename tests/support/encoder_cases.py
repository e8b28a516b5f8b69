"""Tiny encoders with random weights, by name, and what to run them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse.encoders.audio import create_audio_encoder
from mm_sparse.encoders.vision import create_vision_encoder

TIMM = {"image_size": 48, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
OPEN_CLIP = {"image_size": 48, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "patch_size": 4, "image_size": 48,
}  # fmt: skip
TORCHAUDIO = {
    "extractor_mode": "group_norm", "extractor_conv_bias": False,
    "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 4)], "encoder_embed_dim": 32,
    "encoder_projection_dropout": 0.0, "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 4, "encoder_num_layers": 2, "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 48,
    "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": 7,
}  # fmt: skip
WAVE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16,
    "max_source_positions": 150, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
CONFORMER = {
    "input_dim": 32, "num_heads": 2, "ffn_dim": 48, "num_layers": 2,
    "depthwise_conv_kernel_size": 3,
}  # fmt: skip
LARGE = {"extractor_mode": "layer_norm", "encoder_layer_norm_first": True}
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}

# Name: source, architecture, options, prefix tokens, pixels (height, width).
VISIONS: dict[str, tuple[str, str, dict[str, Any], int, tuple[int, int]]] = {
    "timm-vit": ("timm", "vit_tiny_patch16_224", TIMM, 1, (48, 56)),
    "timm-dinov2": ("timm", "vit_small_patch14_reg4_dinov2", TIMM, 5, (56, 40)),
    "timm-siglip": ("timm", "vit_base_patch16_siglip_224", TIMM, 0, (48, 48)),
    "timm-dinov3": ("timm", "vit_small_patch16_dinov3", TIMM, 5, (48, 64)),
    "timm-naflex": (
        "timm", "naflexvit_base_patch16_gap", {**TIMM, "image_size": None}, 4, (48, 40),
    ),
    "open_clip-vit": ("open_clip", "ViT-B-32", OPEN_CLIP, 1, (48, 48)),
    "open_clip-timm": (
        "open_clip", "ViT-B-16-SigLIP", {"timm_model_name": "test_vit", "image_size": 160}, 1,
        (160, 160),
    ),
    "hf-vit": ("transformers", "vit", VISION, 1, (48, 56)),
    "hf-deit": ("transformers", "deit", VISION, 2, (48, 48)),
    "hf-dinov2": ("transformers", "dinov2", VISION, 1, (56, 48)),
    "hf-dinov2-registers": ("transformers", "dinov2_with_registers", VISION, 5, (48, 48)),
    "hf-dinov3": ("transformers", "dinov3_vit", {**VISION, "num_register_tokens": 4}, 5, (48, 64)),
    "hf-siglip": ("transformers", "siglip_vision_model", VISION, 0, (48, 56)),
    "hf-clip": ("transformers", "clip_vision_model", VISION, 1, (48, 48)),
    "hf-ijepa": ("transformers", "ijepa", VISION, 0, (48, 48)),
}  # fmt: skip

# Name: source, architecture, options, shape of a batch, lengths, tokens of a row, tokens a second.
AUDIOS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...], list[int], list[int], float]] = {
    "torchaudio-wav2vec2": (
        "torchaudio", "wav2vec2_model", TORCHAUDIO, (2, 3000), [3000, 2000], [150, 100], 800.0,
    ),
    "torchaudio-hubert": (
        "torchaudio", "wav2vec2_model", {**TORCHAUDIO, **LARGE}, (2, 3000), [3000, 2000],
        [150, 100], 800.0,
    ),
    "torchaudio-conformer": (
        "torchaudio", "conformer", CONFORMER, (2, 150, 32), [150, 97], [150, 97], 100.0,
    ),
    "hf-whisper": (
        "transformers", "whisper", WHISPER, (2, 16, 300), [300, 131], [150, 66], 50.0,
    ),
    "hf-qwen2-audio": (
        "transformers", "qwen2_audio_encoder", WHISPER, (2, 16, 300), [300, 131], [75, 33], 25.0,
    ),
    "hf-wav2vec2": (
        "transformers", "wav2vec2", WAVE, (2, 3000), [3000, 2000], [150, 100], 800.0,
    ),
    "hf-hubert": (
        "transformers", "hubert", {**WAVE, **STABLE}, (2, 3000), [3000, 2000], [150, 100], 800.0,
    ),
    "hf-unispeech": (
        "transformers", "unispeech", WAVE, (2, 3000), [3000, 2000], [150, 100], 800.0,
    ),
}  # fmt: skip
NAMES = [*VISIONS, *AUDIOS]


def random(*shape: int) -> Tensor:
    """The same numbers for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def build(name: str, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """An encoder whose attention matters, and a batch: pictures, or audio and its lengths."""
    torch.manual_seed(0)
    if name in VISIONS:
        source, architecture, changes, _, pixels = VISIONS[name]
        make: Callable[..., nn.Module] = create_vision_encoder
        batch = (random(2, 3, *pixels).sigmoid(),)
    else:
        source, architecture, changes, shape, lengths, _, _ = AUDIOS[name]
        make = create_audio_encoder
        batch = random(*shape), torch.tensor(lengths)
    encoder = make(architecture, source, **changes, **options)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif parameter.numel() > 1 and float(parameter.abs().max()) <= 1e-3:
                parameter.fill_(0.5)
    return encoder, batch
