"""What the retrofit refuses, and what it does with it when it is not strict."""

from typing import Any

import pytest
import torch

import mm_sparse as mms
from mm_sparse.integrations.hf.attention import attention_forward
from tests.support.hf_models import (
    ATTENTION,
    SPARSE,
    TEXT,
    WHOLE,
    build,
    long_ids,
)

tf: Any = pytest.importorskip("transformers")


def small_gemma2() -> Any:
    return tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**TEXT, head_dim=8, attn_implementation="eager", query_pre_attn_scalar=8)
    ).eval()


def small_gpt_oss() -> Any:
    config = tf.GptOssConfig(**TEXT, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    return tf.GptOssForCausalLM(config).eval()


def small_wavlm() -> Any:
    config = tf.WavLMConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16,), conv_kernel=(4,), conv_stride=(4,), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return tf.WavLMModel(config).eval()


def small_bloom() -> Any:
    return tf.BloomModel(tf.BloomConfig(vocab_size=120, hidden_size=32, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (small_gemma2, r"layers.0.self_attn \(Gemma2Attention\).*soft-capped logits.*2 of 2"),
        (small_gpt_oss, r"layers.0.self_attn \(GptOssAttention\).*learned attention sinks"),
        (small_wavlm, r"\(WavLMAttention\).*does not dispatch.*1 of 1 layers of WavLMModel"),
        (small_bloom, r"\(BloomAttention\).*does not dispatch.*1 of 1 layers of BloomModel"),
        (lambda: torch.nn.Linear(2, 2), "got Linear"),
    ],
    ids=["gemma2", "gpt_oss", "wavlm", "bloom", "linear"],
)
def test_what_cannot_be_served_is_refused_by_name(make: Any, message: str) -> None:
    model = make()
    before = set(vars(model))
    with pytest.raises(ValueError, match=message):
        mms.sparsify(model, WHOLE)
    assert set(vars(model)) == before


@pytest.mark.parametrize("make", [small_gemma2, small_gpt_oss], ids=["gemma2", "gpt_oss"])
@torch.no_grad()
def test_not_strict_runs_refused_layers_as_before(make: Any) -> None:
    model, ids = make(), long_ids(50)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    before = model(ids, attention_mask=mask).logits
    mms.sparsify(model, WHOLE, strict=False)
    assert model(ids, attention_mask=mask).logits.equal(before)
    rows = mms.report(model).rows
    assert [row.mode for row in rows] == ["refused"] * 2
    assert "softcap" in rows[0].reason or "s_aux" in rows[0].reason
    assert "refused" in str(mms.report(model))


def test_not_strict_leaves_undispatched_layers_alone() -> None:
    model = mms.sparsify(small_wavlm(), WHOLE, strict=False)
    with torch.no_grad():
        model(torch.randn(1, 400))
    assert {row.mode for row in mms.report(model).rows} == {"refused"}


def test_dropout_while_training_is_refused_where_the_layer_runs_sparse() -> None:
    case = build("llama")
    for layer in case.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    case.model.train()
    mms.sparsify(case.model, SPARSE)
    with pytest.raises(ValueError, match=r"\(LlamaAttention\).*dropout of 0.5"):
        case.model(long_ids(64))
    mms.sparsify(case.model, SPARSE, strict=False)
    case.model(long_ids(64))
    assert mms.report(case.model).rows[0].mode == "refused"
    mms.sparsify(case.model, mms.SparseConfig(dense_below=100))
    case.model(long_ids(64))


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_meaningful_arguments_of_a_call_are_refused(option: str) -> None:
    case = build("llama")
    mms.sparsify(case.model, SPARSE)
    module = case.model.get_submodule(ATTENTION)
    q, k = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match=rf"layers.0.self_attn \(LlamaAttention\).*`{option}`"):
        attention_forward(module, q, k, k, None, **{option: torch.ones(1)})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": 0.2}, TypeError, "config must be a SparseConfig, got float"),
        (
            {"scorer": "best"},
            ValueError,
            "scorer must be None, one of .'fine', 'relevance'. or a callable",
        ),
    ],
    ids=["config", "scorer"],
)
def test_bad_arguments_are_named(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        mms.sparsify(build("llama").model, **arguments)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        mms.sparsify("llama")  # pyright: ignore


def test_part_of_a_sparsified_model_is_refused() -> None:
    case = build("llama")
    mms.sparsify(case.model, SPARSE)
    part = case.model.model.layers[0]
    with pytest.raises(ValueError, match="must not be a part of a sparsified model"):
        mms.sparsify(part, SPARSE)
    with pytest.raises(ValueError, match="must be a whole sparsified model"):
        mms.densify(part)
    assert [row.name for row in mms.report(part).rows] == ["self_attn"]
