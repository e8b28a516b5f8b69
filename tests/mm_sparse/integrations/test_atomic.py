"""What fails changes nothing: `sparsify` and `densify` do all or nothing."""

from typing import Any

import pytest
import torch

import mm_sparse as mms
from mm_sparse.integrations import is_sparsified
from tests.support import hf_models, tower_models

pytest.importorskip("transformers")
pytest.importorskip("timm")


def wants_another_argument(width: int) -> mms.Scorer:
    raise AssertionError("cannot be called")


def knows_no_such_layer(**shape: int) -> mms.Scorer:
    raise KeyError("layer")


@pytest.mark.parametrize(
    ("factory", "error"), [(wants_another_argument, TypeError), (knows_no_such_layer, KeyError)]
)
def test_a_scorer_that_cannot_be_made_leaves_a_model_as_it_was(factory: Any, error: Any) -> None:
    model = hf_models.build("llama").model
    mms.sparsify(model, hf_models.SPARSE, scorer="relevance")
    before, ids = dict(mms.scorers_of(model)), hf_models.long_ids(100)
    with torch.no_grad():
        want = model(ids).logits
        with pytest.raises(error):
            mms.sparsify(model, hf_models.WHOLE, scorer=factory)
        assert mms.sparse_config(model) == hf_models.SPARSE
        after = dict(mms.scorers_of(model))
        assert before
        assert list(after) == list(before)
        assert all(after[name] is scorer for name, scorer in before.items())
        assert model(ids).logits.equal(want)
        assert {row.mode for row in mms.report(model).rows} == {"sparse"}


@pytest.mark.parametrize(
    ("factory", "error"), [(wants_another_argument, TypeError), (knows_no_such_layer, KeyError)]
)
def test_a_scorer_that_cannot_be_made_leaves_a_dense_model_dense(factory: Any, error: Any) -> None:
    case = tower_models.build("dinov2_registers")
    with torch.no_grad():
        want = case.run(case.model)
        with pytest.raises(error):
            mms.sparsify(case.model, tower_models.SPARSE, scorer=factory)
        assert not is_sparsified(case.model)
        assert all("forward" not in vars(module) for module in case.model.modules())
        assert all(a.equal(b) for a, b in zip(case.run(case.model), want, strict=True))


@torch.no_grad()
def test_a_forward_that_was_replaced_stops_densify_before_anything_changes() -> None:
    case = tower_models.build("dinov2_registers")
    dense = case.run(case.model)
    mms.sparsify(case.model, tower_models.SPARSE)
    want = case.run(case.model)
    name, layer = list(mms.attention_layers(case.model).items())[-1]
    ours = layer.module.forward
    layer.module.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    before = {key: dict(vars(module)) for key, module in case.model.named_modules()}
    with pytest.raises(ValueError, match=rf"{name}\.forward must be as `sparsify` left it"):
        mms.densify(case.model)
    for key, module in case.model.named_modules():
        now = vars(module)
        assert list(now) == list(before[key]), key
        assert all(now[field] is before[key][field] for field in now), key
    assert all(a.equal(b) for a, b in zip(case.run(case.model), want, strict=True))
    layer.module.forward = ours
    mms.densify(case.model)
    assert all(a.equal(b) for a, b in zip(case.run(case.model), dense, strict=True))
