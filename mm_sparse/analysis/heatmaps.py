"""Figures of a report: density by modality of query and key, and by layer and head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mm_sparse.analysis.layer_report import Report, Row
from mm_sparse.modality import Modality


def _sparse_rows(report: Report) -> list[Row]:
    rows = [row for row in report.rows if row.mode == "sparse" and row.density is not None]
    if not rows:
        raise ValueError("report must hold a layer that ran sparse, got none: call the model first")
    return rows


def modality_densities(report: Report) -> dict[tuple[Modality, Modality], float]:
    """Density by modality of query and of key, mean over the layers that ran sparse."""
    densities: dict[tuple[Modality, Modality], list[float]] = {}
    for row in _sparse_rows(report):
        for pair, density in (row.pair_density or {}).items():
            densities.setdefault(pair, []).append(density)
    return {pair: sum(values) / len(values) for pair, values in densities.items()}


def draw_modalities(report: Report, title: str = "") -> Any:
    """A matplotlib figure: modality of the query down, of the key across."""
    pairs = modality_densities(report)
    kinds = sorted({kind for pair in pairs for kind in pair})
    names = [kind.name.lower() for kind in kinds]
    values = [[pairs.get((q, k), math.nan) for k in kinds] for q in kinds]
    return _draw(values, names, names, ("query", "key"), title or "kept / visible pairs", True)


def draw_heads(report: Report, title: str = "") -> Any:
    """A matplotlib figure: layers down, KV heads across."""
    rows = _sparse_rows(report)
    heads = max(len(row.head_density) for row in rows)
    values = [[*row.head_density, *[math.nan] * (heads - len(row.head_density))] for row in rows]
    names = [row.name for row in rows]
    columns = [str(head) for head in range(heads)]
    return _draw(values, names, columns, ("", "KV head"), title or "kept / visible pairs", False)


def _draw(
    values: list[list[float]], rows: Sequence[str], columns: Sequence[str],
    labels: tuple[str, str], title: str, written: bool,
) -> Any:  # fmt: skip
    from matplotlib.figure import Figure

    width = 3 + 0.06 * max(len(name) for name in rows) + 0.5 * len(columns)
    figure = Figure(figsize=(width, 1.6 + 0.35 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    shade = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize="small")
    axes.set_yticks(range(len(rows)), rows, fontsize="small")
    axes.set_ylabel(labels[0])
    axes.set_xlabel(labels[1])
    for r, line in enumerate(values):
        for c, value in enumerate(line):
            if not math.isnan(value) and (written or len(columns) <= 16):
                ink = "black" if value > 0.6 else "white"
                axes.text(c, r, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(shade, ax=axes)
    axes.set_title(title, fontsize="medium")
    return figure
