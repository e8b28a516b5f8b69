"""How many keys a layer of a cache keeps, and which of them in any case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mm_sparse.config import UNITS
from mm_sparse.modality import Modality

# What a range of shares may miss by rounding.
ROUNDING = 1e-6


@dataclass(frozen=True)
class CacheBudget:
    """What the layers of a `SparseCache` keep."""

    keep: float | Sequence[float] = 0.4
    """Share of the keys so far, in (0, 1]; one number, or one for each layer of the decoder."""
    tokens: int | None = None
    """Number of keys, instead of a share."""
    sinks: int = 4
    """First keys of a row that are always kept."""
    window: int = 128
    """Newest keys that are always kept; their queries say what else matters."""
    near: int = 15
    """Neighbours of which the best may rank a key; odd, 1 for none."""
    unit: int | None = None
    """Keys that are kept or released together: 16, 32, 64 or 128; None for single keys."""
    shares: Mapping[Modality, float] = field(default_factory=dict)
    """By modality, the share of the budget that is its own."""
    floors: Mapping[Modality, float] = field(default_factory=dict)
    """By modality, the share of its own keys below which it never falls; before the budget."""

    def __post_init__(self) -> None:
        keep = (self.keep,) if isinstance(self.keep, int | float) else tuple(self.keep)
        if not keep or not all(0 < k <= 1 for k in keep):
            raise ValueError(f"keep must be in (0, 1], or one such number a layer, got {self.keep}")
        if not isinstance(self.keep, int | float):
            object.__setattr__(self, "keep", keep)
        if self.tokens is not None and (not _is_int(self.tokens) or self.tokens < 1):
            raise ValueError(f"tokens must be a positive int or None, got {self.tokens!r}")
        if not _is_int(self.sinks) or self.sinks < 0:
            raise ValueError(f"sinks must be an int from 0 on, got {self.sinks!r}")
        if not _is_int(self.window) or self.window < 1:
            raise ValueError(f"window must be a positive int, got {self.window!r}")
        if not _is_int(self.near) or self.near < 1 or self.near % 2 == 0:
            raise ValueError(f"near must be an odd positive int, got {self.near!r}")
        if self.unit is not None and self.unit not in UNITS:
            raise ValueError(f"unit must be one of {UNITS} or None, got {self.unit!r}")
        for name in ("shares", "floors"):
            given = dict(getattr(self, name))
            for kind, share in given.items():
                if not isinstance(kind, Modality) or not 0 <= share <= 1:
                    raise ValueError(
                        f"{name} must be numbers in [0, 1] by mms.Modality, got {kind!r}: {share!r}"
                    )
            object.__setattr__(self, name, given)
        if sum(self.shares.values()) > 1 + ROUNDING:
            raise ValueError(f"shares must not exceed 1 together, got {self.shares}")

    def check_layers(self, layers: int) -> None:
        """Refuse a `keep` of another number of layers."""
        if not isinstance(self.keep, int | float) and len(self.keep) != layers:
            raise ValueError(
                f"keep must have a number for each of {layers} layers, got {len(self.keep)}"
            )

    def keys(self, layer: int, seen: int) -> int:
        """Keys that a layer keeps of so many; never fewer than `sinks` and `window`."""
        if self.tokens is not None:
            wanted = self.tokens
        else:
            keep = self.keep if isinstance(self.keep, int | float) else self.keep[layer]
            wanted = math.ceil(keep * seen - ROUNDING)
        return min(seen, max(wanted, self.sinks + self.window))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
