"""Accuracy by method, and budgets spread over layers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mm_sparse as mms
from mm_sparse.integrations import context
from mm_sparse.integrations.state import attention_layers
from mm_sparse.recipes.data.text_corpus import CorpusData
from mm_sparse.recipes.distillation import budget_search
from mm_sparse.recipes.evaluation import language_quality
from mm_sparse.recipes.metrics import layers as layer_metrics, logits
from mm_sparse.scorers import attention_mass
from tests.support.tiny_recipes import SPARSE, TOKENS, make, mean, sharpen, tiny, write_corpus


@pytest.fixture
def npz(tmp_path: Path) -> str:
    return write_corpus(tmp_path)


def test_a_perfect_ranking_is_as_good_as_the_perfect_scorer() -> None:
    model = tiny().build(0).eval()
    sharpen(model)
    mms.sparsify(model, SPARSE)
    ids = torch.randint(0, 40, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with context.override_scorers(model, attention_mass.OracleScorer):
        figures = mean(layer_metrics.layer_figures(model, ids))
    assert figures["overlap"] == 1.0
    pooled = mean(layer_metrics.layer_figures(model, ids))
    assert pooled["kept"] < figures["kept"] <= 1.0
    assert all(layer.scorer is None for layer in attention_layers(model).values())


def test_the_table_has_every_method_beside_dense() -> None:
    torch.manual_seed(0)
    model = tiny().build(0).eval()
    sharpen(model)
    mms.sparsify(model, SPARSE, scorer="fine")
    rows = {"a": torch.randint(0, 40, (2, TOKENS))}
    methods = ["window", "bigbird", "scorers", "oracle"]
    *_, before, found = language_quality.tables(model, rows, methods, [0.3], [1.0])
    assert len(before) == len(found) == 8
    assert {len(row["kls"]) for row in before} == {1}
    for row in found:
        if "mass" in row:
            assert row["kl"] == pytest.approx(0, abs=1e-5)
            assert row["density"] == 1.0
        else:
            assert row["kl"] > 0
            assert 0.25 < row["density"] < 0.55
        assert len(row["kls"]) == 2


def test_what_matters_more_gets_more() -> None:
    levels = (0.1, 0.2, 0.5, 1.0)
    costs = {0: [0.1, 0.05, 0.01, 0.0], 1: [0.001, 0.0005, 0.0001, 0.0], 2: [0.4, 0.3, 0.1, 0.0]}
    ratios = budget_search.spread(costs, 0.3, levels)
    assert ratios[2] > ratios[0] > ratios[1]
    assert sum(ratios.values()) / 3 == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"mean must be in \[0.1, 1.0\], got 0.05"):
        budget_search.spread(costs, 0.05, levels)


def test_costs_of_a_layer_are_those_of_the_model_in_which_it_alone_is_sparse(npz: str) -> None:
    module = make()
    ids = CorpusData(npz, TOKENS).kinds("test")["a"][:1]
    costs = budget_search.language_costs(module.language, [ids], (0.2, 0.4, 1.0))
    assert sorted(costs) == [(0, None), (1, None), (2, None)]
    for own in costs.values():
        assert own[0] >= own[1] > 0
        assert own[2] == 0
    config = replace(SPARSE, ratio=0.2, dense_layers=(0, 2))
    dense = logits.predictions(module.language, ids, backend="dense")
    mms.sparsify(module.language, config)
    sparse = logits.predictions(module.language, ids)
    assert logits.change_of(dense, sparse, ids)["kl"] == pytest.approx(costs[1, None][0], rel=1e-2)


def test_a_head_alone_costs_what_a_config_with_its_ratio_says(npz: str) -> None:
    module = make()
    ids = CorpusData(npz, TOKENS).kinds("test")["a"][:1]
    costs = budget_search.language_costs(module.language, [ids], (0.2, 1.0), by_head=True)
    heads = len([place for place in costs if place[0] == 0])
    assert heads > 1
    assert sorted(costs) == [(layer, head) for layer in range(3) for head in range(heads)]
    one = {1: (0.2, *[1.0] * (heads - 1))}
    dense = logits.predictions(module.language, ids, backend="dense")
    sparse = logits.predictions(module.language, ids, layer_ratio=one, dense_layers=(0, 2))
    assert logits.change_of(dense, sparse, ids)["kl"] == pytest.approx(costs[1, 0][0], rel=1e-2)
    spread = budget_search.spread(costs, 0.5, (0.2, 1.0))
    found = budget_search.layer_ratios(spread)
    assert {layer: len(own) for layer, own in found.items()} == dict.fromkeys(range(3), heads)


def test_budgets_of_heads_belong_to_the_models_own_scorers() -> None:
    model = tiny().build(0).eval()
    sharpen(model)
    mms.sparsify(model, replace(SPARSE, layer_ratio={0: (1.0, 1.0), 1: 1.0, 2: 1.0}))
    rows = {"a": torch.randint(0, 40, (1, TOKENS))}
    *_, found = language_quality.tables(model, rows, ["window", "scorers", "one ratio"], [0.2, 0.3])
    density = {(row["method"], row["ratio"]): row["density"] for row in found}
    assert density.pop(("scorers", 0.3)) == 1.0
    assert 0.6 < density.pop(("scorers", 0.2)) < 0.9
    assert max(density.values()) < 0.6
