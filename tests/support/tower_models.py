"""Tiny random towers of timm, open_clip and torchaudio, and what to run them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mm_sparse as mms

SPARSE = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=0, window=0)
WHOLE = mms.SparseConfig(ratio=1.0, dense_below=0)
SIZE = {"img_size": 48, "patch_size": 4}
WIDTH = {"embed_dim": 32, "depth": 2, "num_heads": 2}
VISION = {"image_size": 48, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}


@dataclass
class Case:
    """A model, and how to run it: tensors that must stay the same."""

    model: Any
    run: Callable[[Any], list[Tensor]]


def random(*shape: int) -> Tensor:
    """The same numbers for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def vit(name: str, pixels: tuple[int, int] = (48, 48), **changes: Any) -> Case:
    """A timm model by name, made small; two pictures."""
    import timm

    model = timm.create_model(name, num_classes=5, **{**SIZE, **WIDTH, **changes})
    return Case(model, lambda m: [m(random(2, 3, *pixels))])


def naflex(key_only: bool | None = None) -> Case:
    """NaFlexViT with registers: pictures of one size, or patches of two pictures with padding."""
    import timm

    name = "naflexvit_base_patch16_gap"
    model: Any = timm.create_model(name, num_classes=5, patch_size=4, **WIDTH)
    if key_only is None:
        return Case(model, lambda m: [m(random(2, 3, 48, 40))])
    model.use_key_only_attn_mask = key_only
    valid = torch.ones(2, 120, dtype=torch.bool)
    valid[0, 96:] = valid[1, 108:] = False
    coordinates = torch.zeros(2, 120, 2, dtype=torch.long)
    for row, (h, w) in enumerate(((8, 12), (12, 9))):
        axes = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        coordinates[row, : h * w] = torch.stack(axes, -1).view(-1, 2)
    patches = {"patches": random(2, 120, 48), "patch_coord": coordinates, "patch_valid": valid}
    return Case(model, lambda m: [m(patches)])


def clip(kind: str = "CLIP", vision: Any = None, text: Any = None, pixels: int = 48) -> Case:
    """An open_clip model of both towers; the text of one row is short."""
    from open_clip import model as open_clip

    model = getattr(open_clip, kind)(16, {**VISION, **(vision or {})}, {**TEXT, **(text or {})})
    ids = torch.randint(1, 60, (2, 77), generator=torch.Generator().manual_seed(3))
    ids[:, 60] = 63
    ids[0, 61:] = 0
    picture = random(2, 3, pixels, pixels)
    return Case(model, lambda m: [m.encode_image(picture), m.encode_text(ids)])


def wav2vec2(lengths: bool, **changes: Any) -> Case:
    """torchaudio's wav2vec 2.0, or HuBERT, which has the same encoder."""
    import torchaudio

    options: dict[str, Any] = {
        "extractor_mode": "group_norm", "extractor_conv_bias": False,
        "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 4)], "encoder_embed_dim": 32,
        "encoder_projection_dropout": 0.0, "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4, "encoder_num_layers": 2, "encoder_num_heads": 2,
        "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 48,
        "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.0,
        "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": 7,
    }  # fmt: skip
    make = torchaudio.models.wav2vec2_model
    if "encoder_num_buckets" in changes:
        make = torchaudio.models.wavlm_model
    model = make(**{**options, **changes})
    given = torch.tensor([3000, 2000]) if lengths else None
    return Case(model, lambda m: [m(random(2, 3000), given)[0]])


def conformer(**changes: Any) -> Case:
    """torchaudio's Conformer, on rows of different length."""
    from torchaudio.models import Conformer

    model = Conformer(32, 2, 48, 2, 3, **changes)
    return Case(model, lambda m: [m(random(2, 150, 32), torch.tensor([150, 97]))[0]])


LAYER_NORM = {"extractor_mode": "layer_norm", "encoder_layer_norm_first": True}
CUSTOM = {"block_type": "custom", "qk_norm": True, "scale_heads": True, "scale_attn_inner": True}
TRUNK = {"timm_model_name": "test_vit", "timm_pool": "avg", "image_size": 160}
POOL = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
TOWERS: dict[str, Callable[[], Case]] = {
    "vit": partial(vit, "vit_tiny_patch16_224"),
    "vit_qk_norm_gap": partial(vit, "vit_so150m_patch16_reg4_gap_256", qk_norm=True),
    "vit_parallel": partial(vit, "vit_base_patch16_xp_224"),
    "dynamic": partial(vit, "vit_tiny_patch16_224", (40, 56), dynamic_img_size=True),
    "deit3": partial(vit, "deit3_small_patch16_224"),
    "deit_distilled": partial(vit, "deit_tiny_distilled_patch16_224"),
    "dinov2_registers": partial(vit, "vit_small_patch14_reg4_dinov2"),
    "siglip": partial(vit, "vit_base_patch16_siglip_224"),
    "eva02": partial(vit, "eva02_tiny_patch14_224"),
    "dinov3": partial(vit, "vit_small_patch16_dinov3"),
    "rope": partial(vit, "vit_small_patch16_rope_mixed_224"),
    "perception_encoder": partial(vit, "vit_pe_core_tiny_patch16_384"),
    "naflex": naflex,
    "naflex_padded": partial(naflex, False),
    "naflex_padded_keys": partial(naflex, True),
    "clip": clip,
    "clip_custom_text": partial(clip, "CustomTextCLIP", None, {"no_causal_mask": True}),
    "clip_custom_attention": partial(clip, "CustomTextCLIP", CUSTOM, CUSTOM),
    "clip_pooled": partial(clip, "CLIP", POOL),
    "clip_class_text": partial(clip, "CustomTextCLIP", None, {"embed_cls": True}),
    "clip_timm": partial(clip, "CustomTextCLIP", TRUNK, None, 160),
    "wav2vec2": partial(wav2vec2, False),
    "wav2vec2_lengths": partial(wav2vec2, True),
    "hubert": partial(wav2vec2, False, **LAYER_NORM),
    "hubert_lengths": partial(wav2vec2, True, **LAYER_NORM),
    "conformer": conformer,
    "conformer_first": partial(conformer, use_group_norm=True, convolution_first=True),
}  # fmt: skip


def build(name: str) -> Case:
    """The case, in eval mode, with weights large enough that attention matters."""
    torch.manual_seed(0)
    return strong(TOWERS[name]())


def strong(case: Case) -> Case:
    """Weights large enough that attention matters, also behind scales that start at nearly zero."""
    case.model.eval().float()
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif parameter.numel() > 1 and float(parameter.abs().max()) <= 1e-3:
                parameter.fill_(0.5)
    return case
