"""Tiny random models of every kind that the retrofit is held to, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mm_sparse as mms

TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 119,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
    "num_channels": 3,
}
# What a layer keeps, in tests that want it sparse.
SPARSE = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=0, window=16)
WHOLE = mms.SparseConfig(ratio=1.0, dense_below=0)
ATTENTION = "model.layers.0.self_attn"
IMAGE, AUDIO, VIDEO, VISION_START = 100, 101, 99, 98


@dataclass
class Case:
    """A model, and how many placeholder tokens its picture or clip takes in a prompt."""

    model: Any
    extra: dict[str, Tensor]
    """Inputs beside the ids, for a batch of two."""
    placeholders: int
    token: int = IMAGE
    kinds: str = ""
    """Name under which the model wants to know what is a picture; "suffix": what is causal."""

    def inputs(self, padding: str) -> dict[str, Tensor]:
        """Two rows of different length: text, placeholders, text."""
        generator = torch.Generator().manual_seed(1)
        head = torch.randint(3, 99, (2, 5), generator=generator)
        head[:, -1] = VISION_START
        tail = torch.randint(3, 99, (2, 12), generator=generator)
        middle = torch.full((2, self.placeholders), self.token)
        ids = torch.cat([head, middle, tail], 1)
        mask = torch.ones_like(ids)
        if padding == "right":
            mask[0, -4:] = 0
        elif padding == "left":
            # A shorter row moves to the right, as a tokenizer pads it.
            ids[0] = torch.cat([torch.zeros(4, dtype=torch.long), ids[0, :-4]])
            mask[0, :4] = 0
        ids = ids.masked_fill(mask == 0, 0)
        inputs = {"input_ids": ids, "attention_mask": mask, **self.extra}
        if self.kinds == "suffix":
            inputs["token_type_ids"] = torch.zeros_like(ids)
            inputs["token_type_ids"][:, -6:] = 1
        elif self.kinds:
            inputs[self.kinds] = (ids == self.token).long()
        return inputs


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def llama(**changes: Any) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    return Case(LlamaForCausalLM(LlamaConfig(**{**TEXT, **changes})), {}, 0)


def gemma3() -> Case:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**TEXT, "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 16}
    text["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=9, image_token_index=IMAGE
    )
    extra = {"pixel_values": _pixels(2, 3, 24, 24)}
    return Case(Gemma3ForConditionalGeneration(config), extra, 9, kinds="token_type_ids")


def llava_onevision() -> Case:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[24, 24]],
    )
    extra = {
        "pixel_values": _pixels(2, 2, 3, 24, 24),
        "image_sizes": torch.tensor([[24, 24], [24, 24]]),
    }
    # A base picture of 6 x 6 patches, the same as one tile, and a line break per row of the tile.
    return Case(LlavaOnevisionForConditionalGeneration(config), extra, 36 + 36 + 6)


def qwen2_5_vl() -> Case:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=97,
    )  # fmt: skip
    extra = {
        "pixel_values": _pixels(2 * 64, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 8], [1, 8, 8]]),
    }
    return Case(Qwen2_5_VLForConditionalGeneration(config), extra, 16, kinds="mm_token_type_ids")


def qwen2_audio() -> Case:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    config = Qwen2AudioConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        audio_config={
            "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 2,
            "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16,
            "max_source_positions": 40,
        },
        audio_token_index=AUDIO,
    )  # fmt: skip
    extra = {
        "input_features": _pixels(2, 16, 80),
        "feature_attention_mask": torch.ones(2, 80, dtype=torch.long),
    }
    return Case(Qwen2AudioForConditionalGeneration(config), extra, 20, token=AUDIO)


def paligemma() -> Case:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    extra = {"pixel_values": _pixels(2, 3, 24, 24)}
    return Case(PaliGemmaForConditionalGeneration(config), extra, 36, kinds="suffix")


def smolvlm() -> Case:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "smolvlm_vision"},
        image_token_id=IMAGE,
        pad_token_id=0,
        scale_factor=2,
    )
    extra = {"pixel_values": _pixels(2, 1, 3, 24, 24)}
    return Case(SmolVLMForConditionalGeneration(config), extra, 9)


MODELS: dict[str, Callable[[], Case]] = {
    "llama": llama,
    "gemma3": gemma3,
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_audio": qwen2_audio,
    "paligemma": paligemma,
    "smolvlm": smolvlm,
}


def build(name: str) -> Case:
    """The case, in eval mode, with weights large enough that masks matter."""
    torch.manual_seed(0)
    case = MODELS[name]()
    case.model.eval().float()
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return case


def long_ids(length: int = 600) -> Tensor:
    """Two rows of text."""
    return torch.randint(3, 99, (2, length), generator=torch.Generator().manual_seed(5))
