"""Vision encoders without prefix tokens give patches and their grid, whatever stands in front."""

import pytest
import torch
from torch import nn

from mm_sparse.encoders import create_vision_encoder
from mm_sparse.encoders.backbones.vision import TimmVision

SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("vit_tiny_patch16_224", 1), ("vit_small_patch14_reg4_dinov2", 5)],
)
def test_patches_come_without_prefix_tokens(name, prefix):
    tower = create_vision_encoder(name, image_size=16, keep_prefix=False, **SMALL)
    images = torch.rand(2, 3, 16, 24)
    tokens, spec = tower(images)
    assert (tower.width, tower.prefix) == (32, prefix)
    assert (spec.grid, spec.prefix, tokens.shape) == ((4, 6), 0, (2, 24, 32))
    inner = tower.backbone.forward_features((images - tower.mean) / tower.std)
    assert torch.equal(tokens, inner[:, prefix:])


def test_tower_keeps_the_backbones_keys_and_normalisation():
    tower = create_vision_encoder("vit_small_patch14_dinov2", image_size=16, **SMALL)
    assert all(key.startswith("backbone.") for key in tower.state_dict())
    assert tower.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_images_of_another_rank_are_refused():
    tower = create_vision_encoder("vit_tiny_patch16_224", image_size=16, **SMALL)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got shape \(3, 16, 16\)"):
        tower(torch.rand(3, 16, 16))


def test_backbone_without_patches_is_refused():
    with pytest.raises(TypeError, match="vision transformer with `forward_features`, got Linear"):
        TimmVision(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`patch_embed`, got ResNet"):
        create_vision_encoder("resnet18")
