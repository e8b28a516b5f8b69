"""Spread one mean density over the layers of a language model, by what each costs when sparse.

    python -m mm_sparse.recipes.budgets --scorers FOLDER --corpus corpus.npz

A few layers lose most. Each is run sparse alone at several ratios, on sequences that nothing is
reported on; then ratios go up where a step of density buys most.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import mm_sparse as mms
from mm_sparse.recipes.quality import change_of, predictions
from mm_sparse.retrofit import config_of, keeping, layers

L = TypeVar("L", int, str)
LEVELS = (0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0)


def layer_costs(
    model: nn.Module, sequences: Sequence[Tensor], levels: Sequence[float] = LEVELS
) -> dict[int, list[float]]:
    """KL to dense of a model in which one layer is sparse, by index of the layer and by ratio.

    Args:
        sequences: each (1, N) ids.
        levels: ascending ratios; at 1.0 nothing is lost, which is not measured.
    """
    every = sorted(i for layer in layers(model).values() if (i := layer.index) is not None)
    if not every:
        raise ValueError("model must have layers of a decoder, which have an index, got none")

    def measure(ids: Tensor, dense: Tensor, **changes: Any) -> float:
        return change_of(dense, predictions(model, ids, **changes), ids)["kl"]

    cases = [(ids, predictions(model, ids, backend="dense")) for ids in sequences]
    return single_costs(every, cases, measure, levels)


def single_costs(
    every: Sequence[L], cases: Sequence[tuple[Any, Any]], measure: Callable[..., float],
    levels: Sequence[float] = LEVELS,
) -> dict[L, list[float]]:  # fmt: skip
    """Mean cost of each layer as the only sparse one, by layer and by ratio.

    Args:
        every: layers, by index or by name.
        cases: inputs and what the dense model gives for them.
        measure: cost of a case under changes of the config.
    """
    costs = {layer: [0.0] * len(levels) for layer in every}
    for case in cases:
        for layer in every:
            others = tuple(other for other in every if other != layer)
            for at, ratio in enumerate(levels):
                if ratio < 1:
                    changes = {"dense_layers": others, "layer_ratio": {layer: ratio}}
                    costs[layer][at] += measure(*case, **changes) / len(cases)
    return costs


def spread(
    costs: dict[L, list[float]], mean: float, levels: Sequence[float] = LEVELS
) -> dict[L, float]:
    """Ratios by layer whose mean is at most `mean`, from `layer_costs`.

    Greedy on the lower convex hull of each layer's costs, which is the optimum for a sum of them
    up to one step of one layer.
    """
    if not levels[0] <= mean <= levels[-1]:
        raise ValueError(f"mean must be in [{levels[0]}, {levels[-1]}], got {mean}")
    steps: list[tuple[float, L, int, float]] = []
    for layer, own in costs.items():
        at = 0
        while at < len(levels) - 1:
            gains = [
                ((own[at] - own[to]) / (levels[to] - levels[at]), to)
                for to in range(at + 1, len(levels))
            ]
            gain, to = max(gains)
            steps.append((gain, layer, to, levels[to] - levels[at]))
            at = to
    ratios = dict.fromkeys(costs, levels[0])
    left = (mean - levels[0]) * len(costs)
    stopped: set[L] = set()
    for _, layer, to, price in sorted(steps, key=lambda step: -step[0]):
        if layer in stopped:
            continue
        if price > left + 1e-9:
            # What is left goes to this layer as it is; a later step of it may not overtake.
            ratios[layer] = round(ratios[layer] + max(left, 0.0), 4)
            left = 0.0
            stopped.add(layer)
            continue
        ratios[layer], left = levels[to], left - price
    return ratios


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: the scorers' folder gets the ratios into its config."""
    from mm_sparse.recipes.corpus import CorpusData
    from mm_sparse.recipes.parts import LanguagePart

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help='"smollm2", a folder or a name')
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scorers", required=True, help="folder of save_scorers")
    parser.add_argument("--corpus", required=True, help="file of recipes.corpus")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--count", type=int, default=1, help="validation sequences of each kind")
    parser.add_argument("--ratio", type=float, default=None, help="mean; the config's if not given")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = LanguagePart(args.model, options={"dtype": args.dtype}).build(0)
    mms.load_scorers(model.eval().requires_grad_(False).to(device), args.scorers)
    kinds = CorpusData(args.corpus, args.tokens).kinds("validation")
    sequences = [row[None].to(device) for rows in kinds.values() for row in rows[: args.count]]
    costs = layer_costs(model, sequences)
    for layer, own in costs.items():
        print(layer, *(f"{cost:.5f}" for cost in own))
    ratio = config_of(model).ratio if args.ratio is None else args.ratio
    ratios = spread(costs, ratio)
    print(json.dumps({"ratios": ratios, "mean": sum(ratios.values()) / len(ratios)}))
    with keeping(model, ratio=ratio, layer_ratio=ratios):
        mms.save_scorers(model, args.scorers)


if __name__ == "__main__":
    main()
