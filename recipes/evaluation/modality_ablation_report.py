"""Rows of the ablation: what scoring costs, means over seeds, differences to the blind scorers."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mm_sparse import FineScorer
from mm_sparse.layout import Plan
from mm_sparse.scorers import OracleScorer, SlidingWindow


def scoring_cost(scorer: Any, plan: Plan, heads: int, dim: int) -> float:
    """FLOPs of a layer's scoring in % of those of dense attention on the same tokens."""
    if isinstance(scorer, SlidingWindow):
        return 0.0
    kv_heads = heads // plan.group
    tokens = plan.num_queries, plan.layout.length
    if isinstance(scorer, OracleScorer):
        return 50.0
    parts = getattr(scorer, "parts", 1)
    descriptors = plan.tiles.shape[1] * plan.live_query_pools.shape[2], plan.units.shape[1]
    rows, units = heads * descriptors[0], descriptors[1]
    products = rows * units * dim * (1 + parts if parts > 1 else 1)
    if isinstance(scorer, FineScorer):
        # One product with all maps side by side, and that of descriptors without a modality.
        maps = 1 if scorer.modalities is None else len(scorer.modalities) + 1
        products += (rows + kv_heads * units * parts) * 3 * dim * dim * maps
    return 100 * products / (2 * heads * tokens[0] * tokens[1] * dim)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the standard error of each mean where there are several."""
    figures: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        if isinstance(first, dict):
            # A pair may be without a best unit where a seed's layers see other queries.
            keys = dict.fromkeys(key for value in values for key in value)
            figures[name] = {
                key: round(statistics.fmean(v[key] for v in values if key in v), 4) for key in keys
            }
        elif isinstance(first, float):
            figures[name] = round(statistics.fmean(values), 5)
            if len(values) > 1:
                figures[f"{name}_se"] = round(standard_error(values), 5)
    by_sample = [statistics.fmean(x) for x in zip(*(r["kl_by_sample"] for r in runs), strict=True)]
    figures["kl_by_sample"] = [round(x, 5) for x in by_sample]
    figures["kl_se_samples"] = round(standard_error(by_sample), 5)
    figures["kl_by_seed"] = [round(run["kl"], 5) for run in runs]
    return figures


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for a single one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def beside_blind(row: Mapping[str, Any], blind: Mapping[str, Any]) -> dict[str, float]:
    """Mean difference of KL to the blind scorers', and its standard errors, paired."""
    figures: dict[str, float] = {}
    pairs = zip(row["kl_by_sample"], blind["kl_by_sample"], strict=True)
    change = [own - other for own, other in pairs]
    figures["kl_change"] = round(statistics.fmean(change), 5)
    figures["kl_change_se_samples"] = round(standard_error(change), 5)
    if len(row["kl_by_seed"]) == len(blind["kl_by_seed"]):
        seeds = zip(row["kl_by_seed"], blind["kl_by_seed"], strict=True)
        figures["kl_change_se_seeds"] = round(standard_error([a - b for a, b in seeds]), 5)
    return figures


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a line per variant, standard errors over seeds behind +-."""

    def cell(row: Mapping[str, Any], name: str, form: str) -> str:
        if name not in row:
            return ""
        error = row.get(f"{name}_se")
        return format(row[name], form) + ("" if error is None else f" ± {error:{form}}")

    def change(row: Mapping[str, Any]) -> str:
        if "kl_change" not in row:
            return ""
        error = row.get("kl_change_se_seeds", row["kl_change_se_samples"])
        return f"{row['kl_change']:+.4f} ± {error:.4f}"

    lines = [
        ["variant", "parameters", "cost %", "density %", "kept %", "overlap %", "KL", "KL - blind",
         "exact match %"],
        ["---"] * 9,
    ]  # fmt: skip
    for name, row in rows.items():
        shares = {k: row[k] * 100 for k in ("density", "kept", "overlap", "exact_match")}
        errors = {f"{k}_se": row[f"{k}_se"] * 100 for k in shares if f"{k}_se" in row}
        own = {**row, **shares, **errors}
        lines.append([
            name, str(row["parameters"]), f"{row['cost']:.1f}",
            f"{own['density']:.2f}", cell(own, "kept", ".1f"), cell(own, "overlap", ".1f"),
            cell(own, "kl", ".4f"), change(row), cell(own, "exact_match", ".1f"),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pair_table(rows: Mapping[str, Mapping[str, Any]], figure: str) -> str:
    """Markdown: `figure` in % by pair of modalities, a line per variant."""
    pairs = list(dict.fromkeys(pair for row in rows.values() for pair in row[f"{figure}_by_pair"]))
    lines = [[figure, *pairs], ["---"] * (len(pairs) + 1)]
    for name, row in rows.items():
        own = row[f"{figure}_by_pair"]
        lines.append([name, *(f"{100 * own[p]:.1f}" if p in own else "" for p in pairs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
