"""Scorers that cannot be loaded leave a model as it was."""

import json
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
