"""Spread one mean density over the layers, or KV heads, of a language model by what each costs.

    python -m mm_sparse.recipes.distillation.budget_search --scorers FOLDER --corpus corpus.npz

A few layers lose most, and in them a few heads. Each is run sparse alone at several ratios, on
sequences that nothing is reported on; then ratios go up where a step of density buys most.
"""

import argparse
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from math import fsum
from typing import Any, TypeVar

from torch import Tensor, nn

import mm_sparse as mms
from mm_sparse import Modality
from mm_sparse.integrations import attention_layers, override_config, scorer_shape, sparse_config
from mm_sparse.recipes.metrics import change_of, predictions
from mm_sparse.recipes.run import prepared

LEVELS = (0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0)
HeadPlace = tuple[int | str, int | None]
"""A layer, by its index in a decoder or else by name, and a KV head of it; None for all heads."""
Place = HeadPlace | tuple[int | str, int | None, Modality]
"""The same, and the modality of the queries where it has a budget of its own."""
K = TypeVar("K", bound=Hashable)


def budget_slots(model: nn.Module, by_head: bool) -> dict[HeadPlace, int]:
    """Layers, or heads, that budgets are spread over, and how many KV heads their layer has."""
    group_heads: dict[HeadPlace, int] = {}
    for name, layer in attention_layers(model).items():
        if layer.known_mode()[0] == "sparse":
            heads = scorer_shape(layer.module)[1]
            for head in range(heads) if by_head else [None]:
                group_heads[name if layer.index is None else layer.index, head] = heads
    if not group_heads:
        raise ValueError("model must have layers that may run sparse, got none")
    return group_heads


def costs_of(
    model: nn.Module,
    cases: Sequence[tuple[Any, Any]],
    measure: Callable[..., float],
    levels: Sequence[float] = LEVELS,
    *,
    by_head: bool = False,
) -> dict[Place, list[float]]:
    """Mean cost of a model in which one layer, or KV head, drops keys, by place and ratio.

    What a layer costs that keeps everything is rounding, and is taken off.

    Args:
        cases: inputs and what the dense model gives for them.
        measure: cost of a case under changes of the config.
        levels: ascending ratios; at 1.0 nothing is lost.
    """
    places = budget_slots(model, by_head)
    every = dict.fromkeys(layer for layer, _ in places)
    costs: dict[Place, list[float]] = {place: [0.0] * len(levels) for place in places}
    for case in cases:

        def cost(layer: int | str, ratio: Any, case: tuple[Any, Any] = case) -> float:
            others = tuple(other for other in every if other != layer)
            return measure(*case, dense_layers=others, layer_ratio={layer: ratio})

        rounding = {layer: cost(layer, 1.0) for layer in every}
        for (layer, head), heads in places.items():
            for at, level in enumerate(levels):
                if level < 1:
                    ratio = [level if h == head else 1.0 for h in range(heads)]
                    rise = cost(layer, level if head is None else ratio) - rounding[layer]
                    costs[layer, head][at] += max(rise, 0.0) / len(cases)
    return costs


def language_costs(
    model: nn.Module,
    sequences: Sequence[Tensor],
    levels: Sequence[float] = LEVELS,
    *,
    by_head: bool = False,
) -> dict[Place, list[float]]:
    """`costs_of` a language model: KL to dense on sequences of (1, N) ids."""

    def measure(ids: Tensor, dense: Tensor, **changes: Any) -> float:
        return change_of(dense, predictions(model, ids, **changes), ids)["kl"]

    cases = [(ids, predictions(model, ids, backend="dense")) for ids in sequences]
    return costs_of(model, cases, measure, levels, by_head=by_head)


def layer_ratios(ratios: Mapping[Place, float]) -> dict[int | str, Any]:
    """`SparseConfig.layer_ratio` of ratios by place."""
    by_layer: dict[int | str, Any] = {}
    for (layer, head, *kind), ratio in ratios.items():
        own: Any = by_layer.setdefault(layer, {}) if kind else by_layer
        key = kind[0] if kind else layer
        own[key] = ratio if head is None else (*own.get(key, ()), ratio)
    return by_layer


