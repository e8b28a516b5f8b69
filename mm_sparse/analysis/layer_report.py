"""What each layer of a sparsified model did in its last call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse.config import SparseConfig
from mm_sparse.integrations import AttentionCall, SparseLayer, attention_layers, capture_attention
from mm_sparse.modality import Modality
from mm_sparse.scorers import unit_mass
from mm_sparse.selection import Selection

Pair = tuple[Modality, Modality]
_COLUMNS = ("layer", "class", "mode", "queries", "keys", "density", "mass", "ms", "")


@dataclass(frozen=True)
class Row:
    """One layer; what is not known is None."""

    name: str
    cls: str
    mode: str
    """"sparse", "dense", or "refused": it cannot be served and runs as it did before."""
    reason: str
    """Why it is not sparse, or keeps clearly more than was asked for."""
    queries: int | None = None
    keys: int | None = None
    density: float | None = None
    """Kept visible query-key pairs over visible pairs; 1.0 where it ran dense."""
    head_density: tuple[float, ...] = ()
    """The same by KV head."""
    pair_density: Mapping[Pair, float] | None = None
    """The same by modality of query and key."""
    mass: float | None = None
    """Attention mass on the kept units, mean over queries and heads."""
    seconds: float | None = None


@dataclass(frozen=True)
class Report:
    """Rows of all layers; prints as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        table = [_COLUMNS, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(_COLUMNS))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        )

    @property
    def density(self) -> float | None:
        """Mean density of the layers that ran."""
        known = [row.density for row in self.rows if row.density is not None]
        return sum(known) / len(known) if known else None

    def to_json(self) -> str:
        """A list with an object per layer; pairs are named "TEXT>IMAGE", query first."""
        records = []
        for row in self.rows:
            record: dict[str, Any] = {**asdict(row), "class": row.cls}
            del record["cls"]
            if row.pair_density is not None:
                record["pair_density"] = {_pair(p): d for p, d in row.pair_density.items()}
            records.append(record)
        return json.dumps(records)

    def plot(self, path: str | Path) -> None:
        """Save a figure: density of every layer, in all and by pair of modalities."""
        from matplotlib.figure import Figure

        pairs = sorted({p for row in self.rows for p in row.pair_density or {}})
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot()
        at = [i for i, row in enumerate(self.rows) if row.density is not None]
        axes.bar(at, [self.rows[i].density or 0 for i in at], color="lightgrey", label="all")
        for pair in pairs if len(pairs) > 1 else []:
            values = [(self.rows[i].pair_density or {}).get(pair, float("nan")) for i in at]
            axes.plot(at, values, marker="o", linewidth=1, label=_pair(pair))
        axes.set_xlabel("layer, in the model's order")
        axes.set_ylabel("kept pairs / visible pairs")
        axes.set_ylim(0, 1.05)
        axes.legend(fontsize="small")
        figure.savefig(path)


def report(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, *, mass: bool = False
) -> Report:
    """What the layers of a sparsified model did in their last call.

    Args:
        inputs: run the model on these first, without gradients, and measure time.
        mass: with `inputs`, also measure how much attention mass lies on what was kept.
    """
    if mass and inputs is None:
        raise ValueError("inputs must be given to measure mass, got None")
    seconds: dict[str, float] = {}
    kept: dict[str, float] = {}

    def watcher(call: AttentionCall) -> None:
        # A tower may call a layer once per image: its time adds up, its mass is the last one's.
        seconds[call.name] = seconds.get(call.name, 0.0) + (call.seconds or 0.0)
        if mass and call.selection is not None:
            kept[call.name] = kept_mass(call.q, call.k, call.selection, call.scale)

    if inputs is not None:
        with capture_attention(model, watcher, timed=True), torch.no_grad():
            model(**inputs)
    return Report(
        tuple(
            replace(_row(name, layer), mass=kept.get(layer.name), seconds=seconds.get(layer.name))
            for name, layer in attention_layers(model).items()
        )
    )


def kept_mass(q: Tensor, k: Tensor, selection: Selection, scale: float | None = None) -> float:
    """Share of the softmax mass of full attention that lies on the kept units.

    Mean over heads and over queries that see a key. Computed some tiles at a time.
    """
    plan = selection.plan
    true = unit_mass(q, k, plan, scale)  # (B, K, T, U)
    slot = torch.arange(selection.index.shape[-1], device=q.device)
    listed = slot < selection.count[..., None]
    picked = true.gather(-1, selection.index.clamp(min=0).long()) * listed
    live = (true.sum(-1) > 0).float() * plan.tiles[:, None, :, 1]
    return float((picked.sum(-1) * live).sum() / live.sum().clamp(min=1))


def _row(name: str, layer: SparseLayer) -> Row:
    """Name of the layer in the model that is asked for, which may wrap the sparsified one."""
    cls, record, replaced = type(layer.module).__name__, layer.record, layer.taken_away()
    if replaced:
        return Row(name, cls, "dense", replaced)
    if record is None:
        mode, reason = layer.idle_mode()
        return Row(name, cls, mode, reason)
    row = Row(name, cls, record.mode, record.reason, record.queries, record.keys, 1.0)
    selection = record.selection
    if selection is None:
        return row
    density = selection.density()
    heads = [
        Selection(
            selection.index[:, h : h + 1], selection.count[:, h : h + 1], selection.plan
        ).density()
        for h in range(selection.index.shape[1])
    ]
    return Row(
        **{
            **vars(row),
            "density": density,
            "reason": _why_more(density, selection.plan.config),
            "head_density": tuple(heads),
            "pair_density": selection.density_by_modality(),
        }
    )


def _why_more(density: float, config: SparseConfig) -> str:
    """What keeps clearly more keys than were asked for: they are kept whatever the scores say."""
    if config.tokens is not None or config.top_p is not None:
        return ""
    # By what queries there were, the mean may be any of these.
    ratio = max(map(fmean, config.ratio_table)) if config.query_ratio else config.ratio
    if density <= 1.25 * ratio:
        return ""
    return f"sinks {config.sinks} and window {config.window} keep more than ratio {ratio:g}"


def _cells(row: Row) -> tuple[str, ...]:
    notes = [row.reason] if row.reason else []
    if row.pair_density is not None and len(row.pair_density) > 1:
        notes += [f"{_pair(pair)} {value:.2f}" for pair, value in row.pair_density.items()]
    return (
        row.name,
        row.cls,
        row.mode,
        "" if row.queries is None else str(row.queries),
        "" if row.keys is None else str(row.keys),
        "" if row.density is None else f"{row.density:.3f}",
        "" if row.mass is None else f"{row.mass:.3f}",
        "" if row.seconds is None else f"{row.seconds * 1e3:.2f}",
        ", ".join(notes),
    )


def _pair(pair: Pair) -> str:
    return f"{pair[0].name}>{pair[1].name}"
