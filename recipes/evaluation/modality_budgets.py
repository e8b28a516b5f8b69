"""Budgets of a recipe's language model by KV head, and by KV head and modality of the queries."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mm_sparse.integrations import sparse_config
from mm_sparse.recipes.data import Batch
from mm_sparse.recipes.distillation import (
    QUERY_LEVELS,
    Place,
    choose_budgets,
    first_order_costs,
    layer_ratios,
    pair_weights,
)
from mm_sparse.recipes.models import MultimodalTraining


def spread_ratios(
    model: MultimodalTraining, batches: Sequence[Batch], *, draws: int = 2
) -> dict[str, dict[int | str, Any]]:
    """`SparseConfig.layer_ratio` by "head", and by "query": head and modality of the queries.

    Both are spread from the same costs, of what the model says where it is asked, at the mean
    density of its config.

    Args:
        model: frozen, with the scorers that rank.
        batches: with answers, and nothing that is reported on.
        draws: passes forward and back for each of them.
    """

    def ask(batch: Batch) -> Tensor:
        return model.answers(batch).logits

    language, mean = model.language, sparse_config(model.language).ratio
    by_query = first_order_costs(
        language, batches, QUERY_LEVELS, by_modality=True, draws=draws, logits=ask
    )
    by_head: dict[Place, list[float]] = {}
    for (layer, head, *_), own in by_query.items():
        before = by_head.get((layer, head), [0.0] * len(own))
        by_head[layer, head] = [a + b for a, b in zip(before, own, strict=True)]
    found: dict[str, dict[int | str, Any]] = {}
    for name, costs in (("head", by_head), ("query", by_query)):
        weights = pair_weights(language, batches, costs, logits=ask)
        chosen = choose_budgets(
            language, batches, costs, mean, QUERY_LEVELS, weights=weights, logits=ask
        )
        found[name] = layer_ratios(chosen.ratios)
    return found


def named_ratios(ratios: Mapping[int | str, Any]) -> dict[str, Any]:
    """Ratios of layers as JSON has them: modalities by name, ratios of heads in lists."""

    def plain(own: Any) -> Any:
        if isinstance(own, Mapping):
            return {m.name: plain(x) for m, x in own.items()}
        return list(own) if isinstance(own, tuple) else own

    return {str(layer): plain(own) for layer, own in ratios.items()}
