"""What a cache holds and what it has released, as a table.

B batch, K KV heads, M keys that are held
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mm_sparse.integrations.sparse_cache.layers import SparseCacheLayer
from mm_sparse.modality import Modality


@dataclass(frozen=True)
class CacheLayerRow:
    """One layer of a cache."""

    index: int
    kind: str
    """"sparse", or why nothing is released: the name of the layer's class."""
    seen: int
    """Tokens so far."""
    held: int
    """Keys that every head of a row holds."""
    bytes_held: int
    """Of keys, values and positions, by the storage of the tensors."""
    bytes_released: int
    """What the keys and values of the other tokens would take."""
    kept: dict[Modality, tuple[float, int]] = field(default_factory=dict)
    """By modality, its keys that are held, the mean over rows and heads, and its tokens so far,
    padding included, the mean over rows."""


@dataclass(frozen=True)
class CacheReport:
    """What `SparseCache.report` gives; `print` it, or read its rows."""

    layers: tuple[CacheLayerRow, ...]

    @property
    def bytes_held(self) -> int:
        """Of all layers."""
        return sum(row.bytes_held for row in self.layers)

    @property
    def bytes_released(self) -> int:
        """Of all layers."""
        return sum(row.bytes_released for row in self.layers)

    def __str__(self) -> str:
        kinds = [m for m in Modality if any(m in row.kept for row in self.layers)]
        names = [m.name.lower() for m in kinds]
        head = f"{'layer':>5} {'keys held':>17} {'MiB held':>9} {'released':>9}"
        lines = [head + "".join(f" {name:>18}" for name in names)]
        for row in self.layers:
            line = (
                f"{row.index:>5} {f'{row.held} of {row.seen}':>17} {row.bytes_held / 2**20:>9.2f} "
                f"{row.bytes_released / 2**20:>9.2f}"
            )
            for kind in kinds:
                kept, total = row.kept.get(kind, (0.0, 0))
                line += f" {f'{kept:.0f} of {total}':>18}"
            if row.kind != "sparse":
                line += f"  whole: {row.kind}"
            lines.append(line)
        whole = self.bytes_held + self.bytes_released
        share = self.bytes_released / whole if whole else 0.0
        lines.append(
            f"held {self.bytes_held / 2**20:.2f} MiB, released "
            f"{self.bytes_released / 2**20:.2f} MiB ({share:.0%})"
        )
        return "\n".join(lines)


def layer_row(index: int, layer: Any, modality: Tensor | None) -> CacheLayerRow:
    """The row of a layer.

    Args:
        modality: (B, tokens so far) int8; None where all are text.
    """
    tensors = [getattr(layer, n, None) for n in ("keys", "values", "positions")]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    held_bytes = sum(x.untyped_storage().nbytes() for x in tensors)
    if not isinstance(layer, SparseCacheLayer):
        seen = int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0
        held = tensors[0].shape[-2] if tensors and tensors[0].dim() == 4 else 0
        return CacheLayerRow(index, type(layer).__name__, seen, held, held_bytes, 0)
    if not layer.held:
        return CacheLayerRow(index, "sparse", layer.seen, 0, held_bytes, 0)
    token = sum(x[:, :, 0].numel() * x.element_size() for x in tensors[:2])
    released = token * (layer.seen - layer.held)
    position = layer.true_positions().long()
    batch, heads, held = position.shape
    kept: dict[Modality, tuple[float, int]] = {}
    if modality is None:
        kept[Modality.TEXT] = float(held), layer.seen
    else:
        known = modality.to(position.device)
        missing = layer.seen - known.shape[1]
        for kind in Modality:
            own = known == int(kind)
            total = int(own.sum()) // len(own)
            inside = position.clamp(max=known.shape[1] - 1)
            mine = own[:, None].expand(-1, heads, -1).gather(-1, inside)
            # Tokens behind those that are known are text.
            late = position >= known.shape[1]
            mine = (mine & ~late) | (late if kind == Modality.TEXT else late & False)
            total += max(0, missing) if kind == Modality.TEXT else 0
            if total:
                kept[kind] = float(mine.sum()) / (batch * heads), total
    return CacheLayerRow(index, "sparse", layer.seen, layer.held, held_bytes, released, kept)
