"""Tiny random towers of transformers that attend within sequences of a packed row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

GRIDS = ((1, 12, 16), (2, 6, 8), (1, 20, 12))
"""Frames, height and width in patches of what each vision tower reads."""
Case = tuple[nn.Module, dict[str, Any]]
_SMALL: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _patches(width: int, frames: bool = True) -> dict[str, Any]:
    grids = torch.tensor(GRIDS)
    if not frames:
        grids[:, 0] = 1
    return {"hidden_states": _random(int(grids.prod(1).sum()), width), "grid_thw": grids}


def qwen2_vl() -> Case:
    from transformers.models.qwen2_vl import modeling_qwen2_vl as m

    config = m.Qwen2VLVisionConfig(
        depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4
    )
    return m.Qwen2VisionTransformerPretrainedModel(config), _patches(3 * 2 * 16)


def qwen2_5_vl() -> Case:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as m

    config = m.Qwen2_5_VLVisionConfig(
        **_SMALL, out_hidden_size=32, patch_size=4, window_size=16, fullatt_block_indexes=[1]
    )
    return m.Qwen2_5_VisionTransformerPretrainedModel(config), _patches(3 * 2 * 16)


def qwen3_vl() -> Case:
    from transformers.models.qwen3_vl import modeling_qwen3_vl as m

    config = m.Qwen3VLVisionConfig(
        **_SMALL, out_hidden_size=32, patch_size=4, deepstack_visual_indexes=[0]
    )
    return m.Qwen3VLVisionModel(config), _patches(3 * 2 * 16)


def glm4v() -> Case:
    from transformers.models.glm4v import modeling_glm4v as m

    config = m.Glm4vVisionConfig(**_SMALL, out_hidden_size=32, patch_size=4, image_size=64)
    return m.Glm4vVisionModel(config), _patches(3 * 2 * 16, frames=False)


def video_llama_3() -> Case:
    from transformers.models.video_llama_3 import modeling_video_llama_3 as m

    config = m.VideoLlama3VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        patch_size=4,
    )  # fmt: skip
    inputs = _patches(3 * 16)
    inputs["pixel_values"] = inputs.pop("hidden_states")
    sizes = torch.ones(len(GRIDS), dtype=torch.long)
    return m.VideoLlama3VisionModel(config), {**inputs, "merge_sizes": sizes}


def qwen2_5_omni_audio() -> Case:
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as m

    config = m.Qwen2_5OmniAudioEncoderConfig(
        num_mel_bins=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48,
        d_model=32, n_window=50, output_dim=32, max_source_positions=100,
    )  # fmt: skip
    lengths = torch.tensor([160, 64])
    inputs = {"input_features": _random(16, 224), "feature_lens": lengths}
    return m.Qwen2_5OmniAudioEncoder(config), inputs


def pixtral() -> Case:
    from transformers.models.pixtral import modeling_pixtral as m

    config = m.PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=80, patch_size=4,
    )  # fmt: skip
    sizes = torch.tensor([[48, 64], [24, 32], [80, 48]])
    inputs = {"pixel_values": _random(3, 3, 80, 80), "image_sizes": sizes}
    return m.PixtralVisionModel(config), inputs


TOWERS: dict[str, Callable[[], Case]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "glm4v": glm4v,
    "video_llama_3": video_llama_3,
    "qwen2_5_omni_audio": qwen2_5_omni_audio,
    "pixtral": pixtral,
}
