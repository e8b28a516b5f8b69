"""Costs of heads from a few passes, and budgets that are chosen by measuring."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mm_sparse as mms
from mm_sparse.integrations import override_config
from mm_sparse.recipes.distillation import first_order_budgets as budgets
from mm_sparse.recipes.distillation.budget_search import (
    LEVELS,
    language_costs,
    layer_ratios,
    spread,
)
from mm_sparse.recipes.distillation.first_order_budgets import (
    choose_budgets,
    first_order_costs,
    pair_weights,
)
from mm_sparse.recipes.finetuning import load_model
from mm_sparse.recipes.metrics import logits, predictions, spread_predictions
from tests.support.tiny_checkpoints import write_language

SPARSE = mms.SparseConfig(
    ratio=0.3, tile=64, sinks=0, window=16, query_pools=2, bidirectional=(), dense_below=0
)


def tiny(folder: Path, layers: int = 2) -> Any:
    name = write_language(folder, num_hidden_layers=layers, initializer_range=0.2)
    return mms.sparsify(load_model(name).eval().requires_grad_(False), SPARSE)


def inputs(count: int = 1, tokens: int = 256) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(14, 300, (1, tokens))} for _ in range(count)]


def test_one_layer_costs_what_it_is_measured_to_cost(tmp_path: Path) -> None:
    """Where tokens do not reach each other's predictions, only the expansion is an estimate."""
    model, levels = tiny(tmp_path, layers=1), (0.7, 0.9, 1.0)
    given = inputs()
    with override_config(model, ratio=0.9):
        found = first_order_costs(model, given, levels, draws=60)
    wanted = language_costs(model, [given[0]["input_ids"]], levels, by_head=True)
    assert found.keys() == wanted.keys() == {(0, 0), (0, 1)}
    for place, own in wanted.items():
        assert found[place] == pytest.approx(own, rel=0.3)
        assert own[1] > 0
        assert found[place][-1] == 0


def test_costs_of_two_layers_have_the_order_of_measured_ones(tmp_path: Path) -> None:
    model, levels = tiny(tmp_path), (0.3, 0.6, 1.0)
    given = inputs(2)
    found = first_order_costs(model, given, levels, draws=20)
    ids = [own["input_ids"] for own in given]
    wanted = language_costs(model, ids, levels, by_head=True)
    a, b = (np.array([own[:2] for own in x.values()]).ravel() for x in (found, wanted))
    ranks = [x.argsort().argsort() for x in (a, b)]
    assert np.corrcoef(*ranks)[0, 1] > 0.8


def test_the_model_stays_as_it_was_and_recomputing_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    model, given = tiny(tmp_path), inputs()
    before = spread_predictions(model, given[0])
    first = first_order_costs(model, given, draws=2)
    assert not any(module.training for module in model.modules())
    assert not model.is_gradient_checkpointing
    assert torch.equal(before, spread_predictions(model, given[0]))
    monkeypatch.setattr(budgets, "_recomputed_layers", lambda model: nullcontext())
    again = first_order_costs(model, given, draws=2)
    for place, own in first.items():
        assert own == pytest.approx(again[place], rel=1e-5)


def test_by_layer_heads_are_added_up(tmp_path: Path) -> None:
    model, given = tiny(tmp_path), inputs()
    heads = first_order_costs(model, given, draws=1)
    layers = first_order_costs(model, given, draws=1, by_head=False)
    assert list(layers) == [(0, None), (1, None)]
    for (layer, _), own in layers.items():
        both = [a + b for a, b in zip(heads[layer, 0], heads[layer, 1], strict=True)]
        assert own == pytest.approx(both)


