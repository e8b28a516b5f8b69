"""Scorers that cannot be loaded leave a model as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mm_sparse as mms
from mm_sparse.checkpoints.format import RECORD
from mm_sparse.integrations import is_sparsified
from tests.support.hf_models import SPARSE, WHOLE, build, long_ids

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scorers of two layers, the second of which is broken: for other heads than a model has."""
    model = mms.sparsify(build("llama").model, SPARSE, scorer="relevance")
    mms.save_scorers(model, tmp_path)
    path = tmp_path / RECORD
    record = json.loads(path.read_text())
    list(record["layers"].values())[-1]["num_kv_heads"] = 1
    path.write_text(json.dumps(record))
    return tmp_path


@torch.no_grad()
def test_a_dense_model_stays_dense(folder: Path) -> None:
    model, ids = build("llama").model, long_ids(100)
    want, named = model(ids).logits, model.config._attn_implementation
    with pytest.raises(ValueError, match=r"folder must hold a scorer for .* KV heads"):
        mms.load_scorers(model, folder)
    assert not is_sparsified(model)
    assert model.config._attn_implementation == named
    assert model(ids).logits.equal(want)


@torch.no_grad()
def test_a_sparse_model_keeps_its_scorers_and_config(folder: Path) -> None:
    model = mms.sparsify(build("llama").model, WHOLE, scorer="fine")
    before = dict(mms.scorers_of(model))
    with pytest.raises(ValueError, match="folder must hold a scorer for"):
        mms.load_scorers(model, folder)
    assert mms.sparse_config(model) == WHOLE
    after = mms.scorers_of(model)
    assert before
    assert all(after[name] is scorer for name, scorer in before.items())


def test_a_sparsified_model_gets_stored_ratios_by_modality(tmp_path: Path) -> None:
    """Of layers that have budgets of their own, and of the others."""
    kinds = {"TEXT": (0.2, 0.4), "IMAGE": 0.1}
    for layers in ({}, {0: {"IMAGE": 0.05}}):
        config = replace(SPARSE, ratio=0.2, query_ratio=kinds, layer_ratio=layers)
        mms.save_scorers(mms.sparsify(build("llama").model, config), tmp_path)
        model = mms.sparsify(build("llama").model, replace(SPARSE, ratio=0.4))
        mms.load_scorers(model, tmp_path)
        found, wanted = mms.sparse_config(model), config.scaled(0.4)
        assert found.query_ratio == wanted.query_ratio
        assert found.layer_ratio == wanted.layer_ratio
        kept = mms.sparsify(build("llama").model, SPARSE)
        assert not mms.sparse_config(mms.load_scorers(kept, tmp_path, budgets=False)).query_ratio
