"""Linformer beside the scorers: it learns each layer's own output, and takes attention's place."""

import pytest
import torch

import mm_sparse as mms
from mm_sparse.integrations.context import override_attention
from mm_sparse.recipes.evaluation.linformer import Linformers, train_linformers
from tests.support.layouts import small_config

timm = pytest.importorskip("timm")


def tower() -> torch.nn.Module:
    torch.manual_seed(0)
    make = timm.models.vision_transformer.VisionTransformer
    model = make(64, 8, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(8)
    return mms.sparsify(model.requires_grad_(False), small_config())


def test_projections_learn_what_dense_attention_gives() -> None:
    model = tower()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with mms.override_config(model, backend="dense"):
        dense = model.forward_features(images)

    def gap(made: Linformers) -> float:
        with override_attention(model, made), torch.no_grad():
            return (model.forward_features(images) - dense).square().mean().item()

    batches = [images[i : i + 1] for i in range(4)] * 20
    run = model.forward_features
    first = train_linformers(model, iter(batches), 0.3, steps=1, lr=1e-9, run=run)
    with torch.no_grad():  # as around an evaluation
        trained = train_linformers(model, iter(batches), 0.3, steps=80, lr=1e-2, run=run)
    assert gap(trained) < 0.9 * gap(first)
    assert [len(x.project_keys) for x in trained.layers.values()] == [20, 20]
    again = model.forward_features(images)
    assert not torch.equal(again, dense), "attention is the model's own again"


def test_a_model_that_runs_nothing_sparse_teaches_nothing() -> None:
    model = tower()
    with (
        mms.override_config(model, dense_below=10**6),
        pytest.raises(ValueError, match="model must run sparse layers, got none"),
    ):
        train_linformers(model, iter([torch.rand(1, 3, 64, 64)]), 0.3, steps=1)
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 0"):
        Linformers(0)
