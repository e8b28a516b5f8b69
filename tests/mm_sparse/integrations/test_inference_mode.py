"""A model that first ran in inference mode trains like any other."""

import pytest
import timm
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mm_sparse as mms

SPARSE = mms.SparseConfig(ratio=0.5, tile=64, unit=16, sinks=4, window=8, dense_below=0)


@pytest.mark.parametrize("scorer", [None, "relevance", "fine"])
def test_a_language_model_trains_after_inference(scorer: str | None) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    mms.sparsify(model, SPARSE, scorer=scorer)
    ids = torch.randint(0, 50, (1, 150))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        want = model(ids, attention_mask=mask).logits
    out = model(ids, attention_mask=mask).logits
    assert torch.equal(out, want)
    out.sum().backward()
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_a_tower_trains_after_inference() -> None:
    tower = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, num_classes=0
    )
    mms.sparsify(tower, SPARSE)
    pictures = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        want = tower(pictures)
    out = tower(pictures)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert all(p.grad is not None for p in tower.blocks.parameters())


def test_scorers_that_are_made_in_inference_mode_rank() -> None:
    layout = mms.TokenLayout.text(1, 128)
    with torch.inference_mode():
        q, k = torch.randn(1, 4, 128, 8), torch.randn(1, 2, 128, 8)
        sizes = {"num_query_heads": 4, "num_kv_heads": 2, "head_dim": 8}
        for make in (mms.RelevanceScorer, mms.FineScorer):
            assert make(**sizes)(q, k, layout=layout, config=SPARSE).values.isfinite().any()
