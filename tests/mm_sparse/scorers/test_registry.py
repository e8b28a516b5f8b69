"""Scorers of others: known by a name, saved and loaded like any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mm_sparse as mms
from mm_sparse.integrations import is_sparsified
from mm_sparse.scorers import registered_scorers, registry, scorer_class
from tests.support.hf_models import SPARSE, build, long_ids

pytest.importorskip("transformers")


class KeyNormScorer(mms.Scorer):
    """Units with long keys first, times a weight."""

    def __init__(self, *, num_query_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.shape = {
            "num_query_heads": num_query_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        self.weight = nn.Parameter(torch.ones(num_kv_heads))

    def score(self, q: Tensor, k: Tensor, plan: mms.Plan, scale: float) -> Tensor:
        edges = plan.units.long().cumsum(-1)
        norms = nn.functional.pad(k.norm(dim=-1).cumsum(-1), (1, 0))
        first, end = (edges[..., i][:, None].expand(-1, k.shape[1], -1) for i in (0, 1))
        total = norms.gather(2, end) - norms.gather(2, first)
        total = total * self.weight[:, None]
        return total[:, :, None].expand(-1, -1, plan.tiles.shape[1], -1)

    def init_args(self) -> dict[str, Any]:
        return dict(self.shape)


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are registered here are gone afterwards."""
    monkeypatch.setattr(registry, "_SCORERS", dict(registered_scorers()))


def test_the_scorers_of_the_package_have_names() -> None:
    assert registered_scorers()["relevance"] is mms.RelevanceScorer
    assert registered_scorers()["fine"] is mms.FineScorer
    assert scorer_class("FineScorer") is mms.FineScorer
    assert scorer_class("norm") is None


def test_a_registered_scorer_is_made_by_name() -> None:
    assert mms.register_scorer("norm")(KeyNormScorer) is KeyNormScorer
    model = mms.sparsify(build("llama").model, SPARSE, scorer="norm")
    scorers = list(mms.scorers_of(model).values())
    assert len(scorers) == 2
    assert all(isinstance(scorer, KeyNormScorer) for scorer in scorers)
    assert scorers[0].shape == {"num_query_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    assert scorer_class("norm") is scorer_class("KeyNormScorer") is KeyNormScorer


@torch.no_grad()
def test_a_registered_scorer_goes_through_files_into_a_model_that_is_dense(tmp_path: Path) -> None:
    mms.register_scorer("norm")(KeyNormScorer)
    model, other, ids = build("llama").model, build("llama").model, long_ids(200)
    other.load_state_dict(model.state_dict())
    mms.sparsify(model, SPARSE, scorer="norm")
    for number, weight in enumerate(mms.scorer_parameters(model)):
        weight.copy_(torch.tensor([0.5, -2.0]) + number)
    mms.save_scorers(model, tmp_path)
    mms.load_scorers(other, tmp_path)
    assert mms.sparse_config(other) == SPARSE
    pairs = zip(mms.scorer_parameters(model), mms.scorer_parameters(other), strict=True)
    assert all(a.equal(b) for a, b in pairs)
    assert model(ids).logits.equal(other(ids).logits)
    assert {row.mode for row in mms.report(other).rows} == {"sparse"}


def test_only_scorers_have_names() -> None:
    with pytest.raises(TypeError, match="must decorate a subclass of Scorer"):
        mms.register_scorer("linear")(nn.Linear)  # pyright: ignore
    with pytest.raises(TypeError, match="must decorate a subclass of Scorer"):
        mms.register_scorer("made")(mms.PooledScorer())  # pyright: ignore
    for name in ("", 3, KeyNormScorer):
        with pytest.raises(TypeError, match="name must be a string"):
            mms.register_scorer(name)  # pyright: ignore
    assert not {"linear", "made", ""} & set(registered_scorers())


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="name must be new, 'fine' is that of FineScorer"):
        mms.register_scorer("fine")(KeyNormScorer)
    assert registered_scorers()["fine"] is mms.FineScorer
    mms.register_scorer("norm")(KeyNormScorer)
    # A cell of a notebook that runs once more.
    again = type("KeyNormScorer", (KeyNormScorer,), {"__qualname__": KeyNormScorer.__qualname__})
    mms.register_scorer("norm")(again)
    assert registered_scorers()["norm"] is again


def test_a_name_that_nobody_registered_is_refused_with_those_that_are() -> None:
    mms.register_scorer("norm")(KeyNormScorer)
    model = build("llama").model
    with pytest.raises(ValueError, match=r"one of .*'norm'.* or a callable, got 'nrom'"):
        mms.sparsify(model, SPARSE, scorer="nrom")
    assert not is_sparsified(model)


def test_a_scorer_that_writes_neither_score_nor_describe_is_named() -> None:
    class Idle(mms.Scorer):
        pass

    q, k = torch.randn(1, 2, 100, 8), torch.randn(1, 1, 100, 8)
    layout, config = mms.TokenLayout.text(1, 100), mms.SparseConfig(dense_below=0)
    message = r"Idle must write score\(q, k, plan, scale\) or describe"
    with pytest.raises(NotImplementedError, match=message):
        Idle()(q, k, layout=layout, config=config)
    with pytest.raises(NotImplementedError, match=message):
        mms.sparse_attention(q, k, k, layout=layout, config=config, scorer=Idle())
    plan = layout.plan(config, num_query_heads=2, num_kv_heads=1)
    with pytest.raises(NotImplementedError, match=message):
        Idle().score(q, k, plan, 1.0)