def half_images(tokens: int = 256) -> torch.Tensor:
    """Modality of a row that begins with an image."""
    return (torch.arange(tokens) < tokens // 2)[None].int() * int(mms.Modality.IMAGE)


def test_costs_of_modalities_add_up_to_those_of_their_head(tmp_path: Path) -> None:
    model, given = tiny(tmp_path), inputs()
    with mms.set_modality(model, half_images()):
        heads = first_order_costs(model, given, draws=1)
        kinds = first_order_costs(model, given, draws=1, by_modality=True)
    assert len(kinds) == 2 * len(heads)
    for (layer, head), own in heads.items():
        text, image = (kinds[layer, head, kind] for kind in (mms.Modality.TEXT, mms.Modality.IMAGE))
        assert own == pytest.approx([a + b for a, b in zip(text, image, strict=True)])
    # Predictions are those of text, so that images have no say in the last layer.
    assert max(kinds[1, 0, mms.Modality.IMAGE]) == 0 < max(kinds[1, 0, mms.Modality.TEXT])
    assert max(kinds[0, 0, mms.Modality.IMAGE]) > 0


def test_text_alone_has_budgets_by_head(tmp_path: Path) -> None:
    model, given = tiny(tmp_path), inputs()
    heads = first_order_costs(model, given, draws=1)
    assert first_order_costs(model, given, draws=1, by_modality=True) == heads
    weights = pair_weights(model, given, heads)
    assert set(weights.values()) == {1.0}
    found = choose_budgets(model, given, heads, 0.3, weights=weights)
    assert found == choose_budgets(model, given, heads, 0.3)


def test_budgets_by_modality_keep_as_many_pairs_as_one_ratio(tmp_path: Path) -> None:
    model, given, text, image = tiny(tmp_path), inputs(tokens=1024), *list(mms.Modality)[:2]
    levels = (0.1, 0.2, 0.3, 0.5, 1.0)
    with mms.set_modality(model, half_images(1024)), override_config(model, window=0):
        costs = first_order_costs(model, given, levels, draws=1, by_modality=True)
        weights = pair_weights(model, given, costs)
        for layer, head in ((0, 0), (1, 1)):
            pairs = [weights[layer, head, kind] for kind in (text, image)]
            assert sum(pairs) == pytest.approx(1)
            assert pairs[1] == pytest.approx(1 / 4, rel=0.1)
        wanted = spread(costs, 0.3, levels, weights)
        mean = sum(weights[place] * ratio for place, ratio in wanted.items()) / 4
        assert mean == pytest.approx(0.3, abs=1e-3)
        densities = []
        for ratios in ({}, layer_ratios(wanted)):
            with override_config(model, ratio=0.3, layer_ratio=ratios):
                model(**given[0])
            densities.append(mms.report(model).density)
        assert densities[1] == pytest.approx(densities[0], rel=0.03)
        # The last layer's images reach no prediction.
        assert wanted[1, 0, image] == wanted[1, 1, image] == 0.1
        assert max(ratio for (*_, kind), ratio in wanted.items() if kind == text) > 0.3
        found = choose_budgets(model, given, costs, 0.3, levels, weights=weights)
    assert found.tried[found.share] == min(found.tried.values())


@pytest.mark.parametrize("mean", [0.06, 0.2, 0.37, 1.0])
def test_chosen_budgets_have_the_mean_that_was_asked_for(tmp_path: Path, mean: float) -> None:
    model, given = tiny(tmp_path), inputs(2)
    costs = first_order_costs(model, given, draws=1)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = choose_budgets(model, given, costs, mean)
    handle.remove()
    # Ten sparse passes, and a dense one for each of the inputs.
    assert len(calls) == 12
    assert sum(found.ratios.values()) / len(found.ratios) == pytest.approx(mean, abs=1e-4)
    assert found.tried[found.share] == min(found.tried.values()) <= found.tried[0.0]
    assert all(LEVELS[0] - 1e-9 <= ratio <= 1 for ratio in found.ratios.values())


def test_predictions_at_places_are_those_of_the_whole_row(tmp_path: Path) -> None:
    model, given = tiny(tmp_path), inputs(tokens=64)
    own = spread_predictions(model, given[0])
    torch.testing.assert_close(own, predictions(model, given[0]["input_ids"]))
    few, where = logits.spread_logits(model, given[0], 5)
    assert where.tolist() == [32, 40, 48, 55, 63]
    with override_config(model, dense_below=0):
        whole = model(**given[0], use_cache=False).logits[0]
    torch.testing.assert_close(few.log_softmax(-1), whole[where].log_softmax(-1))
    padded = {
        "input_ids": torch.randint(14, 300, (2, 64)),
        "attention_mask": torch.tensor([[1] * 64, [1] * 40 + [0] * 24]),
    }
    with override_config(model, backend="dense"):
        _, where = logits.spread_logits(model, padded, 10)
    assert where.tolist() == [32, 40, 48, 55, 63, 96]


def test_impossible_arguments_are_named(tmp_path: Path) -> None:
    model, given = tiny(tmp_path), inputs()
    with pytest.raises(ValueError, match="got 0 inputs and 4 draws"):
        first_order_costs(model, [])
    with pytest.raises(ValueError, match="got 1 inputs and 0 draws"):
        first_order_costs(model, given, draws=0)
    with pytest.raises(ValueError, match="shares hold 0"):
        choose_budgets(model, given, {}, 0.2, shares=(1.0,))
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model must be frozen, got lm_head\.weight"):
        first_order_costs(model, given)
