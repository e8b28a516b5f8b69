"""The layout of a call in a tower: class and register tokens in front, then patches or frames.

B batch, H heads, N tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse.integrations.layout_cache import LayoutCache, PlainLayouts, one_for_all
from mm_sparse.integrations.mask_spans import (
    layout_from_spans,
    spans_of_tensor,
    spans_without_mask,
    visible_from_mask,
)
from mm_sparse.integrations.options import AttentionOptions
from mm_sparse.integrations.tower_tokens import TowerTokens, with_grid
from mm_sparse.kernels.device import stream_of
from mm_sparse.layout import CallLayout

# Numbers down from here hide a key: torchaudio writes -10000, which bfloat16 rounds.
HIDDEN = -9000.0


@dataclass(frozen=True, eq=False)
class MultiheadMasks:
    """The masks of an `nn.MultiheadAttention`, in which True hides."""

    attention: Tensor | None
    """(N, N) or (B * H, N, N)."""
    padding: Tensor | None
    """(B, N)."""

    def parts(self) -> tuple[Tensor, ...]:
        """The masks that there are."""
        return tuple(mask for mask in (self.attention, self.padding) if mask is not None)

    def visible_from_mask(self, heads: int) -> Tensor:
        """(B or 1, H or 1, N or 1, N) bool, True where a key is seen."""
        seen = [_seen(~mask if mask.dtype == torch.bool else mask) for mask in self.parts()]
        if self.attention is not None:
            grouped = seen[0].dim() == 3
            seen[0] = seen[0].unflatten(0, (-1, heads)) if grouped else seen[0][None, None]
        if self.padding is not None:
            seen[-1] = seen[-1][:, None, None]
        return seen[0] if len(seen) == 1 else seen[0] & seen[1]


@dataclass(frozen=True, eq=False)
class TowerLayoutSource:
    """Where the layouts of a tower's layers come from."""

    tower: TowerTokens
    plain: PlainLayouts
    masked: LayoutCache

    def layout_of_call(
        self, module: nn.Module, q: Tensor, k: Tensor, mask: Any, options: AttentionOptions
    ) -> CallLayout:
        """Layout of a call; layers that share a mask share it.

        Raises:
            ValueError: the mask is not one range of keys per query, or does not fit.
        """
        rows, heads, tokens = q.shape[:3]
        causal, prefix = bool(options.is_causal), self.tower.prefix
        grid = self.tower.grid_of(tokens)
        # The same tensor may come where True shows and where True hides.
        form = type(mask), getattr(mask, "attention", None) is None
        # What is made in inference mode is of no use to a backward pass.
        where = q.device, stream_of(q.device), torch.is_inference_mode_enabled()
        key = (self.tower.modality, prefix, grid, rows, heads, tokens, causal, form, where)
        memo = self._memo(mask)
        call = memo.get(key)
        if call is None:
            if mask is None:
                span, valid, first = spans_without_mask(tokens, tokens, causal, None)
            else:
                seen = _square(mask, rows, heads, tokens)
                span, valid, first = spans_of_tensor(seen, tokens, tokens)
            span, valid = (x.to(q.device).expand(rows, *x.shape[1:]) for x in (span, valid))
            kinds = torch.full_like(valid, int(self.tower.modality), dtype=torch.int8)
            layout = layout_from_spans(span, valid, first, kinds)
            layout = with_grid(layout, prefix, grid)
            call = memo[key] = CallLayout(layout, first, prefix)
        self.plain.keep_captured(call)
        return call

    def _memo(self, mask: Any) -> dict[Any, CallLayout]:
        if mask is None:
            self.plain.make_room()
            return self.plain
        return self.masked.of(mask.parts() if isinstance(mask, MultiheadMasks) else (mask,))


def _seen(mask: Tensor) -> Tensor:
    return visible_from_mask(one_for_all(mask), HIDDEN)


def _square(mask: Any, rows: int, heads: int, tokens: int) -> Tensor:
    """(B or 1, H or 1, N or 1, N) bool of whatever SDPA or `nn.MultiheadAttention` takes."""
    seen = mask.visible_from_mask(heads) if isinstance(mask, MultiheadMasks) else _seen(mask)
    seen = seen[(None,) * (4 - seen.dim())]
    sizes = (rows, heads, tokens, tokens)
    if seen.dim() != 4 or any(s not in (1, n) for s, n in zip(seen.shape, sizes, strict=True)):
        raise ValueError(
            f"attention_mask must be for (batch, heads, N, N) = {sizes}, got {tuple(seen.shape)}"
        )
    return seen.expand(-1, -1, -1, tokens)
