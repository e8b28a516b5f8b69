"""What `encoders.bench.run` times: encoders by name, and tiny ones for a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mm_sparse.config import SparseConfig
from mm_sparse.encoders.audio import create_audio_encoder
from mm_sparse.encoders.base import Encoder
from mm_sparse.encoders.vision import create_vision_encoder


@dataclass(frozen=True)
class Case:
    """An encoder and the size of what it is given."""

    model: str
    create: Callable[..., Encoder]
    architecture: str
    size: int
    """Pixels of a side, or samples."""
    options: dict[str, Any] = field(default_factory=dict)
    dense_below: int | None = None

    def encoder(self, sparse: SparseConfig | None = None) -> Encoder:
        """With random weights."""
        return self.create(self.architecture, sparse=sparse, **self.options)

    def batch(self) -> Tensor:
        """An image in [0, 1], or a waveform."""
        generator = torch.Generator().manual_seed(0)
        if self.create is create_vision_encoder:
            return torch.rand(1, 3, self.size, self.size, generator=generator)
        return torch.randn(1, self.size, generator=generator)

    def config(self, unit: int, ratio: float, sampled: float = 0.0) -> SparseConfig:
        """As a user of encoders sets it: all that is kept is kept for its content."""
        return SparseConfig(
            ratio, unit=unit, causal=False, sinks=0, window=0, sample_ratio=sampled,
            dense_below=self.dense_below,
        )  # fmt: skip


_BASE, _LARGE = "vit_base_patch16_224", "vit_large_patch14_dinov2"
CASES = {
    "vit-b-2048": Case("ViT-B/16, 2048 px", create_vision_encoder, _BASE, 2048),
    "vit-l-1792": Case("ViT-L/14, 1792 px", create_vision_encoder, _LARGE, 1792),
    "wav2vec2-600s": Case("wav2vec2-base, 10 min", create_audio_encoder, "wav2vec2_base", 9600000),
    "vit-b-512": Case("ViT-B/16, 512 px", create_vision_encoder, _BASE, 512),
}
_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
_WAVE = {"encoder_embed_dim": 32, "encoder_num_layers": 2, "encoder_num_heads": 2,
         "encoder_ff_interm_features": 48, "extractor_mode": "group_norm",
         "extractor_conv_layer_config": [(8, 10, 10), (8, 8, 8), (8, 4, 4)],
         "extractor_conv_bias": False, "encoder_projection_dropout": 0.0,
         "encoder_pos_conv_kernel": 8, "encoder_pos_conv_groups": 4,
         "encoder_attention_dropout": 0.0, "encoder_ff_interm_dropout": 0.0,
         "encoder_dropout": 0.0, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0,
         "aux_num_out": None}  # fmt: skip
TINY = {
    "vit-b-2048": Case("tiny ViT", create_vision_encoder, "vit_tiny_patch16_224", 256, _VIT, 0),
    "vit-l-1792": Case("tiny ViT", create_vision_encoder, "vit_tiny_patch16_224", 320, _VIT, 0),
    "wav2vec2-600s": Case("tiny wave", create_audio_encoder, "wav2vec2_model", 64000, _WAVE, 0),
    "vit-b-512": Case("tiny ViT", create_vision_encoder, "vit_tiny_patch16_224", 224, _VIT),
}
