"""The layout of one attention call, from its mask and from what its tokens are.

B batch, N query tokens, M key tokens
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse.attention import PackedBounds
from mm_sparse.integrations.forward_context import in_backward
from mm_sparse.integrations.hf.lazy_mask import LazyMask
from mm_sparse.integrations.hf.modality_tracker import ModalityTracker
from mm_sparse.integrations.layout_cache import PlainLayouts
from mm_sparse.integrations.mask_spans import layout_from_spans, spans_of_tensor, spans_without_mask
from mm_sparse.integrations.options import AttentionOptions
from mm_sparse.integrations.tower_tokens import TowerTokens, with_grid
from mm_sparse.kernels.device import stream_of
from mm_sparse.layout import CallLayout, TokenLayout
from mm_sparse.modality import Modality


@dataclass(frozen=True, eq=False)
class HFLayoutSource:
    """Where the layouts of a layer come from."""

    tracker: ModalityTracker
    modality: Modality | None
    """What all tokens are; None where the tracker knows."""
    plain: PlainLayouts
    tower: TowerTokens | None = None
    """What is known of the tokens of a vision model."""
    packed: bool = False
    """Whether the layer is given bounds of its own sequences."""

    def layout_of_call(
        self, module: nn.Module, q: Tensor, k: Tensor, mask: Any, options: AttentionOptions
    ) -> CallLayout:
        """Layout of a call; layers that share a mask share it.

        Raises:
            ValueError: the mask is not one range of keys per query, or does not fit.
        """
        packed = None if self.takes_bounds_of_text else options.cu_seqlens
        cuts = None if packed is None else PackedBounds.of(packed).lengths
        causal, window = is_causal(module, options), options.sliding_window
        tokens, prefix, grid = k.shape[2], 0, None
        if self.tower is not None and q.shape[2] == tokens > self.tower.prefix and cuts is None:
            prefix, grid = self.tower.prefix, self.tower.grid_of(tokens)
        # What is made in inference mode is of no use to a backward pass.
        where = q.device, stream_of(q.device), torch.is_inference_mode_enabled()
        key = (self.modality, q.shape[0], cuts, prefix, grid, where)
        if mask is None:
            key += (q.shape[2], k.shape[2], causal, window)
        memo = self._memo(mask)
        call = memo.get(key)
        if call is None:
            rows, queries, keys = q.shape[0], q.shape[2], k.shape[2]
            start, released = 0, False
            if isinstance(mask, LazyMask):
                released = bool(mask.recipe.released)
                span, valid = mask.recipe.spans()
                first, start = mask.recipe.first, mask.recipe.offsets[1]
            elif isinstance(mask, Tensor):
                span, valid, first = spans_of_tensor(mask, queries, keys)
            elif mask is None:
                span, valid, first = spans_without_mask(queries, keys, causal, window)
            else:
                raise ValueError(f"attention_mask must be a tensor, got {type(mask).__name__}")
            span, valid = (x.to(q.device).expand(rows, *x.shape[1:]) for x in (span, valid))
            if cuts is not None:
                span = _cut(span, cuts, keys)
            if released:
                # Heads hold different keys, so that no place is of one kind.
                kinds = torch.zeros(rows, keys, dtype=torch.int8, device=q.device)
            else:
                kinds = self._kinds(rows, start, keys, first + queries, q.device)
            layout = layout_from_spans(span, valid, first, kinds)
            if not released:
                layout = self._parted_by_frames(layout, start)
            layout = with_grid(layout, prefix, grid)
            call = memo[key] = CallLayout(layout, first, prefix)
        self.plain.keep_captured(call)
        return call

    @property
    def lost_forward(self) -> bool:
        """Whether nothing is known of a forward whose tokens may be of several modalities."""
        tracker = self.tracker
        several = self.modality is None and bool(tracker.tokens)
        return several and not (tracker.running.depth or in_backward())

    @property
    def takes_bounds_of_text(self) -> bool:
        """Whether bounds of sequences that reach a call are those of texts, not of its tokens.

        transformers hands the arguments of the whole model on to its towers.
        """
        if self.packed or self.modality is None:
            return False
        return self.tracker.running.bounds is not None

    def _memo(self, mask: Any) -> dict[Any, CallLayout]:
        if isinstance(mask, LazyMask):
            return mask.recipe.layouts
        now = self.tracker.running.modality
        if mask is None:
            self.plain.make_room()
            return self.plain if now is None or self.modality is not None else {}
        # A layer that is called by itself, outside of a forward, finds what the forward made.
        held = getattr(mask, "_mm_sparse_layouts", None)
        version = 0 if mask.is_inference() else mask._version
        if held is None or held[0] != version or (now is not None and held[1] is not now):
            held = mask._mm_sparse_layouts = (version, now, {})
        return held[2]

    def _kinds(
        self, rows: int, start: int, keys: int, written: int, device: torch.device
    ) -> Tensor:
        """(B, M) int8."""
        if self.modality is not None:
            return torch.full((rows, keys), int(self.modality), dtype=torch.int8, device=device)
        kinds = torch.zeros(rows, keys, dtype=torch.int8, device=device)
        running = self.tracker.running
        known = running.modality
        if known is None:
            return kinds
        if len(known) != rows or known.shape[1] < start + written:
            wants = f"the modality of {rows} rows of {start + written} tokens"
            if running.given is not None:
                raise ValueError(
                    f"{wants} must be known, it is of {tuple(known.shape)}; give it with "
                    "`mms.set_modality`"
                )
            # Tokens of a projector or a prefix are none of those that have ids.
            self.tracker.warn_of_text(f"{wants} is not known, it is of {tuple(known.shape)}")
            return kinds
        known = known[:, start : start + keys]
        kinds[:, : known.shape[1]] = known
        return kinds

    def _parted_by_frames(self, layout: TokenLayout, start: int) -> TokenLayout:
        """The layout of keys from `start` on with every frame of a video as a segment."""
        frames = None if self.modality is not None else self.tracker.running.frames
        if frames is None or len(frames) != layout.batch:
            return layout
        frames = frames[:, start : start + layout.length].to(layout.device)
        more = torch.zeros_like(layout.segment)
        more[:, : frames.shape[1]] = frames.cumsum(1)
        return replace(layout, segment=layout.segment + more)


def is_causal(module: nn.Module, options: AttentionOptions) -> bool:
    """Whether a call without a mask is causal."""
    given = options.is_causal
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _cut(span: Tensor, lengths: tuple[int, ...], keys: int) -> Tensor:
    """Keep ranges inside the sequences of a packed row."""
    if len(span) != 1 or span.shape[1] != keys or sum(lengths) != keys:
        raise ValueError(
            f"cu_seq_lens_q must cut one row of {keys} tokens, got {len(span)} rows and sequences "
            f"of {lengths[:8]} tokens"
        )
    sizes = torch.tensor(lengths)
    end = sizes.cumsum(0)
    low, high = (x.repeat_interleave(sizes).to(span.device) for x in (end - sizes, end))
    low, high = span[0, :, 0].maximum(low), span[0, :, 1].minimum(high)
    return torch.stack([low, high], -1).to(torch.int32)[None]
