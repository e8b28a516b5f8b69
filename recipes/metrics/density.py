"""Density of the sparse parts of a model."""

from typing import Any

import mm_sparse as mms
from mm_sparse.modality import Modality

Pair = tuple[Modality, Modality]


def densities(model: Any) -> dict[str, float]:
    """Kept over visible query-key pairs in the last forward pass of a recipe's model, 1 if dense.

    Mean over the layers that ran sparse, in all and by modalities of query and key; those of a
    tower that runs sparse stand beside, as "audio/all".
    """
    shares = {"all": 1.0}
    for part in model.sparse_configs:
        own = _part_densities(getattr(model, part))
        shares |= own if part == "language" else {f"{part}/all": own["all"]}
    return shares


def _part_densities(part: Any) -> dict[str, float]:
    rows = [row for row in mms.report(part).rows if row.mode == "sparse"]
    rows = [row for row in rows if row.density is not None]
    if not rows:
        return {"all": 1.0}
    pairs: dict[Pair, list[float]] = {}
    for row in rows:
        for pair, density in (row.pair_density or {}).items():
            pairs.setdefault(pair, []).append(density)
    shares = {"all": sum(row.density or 0.0 for row in rows) / len(rows)}
    for (query, key), values in sorted(pairs.items()):
        shares[f"{query.name}>{key.name}"] = sum(values) / len(values)
    return shares
