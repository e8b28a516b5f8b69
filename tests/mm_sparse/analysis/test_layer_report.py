"""What report says of each layer, and when a layer runs dense."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mm_sparse as mms
from mm_sparse.analysis.layer_report import kept_mass
from mm_sparse.integrations import state
from tests.support.hf_models import (
    ATTENTION,
    SPARSE,
    WHOLE,
    build,
    long_ids,
)

tf: Any = pytest.importorskip("transformers")


@torch.no_grad()
def test_dense_fallbacks_are_stock_and_reported() -> None:
    case = build("gemma3")
    inputs = case.inputs("left")
    logits = case.model(**inputs).logits
    length = inputs["input_ids"].shape[1]
    mms.sparsify(case.model, mms.SparseConfig(ratio=0.1, dense_below=length + 40))
    assert case.model(**inputs).logits.equal(logits)
    rows = {row.name: row for row in mms.report(case.model).rows}
    reason = rows["model.language_model.layers.0.self_attn"].reason
    assert reason == f"{length} tokens < dense_below ({length + 40})"
    mms.sparsify(case.model, mms.SparseConfig(dense_below=0, dense_layers=(1,)))
    case.model(**inputs)
    rows = {row.name: row for row in mms.report(case.model).rows}
    assert rows["model.language_model.layers.1.self_attn"].reason == "in dense_layers"
    assert rows["model.language_model.layers.0.self_attn"].mode == "sparse"
    mms.sparsify(case.model, mms.SparseConfig(backend="dense", dense_below=0))
    assert case.model(**inputs).logits.equal(logits)


@torch.no_grad()
def test_report_measures_and_writes(tmp_path: Path) -> None:
    case = build("llava_onevision")
    mms.sparsify(case.model, SPARSE)
    assert mms.report(case.model).rows[0].density is None
    found = mms.report(case.model, case.inputs("none"), mass=True)
    row = next(r for r in found.rows if "language_model.layers.1" in r.name)
    assert row.mass is not None
    assert row.density is not None
    assert row.density < row.mass <= 1
    assert row.seconds is not None
    pairs = {(mms.Modality.TEXT, mms.Modality.IMAGE), (mms.Modality.IMAGE, mms.Modality.IMAGE)}
    assert row.pair_density is not None
    assert pairs <= set(row.pair_density)
    record = json.loads(found.to_json())[-1]
    assert record["class"] == "Qwen2Attention"
    assert "TEXT>IMAGE" in record["pair_density"]
    assert "Qwen2Attention" in str(found)
    found.plot(tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="inputs must be given to measure mass"):
        mms.report(case.model, mass=True)


def test_kept_mass_of_everything_is_one() -> None:
    q, k = torch.randn(1, 4, 70, 8), torch.randn(1, 2, 70, 8)
    layout = mms.TokenLayout.text(1, 70)
    scores = mms.PooledScorer()(q, k, layout=layout, config=WHOLE)
    assert kept_mass(q, k, mms.select(scores, layout, WHOLE)) == pytest.approx(1)


@torch.no_grad()
def test_a_long_selection_is_thinned_before_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from mm_sparse.integrations import layer

    case = build("llama")
    mms.sparsify(case.model, SPARSE)
    case.model(long_ids())
    whole = mms.report(case.model).density
    monkeypatch.setattr(layer, "KEPT_ENTRIES", 100)
    case.model(long_ids())
    held = state.attention_layers(case.model)[ATTENTION].record
    assert held is not None
    assert held.selection is not None
    assert held.selection.index.numel() <= 200
    assert mms.report(case.model).density == pytest.approx(whole, abs=0.1)


@torch.no_grad()
def test_cross_attention_stays_dense_and_is_listed() -> None:
    config = tf.WhisperConfig(
        vocab_size=120, d_model=32, encoder_layers=1, decoder_layers=1, num_mel_bins=16,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_source_positions=40, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    model = mms.sparsify(tf.WhisperForConditionalGeneration(config).eval(), WHOLE)
    model(input_features=torch.randn(1, 16, 80), decoder_input_ids=torch.ones(1, 9).long())
    rows = {row.name.split(".", 1)[1]: row for row in mms.report(model).rows}
    assert rows["decoder.layers.0.encoder_attn"].reason == "cross-attention"
    assert rows["decoder.layers.0.self_attn"].mode == "sparse"
    assert rows["encoder.layers.0.self_attn"].mode == "sparse"
    assert state.attention_layers(model)["model.encoder.layers.0.self_attn"].modality == 2
