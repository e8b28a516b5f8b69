"""Models of the shape of published checkpoints, with random weights, and inputs for them.

Random weights are enough for time and memory; they say nothing of accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TEXT_PER_IMAGE = 30
"""Tokens of text behind each image or clip."""


@dataclass(frozen=True)
class ModelShape:
    """A family of models and how to make one and its inputs."""

    name: str
    part: str
    """What an input is counted in: "images", "clips" or "tokens"."""
    build: Callable[[bool], nn.Module]
    """The model; a small one if True."""
    inputs: Callable[[nn.Module, int], dict[str, Any]]
    """Keyword arguments of a forward with so many parts."""
    tower: str = ""
    """Name of the submodule that reads images or sound."""


def _vision_ids(count: int, tokens: int, start: int, pad: int, end: int) -> torch.Tensor:
    """(1, N) ids of `count` images of so many tokens, each with text behind it."""
    text = [5] * (TEXT_PER_IMAGE - 2)
    return torch.tensor([[*([start] + [pad] * tokens + [end] + text) * count]])


def qwen25_vl(small: bool = False) -> nn.Module:
    """Qwen2.5-VL-7B: windows of 8 x 8 patches in 28 of 32 layers of its tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: dict[str, Any] = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 160000,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420,
        "out_hidden_size": 3584, "window_size": 112, "patch_size": 14,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    if small:
        text |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
        vision |= {"depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 256}
        vision |= {"out_hidden_size": 256, "fullatt_block_indexes": [3]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def qwen3_vl(small: bool = False) -> nn.Module:
    """Qwen3-VL-8B: every layer of its tower sees the whole image."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 262144,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]},
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304,
        "out_hidden_size": 4096, "patch_size": 16, "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    if small:
        text |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
        text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [12, 10, 10]}}
        vision |= {"depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 256}
        vision |= {"out_hidden_size": 256, "deepstack_visual_indexes": [1, 2]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))


def vision_inputs(model: Any, count: int) -> dict[str, Any]:
    """`count` images of 74 x 74 patches (Qwen2.5-VL: 1036 pixels, Qwen3-VL: 1184)."""
    config, side = model.config, 74
    vision = config.vision_config
    patches = side * side
    ids = _vision_ids(
        count, patches // vision.spatial_merge_size**2, config.vision_start_token_id,
        config.image_token_id, config.vision_end_token_id,
    ).to(model.device)  # fmt: skip
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(count * patches, width, device=model.device, dtype=model.dtype),
        "image_grid_thw": torch.tensor([[1, side, side]] * count, device=model.device),
    }


def qwen2_audio(small: bool = False) -> nn.Module:
    """Qwen2-Audio-7B: clips of 30 seconds, 1500 frames each in the tower and 750 in the text."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    audio: dict[str, Any] = {"max_source_positions": 1500}
    text: dict[str, Any] = {
        "model_type": "qwen2", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 156032, "max_position_embeddings": 160000,
    }  # fmt: skip
    if small:
        text |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 4}
        audio |= {"encoder_layers": 2, "d_model": 128, "encoder_ffn_dim": 256}
        audio |= {"encoder_attention_heads": 4}
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text)
    )


def audio_inputs(model: Any, count: int) -> dict[str, Any]:
    """`count` clips of 30 seconds."""
    token = model.config.audio_token_id
    ids = _vision_ids(count, 750, 6, token, 7).to(model.device)
    audio = model.config.audio_config
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": torch.randn(
            count, audio.num_mel_bins, 3000, device=model.device, dtype=model.dtype
        ),
        "feature_attention_mask": torch.ones(count, 3000, dtype=torch.long, device=model.device),
    }


def llama(small: bool = False) -> nn.Module:
    """Llama-3-8B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 262144,
    }  # fmt: skip
    if small:
        shape |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape))


def text_inputs(model: Any, count: int) -> dict[str, Any]:
    """`count` tokens of text."""
    return {"input_ids": torch.randint(3, 1000, (1, count), device=model.device)}


MODEL_SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("qwen2.5-vl-7b", "images", qwen25_vl, vision_inputs, "model.visual"),
        ModelShape("qwen3-vl-8b", "images", qwen3_vl, vision_inputs, "model.visual"),
        ModelShape("qwen2-audio-7b", "clips", qwen2_audio, audio_inputs, "model.audio_tower"),
        ModelShape("llama-3-8b", "tokens", llama, text_inputs),
    )
}
"""By name."""