def spread(
    costs: Mapping[K, Sequence[float]],
    mean: float,
    levels: Sequence[float] = LEVELS,
    weights: Mapping[K, float] | None = None,
) -> dict[K, float]:
    """Ratios whose mean is at most `mean`, from `costs_of`: whoever gains most gets the next step.

    Greedy on the lower convex hull of each one's costs, which is the optimum for a sum of them
    up to one step of one of them.

    Args:
        weights: of the mean, pairs that a ratio is a share of; the same for all if None.
    """
    if not levels[0] <= mean <= levels[-1]:
        raise ValueError(f"mean must be in [{levels[0]}, {levels[-1]}], got {mean}")
    steps: list[tuple[float, K, int, float]] = []
    part = dict.fromkeys(costs, 1.0)
    if weights is not None:
        scale = len(costs) / fsum(weights[key] for key in costs)
        part = {key: weights[key] * scale for key in costs}
    # Without pairs nothing is lost, and nothing paid.
    costs = {key: own for key, own in costs.items() if part[key]}
    for key, own in costs.items():
        at = 0
        while at < len(levels) - 1:
            gains = [
                ((own[at] - own[to]) / (part[key] * (levels[to] - levels[at])), to)
                for to in range(at + 1, len(levels))
            ]
            gain, to = max(gains)
            steps.append((gain, key, to, part[key] * (levels[to] - levels[at])))
            at = to
    ratios = dict.fromkeys(part, levels[0])
    left = (mean - levels[0]) * len(part)
    stopped: set[K] = set()
    for _, key, to, price in sorted(steps, key=lambda step: -step[0]):
        if key in stopped:
            continue
        if price > left + 1e-9:
            # What is left goes to this one as it is; a later step of it may not overtake.
            ratios[key] = round(ratios[key] + max(left, 0.0) / part[key], 4)
            left = 0.0
            stopped.add(key)
            continue
        ratios[key], left = levels[to], left - price
    return ratios


def budgets_parser(description: str | None) -> argparse.ArgumentParser:
    """Options of programs that write ratios into the config of a scorers' folder."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help='"smollm2", a folder or a name')
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scorers", required=True, help="folder of save_scorers")
    parser.add_argument("--corpus", required=True, help="file of recipes.data.text_corpus")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--count", type=int, default=1, help="validation sequences of each kind")
    parser.add_argument("--by", choices=("layer", "head"), default="head")
    parser.add_argument("--ratio", type=float, default=None, help="mean; the config's if not given")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: the scorers' folder gets the ratios into its config."""
    from mm_sparse.recipes.data import CorpusData

    parser = budgets_parser(__doc__)
    args = parser.parse_args(argv)
    model, _ = prepared(args)
    device = next(model.parameters()).device
    kinds = CorpusData(args.corpus, args.tokens).kinds("validation")
    sequences = [row[None].to(device) for rows in kinds.values() for row in rows[: args.count]]
    costs = language_costs(model, sequences, by_head=args.by == "head")
    save_spread(model, costs, args.ratio, args.scorers)


def save_spread(
    model: nn.Module, costs: dict[Place, list[float]], ratio: float | None, folder: str
) -> None:
    """Print costs and ratios, and write the scorers with them; the config's ratio if None."""
    for place, own in costs.items():
        print(*place, *(f"{cost:.5f}" for cost in own))
    ratio = sparse_config(model).ratio if ratio is None else ratio
    ratios = spread(costs, ratio)
    mean = sum(ratios.values()) / len(ratios)
    print(json.dumps({"layer_ratio": layer_ratios(ratios), "mean": mean}))
    with override_config(model, ratio=ratio, layer_ratio=layer_ratios(ratios)):
        mms.save_scorers(model, folder)


if __name__ == "__main__":
    main()
